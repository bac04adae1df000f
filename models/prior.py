"""Prior of the calibration: how often, and by how much, benign traffic passes u, by analytic and age group.

Measured on the rows labelled benign of seven public data sets (westermo, dapt2020, ctu50, iot23, ctu_sme11, rita,
darpa98), the only place where labels enter: every analytic over panes of 10 s, nothing raised, exceedances winsorised as always. An analytic's rate is (Σ w k + 1) / (Σ w N + 500) and its mean excess
(Σ w E + 3 · 0.7) / (Σ w k + 3), where w gives no data set more than a thousand host-blocks.
"""

GROUPS = ("new host", "new key", "young key", "old key")
"""A host or key is new for an hour and young for a day; "new key" is one of a host that is not new."""

PRIOR: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # name: ((exceedances a host-block), (mean excess over u, nats))
    "burst": ((0.59, 0.074, 0.005, 0.0047), (0.38, 0.24, 0.89, 0.47)),
    "fan": ((0.59, 0.00028, 0.0092, 0.0018), (0.21, 0.7, 0.47, 0.74)),
    "sweep": ((0.25, 0.097, 0.0075, 0.0028), (0.24, 0.2, 1.7, 0.43)),
    "ports": ((0.59, 0.034, 0.016, 0.0049), (0.21, 0.29, 0.73, 0.31)),
    "guess": ((0.042, 0.002, 0.0021, 0.0039), (1, 0.67, 0.63, 0.48)),
    "fail": ((0.21, 0.00028, 0.012, 0.0018), (0.26, 0.7, 0.75, 0.41)),
    "lateral": ((0.0015, 0.00028, 0.00099, 0.001), (0.77, 0.7, 0.55, 0.5)),
    "exfil": ((0.0015, 0.0017, 0.0011, 0.001), (0.64, 1.9, 0.48, 1.3)),
    "drip": ((0.0069, 0.0028, 0.0065, 0.001), (1, 1.3, 1.5, 1.4)),
    "flood": ((0.72, 0.00018, 0.092, 0.062), (0.73, 0.7, 0.95, 0.44)),
    "fan-in": ((0.73, 0.00018, 0.04, 0.061), (0.21, 0.7, 0.33, 0.21)),
    "fail-in": ((0.043, 0.00018, 0.02, 0.0069), (0.48, 0.7, 0.6, 0.3)),
    "novelty": ((0.002, 0.00028, 0.0043, 0.0015), (0.41, 0.7, 0.61, 1.3)),
    "beacon": ((0.0005, 0.002, 0.0048, 0.0038), (0.7, 1.6, 2.1, 1.8)),
    "meeting": ((0.0005, 0.00028, 0.00033, 0.00033), (0.7, 0.7, 0.7, 0.7)),
    "joint": ((0.026, 0.00028, 0.0089, 0.0029), (1.9, 0.7, 2, 2)),
}
