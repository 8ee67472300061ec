"""Everything the page shows, computed from one recording: plain data, no HTML, no browser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stallscope.probes.catalogue import Field
from stallscope.reports.timeline.bands import Band, bands
from stallscope.reports.timeline.calls import (
    CALL_BUDGET,
    Density,
    Heat,
    choose_calls,
    density,
    heat,
    inside_stalls,
    slow_from_ns,
)
from stallscope.reports.timeline.imported import Imported, imported_lanes
from stallscope.reports.timeline.listeners import QueueLane, RateLane, Refusals, queue_lanes, rate_lanes, refusals
from stallscope.reports.timeline.stalls import StallLane, stall_lane
from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.summary import Summary, summarise
from stallscope.tracer.analysis.tables import Ints
from stallscope.tracer.manifest import CALL, ListenerInfo

SLOWEST = 100
"""The table of slowest calls holds so many by latency, and so many by self time."""


@dataclass(frozen=True)
class Server:
    """One traced process, with the name that tells it from the others."""

    pid: int
    name: str


@dataclass(frozen=True)
class Thread:
    """One thread that made calls, with the name that tells it from the others, and its deepest call's depth."""

    tid: int
    pid: int
    name: str
    depth: int


@dataclass(frozen=True)
class Function:
    """One traced function: most self time first in a timeline; ``fields`` are its arguments."""

    name: str
    calls: int
    fields: tuple[Field, ...]


@dataclass(frozen=True)
class Calls:
    """The calls that are drawn one by one, by thread and start, times since the start of the timeline.

    Attributes:
        start_ns, duration_ns, self_ns: of each call; thread, function: index in the timeline's lists.
        parent: index of the caller among these calls, -1: none, or not here.
        depth: number of callers; unfinished: it had not returned when the recording ended.
        arguments: by function and name of the argument, of this function's calls in the same order.
        total: all recorded calls; slow: how many of them are slow, all of which are here.
    """

    start_ns: Ints
    duration_ns: Ints
    self_ns: Ints
    thread: Ints
    function: Ints
    parent: Ints
    depth: Ints
    unfinished: npt.NDArray[np.bool_]
    arguments: dict[tuple[int, str], npt.NDArray[Any]]
    total: int
    slow: int

    @property
    def thinned(self) -> int:
        """Return how many calls are drawn as density instead."""
        return self.total - len(self.start_ns)


@dataclass(frozen=True)
class Timeline:
    """One recording, or a window of it, as the page shows it; times since ``origin_ns``.

    Attributes:
        origin_ns: CLOCK_MONOTONIC of the left end; offset_ns: how long that is after the recording's start.
        elapsed_ns: length; wall_ns: the left end in ns since 1970.
        slow_ns: calls at least this long are slow.
        paths: each chain of functions once, as (index of the caller's chain or -1, index in ``functions``).
        slowest: indexes into ``calls``: those of the longest calls and of those with most self time.
        short_calls: calls that were only counted in the kernel, and have no time.
    """

    summary: Summary
    origin_ns: int
    offset_ns: int
    elapsed_ns: int
    wall_ns: int
    slow_ns: int
    servers: tuple[Server, ...]
    threads: tuple[Thread, ...]
    functions: tuple[Function, ...]
    paths: tuple[tuple[int, int], ...]
    calls: Calls
    density: Density
    heat: Heat
    slowest: Ints
    short_calls: int
    listeners: tuple[ListenerInfo, ...]
    refusals: Refusals
    queues: tuple[QueueLane, ...]
    rates: tuple[RateLane, ...]
    stalls: StallLane
    bands: tuple[Band, ...]
    imported: Imported


def build_timeline(analysis: Analysis, *, offset_ns: int = 0, budget: int = CALL_BUDGET) -> Timeline:
    """Return what the page shows of a recording.

    Args:
        offset_ns: for a window, how long after the recording's start it begins.
        budget: calls to draw one by one, unless more are slow.
    """
    tables, manifest = analysis.tables, analysis.manifest
    summary = summarise(analysis)
    origin_ns = manifest.started_ns
    elapsed_ns = max(tables.end_ns - origin_ns, 1)
    functions, by_probe = _functions(analysis, summary)
    threads, thread = _threads(analysis)
    frame = analysis.nested.calls
    start = frame["start_ns"].to_numpy() - origin_ns
    duration = frame["duration_ns"].to_numpy()
    function = by_probe[frame["probe"].to_numpy()]
    depth = frame["depth"].to_numpy().astype(np.int64)
    slow_ns = slow_from_ns(manifest.stall_ns, duration)
    kept = choose_calls(duration, inside_stalls(analysis), slow_ns, budget)
    rest = np.flatnonzero(~kept)
    rows = np.flatnonzero(kept)
    own = frame["self_ns"].to_numpy()
    calls = Calls(
        start[rows],
        duration[rows],
        own[rows],
        thread[rows],
        function[rows],
        _parents(frame["parent"].to_numpy(), rows),
        depth[rows],
        frame["unfinished"].to_numpy()[rows],
        _arguments(analysis, functions, by_probe, rows),
        total=len(frame),
        slow=int(np.count_nonzero(duration >= slow_ns)),
    )
    return Timeline(
        summary=summary,
        origin_ns=origin_ns,
        offset_ns=offset_ns,
        elapsed_ns=elapsed_ns,
        wall_ns=origin_ns + manifest.wall_offset_ns,
        slow_ns=slow_ns,
        servers=_servers(analysis),
        threads=threads,
        functions=functions,
        paths=tuple((caller, int(by_probe[probe])) for caller, probe in analysis.nested.paths),
        calls=calls,
        density=density(thread[rest], depth[rest], function[rest], start[rest], duration[rest], elapsed_ns),
        heat=heat(function, start, duration, elapsed_ns),
        slowest=_slowest(calls),
        short_calls=sum(item.short_calls for item in summary.functions),
        listeners=manifest.listeners,
        refusals=refusals(analysis, origin_ns, elapsed_ns),
        queues=queue_lanes(tables, origin_ns, elapsed_ns),
        rates=rate_lanes(analysis, origin_ns, elapsed_ns),
        stalls=stall_lane(analysis, origin_ns),
        bands=bands(tables, origin_ns),
        imported=imported_lanes(tables, origin_ns, elapsed_ns),
    )


def _functions(analysis: Analysis, summary: Summary) -> tuple[tuple[Function, ...], Ints]:
    """Return the functions, and the index of each probe id among them."""
    fields = {probe.id: probe.fields for probe in analysis.manifest.probes if probe.kind == CALL}
    index = np.zeros(2**16, np.int64)
    for place, item in enumerate(summary.functions):
        index[item.probe] = place
    functions = []
    for item in summary.functions:
        known = fields.get(item.probe, ())
        names = {field.name for field in known}
        if "last_interaction_s" in names:
            # what a reader wants to know of it is how long ago that was
            known = (*(field for field in known if field.name != "last_interaction_s"), Field("idle_s", "s", 0))
        functions.append(Function(item.name, item.recorded, known))
    return tuple(functions), index


def _servers(analysis: Analysis) -> tuple[Server, ...]:
    listeners: dict[int, list[str]] = {}
    for listener in analysis.manifest.listeners:
        listeners.setdefault(listener.pid, []).append(listener.address)
    servers = []
    for target in analysis.manifest.targets:
        addresses = listeners.get(target.pid, [])
        where = addresses[0] if addresses else f"process {target.pid}"
        servers.append(Server(target.pid, where))
    names = [server.name for server in servers]
    return tuple(
        Server(server.pid, server.name if names.count(server.name) == 1 else f"{server.name} ({server.pid})")
        for server in servers
    )


def _threads(analysis: Analysis) -> tuple[tuple[Thread, ...], Ints]:
    """Return the threads that made calls, main threads first, and each call's index among them."""
    frame = analysis.nested.calls
    servers = {server.pid: server.name for server in _servers(analysis)}
    order = {pid: place for place, pid in enumerate(servers)}
    tid = frame["tid"].to_numpy()
    # the table is sorted by thread
    first = np.flatnonzero(np.diff(tid, prepend=tid[:1] + 1)) if len(tid) else np.zeros(0, np.int64)
    last = np.append(first[1:], len(tid))
    pids = frame["pid"].to_numpy()[first]
    depth = np.maximum.reduceat(frame["depth"].to_numpy(), first) if len(first) else first
    found = [(int(tid[begin]), int(pid), int(deepest)) for begin, pid, deepest in zip(first, pids, depth, strict=True)]
    ranked = sorted(range(len(found)), key=lambda place: _thread_order(found[place], order))
    threads = []
    for place in ranked:
        number, pid, deepest = found[place]
        what = "main thread" if number == pid else f"thread {number}"
        threads.append(Thread(number, pid, f"{servers.get(pid, f'process {pid}')}, {what}", deepest))
    index = np.zeros(len(found), np.int64)
    index[ranked] = np.arange(len(ranked))
    return tuple(threads), np.repeat(index, last - first)


def _thread_order(thread: tuple[int, int, int], servers: dict[int, int]) -> tuple[int, bool, int]:
    tid, pid, _ = thread
    return servers.get(pid, len(servers)), tid != pid, tid


def _arguments(
    analysis: Analysis, functions: tuple[Function, ...], by_probe: Ints, rows: Ints
) -> dict[tuple[int, str], npt.NDArray[Any]]:
    frame = analysis.nested.calls
    probe = frame["probe"].to_numpy()[rows]
    columns = {}
    for item in analysis.manifest.probes:
        mine = rows[probe == item.id]
        if item.kind != CALL or not item.fields or not len(mine):
            continue
        function = int(by_probe[item.id])
        decoded = analysis.tables.decode(item, frame["start_ns"].to_numpy()[mine], frame["row"].to_numpy()[mine])
        for field in functions[function].fields:
            columns[function, field.name] = decoded[field.name]
    return columns


def _parents(parent: Ints, rows: Ints) -> Ints:
    """Return, for each of these rows, the place of its caller among them, -1: it has none there."""
    place = np.full(len(parent) + 1, -1, np.int64)
    place[rows] = np.arange(len(rows))
    # -1 looks up the last element, which is -1
    return place[parent[rows]]


def _slowest(calls: Calls) -> Ints:
    """Return the longest calls, and those with the most self time after them; the longest of all comes first."""
    chosen = set()
    for key in (calls.duration_ns, calls.self_ns):
        count = min(SLOWEST, len(key))
        if count:
            chosen |= set(np.argpartition(-key, count - 1)[:count].tolist())
    places = np.array(sorted(chosen), np.int64)
    return places[np.argsort(-calls.duration_ns[places], kind="stable")]
