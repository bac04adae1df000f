"""Prior of the calibration: how often, and by how much, benign traffic passes u, by analytic and age group.

Measured on the rows labelled benign of seven public data sets (westermo, dapt2020, ctu50, iot23, ctu_sme11, rita,
darpa98), the only place where labels enter: every analytic over panes of 10 s, nothing raised, exceedances winsorised.
Rate = (Σ w k + 1) / (Σ w N + 500), mean excess = (Σ w E + 3 · 0.5) / (Σ w k + 3), where w gives no data set more than a
thousand host-blocks. "meeting" is from the three on which the graph's prior has been run (dapt2020, ctu50, ctu_sme11:
882 first meetings asked about).
"""

GROUPS = ("new host", "new key", "young key", "old key")
"""A host or key is new for an hour and young for a day; "new key" is one of a host that is not new."""

PRIOR: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # name: ((exceedances a host-block), (mean excess over u, nats))
    "burst": ((0.59, 0.052, 0.0044, 0.0041), (0.34, 0.24, 0.9, 0.42)),
    "fan": ((0.59, 0.00028, 0.0085, 0.0017), (0.21, 0.5, 0.47, 0.67)),
    "sweep": ((0.19, 0.066, 0.0041, 0.00048), (0.19, 0.2, 0.76, 0.44)),
    "ports": ((0.59, 0.031, 0.013, 0.0044), (0.2, 0.3, 0.71, 0.29)),
    "guess": ((0.042, 0.0017, 0.0016, 0.0029), (0.51, 0.65, 0.4, 0.45)),
    "fail": ((0.21, 0.00028, 0.01, 0.0011), (0.24, 0.5, 0.79, 0.38)),
    "lateral": ((0.0015, 0.00028, 0.00099, 0.001), (0.65, 0.5, 0.43, 0.38)),
    "exfil": ((0.0015, 0.0017, 0.0011, 0.001), (0.42, 1.8, 0.38, 1)),
    "drip": ((0.0069, 0.0028, 0.0034, 0.001), (0.34, 1.2, 1.4, 1)),
    "flood": ((0.72, 0.00018, 0.092, 0.062), (0.63, 0.5, 0.84, 0.39)),
    "fan-in": ((0.73, 0.00018, 0.04, 0.061), (0.2, 0.5, 0.31, 0.2)),
    "fail-in": ((0.043, 0.00018, 0.02, 0.0069), (0.35, 0.5, 0.47, 0.28)),
    "novelty": ((0.002, 0.00028, 0.0043, 0.0015), (0.31, 0.5, 0.57, 1.2)),
    "beacon": ((0.0005, 0.002, 0.0036, 0.0038), (0.5, 1.3, 0.87, 1.8)),
    "meeting": ((0.012, 0.0033, 0.0033, 0.005), (1.0, 1.3, 1.3, 1.3)),
    "joint": ((0.029, 0.00028, 0.009, 0.0029), (1.8, 0.5, 1.8, 1.6)),
}
