"""Prior of the calibration: how often, and by how much, benign traffic passes u, by analytic and age group.

Measured on the rows labelled benign of seven public data sets (westermo, dapt2020, ctu50, iot23, ctu_sme11, rita,
darpa98), the only place where labels enter: every analytic over panes of 10 s, nothing raised, exceedances winsorised.
Rate = (Σ w k + 1) / (Σ w N + 500), mean excess = (Σ w E + 3 · 0.5) / (Σ w k + 3), where w gives no data set more than a
thousand host-blocks. `python -m tests.evaluate.priors` measures it anew, and what each file's own part is worth to it.
"meeting" is measured where there is a graph (dapt2020, ctu50, ctu_sme11: one exceedance, of .6, in 1,500 host-blocks),
but for its mean excess: one exceedance says too little, so it is that of one peer wholly out of place, ln 2 − u = .19
(the benign part of five simulated enterprises shows .14 to .26). "guess" of new hosts leaves out the files without
ports and rita: 766 hosts of the internet guess passwords of its one public server (17,800 log-ins), whatever these rows
are labelled. Of keys it is kept from when scans counted as sessions, since hardly a program logs in anywhere in these
files: measured anew a new key's rate is a quarter, and build machines and roll-outs by ssh were raised. "chatter"
leaves out the files without ports too, where it is not asked. Bytes passed u 8 times as "exfil", 11 times as "drip" and
19 times as "haul" (12 of them dapt2020's), and "session" and "newcomer" did so twice each (the latter in dapt2020), too
seldom to tell one age from another (none of new hosts as "exfil"): of each the mean excess is that of all ages
together.
"""

GROUPS = ("new host", "new key", "young key", "old key")
"""A host or key is new for an hour and young for a day; "new key" is one of a host that is not new."""

PRIOR: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # name: ((exceedances a host-block), (mean excess over u, nats))
    "burst": ((0.59, 0.052, 0.0044, 0.0041), (0.33, 0.23, 0.9, 0.42)),
    "chatter": ((0.61, 0.053, 0.0072, 0.013), (0.33, 0.26, 1.5, 0.64)),
    "fan": ((0.59, 0.00028, 0.0089, 0.0017), (0.21, 0.5, 0.46, 0.67)),
    "sweep": ((0.19, 0.05, 0.0028, 0.0005), (0.2, 0.18, 0.74, 0.44)),
    "ports": ((0.59, 0.024, 0.0026, 0.0041), (0.2, 0.26, 0.73, 0.29)),
    "guess": ((0.0014, 0.0017, 0.0011, 0.0029), (0.5, 0.61, 0.4, 0.45)),
    "fail": ((0.2, 0.00028, 0.006, 0.0012), (0.23, 0.5, 0.62, 0.37)),
    "lateral": ((0.0015, 0.00028, 0.00066, 0.001), (0.65, 0.5, 0.41, 0.38)),
    "exfil": ((0.0005, 0.0014, 0.0014, 0.00033), (1.5, 1.5, 1.5, 1.5)),
    "drip": ((0.00099, 0.0014, 0.0017, 0.00067), (1.8, 1.8, 1.8, 1.8)),
    "haul": ((0.0045, 0.0017, 0.0017, 0.00067), (1.3, 1.3, 1.3, 1.3)),
    "flood": ((0.35, 0.00018, 0.03, 0.046), (0.35, 0.5, 0.25, 0.26)),
    "fan-in": ((0.35, 0.00018, 0.022, 0.05), (0.2, 0.5, 0.21, 0.2)),
    "fail-in": ((0.022, 0.00018, 0.0064, 0.0072), (0.36, 0.5, 0.26, 0.28)),
    "novelty": ((0.00099, 0.00028, 0.0036, 0.0015), (0.39, 0.5, 0.59, 1.5)),
    "beacon": ((0.0005, 0.0012, 0.0024, 0.0023), (0.5, 0.46, 0.8, 2.2)),
    "session": ((0.0005, 0.00028, 0.00085, 0.00033), (0.46, 0.46, 0.46, 0.46)),
    "newcomer": ((0.0005, 0.00028, 0.00033, 0.001), (1.2, 1.2, 1.2, 1.2)),
    "meeting": ((0.0014, 0.00071, 0.0011, 0.002), (0.19, 0.19, 0.19, 0.19)),
    "joint": ((0.012, 0.00028, 0.0067, 0.0033), (2.9, 0.5, 3.4, 3.4)),
}
