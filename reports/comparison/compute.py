"""What the comparison's page draws, as plain arrays: timelines, distributions by function, one graph of both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.reports.export.naming import call_names
from stallscope.tracer.analysis.analysis import Analysis

BEFORE, AFTER = "before", "after"
TIMELINE_BINS = 600
MAX_STALLS = 2000
"""Stalls drawn of one recording, the longest first; what is left out is counted."""

_EVERY_CALL = 400
_NS_PER_S = 1_000_000_000

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SideTimeline:
    """One recording on the common time axis; times in ns since its start.

    Attributes:
        side: ``BEFORE`` or ``AFTER``; name: of the file; server: product and version of the first server.
        stall_start_ns, stall_duration_ns, stall_refused: the longest stalls, by start; stalls_left: not among them.
        bin_ns: length of a bin; queue_share: greatest length of an accept queue over its limit in each bin, NaN where
            nothing was seen; refused: overflows seen in each bin.
    """

    side: str
    name: str
    server: str
    elapsed_ns: int
    stall_start_ns: Ints
    stall_duration_ns: Ints
    stall_refused: Ints
    stalls_left: int
    bin_ns: int
    queue_share: Floats
    refused: Ints


@dataclass(frozen=True)
class Distribution:
    """How long one function's calls took on one side.

    Attributes:
        calls: that ended, those that were only counted included; short: of them only counted (below the minimum).
        duration_ns: ascending; share: of all calls that took at most that long, in (0, 1]. Both have shape (n,).
    """

    side: str
    calls: int
    short: int
    duration_ns: Ints
    share: Floats


@dataclass(frozen=True)
class GraphNode:
    """One call path on both sides.

    Attributes:
        parent: index of the caller's node, -1: none.
        before, after: self time in ns per second of recording; before_total, after_total: with all it called.
    """

    name: str
    parent: int
    before: float
    after: float
    before_total: float
    after_total: float


@dataclass(frozen=True)
class ComparedSides:
    """All that the page draws.

    Attributes:
        timelines: the recordings before, then those after; elapsed_ns: of the longest.
        distributions: by function's name, most time first; each has one or two sides.
        graph: the differential flame graph, callers before what they call.
    """

    timelines: tuple[SideTimeline, ...]
    elapsed_ns: int
    distributions: dict[str, tuple[Distribution, ...]]
    graph: tuple[GraphNode, ...]


def compute_sides(before: Sequence[Analysis], after: Sequence[Analysis]) -> ComparedSides:
    """Return what is drawn of two sides; each is one recording or several that are pooled."""
    sides = ((BEFORE, before), (AFTER, after))
    longest = max(elapsed_of(analysis) for _, analyses in sides for analysis in analyses)
    bin_ns = max(-(-longest // TIMELINE_BINS), 1)
    timelines = tuple(_timeline(side, analysis, bin_ns) for side, analyses in sides for analysis in analyses)
    return ComparedSides(timelines, longest, _distributions(sides), _graph(before, after))


def elapsed_of(analysis: Analysis) -> int:
    """Return the length of a recording in ns."""
    return max(analysis.tables.end_ns - analysis.manifest.started_ns, 1)


def _timeline(side: str, analysis: Analysis, bin_ns: int) -> SideTimeline:
    started_ns = analysis.manifest.started_ns
    elapsed = elapsed_of(analysis)
    bins = -(-elapsed // bin_ns)
    frame = analysis.stalls.frame
    kept = frame.nlargest(MAX_STALLS, "duration_ns").sort_values("start_ns")
    queues = analysis.tables.queues
    share = np.full(bins, np.nan)
    if len(queues):
        place = ((queues["time_ns"].to_numpy() - started_ns) // bin_ns).clip(0, bins - 1)
        np.fmax.at(share, place, (queues["queue_length"] / queues["queue_limit"].clip(lower=1)).to_numpy(np.float64))
    overflows = analysis.stalls.overflows
    place = ((overflows["seen_ns"].to_numpy(np.int64) - started_ns) // bin_ns).clip(0, bins - 1)
    refused = np.bincount(place, weights=overflows["count"].to_numpy(), minlength=bins)
    targets = analysis.manifest.targets
    return SideTimeline(
        side,
        analysis.recording.path.name,
        f"{targets[0].product} {targets[0].version}".strip() if targets else "",
        elapsed,
        kept["start_ns"].to_numpy(np.int64) - started_ns,
        kept["duration_ns"].to_numpy(np.int64),
        (kept["overflows"] + kept["overflows_drain"]).to_numpy(np.int64),
        len(frame) - len(kept),
        bin_ns,
        share,
        refused.astype(np.int64),
    )


def _distributions(sides: Sequence[tuple[str, Sequence[Analysis]]]) -> dict[str, tuple[Distribution, ...]]:
    found: dict[str, list[Distribution]] = defaultdict(list)
    time_ns: dict[str, float] = defaultdict(float)
    for side, analyses in sides:
        durations: dict[str, list[Ints]] = defaultdict(list)
        short: dict[str, int] = defaultdict(int)
        for analysis in analyses:
            names = call_names(analysis.manifest)
            calls = analysis.tables.calls
            ended = calls.loc[~calls["unfinished"]]
            for probe in ended["probe"].unique().tolist():
                lengths = ended.loc[ended["probe"] == probe, "duration_ns"].to_numpy(np.int64)
                durations[names[probe]].append(lengths)
            for probe, counter in (analysis.recording.counters.by_probe if analysis.recording.counters else {}).items():
                if probe in names:
                    short[names[probe]] += counter.short_calls
        for name in {*durations, *(name for name, count in short.items() if count)}:
            lengths = np.sort(np.concatenate([np.zeros(0, np.int64), *durations[name]]))
            time_ns[name] += float(lengths.sum())
            found[name].append(_distribution(side, lengths, short[name]))
    return {name: tuple(found[name]) for name in sorted(found, key=lambda name: (-time_ns[name], name))}


def _distribution(side: str, lengths: Ints, short: int) -> Distribution:
    """Return the distribution at every call while they are few, else at ranks that grow denser towards the longest."""
    count = len(lengths)
    ranks = np.arange(1, count + 1)
    if count > _EVERY_CALL:
        tail = count - np.unique(np.geomspace(1, count, _EVERY_CALL // 2).astype(np.int64)) + 1
        ranks = np.unique(np.concatenate([np.linspace(1, count, _EVERY_CALL // 2).astype(np.int64), tail]))
    return Distribution(side, count + short, short, lengths[ranks - 1], (short + ranks) / max(count + short, 1))


def _graph(before: Sequence[Analysis], after: Sequence[Analysis]) -> tuple[GraphNode, ...]:
    self_ns = [_time_by_path(side) for side in (before, after)]
    paths = sorted({path[:length] for side in self_ns for path in side for length in range(1, len(path) + 1)})
    place = {path: index for index, path in enumerate(paths)}
    own = np.array([[side.get(path, 0.0) for path in paths] for side in self_ns]).reshape(2, -1)
    total = own.copy()
    for index in range(len(paths) - 1, -1, -1):  # sorted: what is called comes behind its caller
        parent = place.get(paths[index][:-1], -1)
        if parent >= 0:
            total[:, parent] += total[:, index]
    return tuple(
        GraphNode(path[-1], place.get(path[:-1], -1), *own[:, index].tolist(), *total[:, index].tolist())
        for index, path in enumerate(paths)
    )


def _time_by_path(analyses: Sequence[Analysis]) -> dict[tuple[str, ...], float]:
    """Return self time by path of names, ns per second of all recordings of one side."""
    seconds = sum(elapsed_of(analysis) for analysis in analyses) / _NS_PER_S
    found: dict[tuple[str, ...], float] = defaultdict(float)
    for analysis in analyses:
        names = call_names(analysis.manifest)
        by_path = analysis.nested.calls.groupby("path", sort=True)["self_ns"].sum().reset_index()
        for path, own_ns in by_path.to_numpy().tolist():
            found[tuple(names[probe] for probe in analysis.nested.path(path))] += own_ns / seconds
    return found
