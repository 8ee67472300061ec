"""Spans of the timeline in which less was seen than elsewhere: drawn as hatched bands over all lanes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stallscope.tracer.analysis.tables import Tables
from stallscope.tracer.manifest import Counters, DetailInfo, ProbeCounters

LOST, THINNED, NOT_ATTACHED, GONE, CUT_SHORT = "lost", "thinned", "not attached", "gone", "cut short"
_LEAST_NS = 1_000_000
"""The time between the start and the attach of the first probes is shorter and means nothing."""


@dataclass(frozen=True)
class Band:
    """One such span, times since the start of the timeline.

    Attributes:
        kind: ``LOST``, ``THINNED``, ``NOT_ATTACHED``, ``GONE`` or ``CUT_SHORT``; text: what was not seen, in words.
        pid: the server it is about, 0: all.
    """

    kind: str
    start_ns: int
    end_ns: int
    text: str
    pid: int = 0


def bands(tables: Tables, origin_ns: int) -> tuple[Band, ...]:
    """Return all of them, by start."""
    manifest = tables.manifest
    end_ns = tables.end_ns
    found = [
        *_grown(tables, origin_ns, LOST, "events lost", lambda counters: counters.missing),
        *_grown(tables, origin_ns, THINNED, "beyond the rate limit, only counted", lambda counters: counters.thinned),
    ]
    for target in manifest.targets:
        name = f"{target.product} {target.version}, process {target.pid}"
        if target.start_ns - origin_ns > _LEAST_NS:
            text = f"{name}: not attached yet"
            found.append(Band(NOT_ATTACHED, 0, min(target.start_ns, end_ns) - origin_ns, text, target.pid))
        if 0 < target.end_ns < end_ns - _LEAST_NS:
            found.append(Band(GONE, max(target.end_ns - origin_ns, 0), end_ns - origin_ns, f"{name}: gone", target.pid))
    found += _without_detail(manifest.details, origin_ns, end_ns)
    if not tables.recording.complete:
        length = max(end_ns - origin_ns, 1)
        text = "the recording was cut short here: calls and iterations under way are not in it"
        found.append(Band(CUT_SHORT, length, length + max(length // 40, 1), text))
    return tuple(sorted(found, key=lambda band: band.start_ns))


def _without_detail(details: tuple[DetailInfo, ...], origin_ns: int, end_ns: int) -> list[Band]:
    """Return a band wherever a capture had no detail probes attached; none where they always were."""
    found = []
    since_ns = origin_ns
    for item in sorted(details, key=lambda detail: detail.attached_ns):
        found.append((since_ns, min(item.attached_ns, end_ns)))
        since_ns = max(since_ns, item.detached_ns or end_ns)
    if details:
        found.append((since_ns, end_ns))
    text = "detail probes not attached: only standing probes were"
    return [
        Band(NOT_ATTACHED, first - origin_ns, last - origin_ns, text)
        for first, last in found
        if last - first > _LEAST_NS
    ]


def _grown(tables: Tables, origin_ns: int, kind: str, what: str, number: Callable[[ProbeCounters], int]) -> list[Band]:
    """Return a band wherever snapshots of the counters show that a number grew; what touches is one band."""
    recording = tables.recording
    snapshots = recording.snapshots or ((recording.counters,) if recording.counters else ())
    spans: list[tuple[int, int, dict[int, int]]] = []
    before = Counters(origin_ns, {})
    for snapshot in sorted(snapshots, key=lambda item: item.time_ns):
        more = {}
        for probe, counters in snapshot.by_probe.items():
            grown = number(counters) - number(before.by_probe.get(probe, ProbeCounters()))
            if grown > 0:
                more[probe] = grown
        if more and spans and spans[-1][1] == before.time_ns:
            start_ns, _, sofar = spans[-1]
            together = {probe: sofar.get(probe, 0) + more.get(probe, 0) for probe in sofar | more}
            spans[-1] = (start_ns, snapshot.time_ns, together)
        elif more:
            spans.append((before.time_ns, snapshot.time_ns, more))
        before = snapshot
    names = {probe.id: probe.name for probe in tables.manifest.probes}
    found = []
    for start_ns, end_ns, more in spans:
        parts = ", ".join(f"{count:,} of {names.get(probe, str(probe))}" for probe, count in more.items())
        found.append(Band(kind, max(start_ns - origin_ns, 0), end_ns - origin_ns, f"{what}: {parts}"))
    return found
