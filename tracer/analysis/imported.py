"""What other tools said, beside what was recorded: captures, SLOWLOG, LATENCY, INFO."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.tracer.analysis.packets import CaptureSummary, summarise_captures
from stallscope.tracer.analysis.stalls import Stalls
from stallscope.tracer.analysis.tables import Tables
from stallscope.tracer.manifest import ImportInfo
from stallscope.tracer.units import format_duration_ns


@dataclass(frozen=True)
class SpanSource:
    """The spans of one source.

    Attributes:
        source: ``SLOWLOG``, or ``LATENCY`` and the event's name; count: its spans in the recording.
        longest_ns: 0 without any; longest_text: what the longest was.
        stalls: how many of the recorded stalls one of them may be: it may lie in the stall, and is at least half as
            long. None where no stall was recorded.
    """

    source: str
    count: int
    longest_ns: int
    longest_text: str
    stalls: int | None


@dataclass(frozen=True)
class SampleSeries:
    """One field of INFO over time, in ``unit``."""

    name: str
    unit: str
    samples: int
    first: float
    last: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class ImportedSummary:
    """Everything that was imported.

    Attributes:
        files: the inputs; captures, spans, samples: what they show. A source without an entry is among the spans:
            that SLOWLOG is empty while Redis stalls says something.
        stalls: how many stalls were recorded.
    """

    files: tuple[ImportInfo, ...]
    captures: tuple[CaptureSummary, ...]
    spans: tuple[SpanSource, ...]
    samples: tuple[SampleSeries, ...]
    stalls: int


def summarise_imported(tables: Tables, stalls: Stalls) -> ImportedSummary | None:
    """Return what was imported; None where nothing was."""
    if not tables.manifest.imports:
        return None
    return ImportedSummary(
        tables.manifest.imports,
        summarise_captures(tables, stalls),
        _spans(tables, stalls),
        _samples(tables.imported_samples),
        len(stalls.frame),
    )


def imported_sentence(imported: ImportedSummary) -> str:
    """Return what the imported rows show, for a recording that has no others; "" where they show nothing."""
    sentences = []
    for capture in imported.captures:
        text = f"Of {_count(capture.connections, 'connection')} in {imported.files[capture.file].file} "
        if capture.retried:
            text += f"{capture.retried:,} had to send their SYN again and waited {wait_range(capture)}"
        else:
            text += "none had to send its SYN again"
        text += f"; {capture.unanswered:,} got no answer" if capture.unanswered else ""
        text += f"; {capture.refused_with_rst:,} were refused with RST" if capture.refused_with_rst else ""
        sentences.append(f"{text}.")
    longest = max(imported.spans, key=lambda item: item.longest_ns, default=None)
    if longest is not None and longest.count:
        sentences.append(f"The longest entry of {longest.source} took {format_duration_ns(longest.longest_ns)}.")
    return " ".join(sentences)


def wait_range(capture: CaptureSummary) -> str:
    """Return how long the connections of a capture that sent their SYN again waited, as ``1.02 s to 3.10 s``."""
    if capture.wait_min_ns is None or capture.wait_max_ns is None:
        return ""
    first, last = format_duration_ns(capture.wait_min_ns), format_duration_ns(capture.wait_max_ns)
    return first if first == last else f"{first} to {last}"


def _spans(tables: Tables, stalls: Stalls) -> tuple[SpanSource, ...]:
    spans = tables.imported_spans
    found = []
    for source in spans["source"].cat.categories:
        mine = spans.loc[spans["source"] == source].reset_index(drop=True)
        if mine.empty:
            continue
        longest = int(mine["duration_ns"].to_numpy().argmax())
        found.append(
            SpanSource(
                str(source),
                len(mine),
                int(mine["duration_ns"].iloc[longest]),
                str(mine["text"].iloc[longest]),
                _stalls_covered(mine, stalls.frame) if len(stalls.frame) else None,
            )
        )
    seen = {item.source.split(" ")[0] for item in found}
    silent = dict.fromkeys(item.format for item in tables.manifest.imports if item.format in ("SLOWLOG", "LATENCY"))
    found += [SpanSource(form, 0, 0, "", 0 if len(stalls.frame) else None) for form in silent if form not in seen]
    return tuple(found)


def _stalls_covered(spans: pd.DataFrame, stalls: pd.DataFrame) -> int:
    """Return how many stalls may be one of these spans: they may overlap, and the span is half as long or longer."""
    begin, length = stalls["start_ns"].to_numpy(), stalls["duration_ns"].to_numpy()
    start = spans["start_ns"].to_numpy()
    end = start + spans["duration_ns"].to_numpy() + spans["uncertain_ns"].to_numpy()
    low = np.searchsorted(begin, start - length.max(), side="left")
    number = np.maximum(np.searchsorted(begin, end, side="right") - low, 0)
    span = np.repeat(np.arange(len(spans)), number)
    stall = np.arange(len(span)) - np.repeat(np.cumsum(number) - number, number) + low[span]
    half = 2 * spans["duration_ns"].to_numpy()[span] >= length[stall]
    return int(np.unique(stall[half & (begin[stall] + length[stall] >= start[span])]).size)


def _samples(samples: pd.DataFrame) -> tuple[SampleSeries, ...]:
    found = []
    for name, mine in samples.groupby("name", observed=True, sort=False):
        value = mine["value"].to_numpy()
        numbers = (float(value[0]), float(value[-1]), float(value.min()), float(value.max()))
        found.append(SampleSeries(str(name), str(mine["unit"].iloc[0]), len(value), *numbers))
    return tuple(found)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
