"""When an event loop stands still, judged from looks at its thread now and then. Pure: nothing here reads /proc.

A look tells two things: whether the thread waits for events, and whether it has read or written anything since
the look before. Either is progress. An event loop that shows none for as long as the stall threshold is in a
stall: one call keeps it busy, or it sleeps in one, or it gets no CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LATE = 3
"""A look that comes this many intervals after the one before says little about the time in between."""


@dataclass(frozen=True)
class Span:
    """A stretch of time, CLOCK_MONOTONIC ns."""

    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        """Return how long it is."""
        return self.end_ns - self.start_ns


class Standstill:
    """The state of one event loop between looks.

    The stall's start is the last moment at which the loop is known not to have been in it yet, its end the first at
    which it is known to be over: each is off by one interval at most and both in the same direction, so that no
    stall that reaches the threshold is missed, and one that is reported may be short of it by two intervals.
    """

    def __init__(self, threshold_ns: int, interval_ns: int) -> None:
        """Begin with the first look.

        Args:
            threshold_ns: a standstill as long as this is a stall.
            interval_ns: usual time between looks; less while ``is_suspect`` is fine.
        """
        self._threshold_ns = threshold_ns
        self.interval_ns = interval_ns
        self._last_ns = 0
        self._start_ns = 0
        self._still_ns = 0

    @property
    def since_ns(self) -> int:
        """Return when the stall that is in progress began, 0 when there is none (yet)."""
        return self._start_ns if self._lasts(self._threshold_ns) else 0

    @property
    def is_suspect(self) -> bool:
        """Return whether half a stall has passed: more looks from now on tell it from a busy loop that seldom waits."""
        return self._lasts(self._threshold_ns // 2)

    def look(self, now_ns: int, *, waits: bool, moved: bool, stayed: bool = False) -> Span | None:
        """Take in one look; returns the stall that it shows to be over, if there was one.

        Args:
            now_ns: when it was taken.
            waits: the thread was waiting for events.
            moved: it has read or written something since the look before.
            stayed: it is known not to have gone to sleep since then, so that it has not waited for events either.
        """
        last_ns, self._last_ns = self._last_ns or now_ns, now_ns
        self._start_ns = self._start_ns or now_ns  # a loop that is met in the midst of a stall
        if not waits and not moved:
            if now_ns - last_ns > LATE * self.interval_ns and not stayed and not self.is_suspect:
                # in the time not looked at it may have waited: only what was seen counts
                self._start_ns = now_ns - self.interval_ns
            self._still_ns = now_ns
            return None
        ended = None
        if self._still_ns:
            span = Span(self._start_ns, min(now_ns, self._still_ns + self.interval_ns))
            ended = span if span.duration_ns >= self._threshold_ns else None
        self._still_ns = 0
        self._start_ns = now_ns if waits else max(last_ns, now_ns - self.interval_ns)
        return ended

    def _lasts(self, duration_ns: int) -> bool:
        return bool(self._still_ns) and self._still_ns - self._start_ns >= duration_ns


def longest_iteration(standstill: Span, crons: Sequence[int]) -> Span:
    """Return the longest stretch of a standstill that may be one iteration.

    An iteration runs serverCron once at most. So a loop that turns without any reading and writing, and was never met
    waiting, is told from one that stands still.

    Args:
        standstill: what the looks showed.
        crons: when serverCron was entered, ascending.
    """
    within = [entered for entered in crons if standstill.start_ns < entered < standstill.end_ns]
    bounds = [standstill.start_ns, *within, standstill.end_ns]
    if len(within) < 2:
        return standstill
    return max((Span(*pair) for pair in zip(bounds, bounds[2:], strict=False)), key=lambda span: span.duration_ns)


def late_iteration(before: Span, cron: Span, period_ns: int) -> Span:
    """Return the stretch in which one iteration kept serverCron waiting, and serverCron's own time in it.

    The loop calls it in the first iteration that ends after it was due. So from the moment it was due until it
    returns is one iteration, whatever was read and written meanwhile.

    Args:
        before: serverCron's call before; cron: this one.
        period_ns: after how long it asked to be called again.
    """
    return Span(min(before.end_ns + period_ns, cron.start_ns), cron.end_ns)


def merged(spans: Sequence[Span], tolerance_ns: int) -> list[Span]:
    """Return the spans in order, those joined that share more than ``tolerance_ns``.

    Each lies in one iteration, but for the inexactness of its ends: so two that overlap by more are of the same one.
    """
    joined: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start_ns):
        if joined and min(joined[-1].end_ns, span.end_ns) - span.start_ns > tolerance_ns:
            joined[-1] = Span(joined[-1].start_ns, max(joined[-1].end_ns, span.end_ns))
        else:
            joined.append(span)
    return joined
