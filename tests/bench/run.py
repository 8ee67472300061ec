#!/usr/bin/env python3
"""Measures what tracing and analysis cost here, tracing beside a peer in the same run. Needs root; takes minutes.

Examples:
    run.py                             everything, as a table
    run.py --quick --json bench.json   shorter, and the samples as JSON
    run.py attach reader               only these
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernel"), str(HERE.parents[1] / "vagrant")]

from figures import BenchError, Findings, table  # noqa: E402
from lab import LabError  # noqa: E402

from stallscope.tracer.errors import StallscopeError  # noqa: E402

BENCHES = (
    "attach", "reader", "memory", "hit", "throughput", "standing", "listener", "captures", "analysis", "unwind",
    "stacks", "watch",
)  # fmt: skip
WITHOUT_ROOT = {"analysis"}
EXIT_UNABLE = 4


def main() -> int:
    """Run the benches, print the table; the exit code says only whether something was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", metavar="BENCH", help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, about 2 minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    options = parser.parse_args()
    for name in options.benches:
        if name not in BENCHES:
            parser.error(f'there is no bench "{name}"; choose among {", ".join(BENCHES)}')
    if os.geteuid() != 0 and set(options.benches or BENCHES) - WITHOUT_ROOT:
        print("run.py: tracing needs root; run it with sudo", file=sys.stderr)
        return EXIT_UNABLE
    findings = [_bench(name, quick=options.quick) for name in options.benches or BENCHES]
    print(f"{platform.node()}, Linux {platform.release()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    print("median (smallest-largest); ours and the peer's took turns in one run\n")
    print(table(findings))
    if options.json:
        document = {"kernel": platform.release(), "benches": [found.to_json() for found in findings]}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if any(found.figures for found in findings) else EXIT_UNABLE


def _bench(name: str, *, quick: bool) -> Findings:
    began = time.monotonic()
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    try:
        found: Findings = importlib.import_module(name).bench(quick=quick)
    except (BenchError, LabError, StallscopeError) as error:
        found = Findings(name, notes=[f"not measured: {error}"])
    found.notes[:] = dict.fromkeys(found.notes)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return found


if __name__ == "__main__":
    sys.exit(main())
