"""Windows and quantiles of the live view against numpy on the same values."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stallscope.tracer.live.sliding import (
    BUCKETS,
    SECOND_NS,
    SUB_BUCKETS_LOG2,
    SlidingCounts,
    SlidingMax,
    bucket_end,
    bucket_of,
    quantile,
)

durations = st.lists(
    st.one_of(st.integers(0, 200), st.integers(0, 10**7), st.integers(0, 2**44 - 1)), min_size=1, max_size=300
)
shares = st.sampled_from([0.001, 0.01, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0])


def ints(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, np.int64)


class TestBuckets:
    def test_follow_each_other_without_gap_or_overlap(self) -> None:
        ends = [bucket_end(bucket) for bucket in range(BUCKETS)]
        assert ends == sorted(set(ends))
        assert bucket_of(ints(ends)).tolist() == list(range(BUCKETS))
        assert bucket_of(ints([0, *(end + 1 for end in ends[:-1])])).tolist() == list(range(BUCKETS))
        assert ends[-1] == 2**44 - 1

    @given(st.integers(0, 2**44 - 1))
    def test_are_no_wider_than_a_32nd_of_what_is_in_them(self, value: int) -> None:
        end = bucket_end(int(bucket_of(ints([value]))[0]))
        assert value <= end <= value + (value >> SUB_BUCKETS_LOG2)

    def test_below_64_are_exact_and_the_last_takes_what_is_longer(self) -> None:
        assert bucket_of(ints(list(range(64)))).tolist() == list(range(64))
        assert bucket_of(ints([2**44, 2**61])).tolist() == [BUCKETS - 1] * 2


class TestQuantile:
    @given(durations, shares)
    def test_is_that_of_numpy_at_most_a_32nd_higher(self, values: list[int], share: float) -> None:
        found = quantile(np.bincount(bucket_of(ints(values)), minlength=BUCKETS), share)
        truth = int(np.quantile(ints(values), share, method="inverted_cdf"))
        assert found is not None
        assert truth <= found <= truth + (truth >> SUB_BUCKETS_LOG2)

    @given(durations, st.integers(0, 300), shares)
    def test_counts_those_too_short_to_be_seen(self, values: list[int], short: int, share: float) -> None:
        found = quantile(np.bincount(bucket_of(ints(values)), minlength=BUCKETS), share, below=short)
        truth = int(np.quantile(ints([-1] * short + values), share, method="inverted_cdf"))
        assert (found is None) == (truth == -1)
        if found is not None:
            assert truth <= found <= truth + (truth >> SUB_BUCKETS_LOG2)

    def test_of_nothing_is_none(self) -> None:
        assert quantile(np.zeros(BUCKETS, np.int64), 0.5) is None
        assert quantile(np.zeros(BUCKETS, np.int64), 0.5, below=7) is None

    def test_the_99th_of_a_hundred_is_not_the_largest(self) -> None:
        counts = np.zeros(BUCKETS, np.int64)
        counts[3], counts[50] = 99, 1
        assert quantile(counts, 0.99) == 3
        assert quantile(counts, 1.0) == 50


batches = st.lists(
    st.lists(st.tuples(st.integers(0, 3 * SECOND_NS), st.integers(0, 9)), min_size=1, max_size=20), max_size=15
)


class TestSliding:
    @given(batches, st.integers(1, 6))
    def test_counts_and_maxima_are_those_of_the_window_and_of_each_second(
        self, steps: list[list[tuple[int, int]]], seconds: int
    ) -> None:
        """Batches come in order, their rows up to three seconds apart, as spans end while others wait to be read."""
        counts, longest = SlidingCounts(seconds, 10), SlidingMax(seconds)
        seen: list[tuple[int, int]] = []
        now_ns = 0
        for number, step in enumerate(steps):
            rows = [(number * SECOND_NS + time_ns, value) for time_ns, value in step]
            rows.sort()
            times, values = ints([time for time, _ in rows]), ints([value for _, value in rows])
            counts.add(times, values)
            longest.add(times, values)
            seen += rows
            now_ns = max(now_ns, int(times.max()))
        # what fell out of the ring while it was added: a second whose place a later one had taken
        last = now_ns // SECOND_NS
        inside = [(time, value) for time, value in seen if time // SECOND_NS >= last - seconds]
        assert counts.total(now_ns).tolist() == np.bincount([v for _, v in inside], minlength=10).tolist()
        assert longest.largest(now_ns) == max((value for _, value in inside), default=0)
        by_second = [[v for t, v in inside if t // SECOND_NS == one] for one in range(last - seconds, last + 1)]
        assert counts.by_second(now_ns, 3).tolist() == [values.count(3) for values in by_second]
        assert longest.by_second(now_ns).tolist() == [max(values, default=0) for values in by_second]

    def test_what_is_old_is_gone_without_anything_new(self) -> None:
        counts, longest = SlidingCounts(2, 1), SlidingMax(2)
        counts.add(ints([5 * SECOND_NS]), ints([0]), ints([7]))
        longest.add(ints([5 * SECOND_NS]), ints([7]))
        for later_s, left in ((0, 7), (2, 7), (3, 0), (100, 0)):
            now_ns = (5 + later_s) * SECOND_NS
            assert (counts.total(now_ns).tolist(), longest.largest(now_ns)) == ([left], left)

    def test_what_comes_too_late_is_left_out(self) -> None:
        counts, longest = SlidingCounts(2, 1), SlidingMax(2)
        for time_s in (9, 6, 3):
            counts.add(ints([time_s * SECOND_NS]), ints([0]))
            longest.add(ints([time_s * SECOND_NS]), ints([time_s]))
        assert counts.total(9 * SECOND_NS).tolist() == [1]
        assert longest.by_second(9 * SECOND_NS).tolist() == [0, 0, 9]
