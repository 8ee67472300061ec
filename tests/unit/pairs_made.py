"""Recordings made in pairs: a server with slow ticks before, and without them after a change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from recordings import CLIENTS, CRON, ITERATION_ID, MS, PROBES, RESIZE, TRIM, Builder, manifest, quiet

from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.compare.sides import Side, make_side
from stallscope.tracer.manifest import Manifest, ProbeCounters, TargetInfo
from stallscope.tracer.recording import read_recording

HOST = {"kernel": "6.1.0-18-cloud-amd64", "machine": "x86_64", "cpus": "2", "cpu": "A CPU"}
SLOW_MS = 60.0
SECONDS = 60.0


def told(**changes: Any) -> Manifest:
    """Return a manifest of a server that told its load: 100 clients, 20 connections/s and 500 commands/s."""
    info = {
        "connected_clients": "100",
        "connected_clients_end": "100",
        "total_connections_received": "1000",
        "total_connections_received_end": str(1000 + int(20 * SECONDS)),
        "total_commands_processed": "5000",
        "total_commands_processed_end": str(5000 + int(500 * SECONDS)),
    }
    made = manifest(min_duration_ns=0, host=HOST)
    target: TargetInfo = replace(made.targets[0], info={**info, **changes.pop("info", {})})
    if "version" in changes:
        target = replace(target, version=changes.pop("version"))
    return replace(made, targets=(target,), **changes)


def recorded(
    path: Path,
    slow_s: Sequence[float] = (),
    *,
    length: float = 1.0,
    calls_of_trim: bool = True,
    counters: dict[int, ProbeCounters] | None = None,
    complete: bool = True,
    overflows_end: int | None = None,
    seconds: float = SECONDS,
    **changes: Any,
) -> Path:
    """Write a recording with a cron tick of 0.3 ms ten times a second, and slow ones at these times.

    A tick is serverCron > clientsCron > one resize > one trim; a slow one takes 60 ms, and is a stall.

    Args:
        slow_s: when slow ticks are, seconds.
        length: what the time of every other call is multiplied by.
    """
    builder = Builder(told(**changes))
    quiet(builder, seconds * 1000)
    slow = {round(one * 10) for one in slow_s}
    for tick in range(int(seconds * 10)):
        start = tick * 100 + 5.0
        taken = SLOW_MS if tick in slow else length * (0.3 + 0.05 * (tick * 7 % 11) / 11)
        if tick in slow:
            builder.span(ITERATION_ID, start - 0.1, taken + 0.2, 1, 0)
        builder.span(CRON, start, taken).span(CLIENTS, start + 0.01, taken * 0.9)
        builder.resize(start + 0.02, taken * 0.8, idle_s=3, allocated=32_768, free=16_000)
        if calls_of_trim:
            builder.span(TRIM, start + 0.03, taken * 0.7, 16_000, 16_000)
    ticks = int(seconds * 10)
    loop = ProbeCounters(hits=ticks, sent=len(slow), short_calls=ticks - len(slow), short_ns=ticks * MS)
    counted = {ITERATION_ID: loop, **(counters or {})}
    return builder.write(path, seconds * 1000, counted, complete=complete, overflows_end=overflows_end)


@cache
def side(*paths: Path) -> Side:
    """Return recordings as one side; a path must not be written twice."""
    return make_side([analyse(read_recording(path)) for path in paths])


__all__ = ["CRON", "HOST", "MS", "PROBES", "RESIZE", "SECONDS", "SLOW_MS", "TRIM", "recorded", "side", "told"]
