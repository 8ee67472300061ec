"""Captures: from a trigger to a complete recording with its pre-roll and post-roll.

One capture is under way at a time. It begins ``before`` the first trigger, is extended by every further trigger and
for as long as a condition holds, and ends ``after`` the last moment of those, or when it reaches its greatest
length. A thread of its own writes it: the watching loop never waits for a disk. The loop calls, in this order::

    captures.add(events)                          # what was read, always: it goes into the pre-roll as well
    captures.close_chunk(boundary, manifest)      # twice a second
    captures.fire(firings, held_ns, now_ns, wall_ns, manifest)
    if captures.is_due(now_ns):
        captures.finish(boundary, unfinished, manifest)
    for capture in captures.take_finished(): ...  # what the thread has put under its name, or why not
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallscope.tracer.errors import StallscopeError
from stallscope.tracer.layout import EVENT_BYTES, mark_unfinished
from stallscope.tracer.manifest import (
    ITERATION,
    Counters,
    DetailInfo,
    Manifest,
    NamespaceInfo,
    Note,
    ProbeCounters,
    TriggerInfo,
)
from stallscope.tracer.recording import RecordingWriter, joined_events
from stallscope.tracer.units import format_count, format_duration_ns
from stallscope.tracer.watch.evaluation import Firing
from stallscope.tracer.watch.folder import CaptureFolder, Place
from stallscope.tracer.watch.preroll import Boundary, ByNamespace, Lookback, Preroll

STARTED, EXTENDED, SUPPRESSED = "started", "extended", "suppressed"

MAX_TRIGGERS = 100
"""So many triggers are listed in one capture; more are counted."""

_MAX_NOTES = 200
_MAX_FINISHED = 64
_MAX_FINISHING = 2
"""While so many captures wait for a disk that does not answer, no other is begun."""

_WRITE_ROWS = 32_768


@dataclass(frozen=True)
class CaptureOptions:
    """How long captures are; all times in ns.

    Attributes:
        before_ns, after_ns: before the first trigger, and after the last moment a trigger was true.
        cooldown_ns: after a capture, triggers are only counted for so long.
        longest_ns: a capture is ended after so long, whatever holds.
        memory_bytes: bound of what waits to be written.
    """

    before_ns: int = 5_000_000_000
    after_ns: int = 10_000_000_000
    cooldown_ns: int = 60_000_000_000
    longest_ns: int = 300_000_000_000
    memory_bytes: int = 64 * 2**20


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


class Captures:
    """The state machine; see the module for the order of calls.

    Attributes:
        started, suppressed: captures begun; triggers that fell into a cool-down.
    """

    def __init__(self, options: CaptureOptions, folder: CaptureFolder, preroll: Preroll) -> None:
        """Begin idle."""
        self.options = options
        self.started = 0
        self.suppressed = 0
        self._folder = folder
        self._preroll = preroll
        self._current: _Capture | None = None
        self._finishing: list[_Writer] = []
        self._finished: deque[Finished] = deque(maxlen=_MAX_FINISHED)
        self._ready_ns = 0
        self._suppressed_before = 0

    @property
    def is_capturing(self) -> bool:
        """Return whether a capture is under way."""
        return self._current is not None

    @property
    def ends_ns(self) -> int:
        """Return when the present capture ends if nothing more happens, 0 if there is none."""
        return self._current.ends_ns if self._current is not None else 0

    def add(self, events: npt.NDArray[np.void]) -> None:
        """Take up events (dtype ``EVENT``, shape (n,)); they must not be changed afterwards."""
        self._preroll.add(events)
        if self._current is not None:
            self._current.add(events)

    def close_chunk(self, boundary: Boundary, manifest: Manifest) -> None:
        """Take up what the kernel has counted until now, and the manifest as it is now."""
        self._preroll.close_chunk(boundary)
        if self._current is not None:
            self._current.close_chunk(boundary, manifest)

    def fire(self, firings: Sequence[Firing], held_ns: int, now_ns: int, wall_ns: int, manifest: Manifest) -> str:
        """Take up triggers that came true, and how long a condition has held.

        Args:
            held_ns: ``TriggerState.held_ns``. wall_ns: now, ns since 1970.
            manifest: as it is now, as of ``record``; its clock offset and start are replaced.

        Returns:
            ``STARTED``, ``EXTENDED`` or ``SUPPRESSED`` (by the cool-down, or by a disk that does not answer); ""
            where nothing came true.
        """
        if self._current is not None:
            self._current.extend(firings, held_ns)
            return EXTENDED if firings else ""
        if not firings:
            return ""
        if now_ns < self._ready_ns or len(self._finishing) >= _MAX_FINISHING:
            self.suppressed += len(firings)
            return SUPPRESSED
        first_ns = min(firing.time_ns for firing in firings)
        lookback = self._preroll.take(first_ns - self.options.before_ns)
        place = self._folder.new_place(wall_ns - (now_ns - first_ns))
        manifest = replace(manifest, wall_offset_ns=wall_ns - now_ns)
        notes = []
        since = self.suppressed - self._suppressed_before
        if since:
            notes.append(f"{format_count(since, 'trigger')} came true in the cool-down before this capture")
        self._suppressed_before = self.suppressed
        self._current = _Capture(self.options, self._folder, place, lookback, manifest, notes)
        self._current.extend(firings, held_ns)
        self.started += 1
        return STARTED

    def is_due(self, now_ns: int) -> bool:
        """Return whether the present capture has to end now."""
        return self._current is not None and (now_ns >= self._current.ends_ns or self._current.writer.is_stuck)

    def finish(
        self, boundary: Boundary, unfinished: npt.NDArray[np.void], manifest: Manifest, ended_by: str = ""
    ) -> None:
        """End the present capture, if there is one; its file gets its name in the background.

        Args:
            boundary: what was counted at its end. unfinished: the spans under way (dtype ``EVENT``).
            manifest: as it is now, with the cost of tracing and the details that were attached.
            ended_by: what ended it, if not its time.
        """
        capture, self._current = self._current, None
        if capture is None:
            return
        capture.finish(boundary, unfinished, manifest, ended_by)
        self._ready_ns = boundary.time_ns + self.options.cooldown_ns
        self._finishing.append(capture.writer)

    def take_finished(self) -> list[Finished]:
        """Return the captures that ended since the last call."""
        for writer in [writer for writer in self._finishing if writer.result is not None]:
            self._finishing.remove(writer)
            assert writer.result is not None
            self._finished.append(writer.result)
        found = list(self._finished)
        self._finished.clear()
        return found

    def close(self, timeout_s: float = 10.0) -> None:
        """Wait for what is being written; a capture that was not finished is kept as cut short."""
        if self._current is not None:
            self._current.writer.cut("the watch ended")
            self._finishing.append(self._current.writer)
            self._current = None
        for writer in self._finishing:
            writer.join(timeout_s)


class _Capture:
    """One capture that is under way."""

    def __init__(
        self,
        options: CaptureOptions,
        folder: CaptureFolder,
        place: Place,
        lookback: Lookback,
        manifest: Manifest,
        notes: Sequence[str],
    ) -> None:
        first = lookback.chunks[0]
        self._options = options
        self._begin = self._latest = first.begin
        self._triggers: list[TriggerInfo] = []
        self._further = 0
        self._last_ns = self._newest_ns = 0
        self._wall_offset_ns = manifest.wall_offset_ns
        self._notes = [Note(first.begin.time_ns, text) for text in notes]
        if lookback.missing_ns:
            text = (
                f"the first {format_duration_ns(lookback.missing_ns)} of the pre-roll are missing: "
                f"--memory held no more ({format_count(lookback.dropped, 'event')} dropped)"
            )
            self._notes.append(Note(first.begin.time_ns, text))
        elif lookback.dropped:
            text = f"{format_count(lookback.dropped, 'event')} of the pre-roll dropped: --memory held no more"
            self._notes.append(Note(first.begin.time_ns, text))
        self.writer = _Writer(folder, place, self._manifest(manifest), options.memory_bytes)
        samples = first.samples.copy()
        samples["start_ns"] = self._begin.time_ns
        self.writer.put(samples)
        for chunk in lookback.chunks:
            self.add(chunk.events)
            if chunk.end is not None:
                self._latest = chunk.end
                self.writer.put_side(self._counters(chunk.end), None)
        self.writer.start()

    @property
    def ends_ns(self) -> int:
        return min(self._last_ns + self._options.after_ns, self._begin.time_ns + self._options.longest_ns)

    def add(self, events: npt.NDArray[np.void]) -> None:
        unfinished = mark_unfinished(events["duration_ns"])
        ends = events["start_ns"] + np.where(unfinished, 0, events["duration_ns"])
        inside = unfinished | (ends >= np.uint64(self._begin.time_ns))
        # a reader takes records that were made while it read
        self._newest_ns = max(self._newest_ns, int(ends.max(initial=0)))
        self.writer.put(events if inside.all() else events[inside])

    def close_chunk(self, boundary: Boundary, manifest: Manifest) -> None:
        self._latest = boundary
        self.writer.put_side(self._counters(boundary), self._manifest(manifest))

    def extend(self, firings: Sequence[Firing], held_ns: int) -> None:
        for firing in firings:
            self._last_ns = max(self._last_ns, firing.time_ns)
            if len(self._triggers) < MAX_TRIGGERS:
                self._triggers.append(_trigger_info(firing))
            else:
                self._further += 1
        self._last_ns = max(self._last_ns, held_ns)

    def finish(self, boundary: Boundary, unfinished: npt.NDArray[np.void], manifest: Manifest, ended_by: str) -> None:
        self._latest = boundary
        if not ended_by:
            whole = boundary.time_ns >= self._begin.time_ns + self._options.longest_ns
            ended_by = "it was as long as captures may be" if whole else "the post-roll was over"
        iterations = np.isin(unfinished["probe"], [probe.id for probe in manifest.probes if probe.kind == ITERATION])
        lasted_ns = boundary.time_ns - unfinished["start_ns"].astype(np.int64)
        self.writer.put(unfinished[~iterations | (lasted_ns >= manifest.stall_ns)])
        final = replace(
            self._manifest(manifest),
            ended_ns=max(boundary.time_ns, self._newest_ns),
            wall_offset_end_ns=manifest.wall_offset_end_ns or self._wall_offset_ns,
            ended_by=ended_by,
        )
        self.writer.finish(self._counters(boundary), final)

    def _counters(self, boundary: Boundary) -> Counters:
        begin = self._begin.counters
        return Counters(
            boundary.time_ns,
            {probe: _gained(now, begin.get(probe, ProbeCounters())) for probe, now in boundary.counters.items()},
        )

    def _manifest(self, manifest: Manifest) -> Manifest:
        """Return the manifest of the watch as that of this capture."""
        started_ns, now_ns = self._begin.time_ns, self._latest.time_ns
        return replace(
            manifest,
            started_ns=started_ns,
            wall_offset_ns=self._wall_offset_ns,
            targets=tuple(item for item in manifest.targets if not 0 < item.end_ns < started_ns),
            namespaces=tuple(self._namespace(item) for item in manifest.namespaces),
            notes=(*manifest.notes[-_MAX_NOTES:], *self._notes),
            triggers=tuple(self._triggers),
            further_triggers=self._further,
            details=tuple(item for item in manifest.details if _touches(item, started_ns, now_ns)),
        )

    def _namespace(self, item: NamespaceInfo) -> NamespaceInfo:
        begin, end = self._begin, self._latest

        def gained(first: ByNamespace, last: ByNamespace) -> dict[str, int]:
            before = first.get(item.inode, {})
            return {name: count - before.get(name, 0) for name, count in last.get(item.inode, {}).items()}

        return replace(
            item,
            counters_start=dict(begin.kernel.get(item.inode, item.counters_start)),
            counters_end=dict(end.kernel.get(item.inode, {})),
            seen=gained(begin.watched, end.watched),
            seen_elsewhere=gained(begin.elsewhere, end.elsewhere),
        )


class _Writer(threading.Thread):
    """Writes one capture; whatever the disk does, callers never wait.

    Attributes:
        result: set once, when it is done.
        is_stuck: nothing more of this capture will be written.
    """

    def __init__(self, folder: CaptureFolder, place: Place, manifest: Manifest, max_bytes: int) -> None:
        super().__init__(name="capture writer", daemon=True)
        self.result: Finished | None = None
        self.is_stuck = False
        self._folder = folder
        self._place = place
        self._manifest = manifest
        self._max_bytes = max_bytes
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
        error = ""
        final = self._manifest
        try:
            if not self._folder.make_room(self._place, 0):
                raise StallscopeError("--max-disk leaves no room for a capture")
            with RecordingWriter(self._place.temporary, self._manifest) as writer:
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


def _trigger_info(firing: Firing) -> TriggerInfo:
    return TriggerInfo(
        firing.time_ns, firing.trigger, firing.value, firing.unit, firing.subject, firing.pid, firing.under_way,
        firing.count,
    )  # fmt: skip


def _gained(now: ProbeCounters, before: ProbeCounters) -> ProbeCounters:
    return ProbeCounters(
        **{item.name: max(getattr(now, item.name) - getattr(before, item.name), 0) for item in fields(ProbeCounters)}
    )


def _touches(item: DetailInfo, started_ns: int, ended_ns: int) -> bool:
    return item.attached_ns <= ended_ns and (item.detached_ns == 0 or item.detached_ns >= started_ns)


def lost_events(by_probe: Mapping[int, ProbeCounters]) -> int:
    """Return how many events were lost, of all probes: what ``TriggerState.observe`` wants as ``lost``."""
    return sum(counters.missing for counters in by_probe.values())
