"""The servers of a watch: a session that runs for weeks, waits for servers, and takes them up in the background.

What it keeps is bounded: processes that ended, their listeners, network namespaces, programs of binaries that
nobody executes any more, and notes are forgotten once no recording can need them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stallscope.tracer.boundary import Boundary
from stallscope.tracer.capture.cost import measure_system_call_ns
from stallscope.tracer.capture.discovery import Candidate, Discovery
from stallscope.tracer.capture.probe_ids import STACK_PROBE
from stallscope.tracer.capture.redis_target import Target, listening_ports, open_target, why_hidden
from stallscope.tracer.capture.ring import give_memory_back
from stallscope.tracer.capture.session import TOGETHER_NS, Session, SessionOptions
from stallscope.tracer.capture.standing_loop import StandingLoop
from stallscope.tracer.errors import StallscopeError
from stallscope.tracer.manifest import Manifest, Note
from stallscope.tracer.watch.evaluation import UnderWay
from stallscope.tracer.watch.priority import run_normally

_DISCOVER_NS = 500_000_000
_PRUNE_NS = 5_000_000_000
_MAX_NOTES = 100
_MAX_REFUSED = 1024
CRON = "serverCron"
"""The catalogue's name of the function that the watchdog takes for a second witness."""


@dataclass(frozen=True)
class _Arrival:
    """A server that is made ready to be traced, in a thread."""

    candidate: Candidate
    future: Future[Target]


class WatchedSession(Session):
    """Servers that are watched until the watch is ended; there may be none.

    Attributes:
        arrived: how many servers were taken up after the start.
    """

    def __init__(self, options: SessionOptions, *, all_redis: bool, keep_ns: int, stall_ns: int) -> None:
        """Compile, attach what is on the machine, and go on with what is not there yet.

        Args:
            options: which servers, and how.
            all_redis: watch every server of this machine, also those that come later.
            keep_ns: for how long what has ended may still be needed by a recording.
            stall_ns: how long an iteration must take to be of interest where they are sampled.

        Raises:
            SurroundingsError: this machine cannot be traced, or a process that was named cannot.
        """
        self._all_redis = all_redis
        self._keep_ns = keep_ns
        self._stall_ns = stall_ns
        self._loop: StandingLoop | None = None
        self._ports = set(options.ports)
        self._discovery = Discovery()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="arrivals", initializer=run_normally)
        self._arrivals: list[_Arrival] = []
        self._refused: dict[int, None] = {}
        self._log: deque[Note] = deque()
        self._rows_of_ended: list[npt.NDArray[np.void]] = []
        self._next_discovery = self._next_prune = 0
        self._sampled_ns = 0
        self.is_held = False
        self.arrived = 0
        self._bare_call_ns = measure_system_call_ns()
        super().__init__(options)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    @property
    def due_ns(self) -> int:
        """When ``poll`` has something to do again, CLOCK_MONOTONIC."""
        if not self._traced.targets and not self._arrivals:
            return self._next_search
        due_ns = super().due_ns
        return min(due_ns, self._loop.due_ns) if self._loop is not None else due_ns

    @property
    def has_servers(self) -> bool:
        """Return True: a watch waits for servers."""
        return True

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the processes that are traced now."""
        return tuple(self._traced.targets)

    @property
    def call_cost_ns(self) -> float:
        """Return what one traced call costs on this machine, measured at the start."""
        return self._call_cost_ns

    def unit_costs(self) -> dict[str, float]:
        """Return what one call and one system call cost, keys as in a manifest's cost."""
        return {"call_cost_ns": self._call_cost_ns, "system_call_cost_ns": self._system_call_cost_ns}

    def poll(self, now_ns: int) -> list[npt.NDArray[np.void]]:
        """Do what is due; returns new rows, dtype ``EVENT``, with the calls that ended servers were in last."""
        rows = super().poll(now_ns)
        if self._loop is not None:
            rows = [self._loop.take(part) for part in rows]
            if now_ns + TOGETHER_NS // 2 >= self._loop.due_ns:
                rows.append(self._loop.sample(now_ns))
        if self._arrivals:
            self._welcome()
        ended, self._rows_of_ended = self._rows_of_ended, []
        return [*rows, *ended]

    def under_way(self, *, calls_too: bool) -> list[UnderWay]:
        """Return the event loop iterations, and calls if wanted, that have begun and not ended."""
        spans = self._loop.under_way() if self._loop is not None else []
        if not calls_too:
            return spans
        calls = self._traced.calls_under_way()
        return [
            *spans,
            *(UnderWay(int(c["tid"]), int(c["start_ns"]), int(c["pid"]), int(c["probe"])) for c in calls),
        ]

    def boundary(self) -> Boundary:
        """Return what has been counted until now: a recording may begin or end here."""
        now_ns = time.monotonic_ns()
        counters = self.counters(now_ns)
        moment = self._moment()
        self._sampler.repeat()
        return Boundary(now_ns, counters, moment)

    def manifest(self) -> Manifest:
        """Return what is known now about what is traced."""
        return replace(super().manifest(), notes=tuple(self._log))

    def take_notes(self) -> list[Note]:
        """Return what happened since the last call, and keep it for the recordings."""
        notes, self._traced.notes = self._traced.notes, []
        self._log += notes
        while len(self._log) > _MAX_NOTES:
            self._log.popleft()
        return notes

    def note(self, text: str) -> None:
        """Say something that belongs on the timeline."""
        self._traced.note(text)

    def attach_detail(self) -> int:
        """Attach the probes that are on demand; returns when that was done, CLOCK_MONOTONIC ns."""
        if self._loop is not None:
            self._loop.attach()
        attached_ns, failures = self._traced.on_demand.attach()
        if self._traced.stacks is not None:
            failures = [*failures, *self._traced.stacks.attach(self._traced.targets)]
            attached_ns = time.monotonic_ns()
        for text in dict.fromkeys(failures):
            self.note(text)
        return attached_ns

    def detach_detail(self) -> None:
        """Begin to detach them."""
        self._traced.on_demand.detach()
        if self._traced.stacks is not None:
            self._traced.stacks.detach()
        if self._loop is not None:
            self._loop.detach()

    def attach_standing(self, *, wanted: bool) -> None:
        """Attach or begin to detach the standing probes; what is so already, or is under way, is left."""
        standing = self._traced.standing
        if wanted == standing.is_attached or standing.is_detaching:
            return
        if self._loop is not None:
            self._loop.trust_crons(wanted)
        if not wanted:
            standing.detach()
            return
        for text in dict.fromkeys(standing.attach()[1]):
            self.note(text)

    @property
    def is_detaching(self) -> bool:
        """Return whether that goes on; they cannot be attached meanwhile."""
        return self._traced.on_demand.is_detaching

    @property
    def detail_probes(self) -> tuple[int, ...]:
        """Return the ids of the probes that are on demand."""
        stacks = (STACK_PROBE,) if self._traced.stacks is not None else ()
        return tuple(sorted((*self._traced.on_demand.probes, *stacks)))

    def close(self) -> None:
        """Detach and free everything; may be called more than once."""
        self._pool.shutdown(cancel_futures=True)
        for arrival in self._arrivals:
            if arrival.future.done() and not arrival.future.cancelled() and arrival.future.exception() is None:
                arrival.future.result().close()
        self._arrivals.clear()
        if self._loop is not None:
            self._loop.close()
        super().close()

    def _open_all(self) -> list[Target]:
        return []  # the first set of programs is nobody's, so that every other one can be freed

    def _admit(self, targets: Sequence[Target]) -> int:
        began_ns = super()._admit(targets)
        if self._loop is not None:
            for target in targets:
                self._loop.add(target.pid)
            self._loop.follow(tuple(info.id for info in self._traced.probes if info.name == CRON))
        return began_ns

    def _begin(self) -> None:
        if self._traced.is_loop_on_demand:
            self._traced.attach_loop()
            attached_ns = measure_system_call_ns()
            self._traced.detach_loop()
            self._system_call_cost_ns = max(attached_ns - self._bare_call_ns, 0.0)
        self._loop = StandingLoop(self._traced, self._stall_ns)
        for pid in dict.fromkeys(self.options.pids):
            target = open_target(pid, any_program=self.options.any_program)
            try:
                self._add([target])
            except BaseException:
                target.close()
                raise
            target.image.forget()
            self._ports |= set(sorted(listening_ports(pid))[:1])
        now_ns = time.monotonic_ns()
        self._discover(now_ns)
        for arrival in self._arrivals:
            arrival.future.exception()  # wait: what is there at the start is watched from the start
        self._welcome()
        for port in sorted(self._ports - self._ports_served()):
            hidden = why_hidden(port)
            then = f": {hidden}" if hidden else "; it is traced when it does"
            self.note(f"no Redis or Valkey server listens on port {port} yet{then}")
        self.arrived = 0

    def _ports_served(self) -> set[int]:
        return {listener.port for listener in self._sampler.listeners if listener.pid in self._traced.targets}

    def _take_stacks(self, *, is_last: bool = False) -> npt.NDArray[np.void]:
        rows = super()._take_stacks(is_last=is_last)
        if len(rows):
            self._sampled_ns = time.monotonic_ns()
        return rows

    def _follow_targets(self) -> None:
        now_ns = time.monotonic_ns()
        for pid, target in list(self._traced.targets.items()):
            if target.is_running():
                continue
            ended_ns = time.monotonic_ns()
            self._rows_of_ended.append(self._traced.last_calls(pid))
            self._traced.remove(pid)
            if self._loop is not None:
                self._loop.remove(pid)
            self._sampler.remove_target(pid)
            self._targets[pid] = replace(self._targets[pid], end_ns=ended_ns)
            self.note(f"process {pid} ({target.exe}) ended or was replaced")
        if now_ns >= self._next_discovery:
            self._next_discovery = now_ns + _DISCOVER_NS
            self._discover(now_ns)
        if now_ns >= self._next_prune:
            self._next_prune = now_ns + _PRUNE_NS
            self._prune(now_ns)

    def _discover(self, now_ns: int) -> None:
        arriving = {arrival.candidate.pid for arrival in self._arrivals}
        known = frozenset(self._traced.targets) | arriving | frozenset(self._refused)
        for candidate in self._discovery.look(now_ns, known):
            if self._all_redis or candidate.ports & self._ports:
                future = self._pool.submit(self._make_ready, candidate.pid)
                self._arrivals.append(_Arrival(candidate, future))

    def _make_ready(self, pid: int) -> Target:
        target = open_target(pid, any_program=self.options.any_program)
        try:
            self._traced.prepare([target])
        except BaseException:
            target.close()
            raise
        target.image.forget()
        give_memory_back()
        return target

    def _welcome(self) -> None:
        """Attach to the servers that are ready."""
        for arrival in [arrival for arrival in self._arrivals if arrival.future.done()]:
            self._arrivals.remove(arrival)
            pid, target = arrival.candidate.pid, None
            try:
                target = arrival.future.result()
                self._admit([target])
            except StallscopeError as error:
                is_running = target is None or target.is_running()
                if target is not None:
                    target.close()
                if is_running:
                    self._refused[pid] = None
                    self.note(f"process {pid} is not traced: {error}")
                continue
            self.arrived += 1
            ports = ", ".join(map(str, sorted(arrival.candidate.ports)))
            self.note(f"process {pid} ({target.exe}, port {ports}) is traced")

    def _prune(self, now_ns: int) -> None:
        """Forget what no recording can need any more."""
        while len(self._refused) > _MAX_REFUSED:
            del self._refused[next(iter(self._refused))]
        if self.is_held:
            return
        if self._traced.stacks is not None and now_ns - self._sampled_ns > self._keep_ns:
            self._traced.stacks.renew()
        oldest_ns = now_ns - self._keep_ns
        self._targets = {pid: info for pid, info in self._targets.items() if not 0 < info.end_ns < oldest_ns}
        self._sampler.forget(self._targets, {info.namespace for info in self._targets.values()})
        kept = {info.inode for info in self._sampler.namespaces}
        self._starts = {inode: moment for inode, moment in self._starts.items() if inode in kept}
        self._traced.retire(now_ns, self._keep_ns, self._targets)
        while self._log and self._log[0].time_ns < max(oldest_ns, self.attached_ns):
            self._log.popleft()
