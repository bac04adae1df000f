"""Every weight and constant of the history score, in one place. DETECTION.md part 1 measured them on labelled files;
none is fitted at run time. Kernels take the constants at compile time (after a change, `flowsage.models.warm` throws
out what was compiled before), the weights of the sum at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weight of each term of S in nats. Source: DETECTION.md part 1, "S = …"; 0 removes a term (for ablations)."""

    B_s: float = 1.0
    """Familiarity of the source."""
    B_ss: float = 0.5
    K_ss: float = 0.25
    """A scan earns no familiarity (slow scan .78 → .93)."""
    B_svc: float = 0.5
    F_s: float = 0.5
    """Bursts: Pareto tail with zeros in the mean."""
    F_ss: float = 1.0
    C_ss: float = 0.3
    """Pitman-Yor novelty of a service of this source. DETECTION.md has .6: with so much of it new services of everybody
    stand above what attacks (with P_ss, flow AP of dapt2020 .92 → .97, of the enterprise .84 → .85; host-windows of
    dapt2020 .883/.308 → .864/.281)."""
    P_ss: float = 0.7
    """Vertical scans."""
    C_es: float = 1.0
    """First meeting of a source that seldom has any."""
    C_e: float = 0.0
    """Could stand for C_es and dc where there are no ports: ¼ in DETECTION.md, but hosts rank worse with it."""
    dc: float = 0.5
    """Ranked, not added: raw tails are tiny on star-shaped networks and break them (.86)."""
    F_o: float = 4.0
    """Floods of an offered service, of one source or many (`load`); without these three, S is history alone. 1 to 4:
    enterprise AP .80 → .84, host-windows of sme11 .92 → .97; darpa98's macro AUC pays .003."""
    N_o: float = 4.0
    """Crowds: many sources at once (enterprise AP .63 → .71, of host-windows .36 → .60, with F_o)."""
    G_o: float = 4.0
    """Floods in the first minutes, when nothing has a past."""
    F_0: float = 1.0
    """Bursts of sources, the same: until there is a past, what a source does beside its peers is all that is known."""
    R_0: float = 3.0
    """Sources that are rare among their peers, the same (`rarity`)."""
    A_0: float = 2.0
    """What is not answered, the same: it needs no past to be seen."""
    F_1: float = 0.5
    """As F_s: where there are no services F_ss says the same, and counts once (macro AUC of darpa98 .85 → .87)."""
    B_self: float = 1.0
    """Who sends to itself across a wire does not send it: a source that is made up (land), unless it always does."""
    V_rev: float = 0.5
    V_log: float = 1.5
    """Of V_rev where it is small, so that together max(½V, 1½ ln(1 + V)): a tail's first nats say most (host-windows of
    westermo .920 → .922, of iot23 .986 → .993)."""
    V_fwd: float = 0.35
    """Exfiltration .54 → .83. DETECTION.md has ½: benign uploads of a new size then stand above all (AP .70 → .73)."""
    T: float = 0.25
    beat: float = 1.0
    """Of Zc beyond its floor: calls of a bot are as regular after a day as at first, so they count a little for ever
    (darpa98's host-windows .929/.859 → .933/.871, westermo's .920 → .924; AUC of ctu50 .985 → .982, with F_o)."""
    B_es: float = 1.0
    """A beat counts no more than its pair is unusual, Zc beyond its floor at most B of es: what has met like a clock
    for days is no news (enterprise AP .73 → .81, macro AUC of darpa98 .81 → .85). inf: however long it has."""
    once: float = 1.0
    """Z of a service that a pair has used n times counts 1 − once/n of itself: who tries port after port by the clock
    beats on none (rita_beacon AP .56 → .98)."""
    fail: float = 1.5
    """Enterprise AP .473 without it, .541 with it."""


@dataclass(frozen=True)
class Constants:
    """Constants of the terms. Source: DETECTION.md part 1, its table, and the prose where named."""

    strength: float = 1.0
    """θ and d of the Pitman-Yor process over (child, window) tokens (Pitman & Yor 1997)."""
    discount: float = 0.5
    pooled: float = 3.0
    """Windows of the other keys' mean that stand in front of a key's own past (F)."""
    load_flows: float = 4.0
    """Nats beyond the expectation from which load counts: flows and sources of an offered service (F_o, N_o)."""
    load_sources: float = 3.5
    load_peers: float = 2.5
    """The same beyond the mean of all others, while nothing has a past (G_o)."""
    cold_windows: float = 60.0
    """Windows after which that is worth a quarter."""
    rare_windows: float = 10.0
    """Windows after which being rare among sources is worth 1/e (R_0)."""
    rank_all: float = 20.0
    """Tokens of e^-D in front of the ranks of all first meetings, and of those in front of a service's own (dc)."""
    rank_service: float = 10.0
    buckets: int = 64
    """Half nats of D in the ranks, quarter units of Z in those of the beat."""
    volume_floor: float = 4.0
    """V is −ln of the tail beyond this many nats, at most `volume_cap`."""
    volume_cap: float = 30.0
    volume_memory: float = 50.0
    """Window means a key's normal-inverse-gamma remembers; prior mean, its weight, shape and rate of the variance."""
    volume_mean: float = 6.0
    volume_weight: float = 0.1
    volume_shape: float = 1.0
    volume_rate: float = 2.0
    silence_s: float = 10.0
    """A visit begins after this much silence of a pair (LLR)."""
    shortest_gap_s: float = 20.0
    """Shorter gaps between visits are no beat: each takes `1` off the sum."""
    beat_memory: float = 50.0
    beat_cap: float = 200.0
    beat_variance: float = 0.02
    """Prior rate of the variance of ln gap: a jitter of about 20 %."""
    beat_noise: float = 0.1
    """Weight of the Poisson law inside the regular one: a missed beat costs at most ln .1."""
    regular_above: float = 10.0
    """LLR from which a pair counts as regular, until it falls to `irregular_below`; T counts from there as well."""
    irregular_below: float = 2.0
    beat_floor: float = 8.0
    """Z counts LLR from here, in tens, up to `beat_top`."""
    beat_top: float = 150.0
    beacon_floor: float = 4.0
    """flow_score = max(S, beacon_scale min(Zc − beacon_floor, B of es))."""
    beacon_scale: float = 4.0
    peers: float = 0.25
    """Share of the mean over peers in the score of a host's window, beside the highest: of many peers one is high by
    chance (host-window AP of dapt2020 .28 → .31, of the enterprise .68 → .70)."""


WEIGHTS = Weights()
CONSTANTS = Constants()
