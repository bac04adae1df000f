"""Records of the ring become Arrow columns without loss, and records of one flow become one row."""

import ipaddress
import re
import socket
import subprocess
from importlib.resources import files

import numpy as np
import pyarrow as pa
import pytest

from flowsage.collector.addresses import VECTOR_FROM, format_addresses
from flowsage.collector.records import (
    CONTINUED,
    DIRECTION_DTYPE,
    FLOW_SCHEMA,
    RECORD_DTYPE,
    VLAN_CHANGED,
    merge_same_flow,
    packets_in,
    to_batch,
)


def wire(text: str, version: int) -> bytes:
    address = ipaddress.ip_address(text)
    return address.packed if version == 6 else b"\0" * 10 + b"\xff\xff" + address.packed


def record(
    src: str, dst: str, sport: int, dport: int, *, version: int = 4, start: int = 1000, end: int = 2000
) -> np.ndarray:
    r = np.zeros(1, RECORD_DTYPE)
    r["initiator"], r["responder"] = (np.frombuffer(wire(a, version), np.uint8) for a in (src, dst))
    r["initiator_port"], r["responder_port"], r["proto"], r["ip_version"] = sport, dport, 6, version
    r["start_ns"], r["end_ns"], r["end_reason"] = start, end, 3
    return r


def filled(r: np.ndarray, seed: int) -> np.ndarray:
    """`r` with different values everywhere in both directions."""
    rng = np.random.default_rng(seed)
    for way in range(2):
        for name in DIRECTION_DTYPE.names or ():
            r["direction"][0, way][name] = rng.integers(1, 200)
    return r


def test_the_layout_is_that_of_the_shared_header(tmp_path):
    header = files("flowsage.bpf").joinpath("flow.h").read_text()
    for struct, dtype in (("flow_direction", DIRECTION_DTYPE), ("flow_record", RECORD_DTYPE)):
        body = re.search(rf"struct {struct} \{{(.*?)\}};", header, re.S)
        assert body
        names = re.findall(r"^\t(?:struct \w+|__u\d+) (\w+)", body[1], re.M)
        assert names == list(dtype.names or ())
        lines = "".join(f'printf("%zu\\n", __builtin_offsetof(struct {struct}, {name}));' for name in names)
        source = tmp_path / f"{struct}.c"
        source.write_text(
            "#include <stdio.h>\n#include <linux/types.h>\n"
            f'#include "{files("flowsage.bpf").joinpath("flow.h")}"\n'
            f'int main(void) {{ {lines} printf("%zu\\n", sizeof(struct {struct})); return 0; }}\n'
        )
        program = tmp_path / struct
        subprocess.run(["clang", "-o", program, source], check=True)
        offsets = [int(x) for x in subprocess.run([program], check=True, capture_output=True).stdout.split()]
        assert offsets == [dtype.fields[name][1] for name in names] + [dtype.itemsize]


def test_every_column_carries_its_field():
    r = filled(record("10.0.0.1", "192.168.200.255", 40000, 443), 1)
    r["handshake_ns"], r["ifindex"], r["vlan"], r["flags"] = 77, 12, 4000, CONTINUED | VLAN_CHANGED
    row = to_batch(r, clock_offset_ns=5, sensor="edge-1").to_pylist()[0]
    assert (row["start_ns"], row["end_ns"], row["handshake_ns"]) == (1005, 2005, 77)
    assert (row["src_ip"], row["dst_ip"], row["src_port"], row["dst_port"]) == (
        "10.0.0.1",
        "192.168.200.255",
        40000,
        443,
    )
    assert (row["proto"], row["ip_version"], row["ifindex"], row["vlan"], row["sensor"]) == (6, 4, 12, 4000, "edge-1")
    assert (row["continued"], row["vlan_changed"], row["end_reason"]) == (True, True, 3)
    assert (row["icmp_type"], row["icmp_code"]) == (-1, -1)
    for way, suffix in enumerate(("fwd", "rev")):
        for name in DIRECTION_DTYPE.names or ():
            if name not in ("last_ns", "pad"):
                assert row[f"{name}_{suffix}"] == r["direction"][0, way][name]


def test_a_batch_has_the_schema_and_is_valid_even_when_empty():
    for records in (np.zeros(0, RECORD_DTYPE), record("1.2.3.4", "5.6.7.8", 1, 2)):
        batch = to_batch(records, clock_offset_ns=0, sensor="s")
        batch.validate(full=True)
        assert batch.schema.equals(FLOW_SCHEMA, check_metadata=True)
        assert len(batch) == len(records)


def test_what_was_not_seen_is_null_or_minus_one_and_what_was_is_not():
    r = np.concatenate([record("1.1.1.1", "2.2.2.2", 0, 0) for _ in range(2)])
    r["icmp_valid"], r["icmp_type"], r["icmp_code"], r["handshake_ns"] = [0, 1], [8, 255], 0, [0, 9]
    batch = to_batch(r, clock_offset_ns=0, sensor="s")
    assert batch["icmp_type"].to_pylist() == [-1, 255]
    assert batch["icmp_code"].to_pylist() == [-1, 0]
    assert batch["handshake_ns"].to_pylist() == [None, 9]


@pytest.mark.parametrize("share_v6", [0.0, 0.5, 1.0])
def test_addresses_are_written_as_everyone_writes_them(share_v6):
    rng = np.random.default_rng(7)
    n = 500
    raw = rng.integers(0, 256, (n, 16), dtype=np.uint8)
    raw[rng.random((n, 16)) < 0.4] = 0
    raw[:, 0] = 0x20
    version = np.where(rng.random(n) < share_v6, 6, 4).astype(np.uint8)
    raw[version == 4, :10], raw[version == 4, 10:12] = 0, 255
    want = [
        str(ipaddress.ip_address(a[12:].tobytes() if v == 4 else a.tobytes()))
        for a, v in zip(raw, version, strict=True)
    ]
    assert format_addresses(raw, version).to_pylist() == want
    r = np.zeros(n, RECORD_DTYPE)
    r["initiator"], r["responder"], r["ip_version"] = raw, raw[::-1], version
    r = r[version == version[::-1]]
    batch = to_batch(r, clock_offset_ns=0, sensor="s")
    keep = np.flatnonzero(version == version[::-1])
    assert batch["src_ip"].to_pylist() == [want[i] for i in keep]
    assert batch["dst_ip"].to_pylist() == [want[n - 1 - i] for i in keep]


@pytest.mark.parametrize("n", [VECTOR_FROM - 1, 20_000])
def test_ipv6_is_written_as_the_c_library_writes_it_whatever_its_zeros(n):
    rng = np.random.default_rng(n)
    words = rng.integers(0, 1 << 16, (n, 8)) >> rng.integers(0, 16, (n, 8))
    words[rng.random((n, 8)) < rng.random((n, 1))] = 0
    raw = words.astype(">u2").view(np.uint8).reshape(n, 16)
    want = [socket.inet_ntop(socket.AF_INET6, a.tobytes()) for a in raw]
    assert format_addresses(raw, np.full(n, 6, np.uint8)).to_pylist() == want
    assert {"::", "::1"} & set(want) or n < VECTOR_FROM


def test_a_mapped_address_in_an_ipv6_packet_is_not_the_ipv4_host():
    r = np.concatenate(
        [record("10.0.0.1", "10.0.0.2", 1, 2), record("::ffff:10.0.0.1", "2001:db8::1", 1, 2, version=6)]
    )
    batch = to_batch(r, clock_offset_ns=0, sensor="s")
    assert batch["src_ip"].to_pylist() == ["10.0.0.1", "::ffff:10.0.0.1"]
    assert batch["dst_ip"].to_pylist() == ["10.0.0.2", "2001:db8::1"]


def table(*records: np.ndarray) -> pa.Table:
    return pa.Table.from_batches([to_batch(r, clock_offset_ns=0, sensor="s") for r in records])


def test_records_of_one_flow_become_one_row_seen_from_its_first_packet():
    a = filled(record("10.0.0.1", "10.0.0.2", 1000, 80, start=100, end=900), 1)
    b = filled(record("10.0.0.2", "10.0.0.1", 80, 1000, start=200, end=1500), 2)
    other = filled(record("10.0.0.1", "10.0.0.2", 1001, 80, start=50, end=60), 3)
    a["direction"]["tcp_flags"], b["direction"]["tcp_flags"] = [[2, 16]], [[4, 8]]
    a["handshake_ns"], b["end_reason"] = 33, 4
    merged = merge_same_flow(table(b, other, a)).to_pylist()
    assert [row["src_port"] for row in merged] == [1001, 1000]
    row = merged[1]
    x, y = a["direction"][0], b["direction"][0]
    assert (row["src_ip"], row["start_ns"], row["end_ns"], row["end_reason"]) == ("10.0.0.1", 100, 1500, 4)
    assert row["packets_fwd"] == x[0]["packets"] + y[1]["packets"]
    assert row["packets_rev"] == x[1]["packets"] + y[0]["packets"]
    assert row["bytes_rev"] == x[1]["bytes"] + y[0]["bytes"]
    assert (row["tcp_flags_fwd"], row["tcp_flags_rev"], row["handshake_ns"]) == (2 | 8, 16 | 4, 33)
    assert row["length_min_fwd"] == min(x[0]["length_min"], y[1]["length_min"])
    assert row["ttl_max_rev"] == max(x[1]["ttl_max"], y[0]["ttl_max"])


def test_merging_counts_every_packet_once_and_leaves_single_records_as_they_are():
    rng = np.random.default_rng(3)
    records = np.concatenate(
        [
            filled(record(f"10.0.0.{rng.integers(1, 4)}", f"10.0.0.{rng.integers(4, 7)}", int(rng.integers(3)), 80), i)
            for i in range(60)
        ]
    )
    many = table(records[:20], records[20:])
    merged = merge_same_flow(many)
    assert len(merged) < len(many)
    assert packets_in(merged) == packets_in(many)
    assert merge_same_flow(merged).equals(merged)
    assert len(merge_same_flow(many.slice(0, 0))) == 0


def test_the_smallest_packet_of_a_silent_direction_does_not_win():
    a, b = (filled(record("10.0.0.1", "10.0.0.2", 1, 2), i) for i in (1, 2))
    a["direction"]["length_min"], b["direction"]["length_min"] = 60, 70
    a["direction"][0, 1] = np.zeros((), DIRECTION_DTYPE)
    row = merge_same_flow(table(a, b)).to_pylist()[0]
    assert (row["length_min_fwd"], row["length_min_rev"]) == (60, 70)
