"""Levels and excesses, against sums made by hand; each contact counted once; beats."""

import math

import numpy as np
import pyarrow as pa
import pytest

from flowsage.graph.build import Contacts, contacts
from flowsage.graph.flows import from_table, hash_names
from flowsage.models import analytics as an
from flowsage.models import beacon, levels, records
from flowsage.models.alarms import AlarmConfig, Alarms
from flowsage.models.history_scores import ContactTerms
from tests.models.alarm_streams import EVER, START, S, table

INTERNAL, PEER = "10.0.0.1", "10.0.0.2"


def looked(c: Contacts, known: float = 0.0, surprise: float = 0.0) -> ContactTerms:
    """What a history that knows nothing (or everything) says."""
    of = np.full(len(c), known)
    zero = np.zeros(len(c))
    return ContactTerms(
        known=of, pair_known=of, service_known=of, C_ss=zero + surprise, sources=zero + 1, settled=zero
    )  # fmt: skip


def step(
    alarms: Alarms, second: float, rows: list, known: float = 0.0, surprise: float = 0.0, misplaced: float = math.nan
):
    c = contacts(from_table(table([(second - 0.5, *r) for r in rows] or [(0.0, "a", "b", 1, 1, 1, 1)])), EVER)
    return alarms.step(int(START + second * S), c, looked(c, known, surprise), np.full(len(c), misplaced))


def level(alarms: Alarms, name: str, *hosts: str, service: int | None = None) -> float:
    """LEVEL of one analytic's cell, as of its last touch."""
    a = an.NAMES.index(name)
    key = hash_names(pa.array(hosts))
    store = alarms.memory.hosts
    if an.KIND[a] != an.HOST:
        keys = np.empty((3, 1), np.uint64)
        levels.key_hashes(key[:1], key[-1:], np.array([service or 0], np.int32), keys)
        store = (alarms.memory.services, alarms.memory.pairs, alarms.memory.contacts)[an.KIND[a] - 1]
        key = keys[an.KIND[a] - 1]
    slot = int(store.table.find(key[:1])[0])
    return float(store.arrays["cells"][slot, an.COLUMN[a]]["level"])


def tcp(port: int) -> int:
    return (7 << 20) | (port + 1)


def test_level_is_a_leaky_sum_with_the_analytics_time_constant():
    alarms = Alarms()
    for second in (10, 40, 130):
        step(alarms, second, [(INTERNAL, PEER, 22, 1, 10, 10)] * 3)
    assert level(alarms, "burst", INTERNAL, service=tcp(22)) == pytest.approx(
        3 * (1 + math.exp(-90 / 60) + math.exp(-2))
    )
    assert level(alarms, "guess", INTERNAL, PEER) == pytest.approx(
        3 * (1 + math.exp(-90 / 3600) + math.exp(-120 / 3600))
    )


def test_time_scale_divides_time_constants():
    alarms = Alarms(AlarmConfig(time_scale=60))
    for second in (1, 2):
        step(alarms, second, [(INTERNAL, PEER, 80, 1, 10, 10)])
    assert level(alarms, "burst", INTERNAL, service=tcp(80)) == pytest.approx(1 + math.exp(-1))


def test_a_new_pair_counts_once_though_history_does_not_know_it_yet():
    alarms = Alarms()
    for second in range(1, 6):
        step(alarms, second, [(INTERNAL, PEER, 80, 1, 10, 10), (INTERNAL, PEER, 81, 1, 10, 10)])
    assert level(alarms, "fan", INTERNAL) == pytest.approx(1.0, rel=0.1)
    assert level(alarms, "ports", INTERNAL, PEER) == pytest.approx(2.0, rel=0.01)
    assert level(alarms, "fan-in", PEER) == pytest.approx(1.0, rel=0.01)


def test_what_history_knows_is_not_new():
    alarms = Alarms()
    step(alarms, 1, [(INTERNAL, PEER, 445, 1, 10, 10)], known=3.0, surprise=9.0)
    for name in ("fan", "novelty", "lateral"):
        assert level(alarms, name, INTERNAL) == 0.0
    assert level(alarms, "flood", PEER) == 1.0


@pytest.mark.parametrize(
    ("row", "name", "adds"),
    [
        ((INTERNAL, PEER, 445, 0, 60, 54), "sweep", 1.0),
        ((INTERNAL, PEER, 445, 1, 60, 54), "sweep", an.ANSWERED),
        ((INTERNAL, "8.8.8.8", 443, 0, 60, 54), "sweep", an.UNANSWERED),
        ((INTERNAL, PEER, 445, 1, 60, 54), "lateral", 1.0),
        ((INTERNAL, "8.8.8.8", 445, 1, 60, 54), "lateral", 0.0),
        ((INTERNAL, PEER, 445, 0, 60, 54), "fail", 1.0),
        ((INTERNAL, "8.8.8.8", 443, 1, 50_000, 10_000), "exfil", 4.0),
        (("8.8.8.8", INTERNAL, 443, 1, 50_000, 10_000), "exfil", 0.0),
        ((INTERNAL, "8.8.8.8", 443, 1, 10_000, 50_000), "drip", 0.0),
        ((INTERNAL, PEER, 443, 1, 60, 54), "novelty", 5.0),
        ((INTERNAL, PEER, 443, 1, 60, 54), "meeting", 0.8),
    ],
)
def test_a_contact_adds_what_the_table_says(row, name, adds):
    alarms = Alarms()
    step(alarms, 1, [row], surprise=7.0, misplaced=0.8)
    assert level(alarms, name, row[0], row[1], service=tcp(row[2])) == pytest.approx(adds)


def test_every_contact_is_counted_once_whatever_the_panes():
    rng = np.random.default_rng(1)
    rows = [
        (float(t), f"10.0.0.{rng.integers(9)}", f"10.0.1.{rng.integers(9)}", 80, 1, 10, 10)
        for t in np.sort(rng.uniform(0, 40, 500))
    ]
    for pane in (1, 7, 40):
        alarms = Alarms(AlarmConfig(time_scale=1e-6))  # nothing decays
        flows = from_table(table(rows))
        for p in range(0, 40 + pane, pane):
            c = contacts(flows.take(slice(*np.searchsorted(flows.start_ns, START + np.array([p, p + pane]) * S))), EVER)
            alarms.step(int(START + (p + pane) * S), c, looked(c), np.full(len(c), math.nan))
        cells = alarms.memory.hosts.arrays["cells"][: alarms.memory.hosts.filled]
        assert cells[:, an.COLUMN[an.FLOOD]]["level"].sum() == pytest.approx(500, rel=1e-6)
        pairs = len({r[1:3] for r in rows})
        assert cells[:, an.COLUMN[an.FAN]]["level"].sum() == pytest.approx(pairs, rel=1e-3)


def test_record_follows_one_to_two_spans_later_and_a_new_key_takes_its_hosts():
    alarms = Alarms()
    host = lambda: alarms.memory.hosts.arrays["record"][0, an.BURST]  # noqa: E731
    step(alarms, 10, [(INTERNAL, PEER, 80, 1, 1, 1)] * 50)  # the host's spans end at 910 s, 1810 s …
    step(alarms, 1000, [(INTERNAL, PEER, 80, 1, 1, 1)])
    assert host() < 0.01, "the span before is not record yet"
    step(alarms, 1900, [(INTERNAL, PEER, 80, 1, 1, 1)])
    assert host() == pytest.approx(math.log1p(50), abs=0.01)
    step(alarms, 1901, [(INTERNAL, PEER, 81, 1, 1, 1)])
    row = alarms.memory.services.arrays
    assert row["past"][1, an.COLUMN[an.BURST], records.RECORD] == host()


def test_where_others_send_as_much_it_is_no_news_and_it_is_no_licence_to_send_it_elsewhere() -> None:
    alarms, cloud, nobodys = Alarms(), "198.51.100.1", "198.51.100.2"

    def excess(host: str, peer: str) -> float:
        """Of what a host has sent to a peer within hours."""
        c = contacts(from_table(table([(0.0, host, peer, 443, 1, 1, 1)])), EVER)
        keys = np.empty((3, 1), np.uint64)
        levels.key_hashes(c.hosts.hash[c.src], c.hosts.hash[c.dst], np.ascontiguousarray(c.service), keys)
        pairs = alarms.memory.pairs
        cell, past = (pairs.arrays[f][int(pairs.table.find(keys[1])[0]), an.COLUMN[an.DRIP]] for f in ("cells", "past"))
        return float(np.log1p(cell["level"]) - past[records.RECORD] + alarms._fade[an.DRIP] * alarms._now)

    for k in range(72):  # a day in which four hosts send the cloud 5 MB each now and then
        step(alarms, 1200.0 * k + 10, [(f"10.0.0.{k % 4 + 1}", cloud, 443, 1, 5_000_000, 1_000)])
    step(alarms, 86_500, [("10.0.0.9", cloud, 443, 1, 5_000_000, 1_000)])
    assert excess("10.0.0.9", cloud) < 0, "a newcomer sends what others send"
    step(alarms, 86_510, [("10.0.0.1", nobodys, 443, 1, 5_000_000, 1_000)])
    assert excess("10.0.0.1", nobodys) > 5.0, "one of them sends it where nobody sends"
    for k in range(12):  # and goes on for hours, in which what it sends itself is not what others send
        step(alarms, 86_520 + 1200.0 * k, [("10.0.0.1", nobodys, 443, 1, 5_000_000, 1_000)])
    assert excess("10.0.0.1", nobodys) > 6.0


def test_a_young_hosts_spans_double_from_a_block_to_full_length() -> None:
    step_s, span = 900.0, 4 * 3600.0
    ends = [records.span_end(float(n), step_s, span) for n in range(7)]
    assert ends == [900, 1800, 3600, 7200, 14_400, 28_800, 43_200]
    for n, (begin, end) in enumerate(zip([0.0, *ends], ends, strict=False)):
        assert records.span_of(begin, step_s, span) == records.span_of(end - 1.0, step_s, span) == n
    assert [records.span_end(float(n), 900.0, 900.0) for n in range(3)] == [900, 1800, 2700]


def test_steady_traffic_of_a_new_host_is_no_news_however_long_a_level_remembers() -> None:
    alarms = Alarms()
    worst = 0.0
    for minute in range(24 * 60):
        step(alarms, 60 * minute + 10, [(INTERNAL, PEER, 80, 1, 1, 1)])
        cell, past = (alarms.memory.hosts.arrays[name][1, an.COLUMN[an.FLOOD]] for name in ("cells", "past"))
        age = 60.0 * minute
        if age < 2 * 900:
            continue
        x = np.log1p(cell["level"])
        record = past[records.RECORD] - alarms._fade[an.FLOOD] * alarms._now
        worst = max(worst, x - record - records.growth(age, 900.0, an.TAU[an.FLOOD], 3600.0))
    assert worst < 0.25


class Contact:
    """One contact, and what is remembered of its beat."""

    def __init__(self, scale: float = 1.0, *, near: bool = False) -> None:
        self.scale, self.near = scale, np.array([near])
        self.visits, self.state = np.zeros((1, 2)), np.zeros((1, beacon.COLUMNS), np.float32)
        self.tally, self.polled = np.zeros((1, 3)), np.zeros(1, np.float32)

    def seen(self, at: float, lasts: float = 0.0) -> tuple[float, float]:
        """A flow of it at a time, s: strengths of beat and session."""
        none, beat, session = np.zeros(1, np.int32), np.zeros(1), np.zeros(1)
        beacon.beats(
            none, none, none, self.near, np.array([at]), np.array([at + lasts]), np.array([6.0]),
            np.ones(1), self.visits, self.state, self.tally, self.polled, np.array([100.0]), np.zeros(1), self.scale,
            beat, session,
        )  # fmt: skip
        return float(beat[0]), float(session[0])


def test_a_clock_is_told_from_chance():
    rng = np.random.default_rng(3)
    ratio = {}
    for kind, gaps in (("clock", 60 + rng.uniform(-6, 6, 20)), ("chance", 20 + rng.exponential(60, 20))):
        contact = Contact()
        for t in np.cumsum(gaps):
            contact.seen(t)
        ratio[kind] = contact.state[0, beacon.LLR]
    assert ratio["clock"] > 25
    assert ratio["chance"] < 8


def test_beats_do_not_depend_on_the_scale_of_time():
    strengths = []
    for scale in (1.0, 60.0):
        contact = Contact(scale)
        strengths.append([contact.seen(i * 240.0 / scale) for i in range(20)][-1][0])
    assert strengths[0] == pytest.approx(strengths[1], rel=1e-5)
    assert strengths[0] > 1


def test_pieces_of_one_connection_are_one_visit_and_a_session_once_it_is_long():
    contact = Contact()
    strengths = [contact.seen(i * 300.0, lasts=299.0) for i in range(25)]
    assert contact.state[0, beacon.BEATS] == 0
    assert [beat for beat, _ in strengths] == [0.0] * 25
    assert [session > 0 for _, session in strengths] == [i >= 6 for i in range(25)]
    assert strengths[-1][1] == pytest.approx(math.log1p((24 * 300 + 299) / 1_800))


def test_a_session_counts_less_where_others_have_theirs_and_not_at_all_within_the_network():
    for near, others, worth in ((False, 0, 1.0), (False, 3, 0.25), (True, 0, 0.0)):
        contact = Contact(near=near)
        contact.tally[0, beacon.LASTING] = others
        assert contact.seen(0.0, lasts=7_200.0)[1] == pytest.approx(worth * math.log1p(4.0))


def test_who_calls_many_of_its_own_network_by_the_clock_polls_them():
    strength = {}
    for near, others in ((True, 0), (True, 4), (False, 4)):
        contact = Contact(near=near)
        contact.polled[:] = others
        strength[near, others] = [contact.seen(60.0 * i) for i in range(30)][-1][0]
    assert strength[True, 4] == pytest.approx(strength[True, 0] / 5)
    assert strength[False, 4] == strength[True, 0] > 1


def added(
    service,
    inside,
    *,
    flows=1,
    failed=0,
    sent=0,
    moved=0,
    sources=1.0,
    new=True,
    surprise=0.0,
    settled=0.0,
    misplaced=np.nan,
):
    """What one contact adds, by analytic; answered, but for what failed of it."""
    out = np.empty(len(an.TABLE))
    an.contributions(
        service, flows, flows - failed, failed, True, sent, moved, 0.0, sources, np.array(inside), new, new, new,
        surprise, settled, misplaced, out,
    )  # fmt: skip
    return dict(zip(an.NAMES, out.tolist(), strict=True))


HTTPS, ANY, NTP = ((proto + 1 << 20) + port + 1 for proto, port in ((6, 443), (-1, 443), (17, 123)))


def test_a_handshake_that_fails_counts_and_silence_where_there_is_none_does_not():
    for service, counted in ((HTTPS, 3), (ANY, 3), (NTP, 0)):
        it = added(service, (True, True), flows=5, failed=3)
        assert it["fail"] == it["fail-in"] == counted
        assert it["burst"] == it["flood"] == 5, "a flow is a flow"


def test_bytes_count_less_where_others_send_to_and_not_at_all_within_the_network():
    alone, shared, crowd = (added(HTTPS, (True, False), sent=1e6, sources=s)["exfil"] for s in (0.0, 4.0, 500.0))
    assert alone == 1e6 / an.BYTES_SCALE
    assert shared == alone / 4
    assert crowd == alone / an.SHARED_MOST
    assert added(HTTPS, (True, True), sent=1e6)["drip"] == 0
    assert added(HTTPS, (False, True), sent=1e6)["exfil"] == 0


def test_what_is_moved_within_the_network_is_a_haul_either_way_but_of_answers():
    assert added(HTTPS, (True, True), moved=3e6)["haul"] == 3e6 / an.BYTES_SCALE
    assert added(HTTPS, (True, False), moved=3e6)["haul"] == added(HTTPS, (False, True), moved=3e6)["haul"] == 0
    assert added((7 << 20) + 100_444, (True, True), moved=3e6)["haul"] == 0


def test_a_newcomer_counts_by_how_settled_the_clients_are_and_how_seldom_it_takes_to_something_new():
    settled = math.log(200.0)
    said = {c: added(HTTPS, (True, True), surprise=c, settled=settled)["newcomer"] for c in (0.0, 2.0, 4.0, 9.0)}
    assert said[2.0] == pytest.approx(200.0 / an.VISITS)
    assert said[0.0] == pytest.approx(said[2.0] * math.exp(-2))
    assert said[4.0] == said[9.0] == pytest.approx(said[2.0] * math.exp(2))
    assert added(HTTPS, (True, True), surprise=9.0, settled=math.log(19.0))["newcomer"] == 0, "new clients are common"
    assert added(HTTPS, (True, True), settled=settled, new=False)["newcomer"] == 0
    assert added(HTTPS, (True, True), settled=settled, failed=1)["newcomer"] == 0
    for inside in ((True, False), (False, True)):
        assert added(HTTPS, inside, settled=settled)["newcomer"] == 0


def test_what_goes_on_for_hours_is_asked_of_services_that_are_known():
    assert added(HTTPS, (True, True), flows=5)["chatter"] == 5
    assert added(7 << 20, (True, True), flows=5)["chatter"] == 0


def test_what_our_hosts_send_to_the_world_is_no_flood_of_it_and_answers_are_no_flood_of_us():
    assert added(HTTPS, (True, False), flows=9)["flood"] == 0
    assert added(HTTPS, (False, True), flows=9)["flood"] == 9
    assert added(HTTPS, (False, False), flows=9)["flood"] == 9, "where nobody knows which hosts are ours"
    answers = (7 << 20) + 100_444
    assert added(answers, (False, True), flows=9)["flood"] == added(answers, (False, True))["fan-in"] == 0


def test_first_meetings_are_news_among_our_own_hosts():
    assert added(HTTPS, (True, True), misplaced=0.8)["meeting"] == 0.8
    assert added(HTTPS, (True, True), misplaced=math.nan)["meeting"] == 0
    assert added(HTTPS, (True, False), misplaced=0.8)["meeting"] == 0


def test_of_peers_out_of_place_a_record_is_one_fewer_each_half_day() -> None:
    alarms, hour = Alarms(), 3_600.0

    def record(second: float, *peers: str, misplaced: float = 1e-9) -> float:
        step(alarms, second, [(INTERNAL, p, 443, 1, 60, 54) for p in peers], misplaced=misplaced)
        slot = int(alarms.memory.hosts.table.find(hash_names(pa.array([INTERNAL])))[0])
        past = alarms.memory.hosts.arrays["past"][slot, an.COLUMN[an.MEETING]]
        return max(0.0, float(past[records.RECORD] - alarms._fade[an.MEETING] * alarms._now)) / math.log(2.0)

    assert record(10, "10.0.1.1", "10.0.1.2", misplaced=1.0) == 0
    assert level(alarms, "meeting", INTERNAL) == pytest.approx(3.0), "two peers double it twice"
    assert record(3 * hour, "10.0.1.3") == pytest.approx(2 - 3 / 12, abs=0.01)
    assert record(15 * hour, "10.0.1.4") == pytest.approx(2 - 15 / 12, abs=0.01)
    assert record(27 * hour, "10.0.1.5") == 0, "by then it is no habit"
