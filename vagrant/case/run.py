#!/usr/bin/env python3
"""Tells the incident's story again: records it, measures it, and writes CASE-STUDY.md from what was measured.

Examples:
    run.py                       everything that is not done yet, then the table of all variants
    run.py list                  the variants, and which of their runs are recorded
    run.py record baseline       only these recordings
    run.py write                 examine what is recorded, write CASE-STUDY.md and its pictures
    run.py table                 the table alone

Recordings are kept in .case/ (or STALLSCOPE_CASE); what is there is not recorded again. On a machine that others
use, `nice -n -15 run.py ...` keeps their work out of the recordings.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab import LabError
from lab.launch import carry_niceness

from case import CaseError, CaseUsageError
from case.record import home, record_missing, runs_of
from case.steps import Steps, Variant, load_steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    carry_niceness()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # a shell's background job: let it be interrupted, and all it starts
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        steps = load_steps(options.steps) if options.steps else load_steps()
        options.work(steps, options)
    except (CaseError, LabError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _note(text: str) -> None:
    print(f"case: {text}", file=sys.stderr, flush=True)


def _chosen(steps: Steps, names: Sequence[str]) -> list[Variant]:
    if unknown := [name for name in names if name not in steps.variants]:
        raise CaseUsageError(f'there is no variant "{unknown[0]}"; choose among {", ".join(steps.variants)}')
    variants = [steps.variants[name] for name in names] if names else list(steps.variants.values())
    for variant in variants:
        if variant.optional and not variant.is_built:
            _note(f"{variant.name} is left out: Redis {variant.build} is not built (vagrant/lab/build.py, online)")
    return [variant for variant in variants if variant.is_built or not variant.optional]


def _list(steps: Steps, options: argparse.Namespace) -> None:
    for variant in steps.variants.values():
        made = sum(run.is_made for run in runs_of(variant, home(), options.runs))
        where = f"in the machine, Linux {variant.kernel}" if variant.kernel else ""
        state = "" if variant.is_built else "not built"
        about = ", ".join(part for part in (variant.about, where, state) if part)
        print(f"{variant.name:16} {made} of {options.runs or variant.runs}  Redis {variant.build:15} {about}")


def _record(steps: Steps, options: argparse.Namespace) -> None:
    variants = _chosen(steps, options.names)
    here = [variant for variant in variants if not variant.kernel]
    record_missing(here, home(), _note, options.runs)
    record_missing([variant for variant in variants if variant.kernel], home(), _note, options.runs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, help="another story than steps.toml")
    parser.add_argument("--runs", type=int, metavar="N", help="runs of each variant, instead of what steps.toml says")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the variants").set_defaults(work=_list)
    record = commands.add_parser("record", help="make the recordings that are missing")
    record.add_argument("names", nargs="*", metavar="VARIANT", help="only these")
    record.set_defaults(work=_record)
    return parser


if __name__ == "__main__":
    sys.exit(main())
