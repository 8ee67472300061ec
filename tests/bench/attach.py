"""From the start of a tracer's process to all its probes in the target."""

from __future__ import annotations

import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attached import Attached, attached
from figures import BenchError, Figure, Findings
from lab import LabError
from lab.server import Server, running_server
from tracers import bpftrace, durations, loop_by_tracepoints, places, stallscope, why_no_tracepoints

LAB_BUILD = "2.8.17"
GOAL_S = 1.0
_OWN_LINE = re.compile(r"all probes attached after ([\d.]+) (ms|s)\b")


@contextmanager
def servers(notes: list[str]) -> Iterator[dict[str, Server]]:
    """Run the servers there are: the lab's (DWARF, .symtab) and the distribution's (stripped, .dynsym)."""
    with ExitStack() as stack:
        running: dict[str, Server] = {}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stallscope-bench-")))
        installed = shutil.which("redis-server")
        if installed is None:
            notes.append("no distribution's redis-server; apt-get install redis-server")
        else:
            # Debian's is a link to redis-check-rdb, and goes by the name it is called by
            shutil.copy2(installed, folder / "redis-server")
        for name, build in (("lab", LAB_BUILD), ("distribution", folder / "redis-server")):
            if isinstance(build, Path) and not build.exists():
                continue
            try:
                server = stack.enter_context(running_server(build))
            except LabError as error:
                notes.append(f"no {name}'s server: {error}")
                continue
            running[f"{name}'s {'.'.join(map(str, server.version))}"] = server
        if not running:
            raise BenchError("there is no Redis server to trace")
        yield running


def bench(*, quick: bool) -> Findings:
    """Return wall-clock and CPU time until attached, ours beside bpftrace's, on each server."""
    found = Findings("attach: from process start to every breakpoint in the target's code")
    with servers(found.notes) as running, tempfile.TemporaryDirectory(prefix="stallscope-bench-") as folder:
        for name, server in running.items():
            _measure(found, name, server.pid, Path(folder) / "a.stall", 2 if quick else 5)
    return found


def _measure(found: Findings, name: str, pid: int, output: Path, rounds: int) -> None:
    functions = places(pid)
    program = durations(functions)
    lacking = why_no_tracepoints()
    if lacking:
        found.notes.append(f"bpftrace attaches no raw tracepoints, so it does less than ours: {lacking}")
    else:
        program += loop_by_tracepoints(pid)
    ours: list[Attached] = []
    theirs: list[Attached] = []
    said: list[float] = []
    for _ in range(rounds):
        with attached(stallscope(pid, output), pid, functions) as tracer:
            ours.append(tracer)
            said.append(_own_figure(tracer.messages))
        try:
            with attached(bpftrace(pid, program), pid, functions) as tracer:
                theirs.append(tracer)
        except BenchError as error:
            found.notes.append(f"bpftrace on {name}: {error}")
    walls = [tracer.wall_s for tracer in ours]
    found.figures += [
        Figure(
            f"{name}, {len(functions)} functions, wall s", walls, "bpftrace",
            [tracer.wall_s for tracer in theirs], f"under {GOAL_S:g} s", statistics.median(walls) < GOAL_S,
        ),
        Figure("  CPU, with the compiler process, s", [t.cpu_s for t in ours], "bpftrace", [t.cpu_s for t in theirs]),
        Figure("  as our own line on stderr says, s", said),
    ]  # fmt: skip


def _own_figure(messages: Path) -> float:
    """Return the seconds that ``stallscope record`` says it took; it says so just after attaching."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        match = _OWN_LINE.search(messages.read_text(errors="replace"))
        if match:
            return float(match[1]) * (0.001 if match[2] == "ms" else 1.0)
        time.sleep(0.01)
    raise BenchError("stallscope record did not say when it was attached")
