"""Sums and maxima over many ranges of rows at once."""

from __future__ import annotations

import numpy as np

from stallscope.tracer.analysis.tables import Ints

NOT_KNOWN = -1


def ranges(first: Ints, last: Ints) -> tuple[Ints, Ints]:
    """Return, for every element of the ranges [first, last), the number of its range and its own value."""
    length = np.maximum(last - first, 0)
    owner = np.repeat(np.arange(len(first)), length)
    offset = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    return owner, first[owner] + offset


def range_of(place: Ints, first: Ints, last: Ints) -> Ints:
    """Return in which range [first, last) each of these places lies, NOT_KNOWN where in none.

    Ranges do not overlap, need no order, and may be empty.
    """
    filled = np.flatnonzero(last > first)
    order = filled[np.argsort(first[filled], kind="stable")]
    if not len(order):
        return np.full(len(place), NOT_KNOWN, np.int64)
    candidate = order[np.maximum(np.searchsorted(first[order], place, side="right") - 1, 0)]
    return np.where((first[candidate] <= place) & (place < last[candidate]), candidate, NOT_KNOWN)


def range_max(value: Ints, first: Ints, last: Ints) -> Ints:
    """Return the greatest value in each range [first, last); ``NOT_KNOWN`` where it is empty."""
    result = np.full(len(first), NOT_KNOWN, np.int64)
    filled = np.flatnonzero(last > first)
    if len(filled):
        borders = np.column_stack([first[filled], last[filled]]).ravel()
        result[filled] = np.maximum.reduceat(np.append(value, NOT_KNOWN), borders)[::2]
    return result


def sum_by(group: Ints, value: Ints, count: int) -> Ints:
    """Return the sum of the values of each group, 0 to ``count`` - 1."""
    result = np.zeros(count, np.int64)
    np.add.at(result, group, value)
    return result
