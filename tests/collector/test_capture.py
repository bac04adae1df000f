"""Captures are read exactly, and what is wrong with one is said in a sentence after everything before it was used."""

import importlib.util
import random
import struct

import pytest

from flowsage.collector.capture import Capture
from flowsage.collector.errors import CaptureError

PACKETS = [(1_700_000_000_123_456_789 + i * 1001, bytes([i % 251]) * (60 + i)) for i in range(50)]


def classic(packets, *, order="<", nanoseconds=True, link=1):
    magic, unit = (0xA1B23C4D, 1) if nanoseconds else (0xA1B2C3D4, 1000)
    out = struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 65535, link)
    for time, data in packets:
        seconds, rest = divmod(time, 1_000_000_000)
        out += struct.pack(order + "IIII", seconds, rest // unit, len(data), len(data)) + data
    return out


def block(kind, body, order="<"):
    body += b"\0" * (-len(body) % 4)
    size = len(body) + 12
    return struct.pack(order + "II", kind, size) + body + struct.pack(order + "I", size)


def option(code, value, order="<"):
    return struct.pack(order + "HH", code, len(value)) + value + b"\0" * (-len(value) % 4)


def section(order="<"):
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order)


def interface(order="<", *, link=1, options=b""):
    return block(1, struct.pack(order + "HHI", link, 0, 0) + options, order)


def enhanced(units, data, order="<", which=0):
    return block(
        6, struct.pack(order + "IIIII", which, units >> 32, units & 0xFFFFFFFF, len(data), len(data)) + data, order
    )


def write(tmp_path, data):
    path = tmp_path / "capture.pcap"
    path.write_bytes(data)
    return path


def read(path, **settings):
    with Capture(path, **settings) as capture:
        return [
            (time, bytes(packet))
            for batch in capture
            for time, packet in zip(batch.times_ns.tolist(), batch.packets(), strict=True)
        ]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("batch_packets", [1, 7, 50, 10_000])
def test_nanosecond_captures_are_exact_in_both_byte_orders(tmp_path, order, batch_packets):
    assert read(write(tmp_path, classic(PACKETS, order=order)), batch_packets=batch_packets) == PACKETS


@pytest.mark.parametrize("order", ["<", ">"])
def test_microsecond_captures_are_exact_to_the_microsecond(tmp_path, order):
    want = [(time // 1000 * 1000, data) for time, data in PACKETS]
    assert read(write(tmp_path, classic(PACKETS, order=order, nanoseconds=False))) == want


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("resolution", "per_second"), [(None, 10**6), (9, 10**9), (3, 10**3), (10, 10**10), (0x94, 2**20)]
)
def test_pcapng_times_follow_the_resolution_of_their_interface(tmp_path, order, resolution, per_second):
    options = option(2, b"eth0", order)
    if resolution is not None:
        options += option(9, bytes([resolution]), order)
    units = [(time * per_second // 10**9, data) for time, data in PACKETS]
    data = section(order) + interface(order, options=options + option(0, b"", order))
    data += b"".join(enhanced(u, d, order) for u, d in units)
    assert read(write(tmp_path, data)) == [(u * 10**9 // per_second, d) for u, d in units]


def test_pcapng_sections_interfaces_and_time_offsets_are_kept_apart(tmp_path):
    data = (
        section("<")
        + interface("<", options=option(9, b"\x09"))
        + interface("<", options=option(14, struct.pack("<q", 100)))
    )
    data += enhanced(5_000, b"first", which=0) + enhanced(7, b"second", which=1) + block(0xBAD, b"unknown")
    data += section(">") + interface(">") + enhanced(9, b"third", ">")
    assert read(write(tmp_path, data)) == [(5_000, b"first"), (100_000_007_000, b"second"), (9_000, b"third")]


def test_simple_packets_take_the_time_of_the_packet_before(tmp_path):
    data = section() + interface() + enhanced(4, b"timed") + block(3, struct.pack("<I", 5) + b"plain")
    assert read(write(tmp_path, data)) == [(4_000, b"timed"), (4_000, b"plain")]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b"hello, this is no capture at all", "is not a pcap or pcapng capture"),
        (classic([])[:20], "ends within its file header"),
        (section()[:20], "ends within its file header"),
        (b"\x1f\x8b\x08\x00rest", "is compressed; unpack it first: gzip -dc"),
        (classic(PACKETS, link=113), r"holds Linux cooked capture \(SLL\), link type 113"),
        (classic(PACKETS, link=250), "holds link type 250, and only Ethernet"),
        (section() + interface(link=105), "holds IEEE 802.11, link type 105"),
    ],
)
def test_what_is_no_ethernet_capture_is_refused_when_opened(tmp_path, data, sentence):
    with pytest.raises(CaptureError, match=sentence) as caught:
        Capture(write(tmp_path, data))
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    with pytest.raises(CaptureError, match=r"nowhere.pcap cannot be read: No such file"):
        Capture(tmp_path / "nowhere.pcap")
    with pytest.raises(CaptureError, match="cannot be read: Is a directory"):
        Capture(tmp_path)


@pytest.mark.parametrize("kind", ["classic", "pcapng"])
@pytest.mark.parametrize("missing", [1, 40, 70])
def test_a_capture_cut_in_a_packet_gives_all_packets_before_and_then_says_so(tmp_path, kind, missing):
    data = classic(PACKETS) if kind == "classic" else section() + interface(options=option(9, b"\x09"))
    if kind == "pcapng":
        data += b"".join(enhanced(*packet) for packet in PACKETS)
    got: list[memoryview] = []
    capture = Capture(write(tmp_path, data[:-missing]), batch_packets=20)
    with pytest.raises(CaptureError, match=r"stops in the middle of a packet after 49 whole packets") as caught:
        got.extend(packet for batch in capture for packet in batch.packets())
    assert [bytes(p) for p in got] == [d for _, d in PACKETS[:-1]]
    assert capture.packets == caught.value.packets == 49


def test_a_foreign_interface_later_in_a_pcapng_stops_it_there(tmp_path):
    data = section() + interface() + interface(link=276) + enhanced(1, b"good") + enhanced(2, b"bad", which=1)
    capture = Capture(write(tmp_path, data))
    assert [bytes(p) for p in next(iter(capture)).packets()] == [b"good"]
    with pytest.raises(CaptureError, match="link type 276") as caught:
        next(iter(capture))
    assert caught.value.packets == 1


def test_damage_anywhere_is_a_capture_error_and_nothing_else(tmp_path):
    rng = random.Random(11)
    whole = [
        classic(PACKETS),
        section() + interface(options=option(9, b"\x09")) + b"".join(enhanced(*packet) for packet in PACKETS),
    ]
    errors = 0
    for trial in range(400):
        data = bytearray(whole[trial % 2])
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data) if trial % 3 else 120)] = rng.choice((0, 255, rng.randrange(256)))
        try:
            read(write(tmp_path, bytes(data[: rng.randrange(len(data))] if trial % 5 == 0 else data)))
        except CaptureError:
            errors += 1
    assert errors > 50


def test_every_capture_at_hand_is_read_like_the_oracle_reads_it(shared):
    spec = importlib.util.spec_from_file_location("flow_oracle", shared / "tools" / "flow_oracle.py")
    assert spec
    assert spec.loader
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    for path in sorted((shared / "pcaps").glob("*.pcap")):
        assert read(path) == [(time, data) for _, time, _, _, data in oracle.read_pcap(path)]
