"""What a tracer that stays for weeks costs the server: a flood of GET beside 10,000 idle clients, by turns.

Nothing, all of ``stallscope watch`` as it stands by, and the event loop by raw tracepoints or, where it exists, fentry.
The server has a CPU of its own and always enough to do, as when its clients are on other machines; the flood and the
tracer share the other one. So what is lost is what the server loses.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

from attach import servers
from figures import BenchError, Figure, Findings
from lab.clients import SOURCES
from lab.server import HOST, Server
from throughput import Speed, server_cpu_ns
from watch import running_watch
from watchdog_thread import RING_BYTES, traced, watched

from stallscope.probes.catalogue import NO_DECODER
from stallscope.tracer.capture.cost import CALIBRATION_PROBE, measure_call_cost_ns
from stallscope.tracer.capture.event_loop import TRACEPOINT_RUNG, plan_loop
from stallscope.tracer.capture.program import CallProbe, Program

IDLE_CLIENTS = 10_000
THRESHOLD_NS = 50_000_000
GOAL = 0.01
OFF, WATCH, TRACEPOINTS = "nothing", "watch", "raw tracepoints"
_FLOOD = ("-t", "get", "-c", "50", "-P", "64", "-n", "1000000", "-l", "-q")
_PING = b"PING\r\n"
_RESAMPLES = 4000
_SETTLE_S = 0.5
_WARM_UP_S = 0.15
_WINDOW_S = 0.3
"""Short, and many of them: on a shared machine speed changes within seconds."""


def bench(*, quick: bool) -> Findings:
    """Return throughput and the server's CPU time per request under each, beside those without any."""
    found = Findings(f"standing: GET flood (pipelines of 64) beside {IDLE_CLIENTS:,} idle clients")
    if shutil.which("redis-benchmark") is None:
        raise BenchError("redis-benchmark is not installed; apt-get install redis-tools")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with servers(found.notes) as running, ExitStack() as stack:
        name, server = next(iter(running.items()))
        found.bench += f", on the {name}"
        stack.enter_context(_apart(found, server))
        stack.enter_context(_idle_clients(server, min(IDLE_CLIENTS, hard - 1000)))
        _own_cost(found, server)
        tracers = _tracers(server, stack)
        stack.enter_context(_flood(server))
        speeds = _rounds(server, tracers, 30 if quick else 120)
    _compare(found, speeds)
    return found


@contextmanager
def _apart(found: Findings, server: Server) -> Iterator[None]:
    """Give the server the first CPU, and the others to this process and what it starts."""
    cpus = os.sched_getaffinity(0)
    first, others = min(cpus), cpus - {min(cpus)}
    if not others:
        found.notes.append("there is one CPU, so the server shares it with the flood and the tracer")
        yield
        return
    os.sched_setaffinity(server.pid, {first})
    os.sched_setaffinity(0, others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


def _tracers(server: Server, stack: ExitStack) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="stallscope-bench-"))
    watch, _ = stack.enter_context(running_watch(server.pid, Path(folder)))
    watch.send_signal(signal.SIGSTOP)
    stack.callback(watch.send_signal, signal.SIGCONT)
    tracers: dict[str, Callable[[], AbstractContextManager[object]]] = {
        OFF: nullcontext,
        WATCH: lambda: _awake(watch),
        TRACEPOINTS: lambda: traced(server.pid, THRESHOLD_NS),
    }
    best = plan_loop()
    if best.rung != TRACEPOINT_RUNG:
        tracers[best.rung] = lambda: traced(server.pid, THRESHOLD_NS, best)
    return tracers


@contextmanager
def _awake(watch: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let a watch run that is stopped otherwise; its probes, two on serverCron, are attached all the time."""
    watch.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        watch.send_signal(signal.SIGSTOP)


@contextmanager
def _flood(server: Server) -> Iterator[None]:
    command = ["redis-benchmark", "-h", HOST, "-p", str(server.port), *_FLOOD]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(2 * _SETTLE_S)
        if process.poll() is not None:
            raise BenchError(f"redis-benchmark ended: {process.returncode}")
        yield
        if process.poll() is not None:
            raise BenchError(f"redis-benchmark ended: {process.returncode}")
    finally:
        process.kill()
        process.wait()


def _rounds(
    server: Server, tracers: dict[str, Callable[[], AbstractContextManager[object]]], rounds: int
) -> dict[str, list[Speed]]:
    """Return the speeds; each round has another order, so that no tracer always comes after the same one."""
    speeds: dict[str, list[Speed]] = {name: [] for name in tracers}
    order = list(tracers)
    chance = random.Random(1)
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            with tracers[name]():
                time.sleep(_WARM_UP_S)
                speeds[name].append(_speed(server))
    return speeds


def _speed(server: Server) -> Speed:
    before, began_s, used_ns = _requests(server), time.monotonic(), server_cpu_ns(server.pid)
    time.sleep(_WINDOW_S)
    count, elapsed_s = _requests(server) - before, time.monotonic() - began_s
    return Speed(count / elapsed_s, (server_cpu_ns(server.pid) - used_ns) / count / 1000)


def _requests(server: Server) -> int:
    found = re.search(r"total_commands_processed:(\d+)", server.command("INFO", "stats"))
    if found is None:
        raise BenchError("INFO has no total_commands_processed")
    return int(found[1])


@contextmanager
def _idle_clients(server: Server, count: int) -> Iterator[None]:
    clients: list[socket.socket] = []
    try:
        for index in range(count):
            client = socket.socket()
            clients.append(client)
            client.bind((SOURCES[index % len(SOURCES)], 0))
            client.connect((HOST, server.port))
            if index % 100 == 99:  # never more in the accept queue than it holds
                client.sendall(_PING)
                client.recv(16)
        yield
    finally:
        for client in clients:
            client.close()


def _own_cost(found: Findings, server: Server) -> None:
    """Say what the watchdog takes from the server by arithmetic, and its own CPU share, both while it idles."""
    program = Program(
        [CallProbe(CALIBRATION_PROBE, NO_DECODER)],
        ring_bytes=RING_BYTES,
        min_duration_ns=0,
        iteration_min_ns=0,
        loop=False,
    )
    call_ns = statistics.median(measure_call_cost_ns(program) for _ in range(5))
    program.close()
    with watched(server.pid, THRESHOLD_NS) as seen:
        time.sleep(_SETTLE_S)
        calls, looks, cpu_ns, began = len(seen.crons), len(seen.looks), seen.cpu_ns, time.monotonic()
        time.sleep(10 * _SETTLE_S)
        elapsed_s = time.monotonic() - began
        calls_per_s = (len(seen.crons) - calls) / elapsed_s
        share = calls_per_s * call_ns / 1e9
        found.figures += [
            Figure(
                "serverCron's probes: share of the server's time, %", [100 * share], goal="under 1%", met=share < GOAL
            ),
            Figure("watchdog's own CPU, % of a core", [100 * (seen.cpu_ns - cpu_ns) / 1e9 / elapsed_s]),
        ]
        found.notes.append(
            f"{calls_per_s:.0f} calls of serverCron a second at {call_ns / 1000:.1f} us a call; "
            f"{(len(seen.looks) - looks) / elapsed_s:.0f} looks a second"
        )


def _compare(found: Findings, speeds: dict[str, list[Speed]]) -> None:
    for name, taken in speeds.items():
        if name == OFF:
            continue
        rates = Figure(f"{name}: requests/s", *_pairs(taken, speeds[OFF], lambda speed: speed.requests_per_s))
        times = Figure(f"{name}: server CPU a request, us", *_pairs(taken, speeds[OFF], lambda speed: speed.server_us))
        found.figures += [rates, times]
        for what, figure in (("requests/s", rates), ("server CPU a request", times)):
            low, middle, high = interval(figure.ratios)
            found.notes.append(f"{name}: {what} {middle:+.1%}, 95% interval {low:+.1%} to {high:+.1%}")


def _pairs(
    ours: Sequence[Speed], theirs: Sequence[Speed], number: Callable[[Speed], float]
) -> tuple[list[float], str, list[float]]:
    return [number(speed) for speed in ours], OFF, [number(speed) for speed in theirs]


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return by how much a ratio differs from 1: the median of the pairs, within its 95% bootstrap interval.

    Returns:
        Lower bound, median, upper bound.
    """
    chance = random.Random(1)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    low, high = medians[_RESAMPLES // 40], medians[-_RESAMPLES // 40]
    return low - 1, statistics.median(ratios) - 1, high - 1
