"""Rules about the recording itself: what it cannot tell, and that it shows nothing wrong."""

from __future__ import annotations

from collections.abc import Iterator

from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.blame import NO_KNOWN_CAUSE
from stallscope.tracer.analysis.findings import CLEARED, CONTRIBUTES, NOTICE, Evidence
from stallscope.tracer.analysis.rules.rule import KEPT_EVIDENCE, Found, Rule, since_start
from stallscope.tracer.analysis.stalls import loop_observed
from stallscope.tracer.manifest import CALL, STACK
from stallscope.tracer.units import format_count, format_duration_ns


def no_known_cause(analysis: Analysis) -> Iterator[Found]:
    """Overflows that none of the tests explains, by the reason why not."""
    overflows = analysis.blame.overflows
    mine = overflows.loc[overflows["cause"] == NO_KNOWN_CAUSE]
    if mine.empty:
        return
    reasons = mine.groupby("reason").agg(
        count=("count", "sum"), first_ns=("seen_ns", "min"), last_ns=("seen_ns", "max")
    )
    reasons = reasons.sort_values("count", ascending=False)
    yield Found(
        CONTRIBUTES,
        f"{format_count(int(mine['count'].sum()), 'overflow has', 'overflows have')} no known cause",
        tuple(
            Evidence(f"{number:,}: {reason}", since_start(analysis, first), int(last - first))
            for reason, number, first, last in reasons.itertuples(name=None)
        ),
    )


def losses(analysis: Analysis) -> Iterator[Found]:
    """Events that were seen and could not be kept; samples of stacks are none."""
    counters = analysis.recording.counters
    names = {probe.id: probe.name for probe in analysis.manifest.probes}
    sampled = {probe.id for probe in analysis.manifest.probes if probe.kind == STACK}
    missing = (
        {probe: item.missing for probe, item in counters.by_probe.items() if item.missing and probe not in sampled}
        if counters
        else {}
    )
    if not missing:
        return
    most = sorted(missing.items(), key=lambda item: -item[1])[:KEPT_EVIDENCE]
    yield Found(
        NOTICE,
        f"{format_count(sum(missing.values()), 'event was', 'events were')} lost: this is not the whole picture",
        tuple(Evidence(f"{names.get(probe, probe)}: {number:,}") for probe, number in most),
    )


def never_fired(analysis: Analysis) -> Iterator[Found]:
    """Functions that were attached and never called."""
    counters = analysis.recording.counters
    hits = {probe: item.hits for probe, item in counters.by_probe.items()} if counters else {}
    silent = [probe for probe in analysis.manifest.probes if probe.kind == CALL and hits.get(probe.id) == 0]
    if not silent:
        return
    names = ", ".join(dict.fromkeys(probe.name for probe in silent))
    yield Found(
        NOTICE,
        f"attached, but never fired: {names}",
        tuple(
            Evidence(f"{probe.symbol or probe.name} in {probe.path or 'the server'}: {probe.note or 'no hit'}")
            for probe in silent[:KEPT_EVIDENCE]
        ),
    )


def nothing_wrong(analysis: Analysis) -> Iterator[Found]:
    """Neither a stall nor an overflow, in a recording that would show them."""
    counters = analysis.recording.counters
    lost = counters is not None and any(item.missing for item in counters.by_probe.values())
    counted = sum(
        max(space.counters_end.get("ListenOverflows", 0) - space.counters_start.get("ListenOverflows", 0), 0)
        for space in analysis.manifest.namespaces
    )
    watched = loop_observed(analysis.tables) and not analysis.tables.queues.empty and analysis.recording.complete
    if len(analysis.stalls.frame) or len(analysis.blame.overflows) or counted or lost or not watched:
        return
    length_ns = analysis.tables.end_ns - analysis.manifest.started_ns
    fullest = int(analysis.tables.queues["queue_length"].max())
    yield Found(
        CLEARED,
        f"nothing wrong in {format_duration_ns(length_ns)}: no event loop iteration of "
        f"{format_duration_ns(analysis.manifest.stall_ns)} or more, and no connection refused",
        (Evidence(f"the accept queue held at most {format_count(fullest, 'connection')}"),),
    )


RULES = (
    Rule("no-known-cause", "record again to the end, where the kernel has kprobes or fentry: stallscope doctor says "
         "what this machine allows", no_known_cause),
    Rule("losses", "record fewer functions, with a larger --ring-size or a --min-duration", losses),
    Rule("never-fired", "ask stallscope probes whether they are inlined or bypassed in this server", never_fired),
    Rule("nothing-wrong", "", nothing_wrong),
)  # fmt: skip
