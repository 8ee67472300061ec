"""Requests per second and the server's CPU time per request: tracing off, ours on, bpftrace on, by turns."""

from __future__ import annotations

import csv
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from attach import servers
from attached import attached
from figures import BenchError, Figure, Findings
from lab.server import HOST, Server
from tracers import bpftrace, durations, loop_by_libc, loop_by_tracepoints, places, stallscope, why_no_tracepoints

OFF, OURS = "off", "ours"
CLIENTS = 50


@dataclass(frozen=True)
class Load:
    """One way of asking: its name, options for redis-benchmark, and requests per round."""

    name: str
    options: tuple[str, ...]
    requests: int


LOADS = (
    Load("GET, 50 connections kept", ("-t", "get"), 100_000),
    Load("GET, a connection each", ("-t", "get", "-k", "0"), 20_000),
)


@dataclass(frozen=True)
class Speed:
    """Requests per second as redis-benchmark says, and CPU time of the server per request in us."""

    requests_per_s: float
    server_us: float


def bench(*, quick: bool) -> Findings:
    """Return throughput under each tracer as a share of that without, and ours beside bpftrace's."""
    found = Findings("throughput: redis-benchmark on loopback, the default set of probes")
    if shutil.which("redis-benchmark") is None:
        raise BenchError("redis-benchmark is not installed; apt-get install redis-tools")
    with servers(found.notes) as running, tempfile.TemporaryDirectory(prefix="stallscope-bench-") as folder:
        name, server = next(iter(running.items()))
        found.bench += f", on the {name}"
        commands = _commands(found, server.pid, Path(folder) / "throughput.stall")
        speeds = _rounds(found, server, commands, quick=quick)
    for load in LOADS:
        _compare(found, load, {tracer: speeds[tracer, load.name] for tracer in commands})
    return found


def _commands(found: Findings, pid: int, output: Path) -> dict[str, list[str] | None]:
    """Return each tracer's command by its name; None for no tracer."""
    functions = places(pid)
    commands: dict[str, list[str] | None] = {OFF: None, OURS: stallscope(pid, output)}
    lacking = why_no_tracepoints()
    try:
        if lacking:
            found.notes.append(
                "bpftrace attaches no raw tracepoints here: once without the event loop (it does less than ours), "
                f"once with it through the C library's epoll_wait and accept; {lacking}"
            )
            commands["bpftrace, functions only"] = bpftrace(pid, durations(functions))
            commands["bpftrace, with the loop"] = bpftrace(pid, durations(functions) + loop_by_libc(pid))
        else:
            commands["bpftrace"] = bpftrace(pid, durations(functions) + loop_by_tracepoints(pid))
    except BenchError as error:
        found.notes.append(str(error))
    return commands


def _rounds(
    found: Findings, server: Server, commands: dict[str, list[str] | None], *, quick: bool
) -> dict[tuple[str, str], list[Speed]]:
    functions = places(server.pid)
    speeds: dict[tuple[str, str], list[Speed]] = {(tracer, load.name): [] for tracer in commands for load in LOADS}
    for _ in range(2 if quick else 5):
        for tracer, command in commands.items():
            try:
                with attached(command, server.pid, functions) if command else nullcontext():
                    for load in LOADS:
                        requests = load.requests // (5 if quick else 1)
                        speeds[tracer, load.name].append(measure_speed(server, load, requests))
            except BenchError as error:
                found.notes.append(f"{tracer}: {error}")
    return speeds


def measure_speed(server: Server, load: Load, requests: int) -> Speed:
    """Return what redis-benchmark and the kernel say of one round.

    Raises:
        BenchError: redis-benchmark failed.
    """
    command = ["redis-benchmark", "-h", HOST, "-p", str(server.port), "-c", str(CLIENTS), "-n", str(requests), "--csv"]
    before_ns = server_cpu_ns(server.pid)
    done = subprocess.run([*command, *load.options], capture_output=True, text=True, timeout=120)
    used_ns = server_cpu_ns(server.pid) - before_ns
    rows = [row for row in csv.reader(done.stdout.splitlines()) if row and row[0] == "GET"]
    if done.returncode or not rows:
        raise BenchError(f"redis-benchmark failed: {(done.stderr or done.stdout).strip()[-160:]}")
    return Speed(float(rows[0][1]), used_ns / requests / 1000)


def server_cpu_ns(pid: int) -> int:
    """Return the time that a process's main thread has run, in ns: /proc/PID/schedstat, first field."""
    return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0])


def _compare(found: Findings, load: Load, speeds: dict[str, Sequence[Speed]]) -> None:
    rates = {tracer: [speed.requests_per_s for speed in taken] for tracer, taken in speeds.items()}
    times = {tracer: [speed.server_us for speed in taken] for tracer, taken in speeds.items()}
    peers = [tracer for tracer in speeds if tracer not in (OFF, OURS)]
    found.figures.append(Figure(f"{load.name}: requests/s", rates[OURS], "no tracing", rates[OFF]))
    for peer in peers:
        met = median(rates[OURS]) >= median(rates[peer]) if rates[peer] else None
        found.figures.append(Figure("  requests/s", rates[OURS], peer, rates[peer], "not worse", met))
        found.figures.append(Figure(f"  {peer}: requests/s", rates[peer], "no tracing", rates[OFF]))
    for peer in (OFF, *peers):
        label = "no tracing" if peer == OFF else peer
        found.figures.append(Figure("  server CPU per request, us", times[OURS], label, times[peer]))
