"""What is a flow, and what is not and why: a case for every rule S1-S12, in packets of our own."""

import struct
from typing import Any

import pytest
from scapy.compat import raw
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Router_Alert
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH, ESP
from scapy.layers.l2 import ARP, GRE, Dot1AD, Dot1Q, Dot3
from scapy.layers.sctp import SCTP
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from .support import ACK, FIN, PSH, SYN, drain_all, ethernet, flows, loaded, needs_root

pytestmark = needs_root

E = ethernet()
V4 = IP(src="10.0.0.2", dst="10.0.0.1")
V6 = IPv6(src="2001:db8::2", dst="2001:db8::1")
T = TCP(sport=1000, dport=80, flags="S")
U = UDP(sport=2000, dport=53)
FOUR, SIX = (
    {"ip_version": 4, "src": "10.0.0.2", "dst": "10.0.0.1"},
    {
        "ip_version": 6,
        "src": "2001:db8::2",
        "dst": "2001:db8::1",
    },
)


def cut(packet: Packet, size: int) -> bytes:
    """Its first `size` bytes."""
    return bytes(raw(packet))[:size]


def beyond(packet: Packet, total: int, padding: int = 60) -> bytes:
    """With IPv4 total length `total`, and padding behind it."""
    data = bytearray(bytes(raw(packet)) + bytes(padding))
    data[16:18] = struct.pack("!H", total)
    return bytes(data)


def payload_length(packet: Packet, length: int, padding: int = 60) -> bytes:
    """With IPv6 payload length `length`, and padding behind it."""
    data = bytearray(bytes(raw(packet)) + bytes(padding))
    data[18:20] = struct.pack("!H", length)
    return bytes(data)


def options(count: int) -> Packet:
    """A chain of `count` destination options headers."""
    chain = IPv6ExtHdrDestOpt()
    for _ in range(count - 1):
        chain = chain / IPv6ExtHdrDestOpt()
    return chain


UDP_LITE = struct.pack("!HHHH", 7, 8, 8, 0)
DCCP = struct.pack("!HH", 9, 10) + bytes(8)

# rule and what it is about → (frame, what comes of it: a reason, or fields of the one flow)
CASES: dict[str, tuple[bytes | Packet, str | dict[str, Any]]] = {
    "S2 a frame of less than 14 bytes": (cut(E, 13), "truncated"),
    "S2 a frame of no bytes": (b"", "truncated"),
    "S2 IPv4 header cut": (cut(E / V4 / T, 14 + 19), "truncated"),
    "S2 IPv4 options cut": (cut(E / IP(options=[IPOption_Router_Alert()]) / T, 14 + 22), "truncated"),
    "S2 TCP header cut": (cut(E / V4 / T, 14 + 20 + 19), "truncated"),
    "S2 IPv6 header cut": (cut(E / V6 / T, 14 + 39), "truncated"),
    "S2 an extension header cut": (cut(E / V6 / options(1) / T, 14 + 40 + 7), "truncated"),
    "S2 beyond the frame comes before beyond the packet": (cut(E / IP(len=30) / T, 14 + 35), "truncated"),
    "S2 TCP header beyond the IPv4 packet, in padding": (beyond(E / V4 / T, 20 + 19), "malformed"),
    "S2 TCP header just within the IPv4 packet": (beyond(E / V4 / T, 20 + 20), FOUR | {"sport": 1000}),
    "S2 UDP header beyond the IPv6 packet, in padding": (payload_length(E / V6 / U, 7), "malformed"),
    "S3 untagged": (E / V4 / U, FOUR | {"vlan": 0}),
    "S3 one tag": (E / Dot1Q(vlan=100, prio=5) / V4 / U, FOUR | {"vlan": 100}),
    "S3 a priority tag": (E / Dot1Q(vlan=0, prio=5) / V4 / U, FOUR | {"vlan": 0}),
    "S3 two tags: the outer counts": (E / Dot1AD(vlan=200) / Dot1Q(vlan=100) / V6 / U, SIX | {"vlan": 200}),
    "S3 two tags the other way round": (E / Dot1Q(vlan=7) / Dot1AD(vlan=8) / V4 / U, FOUR | {"vlan": 7}),
    "S3 three tags": (E / Dot1Q(vlan=1) / Dot1Q(vlan=2) / Dot1Q(vlan=3) / V4 / U, "non_ip"),
    "S3 a tag cut": (cut(E / Dot1Q(vlan=1) / V4 / U, 17), "truncated"),
    "S3 tag type 0x9100": (ethernet(0x9100) / Raw(bytes(64)), "non_ip"),
    "S3 ARP": (E / ARP(), "non_ip"),
    "S3 MPLS": (ethernet(0x8847) / Raw(bytes(64)), "non_ip"),
    "S3 PPPoE": (ethernet(0x8864) / Raw(bytes(64)), "non_ip"),
    "S3 LLC": (Dot3(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / Raw(bytes(64)), "non_ip"),
    "S4 version 6 in an IPv4 frame": (E / IP(version=6) / T, "malformed"),
    "S4 IHL 4": (E / IP(ihl=4) / T, "malformed"),
    "S4 total length 0": (E / IP(len=0) / T, "malformed"),
    "S4 total length below the header": (E / IP(len=19) / T, "malformed"),
    "S4 options are skipped": (
        E / IP(src="10.0.0.2", dst="10.0.0.1", options=[IPOption_Router_Alert()] * 10) / T,
        FOUR | {"sport": 1000, "dport": 80, "tcp_flags_fwd": SYN},
    ),
    "S4 AH is the flow's protocol": (E / V4 / AH(nh=6, spi=1, payloadlen=1) / T, FOUR | {"proto": 51, "sport": 0}),
    "S4 ESP is the flow's protocol": (E / V4 / ESP(spi=1, data=b"xxxxxxxx"), FOUR | {"proto": 50}),
    "S5 version 4 in an IPv6 frame": (E / IPv6(version=4) / T, "malformed"),
    "S5 extension headers of every kind are skipped": (
        E
        / V6
        / IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrRouting()
        / IPv6ExtHdrFragment()
        / AH(nh=6, spi=1, payloadlen=1)
        / T,
        SIX | {"proto": 6, "sport": 1000, "fragments_fwd": 0},
    ),
    "S5 six extension headers": (E / V6 / options(6) / T, SIX | {"proto": 6, "sport": 1000}),
    "S5 seven extension headers": (E / V6 / options(7) / T, "malformed"),
    "S5 an extension header's length leads beyond the packet": (
        payload_length(E / V6 / IPv6ExtHdrDestOpt(len=9) / T, 28),
        "malformed",
    ),
    "S5 an extension header's length leads beyond the frame": (E / V6 / IPv6ExtHdrDestOpt(len=200) / T, "truncated"),
    "S5 payload length 0 is empty": (payload_length(E / V6 / U, 0), "malformed"),
    "S5 no next header": (E / IPv6(src="2001:db8::2", dst="2001:db8::1", nh=59), SIX | {"proto": 59}),
    "S6 a packet longer than what was captured": (
        E / IP(src="10.0.0.2", dst="10.0.0.1", len=1500) / T,
        FOUR | {"proto": 6},
    ),
    "S7 a later IPv4 fragment": (
        E / IP(src="10.0.0.2", dst="10.0.0.1", frag=10, proto=6) / Raw(bytes(40)),
        FOUR | {"proto": 6, "sport": 0, "dport": 0, "tcp_flags_fwd": 0, "fragments_fwd": 1},
    ),
    "S7 the first IPv4 fragment": (
        E / IP(src="10.0.0.2", dst="10.0.0.1", flags="MF") / T,
        FOUR | {"sport": 1000, "tcp_flags_fwd": SYN, "fragments_fwd": 0},
    ),
    "S7 a later IPv6 fragment": (
        E / V6 / IPv6ExtHdrFragment(offset=10, nh=17) / Raw(bytes(40)),
        SIX | {"proto": 17, "sport": 0, "fragments_fwd": 1},
    ),
    "S7 a later IPv6 fragment whose next header is an extension": (
        E / V6 / IPv6ExtHdrFragment(offset=10, nh=60) / Raw(bytes(40)),
        SIX | {"proto": 60, "fragments_fwd": 1},
    ),
    "S7 a later fragment of ICMP has no type": (
        E / IP(src="10.0.0.2", dst="10.0.0.1", frag=10, proto=1) / Raw(bytes(40)),
        FOUR | {"proto": 1, "icmp_valid": 0},
    ),
    "S8 UDP needs 8 bytes": (E / V4 / Raw(b"\x00\x01\x00\x02\x00\x08\x00") / b"", "malformed_udp"),
    "S8 SCTP": (E / V4 / SCTP(sport=5, dport=6), FOUR | {"proto": 132, "sport": 5, "dport": 6}),
    "S8 SCTP needs 12 bytes": (cut(E / V4 / SCTP(sport=5, dport=6), 14 + 20 + 11), "truncated"),
    "S8 UDP-Lite": (E / IP(src="10.0.0.2", dst="10.0.0.1", proto=136) / Raw(UDP_LITE), FOUR | {"sport": 7, "dport": 8}),
    "S8 DCCP": (E / IP(src="10.0.0.2", dst="10.0.0.1", proto=33) / Raw(DCCP), FOUR | {"sport": 9, "dport": 10}),
    "S8 ICMP": (E / V4 / ICMP(type=3, code=1), FOUR | {"icmp_valid": 1, "icmp_type": 3, "icmp_code": 1, "sport": 0}),
    "S8 ICMP needs 8 bytes": (cut(E / V4 / ICMP(), 14 + 20 + 7), "truncated"),
    "S8 ICMPv6": (E / V6 / ICMPv6EchoRequest(), SIX | {"proto": 58, "icmp_valid": 1, "icmp_type": 128, "icmp_code": 0}),
    "S8 ICMP over IPv6 has no type": (
        E / IPv6(src="2001:db8::2", dst="2001:db8::1", nh=1) / Raw(b"\x03"),
        SIX | {"proto": 1, "icmp_valid": 0},
    ),
    "S8 ICMPv6 over IPv4 has no type": (
        E / IP(src="10.0.0.2", dst="10.0.0.1", proto=58) / Raw(b"\x80"),
        FOUR | {"proto": 58, "icmp_valid": 0},
    ),
    "S8 a TCP data offset below 5 is accounted": (E / V4 / TCP(sport=1000, dataofs=3), FOUR | {"sport": 1000}),
    "S8 another protocol has no ports": (
        E / IP(src="10.0.0.2", dst="10.0.0.1", proto=89) / Raw(b"x"),
        FOUR | {"proto": 89, "sport": 0, "dport": 0},
    ),
    "S10 equal endpoints are forward": (
        E / IP(src="10.0.0.1", dst="10.0.0.1") / UDP(sport=5, dport=5),
        {"src": "10.0.0.1", "packets_fwd": 1, "packets_rev": 0},
    ),
    "S11 all eight flags": (E / V4 / TCP(flags="FSRPAUEC"), FOUR | {"tcp_flags_fwd": 255}),
    "S12 GRE is the flow": (E / V4 / GRE() / IP() / TCP(), FOUR | {"proto": 47, "sport": 0}),
    "S12 IPIP is the flow": (E / V4 / IP(src="1.1.1.1") / TCP(), FOUR | {"proto": 4}),
    "S12 6in4 is the flow": (E / V4 / IPv6() / TCP(), FOUR | {"proto": 41}),
    "S12 VXLAN is its UDP": (
        E / V4 / UDP(sport=5555, dport=4789) / VXLAN() / ethernet() / IP() / TCP(),
        FOUR | {"proto": 17, "sport": 5555, "dport": 4789},
    ),
}
CASES["S8 UDP needs 8 bytes"] = (cut(E / V4 / U, 14 + 20 + 7), "truncated")


@pytest.mark.parametrize("case", CASES)
def test_a_frame_is_accounted_as_the_rule_says(case: str) -> None:
    packet, expected = CASES[case]
    frame = packet if isinstance(packet, bytes) else bytes(raw(packet))
    with loaded(table_entries=64) as program:
        program.feed([frame], [1])
        counters, records = program.counters(), flows(drain_all(program))
    assert (counters["seen_packets"], counters["seen_bytes"]) == (1, len(frame))
    if isinstance(expected, str):
        assert (counters[f"{expected}_packets"], counters[f"{expected}_bytes"]) == (1, len(frame))
        assert records == []
        return
    (record,) = records
    assert {name: record[name] for name in expected} == expected
    assert (counters["accounted_packets"], record["packets_fwd"], record["bytes_fwd"]) == (1, 1, len(frame))


def test_both_directions_are_one_flow_of_the_first_sender() -> None:
    """S9, S10: whichever end sorts first, and for either first sender."""
    there, back = (
        bytes(raw(E / V4 / T)),
        bytes(raw(E / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=80, dport=1000, flags="SA"))),
    )
    for first, second, source in ((there, back, "10.0.0.2"), (back, there, "10.0.0.1")):
        with loaded(table_entries=64) as program:
            program.feed([first, second, second], [1, 2, 3])
            (record,) = flows(drain_all(program))
        assert (record["src"], record["packets_fwd"], record["packets_rev"]) == (source, 1, 2)
        assert (record["start_ns"], record["end_ns"]) == (1, 3)


def test_flags_are_kept_apart_by_direction() -> None:
    """S11: the OR over each direction's packets."""
    there = [bytes(raw(E / V4 / TCP(sport=1000, flags=f))) for f in ("S", "A", "PA")]
    back = bytes(raw(E / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(sport=80, dport=1000, flags="FA")))
    with loaded(table_entries=64) as program:
        program.feed([*there, back], [1, 2, 3, 4])
        (record,) = flows(drain_all(program))
    assert (record["tcp_flags_fwd"], record["tcp_flags_rev"]) == (SYN | ACK | PSH, FIN | ACK)


def test_icmp_between_two_hosts_is_one_flow_with_the_first_type() -> None:
    """S9, merged: type and code are not in the key."""
    frames = [bytes(raw(E / V4 / ICMP(type=t, code=c))) for t, c in ((8, 0), (3, 1), (11, 0))]
    with loaded(table_entries=64) as program:
        program.feed(frames, [1, 2, 3])
        (record,) = flows(drain_all(program))
    assert (record["packets_fwd"], record["icmp_type"], record["icmp_code"]) == (3, 8, 0)


def test_addresses_of_the_other_version_are_another_flow() -> None:
    """S9: an IPv6 packet between IPv4-mapped addresses has the addresses of an IPv4 flow, and is none."""
    mapped = IPv6(src="::ffff:10.0.0.2", dst="::ffff:10.0.0.1")
    with loaded(table_entries=64) as program:
        program.feed([bytes(raw(E / V4 / U)), bytes(raw(E / mapped / U))], [1, 2])
        assert sorted(record["ip_version"] for record in flows(drain_all(program))) == [4, 6]


def test_a_changed_vlan_is_marked_and_the_first_is_kept() -> None:
    """S9: the VLAN is not in the key."""
    with loaded(table_entries=64) as program:
        program.feed([bytes(raw(E / Dot1Q(vlan=v) / V4 / U)) for v in (5, 5, 6)], [1, 2, 3])
        (record,) = flows(drain_all(program))
    assert (record["vlan"], record["flags"] & 1, record["packets_fwd"]) == (5, 1, 3)


@pytest.mark.parametrize("size", [4_000, 9_000, 65_549, 80_000])
def test_a_jumbo_frame_counts_whole(size: int) -> None:
    frame = bytes(raw(E / IP(src="10.0.0.2", dst="10.0.0.1", len=9000) / U)).ljust(size, b"x")
    with loaded(table_entries=64) as program:
        program.feed([frame], [1])
        (record,) = flows(drain_all(program))
    assert (record["bytes_fwd"], record["length_max_fwd"], record["length_sumsq_fwd"]) == (size, size, size * size)


def test_headers_beyond_the_linear_part_of_a_jumbo_frame_are_read() -> None:
    """Six extension headers of 2 KB each push the TCP header into the frame's fragments."""
    option = struct.pack("!BB", 60, 255) + bytes(2046)
    chain = option * 5 + struct.pack("!BB", 6, 255) + bytes(2046)
    frame = (
        bytes(raw(E / IPv6(src="2001:db8::2", dst="2001:db8::1", nh=60, plen=len(chain) + 20))) + chain + bytes(raw(T))
    )
    with loaded(table_entries=64) as program:
        program.feed([frame, frame[:-1]], [1, 2])
        counters = program.counters()
        (record,) = flows(drain_all(program))
    assert (record["proto"], record["sport"], record["dport"], record["tcp_flags_fwd"]) == (6, 1000, 80, SYN)
    assert (record["packets_fwd"], counters["truncated_packets"]) == (1, 1)
