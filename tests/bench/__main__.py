"""`python -m tests.bench [PART …]`: the whole table, or only some parts of it."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from tests.bench.rows import Row, show, write

PARTS = ("forward", "kernel", "ring", "scoring", "startup", "sensor", "kafka", "stream")
NAMED = ("live",)
"""Only where they are named: they take long."""
TARGET = Path("build/bench.json")


def main() -> None:
    """Run the parts, print a line a row as it comes, write build/bench.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS + NAMED))
    parts = parser.parse_args().parts or PARTS
    if unknown := set(parts) - set(PARTS + NAMED):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS + NAMED)}")
    rows: list[Row] = []
    for part in parts:
        for row in importlib.import_module(f"tests.bench.{part}").rows():
            print(show(row), flush=True)
            rows.append(row)
    write(rows, TARGET)
    print(f"\nwritten to {TARGET}")


if __name__ == "__main__":
    main()
