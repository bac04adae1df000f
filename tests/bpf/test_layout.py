"""The layout that clang compiled, the one that Python reads, and the names on both sides."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowsage.collector.program import _CELLS_PER_PLACE, COUNTERS, _Settings
from flowsage.collector.records import DIRECTION_DTYPE, RECORD_DTYPE
from flowsage.collector.ring import SLOT_BYTES, SLOT_DTYPE
from flowsage.collector.walk import WalkContext

from .support import ROOT, build

PROBE = """#include <linux/types.h>
#include "flow.h"
struct flow_record record; struct flow_settings settings; struct flow_walk walk; struct flow_input input;
"""


def btf(path: Path) -> dict[str, dict[str, Any]]:
    """Every struct of an object by name."""
    text = subprocess.run(
        ["bpftool", "-j", "btf", "dump", "file", path], check=True, capture_output=True, text=True
    ).stdout
    return {t["name"]: t for t in json.loads(text)["types"] if t["kind"] == "STRUCT"}


@pytest.fixture(scope="module")
def structs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The structs of flow.h, as clang compiles them for BPF."""
    folder = tmp_path_factory.mktemp("layout")
    (folder / "probe.bpf.c").write_text(PROBE)
    (folder / "parse.h").touch()
    for name in ("flow.h", "Makefile"):
        (folder / name).write_bytes((ROOT / "bpf" / name).read_bytes())
    subprocess.run(["make", "-s", "-C", folder, "probe.bpf.o"], check=True)
    return btf(folder / "probe.bpf.o")


def offsets(struct: dict[str, Any]) -> dict[str, int]:
    return {member["name"]: member["bits_offset"] // 8 for member in struct["members"]}


@pytest.mark.parametrize(("name", "dtype"), [("flow_record", RECORD_DTYPE), ("flow_direction", DIRECTION_DTYPE)])
def test_records_lie_as_clang_laid_them(
    structs: dict[str, dict[str, Any]], name: str, dtype: np.dtype[np.void]
) -> None:
    assert dtype.fields is not None
    assert offsets(structs[name]) == {field: place[1] for field, place in dtype.fields.items()}
    assert structs[name]["size"] == dtype.itemsize


@pytest.mark.parametrize(("name", "mine"), [("flow_settings", _Settings), ("flow_walk", WalkContext)])
def test_contexts_lie_as_clang_laid_them(structs: dict[str, dict[str, Any]], name: str, mine: Any) -> None:
    assert offsets(structs[name]) == {field: getattr(mine, field).offset for field, _ in mine._fields_}


def test_a_slot_is_a_power_of_two() -> None:
    assert SLOT_DTYPE.itemsize == SLOT_BYTES == 256


def test_each_direction_of_an_entry_has_a_cache_line() -> None:
    """The kernel's element: 48 bytes, the key (the print) of 8, the value; elements follow each other."""
    build()
    structs = btf(ROOT / "bpf" / "flow.bpf.o")
    entry, element = structs["entry"], 48 + 8
    assert (element + entry["size"]) % 64 == 0
    assert (element + offsets(entry)["side"]) % 64 == 0
    assert structs["side"]["size"] == 64
    header = (ROOT / "bpf" / "entry.h").read_text()
    assert f"#define CELLS_PER_PLACE {_CELLS_PER_PLACE}\n" in header
    # In the front, which is mapped and therefore begins on a page.
    place = structs["place"]
    assert place["size"] % 64 == 0
    assert (offsets(place)["entry"] + offsets(entry)["side"]) % 64 == 0


def test_counters_have_the_names_of_the_header() -> None:
    text = re.search(r"enum flow_counter \{(.*?)\};", (ROOT / "bpf" / "flow.h").read_text(), re.DOTALL)
    assert text is not None
    names = re.findall(r"^\s*FLOW_(\w+),", text[1], re.MULTILINE)
    assert tuple(name.lower() for name in names) == (*COUNTERS, "counters")
