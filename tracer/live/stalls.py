"""The cause of each stall, from the calls that came before it: rows of a thread arrive in the order of their ends."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.tracer.analysis.containment import NO_PARENT, nested_parents, parents_by_stack, self_times

KEPT_CALLS = 262_144
"""So many calls are remembered until the iteration that holds them has ended: 8 MB."""

_KEPT = np.dtype([("start_ns", "<i8"), ("end_ns", "<i8"), ("tid", "<u4"), ("probe", "<u2")])


@dataclass(frozen=True)
class Cause:
    """In what a stall spent its time.

    Attributes:
        probe: the function with the greatest self time, None when more was outside every traced call.
        path: the probe ids from the root to it, in its longest call.
        calls, self_ns: of that function, in the stall; of what is outside every traced call, 0 and its time.
        covered_ns: the part of the stall up to its end for which the calls were known.
    """

    probe: int | None
    path: tuple[int, ...]
    calls: int
    self_ns: int
    covered_ns: int


class RecentCalls:
    """The calls of the threads that run event loops, as many as are kept."""

    def __init__(self, kept: int = KEPT_CALLS) -> None:
        """Remember at most about ``kept`` calls; the oldest are forgotten first."""
        self._kept = kept
        self._parts: deque[npt.NDArray[np.void]] = deque()
        self._count = 0
        self._forgotten_ns = 0

    def add(self, calls: npt.NDArray[np.void]) -> None:
        """Remember calls (rows of dtype ``EVENT``, finished) of main threads, in the order of their ends."""
        mine = calls[calls["tid"] == calls["pid"]]
        if not len(mine):
            return
        part = np.empty(len(mine), _KEPT)
        part["start_ns"] = mine["start_ns"]
        part["end_ns"] = mine["start_ns"] + mine["duration_ns"]
        part["tid"], part["probe"] = mine["tid"], mine["probe"]
        self._parts.append(part)
        self._count += len(part)
        while self._count > self._kept and len(self._parts) > 1:
            self._forget(len(self._parts[0]))
        if self._count > self._kept:
            self._forget(self._count - self._kept)

    def cause(self, tid: int, start_ns: int, end_ns: int) -> Cause:
        """Return in what an iteration of a thread spent its time; the calls in it are then forgotten."""
        from_ns = max(start_ns, self._forgotten_ns)
        parts = [part[(part["tid"] == tid) & (part["end_ns"] <= end_ns)] for part in self._parts]
        inside = np.concatenate([np.zeros(0, _KEPT), *(part[part["start_ns"] >= start_ns] for part in parts)])
        self._drop(tid, end_ns)
        return _dominating(inside, min(from_ns, end_ns), end_ns)

    def _forget(self, count: int) -> None:
        oldest = self._parts.popleft()
        self._forgotten_ns = max(self._forgotten_ns, int(oldest["end_ns"][:count].max()))
        if count < len(oldest):
            self._parts.appendleft(oldest[count:])
        self._count -= count

    def _drop(self, tid: int, end_ns: int) -> None:
        kept = [part[(part["tid"] != tid) | (part["end_ns"] > end_ns)] for part in self._parts]
        self._parts = deque(part for part in kept if len(part))
        self._count = sum(map(len, self._parts))


def _dominating(calls: npt.NDArray[np.void], from_ns: int, end_ns: int) -> Cause:
    """Return the cause of the time from one moment to the other, from the calls that ended in it."""
    covered_ns = end_ns - from_ns
    if not len(calls):
        return Cause(None, (), 0, covered_ns, covered_ns)
    start = np.maximum(calls["start_ns"], from_ns)
    duration = calls["end_ns"] - start
    # a caller returns after what it calls: of equal spans the one that came later is around the other
    order = np.lexsort((-np.arange(len(calls)), -duration, start))
    start, duration, probe = start[order], duration[order], calls["probe"][order].astype(np.int64)
    end = start + np.maximum(duration, 1)
    parent, _ = nested_parents(start, end, duration) or parents_by_stack(np.zeros(len(start), np.uint32), start, end)
    own = self_times(parent, duration)
    by_probe = np.bincount(probe, own)
    cause = int(by_probe.argmax())
    outside = covered_ns - int(duration[parent == NO_PARENT].sum())
    if outside > by_probe[cause]:
        return Cause(None, (), 0, outside, covered_ns)
    rows = np.flatnonzero(probe == cause)
    at = int(rows[own[rows].argmax()])
    path = [cause]
    while parent[at] != NO_PARENT:
        at = int(parent[at])
        path.append(int(probe[at]))
    return Cause(cause, tuple(reversed(path)), len(rows), int(own[rows].sum()), covered_ns)
