"""What ``stallscope watch`` needs, and how fast it is: own CPU and memory, from a trigger to detail attached."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from figures import BenchError, Figure, Findings
from lab.server import Server, running_server

STALLSCOPE = str(Path(sys.executable).with_name("stallscope"))
BUILD = "2.8.17"
GOAL_MS = 20.0
_SETTLED_S = 3.0
_ATTACHED = re.compile(r"attached ([\d.]+) (us|ms|s) after the trigger was noticed, ([\d.]+) (us|ms|s) after")
_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0}
_WORDS = ("--trigger", "stall>50ms", "--trigger", "overflow>0", "--trigger", "backlog>80% for 100ms")
_SHORT = ("--before", "1s", "--after", "200ms", "--cooldown", "0", "--max-overhead", "100%")


def bench(*, quick: bool) -> Findings:
    """Return what a watch of one idle server needs, and what it does on stalls of 150 ms."""
    found = Findings("watch: one server, three triggers")
    with (
        running_server(BUILD) as server,
        tempfile.TemporaryDirectory(prefix="stallscope-bench-") as folder,
        running_watch(server.pid, Path(folder), *_SHORT) as (watch, log),
    ):
        cpu = [_own_cpu(watch.pid, 3.0 if quick else 6.0) for _ in range(3)]
        found.figures.append(Figure("own CPU while nothing happens, % of one", cpu))
        found.figures.append(Figure("own memory, MB", [_memory_mb(watch.pid)]))
        _stall(found, server, log, 8 if quick else 25)
        found.figures.append(Figure("own memory after these captures, MB", [_memory_mb(watch.pid)]))
    return found


@contextmanager
def running_watch(pid: int, folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Watch a process; yields the watch once it has settled, and the file of what it says."""
    log = folder / "log"
    with log.open("wb") as output:
        watch = subprocess.Popen(
            [STALLSCOPE, "watch", "-p", str(pid), "-o", str(folder / "captures"), *_WORDS, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
        )
    try:
        _until(lambda: "watching " in log.read_text(), "the watch begins")
        time.sleep(_SETTLED_S)
        yield watch, log
    finally:
        watch.send_signal(signal.SIGINT)
        watch.wait(60)


def _stall(found: Findings, server: Server, log: Path, times: int) -> None:
    """Stall the server so many times, each one captured by itself."""
    for number in range(times):
        server.command("DEBUG", "SLEEP", "0.15")
        _until(partial(_has_captured, log, number + 1), "a stall is captured")
    pairs = [
        (float(near) * _MS[unit], float(far) * _MS[other])
        for near, unit, far, other in _ATTACHED.findall(log.read_text())
    ]
    noticed, passed = [near for near, _ in pairs], [far for _, far in pairs]
    middle = sorted(passed)[len(passed) // 2] if passed else 0.0
    found.figures.append(Figure("from a trigger noticed to detail attached, ms", noticed))
    found.figures.append(
        Figure("from its bound passed to detail attached, ms", passed, goal="under 20 ms", met=middle < GOAL_MS)
    )
    if len(pairs) < times:
        found.notes.append(f"detail was attached {len(pairs)} times for {times} stalls")


def _own_cpu(pid: int, seconds: float) -> float:
    """Return the CPU time a process uses, percent of one CPU."""
    before, began = _cpu_s(pid), time.monotonic()
    time.sleep(seconds)
    return 100 * (_cpu_s(pid) - before) / (time.monotonic() - began)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    return int(found[1]) / 1000 if found else 0.0


def _has_captured(log: Path, count: int) -> bool:
    return log.read_text().count("\ncaptured ") >= count


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"not within a minute: {what}")
        time.sleep(0.02)
