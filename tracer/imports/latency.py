"""LATENCY HISTORY and LATENCY LATEST as redis-cli prints them, in any of its forms.

A sample has the second in which the event ended, and its milliseconds; of several in one second Redis keeps the
longest. LATENCY HISTORY does not say of which event it is: the command before it does, or the file's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stallscope.tracer.imports.replies import NESTED, Reply, number
from stallscope.tracer.imports.rows import Input, Span, is_wall_s, shortened, spans_input

FORMAT = "LATENCY"
MAX_DURATION_MS = 10**10


@dataclass(frozen=True)
class Sample:
    """One sample of one event; ``max_ms`` is the event's longest ever, 0 where it was not told."""

    event: str
    ended_s: int
    duration_ms: int
    max_ms: int = 0


def history(replies: Iterable[Reply], event: str) -> list[Sample] | None:
    """Return the samples of LATENCY HISTORY of this event; None if a reply is none of that."""
    samples = []
    for reply in replies:
        if reply.form == NESTED:
            rows = reply.value
        else:
            items = _without_blank_ends(reply.value)
            rows = [items[place : place + 2] for place in range(0, len(items), 2)]
        for row in rows:
            if not isinstance(row, list) or len(row) != 2:
                return None
            sample = _sample(event, row[0], row[1], 0)
            if sample is None:
                return None
            samples.append(sample)
    return samples


def latest(replies: Iterable[Reply]) -> list[Sample] | None:
    """Return the samples of LATENCY LATEST, one an event; None if a reply is none of that."""
    samples = []
    for reply in replies:
        for row in reply.value if reply.form == NESTED else _flat_rows(_without_blank_ends(reply.value)):
            if not isinstance(row, list) or len(row) < 4 or not isinstance(row[0], str) or number(row[0]) is not None:
                return None
            sample = _sample(row[0], row[1], row[2], row[3])
            if sample is None:
                return None
            samples.append(sample)
    return samples


def latency_input(found: Sequence[Sample]) -> Input:
    """Return the samples as the rows of an input; a second of an event that came several times is one row."""
    longest: dict[tuple[str, int], Sample] = {}
    for sample in found:
        key = (sample.event, sample.ended_s)
        if key not in longest or (longest[key].duration_ms, longest[key].max_ms) < (sample.duration_ms, sample.max_ms):
            longest[key] = sample
    spans = [
        Span(
            f"{FORMAT} {shortened(sample.event)}",
            sample.ended_s,
            sample.duration_ms * 1_000_000,
            f"longest ever {sample.max_ms} ms" if sample.max_ms else "",
        )
        for sample in sorted(longest.values(), key=lambda sample: (sample.ended_s, sample.event))
    ]
    return spans_input("", FORMAT, "redis-cli LATENCY", spans, {"samples": len(spans)})


def _flat_rows(items: list[Any]) -> list[list[Any]]:
    """Return a flat reply cut where a name begins."""
    rows: list[list[Any]] = []
    for item in items:
        if not rows or number(item) is None:
            rows.append([])
        rows[-1].append(item)
    return rows


def _without_blank_ends(items: list[Any]) -> list[Any]:
    return [item for item in items if str(item).strip()]


def _sample(event: str, ended: object, duration: object, longest: object) -> Sample | None:
    ended_s, duration_ms, max_ms = number(ended), number(duration), number(longest)
    if ended_s is None or duration_ms is None or max_ms is None or not is_wall_s(ended_s):
        return None
    if not (0 <= duration_ms < MAX_DURATION_MS and 0 <= max_ms < MAX_DURATION_MS):
        return None
    return Sample(event, ended_s, duration_ms, max_ms)
