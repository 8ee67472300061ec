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
from importlib.metadata import version
from typing import TYPE_CHECKING

from stallscope.probes import catalogue
from stallscope.tracer.boundary import Boundary
from stallscope.tracer.capture.cost import own_cpu_ns, own_memory_bytes
from stallscope.tracer.capture.detail import DetailTier
from stallscope.tracer.capture.guard import OverheadGuard
from stallscope.tracer.capture.probe_ids import FIRST_CALL_PROBE, STACK_PROBE
from stallscope.tracer.capture.session import SessionOptions
from stallscope.tracer.capture.stack_sampler import StackOptions
from stallscope.tracer.capture.trace_options import TraceOptions, requested_functions
from stallscope.tracer.capture.watchdog import Watchdog
from stallscope.tracer.capture.watched import WatchedSession
from stallscope.tracer.errors import UsageError
from stallscope.tracer.manifest import Manifest
from stallscope.tracer.recording import joined_events
from stallscope.tracer.units import format_count, format_duration_ns
from stallscope.tracer.watch.aftercare import VERDICT, Aftercare
from stallscope.tracer.watch.captures import STARTED, SUPPRESSED, Captures, lost_events
from stallscope.tracer.watch.evaluation import Firing, TriggerState
from stallscope.tracer.watch.folder import CaptureFolder
from stallscope.tracer.watch.options import DETAIL_ALWAYS, WatchOptions, reloaded
from stallscope.tracer.watch.preroll import Preroll
from stallscope.tracer.watch.triggers import STALL, functions_of, shortest_ns
from stallscope.tracer.watch.writer import Finished

if TYPE_CHECKING:
    from stallscope.tracer.watch.metrics import WatchMetrics

STACK_PERIOD_NS = 1_000_000_000 // 499
"""Stacks are sampled in stalls only, and these are short: 100 samples of one of 200 ms."""

CHUNK_NS = 500_000_000
"""How often the counters are read; a capture begins at such a moment."""

LATE_NS = 1_000_000_000
"""How late a trigger may be noticed on a busy machine; the pre-roll reaches back from the moment it came true."""

RECORDED_STALL_NS = 10_000_000
"""Iterations are recorded from here on, as of ``record``, where they are seen one by one."""

_LOOK_NS = 20_000_000
"""How often conditions that last are looked at when nothing happens."""

_NO_EVENTS = joined_events([])


@dataclass
class WatchTotals:
    """What a watch did.

    Attributes:
        started_ns, elapsed_ns: CLOCK_MONOTONIC.
        triggers: conditions that came true; suppressed: of those in the cool-down.
        captures: kept whole; incomplete: kept in part, or not at all.
        arrivals: servers taken up after the start.
        attach_ns, late_ns: as of ``DetailTier``.
        start_cpu_ns, own_cpu_ns: CPU time of this process until the servers of the start were traced, and since then.
    """

    started_ns: int = 0
    elapsed_ns: int = 0
    triggers: int = 0
    suppressed: int = 0
    captures: int = 0
    incomplete: int = 0
    arrivals: int = 0
    start_cpu_ns: int = 0
    own_cpu_ns: int = 0
    attach_ns: Sequence[int] = field(default_factory=list)
    late_ns: Sequence[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Spent:
    """What tracing had cost at the end of a chunk."""

    time_ns: int
    hits: int
    cpu_ns: int


class Watcher:
    """Watches until it is stopped."""

    def __init__(
        self,
        options: WatchOptions,
        say: Callable[[str], None],
        *,
        command: tuple[str, ...] = (),
        password: str = "",
        read_options: Callable[[], WatchOptions] | None = None,
    ) -> None:
        """Take the folder, compile, and attach the standing probes.

        Args:
            options: what to watch for.
            say: called with each line for the reader; no line holds a newline.
            command: the command line, kept in the captures. password: for INFO, "" for none.
            read_options: gives the options as they are to be after ``reload``.

        Raises:
            UsageError: the folder cannot be written, or another watch has it.
            SurroundingsError: this machine cannot be traced, or a process that was named cannot.
        """
        self.options = options
        self.totals = WatchTotals()
        self._say = say
        self._read_options = read_options
        self._is_stopped = self._is_reload_wanted = False
        self._stopped_by = ""
        self._folder = CaptureFolder(options.output, options.max_captures, options.max_disk_bytes)
        try:
            self._session = WatchedSession(
                SessionOptions(options.pids, options.ports, trace_options(options), False, password, command),
                all_redis=options.all_redis,
                keep_ns=options.before_ns + LATE_NS + 2 * CHUNK_NS,
                stall_ns=shortest_ns(options.triggers, STALL, RECORDED_STALL_NS),
            )
        except BaseException:
            self._folder.close()
            raise
        for text in self._folder.recovered:
            self._session.note(f"left by an earlier watch: {text}")
        begin = self._session.boundary()
        self._aftercare = Aftercare(options.command, report=options.report, command_ns=options.command_ns, verdict=True)
        self._preroll = Preroll(options.before_ns + LATE_NS, options.memory_bytes, begin)
        self._captures = Captures(options.capture, self._folder, self._preroll, lambda: self._session.stacks)
        self._triggers = TriggerState(options.triggers)
        self._manifest = self._session.manifest()
        self._detail = DetailTier(
            self._session, always=options.detail == DETAIL_ALWAYS, keep_ns=options.before_ns + options.longest_ns
        )
        self._metrics = self._serve_metrics()
        self._guard = OverheadGuard(self._session, self._detail, begin)
        self._spent: deque[_Spent] = deque()
        self._next_look_ns = 0
        self._next_chunk_ns = begin.time_ns + CHUNK_NS
        self._lost = _lost_events(begin)
        self.totals.started_ns = begin.time_ns
        self.totals.start_cpu_ns = own_cpu_ns()
        self._keep_spent(begin)
        self._learn()
        self._detail.settle()

    def _serve_metrics(self) -> WatchMetrics | None:
        """Begin to serve metrics where they are asked for."""
        if self.options.metrics is None:
            return None
        from stallscope.tracer.watch.metrics import WatchMetrics  # needs memory that nobody else does

        metrics = WatchMetrics(version("stallscope"), self.options.triggers)
        try:
            metrics.serve(*self.options.metrics)
        except BaseException:
            self._session.close()
            self._folder.close()
            raise
        return metrics

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the servers that are watched now."""
        return self._session.pids

    def stop(self, reason: str) -> None:
        """Ask ``run`` to finish; safe from a signal handler."""
        self._stopped_by = reason
        self._is_stopped = True

    def reload(self) -> None:
        """Ask for the options to be read again; safe from a signal handler."""
        self._is_reload_wanted = True

    def run(self) -> WatchTotals:
        """Watch until ``stop`` is called; a capture under way is finished then. Returns what was done."""
        Watchdog.run_first()
        try:
            self._say_notes()
            while not self._is_stopped:
                time.sleep(max(self._session.due_ns - time.monotonic_ns(), 0) / 1e9)
                self._step()
            self._finish_capture(f"the watch was ended ({self._stopped_by})")
            self._captures.close()
            self._tell_finished()
            self._aftercare.close()
            self._tell_results()
        finally:
            self.close()
        return self.totals

    def close(self) -> None:
        """Detach and free everything; may be called more than once."""
        if self._metrics is not None:
            self._metrics.close()
        self._aftercare.close(0)
        self._session.close()
        self._folder.close()

    def _step(self) -> None:
        now_ns = time.monotonic_ns()
        rows = [part for part in self._session.poll(now_ns) if len(part)]
        under_way = self._session.under_way(calls_too=bool(functions_of(self.options.triggers)))
        if not rows and not under_way and now_ns < self._next_look_ns:
            return  # most of the time nothing has happened since the last look, some milliseconds ago
        self._next_look_ns = now_ns + _LOOK_NS
        events = joined_events(rows) if rows else _NO_EVENTS
        now_ns = time.monotonic_ns()  # to take up a server takes its time
        firings = self._triggers.observe(events, now_ns, under_way, self._lost)
        if firings and self._captures.accepts(now_ns):
            self._detail.want(firings[0], now_ns)  # before anything else is done
        self._captures.add(events)
        if self._metrics is not None:
            self._metrics.observe(events)
            self._metrics.fired(firings)
        if firings or self._captures.is_capturing:
            self._capture(firings, now_ns)
        if now_ns >= self._next_chunk_ns or self._preroll.is_filling:
            self._close_chunk(now_ns)
        if self._captures.is_due(now_ns):
            self._finish_capture()
        self._detail.settle()

    def _capture(self, firings: Sequence[Firing], now_ns: int) -> None:
        self.totals.triggers += len(firings)
        what = self._captures.fire(
            firings, self._triggers.held_ns, now_ns, time.time_ns(), self._with_details(self._manifest)
        )
        for firing in firings:
            self._say(f"trigger: {firing.describe()}{' (in the cool-down)' if what == SUPPRESSED else ''}")
        if what == STARTED:
            self._session.is_held = True

    def _close_chunk(self, now_ns: int) -> None:
        self._next_chunk_ns = now_ns + CHUNK_NS
        boundary = self._session.boundary()
        self._lost = _lost_events(boundary)
        self._keep_spent(boundary)
        self._guard.look(boundary, self.options.max_overhead)
        self._say_notes()
        self._learn()
        self._captures.close_chunk(boundary, self._with_details(self._manifest))
        self._tell_finished()
        self._tell_results()
        self._tell_metrics(boundary)
        if self._is_reload_wanted:
            self._is_reload_wanted = False
            self._reload()

    def _learn(self) -> None:
        """Learn which probes and listeners there are now."""
        before, self._manifest = self._manifest, self._session.manifest()
        if (before.probes, before.listeners) != (self._manifest.probes, self._manifest.listeners) or (
            len(self._spent) == 1
        ):
            self._triggers.follow(self._manifest)
            self._preroll.follow(self._manifest)
        if self._metrics is not None and before != self._manifest:
            self._metrics.follow(self._manifest, time.monotonic_ns())

    def _with_details(self, manifest: Manifest) -> Manifest:
        return replace(manifest, details=self._detail.details)

    def _finish_capture(self, ended_by: str = "") -> None:
        """End the capture under way, if there is one."""
        if self._captures.is_capturing:
            boundary = self._session.boundary()
            self._say_notes()
            self._learn()
            manifest = replace(
                self._with_details(self._manifest),
                wall_offset_end_ns=time.time_ns() - time.monotonic_ns(),
                cost=self._cost(self._captures.begin_ns, boundary),
            )
            self._captures.finish(boundary, self._session.unfinished(), manifest, ended_by)
        self._session.is_held = False
        self._detail.release()

    def _reload(self) -> None:
        """Read the options again, and take over what can be changed."""
        if self._read_options is None:
            self._say("SIGHUP: there is nothing to read again; give a file with --config")
            return
        try:
            wanted = self._read_options()
        except UsageError as error:
            self._say(f"SIGHUP: nothing was changed: {error}")
            return
        options, changed, restart = reloaded(self.options, wanted)
        if options.triggers != self.options.triggers:
            self._triggers = TriggerState(options.triggers)
            self._triggers.follow(self._manifest)
        self.options = options
        self._captures.options = options.capture
        self._preroll.keep_ns, self._preroll.max_bytes = options.before_ns + LATE_NS, options.memory_bytes
        self._folder.max_captures, self._folder.max_bytes = options.max_captures, options.max_disk_bytes
        self._aftercare.command, self._aftercare.report = options.command, options.report
        self._aftercare.command_ns = options.command_ns
        self._say(f"SIGHUP: changed: {', '.join(changed) or 'nothing'}")
        if restart:
            self._say(f"SIGHUP: takes a restart: {', '.join(restart)}")

    def _keep_spent(self, boundary: Boundary) -> None:
        hits = sum(counter.hits for probe, counter in boundary.counters.items() if probe >= FIRST_CALL_PROBE)
        self._spent.append(_Spent(boundary.time_ns, hits, own_cpu_ns()))
        oldest_ns = boundary.time_ns - self.options.before_ns - self.options.longest_ns - CHUNK_NS
        while self._spent[0].time_ns < oldest_ns:
            self._spent.popleft()

    def _cost(self, started_ns: int, boundary: Boundary) -> dict[str, float]:
        """Return what tracing cost since a capture's start; keys as of ``record``."""
        self._keep_spent(boundary)
        last = self._spent[-1]
        first = next((spent for spent in self._spent if spent.time_ns >= started_ns), last)
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

    def _tell_metrics(self, boundary: Boundary) -> None:
        if self._metrics is None:
            return
        self._metrics.counters(boundary.counters)
        self._metrics.queues(self._triggers.queues)
        self._metrics.own(
            cpu_ns=self.totals.start_cpu_ns + self.totals.own_cpu_ns,
            memory_bytes=own_memory_bytes(),
            share=self._guard.share,
            limit=self.options.max_overhead,
            preroll_bytes=self._preroll.bytes,
            preroll_dropped=self._preroll.dropped,
        )
        for took_ns in self._detail.take_times():
            self._metrics.detail(attached=self._detail.is_attached, took_ns=took_ns)
        self._metrics.detail(attached=self._detail.is_attached)

    def _tell_finished(self) -> None:
        totals = self.totals
        ended = self._captures.take_finished()
        if self._metrics is not None:
            self._metrics.captures(
                ended,
                self._folder.kept(),
                self._captures.suppressed,
                time.time_ns(),
                capturing=self._captures.is_capturing,
            )
        for finished in ended:
            self._say(_described(finished))
            self._aftercare.submit(finished)
            if finished.complete:
                totals.captures += 1
            else:
                totals.incomplete += 1
        totals.suppressed = self._captures.suppressed
        totals.arrivals = self._session.arrived
        totals.attach_ns, totals.late_ns = self._detail.attach_ns, self._detail.late_ns
        totals.own_cpu_ns = own_cpu_ns() - totals.start_cpu_ns
        totals.elapsed_ns = time.monotonic_ns() - totals.started_ns

    def _tell_results(self) -> None:
        results = self._aftercare.take_results()
        for result in results:
            if result.step == VERDICT:
                self._say(f"{result.capture.name}: {result.text}")
            elif not result.ok or result.step == "exec":
                self._say(f"{result.capture.name}: {result.step} {result.text}")
        if self._metrics is not None:
            self._metrics.aftercare(result for result in results if result.step != VERDICT)


def trace_options(options: WatchOptions) -> TraceOptions:
    """Return what is traced in each server, and which of it only on demand."""
    in_triggers = functions_of(options.triggers)
    functions = requested_functions([*in_triggers, *options.probes], defaults=True)
    on_demand = frozenset(name for name in functions if name not in in_triggers and not catalogue.is_standing(name))
    return TraceOptions(
        functions,
        0,
        min(RECORDED_STALL_NS, shortest_ns(options.triggers, STALL, RECORDED_STALL_NS)),
        options.sample_ns,
        options.ring_bytes,
        on_demand,
        loop_on_demand=options.detail != DETAIL_ALWAYS,
        stacks=StackOptions(STACK_PERIOD_NS, always=False, on_demand=True) if options.stacks else None,
    )


def _lost_events(boundary: Boundary) -> int:
    """Return how many events were lost; a stack sample that is lost is no event that is missing."""
    return lost_events({probe: one for probe, one in boundary.counters.items() if probe != STACK_PROBE})


def _described(finished: Finished) -> str:
    length = format_duration_ns(finished.ended_ns - finished.started_ns) if finished.ended_ns else "some time"
    if finished.complete:
        return f"captured {length}, {format_count(finished.rows, 'row')}: {finished.path}"
    kept = f"what was written is in {finished.path}" if finished.path else "nothing was kept"
    return f"a capture is not complete: {finished.error}; {kept}"
