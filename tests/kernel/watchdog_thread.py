"""What the watchdog's tests and bench share: it watches a server in a thread, with raw tracepoints beside it."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from stallscope.tracer.capture.event_loop import LoopPlan
from stallscope.tracer.capture.probe_ids import FIRST_CALL_PROBE, ITERATION_PROBE
from stallscope.tracer.capture.program import CallProbe, Program
from stallscope.tracer.capture.redis_target import open_target
from stallscope.tracer.capture.standstill import Span
from stallscope.tracer.capture.symbols import resolve
from stallscope.tracer.capture.watchdog import StallInProgress, Watchdog

RING_BYTES = 1 << 20
CRON_READ_NS = 50_000_000


@contextmanager
def cron_probed(pid: int) -> Iterator[Program]:
    """Probe serverCron's entry and return in a server, and nothing else."""
    target = open_target(pid)
    try:
        (resolution,) = resolve(target.image, ["serverCron"], redis_version=target.version or None)
        program = Program(
            [CallProbe(FIRST_CALL_PROBE, resolution.decoder)],
            ring_bytes=RING_BYTES, min_duration_ns=0, iteration_min_ns=0, loop=False,
        )  # fmt: skip
        try:
            for place in resolution.attachments:
                program.attach_call(FIRST_CALL_PROBE, place.path, place.offset, pid)
            yield program
        finally:
            program.close()
    finally:
        target.close()


@dataclass
class Watched:
    """What was seen of a server so far.

    Attributes:
        rows: the watchdog's stalls; looks: when it looked; in_progress: what it said was in progress at each of them.
        crons: when each call of serverCron returned, and after how many ms it wanted to be called again.
        cpu_ns: CPU time of the thread.
    """

    watchdog: Watchdog
    cron: Program | None
    rows: list[np.void] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)
    in_progress: list[list[StallInProgress]] = field(default_factory=list)
    crons: list[tuple[int, int]] = field(default_factory=list)
    cpu_ns: int = 0

    @property
    def stalls(self) -> list[Span]:
        """Return the watchdog's stalls, in the order in which they began."""
        spans = [Span(int(row["start_ns"]), int(row["start_ns"]) + int(row["duration_ns"])) for row in list(self.rows)]
        return sorted(spans, key=lambda span: span.start_ns)

    def still_ns(self) -> int:
        """Return how long the stall lasts by now that is in progress, 0 when there is none."""
        looks = list(zip(self.looks, self.in_progress, strict=False))[-1:]
        return max((now_ns - stall.start_ns for now_ns, stalls in looks for stall in stalls), default=0)

    def looks_between(self, first_ns: int, second_ns: int) -> int:
        """Return how many looks there were strictly between two moments, whichever is first."""
        first_ns, second_ns = sorted((first_ns, second_ns))
        return max(bisect_left(self.looks, second_ns) - bisect_right(self.looks, first_ns), 0)


@contextmanager
def watched(pid: int, threshold_ns: int, *, cron: bool = True) -> Iterator[Watched]:
    """Have a watchdog watch a server in a thread of its own."""
    ended = threading.Event()
    watchdog = Watchdog(threshold_ns)
    watchdog.add(pid, pid)

    def watch(seen: Watched) -> None:
        watchdog.run_first()
        next_read = 0
        while not ended.is_set():
            now_ns = time.monotonic_ns()
            rows, stalls = watchdog.sample(now_ns)
            seen.looks.append(now_ns)
            seen.in_progress.append(stalls)
            seen.rows += list(rows)
            if seen.cron is not None and now_ns >= next_read:
                next_read = now_ns + CRON_READ_NS
                calls = seen.cron.ring.read()
                calls = calls[np.argsort(calls["start_ns"])]
                watchdog.take_crons(calls)
                seen.crons += [(int(row["start_ns"] + row["duration_ns"]), int(row["value"][2])) for row in calls]
            seen.cpu_ns = time.thread_time_ns()
            time.sleep(max(now_ns + watchdog.interval_ns - time.monotonic_ns(), 0) / 1e9)

    def watching(probed: Program | None) -> Iterator[Watched]:
        seen = Watched(watchdog, probed)
        thread = threading.Thread(target=watch, args=(seen,))
        thread.start()
        try:
            yield seen
        finally:
            ended.set()
            thread.join()
            watchdog.close()

    if cron:
        with cron_probed(pid) as probed:
            yield from watching(probed)
    else:
        yield from watching(None)


@contextmanager
def traced(pid: int, threshold_ns: int, plan: LoopPlan | None = None) -> Iterator[Program]:
    """See the same server by raw tracepoints, or as planned: iterations that reach the threshold are in the ring."""
    program = Program([], ring_bytes=RING_BYTES, min_duration_ns=0, iteration_min_ns=threshold_ns, loop_plan=plan)
    try:
        program.attach_loop()
        program.watch_loop(pid)
        yield program
    finally:
        program.close()


def iterations(program: Program) -> list[Span]:
    """Return the iterations that waited in the ring."""
    events = program.ring.read()
    events = events[events["probe"] == ITERATION_PROBE]
    return [Span(int(row["start_ns"]), int(row["start_ns"]) + int(row["duration_ns"])) for row in events]
