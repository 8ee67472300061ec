"""The traced processes and everything attached to them: which function is which probe, in which program."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from stallscope.probes.catalogue import Decoder, Field
from stallscope.tracer.capture.backlog import COUNTER_FIELDS, QUEUE_FIELDS
from stallscope.tracer.capture.binary import Attachment
from stallscope.tracer.capture.cost import CALIBRATION_PROBE
from stallscope.tracer.capture.event_loop import TRACEPOINT_RUNG, plan_loop
from stallscope.tracer.capture.listener import listener_probes, may_be_hooked, plan_listener
from stallscope.tracer.capture.listener_program import LISTENER_PROBES, ListenerProgram
from stallscope.tracer.capture.loaded_programs import LoadedPrograms
from stallscope.tracer.capture.loader import Loader
from stallscope.tracer.capture.on_demand import OnDemand, Place
from stallscope.tracer.capture.probe_ids import (
    ACCEPT_PROBE,
    COUNTER_PROBE,
    FIRST_CALL_PROBE,
    FIRST_LISTENER_PROBE,
    ITERATION_PROBE,
    QUEUE_PROBE,
    STACK_PROBE,
)
from stallscope.tracer.capture.program import CallProbe, MoreSources, Program
from stallscope.tracer.capture.redis_target import Target
from stallscope.tracer.capture.stack_capture import StackCapture
from stallscope.tracer.capture.stack_reader import stack_probe
from stallscope.tracer.capture.stack_sampler import stack_sources
from stallscope.tracer.capture.symbols import Resolution, resolve
from stallscope.tracer.capture.trace_options import TraceOptions
from stallscope.tracer.errors import StallscopeError, SurroundingsError
from stallscope.tracer.layout import NO_STACK, UNFINISHED_NS
from stallscope.tracer.manifest import (
    ACCEPT,
    CALL,
    COUNTER,
    ITERATION,
    QUEUE,
    ListenerInfo,
    Note,
    ProbeCounters,
    ProbeInfo,
)
from stallscope.tracer.recording import joined_events
from stallscope.tracer.units import format_duration_ns

ITERATION_FIELDS = (Field("ready", "file descriptors", 0), Field("accepted", "connections", 1))
ACCEPT_FIELDS = (Field("listener_fd", "file descriptor", 0), Field("fd", "file descriptor", 1, signed=True))


class TracedSet:
    """All traced processes, the probes on them, and the programs that run there.

    After a restart with another binary the same function has a new id, because its arguments may lie
    elsewhere. An id is used again only when ``retire`` let go of the binary it was for.

    Attributes:
        loop_rung: how event loops are seen: ``fentry``, ``kprobe``, ``raw tracepoint``, or "" for not at all.
        is_loop_on_demand: they are seen by raw tracepoints, which are attached only by ``attach_loop``.
    """

    def __init__(self, options: TraceOptions) -> None:
        """Start the compiler process; nothing is attached."""
        self.options = options
        self.targets: dict[int, Target] = {}
        self.notes: list[Note] = []
        self.probes: list[ProbeInfo] = _fixed_probes(options)
        self.loop_rung = ""
        self.is_loop_on_demand = False
        self._loader: Loader | None = Loader()
        self._listener_loader: Loader | None = Loader() if may_be_hooked() else None
        self._is_listener_planned = False
        self._listener: ListenerProgram | None = None
        self.stacks: StackCapture | None = None
        self._programs: list[LoadedPrograms] = []
        self._owner: dict[int, Program] = {}
        self._ids: dict[tuple[str, int, Decoder], int] = {}
        self._plans: dict[int, list[Place]] = {}
        self._used_ns: dict[int, int] = {}
        self._preparing: set[int] = set()
        self._lock = threading.Lock()
        self.standing = OnDemand(self._owner_of)
        self.standing.attach()
        self.on_demand = OnDemand(self._owner_of)

    @property
    def base(self) -> Program:
        """The first program: it follows the event loops and holds the calibration probe."""
        base = self._programs[0]
        assert isinstance(base, Program)
        return base

    def prepare(self, targets: Sequence[Target]) -> None:
        """Find the functions in these processes and compile and load what they need; nothing is attached.

        It takes a second where there is something new to compile, and may be called in a thread of its own.

        Raises:
            SurroundingsError: bcc is missing or cannot compile here, or a process has nothing to trace; says why.
            SymbolError: a binary cannot be read.
        """
        found = {target.pid: self._resolve(target) for target in targets}
        with self._lock:
            plans = {target.pid: self._plan(target, found[target.pid]) for target in targets}
            places = [place for plan in plans.values() for place in plan]
            calls = [CallProbe(place.probe, place.decoder) for place in places if place.probe not in self._owner]
            self._preparing |= {place.probe for place in places}
        try:
            self._compile(list(dict.fromkeys(calls)))
        except StallscopeError:
            self._preparing -= {place.probe for place in places}
            raise
        self._plans |= plans

    def attach_listener(self) -> None:
        """Hook the kernel's side of the listeners, once, as far as this kernel allows; a note says what it does not."""
        if self._is_listener_planned:
            return
        self._is_listener_planned = True
        loader, self._listener_loader = self._listener_loader, None
        try:
            self._listener = ListenerProgram(plan_listener(), ring_bytes=self.options.ring_bytes, loader=loader)
        except SurroundingsError as error:
            if loader is not None:
                loader.close()
            self.note(f"refused connections are sampled, not seen one by one: {error}")
            return
        plan = self._listener.plan
        self._programs.append(self._listener)
        self.probes += listener_probes(FIRST_LISTENER_PROBE, plan)
        for text in (*self._listener.failures, *(f"this kernel has no {name}" for name in plan.missing)):
            self.note(text)

    def watch_listener(self, listener: ListenerInfo) -> None:
        """Report what happens to this listener's connection requests, where the kernel's side is hooked."""
        if self._listener is None:
            return
        try:
            self._listener.watch(listener)
        except SurroundingsError as error:
            self.note(str(error))

    def unwatch_listener(self, listener: ListenerInfo) -> None:
        """Forget a listener that was closed."""
        if self._listener is not None:
            self._listener.unwatch(listener)

    @property
    def listener_rung(self) -> str:
        """Return how the listener is hooked: ``fentry``, ``kprobe``, both, or "" for not at all."""
        return " and ".join(sorted(set(self._listener.plan.rungs.values()))) if self._listener is not None else ""

    @property
    def stack_rung(self) -> str:
        """Return how stacks are sampled."""
        sampled = next((probe.rung for probe in self.probes if probe.id == STACK_PROBE), "")
        return sampled or "not sampled"

    def counted_requests(self, *, watched: bool) -> dict[int, dict[str, int]]:
        """Return :meth:`ListenerProgram.counted_requests`; empty where the kernel's side is not hooked."""
        return self._listener.counted_requests(watched=watched) if self._listener is not None else {}

    def attach(self, targets: Sequence[Target]) -> None:
        """Attach to processes that were prepared.

        Raises:
            SurroundingsError: the kernel refuses every probe of one of them; says why.
        """
        for target in targets:
            self._attach(target, self._plans.pop(target.pid))

    def remove(self, pid: int) -> None:
        """Let go of a process that has ended (or is to be left alone)."""
        self.standing.remove(pid)
        self.on_demand.remove(pid)
        self.base.unwatch_loop(pid)
        if self.stacks is not None:
            self.stacks.remove(pid)
        target = self.targets.pop(pid, None)
        if target is not None:
            target.close()

    @property
    def is_detaching(self) -> bool:
        """Return whether probes are being detached in the background."""
        return self.standing.is_detaching or self.on_demand.is_detaching

    def calls_under_way(self) -> npt.NDArray[np.void]:
        """Return the calls that were entered and have not returned (dtype ``EVENT``), also those left by longjmp."""
        return joined_events([part.calls_under_way() for part in tuple(self._programs) if isinstance(part, Program)])

    def last_calls(self, pid: int) -> npt.NDArray[np.void]:
        """Return the calls that a process was in when it ended (dtype ``EVENT``, unfinished), and forget them."""
        calls = self.calls_under_way()
        calls = calls[calls["pid"] == pid].copy()
        calls["duration_ns"], calls["stack"] = UNFINISHED_NS, NO_STACK
        for program in tuple(self._programs):
            if isinstance(program, Program) and len(calls):
                program.forget_calls(set(calls["probe"].tolist()), pid)
        return calls

    def unfinished(self, now_ns: int) -> npt.NDArray[np.void]:
        """Return the spans that are under way now (dtype ``EVENT``, unfinished)."""
        spans = [part.unfinished()[0] for part in tuple(self._programs) if isinstance(part, Program)]
        return _under_way(np.concatenate(spans), now_ns, self.options.stall_ns)[0]

    def retire(self, now_ns: int, after_ns: int, known_pids: Collection[int]) -> None:
        """Free the programs of binaries that no process has executed for so long, and their probe ids.

        The caller makes sure that no row with these ids is of use any more.

        Args:
            now_ns: CLOCK_MONOTONIC. after_ns: how long.
            known_pids: processes whose names a recording may still need; others are forgotten.
        """
        with self._lock:
            self.probes = [
                replace(info, pids=tuple(pid for pid in info.pids if pid in known_pids)) for info in self.probes
            ]
            in_use = {probe for info in self.probes if set(info.pids) & self.targets.keys() for probe in [info.id]}
            in_use |= self._preparing
            for program in self._programs[1:]:
                mine = {probe for probe, owner in self._owner.items() if owner is program}
                if not isinstance(program, Program) or mine & in_use:
                    self._used_ns[id(program)] = now_ns
                    continue
                if now_ns - self._used_ns.setdefault(id(program), now_ns) < after_ns or self.is_detaching:
                    continue
                self._used_ns.pop(id(program))
                self._programs.remove(program)
                self._owner = {probe: owner for probe, owner in self._owner.items() if owner is not program}
                self._ids = {key: probe for key, probe in self._ids.items() if probe not in mine}
                self.probes = [info for info in self.probes if info.id not in mine]
                program.close()

    def keep_loop_whole(self) -> None:
        """See event loops by raw tracepoints once kprobes missed something (``Program.keep_loop_whole``)."""
        try:
            if not self.base.keep_loop_whole():
                return
        except SurroundingsError as error:
            self.note(f"event loop iterations are not measured any more: {error}")
            return
        self.note(f"kprobes missed system calls of an event loop: from here on it is seen by {TRACEPOINT_RUNG}s")
        self._set_loop_rung(f"{self.loop_rung}, then {TRACEPOINT_RUNG}")

    def describe_loop(self, rung: str, fields: tuple[Field, ...]) -> None:
        """Say how event loops are seen by somebody else, and what the values of an iteration mean."""
        self.loop_rung = rung
        self.probes = [
            replace(info, rung=rung, fields=fields) if info.kind == ITERATION else info for info in self.probes
        ]

    def attach_loop(self) -> None:
        """Attach the raw tracepoints that are on demand; a note says when the kernel refuses."""
        try:
            self.base.attach_loop()
        except SurroundingsError as error:
            self.note(f"event loop iterations are not measured: {error}")

    def detach_loop(self) -> None:
        """Begin to detach them; ``on_demand.is_detaching`` until that is done."""
        self.on_demand.let_go(self.base.detach_loop)

    def note(self, text: str) -> None:
        """Keep something the reader of the recording must know."""
        self.notes.append(Note(time.monotonic_ns(), text))

    @property
    def is_filling(self) -> bool:
        """Return whether a ring buffer is a quarter full and should be read before its time."""
        return any(program.ring.waiting_bytes * 4 > self.options.ring_bytes for program in tuple(self._programs))

    def read(self) -> npt.NDArray[np.void]:
        """Return all waiting records (dtype ``EVENT``)."""
        events = joined_events([program.ring.read() for program in tuple(self._programs)])
        calibration = events["probe"] == CALIBRATION_PROBE
        return events[~calibration] if calibration.any() else events

    def counters(self) -> dict[int, ProbeCounters]:
        """Return the in-kernel counters of every function, the event loop and accept."""
        loop = (ITERATION_PROBE, ACCEPT_PROBE) if self.loop_rung else ()
        totals = self.base.counters(loop)
        owners = self._owner  # replaced as a whole, never changed
        for program in tuple(self._programs):
            totals |= program.counters(probe for probe, owner in owners.items() if owner is program)
        if self._listener is not None:
            totals |= self._listener.counters(LISTENER_PROBES)
        if self.stacks is not None:
            totals[STACK_PROBE] = self.stacks.counters()
        return totals

    def stop(self) -> tuple[int, npt.NDArray[np.void], dict[int, ProbeCounters]]:
        """Take the final state, then detach everything (which takes tenths of a second).

        Returns:
            When it ended (CLOCK_MONOTONIC ns), the spans that were under way (dtype ``EVENT``,
            unfinished), and the in-kernel counters at that moment. Records up to it, and some later ones,
            are still to be read.
        """
        now_ns, unfinished, counters = self.state()
        for program in self._programs:
            program.detach_all()
        return now_ns, unfinished, counters

    def state(self) -> tuple[int, npt.NDArray[np.void], dict[int, ProbeCounters]]:
        """Return what :meth:`stop` returns, of this moment; nothing is detached."""
        spans = [program.unfinished() for program in self._programs if isinstance(program, Program)]
        counters = self.counters()
        now_ns = time.monotonic_ns()
        unfinished, left = _under_way(
            np.concatenate([unfinished for unfinished, _ in spans]), now_ns, self.options.stall_ns
        )
        left = np.concatenate([left, *(left_behind for _, left_behind in spans)])
        for probe, count in zip(*np.unique(left["probe"], return_counts=True), strict=True):
            counter = counters[int(probe)]
            counters[int(probe)] = replace(counter, abandoned=counter.abandoned + int(count))
        return now_ns, unfinished, counters

    def close(self) -> None:
        """Detach and free everything; may be called at any time, more than once."""
        for loader in (self._loader, self._listener_loader):
            if loader is not None:
                loader.close()
        self._loader = self._listener_loader = None
        if self.stacks is not None:
            self.stacks.close()
        self.stacks = None
        self.standing.close()
        self.on_demand.close()
        for program in self._programs:
            program.close()
        self._programs.clear()
        for target in self.targets.values():
            target.close()
        self.targets.clear()

    def _owner_of(self, probe: int) -> Program | None:
        return self._owner.get(probe)

    def _resolve(self, target: Target) -> list[Resolution]:
        """Return where each function is in a process; raises if none is there."""
        resolutions = resolve(target.image, self.options.functions, redis_version=target.version or None)
        if not any(resolution.attachments for resolution in resolutions):
            raise SurroundingsError(f"nothing to trace in process {target.pid} ({target.exe}): {resolutions[0].reason}")
        return resolutions

    def _plan(self, target: Target, resolutions: Sequence[Resolution]) -> list[Place]:
        """Return the places to probe in a process; one that several functions share is on demand only if all are."""
        plan: dict[tuple[str, int], Place] = {}
        for function, resolution in zip(self.options.functions, resolutions, strict=True):
            on_demand = function in self.options.on_demand
            if not resolution.attachments:
                self.note(f"{resolution.function} is not traced in process {target.pid}: {resolution.reason}")
            for attachment in resolution.attachments:
                place = (attachment.path, attachment.offset)
                if place in plan:
                    self._describe(plan[place].probe, also=resolution)
                    plan[place] = replace(plan[place], on_demand=plan[place].on_demand and on_demand)
                    continue
                probe = self._probe_id(target, resolution, attachment)
                plan[place] = Place(probe, resolution.decoder, attachment, on_demand)
        return list(plan.values())

    def _probe_id(self, target: Target, resolution: Resolution, attachment: Attachment) -> int:
        key = (_identity(attachment), attachment.offset, resolution.decoder)
        probe = self._ids.get(key)
        if probe is None:
            free = set(range(FIRST_CALL_PROBE, CALIBRATION_PROBE)) - set(self._ids.values())
            if not free:
                raise SurroundingsError(
                    f"more than {CALIBRATION_PROBE - FIRST_CALL_PROBE} probes; trace fewer functions or servers"
                )
            probe = self._ids[key] = min(free)
            info = ProbeInfo(
                probe, resolution.function, CALL, "uprobe", resolution.decoder.fields, attachment.symbol,
                resolution.library or target.exe, attachment.build_id, resolution.reason,
            )  # fmt: skip
            self.probes.append(info)
        return probe

    def _describe(self, probe: int, *, also: Resolution) -> None:
        """Say at a probe that it stands for another function too (inlined into it, or another name of it)."""
        index = next(index for index, info in enumerate(self.probes) if info.id == probe)
        info = self.probes[index]
        text = f"also stands for {also.function}: {also.reason}" if also.reason else f"also named {also.function}"
        if text not in info.note:
            self.probes[index] = replace(info, note="; ".join(part for part in (info.note, text) if part))

    def _compile(self, calls: Sequence[CallProbe]) -> None:
        if self._programs and not calls:
            return
        first = not self._programs
        loop_plan = plan_loop() if first else None
        program = Program(
            [*calls, CallProbe(CALIBRATION_PROBE, Decoder("none"))] if first else calls,
            ring_bytes=self.options.ring_bytes,
            min_duration_ns=self.options.min_duration_ns,
            iteration_min_ns=self.options.stall_ns,
            loop=first,
            loop_plan=loop_plan,
            more=self._stack_sources() if first else None,
            loader=self._loader,
        )
        self._loader = None
        self._programs.append(program)
        self._owner = self._owner | {call.probe: program for call in calls}
        self.is_loop_on_demand |= (
            self.options.loop_on_demand and loop_plan is not None and loop_plan.rung == TRACEPOINT_RUNG
        )
        if first:
            self._load_stacks(program)
        if first and not self.is_loop_on_demand:
            try:
                program.attach_loop()
            except SurroundingsError as error:
                self.note(f"event loop iterations are not measured: {error}")
                return
            if program.loop_failure:
                self.note(f"event loops are seen by {program.loop_rung}: {program.loop_failure}")
            self._set_loop_rung(program.loop_rung)

    def _stack_sources(self) -> MoreSources | None:
        try:
            return stack_sources() if self.options.stacks is not None else None
        except SurroundingsError as error:
            self.note(f"stacks are not sampled: {error}")
            return None

    def _load_stacks(self, program: Program) -> None:
        if self.options.stacks is None or not program.has("stack_samples"):
            return
        try:
            self.stacks = StackCapture(program, self.options.stacks, self.options.stall_ns)
        except SurroundingsError as error:
            self.note(f"stacks are not sampled: {error}")
            return
        self.probes.append(stack_probe(self.options.stacks))

    def _set_loop_rung(self, rung: str) -> None:
        self.loop_rung = rung
        self.probes = [replace(info, rung=rung) if info.kind in (ITERATION, ACCEPT) else info for info in self.probes]

    def _attach(self, target: Target, plan: Sequence[Place]) -> None:
        places = [place for place in plan if not place.on_demand]
        failures = self.standing.add(target.pid, places)
        for text in failures:
            self.note(text)
        if failures and len(failures) == len(plan):
            self.standing.remove(target.pid)
            raise SurroundingsError(failures[0])
        with self._lock:
            mine = {place.probe for place in plan}
            self.probes = [
                replace(info, pids=(*info.pids, target.pid))
                if info.id in mine and target.pid not in info.pids
                else info
                for info in self.probes
            ]
        self.base.watch_loop(target.pid)
        if self.stacks is not None:
            try:
                self.stacks.take_up(target.pid)
            except SurroundingsError as error:
                self.note(str(error))
        self.targets[target.pid] = target
        for text in self.on_demand.add(target.pid, [place for place in plan if place.on_demand]):
            self.note(text)
        self._preparing -= {place.probe for place in plan}


def _identity(attachment: Attachment) -> str:
    """Return what tells a file's code from any other's: its build-id, or where it lies when it has none."""
    if attachment.build_id:
        return attachment.build_id
    status = os.stat(attachment.path)
    return f"{status.st_dev}:{status.st_ino}:{status.st_mtime_ns}"


def _fixed_probes(options: TraceOptions) -> list[ProbeInfo]:
    sampled = f"sampled every {format_duration_ns(options.sample_ns)}"
    return [
        ProbeInfo(ITERATION_PROBE, "event loop iteration", ITERATION, TRACEPOINT_RUNG, ITERATION_FIELDS),
        ProbeInfo(ACCEPT_PROBE, "accept", ACCEPT, TRACEPOINT_RUNG, ACCEPT_FIELDS),
        ProbeInfo(QUEUE_PROBE, "accept queue", QUEUE, f"sock_diag, {sampled}", QUEUE_FIELDS),
        ProbeInfo(COUNTER_PROBE, "kernel counter", COUNTER, f"/proc/PID/net/netstat, {sampled}", COUNTER_FIELDS),
    ]


def _under_way(
    unfinished: npt.NDArray[np.void], ended_ns: int, stall_ns: int
) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
    """Return the spans that were really under way at the end, and the calls that were left behind.

    An iteration counts once it is a stall. A call in a thread whose event loop iteration began after it
    was left behind by longjmp: that thread is elsewhere.
    """
    iterations = unfinished[unfinished["probe"] == ITERATION_PROBE]
    calls = unfinished[unfinished["probe"] != ITERATION_PROBE]
    began_ns = {int(row["tid"]): int(row["start_ns"]) for row in iterations}
    alive = np.array([int(row["start_ns"]) >= began_ns.get(int(row["tid"]), 0) for row in calls], bool)
    long_enough = np.array([ended_ns - int(row["start_ns"]) >= stall_ns for row in iterations], bool)
    return np.concatenate([calls[alive], iterations[long_enough]]), calls[~alive]
