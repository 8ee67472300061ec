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

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stallscope.tracer.boundary import Boundary, begun_at, gained, with_end
from stallscope.tracer.layout import mark_unfinished
from stallscope.tracer.manifest import (
    ITERATION,
    Counters,
    DetailInfo,
    Manifest,
    Note,
    ProbeCounters,
    TriggerInfo,
)
from stallscope.tracer.stack_table import StackTable
from stallscope.tracer.units import format_count, format_duration_ns
from stallscope.tracer.watch.evaluation import Firing
from stallscope.tracer.watch.folder import CaptureFolder, Place
from stallscope.tracer.watch.preroll import Lookback, Preroll
from stallscope.tracer.watch.writer import CaptureWriter, Finished

STARTED, EXTENDED, SUPPRESSED = "started", "extended", "suppressed"

MAX_TRIGGERS = 100
"""So many triggers are listed in one capture; more are counted."""

_MAX_NOTES = 200
_MAX_FINISHED = 64
_MAX_FINISHING = 2
"""While so many captures wait for a disk that does not answer, no other is begun."""


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


class Captures:
    """The state machine; see the module for the order of calls.

    Attributes:
        started, suppressed: captures begun; triggers that fell into a cool-down.
    """

    def __init__(
        self,
        options: CaptureOptions,
        folder: CaptureFolder,
        preroll: Preroll,
        stacks: Callable[[], StackTable | None] = lambda: None,
    ) -> None:
        """Begin idle.

        Args:
            stacks: gives what the rows' ``stack`` numbers mean, for the capture that begins now.
        """
        self.options = options
        self.started = 0
        self.suppressed = 0
        self._folder = folder
        self._preroll = preroll
        self._stacks = stacks
        self._current: _Capture | None = None
        self._finishing: list[CaptureWriter] = []
        self._finished: deque[Finished] = deque(maxlen=_MAX_FINISHED)
        self._ready_ns = 0
        self._suppressed_before = 0

    @property
    def is_capturing(self) -> bool:
        """Return whether a capture is under way."""
        return self._current is not None

    @property
    def begin_ns(self) -> int:
        """Return when the present capture began, with its pre-roll; 0 if there is none."""
        return self._current.begin_ns if self._current is not None else 0

    def accepts(self, now_ns: int) -> bool:
        """Return whether a trigger that comes true now begins or extends a capture."""
        return self._current is not None or (now_ns >= self._ready_ns and len(self._finishing) < _MAX_FINISHING)

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
        if not self.accepts(now_ns):
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
        self._current = _Capture(self.options, self._folder, place, lookback, manifest, notes, self._stacks())
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
        stacks: StackTable | None,
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
        self.writer = CaptureWriter(folder, place, self._manifest(manifest), options.memory_bytes, stacks)
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
    def begin_ns(self) -> int:
        return self._begin.time_ns

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
        return Counters(boundary.time_ns, gained(self._begin.counters, boundary.counters))

    def _manifest(self, manifest: Manifest) -> Manifest:
        """Return the manifest of the watch as that of this capture."""
        begin, end = self._begin, self._latest
        manifest = begun_at(manifest, begin.time_ns, dict.fromkeys(begin.moment.kernel, begin.moment))
        return replace(
            manifest,
            wall_offset_ns=self._wall_offset_ns,
            namespaces=tuple(with_end(info, begin.moment, end.moment) for info in manifest.namespaces),
            notes=(*manifest.notes[-_MAX_NOTES:], *self._notes),
            triggers=tuple(self._triggers),
            further_triggers=self._further,
            details=tuple(item for item in manifest.details if _touches(item, begin.time_ns, end.time_ns)),
        )


def _trigger_info(firing: Firing) -> TriggerInfo:
    return TriggerInfo(
        firing.time_ns, firing.trigger, firing.value, firing.unit, firing.subject, firing.pid, firing.under_way,
        firing.count,
    )  # fmt: skip


def _touches(item: DetailInfo, started_ns: int, ended_ns: int) -> bool:
    return item.attached_ns <= ended_ns and (item.detached_ns == 0 or item.detached_ns >= started_ns)


def lost_events(by_probe: Mapping[int, ProbeCounters]) -> int:
    """Return how many events were lost, of all probes: what ``TriggerState.observe`` wants as ``lost``."""
    return sum(counters.missing for counters in by_probe.values())
