"""The flame lane and the latency heat map: which calls are drawn one by one, and the rest as counted density.

A slow call lasted, alone, as long as a stall; where there are more than ``MOST_SLOW`` of these, the longest are
called slow. Slow calls are always kept. Of the others the page keeps as many as
``CALL_BUDGET`` allows, those inside stalls first, the longest first; so whatever encloses a kept call is kept with
it. Every other call is one of the counted calls of a density cell: nothing is lost, only merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.tables import Ints

Bools = npt.NDArray[np.bool_]

CALL_BUDGET = 200_000
"""Calls drawn one by one, unless more than that are slow. A call takes about 12 bytes of the page."""

MIN_SLOW_NS = 1_000_000
"""With a lower stall threshold a call is slow from here on: what is shorter blocks nobody."""

MOST_SLOW = 400_000
"""More than this do not fit a page of 12 MB."""

DENSITY_CELLS = 120_000
MAX_DENSITY_BINS = 8192
HEAT_CELLS = 120_000
MAX_HEAT_COLUMNS = 4096
HEAT_FLOOR_NS = 100
HEAT_STEPS_PER_DECADE = 8
HEAT_ROWS = 72
"""Latency rows from 100 ns to 100 s; shorter and longer calls are in the first and the last."""

_CHUNK = 1_000_000
_MAX_GRID = 4_000_000


@dataclass(frozen=True)
class Density:
    """The calls that are not drawn one by one, in cells of time, thread, depth and function.

    Attributes:
        groups: shape (g, 3): thread, depth and function of each group of cells.
        bin_ns: width of a cell; a call is counted in the cell in which it began.
        group, bin, calls, busy_ns, longest_ns: one value per cell that is not empty; sorted by group and bin.
    """

    groups: Ints
    bin_ns: int
    group: Ints
    bin: Ints
    calls: Ints
    busy_ns: Ints
    longest_ns: Ints


@dataclass(frozen=True)
class Heat:
    """How many calls of which function lasted how long, when; all calls, whether drawn one by one or not.

    Attributes:
        column_ns: width of a cell; columns: how many.
        cell: ``(function * columns + column) * HEAT_ROWS + row``, ascending; calls: how many began there.
    """

    column_ns: int
    columns: int
    cell: Ints
    calls: Ints


def slow_from_ns(stall_ns: int, duration_ns: Ints) -> int:
    """Return from which duration on a call is slow: when it alone lasts as long as a stall.

    Args:
        stall_ns: the stall threshold; duration_ns: of all calls.
    """
    limit = max(stall_ns, MIN_SLOW_NS)
    slow = duration_ns[duration_ns >= limit]
    if len(slow) <= MOST_SLOW:
        return limit
    return int(np.partition(slow, len(slow) - MOST_SLOW - 1)[len(slow) - MOST_SLOW - 1]) + 1


def inside_stalls(analysis: Analysis) -> Bools:
    """Return which calls began inside a stall, on its thread; shape (calls,)."""
    frame = analysis.stalls.frame
    change = np.zeros(len(analysis.nested.calls) + 1, np.int64)
    np.add.at(change, frame["first_call"].to_numpy(), 1)
    np.add.at(change, np.maximum(frame["last_call"].to_numpy(), frame["first_call"].to_numpy()), -1)
    return np.cumsum(change[:-1]) > 0


def choose_calls(duration_ns: Ints, in_stall: Bools, slow_ns: int, budget: int = CALL_BUDGET) -> Bools:
    """Return which calls to keep: all slow ones, then up to the budget those in stalls, then others; longest first.

    Args:
        duration_ns: of each call, callers before what they call; in_stall: whether it began inside a stall.
    """
    kept = duration_ns >= slow_ns
    for candidates in (in_stall, np.ones(len(kept), np.bool_)):
        room = budget - int(np.count_nonzero(kept))
        rows = np.flatnonzero(candidates & ~kept)
        kept[_longest(rows, duration_ns, room)] = True
    return kept


def density(thread: Ints, depth: Ints, function: Ints, start_ns: Ints, duration_ns: Ints, elapsed_ns: int) -> Density:
    """Return these calls as density; times since the start of the timeline.

    Args:
        thread, depth, function: of each call, counted from 0; start_ns, duration_ns: its time.
        elapsed_ns: length of the timeline.
    """
    functions = int(function.max(initial=0)) + 1
    depths = int(depth.max(initial=0)) + 1
    code = (thread * depths + depth) * functions + function
    known, group = _numbered(code)
    bins = int(np.clip(DENSITY_CELLS // max(len(known), 1), 64, MAX_DENSITY_BINS))
    bin_ns = max(-(-elapsed_ns // bins), 1)
    size = len(known) * bins
    calls, busy, longest = np.zeros(size, np.int64), np.zeros(size), np.zeros(size, np.int64)
    for part in _parts(len(code)):
        cell = group[part] * bins + np.clip(start_ns[part] // bin_ns, 0, bins - 1)
        calls += np.bincount(cell, minlength=size)
        busy += np.bincount(cell, weights=duration_ns[part], minlength=size)
        np.maximum.at(longest, cell, duration_ns[part])
    filled = np.flatnonzero(calls)
    groups = np.column_stack([known // functions // depths, known // functions % depths, known % functions])
    return Density(
        groups.astype(np.int64),
        bin_ns,
        filled // bins,
        filled % bins,
        calls[filled],
        busy[filled].astype(np.int64),
        longest[filled],
    )


def heat(function: Ints, start_ns: Ints, duration_ns: Ints, elapsed_ns: int) -> Heat:
    """Return how many calls lasted how long, when; arguments as of :func:`density`."""
    functions = int(function.max(initial=0)) + 1
    columns = int(np.clip(_MAX_GRID // (functions * HEAT_ROWS), 64, MAX_HEAT_COLUMNS))
    # an even number of columns each time two are merged
    columns -= columns % 64
    column_ns = max(-(-elapsed_ns // columns), 1)
    grid = np.zeros(functions * columns * HEAT_ROWS, np.int64)
    for part in _parts(len(function)):
        column = np.clip(start_ns[part] // column_ns, 0, columns - 1)
        cell = (function[part] * columns + column) * HEAT_ROWS + latency_row(duration_ns[part])
        grid += np.bincount(cell, minlength=len(grid))
    while np.count_nonzero(grid) > HEAT_CELLS and columns % 2 == 0:
        columns //= 2
        column_ns *= 2
        grid = grid.reshape(functions * columns, 2, HEAT_ROWS).sum(axis=1).ravel()
    filled = np.flatnonzero(grid)
    return Heat(column_ns, columns, filled, grid[filled])


def latency_row(duration_ns: Ints) -> Ints:
    """Return the row of the heat map for each duration."""
    above = np.log10(np.maximum(duration_ns, HEAT_FLOOR_NS) / HEAT_FLOOR_NS) * HEAT_STEPS_PER_DECADE
    return np.minimum(above.astype(np.int64), HEAT_ROWS - 1)


def _longest(rows: Ints, duration_ns: Ints, room: int) -> Ints:
    """Return at most ``room`` of these calls, the longest; of equals the first, which encloses the others."""
    if len(rows) <= room:
        return rows
    if room <= 0:
        return rows[:0]
    length = duration_ns[rows]
    least = np.partition(length, len(length) - room)[len(length) - room]
    longer = rows[length > least]
    return np.concatenate([longer, rows[length == least][: room - len(longer)]])


def _numbered(code: Ints) -> tuple[Ints, Ints]:
    """Return the distinct codes, ascending, and for each code its place among them."""
    if int(code.max(initial=0)) >= _MAX_GRID:
        known, place = np.unique(code, return_inverse=True)
        return known, place
    known = np.flatnonzero(np.bincount(code)).astype(np.int64)
    places = np.zeros(int(code.max(initial=0)) + 1, np.int64)
    places[known] = np.arange(len(known))
    return known, places[code]


def _parts(count: int) -> Iterator[slice]:
    """Yield the places in parts of a million: temporary arrays then stay small."""
    return (slice(first, first + _CHUNK) for first in range(0, count, _CHUNK))
