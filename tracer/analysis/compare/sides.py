"""The recordings of one side of a comparison, pooled: what was called when, and for how long it was watched.

Every recording keeps its own axis, from 0 at its start. Where several servers were traced, their watched times add
up: rates are per second of one server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.compare.events import occasions
from stallscope.tracer.analysis.stalls import loop_observed
from stallscope.tracer.analysis.tables import NS_PER_S, Ints
from stallscope.tracer.analysis.waits import accept_waits
from stallscope.tracer.manifest import CALL, QUEUE, ProbeCounters, ProbeInfo

Floats = npt.NDArray[np.float64]

STALLS, OVERFLOWS, ACCEPT_WAIT = "stalls", "overflows", "accept wait"


@dataclass(frozen=True)
class Spans:
    """Events of one kind in one recording, sorted by time.

    Attributes:
        time_ns: since the recording's start.
        duration_ns: of each; total_ns: what of it counts for the sum (recursion once); self_ns.
        occasion: events with the same number came together, as the calls of one cron tick; ascending.
        weight: how many each stands for.
        short_at_s, short_calls, short_ns: what the kernel only counted, as running totals at some moments.
    """

    time_ns: Ints
    duration_ns: Ints
    total_ns: Ints
    self_ns: Ints
    occasion: Ints
    weight: Ints
    short_at_s: Floats = field(default_factory=lambda: np.zeros(1))
    short_calls: Floats = field(default_factory=lambda: np.zeros(1))
    short_ns: Floats = field(default_factory=lambda: np.zeros(1))

    @property
    def count(self) -> int:
        """Return how many events there were, those only counted included."""
        return int(self.weight.sum()) + int(self.short_calls[-1])


@dataclass(frozen=True)
class Run:
    """One recording of a side.

    Attributes:
        seconds: its length; watched: when each server was watched, in seconds since the start.
        spans: what happened, by function's name, and under ``STALLS``, ``OVERFLOWS`` and ``ACCEPT_WAIT``; what was
            not observed is not in it.
        hits: how often each function was entered.
    """

    analysis: Analysis
    seconds: float
    watched: tuple[tuple[float, float], ...]
    spans: dict[str, Spans]
    hits: dict[str, int]

    @property
    def path(self) -> str:
        """Return the recording's file."""
        return str(self.analysis.recording.path)

    @property
    def exposure_s(self) -> float:
        """Return for how long servers were watched, all together."""
        return sum(end - start for start, end in self.watched)

    def exposures(self, edges: Floats) -> Floats:
        """Return for how long servers were watched in each block between these edges, seconds."""
        parts = [
            np.maximum(np.minimum(edges[1:], end) - np.maximum(edges[:-1], start), 0.0) for start, end in self.watched
        ]
        return np.sum(parts, axis=0) if parts else np.zeros(len(edges) - 1)

    @cached_property
    def clients(self) -> float | None:
        """Return how many clients were connected, the mean of what INFO said; None where it did not say."""
        return _mean([value for name in ("connected_clients", "connected_clients_end") for value in self._info(name)])

    @cached_property
    def connections_per_s(self) -> float | None:
        """Return how many connections were accepted in a second, by INFO or else by the accepts seen."""
        told = self._grown("total_connections_received")
        if told is not None:
            return told / self.exposure_s
        accepts = self.analysis.tables.accepts
        if not loop_observed(self.analysis.tables) or not self.exposure_s:
            return None
        return float((accepts["fd"] >= 0).sum()) / self.exposure_s

    @cached_property
    def commands_per_s(self) -> float | None:
        """Return how many commands were run in a second, by INFO; None where it did not say."""
        told = self._grown("total_commands_processed")
        return None if told is None else told / self.exposure_s

    def _info(self, name: str) -> list[float]:
        found = [target.info.get(name, "") for target in self.analysis.manifest.targets]
        return [float(text) for text in found if text.isdigit()]

    def _grown(self, name: str) -> float | None:
        pairs = [(target.info.get(name, ""), target.info.get(f"{name}_end", ""))
                 for target in self.analysis.manifest.targets]  # fmt: skip
        if not pairs or not self.exposure_s or not all(one.isdigit() and two.isdigit() for one, two in pairs):
            return None
        return float(sum(max(int(two) - int(one), 0) for one, two in pairs))


@dataclass(frozen=True)
class Side:
    """The recordings before a change, or those after it."""

    runs: tuple[Run, ...]

    @property
    def exposure_s(self) -> float:
        """Return for how long servers were watched, all together."""
        return sum(run.exposure_s for run in self.runs)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the functions that any of its recordings traced, in the order of the probe lists."""
        return tuple(dict.fromkeys(name for run in self.runs for name in run.hits))

    def hits(self, name: str) -> int:
        """Return how often a function was entered."""
        return sum(run.hits.get(name, 0) for run in self.runs)

    def probes(self, name: str) -> list[ProbeInfo]:
        """Return the probes that stand for a function."""
        return [probe for run in self.runs for probe in run.analysis.manifest.probes
                if probe.kind == CALL and probe.name == name]  # fmt: skip

    def mean(self, what: str) -> float | None:
        """Return ``clients``, ``connections_per_s`` or ``commands_per_s``, weighted by time; None: not known."""
        known = [(getattr(run, what), run.exposure_s) for run in self.runs]
        if any(value is None for value, _ in known) or not self.exposure_s:
            return None
        return float(sum(value * weight for value, weight in known) / self.exposure_s)


def make_side(analyses: Sequence[Analysis]) -> Side:
    """Return recordings as one side of a comparison."""
    return Side(tuple(_run(analysis) for analysis in analyses))


def _run(analysis: Analysis) -> Run:
    tables, manifest = analysis.tables, analysis.manifest
    origin = manifest.started_ns
    seconds = max(tables.end_ns - origin, 0) / NS_PER_S
    watched = tuple(
        (max(target.start_ns - origin, 0) / NS_PER_S, ((target.end_ns or tables.end_ns) - origin) / NS_PER_S)
        for target in manifest.targets
    )
    spans: dict[str, Spans] = {}
    hits: dict[str, int] = {}
    calls = analysis.nested.calls
    root = _roots(calls)
    outermost = analysis.nested.outermost()
    probe_column = calls["probe"].to_numpy()
    for name in dict.fromkeys(probe.name for probe in manifest.probes if probe.kind == CALL):
        ids = [probe.id for probe in manifest.probes if probe.kind == CALL and probe.name == name]
        rows = np.flatnonzero(np.isin(probe_column, ids))
        spans[name] = _function(analysis, ids, rows, root, outermost)
        counted = analysis.recording.counters
        kernel = [counted.by_probe.get(probe, ProbeCounters()) for probe in ids] if counted else []
        hits[name] = max(sum(item.hits for item in kernel), len(rows))
    frame = analysis.stalls.frame
    spans[STALLS] = _simple(frame["start_ns"].to_numpy() - origin, frame["duration_ns"].to_numpy())
    if any(probe.kind == QUEUE for probe in manifest.probes) and manifest.listeners:
        known = analysis.stalls.overflows
        known = known.loc[known["listener"] >= 0].sort_values("seen_ns", kind="stable")
        times = known["seen_ns"].to_numpy() - origin
        spans[OVERFLOWS] = _simple(times, np.zeros(len(times), np.int64), known["count"].to_numpy())
    waits = accept_waits(tables)
    if waits is not None:
        since, until = waits
        spans[ACCEPT_WAIT] = _simple(since - origin, until - since)
    return Run(analysis, seconds, watched or ((0.0, seconds),), spans, hits)


def _function(
    analysis: Analysis, ids: Sequence[int], rows: Ints, root: Ints, outermost: npt.NDArray[np.bool_]
) -> Spans:
    calls, origin = analysis.nested.calls, analysis.manifest.started_ns
    start = calls["start_ns"].to_numpy()[rows]
    order = np.argsort(start, kind="stable")
    rows, start = rows[order], start[order]
    duration = calls["duration_ns"].to_numpy()[rows]
    at_s, short_calls, short_ns = [0.0], [0.0], [0.0]
    recording = analysis.recording
    for snapshot in sorted(recording.snapshots or filter(None, (recording.counters,)), key=lambda item: item.time_ns):
        kernel = [snapshot.by_probe[probe] for probe in ids if probe in snapshot.by_probe]
        at_s.append(max((snapshot.time_ns - origin) / NS_PER_S, at_s[-1]))
        short_calls.append(max(float(sum(item.short_calls for item in kernel)), short_calls[-1]))
        short_ns.append(max(float(sum(item.short_ns for item in kernel)), short_ns[-1]))
    return Spans(
        time_ns=start - origin,
        duration_ns=duration,
        total_ns=np.where(outermost[rows], duration, 0),
        self_ns=calls["self_ns"].to_numpy()[rows],
        occasion=occasions(start, root[rows]),
        weight=np.ones(len(rows), np.int64),
        short_at_s=np.array(at_s),
        short_calls=np.array(short_calls),
        short_ns=np.array(short_ns),
    )


def _simple(time_ns: Ints, duration_ns: Ints, weight: Ints | None = None) -> Spans:
    """Return events without callers, sorted by time; each is an occasion of its own."""
    order = np.argsort(time_ns, kind="stable")
    duration = duration_ns[order].astype(np.int64)
    count = np.ones(len(order), np.int64) if weight is None else weight[order].astype(np.int64)
    return Spans(time_ns[order].astype(np.int64), duration, duration, duration, np.arange(len(order)), count)


def _roots(calls: pd.DataFrame) -> Ints:
    """Return, for each call, the outermost recorded call it was made in."""
    parent = calls["parent"].to_numpy()
    root = np.arange(len(parent))
    depth = calls["depth"].to_numpy()
    for level in range(1, int(depth.max()) + 1 if len(depth) else 0):
        rows = np.flatnonzero(depth == level)
        root[rows] = root[parent[rows]]
    return root


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


__all__ = ["ACCEPT_WAIT", "OVERFLOWS", "STALLS", "Run", "Side", "Spans", "make_side"]
