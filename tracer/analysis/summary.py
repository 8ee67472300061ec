"""What a recording shows, as plain data: every number of the report, and the sentence to read first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.blame import BlameSummary, summarise_blame
from stallscope.tracer.analysis.findings import Finding, find_findings
from stallscope.tracer.analysis.functions import FunctionSummary, summarise_functions
from stallscope.tracer.analysis.imported import ImportedSummary, summarise_imported
from stallscope.tracer.analysis.listener_summary import (
    ListenerSummary,
    OverflowCount,
    Reconciliation,
    by_phase,
    reconcile,
    refused_connections_in,
    summarise_listeners,
)
from stallscope.tracer.analysis.requests import RequestSummary, summarise_requests
from stallscope.tracer.analysis.sample_summary import SampleSummary, summarise_samples
from stallscope.tracer.analysis.stall_summary import StallSummary, summarise_stalls
from stallscope.tracer.analysis.stalls import loop_observed
from stallscope.tracer.analysis.tables import Tables
from stallscope.tracer.analysis.trees import TreeSummary, summarise_trees
from stallscope.tracer.analysis.whatif import DEFAULT_BYTES, WhatIf, what_if
from stallscope.tracer.manifest import (
    ITERATION,
    STACK,
    DetailInfo,
    Manifest,
    Note,
    ProbeCounters,
    TargetInfo,
    TriggerInfo,
)

SUMMARY_VERSION = 1


@dataclass(frozen=True)
class Loss:
    """What one probe saw and could not keep or pair."""

    name: str
    lost: int
    unpaired: int
    abandoned: int


SAMPLED = "sampled"
"""How the rung of iterations begins that were looked for now and then (``capture.watchdog``)."""


@dataclass(frozen=True)
class LoopSummary:
    """The event loop: iterations, how many were stalls, and how long it was busy.

    Attributes:
        iterations: all of them; stalls: those at or above the threshold.
        busy_ns: total duration of all; longest_ns: None when none reached the threshold.
        seen_ns: in a capture of ``stallscope watch``, for how long iterations were seen one by one; outside of it
            only stalls were looked for. None: all the time.
    """

    iterations: int
    stalls: int
    busy_ns: int
    longest_ns: int | None
    seen_ns: int | None = None


@dataclass(frozen=True)
class Summary:
    """Everything a report says about a recording.

    Attributes:
        verdict: the sentence to read first.
        path: the file; complete: it has its footer, otherwise it was cut short.
        started_wall_ns: since 1970; elapsed_ns: length of the recording.
        stall_basis: what stands for stalls; stall_count, stall_total_ns: of all of them.
        stalls: the worst, at most ``stall_summary.KEPT_STALLS``, by time; waits_exact: the waits in them are
            those of every connection, otherwise of at least so many and at least so long.
        findings: what the recording shows, in words, the weightiest first.
        trees: the longest slow call trees, at most ``trees.KEPT_TREES``, by time; tree_count: of all.
        blame: how many overflows have which cause, and how they fall into stalls against chance.
        what_if: what other trim thresholds would have changed; empty where no trim was recorded.
        overflows: all that were observed; refused, ``overflows.total``.
        connections_refused: by them; None where only the refusals could be counted.
        requests: None where the kernel's functions were not hooked.
        loop: None when the event loop was not observed.
        warnings: what makes numbers incomplete; notes: what happened, time since the start.
        cost: what tracing cost, as the recorder measured it.
        imported: what other tools said, None where nothing was imported.
        sampled: where stalls were, by stack samples; None where none were to be taken.
        triggers: what made this capture of ``stallscope watch``, time since the start; further_triggers: how many
            more came true. details: when detail probes were attached, times since the start (``detached_ns`` 0:
            until the end).
    """

    verdict: str
    findings: tuple[Finding, ...]
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
    waits_exact: bool
    tree_count: int
    trees: tuple[TreeSummary, ...]
    blame: BlameSummary
    what_if: tuple[WhatIf, ...]
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
    sampled: SampleSummary | None = None
    triggers: tuple[TriggerInfo, ...] = ()
    further_triggers: int = 0
    details: tuple[DetailInfo, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: ``_ns``, ``_bytes`` and ``_share`` say the unit of every number."""
        document = dataclasses.asdict(self)
        document["cost"] = {name: value for name, value in self.cost.items() if math.isfinite(value)}
        return {"summary_version": SUMMARY_VERSION, **document}


def summarise(analysis: Analysis, thresholds: Sequence[int] = (DEFAULT_BYTES,)) -> Summary:
    """Return what a recording shows.

    Args:
        thresholds: trim thresholds in bytes to ask "what if" about.
    """
    from stallscope.tracer.analysis.verdict import sentence, warnings

    tables, nested, stalls = analysis.tables, analysis.nested, analysis.stalls
    recording, manifest = analysis.recording, analysis.manifest
    elapsed_ns = max(tables.end_ns - manifest.started_ns, 0)
    loop = _loop(tables, len(stalls.frame))
    summary = Summary(
        verdict="",
        findings=find_findings(analysis),
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
        stalls=summarise_stalls(tables, nested, stalls, analysis.samples.told),
        waits_exact=stalls.waits_exact,
        tree_count=len(analysis.trees.frame),
        trees=summarise_trees(analysis.trees, manifest),
        blame=summarise_blame(analysis.blame),
        what_if=tuple(
            what_if(tables, analysis.trims, stalls.frame, threshold)
            for threshold in thresholds
            if len(analysis.trims.free_bytes)
        ),
        overflows=by_phase(stalls.overflows),
        connections_refused=refused_connections_in(stalls.overflows),
        requests=summarise_requests(tables),
        listeners=summarise_listeners(tables, stalls),
        reconciliation=tuple(reconcile(tables, stalls, namespace) for namespace in manifest.namespaces),
        loop=loop,
        functions=summarise_functions(
            tables, nested, loop.busy_ns if loop and loop.seen_ns is None else None, _watched_ns(tables)
        ),
        losses=_losses(tables),
        rows=recording.table.num_rows,
        warnings=(),
        notes=tuple(Note(note.time_ns - manifest.started_ns, note.text) for note in manifest.notes),
        cost=manifest.cost,
        imported=summarise_imported(tables, stalls),
        sampled=summarise_samples(tables, analysis.samples),
        triggers=tuple(
            dataclasses.replace(item, time_ns=item.time_ns - manifest.started_ns) for item in manifest.triggers
        ),
        further_triggers=manifest.further_triggers,
        details=_details(manifest),
    )
    summary = dataclasses.replace(summary, warnings=warnings(summary, tables, nested))
    return dataclasses.replace(summary, verdict=sentence(summary))


def _details(manifest: Manifest) -> tuple[DetailInfo, ...]:
    return tuple(
        dataclasses.replace(
            item,
            trigger_ns=item.trigger_ns - manifest.started_ns,
            attached_ns=item.attached_ns - manifest.started_ns,
            detached_ns=max(item.detached_ns - manifest.started_ns, 0),
        )
        for item in manifest.details
    )


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
        seen_ns=_seen_one_by_one_ns(tables),
    )


def _seen_one_by_one_ns(tables: Tables) -> int | None:
    """Return for how long iterations were seen one by one, where that was only while detail probes were attached."""
    manifest, ended_ns = tables.manifest, tables.recording.ended_ns
    if not any(probe.kind == ITERATION and probe.rung.startswith(SAMPLED) for probe in manifest.probes):
        return None
    return sum(
        max(min(item.detached_ns or ended_ns, ended_ns) - max(item.attached_ns, manifest.started_ns), 0)
        for item in manifest.details
    )


def _losses(tables: Tables) -> tuple[Loss, ...]:
    counters = tables.recording.counters
    if counters is None:
        return ()
    # a sample that is lost is no event that is missing: SampleSummary counts it
    names = {probe.id: probe.name for probe in tables.manifest.probes if probe.kind != STACK}
    sampled = {probe.id for probe in tables.manifest.probes if probe.kind == STACK}
    losses = [
        Loss(names.get(probe, str(probe)), item.missing, item.unpaired, item.abandoned)
        for probe, item in sorted(counters.by_probe.items())
        if probe not in sampled
    ]
    return tuple(loss for loss in losses if loss.lost or loss.unpaired or loss.abandoned)


def _watched_ns(tables: Tables) -> int:
    """Return how long the targets were watched, all together."""
    return sum(
        max((target.end_ns or tables.end_ns) - max(target.start_ns, tables.manifest.started_ns), 0)
        for target in tables.manifest.targets
    )
