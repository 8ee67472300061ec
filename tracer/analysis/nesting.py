"""Which call was made inside which, rebuilt from start and duration alone.

Calls of one thread nest or follow each other; they never cross. So the depth of a call is the number of
calls begun before it and not yet ended, and its caller is the last call before it that is one level less
deep. Both are found for all calls at once, by sorting and searching, in O(n log n).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.containment import NO_PARENT, by_level, nested_parents, parents_by_stack, self_times
from stallscope.tracer.analysis.tables import Ints, thread_time_key


@dataclass(frozen=True)
class Nested:
    """Calls with their place in the call tree.

    Attributes:
        calls: the table ``calls`` of :mod:`tables`, without abandoned calls, in the same order and
            renumbered from 0, with these columns added:

            ======= ===== ==== ================================================================
            parent  int64      index of the nearest recorded caller, -1 for a root
            depth   int32      number of recorded callers
            self_ns int64 ns   duration without the recorded calls directly inside
            path    int32      index into ``paths``: the functions from the root down to this one
            ======= ===== ==== ================================================================

        paths: each distinct chain of functions once, as (index of the caller's path or -1, probe id).
        abandoned: unfinished calls left out, because something they were made in has ended: they
            were left by longjmp and never return.
        crossing: whether calls crossed each other, which only damaged recordings show; nesting is then
            by containment and self times are not exact.
    """

    calls: pd.DataFrame
    paths: list[tuple[int, int]]
    abandoned: pd.DataFrame
    crossing: bool

    def path(self, index: int) -> tuple[int, ...]:
        """Return the probe ids from the root down to this path's own function."""
        chain: list[int] = []
        while index >= 0:
            index, probe = self.paths[index]
            chain.append(probe)
        return tuple(reversed(chain))

    def outermost(self) -> npt.NDArray[np.bool_]:
        """Return which calls have no call of the same function around them; shape (calls,).

        Summed over these, a recursive function's time counts once.
        """
        first = np.zeros(len(self.paths), np.bool_)
        above: list[frozenset[int]] = []
        for index, (parent, probe) in enumerate(self.paths):
            inherited = above[parent] if parent >= 0 else frozenset()
            first[index] = probe not in inherited
            above.append(inherited if probe in inherited else inherited | {probe})
        return first[self.calls["path"].to_numpy()]


def nest(calls: pd.DataFrame, iterations: pd.DataFrame | None = None) -> Nested:
    """Return the calls with their callers, depths, self times and paths.

    Args:
        calls: the table ``calls``, in the order it has there.
        iterations: the table ``iterations``; an unfinished call that began inside a finished iteration
            was abandoned.
    """
    gone = _abandoned(calls, iterations)
    kept = calls
    if gone.any():
        kept = calls.loc[~gone].reset_index(drop=True)
    start = kept["start_ns"].to_numpy()
    duration = kept["duration_ns"].to_numpy()
    parent, depth, crossing = find_parents(kept["tid"].to_numpy(), start, duration)
    self_ns = self_times(parent, duration)
    path, paths = _paths(parent, depth, kept["probe"].to_numpy())
    nested = kept.assign(parent=parent, depth=depth, self_ns=self_ns, path=path)
    return Nested(nested, paths, calls.loc[gone], crossing)


def find_parents(tid: npt.NDArray[np.uint32], start: Ints, duration: Ints) -> tuple[Ints, npt.NDArray[np.int32], bool]:
    """Return for each span the index of the span around it (-1: none), its depth, and whether any crossed.

    A span that touches the end of another follows it. Of equal spans the earlier is around the later.

    Args:
        tid: thread of each span; spans sorted by thread, start and, longest first, duration.
        start: ns.
        duration: ns.
    """
    if len(start) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int32), False
    # an empty span still is inside what is open at its start: let it last 1 ns here
    end = start + np.maximum(duration, 1)
    key = thread_time_key(tid, start, end)
    if key is not None:
        found = nested_parents(*key, duration)
        if found is not None:
            return *found, False
    return *parents_by_stack(tid, start, end), True


def _paths(
    parent: Ints, depth: npt.NDArray[np.int32], probe: npt.NDArray[np.uint16]
) -> tuple[npt.NDArray[np.int32], list[tuple[int, int]]]:
    """Return each call's path and the list of distinct paths, callers before what they call."""
    path = np.full(len(parent), NO_PARENT, np.int32)
    paths: list[tuple[int, int]] = []
    if len(parent) == 0:
        return path, paths
    order, borders = by_level(depth)
    for level in range(len(borders) - 1):
        rows = order[borders[level] : borders[level + 1]]
        above = path[parent[rows]].astype(np.int64) if level else np.full(len(rows), -1, np.int64)
        codes, found = pd.factorize((above << 16) | probe[rows])
        path[rows] = codes + len(paths)
        paths += [(int(code) >> 16, int(code) & 0xFFFF) for code in found]
    return path, paths


def _abandoned(calls: pd.DataFrame, iterations: pd.DataFrame | None) -> npt.NDArray[np.bool_]:
    """Return which calls had not ended although a finished span began before and ended after their start."""
    gone = np.zeros(len(calls), np.bool_)
    open_rows = np.flatnonzero(calls["unfinished"].to_numpy())
    if len(open_rows) == 0:
        return gone
    columns = ["tid", "start_ns", "duration_ns", "unfinished"]
    around = [calls[columns]]
    if iterations is not None:
        around.append(iterations[columns])
    tids = calls["tid"].to_numpy()[open_rows]
    starts = calls["start_ns"].to_numpy()[open_rows]
    for tid in np.unique(tids):
        mine = np.flatnonzero(tids == tid)
        latest = np.full(len(mine), -1, np.int64)
        for table in around:
            finished = table.loc[(table["tid"] == tid) & ~table["unfinished"]]
            begin = finished["start_ns"].to_numpy()
            ends = np.maximum.accumulate(begin + finished["duration_ns"].to_numpy())
            if len(begin):
                place = np.searchsorted(begin, starts[mine], side="right") - 1
                latest = np.maximum(latest, np.where(place >= 0, ends[place], -1))
        gone[open_rows[mine]] = latest > starts[mine]
    return gone
