"""A part of a session as a recording of its own, complete: with its own start, counters, rows and footer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallscope.tracer.boundary import gained
from stallscope.tracer.capture.probe_ids import COUNTER_PROBE, FIRST_CALL_PROBE, MAX_PROBES
from stallscope.tracer.capture.row_counts import first_of_each_probe, identity
from stallscope.tracer.capture.session import Mark, Session
from stallscope.tracer.errors import StallscopeError
from stallscope.tracer.layout import EVENT
from stallscope.tracer.manifest import Counters, ProbeCounters
from stallscope.tracer.recording import RecordingWriter, joined_events

FLUSH_NS = 500_000_000
FLUSH_ROWS = 32_768
PARTIAL = ".partial"

_NOTHING: npt.NDArray[np.void] = np.zeros(0, EVENT)


class Excerpt:
    """What happens in a session from now on, until it is ended; what began before is left out.

    A span that was under way at the start is treated as a recorder treats one from before its attach: it has no
    row, and its return counts as unpaired. So for every function the hits are the rows, the short calls, the lost
    ones and those under way at the end.

    The file has another name (``PARTIAL`` added) until it is complete.
    """

    def __init__(self, session: Session, path: Path, start: Mark, last_samples: npt.NDArray[np.void]) -> None:
        """Create the file.

        Args:
            start: a mark made just now. Records that were sent before it, and come only now, are left out.
            last_samples: the last sample of each accept queue and kernel counter: they hold at the start too.

        Raises:
            StallscopeError: the file cannot be created.
        """
        self.path = path
        self.end: Mark | None = None
        self._session = session
        self._start = start
        self._manifest = session.part(start)
        self._partial = path.with_name(path.name + PARTIAL)
        self._writer = RecordingWriter(self._partial, self._manifest)
        self._pending = [self._opening(last_samples)]
        self._skipped = start.awaited.copy()
        self._awaited = np.zeros(MAX_PROBES, np.int64)
        self._straddling = np.zeros(MAX_PROBES, np.int64)
        self._came_back: set[tuple[int, int, int]] = set()
        self._next_flush_ns = start.time_ns + FLUSH_NS

    @property
    def started_ns(self) -> int:
        """When it began, CLOCK_MONOTONIC."""
        return self._start.time_ns

    @property
    def rows(self) -> int:
        """Return how many rows it holds."""
        return self._writer.rows + sum(map(len, self._pending))

    def add(self, rows: npt.NDArray[np.void]) -> bool:
        """Take rows of the session (dtype ``EVENT``) in their order; returns whether it has everything.

        That is so once it was ended and every record is here that was sent until then.

        Raises:
            StallscopeError: the disk is full or the file cannot be written.
        """
        if self._skipped.any():
            rows = rows[~first_of_each_probe(rows, self._skipped)]
        if self.end is not None:
            rows = rows[first_of_each_probe(rows, self._awaited)]
        inside = rows[rows["start_ns"] >= self._start.time_ns]
        if len(inside) < len(rows):
            straddling = rows[rows["start_ns"] < self._start.time_ns]
            self._straddling += np.bincount(straddling["probe"], minlength=MAX_PROBES)
            self._came_back |= {identity(row) for row in straddling}
        if len(inside):
            self._pending.append(inside)
        return self.end is not None and not self._awaited.any()

    def is_due(self, now_ns: int) -> bool:
        """Return whether it is time to write what is pending."""
        return now_ns >= self._next_flush_ns or sum(map(len, self._pending)) >= FLUSH_ROWS

    def write(self, now_ns: int, counters: dict[int, ProbeCounters]) -> None:
        """Write what is pending, and the session's counters as they are now.

        Raises:
            StallscopeError: the disk is full or the file cannot be written.
        """
        self._next_flush_ns = now_ns + FLUSH_NS
        manifest = self._session.part(self._start)
        self._writer.write(
            joined_events(self._pending),
            Counters(now_ns, gained(self._start.counters, counters)),
            None if manifest == self._manifest else manifest,
        )
        self._pending.clear()
        self._manifest = manifest

    def stop(self, end: Mark) -> None:
        """End it at a mark made just now; the records up to it are still to be added."""
        self.end = end
        self._awaited = end.awaited - self._skipped
        self._pending.append(end.sampled)

    def finish(self, ended_by: str) -> Path:
        """Write the footer and give the file its name.

        Raises:
            StallscopeError: the disk is full or the file cannot be written; the partial file stays.
        """
        assert self.end is not None
        counters, unfinished = self._totals(self.end)
        manifest = replace(self._session.part(self._start, self.end, counters), ended_by=ended_by)
        rows = joined_events([*self._pending, unfinished])
        self._writer.finish(rows, Counters(manifest.ended_ns, counters), manifest)
        try:
            self._partial.rename(self.path)
        except OSError as error:
            raise StallscopeError(f"cannot rename {self._partial} to {self.path}: {error.strerror}") from error
        return self.path

    def abandon(self) -> None:
        """Close the file as it is: readable, and cut short."""
        self._writer.abandon()

    def _opening(self, last_samples: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """Return the samples that hold at the start, with the kernel's counters as they were read for it."""
        opening = last_samples.copy()
        opening["start_ns"] = self._start.time_ns
        kernel = {info.index: self._start.moment.kernel[info.inode] for info in self._manifest.namespaces}
        for place in np.flatnonzero(opening["probe"] == COUNTER_PROBE):
            counter, _, namespace = (int(value) for value in opening["value"][place])
            opening["value"][place, 1] = kernel[namespace][self._manifest.counter_names[counter]]
        return opening

    def _totals(self, end: Mark) -> tuple[dict[int, ProbeCounters], npt.NDArray[np.void]]:
        """Return what was counted from start to end, and the spans that began in it and had not ended."""
        counters = gained(self._start.counters, end.counters)
        for probe in np.flatnonzero(self._straddling).tolist():
            counters[probe] = _without_straddling(counters[probe], probe, int(self._straddling[probe]))
        still = {identity(row) for row in end.unfinished}
        for row in self._start.unfinished:
            probe = int(row["probe"])
            counter = counters.get(probe)
            if probe < FIRST_CALL_PROBE or counter is None or not counter.short_calls:
                continue  # an iteration or an accept is counted when it ends
            if identity(row) not in still | self._came_back:
                counters[probe] = replace(counter, short_calls=counter.short_calls - 1, unpaired=counter.unpaired + 1)
        return counters, end.unfinished[end.unfinished["start_ns"] >= self._start.time_ns]


def _without_straddling(counter: ProbeCounters, probe: int, count: int) -> ProbeCounters:
    """Return the counters without spans that were sent in the excerpt and had begun before it."""
    if probe >= FIRST_CALL_PROBE:  # a call was counted when it was entered, before
        return replace(counter, sent=counter.sent - count, unpaired=counter.unpaired + count)
    return replace(counter, sent=counter.sent - count, hits=counter.hits - count)
