"""Rows and counters of a session in, views out: what the last seconds looked like, and totals since the start."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import add

import numpy as np
import numpy.typing as npt

from stallscope.tracer.layout import EVENT, UNFINISHED_NS
from stallscope.tracer.live.functions import FunctionWindow
from stallscope.tracer.live.queues import OverflowWindow, QueueWindow
from stallscope.tracer.live.sliding import SECOND_NS, SlidingCounts
from stallscope.tracer.live.stalls import RecentCalls
from stallscope.tracer.live.view import RECORD_VERSION, BlockedView, LiveView, LoopView, ServerView, StallView
from stallscope.tracer.manifest import CALL, COUNTER, ITERATION, QUEUE, Manifest, ProbeCounters

WINDOW_S = 10
HISTORY_S = 60
KEPT_STALLS = 50
_HISTOGRAM_BUCKETS = 8
_OVERFLOWS = "ListenOverflows"
_SETTLED_NS = 50_000_000
"""Beyond two sampling intervals after a stall, its last queue sample has been fetched as well."""

_NOTHING: npt.NDArray[np.void] = np.zeros(0, EVENT)


@dataclass(frozen=True)
class Cost:
    """What tracing costs, as shares of time: the probes' in the traced processes, and this process's CPU."""

    traced_share: float = 0.0
    own_share: float = 0.0


@dataclass
class _Stall:
    """A stall, with what the samples around it say once they are known."""

    start_ns: int
    end_ns: int
    previous_end_ns: int
    view: StallView
    settled: bool = False


@dataclass(frozen=True)
class _Snapshot:
    """The kernel's counters at one moment, by function and of the event loop."""

    time_ns: int
    functions: Mapping[str, ProbeCounters]
    loop: ProbeCounters

    def of(self, name: str) -> ProbeCounters:
        """Return a function's counters."""
        return self.functions.get(name, ProbeCounters())


class LiveWindow:
    """The last seconds of a session; memory depends on the number of functions and listeners alone."""

    def __init__(self, manifest: Manifest, *, window_s: int = WINDOW_S, history_s: int = HISTORY_S) -> None:
        """Begin with what the session knows at its start."""
        self._window_s, self._history_s = window_s, history_s
        self._manifest = manifest
        self._functions: dict[str, FunctionWindow] = {}
        self._queues: dict[int, QueueWindow] = {}
        self._overflows = OverflowWindow(history_s)
        self._overflows_before = 0
        self._edges = histogram_edges(manifest.stall_ns)
        self._iterations = SlidingCounts(window_s, len(self._edges) + 1)
        self._busy = SlidingCounts(window_s, 1)
        self._stall_count = self._longest_ns = 0
        self._calls = RecentCalls()
        self._stalls: deque[_Stall] = deque(maxlen=KEPT_STALLS)
        self._untold: deque[_Stall] = deque(maxlen=KEPT_STALLS)
        self._worst: _Stall | None = None
        self._snapshots = deque([_Snapshot(manifest.started_ns, {}, ProbeCounters())])
        self.know(manifest)

    def know(self, manifest: Manifest) -> None:
        """Take note of new probes, servers and listeners; rows of probes that are not known yet are left out."""
        self._manifest = manifest
        self._kinds = {kind: _ids(manifest, kind) for kind in (CALL, ITERATION, QUEUE, COUNTER)}
        for probe in manifest.probes:
            if probe.kind == CALL and probe.name not in self._functions:
                self._functions[probe.name] = FunctionWindow(probe.name, self._window_s)
        for listener in manifest.listeners:
            if listener.index not in self._queues:
                self._queues[listener.index] = QueueWindow(listener, self._window_s, self._history_s)
        for namespace in manifest.namespaces:
            self._overflows.start(namespace.index, namespace.counters_start.get(_OVERFLOWS, 0))

    def add(self, rows: npt.NDArray[np.void]) -> None:
        """Take new rows (dtype ``EVENT``), those of a thread in the order of their ends."""
        finished = rows[rows["duration_ns"] != UNFINISHED_NS]
        of_kind = {kind: finished[np.isin(finished["probe"], ids)] for kind, ids in self._kinds.items()}
        self._add_calls(of_kind[CALL])
        for row in of_kind[QUEUE]:
            length_and_limit, _, listener = (int(value) for value in row["value"])
            if listener in self._queues:
                length, limit = length_and_limit & 0xFFFFFFFF, length_and_limit >> 32
                self._queues[listener].add(int(row["start_ns"]), length, limit)
        for row in of_kind[COUNTER]:
            counter, count, namespace = (int(value) for value in row["value"])
            if self._manifest.counter_names[counter] == _OVERFLOWS:
                self._overflows.add(int(row["start_ns"]), namespace, count)
        self._add_iterations(of_kind[ITERATION])

    def view(
        self,
        now_ns: int,
        counters: Mapping[int, ProbeCounters],
        under_way: npt.NDArray[np.void] = _NOTHING,
        cost: Cost | None = None,
        *,
        is_last: bool = False,
    ) -> LiveView:
        """Return the present view; the next one's interval begins here.

        Args:
            now_ns: CLOCK_MONOTONIC, when the counters were read.
            counters: the in-kernel counters by probe id.
            under_way: calls and iterations that have not ended (dtype ``EVENT``).
            is_last: tell also of stalls whose last queue sample is not here yet.
        """
        manifest = self._manifest
        now = self._take_snapshot(now_ns, counters)
        before = self._snapshots[-1]
        interval_ns = max(now_ns - before.time_ns, 1)
        window_from_ns = (now_ns // SECOND_NS - self._window_s) * SECOND_NS
        at_window = min(self._snapshots, key=lambda snapshot: abs(snapshot.time_ns - window_from_ns))
        blocked = self._blocked(now_ns, under_way)
        cost = cost or Cost()
        self._settle(now_ns)
        overflows_before, self._overflows_before = self._overflows_before, self._overflows.total
        view = LiveView(
            version=RECORD_VERSION,
            wall_ns=now_ns + manifest.wall_offset_ns,
            elapsed_ns=now_ns - manifest.started_ns,
            interval_ns=interval_ns,
            window_s=self._window_s,
            stall_ns=manifest.stall_ns,
            min_duration_ns=manifest.min_duration_ns,
            servers=tuple(
                ServerView(target.pid, target.product, target.version, target.exe, bool(target.end_ns))
                for target in manifest.targets
            ),
            loop=self._loop(now, before, at_window, max(window_from_ns, manifest.started_ns), blocked),
            functions=tuple(
                function.view(now_ns, now.of(name), before.of(name), at_window.of(name), interval_ns)
                for name, function in self._functions.items()
            ),
            listeners=tuple(queue.view(now_ns) for queue in self._queues.values() if queue.is_open(now_ns)),
            overflows=self._overflows.total,
            overflows_in_interval=self._overflows.total - overflows_before,
            overflow_history=self._overflows.by_second(now_ns),
            blocked=blocked,
            recent_stalls=tuple(stall.view for stall in reversed(self._stalls)),
            worst_stall=self._worst.view if self._worst else None,
            stalls=tuple(self._tell(is_last=is_last)),
            lost=sum(counter.missing for counter in counters.values()),
            traced_share=cost.traced_share,
            own_share=cost.own_share,
            notes=tuple(note.text for note in manifest.notes),
        )
        self._snapshots.append(now)
        while self._snapshots[0].time_ns < window_from_ns - SECOND_NS:
            self._snapshots.popleft()
        return view

    def _add_calls(self, calls: npt.NDArray[np.void]) -> None:
        if not len(calls):
            return
        self._calls.add(calls)
        start, duration = calls["start_ns"].astype(np.int64), calls["duration_ns"].astype(np.int64)
        for name, function in self._functions.items():
            mine = np.isin(calls["probe"], _ids(self._manifest, CALL, name))
            if mine.any():
                function.add(start[mine], duration[mine])

    def _add_iterations(self, rows: npt.NDArray[np.void]) -> None:
        if not len(rows):
            return
        start, duration = rows["start_ns"].astype(np.int64), rows["duration_ns"].astype(np.int64)
        end = start + duration
        self._iterations.add(end, np.searchsorted(self._edges, duration, side="right"))
        self._busy.add(end, np.zeros(len(rows), np.int64), duration)
        self._stall_count += len(rows)
        self._longest_ns = max(self._longest_ns, int(duration.max()))
        for row in rows:
            self._add_stall(int(row["start_ns"]), int(row["duration_ns"]), int(row["pid"]), int(row["tid"]))

    def _add_stall(self, start_ns: int, duration_ns: int, pid: int, tid: int) -> None:
        cause = self._calls.cause(tid, start_ns, start_ns + duration_ns)
        names = {probe.id: probe.name for probe in self._manifest.probes}
        stall = StallView(
            wall_ns=start_ns + self._manifest.wall_offset_ns,
            duration_ns=duration_ns,
            pid=pid,
            cause="" if cause.probe is None else names[cause.probe],
            path=tuple(names[probe] for probe in cause.path),
            cause_calls=cause.calls,
            cause_self_ns=cause.self_ns,
            covered_ns=cause.covered_ns,
            queue_max=None,
            queue_limit=None,
            overflows=0,
        )
        previous = max((one.end_ns for one in self._stalls if one.view.pid == pid), default=0)
        kept = _Stall(start_ns, start_ns + duration_ns, previous, stall)
        self._stalls.append(kept)
        self._untold.append(kept)
        if self._worst is None or duration_ns > self._worst.view.duration_ns:
            self._worst = kept

    def _settle(self, now_ns: int) -> None:
        """Fill in what the samples said of each stall, until the one after its end is surely here."""
        after_ns = self._manifest.sample_ns
        known = [*self._stalls, *self._untold, *([self._worst] if self._worst else [])]
        for stall in {id(one): one for one in known if not one.settled}.values():
            seen = [
                (longest, queue.limit)
                for queue in self._queues.values()
                if queue.info.pid == stall.view.pid
                and (longest := queue.longest_between(stall.start_ns, stall.end_ns + after_ns)) is not None
            ]
            longest, limit = max(seen, key=lambda pair: pair[0] / max(pair[1], 1), default=(None, None))
            since_ns = max(stall.start_ns, stall.previous_end_ns + after_ns)
            overflows = self._overflows.between(since_ns, stall.end_ns + after_ns)
            stall.view = replace(stall.view, queue_max=longest, queue_limit=limit, overflows=overflows)
            stall.settled = now_ns - stall.end_ns > 2 * after_ns + _SETTLED_NS

    def _tell(self, *, is_last: bool) -> Iterable[StallView]:
        while self._untold and (self._untold[0].settled or is_last):
            yield self._untold.popleft().view

    def _loop(
        self,
        now: _Snapshot,
        before: _Snapshot,
        at_window: _Snapshot,
        window_from_ns: int,
        blocked: tuple[BlockedView, ...],
    ) -> LoopView | None:
        if self._manifest.rungs.get("event loop") == "not measured":
            return None
        window_ns = max(now.time_ns - window_from_ns, 1)
        busy_ns = int(self._busy.total(now.time_ns)[0]) + now.loop.short_ns - at_window.loop.short_ns
        busy_ns += sum(min(stall.duration_ns, window_ns) for stall in blocked)
        iterations = now.loop.hits - before.loop.hits
        counts = self._iterations.total(now.time_ns)
        counts[0] += now.loop.short_calls - at_window.loop.short_calls
        return LoopView(
            iterations=now.loop.hits,
            iterations_in_interval=iterations,
            rate_per_s=iterations * 1e9 / max(now.time_ns - before.time_ns, 1),
            busy_share=min(busy_ns / window_ns, float(max(len(self._manifest.targets), 1))),
            stalls=self._stall_count,
            longest_ns=self._longest_ns,
            histogram=tuple(zip((0, *self._edges), counts.tolist(), strict=True)),
        )

    def _blocked(self, now_ns: int, under_way: npt.NDArray[np.void]) -> tuple[BlockedView, ...]:
        """Return the stalls under way, with the calls of their thread, the outermost first."""
        names = {probe.id: probe.name for probe in self._manifest.probes}
        found = []
        for row in under_way[np.isin(under_way["probe"], self._kinds[ITERATION])]:
            start_ns = int(row["start_ns"])
            if now_ns - start_ns < self._manifest.stall_ns:
                continue
            mine = under_way[
                (under_way["tid"] == row["tid"])
                & (under_way["start_ns"] >= row["start_ns"])
                & np.isin(under_way["probe"], self._kinds[CALL])
            ]
            calls = mine[np.argsort(mine["start_ns"], kind="stable")]["probe"]
            found.append(BlockedView(int(row["pid"]), now_ns - start_ns, tuple(names[int(probe)] for probe in calls)))
        return tuple(found)

    def _take_snapshot(self, now_ns: int, counters: Mapping[int, ProbeCounters]) -> _Snapshot:
        functions: dict[str, ProbeCounters] = {}
        loop = ProbeCounters()
        for probe in self._manifest.probes:
            counter = counters.get(probe.id)
            if counter is None:
                continue
            if probe.kind == CALL:
                functions[probe.name] = added(functions.get(probe.name, ProbeCounters()), counter)
            elif probe.kind == ITERATION:
                loop = counter
        return _Snapshot(now_ns, functions, loop)


def histogram_edges(stall_ns: int) -> tuple[int, ...]:
    """Return the lower bounds of the iteration histogram above its first bucket: the threshold, then 1-2-5 steps."""
    edges = [max(stall_ns, 1)]
    power = 1
    while len(edges) < _HISTOGRAM_BUCKETS - 1:
        edges += [step * power for step in (1, 2, 5) if step * power > edges[0]]
        power *= 10
    return tuple(edges[: _HISTOGRAM_BUCKETS - 1])


def added(first: ProbeCounters, second: ProbeCounters) -> ProbeCounters:
    """Return the sum of two probes' counters."""
    return ProbeCounters(*map(add, vars(first).values(), vars(second).values()))


def _ids(manifest: Manifest, kind: str, name: str = "") -> npt.NDArray[np.uint16]:
    """Return the ids of the probes of a kind, or of those with a name."""
    ids = [probe.id for probe in manifest.probes if probe.kind == kind and name in ("", probe.name)]
    return np.array(ids, np.uint16)
