"""The calls of one function in the window, and since the start."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stallscope.tracer.live.sliding import BUCKETS, SlidingCounts, SlidingMax, bucket_of, quantile
from stallscope.tracer.live.view import FunctionView
from stallscope.tracer.manifest import ProbeCounters


class FunctionWindow:
    """One function: the lengths of its calls by second, 110 kB whatever comes."""

    def __init__(self, name: str, seconds: int) -> None:
        """Keep a window of so many seconds."""
        self.name = name
        self._lengths = SlidingCounts(seconds, BUCKETS)
        self._time = SlidingCounts(seconds, 1)
        self._longest = SlidingMax(seconds)
        self._max_ns: int | None = None
        self._total_ns = 0

    def add(self, start_ns: npt.NDArray[np.int64], duration_ns: npt.NDArray[np.int64]) -> None:
        """Take calls that have returned; a call belongs to the second in which it did."""
        end_ns = start_ns + duration_ns
        self._lengths.add(end_ns, bucket_of(duration_ns))
        self._time.add(end_ns, np.zeros(len(end_ns), np.int64), duration_ns)
        self._longest.add(end_ns, duration_ns)
        self._max_ns = max(self._max_ns or 0, int(duration_ns.max()))
        self._total_ns += int(duration_ns.sum())

    def view(
        self, now_ns: int, now: ProbeCounters, before: ProbeCounters, at_window: ProbeCounters, interval_ns: int
    ) -> FunctionView:
        """Return what the function looks like now.

        Args:
            now, before, at_window: its counters now, one record ago and when the window began.
        """
        lengths = self._lengths.total(now_ns)
        short = now.short_calls - at_window.short_calls
        longest = self._longest.largest(now_ns) if lengths.any() else None

        def at(share: float) -> int | None:
            value = quantile(lengths, share, below=short)
            return value if value is None or longest is None else min(value, longest)

        calls = now.hits - before.hits
        return FunctionView(
            name=self.name,
            calls=now.hits,
            calls_in_interval=calls,
            rate_per_s=calls * 1e9 / interval_ns,
            p50_ns=at(0.5),
            p99_ns=at(0.99),
            window_max_ns=longest,
            max_ns=self._max_ns,
            window_total_ns=int(self._time.total(now_ns)[0]) + now.short_ns - at_window.short_ns,
            total_ns=self._total_ns + now.short_ns,
            lost=now.missing,
        )
