"""Counts and maxima of the last seconds, in a ring of whole seconds: constant memory whatever comes.

A window of N seconds is the second under way and the N whole ones before it. What lies before the window is
left out; what is dated after ``now`` (a clock read a moment earlier) counts for its own second.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

SECOND_NS = 1_000_000_000

SUB_BUCKETS_LOG2 = 5
"""Every power of two is divided into 32 buckets: a quantile is at most 1/32 (3.2%) too high, never too low."""

_SUB_BUCKETS = 1 << SUB_BUCKETS_LOG2
_HIGHEST_LOG2 = 44
BUCKETS = (_HIGHEST_LOG2 - SUB_BUCKETS_LOG2 + 1) * _SUB_BUCKETS
"""Durations up to 2**44 ns (4.9 hours); longer ones are counted in the last bucket."""


def bucket_of(value: Ints) -> Ints:
    """Return the bucket of each value (ns, at least 0); below 64 every value has its own."""
    bounded = np.clip(value, 0, (1 << _HIGHEST_LOG2) - 1)
    # frexp is exact below 2**53
    power = np.maximum(np.frexp(bounded.astype(np.float64))[1].astype(np.int64) - 1 - SUB_BUCKETS_LOG2, 0)
    return power * _SUB_BUCKETS + (bounded >> power)


def bucket_end(bucket: int) -> int:
    """Return the largest value of a bucket, ns."""
    power = max(bucket // _SUB_BUCKETS - 1, 0)
    return ((bucket - power * _SUB_BUCKETS + 1) << power) - 1


def quantile(counts: Ints, share: float, *, below: int = 0) -> int | None:
    """Return the value at or below which this share of all values lies, rounded up to the end of its bucket.

    As numpy's ``inverted_cdf``: the value of rank ceil(share * n), not one between two values.

    Args:
        counts: by bucket, shape (BUCKETS,).
        below: how many more values there were, smaller than all that were counted by bucket.

    Returns:
        None when there are no values, or when it is one of those ``below``.
    """
    total = int(counts.sum()) + below
    # a share such as 0.99 is not exact in binary: 0.99 * 100 must not become rank 100
    rank = max(int(np.ceil(share * total - 1e-9 * total)), 1) - below
    if total == 0 or rank <= 0:
        return None
    return bucket_end(int(np.searchsorted(np.cumsum(counts), rank)))


class SlidingCounts:
    """Counts by bucket and second."""

    def __init__(self, seconds: int, width: int) -> None:
        """Count into ``width`` buckets over a window of ``seconds``."""
        self.seconds = seconds
        self._counts = np.zeros((seconds + 1, width), np.int64)
        self._second = np.full(seconds + 1, -1, np.int64)

    def add(self, time_ns: Ints, bucket: Ints, amount: Ints | None = None) -> None:
        """Count values by the time they are dated; ``amount``: how often each, once if not given."""
        second = time_ns // SECOND_NS
        for one in np.unique(second):
            place = self._place(int(one))
            if place is None:
                continue
            mine = second == one
            np.add.at(self._counts[place], bucket[mine], 1 if amount is None else amount[mine])

    def total(self, now_ns: int) -> Ints:
        """Return the counts of the window that ends now, shape (width,)."""
        return self._counts[_inside(self._second, now_ns, self.seconds)].sum(axis=0)

    def by_second(self, now_ns: int, bucket: int = 0) -> Ints:
        """Return one bucket's counts by second, oldest first, shape (seconds + 1,)."""
        return _by_second(self._second, self._counts[:, bucket], now_ns)

    def _place(self, second: int) -> int | None:
        place = second % len(self._second)
        if self._second[place] > second:
            return None
        if self._second[place] < second:
            self._second[place] = second
            self._counts[place] = 0
        return place


class SlidingMax:
    """The largest value by second; 0 where there was none."""

    def __init__(self, seconds: int) -> None:
        """Keep the largest values over a window of ``seconds``."""
        self.seconds = seconds
        self._largest = np.zeros(seconds + 1, np.int64)
        self._second = np.full(seconds + 1, -1, np.int64)

    def add(self, time_ns: Ints, value: Ints) -> None:
        """Take values by the time they are dated."""
        second = time_ns // SECOND_NS
        for one in np.unique(second):
            place = int(one) % len(self._second)
            if self._second[place] > one:
                continue
            largest = int(value[second == one].max())
            if self._second[place] == one:
                largest = max(largest, int(self._largest[place]))
            self._second[place], self._largest[place] = one, largest

    def largest(self, now_ns: int) -> int:
        """Return the largest value of the window that ends now, 0 where it is empty."""
        return int(self._largest[_inside(self._second, now_ns, self.seconds)].max(initial=0))

    def by_second(self, now_ns: int) -> Ints:
        """Return the largest value by second, oldest first, shape (seconds + 1,)."""
        return _by_second(self._second, self._largest, now_ns)


def _inside(second: Ints, now_ns: int, seconds: int) -> npt.NDArray[np.bool_]:
    return second >= max(now_ns // SECOND_NS - seconds, 0)


def _by_second(second: Ints, values: Ints, now_ns: int) -> Ints:
    last = now_ns // SECOND_NS
    wanted = np.arange(last - len(second) + 1, last + 1)
    place = wanted % len(second)
    return np.where((second[place] == wanted) & (wanted >= 0), values[place], 0)
