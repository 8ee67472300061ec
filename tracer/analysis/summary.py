"""What a recording shows, as plain data: every number of the report, and the sentence to read first."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.functions import FunctionSummary, summarise_functions
from stallscope.tracer.analysis.imported import ImportedSummary, summarise_imported
from stallscope.tracer.analysis.nesting import Nested
from stallscope.tracer.analysis.overflows import LISTEN_OVERFLOWS, NOT_ATTRIBUTABLE, increases, listener_step
from stallscope.tracer.analysis.requests import (
    QUEUE_FULL,
    RequestSummary,
    event_hits,
    requests_observed,
    summarise_requests,
)
from stallscope.tracer.analysis.stalls import (
    DRAIN,
    INSIDE,
    ITERATIONS,
    OUTSIDE,
    Stalls,
    loop_observed,
)
from stallscope.tracer.analysis.tables import Tables
from stallscope.tracer.manifest import (
    CALL,
    COUNTER,
    ITERATION,
    QUEUE,
    NamespaceInfo,
    Note,
    ProbeCounters,
    TargetInfo,
)

SUMMARY_VERSION = 1
KEPT_STALLS = 50
KEPT_CALLS = 3


@dataclass(frozen=True)
class FunctionTime:
    """One function inside one stall: calls that began there, their self time, the longest of them."""

    name: str
    calls: int
    self_ns: int
    longest_ns: int


@dataclass(frozen=True)
class CallInStall:
    """One call inside a stall: ``path`` names its callers from the root down, and itself last."""

    path: tuple[str, ...]
    start_ns: int
    duration_ns: int
    self_ns: int
    arguments: dict[str, int]


@dataclass(frozen=True)
class StallSummary:
    """One stall; see :class:`stalls.Stalls` for how each number is found.

    Attributes:
        start_ns: since the recording's start; wall_ns: since 1970.
        listener: address of the fullest listener, "" if none is known.
        queue_start, queue_max, queue_limit, accepted, accepted_drain: None where not observed.
        connections_refused: how many different connections the overflows refused, None where only
            the refusals could be counted.
        functions: time by function, most self time first; unexplained_ns: the rest of ``duration_ns``.
        blamed: the function with the most self time, with its callers from the root down; empty when
            less than half of the stall is explained.
        calls: the calls with the most self time.
    """

    start_ns: int
    wall_ns: int
    duration_ns: int
    pid: int
    unfinished: bool
    listener: str
    queue_start: int | None
    queue_max: int | None
    queue_limit: int | None
    drain_ns: int
    drained: bool
    accepted: int | None
    accepted_drain: int | None
    overflows: int
    overflows_drain: int
    connections_refused: int | None
    unexplained_ns: int
    blamed: tuple[str, ...]
    functions: tuple[FunctionTime, ...]
    calls: tuple[CallInStall, ...]


@dataclass(frozen=True)
class OverflowCount:
    """Overflows by when they fell: inside a stall, while the queue drained after one, or neither."""

    inside: int = 0
    drain: int = 0
    outside: int = 0

    @property
    def total(self) -> int:
        """Return all of them."""
        return self.inside + self.drain + self.outside


@dataclass(frozen=True)
class ListenerSummary:
    """One listener: the greatest length of its accept queue, its limit, and what was refused.

    Attributes:
        queue_max: None when it was never sampled.
        overflows: attributed to it.
        drops: growth of its own drop counter, which counts other reasons too.
    """

    address: str
    pid: int
    queue_max: int | None
    queue_limit: int
    drops: int
    overflows: OverflowCount


@dataclass(frozen=True)
class Reconciliation:
    """Overflows seen while recording, against the kernel's own counter at start and end, of one namespace.

    Attributes:
        observed: seen, in samples or one by one; counted: the kernel's difference, None when the end is not known.
        not_attributable: observed, but at no listener that was watched.
        one_by_one: the kernel's functions were hooked; then ``unwatched`` of the observed were of listeners that
            were not watched, and ``unexplained`` is what was counted and not observed, None when not known.
    """

    namespace: int
    observed: int
    counted: int | None
    not_attributable: OverflowCount
    other_counters: dict[str, int]
    one_by_one: bool = False
    unwatched: int = 0
    unexplained: int | None = None


@dataclass(frozen=True)
class Loss:
    """What one probe saw and could not keep or pair."""

    name: str
    lost: int
    unpaired: int
    abandoned: int


@dataclass(frozen=True)
class LoopSummary:
    """The event loop: iterations, how many were stalls, and how long it was busy.

    Attributes:
        iterations: all of them; stalls: those at or above the threshold.
        busy_ns: total duration of all; longest_ns: None when none reached the threshold.
    """

    iterations: int
    stalls: int
    busy_ns: int
    longest_ns: int | None


@dataclass(frozen=True)
class Summary:
    """Everything a report says about a recording.

    Attributes:
        verdict: the sentence to read first.
        path: the file; complete: it has its footer, otherwise it was cut short.
        started_wall_ns: since 1970; elapsed_ns: length of the recording.
        stall_basis: what stands for stalls; stall_count, stall_total_ns: of all of them.
        stalls: the worst, at most ``KEPT_STALLS``, by time.
        overflows: all that were observed; refused, ``overflows.total``.
        connections_refused: by them; None where only the refusals could be counted.
        requests: None where the kernel's functions were not hooked.
        loop: None when the event loop was not observed.
        warnings: what makes numbers incomplete; notes: what happened, time since the start.
        cost: what tracing cost, as the recorder measured it.
        imported: what other tools said, None where nothing was imported.
    """

    verdict: str
    path: str
    complete: bool
    ended_by: str
    started_wall_ns: int
    elapsed_ns: int
    min_duration_ns: int
    stall_ns: int
    sample_ns: int
    targets: tuple[TargetInfo, ...]
    host: dict[str, str]
    rungs: dict[str, str]
    stall_basis: str
    stall_count: int
    stall_total_ns: int
    stalls: tuple[StallSummary, ...]
    overflows: OverflowCount
    connections_refused: int | None
    requests: RequestSummary | None
    listeners: tuple[ListenerSummary, ...]
    reconciliation: tuple[Reconciliation, ...]
    loop: LoopSummary | None
    functions: tuple[FunctionSummary, ...]
    losses: tuple[Loss, ...]
    rows: int
    warnings: tuple[str, ...]
    notes: tuple[Note, ...]
    cost: dict[str, float]
    imported: ImportedSummary | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: ``_ns``, ``_bytes`` and ``_share`` say the unit of every number."""
        document = dataclasses.asdict(self)
        document["cost"] = {name: value for name, value in self.cost.items() if math.isfinite(value)}
        return {"summary_version": SUMMARY_VERSION, **document}


def summarise(analysis: Analysis) -> Summary:
    """Return what a recording shows."""
    from stallscope.tracer.analysis.verdict import sentence, warnings

    tables, nested, stalls = analysis.tables, analysis.nested, analysis.stalls
    recording, manifest = analysis.recording, analysis.manifest
    elapsed_ns = max(tables.end_ns - manifest.started_ns, 0)
    loop = _loop(tables, len(stalls.frame))
    names = {probe.id: probe.name for probe in manifest.probes}
    summary = Summary(
        verdict="",
        path=str(recording.path),
        complete=recording.complete,
        ended_by=manifest.ended_by,
        started_wall_ns=manifest.started_ns + manifest.wall_offset_ns,
        elapsed_ns=elapsed_ns,
        min_duration_ns=manifest.min_duration_ns,
        stall_ns=manifest.stall_ns,
        sample_ns=manifest.sample_ns,
        targets=manifest.targets,
        host=manifest.host,
        rungs=manifest.rungs,
        stall_basis=stalls.basis,
        stall_count=len(stalls.frame),
        stall_total_ns=int(stalls.frame["duration_ns"].sum()),
        stalls=_stalls(tables, nested, stalls, names),
        overflows=_phases(stalls.overflows),
        connections_refused=_connections(stalls.overflows),
        requests=summarise_requests(tables),
        listeners=_listeners(tables, stalls),
        reconciliation=tuple(_reconcile(tables, stalls, namespace) for namespace in manifest.namespaces),
        loop=loop,
        functions=summarise_functions(tables, nested, loop.busy_ns if loop else None, _watched_ns(tables)),
        losses=_losses(tables, names),
        rows=recording.table.num_rows,
        warnings=(),
        notes=tuple(Note(note.time_ns - manifest.started_ns, note.text) for note in manifest.notes),
        cost=manifest.cost,
        imported=summarise_imported(tables, stalls),
    )
    summary = dataclasses.replace(summary, warnings=warnings(summary, tables, nested))
    return dataclasses.replace(summary, verdict=sentence(summary))


def _stalls(tables: Tables, nested: Nested, stalls: Stalls, names: dict[int, str]) -> tuple[StallSummary, ...]:
    frame = stalls.frame
    refused = frame["overflows"] + frame["overflows_drain"]
    worst = frame.assign(refused=refused).nlargest(KEPT_STALLS, ["refused", "duration_ns"]).index.sort_values()
    listeners = {listener.index: listener.address for listener in tables.manifest.listeners}
    functions = stalls.functions.loc[stalls.functions["stall"].isin(worst)]
    by_stall = dict(iter(functions.groupby("stall")))
    summaries = []
    for index in worst:
        row = frame.loc[index]
        inside = by_stall.get(index, functions.iloc[:0])
        start_ns = int(row["start_ns"])
        duration_ns = int(row["duration_ns"])
        unexplained_ns = max(duration_ns - int(row["explained_ns"]), 0)
        blamed: tuple[str, ...] = ()
        if len(inside) and 2 * unexplained_ns <= duration_ns:
            call = int(inside["longest_call"].iloc[0])
            blamed = _path(nested, call, names, since=int(row["first_call"]))
        summaries.append(
            StallSummary(
                start_ns=start_ns - tables.manifest.started_ns,
                wall_ns=start_ns + tables.manifest.wall_offset_ns,
                duration_ns=duration_ns,
                pid=int(row["pid"]),
                unfinished=bool(row["unfinished"]),
                listener=listeners.get(int(row["listener"]), ""),
                queue_start=_known(row["queue_start"]),
                queue_max=_known(row["queue_max"]),
                queue_limit=_known(row["queue_limit"]),
                drain_ns=int(row["drain_ns"]),
                drained=bool(row["drained"]),
                accepted=_known(row["accepted"]),
                accepted_drain=_known(row["accepted_drain"]),
                overflows=int(row["overflows"]),
                overflows_drain=int(row["overflows_drain"]),
                connections_refused=_known(row["connections"]),
                unexplained_ns=unexplained_ns,
                blamed=blamed,
                functions=tuple(
                    FunctionTime(names.get(probe, str(probe)), calls, self_ns, longest_ns)
                    for probe, calls, self_ns, longest_ns in inside[
                        ["probe", "calls", "self_ns", "longest_ns"]
                    ].itertuples(index=False)
                ),
                calls=_worst_calls(tables, nested, row, names),
            )
        )
    return tuple(summaries)


def _worst_calls(tables: Tables, nested: Nested, row: pd.Series[Any], names: dict[int, str]) -> tuple[CallInStall, ...]:
    first, last = int(row["first_call"]), int(row["last_call"])
    inside = nested.calls.iloc[first:last]
    worst = inside.iloc[np.argsort(-inside["self_ns"].to_numpy(), kind="stable")[:KEPT_CALLS]]
    calls = []
    for index in worst.index:
        call = worst.loc[[index]]
        probe = tables.manifest.probe(int(call["probe"].iloc[0]))
        decoded = tables.decoded(probe, call) if probe else pd.DataFrame()
        calls.append(
            CallInStall(
                _path(nested, int(index), names, since=first),
                int(call["start_ns"].iloc[0]) - tables.manifest.started_ns,
                int(call["duration_ns"].iloc[0]),
                int(call["self_ns"].iloc[0]),
                {str(name): int(decoded[name].iloc[0]) for name in decoded.columns},
            )
        )
    return tuple(calls)


def _path(nested: Nested, call: int, names: dict[int, str], since: int) -> tuple[str, ...]:
    """Return the names from the outermost call that is not before ``since`` down to this call."""
    parent, probe = nested.calls["parent"].to_numpy(), nested.calls["probe"].to_numpy()
    chain: list[str] = []
    while call >= since:
        chain.append(names.get(int(probe[call]), str(probe[call])))
        call = int(parent[call])
    return tuple(reversed(chain))


def _listeners(tables: Tables, stalls: Stalls) -> tuple[ListenerSummary, ...]:
    summaries = []
    for listener in tables.manifest.listeners:
        length = listener_step(tables, listener.index, "queue_length").value
        limit = listener_step(tables, listener.index, "queue_limit").value
        drops = listener_step(tables, listener.index, "drops").value
        mine = stalls.overflows.loc[stalls.overflows["listener"] == listener.index]
        summaries.append(
            ListenerSummary(
                listener.address,
                listener.pid,
                int(length.max()) if len(length) else None,
                int(limit[-1]) if len(limit) else listener.limit,
                max(int(drops[-1]) - int(drops[0]), 0) if len(drops) else 0,
                _phases(mine),
            )
        )
    return tuple(summaries)


def _reconcile(tables: Tables, stalls: Stalls, namespace: NamespaceInfo) -> Reconciliation:
    mine = stalls.overflows.loc[stalls.overflows["namespace"] == namespace.index]
    ended = namespace.counters_end.get(LISTEN_OVERFLOWS)
    started = namespace.counters_start.get(LISTEN_OVERFLOWS)
    others = {}
    for name in tables.manifest.counter_names:
        if name != LISTEN_OVERFLOWS:
            grown = increases(tables, name)
            others[name] = int(grown.loc[grown["namespace"] == namespace.index, "count"].sum())
    sampled = Reconciliation(
        namespace=namespace.index,
        observed=int(mine["count"].sum()),
        counted=None if ended is None or started is None else ended - started,
        not_attributable=_phases(mine.loc[mine["listener"] == NOT_ATTRIBUTABLE]),
        other_counters=others,
    )
    if not requests_observed(tables.manifest):
        return sampled
    elsewhere = namespace.seen_elsewhere.get(LISTEN_OVERFLOWS, 0)
    observed = _seen_one_by_one(tables, namespace) + elsewhere
    return dataclasses.replace(
        sampled,
        observed=observed,
        one_by_one=True,
        unwatched=elsewhere,
        unexplained=None if sampled.counted is None else sampled.counted - observed,
    )


def _seen_one_by_one(tables: Tables, namespace: NamespaceInfo) -> int:
    """Return the overflows of watched listeners; of several namespaces, only those that are rows."""
    if len(tables.manifest.namespaces) == 1:
        hits = event_hits(tables)
        return sum(hits.get(name, 0) for name in QUEUE_FULL)
    mine = [item.index for item in tables.manifest.listeners if item.namespace == namespace.index]
    rows = tables.requests
    return int((rows["event"].isin(QUEUE_FULL) & rows["listener"].isin(mine)).sum())


def _connections(overflows: pd.DataFrame) -> int | None:
    known = overflows["connection"].to_numpy()
    return int(np.unique(known).size) if (known >= 0).all() and len(known) else None


def _phases(overflows: pd.DataFrame) -> OverflowCount:
    total = overflows.groupby("phase")["count"].sum()
    return OverflowCount(*(int(total.get(phase, 0)) for phase in (INSIDE, DRAIN, OUTSIDE)))


def _loop(tables: Tables, stall_count: int) -> LoopSummary | None:
    if not loop_observed(tables):
        return None
    recorded = tables.iterations["duration_ns"]
    counters = tables.recording.counters
    ids = [probe.id for probe in tables.manifest.probes if probe.kind == ITERATION]
    kernel = [counters.by_probe.get(probe, ProbeCounters()) for probe in ids] if counters else []
    return LoopSummary(
        iterations=len(recorded) + sum(item.short_calls for item in kernel),
        stalls=stall_count,
        busy_ns=int(recorded.sum()) + sum(item.short_ns for item in kernel),
        longest_ns=int(recorded.max()) if len(recorded) else None,
    )


def _losses(tables: Tables, names: dict[int, str]) -> tuple[Loss, ...]:
    counters = tables.recording.counters
    if counters is None:
        return ()
    losses = [
        Loss(names.get(probe, str(probe)), item.missing, item.unpaired, item.abandoned)
        for probe, item in sorted(counters.by_probe.items())
    ]
    return tuple(loss for loss in losses if loss.lost or loss.unpaired or loss.abandoned)


def _watched_ns(tables: Tables) -> int:
    """Return how long the targets were watched, all together."""
    return sum(
        max((target.end_ns or tables.end_ns) - max(target.start_ns, tables.manifest.started_ns), 0)
        for target in tables.manifest.targets
    )


def _known(value: int) -> int | None:
    return None if value < 0 else int(value)


__all__ = ["CALL", "COUNTER", "ITERATIONS", "QUEUE", "Summary", "summarise"]
