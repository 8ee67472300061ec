"""The flight recorder: follows the servers of a watch, and keeps what happened around each trigger.

Standing probes are attached all the time. When a trigger comes true, detail probes are attached within
milliseconds, and a capture is begun that holds what happened before; it ends some time after, and the detail
probes with it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stallscope.tracer.capture.cost import own_cpu_ns
from stallscope.tracer.capture.program import FIRST_CALL_PROBE
from stallscope.tracer.capture.session import SessionOptions
from stallscope.tracer.capture.watched import WatchedSession
from stallscope.tracer.errors import UsageError
from stallscope.tracer.manifest import DetailInfo, Manifest
from stallscope.tracer.recording import joined_events
from stallscope.tracer.units import format_count, format_duration_ns
from stallscope.tracer.watch.captures import (
    STARTED,
    SUPPRESSED,
    CaptureOptions,
    Captures,
    lost_events,
)
from stallscope.tracer.watch.evaluation import Firing, TriggerState
from stallscope.tracer.watch.folder import CaptureFolder
from stallscope.tracer.watch.preroll import Boundary, Preroll
from stallscope.tracer.watch.triggers import STALL, Trigger, functions_of, shortest_ns
from stallscope.tracer.watch.writer import Finished

CHUNK_NS = 500_000_000
"""How often the counters are read; a capture begins at such a moment."""

ON_TRIGGER, ALWAYS, NEVER = "on-trigger", "always", "never"
DETAIL = (ON_TRIGGER, ALWAYS, NEVER)

_LOOK_NS = 20_000_000
"""How often conditions that last are looked at when nothing happens."""

_MAX_ATTACH_TIMES = 1000
_NO_EVENTS = joined_events([])


@dataclass(frozen=True)
class WatchOptions:
    """What to watch for, and what to keep.

    Attributes:
        all_redis: every server of the machine, besides those the session names.
        folder: where captures go; max_captures, max_disk_bytes: how many, and how large all together.
        memory_bytes: bound of the pre-roll.
        detail: one of ``DETAIL``: when the functions of the detail tier are traced.
    """

    session: SessionOptions
    triggers: tuple[Trigger, ...]
    folder: Path
    captures: CaptureOptions
    max_captures: int = 20
    max_disk_bytes: int = 2**30
    memory_bytes: int = 64 * 2**20
    all_redis: bool = False
    detail: str = ON_TRIGGER


@dataclass
class WatchTotals:
    """What a watch did.

    Attributes:
        started_ns, elapsed_ns: CLOCK_MONOTONIC.
        triggers: conditions that came true; suppressed: of those in the cool-down.
        captures: kept whole; incomplete: kept in part, or not at all.
        attach_ns: from the moment a trigger was noticed to all detail probes attached, the last ones.
        late_ns: from the moment its bound was passed to the same.
        own_cpu_ns: CPU time of this process.
    """

    started_ns: int = 0
    elapsed_ns: int = 0
    triggers: int = 0
    suppressed: int = 0
    captures: int = 0
    incomplete: int = 0
    restarts: int = 0
    own_cpu_ns: int = 0
    attach_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_ATTACH_TIMES))
    late_ns: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_ATTACH_TIMES))


@dataclass(frozen=True)
class _Spent:
    """What tracing had cost at the end of a chunk."""

    time_ns: int
    hits: int
    cpu_ns: int


class Watcher:
    """Watches until it is stopped."""

    def __init__(self, options: WatchOptions, say: Callable[[str], None]) -> None:
        """Take the folder, compile, and attach the standing probes.

        Args:
            options: what to watch for.
            say: called with each line for the reader; no line holds a newline.

        Raises:
            UsageError: the folder cannot be written, or another watch has it.
            SurroundingsError: this machine cannot be traced, or a process that was named cannot.
        """
        if options.detail not in DETAIL:
            raise UsageError(f'"{options.detail}" is no time for detail; there are {", ".join(DETAIL)}')
        self.options = options
        self.totals = WatchTotals()
        self._say = say
        self._is_stopped = False
        self._stopped_by = ""
        self._folder = CaptureFolder(options.folder, options.max_captures, options.max_disk_bytes)
        try:
            self._session = WatchedSession(
                options.session,
                all_redis=options.all_redis,
                keep_ns=options.captures.before_ns + 2 * CHUNK_NS,
                stall_ns=shortest_ns(options.triggers, STALL, options.session.trace.stall_ns),
            )
        except BaseException:
            self._folder.close()
            raise
        for text in self._folder.recovered:
            self._session.note(f"left by an earlier watch: {text}")
        begin = self._session.boundary()
        self._preroll = Preroll(options.captures.before_ns, options.memory_bytes, begin)
        self._captures = Captures(options.captures, self._folder, self._preroll)
        self._triggers = TriggerState(options.triggers)
        self._needs_calls = bool(functions_of(options.triggers))
        self._manifest = self._session.manifest()
        self._details: list[DetailInfo] = []
        self._is_detail_wanted = options.detail == ALWAYS
        self._detail_for: Firing | None = None
        self._spent: deque[_Spent] = deque()
        self._next_look_ns = 0
        self._next_chunk_ns = begin.time_ns + CHUNK_NS
        self._lost = lost_events(begin.counters)
        self.totals.started_ns = begin.time_ns
        self._follow()
        self._keep_spent(begin)

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the servers that are watched now."""
        return self._session.pids

    def stop(self, reason: str) -> None:
        """Ask ``run`` to finish; safe from a signal handler."""
        self._stopped_by = reason
        self._is_stopped = True

    def run(self) -> WatchTotals:
        """Watch until ``stop`` is called; a capture under way is finished then. Returns what was done."""
        try:
            self._say_notes()
            while not self._is_stopped:
                time.sleep(max(self._session.due_ns - time.monotonic_ns(), 0) / 1e9)
                self._step()
            self._finish_capture(f"the watch was ended ({self._stopped_by})")
            self._captures.close()
            self._tell_finished()
        finally:
            self.close()
        return self.totals

    def close(self) -> None:
        """Detach and free everything; may be called more than once."""
        self._session.close()
        self._folder.close()

    def _step(self) -> None:
        now_ns = time.monotonic_ns()
        rows = [part for part in self._session.poll(now_ns) if len(part)]
        under_way = self._session.under_way(calls_too=self._needs_calls)
        if not rows and not under_way and now_ns < self._next_look_ns:
            return  # most of the time nothing has happened since the last look, some milliseconds ago
        self._next_look_ns = now_ns + _LOOK_NS
        events = joined_events(rows) if rows else _NO_EVENTS
        firings = self._triggers.observe(events, now_ns, under_way, self._lost)
        if firings:
            self._attach_for(firings, now_ns)
        self._captures.add(events)
        if firings or self._captures.is_capturing:
            self._capture(firings, now_ns)
        if now_ns >= self._next_chunk_ns or self._preroll.is_filling:
            self._close_chunk(now_ns)
        if self._captures.is_due(now_ns):
            self._finish_capture()
        self._change_detail()

    def _attach_for(self, firings: Sequence[Firing], noticed_ns: int) -> None:
        """Attach the detail probes before anything else is done about a trigger."""
        self.totals.triggers += len(firings)
        if self.options.detail == NEVER or self._is_detail_wanted or not self._captures.accepts(noticed_ns):
            return
        self._is_detail_wanted = True
        self._detail_for = firings[0]
        self._change_detail()
        if self._details and not self._details[-1].detached_ns:
            attached_ns = self._details[-1].attached_ns
            self.totals.attach_ns.append(attached_ns - noticed_ns)
            self.totals.late_ns.append(attached_ns - firings[0].time_ns)
            took = f"{format_duration_ns(attached_ns - noticed_ns)} after the trigger was noticed"
            late = f"{format_duration_ns(attached_ns - firings[0].time_ns)} after its bound was passed"
            self._session.note(f"detail probes attached {took}, {late}")

    def _capture(self, firings: Sequence[Firing], now_ns: int) -> None:
        manifest = self._newest_manifest()
        what = self._captures.fire(firings, self._triggers.held_ns, now_ns, time.time_ns(), manifest)
        for firing in firings:
            self._say(f"trigger: {firing.describe()}" + (" (in the cool-down)" if what == SUPPRESSED else ""))
        if what == STARTED:
            self._session.is_held = True

    def _close_chunk(self, now_ns: int) -> None:
        self._next_chunk_ns = now_ns + CHUNK_NS
        boundary = self._session.boundary()
        self._lost = lost_events(boundary.counters)
        self._keep_spent(boundary)
        self._say_notes()
        self._follow()
        self._captures.close_chunk(boundary, self._newest_manifest())
        self._tell_finished()

    def _follow(self) -> None:
        """Learn which probes and listeners there are now."""
        manifest = self._session.manifest()
        if (manifest.probes, manifest.listeners) != (self._manifest.probes, self._manifest.listeners) or not (
            self._spent
        ):
            self._triggers.follow(manifest)
            self._preroll.follow(manifest)
        self._manifest = manifest

    def _newest_manifest(self) -> Manifest:
        return replace(self._manifest, details=tuple(self._details))

    def _finish_capture(self, ended_by: str = "") -> None:
        """End the capture under way, if there is one."""
        if self._captures.is_capturing:
            boundary = self._session.boundary()
            self._say_notes()
            self._manifest = self._session.manifest()
            started_ns = self._captures.begin_ns
            manifest = replace(
                self._newest_manifest(),
                wall_offset_end_ns=time.time_ns() - time.monotonic_ns(),
                cost=self._cost(started_ns, boundary),
            )
            self._captures.finish(boundary, self._session.unfinished(), manifest, ended_by)
        self._session.is_held = False
        self._is_detail_wanted = self.options.detail == ALWAYS

    def _change_detail(self) -> None:
        """Attach or detach the detail probes, as is wanted; not while they are being detached."""
        attached = bool(self._details) and not self._details[-1].detached_ns
        if attached and not self._is_detail_wanted:
            self._session.detach_detail()
            self._details[-1] = replace(self._details[-1], detached_ns=time.monotonic_ns())
            oldest_ns = time.monotonic_ns() - self.options.captures.before_ns - self.options.captures.longest_ns
            self._details = [detail for detail in self._details if detail.detached_ns > oldest_ns]
        elif not attached and self._is_detail_wanted and not self._session.is_detaching:
            asked_ns = time.monotonic_ns()
            attached_ns = self._session.attach_detail()
            firing, self._detail_for = self._detail_for, None
            self._details.append(
                DetailInfo(
                    firing.time_ns if firing is not None else asked_ns,
                    attached_ns,
                    probes=self._session.detail_probes,
                    text=firing.trigger if firing is not None else "all the time",
                )
            )

    def _keep_spent(self, boundary: Boundary) -> None:
        hits = sum(counter.hits for probe, counter in boundary.counters.items() if probe >= FIRST_CALL_PROBE)
        self._spent.append(_Spent(boundary.time_ns, hits, own_cpu_ns()))
        oldest_ns = boundary.time_ns - self.options.captures.before_ns - self.options.captures.longest_ns - CHUNK_NS
        while self._spent[0].time_ns < oldest_ns:
            self._spent.popleft()

    def _cost(self, started_ns: int, boundary: Boundary) -> dict[str, float]:
        """Return what tracing cost since a capture's start; keys as of ``record``."""
        self._keep_spent(boundary)
        first = next((spent for spent in self._spent if spent.time_ns >= started_ns), self._spent[-1])
        last = self._spent[-1]
        calls = max(last.hits - first.hits, 0)
        return {
            **self._session.unit_costs(),
            "calls_traced": float(calls),
            "traced_process_ns": calls * self._session.call_cost_ns,
            "own_cpu_ns": float(last.cpu_ns - first.cpu_ns),
            "elapsed_ns": float(boundary.time_ns - started_ns),
        }

    def _say_notes(self) -> None:
        for note in self._session.take_notes():
            self._say(note.text)

    def _tell_finished(self) -> None:
        for finished in self._captures.take_finished():
            self._say(_described(finished))
            if finished.complete:
                self.totals.captures += 1
            else:
                self.totals.incomplete += 1
        self.totals.suppressed = self._captures.suppressed
        self.totals.restarts = self._session.restarts
        self.totals.own_cpu_ns = own_cpu_ns()
        self.totals.elapsed_ns = time.monotonic_ns() - self.totals.started_ns


def _described(finished: Finished) -> str:
    length = format_duration_ns(finished.ended_ns - finished.started_ns) if finished.ended_ns else "some time"
    if finished.complete:
        return f"captured {length}, {format_count(finished.rows, 'row')}: {finished.path}"
    kept = f"what was written is in {finished.path}" if finished.path else "nothing was kept"
    return f"a capture is not complete: {finished.error}; {kept}"
