"""The calls as a sequence of entries and returns, in the order in which they happened in each thread.

Where several happen in the same nanosecond, the order is still that of the call tree: what a reader keeps a
stack by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.tracer.analysis.containment import NO_PARENT
from stallscope.tracer.analysis.nesting import Nested
from stallscope.tracer.analysis.tables import Ints

EDGES_A_CHUNK = 1 << 18


@dataclass(frozen=True)
class Edges:
    """Entries and returns, two for each call.

    Attributes:
        call: the row of ``Nested.calls``; enters: whether it is the entry.
        time_ns: CLOCK_MONOTONIC; never decreases inside a thread. Unfinished calls return at the end of
            the recording.
    """

    call: Ints
    enters: npt.NDArray[np.bool_]
    time_ns: Ints

    def __len__(self) -> int:
        return len(self.call)

    def part(self, low: int, high: int) -> Edges:
        """Return the edges from place ``low`` up to ``high``."""
        return Edges(self.call[low:high], self.enters[low:high], self.time_ns[low:high])

    def where(self, keep: npt.NDArray[np.bool_]) -> Edges:
        """Return some of the edges."""
        return Edges(self.call[keep], self.enters[keep], self.time_ns[keep])

    def chunks(self) -> Iterator[Edges]:
        """Yield all edges in order, in parts small enough to be worked on at once."""
        for low in range(0, len(self), EDGES_A_CHUNK):
            yield self.part(low, low + EDGES_A_CHUNK)


def call_edges(nested: Nested) -> Edges:
    """Return the entries and returns of all calls, thread by thread."""
    calls = nested.calls
    count = len(calls)
    start = calls["start_ns"].to_numpy()
    parent, depth = calls["parent"].to_numpy(), calls["depth"].to_numpy().astype(np.int64)
    index = np.arange(count)
    # before the entry of call i stand i entries and, of those, the returns of all but its depth callers
    entry = 2 * index - depth
    returned = entry + 2 * _subtree_sizes(parent, depth) - 1
    call = np.empty(2 * count, np.int64)
    enters = np.zeros(2 * count, np.bool_)
    time_ns = np.empty(2 * count, np.int64)
    call[entry], call[returned] = index, index
    enters[entry] = True
    time_ns[entry], time_ns[returned] = start, start + calls["duration_ns"].to_numpy()
    if nested.crossing:
        tid = calls["tid"].to_numpy()[call]
        borders = np.flatnonzero(np.diff(tid)) + 1
        for thread in np.split(time_ns, borders):
            thread[:] = np.minimum.accumulate(thread[::-1])[::-1]
    return Edges(call, enters, time_ns)


def _subtree_sizes(parent: Ints, depth: Ints) -> Ints:
    """Return how many calls each call's subtree has, itself among them."""
    size = np.ones(len(parent), np.int64)
    order = np.argsort(depth, kind="stable")
    borders = np.searchsorted(depth[order], np.arange(1, int(depth.max(initial=0)) + 2))
    for level in range(len(borders) - 1, 0, -1):
        rows = order[borders[level - 1] : borders[level]]
        inner = rows[parent[rows] != NO_PARENT]
        np.add.at(size, parent[inner], size[inner])
    return size
