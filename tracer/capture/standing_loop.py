"""The event loops of a watch: followed for weeks by the cheapest way, and exactly while detail is wanted.

Where the few system calls of an event loop can be hooked, they are, all the time, and every iteration is exact. Raw
tracepoints would cost every system call of the host something for weeks: then the watchdog looks into /proc, and
the tracepoints are attached only while detail is wanted. Both report the same kind of rows. A stall that is in
progress when the tracepoints are attached is handed over: it began when the watchdog says, and ends when they see it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallscope.tracer.capture.event_loop import TRACEPOINT_RUNG
from stallscope.tracer.capture.probe_ids import ITERATION_PROBE
from stallscope.tracer.capture.traced import ITERATION_FIELDS, TracedSet
from stallscope.tracer.capture.watchdog import StallInProgress, Watchdog
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.layout import EVENT
from stallscope.tracer.watch.evaluation import UnderWay

_NEVER_NS = 2**63 - 1
_REMEMBERED = 64
_NOTHING: npt.NDArray[np.void] = np.zeros(0, EVENT)


@dataclass(frozen=True)
class _HandedOver:
    """A stall that was over before the tracepoints could see its end: its thread, and when it began."""

    tid: int
    start_ns: int

    def is_in(self, row: np.void) -> bool:
        """Return whether an iteration that was found holds its beginning."""
        start_ns = int(row["start_ns"])
        return int(row["tid"]) == self.tid and start_ns <= self.start_ns <= start_ns + int(row["duration_ns"])


@dataclass(frozen=True)
class _Exact:
    """A time in which the tracepoints were attached."""

    start_ns: int
    end_ns: int = _NEVER_NS


class StandingLoop:
    """The event loops of all watched processes."""

    def __init__(self, traced: TracedSet, threshold_ns: int) -> None:
        """Follow none yet; ``threshold_ns`` is how long a stall is at least for the watchdog."""
        self._traced = traced
        self._watchdog = Watchdog(threshold_ns) if traced.is_loop_on_demand else None
        self._next_ns = 0
        self._in_progress: list[StallInProgress] = []
        self._exact: deque[_Exact] = deque(maxlen=_REMEMBERED)
        self._not_ours: deque[_HandedOver] = deque(maxlen=_REMEMBERED)
        self._crons: tuple[int, ...] = ()
        self._are_crons_trusted = True
        self._are_tracepoints_kept = False
        if self._watchdog is not None:
            probe = self._watchdog.probe()
            fields = (*ITERATION_FIELDS, *(one for one in probe.fields if one not in ITERATION_FIELDS))
            traced.describe_loop(f"{probe.rung}; by raw tracepoint while detail is attached", fields)

    @property
    def due_ns(self) -> int:
        """When ``sample`` is to be called next, CLOCK_MONOTONIC."""
        return self._next_ns if self._watchdog is not None else _NEVER_NS

    def add(self, pid: int) -> None:
        """Follow the event loop of a process, which its first thread runs."""
        if self._watchdog is None:
            return
        try:
            self._watchdog.add(pid, pid)
        except SurroundingsError as error:
            if not Path(f"/proc/{pid}").exists():
                return  # it has ended, and is let go in a moment
            self._traced.note(
                f"{error}; until then raw tracepoints follow it, at a cost to every system call of the host"
            )
            self._are_tracepoints_kept = True
            self.attach()
            self._traced.describe_loop(TRACEPOINT_RUNG, ITERATION_FIELDS)

    def remove(self, pid: int) -> None:
        """Let go of a process."""
        if self._watchdog is not None:
            self._watchdog.remove(pid)
            self._in_progress = [stall for stall in self._in_progress if stall.pid != pid]

    def sample(self, now_ns: int) -> npt.NDArray[np.void]:
        """Look at every event loop; returns the stalls that have ended (dtype ``EVENT``) and nobody else sees."""
        if self._watchdog is None:
            return _NOTHING
        ended, self._in_progress = self._watchdog.sample(now_ns)
        self._next_ns = now_ns + self._watchdog.interval_ns
        kept = [not self._is_seen_exactly(row) for row in ended]
        return ended if all(kept) else ended[np.array(kept, bool)]

    def _is_seen_exactly(self, row: np.void) -> bool:
        """Return whether the tracepoints saw the end of an iteration that the watchdog found (it tells later)."""
        end_ns = int(row["start_ns"]) + int(row["duration_ns"])
        if not any(time.start_ns <= end_ns <= time.end_ns for time in self._exact):
            return False
        return not any(stall.is_in(row) for stall in self._not_ours)

    def take(self, events: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """Tell the watchdog of finished calls of serverCron; returns the events that are to be kept."""
        if self._watchdog is None or not len(events):
            return events
        if self._crons and self._are_crons_trusted:
            crons = events[np.isin(events["probe"], self._crons)]
            if len(crons):
                self._watchdog.take_crons(crons[np.argsort(crons["start_ns"], kind="stable")])
        if not self._not_ours:
            return events
        places = np.flatnonzero(events["probe"] == ITERATION_PROBE)
        unwanted = [place for place in places if _began(events[place]) in self._not_ours]
        return np.delete(events, unwanted) if unwanted else events

    def follow(self, cron_probes: tuple[int, ...]) -> None:
        """Learn which probes are serverCron."""
        self._crons = cron_probes

    def trust_crons(self, trusted: bool) -> None:
        """Take serverCron for a witness, or not while its calls are not all seen: it would seem to come late."""
        self._are_crons_trusted = trusted
        if self._watchdog is not None:
            self._watchdog.forget_crons()

    def under_way(self) -> list[UnderWay]:
        """Return the iterations that have not ended: those the tracepoints saw begin, and those that stand still."""
        if self._watchdog is None or self._is_exact:
            return [UnderWay(tid, start_ns, tid) for tid, start_ns in self._traced.base.iterations_under_way()]
        return [UnderWay(stall.tid, stall.start_ns, stall.pid) for stall in self._in_progress]

    def attach(self) -> None:
        """Follow the event loops exactly from now on."""
        if self._watchdog is None or self._is_exact:
            return
        self._traced.attach_loop()
        self._exact.append(_Exact(time.monotonic_ns()))
        for stall in self._in_progress:
            self._traced.base.watch_loop(stall.tid, stall.start_ns)
            if not self._watchdog.is_still(stall.pid):
                self._not_ours.append(_HandedOver(stall.tid, stall.start_ns))

    def detach(self) -> None:
        """Go back to the watchdog, unless there is a process that it may not look at."""
        if self._watchdog is not None and self._is_exact and not self._are_tracepoints_kept:
            self._exact[-1] = replace(self._exact[-1], end_ns=time.monotonic_ns())
            self._traced.detach_loop()

    @property
    def _is_exact(self) -> bool:
        return bool(self._exact) and self._exact[-1].end_ns == _NEVER_NS

    def close(self) -> None:
        """Let go of all."""
        if self._watchdog is not None:
            self._watchdog.close()


def _began(row: np.void) -> _HandedOver:
    return _HandedOver(int(row["tid"]), int(row["start_ns"]))
