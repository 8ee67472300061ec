"""Accept queues and refused connections, from the samples of them."""

from __future__ import annotations

from collections import deque

import numpy as np

from stallscope.tracer.live.sliding import SECOND_NS, SlidingCounts, SlidingMax
from stallscope.tracer.live.view import ListenerView
from stallscope.tracer.manifest import ListenerInfo

_KEPT_SAMPLES = 20_000
_SILENT_NS = 5 * SECOND_NS
"""An unchanged queue is sampled again once a second: one that is silent for so long was closed."""


class QueueWindow:
    """The queue of one listener."""

    def __init__(self, info: ListenerInfo, window_s: int, history_s: int) -> None:
        """Keep the longest length by second, and a window and a longer history of them."""
        self.info = info
        self._longest = SlidingMax(history_s)
        self._window_s = window_s
        self._samples: deque[tuple[int, int]] = deque(maxlen=_KEPT_SAMPLES)
        self.limit = info.limit

    def add(self, time_ns: int, length: int, limit: int) -> None:
        """Take a sample: the length stays until the next one."""
        self._samples.append((time_ns, length))
        self._longest.add(np.array([time_ns]), np.array([length]))
        self.limit = limit

    def is_open(self, now_ns: int) -> bool:
        """Return whether the listener was seen lately."""
        return bool(self._samples) and now_ns - self._samples[-1][0] < _SILENT_NS

    def longest_between(self, start_ns: int, end_ns: int) -> int | None:
        """Return the greatest length from one moment to another, None where nothing was sampled."""
        longest: int | None = None
        for time_ns, length in reversed(self._samples):
            if time_ns > end_ns:
                continue
            longest = max(longest or 0, length)
            if time_ns <= start_ns:
                break
        return longest

    def view(self, now_ns: int) -> ListenerView:
        """Return what the queue looks like now."""
        history = self._longest.by_second(now_ns)
        return ListenerView(
            address=self.info.address,
            pid=self.info.pid,
            queue_length=self._samples[-1][1],
            queue_limit=self.limit,
            window_max=int(history[-self._window_s - 1 :].max()),
            history=tuple(history.tolist()),
        )


class OverflowWindow:
    """ListenOverflows of the namespaces watched, from samples of the kernel's counter."""

    def __init__(self, history_s: int) -> None:
        self.total = 0
        self._by_second = SlidingCounts(history_s, 1)
        self._last: dict[int, int] = {}
        self._events: deque[tuple[int, int]] = deque(maxlen=_KEPT_SAMPLES)

    def start(self, namespace: int, count: int) -> None:
        """Take the counter's value at the start; what is known already stays."""
        self._last.setdefault(namespace, count)

    def add(self, time_ns: int, namespace: int, count: int) -> None:
        """Take a sample of the counter."""
        grown = count - self._last.get(namespace, count)
        self._last[namespace] = count
        if grown > 0:
            self.total += grown
            self._events.append((time_ns, grown))
            self._by_second.add(np.array([time_ns]), np.zeros(1, np.int64), np.array([grown]))

    def between(self, start_ns: int, end_ns: int) -> int:
        """Return how many were seen after one moment, up to another."""
        count = 0
        for time_ns, grown in reversed(self._events):
            if time_ns <= start_ns:
                break
            count += grown if time_ns <= end_ns else 0
        return count

    def by_second(self, now_ns: int) -> tuple[int, ...]:
        """Return them by second, oldest first."""
        return tuple(self._by_second.by_second(now_ns).tolist())
