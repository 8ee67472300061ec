"""What a bench measured: samples of ours beside samples of a peer, and the table that shows them.

Samples with the same index were taken one after the other, so their ratios mean something on a machine
that is not quiet; a table row shows medians with the smallest and the largest.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


class BenchError(Exception):
    """Something could not be measured here; ``str()`` is one line that says why."""


@dataclass(frozen=True)
class Figure:
    """One row.

    Attributes:
        name: what was measured, with its unit at the end: "wall, ms".
        ours: our samples (where the name says nothing else). peer: what is beside them, "" for nothing;
            theirs: its samples.
        goal: what we aim at, in words, "" for none; met: whether the medians do.
    """

    name: str
    ours: Sequence[float]
    peer: str = ""
    theirs: Sequence[float] = ()
    goal: str = ""
    met: bool | None = None

    @property
    def ratios(self) -> list[float]:
        """Return ours divided by theirs, pair by pair."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=False) if theirs]


@dataclass
class Findings:
    """What one bench hands over: rows, and lines about what could not be measured or must be known."""

    bench: str
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data, with the ratios."""
        document = asdict(self)
        for row, figure in zip(document["figures"], self.figures, strict=True):
            row["ratios"] = figure.ratios
        return document


def table(findings: Sequence[Findings]) -> str:
    """Return all rows as aligned text, and the notes under each bench."""
    heads = ("", "measured", "beside", "ratio", "what is beside it, goal")
    rows = {id(figure): _cells(figure) for found in findings for figure in found.figures}
    widths = [max(len(cells[column]) for cells in (*rows.values(), heads)) for column in range(len(heads))]
    lines = []
    for found in findings:
        lines += ["", _line((found.bench, *heads[1:]), widths)]
        lines += [_line(rows[id(figure)], widths) for figure in found.figures]
        lines += [f"  note: {note}" for note in found.notes]
    return "\n".join(lines[1:])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _cells(figure: Figure) -> tuple[str, ...]:
    goal = ""
    if figure.goal:
        goal = f"goal {figure.goal}: {'met' if figure.met else 'NOT MET'}"
    return (
        f"  {figure.name}",
        spread(figure.ours),
        spread(figure.theirs),
        spread(figure.ratios),
        "; ".join(part for part in (figure.peer, goal) if part),
    )


def spread(samples: Sequence[float]) -> str:
    """Return the median, and the smallest and largest of several samples."""
    if not samples:
        return "-"
    middle = _number(statistics.median(samples))
    return f"{middle} ({_number(min(samples))}-{_number(max(samples))})" if len(samples) > 1 else middle


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
