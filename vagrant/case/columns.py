"""The table of all variants: its columns as data, and its cells as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from case.figures import interval, spread

BELOW_THRESHOLD = "no stall"


@dataclass(frozen=True)
class Column:
    """One column: its heading, the metric of ``figures.measure``, how it is written, and what stands for None."""

    heading: str
    metric: str
    kind: str
    missing: str = "-"


STORM = (
    Column("connections refused", "refused", "count"),
    Column("clients that waited in vain", "reply_timeouts", "count"),
    Column("queue at most", "queue_max", "count"),
    Column("longest PING", "ping_max_ms", "milliseconds"),
    Column("worst stall", "worst_ns", "duration", BELOW_THRESHOLD),
    Column("one trim at most", "trim_max_ns", "duration", "never called"),
    Column("time in trims", "trim_ns_per_s", "share of time", "none"),
    Column("time in purges", "purge_ns_per_s", "share of time", "none"),
)
SMALL = (
    Column("trims", "trims_per_s", "rate", "none"),
    Column("time in trims", "trim_ns_per_s", "share of time", "none"),
    Column("longest clientsCron", "tick_max_ns", "duration"),
    Column("worst stall", "worst_ns", "duration", BELOW_THRESHOLD),
    Column("purges", "purges", "count", "none"),
    Column("connections refused", "refused", "count"),
    Column("longest PING", "ping_max_ms", "milliseconds"),
)


def cells(variant: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    """Return one variant's row: name, server, runs, and the columns over its runs."""
    runs = variant["runs"]
    numbers = [interval(spread([run[one.metric] for run in runs]), one.kind, one.missing, len(runs)) for one in columns]
    return [variant["name"], variant["build"], str(len(runs)), *numbers]


def headings(columns: Sequence[Column]) -> list[str]:
    """Return the table's headings."""
    return ["variant", "Redis", "runs", *(one.heading for one in columns)]


def transposed(variants: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Return the same table for a terminal: a line for each column, a block for each variant."""
    width = max(len(heading) for heading in headings(columns))
    blocks = []
    for variant in variants:
        name, *values = cells(variant, columns)
        lines = [f"  {heading:{width}}  {value}" for heading, value in zip(headings(columns)[1:], values, strict=True)]
        blocks.append("\n".join([f"{name} ({variant['about']})", *lines]))
    return "\n\n".join(blocks)
