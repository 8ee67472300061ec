"""The traced servers of a recording or a watch: attach, poll, sample, follow restarts, take the last state."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallscope.tracer.boundary import Boundary, Moment, begun_at, take_moment, with_end
from stallscope.tracer.capture.backlog import BacklogSampler
from stallscope.tracer.capture.cost import measure_call_cost_ns, measure_system_call_ns, own_cpu_ns
from stallscope.tracer.capture.listener_program import COUNTED
from stallscope.tracer.capture.namespace import COUNTER_NAMES
from stallscope.tracer.capture.preflight import require_capture
from stallscope.tracer.capture.probe_ids import FIRST_CALL_PROBE, ITERATION_PROBE, MAX_PROBES, STACK_PROBE
from stallscope.tracer.capture.redis_target import (
    Target,
    find_by_port,
    listening_ports,
    open_target,
    pids_listening_on,
    server_information,
)
from stallscope.tracer.capture.row_counts import first_of_each_probe, without_finished
from stallscope.tracer.capture.trace_options import TraceOptions
from stallscope.tracer.capture.traced import TracedSet
from stallscope.tracer.errors import StallscopeError, TargetError
from stallscope.tracer.layout import UNFINISHED_NS
from stallscope.tracer.manifest import Manifest, NamespaceInfo, ProbeCounters, TargetInfo
from stallscope.tracer.recording import empty_events, joined_events
from stallscope.tracer.stack_table import StackTable

READ_NS = 50_000_000
"""How often waiting records are fetched; nobody is woken for them."""

TOGETHER_NS = 2_000_000
"""What is due so soon is done now: a process that wakes up less often costs the machine less."""

_MARK_TRIES = 20

_SEARCH_NS = 250_000_000
"""How often a server that went away is looked for again on its port."""


@dataclass(frozen=True)
class SessionOptions:
    """Which servers to trace, and how.

    Attributes:
        pids: processes to trace; ports: ports whose servers to trace, found again when they restart.
        any_program: accept processes that are no Redis server.
        password: for INFO, "" for none.
        command: the command line, kept in the recording.
    """

    pids: tuple[int, ...]
    ports: tuple[int, ...]
    trace: TraceOptions
    any_program: bool = False
    password: str = ""
    command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mark(Boundary):
    """A boundary at this very moment, with all that a part of the session needs to be exact to the call.

    Attributes:
        unfinished: the spans under way (dtype ``EVENT``).
        awaited: how many records of each probe were sent up to it and come with the next polls, shape (MAX_PROBES,).
        sampled: the last samples up to it; like those of ``poll`` they are returned once.
        own_cpu_ns: CPU time of this process.
    """

    unfinished: npt.NDArray[np.void]
    awaited: npt.NDArray[np.int64]
    sampled: npt.NDArray[np.void]
    own_cpu_ns: int


@dataclass
class Progress:
    """What a progress line shows; updated once a second.

    Attributes:
        elapsed_ns: since the recording began.
        calls: calls recorded or counted; stalls: iterations over the threshold.
        longest_stall_ns: 0 while there was none; a stall under way counts.
        overflows: ListenOverflows since the start, of all namespaces watched.
        hits: calls, iterations and accepts seen; lost: those of them that could not be kept.
        traced_share: estimated share of time the probes took from the traced processes.
        own_share: CPU share of this process.
    """

    elapsed_ns: int = 0
    calls: int = 0
    stalls: int = 0
    longest_stall_ns: int = 0
    overflows: int = 0
    lost: int = 0
    hits: int = 0
    traced_share: float = 0.0
    own_share: float = 0.0
    notes: list[str] = field(default_factory=list)


class Session:
    """Servers that are being traced: attached when it is made, polled by whoever owns it."""

    def __init__(self, options: SessionOptions) -> None:
        """Find the servers, compile, and attach.

        Raises:
            SurroundingsError: this machine, process or binary cannot be traced; nothing stays attached.
        """
        require_capture()
        self.options = options
        self.progress = Progress()
        self._wanted_ports: set[int] = set()
        self._targets: dict[int, TargetInfo] = {}
        self._port_of: dict[int, int] = {}
        self._call_cost_ns = self._system_call_cost_ns = 0.0
        self._starts: dict[int, Moment] = {}
        self._rows = np.zeros(MAX_PROBES, np.int64)
        self._traced = TracedSet(options.trace)
        self._sampler = BacklogSampler()
        try:
            before_ns = measure_system_call_ns()
            self.started_ns = self._add(self._open_all())
            self.attached_ns = time.monotonic_ns()
            self._wall_offset_ns = time.time_ns() - self.attached_ns
            self._cpu_ns = own_cpu_ns()
            self._system_call_cost_ns = max(measure_system_call_ns() - before_ns, 0.0)
            self._call_cost_ns = measure_call_cost_ns(self._traced.base)
        except BaseException:
            self.close()
            raise
        self._next_sample = self._next_search = self._next_read = time.monotonic_ns()

    @property
    def due_ns(self) -> int:
        """When ``poll`` has something to do again, CLOCK_MONOTONIC."""
        return min(self._next_sample, self._next_read)

    @property
    def has_servers(self) -> bool:
        """Whether a server is traced, or looked for on its port."""
        return bool(self._traced.targets or self._wanted_ports)

    def poll(self, now_ns: int) -> list[npt.NDArray[np.void]]:
        """Do what is due (sample the queues, fetch records, look for servers); returns new rows, dtype ``EVENT``."""
        rows: list[npt.NDArray[np.void]] = []
        sample_ns = self.options.trace.sample_ns
        soon_ns = now_ns + min(TOGETHER_NS, sample_ns // 4)
        if soon_ns >= self._next_sample:
            self._next_sample = max(self._next_sample + sample_ns, now_ns)
            rows.append(self._sampler.sample(now_ns))
            self._follow_listeners()
        if soon_ns >= self._next_read or self._traced.is_filling:
            self._next_read = now_ns + READ_NS
            rows.append(self._look_at(self._traced.read()))
            rows.append(self._take_stacks())
        if now_ns >= self._next_search:
            self._next_search = now_ns + _SEARCH_NS
            self._follow_targets()
            self._traced.keep_loop_whole()
        return rows

    def counters(self, now_ns: int) -> dict[int, ProbeCounters]:
        """Return the in-kernel counters, having updated the progress from them."""
        counters = self._traced.counters()
        self._show(counters, now_ns)
        return counters

    def finish(self, ended_by: str) -> tuple[npt.NDArray[np.void], dict[int, ProbeCounters], Manifest]:
        """Take the last state of everything and detach; ``close`` is still to be called.

        Returns:
            The last rows (dtype ``EVENT``), the final counters, and the manifest of the finished recording.
        """
        self._ask_servers("_end")
        used_ns = own_cpu_ns() - self._cpu_ns
        # the last sample, the kernel's counters and ours at one moment: detaching takes tenths of a second
        sampled = self._sampler.sample(time.monotonic_ns())
        namespaces = self._finished_namespaces()
        if self._traced.stacks is not None:  # before all else, so that no sample is later than the recording
            self._traced.stacks.stop(time.monotonic_ns())
        ended_ns, unfinished, counters = self._traced.stop()
        # calls went on until they were detached: only what was counted is kept, so rows and counters agree exactly
        late = self._traced.read()
        counted = self._look_at(late[first_of_each_probe(late, self._awaited(counters))])
        stacks = self._take_stacks(is_last=True)
        self._show(counters, ended_ns)
        manifest = replace(
            self.manifest(),
            namespaces=namespaces,
            ended_ns=ended_ns,
            wall_offset_end_ns=time.time_ns() - time.monotonic_ns(),
            ended_by=ended_by,
            cost=self._cost(counters, ended_ns - self.started_ns, used_ns),
        )
        return joined_events([sampled, counted, stacks, without_finished(unfinished, counted)]), counters, manifest

    @property
    def stacks(self) -> StackTable | None:
        """What the ``stack`` numbers of stack samples mean, for whoever writes the rows; it grows."""
        return self._traced.stacks.table if self._traced.stacks is not None else None

    def unfinished(self) -> npt.NDArray[np.void]:
        """Return the calls and stalls that are under way (dtype ``EVENT``), as a recording that ends now holds them."""
        return self._traced.unfinished(time.monotonic_ns())

    def mark(self) -> Mark:
        """Return the state at this moment; a part of the session may begin or end here.

        A call that begins between two readings would be counted and not be under way: it is tried again until none
        did, for as long as calls leave room for it.
        """
        sampled = self._sampler.sample(time.monotonic_ns())
        moment = self._moment()
        for _ in range(_MARK_TRIES):
            before = self._traced.counters()
            time_ns, unfinished, counters = self._traced.state()
            if all(counter.hits == before[probe].hits for probe, counter in counters.items()):
                break
        return Mark(time_ns, counters, moment, unfinished, self._awaited(counters), sampled, own_cpu_ns())

    def part(self, start: Mark, end: Mark | None = None, counters: dict[int, ProbeCounters] | None = None) -> Manifest:
        """Return the manifest of the part of this session between two marks, or of one that has not ended.

        Args:
            counters: what was counted in it; for the cost.
        """
        starts = self._starts | dict.fromkeys(start.moment.kernel, start.moment)
        manifest = begun_at(self.manifest(), start.time_ns, starts)
        if end is None:
            return manifest
        known = [info for info in manifest.namespaces if info.inode in end.moment.kernel]
        used_ns = end.own_cpu_ns - start.own_cpu_ns
        return replace(
            manifest,
            namespaces=tuple(with_end(info, starts[info.inode], end.moment) for info in known),
            ended_ns=end.time_ns,
            wall_offset_end_ns=time.time_ns() - time.monotonic_ns(),
            cost=self._cost(counters or {}, end.time_ns - start.time_ns, used_ns),
        )

    def close(self) -> None:
        """Detach and free everything; may be called more than once."""
        self._traced.close()
        self._sampler.close()

    def manifest(self) -> Manifest:
        """Return what is known so far about what is traced, as a recording carries it."""
        options = self.options.trace
        sampled = self._traced.probes[2].rung
        return Manifest(
            started_ns=self.started_ns,
            wall_offset_ns=self._wall_offset_ns,
            probes=tuple(self._traced.probes),
            targets=tuple(self._targets.values()),
            listeners=tuple(self._sampler.listeners),
            namespaces=tuple(self._sampler.namespaces),
            min_duration_ns=options.min_duration_ns,
            stall_ns=options.stall_ns,
            sample_ns=options.sample_ns,
            rungs={
                "functions": "uprobe",
                "event loop": self._traced.loop_rung or "not measured",
                **({"stacks": self._traced.stack_rung} if options.stacks is not None else {}),
                "accept queue": sampled,
                "overflows": self._traced.listener_rung or sampled.replace("sock_diag, ", "") + ", not per event",
            },
            counter_names=COUNTER_NAMES,
            command=self.options.command,
            host={
                "name": platform.node(),
                "kernel": platform.release(),
                "machine": platform.machine(),
                "cpus": str(os.cpu_count() or 0),
                "cpu": _cpu_model(),
            },
            notes=tuple(self._traced.notes),
        )

    def _moment(self) -> Moment:
        def kernel() -> dict[int, dict[str, int]]:
            inodes = [info.inode for info in self._sampler.namespaces]
            return dict(zip(inodes, self._sampler.counters_now(), strict=True))

        names = COUNTED if self._traced.listener_rung else ()
        return take_moment(kernel, lambda watched: self._traced.counted_requests(watched=watched), names)

    def _finished_namespaces(self) -> tuple[NamespaceInfo, ...]:
        end = self._moment()
        return tuple(with_end(info, self._starts[info.inode], end) for info in self._sampler.namespaces)

    def _look_at(self, events: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """Return the events, having taken from them what the progress line shows."""
        durations = events["duration_ns"][
            (events["probe"] == ITERATION_PROBE) & (events["duration_ns"] != UNFINISHED_NS)
        ]
        if durations.size:
            self.progress.stalls += int(durations.size)
            self.progress.longest_stall_ns = max(self.progress.longest_stall_ns, int(durations.max()))
        self._rows += np.bincount(events["probe"], minlength=MAX_PROBES)
        return events

    def _awaited(self, counters: Mapping[int, ProbeCounters]) -> npt.NDArray[np.int64]:
        """Return how many records of each probe were sent and have not been returned, shape (MAX_PROBES,)."""
        sent = np.zeros(MAX_PROBES, np.int64)
        for probe, counter in counters.items():
            sent[probe] = counter.sent
        return np.maximum(sent - self._rows, 0)

    def _take_stacks(self, *, is_last: bool = False) -> npt.NDArray[np.void]:
        """Return the rows of the stack samples that were unwound meanwhile, or all that are left."""
        stacks = self._traced.stacks
        if stacks is None:
            return empty_events()
        rows, notes = stacks.finish() if is_last else stacks.take()
        for text in notes:
            self._traced.note(text)
        return rows

    def _show(self, counters: dict[int, ProbeCounters], now_ns: int) -> None:
        """Update the progress."""
        progress = self.progress
        calls = [counter for probe, counter in counters.items() if probe >= FIRST_CALL_PROBE]
        progress.calls = sum(counter.hits for counter in calls)
        # a sample that is lost is no event that is missing
        events = [counter for probe, counter in counters.items() if probe != STACK_PROBE]
        progress.hits = sum(counter.hits for counter in events)
        progress.lost = sum(counter.missing for counter in events)
        progress.overflows = self._sampler.overflows()
        progress.elapsed_ns = max(now_ns - self.started_ns, 1)
        progress.traced_share = progress.calls * self._call_cost_ns / progress.elapsed_ns
        progress.own_share = (own_cpu_ns() - self._cpu_ns) / progress.elapsed_ns
        progress.notes = [note.text for note in self._traced.notes]

    def _cost(self, counters: dict[int, ProbeCounters], elapsed_ns: int, used_ns: int) -> dict[str, float]:
        """Return what tracing cost; keys carry their units."""
        hits = sum(counter.hits for probe, counter in counters.items() if probe >= FIRST_CALL_PROBE)
        return {
            "call_cost_ns": self._call_cost_ns,
            "system_call_cost_ns": self._system_call_cost_ns,
            "calls_traced": float(hits),
            "traced_process_ns": hits * self._call_cost_ns,
            "own_cpu_ns": float(used_ns),
            "elapsed_ns": float(elapsed_ns),
        }

    def _open_all(self) -> list[Target]:
        pids = list(self.options.pids)
        for port in self.options.ports:
            found = find_by_port(port)
            self._port_of |= dict.fromkeys(found, port)
            pids += found
        targets: list[Target] = []
        try:
            for pid in dict.fromkeys(pids):
                targets.append(open_target(pid, any_program=self.options.any_program))
        except StallscopeError:
            for target in targets:
                target.close()
            raise
        return targets

    def _add(self, targets: Sequence[Target]) -> int:
        """Watch the listeners of processes and attach to them; returns when attaching began, CLOCK_MONOTONIC ns."""
        self._traced.prepare(targets)
        self._traced.attach_listener()
        return self._admit(targets)

    def _admit(self, targets: Sequence[Target]) -> int:
        """Do so with processes that are prepared."""
        namespaces = [self._sampler.add_target(target.pid) for target in targets]
        for info in self._sampler.namespaces:
            if info.inode not in self._starts:
                start = self._starts[info.inode] = self._moment()
                self._sampler.count_from(info.index, dict(start.kernel[info.inode]))
        self._follow_listeners()
        began_ns = time.monotonic_ns()
        self._traced.attach(targets)
        for target, namespace in zip(targets, namespaces, strict=True):
            self._targets[target.pid] = TargetInfo(
                target.pid, began_ns, target.exe, target.image.exe.build_id, target.product,
                target.version, target.allocator, namespace,
            )  # fmt: skip
        self._ask_servers("")
        return began_ns

    def _follow_listeners(self) -> None:
        """Watch the listeners that were opened, and forget those that were closed."""
        for listener in self._sampler.take_closed():
            self._traced.unwatch_listener(listener)
        for listener in self._sampler.take_opened():
            self._traced.watch_listener(listener)

    def _follow_targets(self) -> None:
        """Let go of servers that ended, and take up those that came back on a wanted port."""
        for pid, target in list(self._traced.targets.items()):
            if target.is_running():
                continue
            self._traced.remove(pid)
            self._sampler.remove_target(pid)
            self._targets[pid] = replace(self._targets[pid], end_ns=time.monotonic_ns())
            self._traced.note(f"process {pid} ({target.exe}) ended or was replaced")
            port = self._port_of.pop(pid, None)
            if port is not None and not any(other == port for other in self._port_of.values()):
                self._wanted_ports.add(port)
        for port in list(self._wanted_ports):
            self._take_up(port)

    def _take_up(self, port: int) -> None:
        for pid in pids_listening_on(port):
            if pid in self._traced.targets:
                continue
            try:
                target = open_target(pid, any_program=self.options.any_program)
            except TargetError:
                continue  # gone again, or not ready
            try:
                self._add([target])
            except StallscopeError as error:
                is_running = target.is_running()
                target.close()
                if not is_running:
                    continue
                self._traced.note(f"process {pid} on port {port} is not traced: {error}")
                self._wanted_ports.discard(port)
                continue
            self._wanted_ports.discard(port)
            self._port_of[pid] = port
            self._traced.note(f"process {pid} ({self._targets[pid].exe}) took over port {port} and is traced")

    def _ask_servers(self, suffix: str) -> None:
        """Ask the servers about themselves, in threads: one that is stalled must not hold up the recording."""
        for pid, info in self._targets.items():
            if not info.product or info.end_ns or (not suffix and info.info):
                continue
            thread = threading.Thread(target=self._ask_server, args=(pid, suffix), daemon=True)
            thread.start()
            if suffix:
                thread.join(1.0)

    def _ask_server(self, pid: int, suffix: str) -> None:
        port = min(listening_ports(pid), default=0)
        if not port:
            return
        found = server_information(pid, port, self.options.password)
        info = self._targets.get(pid)
        if info is not None:  # else it ended meanwhile
            self._targets[pid] = replace(
                info, info=info.info | {f"{name}{suffix}": value for name, value in found.items()}
            )


@cache
def _cpu_model() -> str:
    """Return the model of the first CPU, "" where the kernel does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
