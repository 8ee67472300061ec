#!/usr/bin/env python3
"""Tells the incident's story again: records it, measures it, and writes CASE-STUDY.md from what was measured.

Examples:
    run.py all                   everything that is not done yet, the study, and the table of all variants
    run.py list                  the variants, and which of their runs are recorded
    run.py record baseline       only these recordings
    run.py write                 examine what is recorded, write CASE-STUDY.md and its pictures
    run.py table                 the table alone

Recordings are kept in .case/ (or STALLSCOPE_CASE); what is there is not recorded again. On a machine that others
use, `nice -n -15 run.py ...` keeps their work out of the recordings.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab import LabError
from lab.launch import carry_niceness

from case import PROJECT, CaseError, CaseUsageError
from case.columns import SMALL, STORM, transposed
from case.examine import draw, examine
from case.record import home, record_missing, runs_of
from case.steps import Steps, Variant, load_steps
from case.study import PICTURES, read_template, render

DOCUMENT = "run.json"
STUDY = "CASE-STUDY.md"


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


def _examined(steps: Steps) -> dict[str, Any]:
    document = examine(steps, home(), _note)
    pictures = PROJECT / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    document["pictures"] = {}
    for name, picture in steps.pictures.items():
        if picture.variant in document["variants"]:
            _note(f"drawing {name}")
            document["pictures"][name] = draw(picture, document, home(), pictures / f"{name}.png")
    (pictures / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n")
    return document


def _write(steps: Steps, options: argparse.Namespace) -> None:
    read_template()  # refused before everything is asked again
    document = json.loads((PROJECT / PICTURES / DOCUMENT).read_text()) if options.again else _examined(steps)
    (PROJECT / STUDY).write_text(render(document), encoding="utf-8")
    _note(f"wrote {STUDY}, {PICTURES}/{DOCUMENT} and {len(document['pictures'])} pictures")


def _table(steps: Steps, options: argparse.Namespace) -> None:
    del options
    document = json.loads((PROJECT / PICTURES / DOCUMENT).read_text())
    for heading, columns in (("under large buffers", STORM), ("under small buffers", SMALL)):
        shown = [one for one in document["variants"].values() if (one["load"]["uploaders"] > 0) == (columns is STORM)]
        print(f"{heading}: median [smallest to largest]\n")
        print(transposed(shown, columns) + "\n")


def _all(steps: Steps, options: argparse.Namespace) -> None:
    _record(steps, options)
    _write(steps, options)
    _table(steps, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=Path, help="another story than steps.toml")
    parser.add_argument("--runs", type=int, metavar="N", help="runs of each variant, instead of what steps.toml says")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the variants").set_defaults(work=_list)
    record = commands.add_parser("record", help="make the recordings that are missing")
    record.add_argument("names", nargs="*", metavar="VARIANT", help="only these")
    record.set_defaults(work=_record)
    write = commands.add_parser("write", help="write CASE-STUDY.md from the recordings")
    write.add_argument("--again", action="store_true", help=f"from {PICTURES}/{DOCUMENT} as it is")
    write.set_defaults(work=_write)
    commands.add_parser("table", help="the table of all variants, as last written").set_defaults(work=_table)
    everything = commands.add_parser("all", help="record what is missing, write the study, print the table")
    everything.set_defaults(work=_all, names=[], again=False)
    return parser


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
