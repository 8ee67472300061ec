"""The pre-roll: what happened in the last seconds, in memory, within a bound.

Events lie in chunks. Between two chunks is a :class:`Boundary`, taken right before the ring buffers were read for the
chunk that ends there, so that a capture which begins there has exact totals of its own. A chunk ends every half second
or so; what is taken is always whole chunks. The oldest go first: silently when they are older than asked for, counted
when the memory bound drove them out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.tracer.boundary import Boundary
from stallscope.tracer.last_samples import LastSamples
from stallscope.tracer.layout import EVENT_BYTES
from stallscope.tracer.manifest import Manifest
from stallscope.tracer.recording import empty_events, joined_events

_PART_BYTES = 200
_COUNTERS_BYTES = 800
"""What Python itself takes for an array, and for one probe's counters: counted with the events."""

_REMEMBERED_DROPS = 256


@dataclass(frozen=True)
class Chunk:
    """The events between two boundaries.

    Attributes:
        begin, end: the boundaries; end is None of the chunk that is not over yet.
        events: dtype ``EVENT``, shape (n,), in the order in which they were read.
        samples: of everything that is sampled, the last row before ``begin``.
        dropped: events missing at its start, because the memory was not enough for this chunk alone.
    """

    begin: Boundary
    end: Boundary | None
    events: npt.NDArray[np.void]
    samples: npt.NDArray[np.void]
    dropped: int = 0


@dataclass(frozen=True)
class Lookback:
    """What was kept of a time.

    Attributes:
        chunks: oldest first; the last one is not over yet.
        missing_ns: how much of the wanted time is not here, at its start.
        dropped: how many events of that time the memory bound drove out.
    """

    chunks: tuple[Chunk, ...]
    missing_ns: int = 0
    dropped: int = 0


class Preroll:
    """The newest chunks of events.

    Attributes:
        dropped: events that the memory bound drove out since the start; expired: those that were old enough.
    """

    def __init__(self, keep_ns: int, max_bytes: int, begin: Boundary) -> None:
        """Start with an empty chunk.

        Args:
            keep_ns: how far back ``take`` will ask, ns.
            max_bytes: bound of all memory held.
        """
        self.keep_ns = keep_ns
        self.max_bytes = max_bytes
        self.dropped = 0
        self.expired = 0
        self._began_ns = begin.time_ns
        self._begin = begin
        self._chunks: deque[Chunk] = deque()
        self._closed_bytes = 0
        self._open: deque[npt.NDArray[np.void]] = deque()
        self._open_bytes = 0
        self._open_dropped = 0
        self._samples = LastSamples()
        self._samples_now = empty_events()
        self._drops: deque[tuple[int, int]] = deque(maxlen=_REMEMBERED_DROPS)

    @property
    def bytes(self) -> int:
        """Return how much memory is held."""
        return self._closed_bytes + self._open_bytes

    @property
    def is_filling(self) -> bool:
        """Return whether the open chunk takes a quarter of the memory, and should be closed before its time."""
        return self._open_bytes * 4 > self.max_bytes

    @property
    def newest(self) -> Boundary:
        """Return the last boundary."""
        return self._begin

    def follow(self, manifest: Manifest) -> None:
        """Learn which probes are samples, and of what; to be called again whenever the probe list has grown."""
        self._samples.follow(manifest)

    def add(self, events: npt.NDArray[np.void]) -> None:
        """Append events (dtype ``EVENT``, shape (n,)) to the open chunk; they must not be changed afterwards."""
        if not len(events):
            return
        room = (self.max_bytes - _PART_BYTES) // EVENT_BYTES
        if len(events) > room:
            self._count_dropped(self._begin.time_ns, len(events) - room)
            self._open_dropped += len(events) - room
            events = events[len(events) - room :].copy()
        self._open.append(events)
        self._open_bytes += _size(events)
        self._shrink()

    def close_chunk(self, boundary: Boundary) -> Chunk:
        """End the open chunk, begin the next one, and let go of what is older than asked for."""
        events = joined_events(self._open)
        chunk = Chunk(self._begin, boundary, events, self._samples_now, self._open_dropped)
        self._open.clear()
        self._open_bytes = self._open_dropped = 0
        self._chunks.append(chunk)
        self._closed_bytes += _chunk_size(chunk)
        self._begin = boundary
        self._samples.add(events, boundary.time_ns)
        self._samples_now = self._samples.rows()
        while self._chunks and _end_ns(self._chunks[0]) < boundary.time_ns - self.keep_ns:
            self.expired += len(self._pop().events)
        self._shrink()
        return chunk

    def take(self, since_ns: int) -> Lookback:
        """Return all chunks that reach into the time from ``since_ns`` (CLOCK_MONOTONIC) until now, the open one last.

        So all events that ended in this time are in them, and some that ended up to one chunk earlier.
        """
        kept = [chunk for chunk in self._chunks if _end_ns(chunk) > since_ns]
        kept.append(Chunk(self._begin, None, joined_events(self._open), self._samples_now, self._open_dropped))
        first_ns = kept[0].begin.time_ns
        return Lookback(
            tuple(kept),
            missing_ns=max(first_ns - max(since_ns, self._began_ns), 0),
            dropped=sum(count for end_ns, count in self._drops if end_ns >= since_ns),
        )

    def _shrink(self) -> None:
        while self._chunks and self.bytes > self.max_bytes:
            chunk = self._pop()
            if len(chunk.events):
                self._count_dropped(_end_ns(chunk), len(chunk.events))
        while self._open and self.bytes > self.max_bytes:
            events = self._open.popleft()
            self._open_bytes -= _size(events)
            self._open_dropped += len(events)
            self._count_dropped(self._begin.time_ns, len(events))

    def _count_dropped(self, end_ns: int, count: int) -> None:
        self.dropped += count
        if self._drops and self._drops[-1][0] == end_ns:
            count += self._drops.pop()[1]
        self._drops.append((end_ns, count))

    def _pop(self) -> Chunk:
        chunk = self._chunks.popleft()
        self._closed_bytes -= _chunk_size(chunk)
        return chunk


def _size(events: npt.NDArray[np.void]) -> int:
    return len(events) * EVENT_BYTES + _PART_BYTES


def _chunk_size(chunk: Chunk) -> int:
    return _size(chunk.events) + _size(chunk.samples) + _COUNTERS_BYTES * (1 + len(chunk.begin.counters))


def _end_ns(chunk: Chunk) -> int:
    return chunk.end.time_ns if chunk.end is not None else chunk.begin.time_ns
