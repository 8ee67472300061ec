"""The thread that writes one capture: whatever the disk does, the watching loop never waits for it."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallscope.tracer.errors import StallscopeError
from stallscope.tracer.layout import EVENT_BYTES, mark_unfinished
from stallscope.tracer.manifest import Counters, Manifest, Note, TriggerInfo
from stallscope.tracer.recording import RecordingWriter, joined_events
from stallscope.tracer.stack_table import StackTable
from stallscope.tracer.units import format_count
from stallscope.tracer.watch.folder import CaptureFolder, Place
from stallscope.tracer.watch.priority import run_normally

_WRITE_ROWS = 32_768
"""Rows are written in batches of about so many."""


@dataclass(frozen=True)
class Finished:
    """A capture that has ended.

    Attributes:
        path: the recording, None where nothing could be kept; complete: with its end, under its own name.
        triggers: what made it; started_ns, ended_ns: CLOCK_MONOTONIC.
        rows, size_bytes: of the file; unwritten: events the disk was too slow for.
        error: why it is not complete, in one line; "" otherwise.
    """

    path: Path | None
    complete: bool
    triggers: tuple[TriggerInfo, ...]
    started_ns: int
    ended_ns: int
    rows: int
    size_bytes: int
    unwritten: int = 0
    error: str = ""


class CaptureWriter(threading.Thread):
    """Writes one capture; whatever the disk does, callers never wait.

    Attributes:
        result: set once, when it is done.
        is_stuck: nothing more of this capture will be written.
    """

    def __init__(
        self, folder: CaptureFolder, place: Place, manifest: Manifest, max_bytes: int, stacks: StackTable | None
    ) -> None:
        super().__init__(name="capture writer", daemon=True)
        self.result: Finished | None = None
        self.is_stuck = False
        self._folder = folder
        self._place = place
        self._manifest = manifest
        self._max_bytes = max_bytes
        self._stacks = stacks
        self._condition = threading.Condition()
        self._waiting: deque[_Item] = deque()
        self._waiting_bytes = 0
        self._unwritten: dict[int, int] = {}
        self._cut_by = ""
        self._rows: dict[int, int] = {}
        self._size_bytes = 0

    def put(self, events: npt.NDArray[np.void]) -> None:
        """Have events written; when too much waits already, they are counted instead."""
        if not len(events):
            return
        size = len(events) * EVENT_BYTES
        with self._condition:
            if self.is_stuck or self._waiting_bytes + size > self._max_bytes + EVENT_BYTES * _WRITE_ROWS:
                for probe, count in zip(*np.unique(events["probe"], return_counts=True), strict=True):
                    self._unwritten[int(probe)] = self._unwritten.get(int(probe), 0) + int(count)
                return
            self._waiting.append(_Item(events))
            self._waiting_bytes += size
            self._condition.notify()

    def put_side(self, counters: Counters, manifest: Manifest | None) -> None:
        """Have a snapshot of the counters written behind the events so far."""
        with self._condition:
            if not self.is_stuck:
                self._waiting.append(_Item(None, counters, manifest))
                self._condition.notify()

    def finish(self, counters: Counters, manifest: Manifest) -> None:
        """Have the end written."""
        with self._condition:
            self._waiting.append(_Item(None, counters, manifest, last=True))
            self._condition.notify()

    def cut(self, reason: str) -> None:
        """End without an end."""
        with self._condition:
            self._cut_by = reason
            self._condition.notify()

    def run(self) -> None:
        """Write until the end, then give the file its name."""
        run_normally()
        error = ""
        final = self._manifest
        try:
            if not self._folder.make_room(self._place, 0):
                raise StallscopeError("--max-disk leaves no room for a capture")
            with RecordingWriter(self._place.temporary, self._manifest, self._stacks) as writer:
                final = self._write_all(writer)
            path: Path | None = self._folder.publish(self._place)
        except StallscopeError as reason:
            error = str(reason)
            self.is_stuck = True
            path = self._folder.publish_cut_short(self._place)
        with self._condition:
            self.is_stuck = True
            last = next((item for item in self._waiting if item.last and item.manifest), None)
            self._waiting.clear()
        final = last.manifest if last is not None and last.manifest is not None else final
        try:
            size = path.stat().st_size if path is not None else 0
        except OSError:
            size = 0
        self.result = Finished(
            path, not error, final.triggers, final.started_ns, final.ended_ns, sum(self._rows.values()), size,
            sum(self._unwritten.values()), error,
        )  # fmt: skip

    def _write_all(self, writer: RecordingWriter) -> Manifest:
        while True:
            events, item = self._next()
            if not self._folder.make_room(self._place, self._size_bytes + len(events) * EVENT_BYTES):
                raise StallscopeError("the capture alone reached --max-disk")
            counted = np.unique(events["probe"][~mark_unfinished(events["duration_ns"])], return_counts=True)
            for probe, count in zip(*counted, strict=True):
                self._rows[int(probe)] = self._rows.get(int(probe), 0) + int(count)
            self._size_bytes += len(events) * EVENT_BYTES
            if item.manifest is not None:
                self._manifest = item.manifest
            if not item.last:
                writer.write(events, item.counters, item.manifest)
                continue
            assert item.counters is not None
            assert item.manifest is not None
            manifest = self._with_unwritten(item.manifest)
            writer.finish(events, self._exact(item.counters), manifest)
            return manifest

    def _next(self) -> tuple[npt.NDArray[np.void], _Item]:
        """Return the events up to the next snapshot, or many enough, and the snapshot or an empty item."""
        parts: list[npt.NDArray[np.void]] = []
        rows = 0
        with self._condition:
            while True:
                while not self._waiting and not self._cut_by:
                    self._condition.wait()
                if not self._waiting:
                    raise StallscopeError(self._cut_by)
                item = self._waiting.popleft()
                if item.events is None:
                    return joined_events(parts), item
                self._waiting_bytes -= len(item.events) * EVENT_BYTES
                parts.append(item.events)
                rows += len(item.events)
                if rows >= _WRITE_ROWS:
                    return joined_events(parts), _Item(None)

    def _exact(self, counters: Counters) -> Counters:
        """Return the counters for exactly the rows of this file: events that were sent and are not in it are lost."""
        by_probe = {}
        for probe in counters.by_probe.keys() | self._rows.keys():
            known = counters.by_probe.get(probe)
            rows = self._rows.get(probe, 0)
            if known is None:
                continue  # sampled: the kernel counts nothing there
            lost = known.lost + self._unwritten.get(probe, 0)
            hits = rows + known.short_calls + lost + known.lost_starts + known.thinned
            by_probe[probe] = replace(known, sent=rows, lost=lost, hits=hits)
        return Counters(counters.time_ns, by_probe)

    def _with_unwritten(self, manifest: Manifest) -> Manifest:
        count = sum(self._unwritten.values())
        if not count:
            return manifest
        text = f"{format_count(count, 'event')} not written: the disk was too slow; they are counted as lost"
        return replace(manifest, notes=(*manifest.notes, Note(manifest.ended_ns, text)))


@dataclass(frozen=True)
class _Item:
    """What waits to be written: events, or what stands behind them."""

    events: npt.NDArray[np.void] | None
    counters: Counters | None = None
    manifest: Manifest | None = None
    last: bool = False
