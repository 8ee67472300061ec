"""Unwinding by .eh_frame: the share of stacks that agree with gdb and reach main, and its speed beside perf's.

A server under a mixed load is stopped by gdb at random places; registers and stack are copied as a sampler would
and unwound here, and every frame is held against gdb's. ``perf script`` unwinds stacks of the same size that
``perf record --call-graph dwarf`` copied from the same server under the same load.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from figures import Figure, Findings

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "kernel")]

from gdb_places import Places, busy_server, compare, visit  # noqa: E402
from lab import LabError  # noqa: E402

from stallscope.tracer.unwind.registers import RED_ZONE_BYTES  # noqa: E402
from stallscope.tracer.unwind.unwinder import Unwinder  # noqa: E402

BUILDS = ("2.8.17", "5.0.6", "/usr/bin/redis-server")
PLACES, QUICK_PLACES = 300, 40
SIZES_KB = (8, 16, 24)
STACKS = 4_000
PERF_SECONDS = 2
PERF_BYTES = 24 * 1024


def bench(*, quick: bool) -> Findings:
    """Return per build how many stacks agree, how many reach main by the bytes copied, and the speed."""
    found = Findings("unwind: user stacks of a busy server, without frame pointers")
    if not shutil.which("gdb"):
        found.notes.append("gdb is not installed: apt-get install gdb")
        return found
    for build in BUILDS:
        try:
            with busy_server(build, seed=1) as server:
                theirs = _perf(server.pid)
                places = visit(server, QUICK_PLACES if quick else PLACES, seed=1)
        except LabError as error:
            found.notes.append(f"{build} was not measured: {error}")
            continue
        found.figures += _agreement(Path(build).name if "/" in build else build, places, found.notes)
        found.figures += _speed(places, theirs)
    if not shutil.which("perf"):
        found.notes.append("perf is not installed: apt-get install linux-perf")
    return found


def _agreement(name: str, places: Places, notes: list[str]) -> list[Figure]:
    best = compare(places, below=RED_ZONE_BYTES)
    notes += [f"{name}: {difference}" for difference in best.differences]
    notes += [f"{name}: {names}, {count} times" for names, count in best.wrong_names.items()]
    distinct = len({frames[0].address for frames in places.frames})
    share = 100 * best.equal / best.places
    figures = [
        Figure(
            f"{name}: all frames equal, % of {best.places} stacks",
            [share],
            f"gdb; {distinct} distinct places, {best.frames} frames",
            goal="100",
            met=share == 100,
        )
    ]
    for size in SIZES_KB:
        to_main = 100 * compare(places, copied_bytes=size * 1024).to_main / best.places
        goal = ">99" if size == SIZES_KB[-1] else ""
        figures.append(Figure(f"  reach main, {size} KB copied, %", [to_main], goal=goal, met=to_main > 99))
    return figures


def _speed(places: Places, theirs: tuple[float, float] | None) -> list[Figure]:
    unwinder = Unwinder(places.mappings, places.images)
    times = -(-STACKS // len(places.registers))
    stacks = np.tile(places.stacks[:, RED_ZONE_BYTES : RED_ZONE_BYTES + PERF_BYTES], (times, 1))
    registers = np.tile(places.registers, (times, 1))
    lengths = np.tile(places.lengths - RED_ZONE_BYTES, times)
    began = time.process_time()
    unwound = unwinder.unwind(registers, stacks, lengths)
    seen = np.unique(unwound.places[unwound.places != 0])
    unwinder.frames(seen)
    ours = len(registers) / (time.process_time() - began)
    per_second, to_main = theirs or (0.0, 0.0)
    return [
        Figure(
            "  unwound and named, stacks per s of CPU",
            [ours],
            f"perf script; {to_main:.1f}% of its reach main" if theirs else "",
            [per_second] if theirs else [],
        ),
        Figure("  decoding the rules of all functions seen, once, ms of CPU", [_first_use_ms(places, seen)]),
    ]


def _first_use_ms(places: Places, seen: np.ndarray) -> float:
    began = time.process_time()
    for mapping in places.mappings:
        here = seen[(seen >= mapping.start) & (seen < mapping.end)]
        if len(here):
            image = places.images[mapping.path]
            in_file = here - np.uint64(mapping.start) + np.uint64(image.code_address(mapping.file_offset))
            image.undecoded_rules().at(in_file)
    return 1000 * (time.process_time() - began)


def _perf(pid: int) -> tuple[float, float] | None:
    """Return how many stacks perf unwinds in a second of CPU, and how many % of them reach main."""
    if not shutil.which("perf"):
        return None
    with tempfile.TemporaryDirectory(prefix="stallscope-bench-") as folder:
        data, text = Path(folder) / "perf.data", Path(folder) / "script"
        record = ["record", "-q", "-e", "cpu-clock:u", "-F", "499", "--call-graph", f"dwarf,{PERF_BYTES}"]
        subprocess.run(
            ["perf", *record, "-p", str(pid), "-o", data, "--", "sleep", str(PERF_SECONDS)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with text.open("w") as output:
            script = ["perf", "script", "-i", data, "-F", "ip,sym", "--no-inline"]
            with subprocess.Popen(script, stdout=output, stderr=subprocess.DEVNULL) as process:
                _, status, used = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
        stacks = [stack for stack in text.read_text(errors="replace").split("\n\n") if stack.strip()]
    if process.returncode or not stacks:
        return None
    to_main = sum(any(line.split()[1:] == ["main"] for line in stack.splitlines()) for stack in stacks)
    return len(stacks) / (used.ru_utime + used.ru_stime), 100 * to_main / len(stacks)
