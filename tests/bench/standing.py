"""What a tracer that stays for weeks costs the server: redis-benchmark beside 10,000 idle clients, by turns.

Nothing, the watchdog with serverCron's probes, the event loop's raw tracepoints, its fentry where it exists.
Only the event loop's part of a standing tracer: sampling the accept queues costs the server nothing.
"""

from __future__ import annotations

import random
import resource
import shutil
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from attach import servers
from figures import BenchError, Figure, Findings
from lab.clients import SOURCES
from lab.server import HOST, Server
from throughput import Load, Speed, measure_speed
from watchdog_thread import RING_BYTES, traced, watched

from stallscope.probes.catalogue import NO_DECODER
from stallscope.tracer.capture.cost import CALIBRATION_PROBE, measure_call_cost_ns
from stallscope.tracer.capture.event_loop import TRACEPOINT_RUNG, plan_loop
from stallscope.tracer.capture.program import CallProbe, Program

IDLE_CLIENTS = 10_000
THRESHOLD_NS = 50_000_000
LOAD = Load("GET, 50 connections kept", ("-t", "get"), 20_000)
GOAL = 0.01
OFF, WATCHDOG, TRACEPOINTS = "nothing", "watchdog and serverCron", "raw tracepoints"
_PING = b"PING\r\n"
_RESAMPLES = 4000
_SETTLE_S = 0.5


def bench(*, quick: bool) -> Findings:
    """Return throughput and the server's CPU time per request under each, beside those without any."""
    found = Findings(f"standing: GET flood beside {IDLE_CLIENTS:,} idle clients")
    if shutil.which("redis-benchmark") is None:
        raise BenchError("redis-benchmark is not installed; apt-get install redis-tools")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with servers(found.notes) as running, ExitStack() as stack:
        name, server = next(iter(running.items()))
        found.bench += f", on the {name}"
        stack.enter_context(_idle_clients(server, min(IDLE_CLIENTS, hard - 1000)))
        tracers: dict[str, Callable[[], AbstractContextManager[object]]] = {
            OFF: nullcontext,
            WATCHDOG: lambda: watched(server.pid, THRESHOLD_NS),
            TRACEPOINTS: lambda: traced(server.pid, THRESHOLD_NS),
        }
        best = plan_loop()
        if best.rung != TRACEPOINT_RUNG:
            tracers[best.rung] = lambda: traced(server.pid, THRESHOLD_NS, best)
        speeds = _rounds(server, tracers, 4 if quick else 16)
        _own_cost(found, server)
    _compare(found, speeds)
    return found


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
                time.sleep(_SETTLE_S)
                speeds[name].append(measure_speed(server, LOAD, LOAD.requests))
    return speeds


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
