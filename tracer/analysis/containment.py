"""Which span lies in which, from start and end alone: numpy only, so that a live view needs no pandas."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

NO_PARENT = -1
_SHALLOW = 12
"""Up to this depth a pass over all spans per level is quicker than searching."""


def nested_parents(begin: Ints, close: Ints, duration: Ints) -> tuple[Ints, npt.NDArray[np.int32]] | None:
    """Return for each span the index of the span around it (-1: none) and its depth; None if any crossed.

    A span that touches the end of another follows it. Of equal spans the earlier is around the later.

    Args:
        begin: start of each span on one axis, ascending; of those that start together the longest first.
        close: its end; an empty span must be given a length of 1 here, since it still is inside what is open.
        duration: its real length, 0 for an empty one.
    """
    closed = np.searchsorted(np.sort(close), begin, side="right")
    depth = (np.arange(len(begin)) - closed).astype(np.int32)
    parent = _parents_by_depth(depth)
    if parent is None:
        return None
    inner = parent >= 0
    # with an empty span lasting 1, it may seem to reach beyond its caller
    reach = np.where(duration == 0, begin, close)
    return (parent, depth) if (close[parent[inner]] >= reach[inner]).all() else None


def parents_by_stack(tid: npt.NDArray[np.uint32], start: Ints, end: Ints) -> tuple[Ints, npt.NDArray[np.int32]]:
    """Return parents by containment and depths, one span after the other: for spans that cross."""
    parent = np.full(len(start), NO_PARENT, np.int64)
    depth = np.zeros(len(start), np.int32)
    stack: list[int] = []
    rows = zip(tid.tolist(), start.tolist(), end.tolist(), strict=True)
    thread = None
    ends: list[int] = []
    for index, (own_thread, own_start, own_end) in enumerate(rows):
        if own_thread != thread:
            thread = own_thread
            stack, ends = [], []
        while ends and (ends[-1] <= own_start or ends[-1] < own_end):
            stack.pop()
            ends.pop()
        if stack:
            parent[index] = stack[-1]
            depth[index] = len(stack)
        stack.append(index)
        ends.append(own_end)
    return parent, depth


def self_times(parent: Ints, duration: Ints) -> Ints:
    """Return each span's duration without its direct children, ns; never below 0."""
    children = np.zeros(len(parent), np.int64)
    inner = parent >= 0
    np.add.at(children, parent[inner], duration[inner])
    return np.maximum(duration - children, 0)


def by_level(depth: npt.NDArray[np.int32]) -> tuple[Ints, Ints]:
    """Return the spans sorted by depth, else as they are, and where each depth begins in that order."""
    # numpy sorts 16-bit numbers by radix, in linear time
    key = depth.astype(np.uint16) if int(depth.max()) < 2**16 else depth
    order = np.argsort(key, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(depth))])


def _parents_by_depth(depth: npt.NDArray[np.int32]) -> Ints | None:
    """Return the last earlier span of the level above, for each; None if a level is missing."""
    parent = np.full(len(depth), NO_PARENT, np.int64)
    if int(depth.min()) < 0:
        return None
    deepest = int(depth.max())
    if deepest <= _SHALLOW:
        index = np.arange(len(depth))
        for level in range(1, deepest + 1):
            latest = np.maximum.accumulate(np.where(depth == level - 1, index, NO_PARENT))
            inner = np.flatnonzero(depth == level)
            parent[inner] = latest[inner]
        return parent
    order, borders = by_level(depth)
    for level in range(1, deepest + 1):
        outer = order[borders[level - 1] : borders[level]]
        inner = order[borders[level] : borders[level + 1]]
        place = np.searchsorted(outer, inner) - 1
        if len(outer) == 0 or (place < 0).any():
            return None
        parent[inner] = outer[place]
    return parent
