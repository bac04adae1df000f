"""`python -m tests.evaluate DATA [PART …]`: every table of detection, beside what others reach and what we have to."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.evaluate import jobs, tables


def main() -> None:
    """Run the jobs in two processes, then print the tables of what was run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the labelled flow files")
    parser.add_argument("parts", nargs="*", metavar="PART", help="only jobs whose name begins so: rank, benign …")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_intermixed_args()
    data: Path = arguments.data
    if not (data / "darpa98.parquet").exists():
        raise SystemExit(f"there are no labelled flow files in {data}; name their folder: make evaluate DATA=FOLDER")
    chosen = [j for j in jobs.JOBS if not arguments.parts or any(j.startswith(p) for p in arguments.parts)]
    started = time.perf_counter()
    results: dict[str, jobs.Result] = {}
    with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(jobs.run, job, data) for job in chosen]):
            result = done.result()
            results[result.job] = result
            print(f"{result.job}: {result.seconds:.0f} s, {result.cpu:.0f} s of CPU", file=sys.stderr, flush=True)
    print(tables.render(results))
    cpu = sum(r.cpu for r in results.values())
    print(f"\n{time.perf_counter() - started:.0f} s in all, {cpu:.0f} s of CPU")


if __name__ == "__main__":
    main()
