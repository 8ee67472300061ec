"""The programs that time functions and event loops: compiled as one set, attached, read while spans are under way."""

from __future__ import annotations

import platform
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stallscope.probes.catalogue import Decoder
from stallscope.tracer.capture.bcc_library import tracing_prefixes
from stallscope.tracer.capture.bpf import (
    BpfMap,
    attach_kprobe,
    attach_raw_tracepoint,
    attach_tracing,
    attach_uprobe,
)
from stallscope.tracer.capture.event_loop import SYSTEM_CALLS, LoopPlan
from stallscope.tracer.capture.frames import has_left
from stallscope.tracer.capture.listener import FENTRY_RUNG, KPROBE_RUNG
from stallscope.tracer.capture.loaded_programs import U32, LoadedPrograms, join_sources
from stallscope.tracer.capture.loader import KPROBE, RAW_TRACEPOINT, TRACING, UPROBE, Loader
from stallscope.tracer.capture.probe_ids import (
    ACCEPT_PROBE,
    ITERATION_PROBE,
)
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.layout import EVENT, NO_STACK, UNFINISHED_NS, struct_dtype

_MACHINE = "x86_64"
_ENTER, _RETURN = "call_enter_{}", "call_return_{}"
_LOOP = "loop_{}"
_LOOP_TRACEPOINTS = ("sys_enter", "sys_exit")
_MAX_LOOPS = 256
_MAX_CALLS_IN_PROGRESS = 8192


@dataclass(frozen=True)
class CallProbe:
    """A function to compile programs for: its id in the probe list and how to read its arguments."""

    probe: int
    decoder: Decoder


@dataclass(frozen=True)
class MoreSources:
    """What joins a set of programs behind its own sources: file names, compiler flags, programs by kind, maps."""

    names: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    programs: Mapping[str, str] = field(default_factory=dict)
    maps: tuple[str, ...] = ()


class Program(LoadedPrograms):
    """The programs that time functions and event loops.

    Attributes:
        loop_rung: how the event loop is seen: ``fentry``, ``kprobe`` or ``raw tracepoint``; "" while it is not.
        loop_failure: why it is not seen as planned, "" when it is.
    """

    def __init__(
        self,
        calls: Sequence[CallProbe],
        *,
        ring_bytes: int,
        min_duration_ns: int,
        iteration_min_ns: int,
        loop: bool = True,
        loop_plan: LoopPlan | None = None,
        more: MoreSources | None = None,
        loader: Loader | None = None,
    ) -> None:
        """Compile and load the probes; nothing is attached yet.

        Args:
            calls: functions to compile an entry and a return program for.
            ring_bytes: size of the ring buffer, a power of two and a multiple of the page size.
            min_duration_ns: shorter calls are counted and not sent.
            iteration_min_ns: shorter event loop iterations are counted and not sent.
            loop: compile the event loop's programs too.
            loop_plan: how the event loop is to be seen; by raw tracepoints when None.
            more: sources that use the maps of these, to be compiled with them.
            loader: one that was started earlier, to save its start.

        Raises:
            SurroundingsError: bcc is missing or cannot compile here, or the machine is not x86-64.
        """
        if platform.machine() != _MACHINE:
            raise SurroundingsError(f"stallscope traces x86-64 only; this machine is {platform.machine()}")
        self.loop_rung = self.loop_failure = ""
        self._loop_plan = loop_plan or LoopPlan()
        self._loop_handles: list[int] = []
        flags = [
            f"-DMAX_CALLS_IN_PROGRESS={_MAX_CALLS_IN_PROGRESS}",
            f"-DMIN_DURATION_NS={min_duration_ns}ULL",
            f"-DITERATION_MIN_NS={iteration_min_ns}ULL",
            f"-DMAX_LOOPS={_MAX_LOOPS}",
            f"-DPROBE_ITERATION={ITERATION_PROBE}",
            f"-DPROBE_ACCEPT={ACCEPT_PROBE}",
            *(f"-DSYS_{name}={number}" for name, number in SYSTEM_CALLS.items()),
        ]
        added = more or MoreSources()
        programs = {name.format(call.probe): UPROBE for call in calls for name in (_ENTER, _RETURN)}

        def load(loader: Loader | None) -> None:
            hooks = self._loop_hooks() if loop else []
            fentry = self._loop_plan.rung == FENTRY_RUNG
            hooked = {name: TRACING if fentry else KPROBE for *_, name in hooks}
            tracepoints = dict.fromkeys(map(_LOOP.format, _LOOP_TRACEPOINTS), RAW_TRACEPOINT) if loop else {}
            text = join_sources(
                ["calls.bpf.c", *(["loop.bpf.c"] if loop else []), *added.names],
                [*_instances(calls), *_hook_lines(hooks)],
            )
            super(Program, self).__init__(
                text, [*flags, *added.flags, f"-DBY_FENTRY={int(fentry)}"],
                programs | hooked | tracepoints | dict(added.programs),
                ["calls_in_progress", *(["loops"] if loop else []), *added.maps],
                ring_bytes=ring_bytes, loader=loader,
            )  # fmt: skip

        try:
            load(loader)
        except SurroundingsError as error:
            if self._loop_plan.rung != FENTRY_RUNG:
                raise
            # bcc attaches fentry while it compiles: a kernel that refuses must not end it all
            self.loop_failure = str(error)
            self._loop_plan = LoopPlan()
            load(None)
        fds = self._loaded.maps
        self._calls = BpfMap(fds["calls_in_progress"], struct_dtype("frame"), EVENT)
        self._loops = BpfMap(fds["loops"], U32, struct_dtype("loop_state")) if loop else None

    def attach_call(self, probe: int, path: str, offset: int, pid: int) -> tuple[int, int]:
        """Attach entry and return of a function in one process; returns handles for ``detach``.

        The return goes first: of a call that is entered between the two, only the return is seen, which
        counts as unpaired. The other way round it would seem under way for ever. A call that is under way
        already is not seen at all.

        Args:
            probe: id given in ``calls``.
            path: file that holds the function; offset: its place in that file, bytes.
            pid: the process to probe (all its threads).

        Raises:
            SurroundingsError: the kernel refuses.
        """
        returned = self._keep(attach_uprobe(self.program(_RETURN.format(probe)), path, offset, pid, is_return=True))
        try:
            program = self.program(_ENTER.format(probe))
            return self._keep(attach_uprobe(program, path, offset, pid, is_return=False)), returned
        except SurroundingsError:
            self.detach(returned)
            raise

    def detach_all(self) -> None:
        """Let go of every attachment; the maps stay readable."""
        self._loop_handles.clear()
        super().detach_all()

    def attach_loop(self) -> None:
        """Begin to see the event loops of the watched threads, on the best rung that attaches.

        An iteration that is under way is not seen; ``watch_loop`` can tell when it began.

        Raises:
            SurroundingsError: the kernel refuses even raw tracepoints.
        """
        try:
            for _, function, is_return, name in self._loop_hooks():
                program = self.program(name)
                if self._loop_plan.rung == FENTRY_RUNG:
                    handle = attach_tracing(program, function)
                else:
                    handle = attach_kprobe(program, function, is_return=is_return)
                self._loop_handles.append(self._keep(handle))
        except SurroundingsError as error:
            self.detach_loop()
            self.loop_failure = str(error)
            self._loop_plan = LoopPlan()
        if not self._loop_handles:
            for tracepoint in _LOOP_TRACEPOINTS:
                handle = attach_raw_tracepoint(self.program(_LOOP.format(tracepoint)), tracepoint)
                self._loop_handles.append(self._keep(handle))
        self.loop_rung = self._loop_plan.rung

    def detach_loop(self) -> None:
        """Stop seeing event loops, at no cost to anyone from then on; ``attach_loop`` begins again.

        Which threads are watched is kept, what was under way is not: nobody would see it end.
        """
        handles, self._loop_handles = self._loop_handles, []
        self.detach_many(handles)
        self.loop_rung = ""
        if self._loops is not None:
            loops = BpfMap(self._loops.fd, U32, struct_dtype("loop_state"))  # its own, for another thread
            for tid, _ in loops.items():
                loops.update(tid, np.zeros(1, struct_dtype("loop_state"))[0])

    def keep_loop_whole(self) -> bool:
        """Go over to raw tracepoints once kprobes missed something; returns whether that was done.

        A kretprobe follows few calls at a time (Linux kernel/kprobes.c, maxactive: 10, or twice the CPUs),
        and threads of other processes may sit in epoll_wait for hours: then returns are missed, and counted.
        """
        if self.loop_rung != KPROBE_RUNG:
            return False
        if not any(counter.lost_starts for counter in self.counters((ITERATION_PROBE, ACCEPT_PROBE)).values()):
            return False
        self.detach_loop()
        self._loop_plan = LoopPlan()
        self.attach_loop()
        return True

    def watch_loop(self, tid: int, since_ns: int = 0) -> None:
        """Follow the event loop that this thread runs, from its next wait on.

        Args:
            tid: the thread.
            since_ns: when the iteration that is under way began, CLOCK_MONOTONIC, if that is known: then its
                row comes too, with this start and the exact end. Call it after ``attach_loop``, and see
                afterwards that the thread has not made progress in between (``Watchdog.is_still``); if it
                has, a row with exactly this start is to be left out.
        """
        if self._loops is not None:
            state = np.zeros(1, struct_dtype("loop_state"))[0]
            state["wait_end_ns"] = since_ns
            self._loops.update(tid, state)

    def unwatch_loop(self, tid: int) -> None:
        """Stop following the thread's event loop; unknown threads are ignored."""
        if self._loops is not None:
            self._loops.delete(tid)

    def iterations_under_way(self) -> list[tuple[int, int]]:
        """Return (thread, start) of the event loop iterations that have not ended, CLOCK_MONOTONIC ns."""
        loops = self._loops.items(_MAX_LOOPS) if self._loops is not None else ()
        return [(int(tid), int(states[0]["wait_end_ns"])) for tid, states in loops if states[0]["wait_end_ns"]]

    def calls_under_way(self) -> npt.NDArray[np.void]:
        """Return the calls that were entered and have not returned (dtype ``EVENT``), also those left by longjmp."""
        return np.concatenate([np.zeros(0, EVENT), *(call for _, call in self._calls.items())])

    def forget_calls(self, probes: Collection[int], pid: int = 0) -> int:
        """Forget calls under way of probes that are detached, of one process or all; returns how many there were.

        Nobody will see them return, and they would keep their places for ever.
        """
        calls = BpfMap(self._calls.fd, struct_dtype("frame"), EVENT)  # its own, for another thread
        gone = [
            frame for frame, call in calls.items() if int(frame["probe"]) in probes and pid in (0, int(call[0]["pid"]))
        ]
        for frame in gone:
            calls.delete(frame)
        return len(gone)

    def unfinished(self) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
        """Return the calls and iterations that have begun and not ended, and the calls that never will.

        Both have dtype ``EVENT`` and the ``duration_ns`` ``UNFINISHED_NS``. A call never ends whose frame
        the thread has left by longjmp or by ending, and so it is with one nested deeper than the 64
        returns per thread that the kernel follows (Linux include/linux/uprobes.h, MAX_URETPROBE_DEPTH).
        A thread that is running right now cannot be asked: its calls count as not ended.
        """
        parts = [np.zeros(0, EVENT)]
        left = [np.zeros(0, EVENT)]
        # first, so that no call seems older than an iteration that began after it ended
        for tid, states in self._loops.items() if self._loops is not None else ():
            state = states[0]
            if state["wait_end_ns"]:
                iteration = np.zeros(1, EVENT)
                iteration["start_ns"], iteration["tid"], iteration["pid"] = state["wait_end_ns"], tid, tid
                iteration["probe"], iteration["value"] = (
                    ITERATION_PROBE,
                    [(state["ready"], state["accepted"], 0)],
                )
                parts.append(iteration)
        for frame, call in self._calls.items():
            if not has_left(int(call[0]["pid"]), int(frame["tid"]), int(frame["sp"])):
                parts.append(call)
                continue
            still = self._calls.lookup(frame)  # or did it return a moment ago, as calls should?
            if still is not None and still[0] == call[0]:
                left.append(call)
        unfinished, abandoned = np.concatenate(parts), np.concatenate(left)
        for events in (unfinished, abandoned):
            events["duration_ns"] = UNFINISHED_NS
            events["stack"] = NO_STACK
        return unfinished, abandoned

    def _loop_hooks(self) -> list[tuple[str, str, bool, str]]:
        return self._loop_plan.programs(*tracing_prefixes()) if self._loop_plan.calls else []


def _instances(calls: Sequence[CallProbe]) -> list[str]:
    """Return the lines that make an entry and a return program for each function (see calls.bpf.c)."""
    lines = ['#line 1 "calls"']
    for call in calls:
        arguments = ", ".join(str(parameter) for parameter in call.decoder.params)
        lines.append(f"CALL_ENTER({call.probe}, DECODE_{call.decoder.kind}({arguments}))")
        lines.append(f"CALL_RETURN({call.probe}, {int(call.decoder.kind == 'result')})")
    return lines


def _hook_lines(hooks: Sequence[tuple[str, str, bool, str]]) -> list[str]:
    """Return the lines that make a program of each hooked system call (see loop.bpf.c)."""
    kinds = {True: "HOOK_RETURN", False: "HOOK_ENTRY"}
    return ['#line 1 "hooks"', *(f"{kinds[is_return]}({name}, SYS_{call})" for call, _, is_return, name in hooks)]
