"""The lanes below the calls: what other tools saw, on the same time axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.reports.timeline.listeners import RateLane, counted, peaks
from stallscope.tracer import packet_events
from stallscope.tracer.analysis.tables import Ints, Tables

MAX_SPANS = 5_000
"""Spans kept of each source, the longest; the others are counted."""

_BINS = 20_000
_SAMPLE_BINS = 2_000

TROUBLE = frozenset(packet_events.EVENTS) - {packet_events.SYN, packet_events.SYN_ACK, packet_events.THIRD_ACK}
"""Packets that an undisturbed connection does not have."""


@dataclass(frozen=True)
class SpanLane:
    """The spans of one source, times since the start of the timeline; ``left_out`` shorter ones are not kept.

    Attributes:
        start_ns: the earliest it can have begun; uncertain_ns: it may have begun this much later.
        text: index in ``texts`` of what it was.
    """

    source: str
    start_ns: Ints
    duration_ns: Ints
    uncertain_ns: Ints
    text: Ints
    texts: tuple[str, ...]
    left_out: int


@dataclass(frozen=True)
class SampleLane:
    """One field of INFO, with every peak."""

    name: str
    unit: str
    time_ns: Ints
    value: np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Imported:
    """Everything that ``stallscope import`` added.

    Attributes:
        packets: of all captures together, by event, counted in bins; their ``pid`` is 0.
        spans: by source; samples: by field, those that changed first.
    """

    packets: tuple[RateLane, ...]
    spans: tuple[SpanLane, ...]
    samples: tuple[SampleLane, ...]


def imported_lanes(tables: Tables, origin_ns: int, elapsed_ns: int) -> Imported:
    """Return the lanes of whatever was imported."""
    bin_ns = max(-(-elapsed_ns // _BINS), 1)
    rows = tables.packets
    event = rows["event"].astype(str).to_numpy()
    time = rows["time_ns"].to_numpy() - origin_ns
    packets = [
        counted(name, 0, bin_ns, time[event == name], np.ones(int((event == name).sum()), np.int64))
        for name in packet_events.EVENTS
        if (event == name).any()
    ]
    spans = [
        _spans(str(source), mine, origin_ns)
        for source, mine in tables.imported_spans.groupby("source", observed=True, sort=True)
    ]
    samples = [
        _samples(str(name), mine, origin_ns, elapsed_ns)
        for name, mine in tables.imported_samples.groupby("name", observed=True, sort=True)
    ]
    samples.sort(key=lambda lane: (bool((lane.value == lane.value[0]).all()), lane.name))
    return Imported(tuple(packets), tuple(spans), tuple(samples))


def _spans(source: str, rows: pd.DataFrame, origin_ns: int) -> SpanLane:
    kept = rows.nlargest(MAX_SPANS, "duration_ns").sort_values("start_ns", kind="stable")
    text, texts = pd.factorize(kept["text"].astype(str))
    return SpanLane(
        source,
        kept["start_ns"].to_numpy() - origin_ns,
        kept["duration_ns"].to_numpy(),
        kept["uncertain_ns"].to_numpy(),
        text.astype(np.int64),
        tuple(str(item) for item in texts),
        len(rows) - len(kept),
    )


def _samples(name: str, rows: pd.DataFrame, origin_ns: int, elapsed_ns: int) -> SampleLane:
    time = rows["time_ns"].to_numpy() - origin_ns
    value = rows["value"].to_numpy().astype(np.float64)
    kept = peaks(time, value, max(elapsed_ns // _SAMPLE_BINS, 1))
    return SampleLane(name, str(rows["unit"].iloc[0]), time[kept], value[kept])
