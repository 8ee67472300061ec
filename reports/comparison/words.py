"""A comparison's numbers and sentences as the page shows them; the same words as on the terminal."""

from __future__ import annotations

import math

from stallscope.reports.comparison.compute import compute_sides
from stallscope.reports.comparison.page import PageText, render
from stallscope.reports.comparison_text import NONE, interval_text, legend, p_text, value_text
from stallscope.reports.timeline.tables import Cell, Row, Table
from stallscope.tracer.analysis.compare.changes import Change, Estimate
from stallscope.tracer.analysis.compare.comparison import Comparison, RunSummary
from stallscope.tracer.analysis.compare.headline import change_text
from stallscope.tracer.analysis.compare.limits import exposure_text
from stallscope.tracer.analysis.compare.sides import Side

_COLUMNS = (
    ("what", False), ("quantity", False), ("before", True), ("after", True), ("change", True),
    ("interval", True), ("p", True), ("n before", True), ("n after", True),
)  # fmt: skip


def page_of(comparison: Comparison, before: Side, after: Side) -> str:
    """Return the page of a comparison: HTML that needs nothing but a browser."""
    sides = compute_sides([run.analysis for run in before.runs], [run.analysis for run in after.runs])
    return render(text_of(comparison), tables_of(comparison), sides)


def text_of(comparison: Comparison) -> PageText:
    """Return the words around tables and charts."""
    return PageText(
        title=f"{_names(comparison.before)} and {_names(comparison.after)}",
        verdict=comparison.headline,
        mood=_mood(comparison),
        sources=(_source("before", comparison.before), _source("after", comparison.after)),
        warnings=tuple(f"{one.kind}: {one.text}" for one in comparison.obstacles),
        notes=(*comparison.notes, legend(comparison)),
    )


def tables_of(comparison: Comparison) -> tuple[tuple[str, Table], ...]:
    """Return what changed significantly, then everything."""
    known = [change for change in comparison.changes if change.before.n or change.after.n]
    changed = [change for change in known if change.significant]
    reasons = dict.fromkeys(f"{change.subject}: {change.why_not}" for change in known if change.why_not)
    everything = Table(_COLUMNS, tuple(_row(change) for change in known), "; ".join(reasons))
    if not changed:
        return (("Every number, before and after", everything),)
    most = sorted(changed, key=lambda change: -_fold(change))
    return (
        ("What changed significantly, the most first", Table(_COLUMNS, tuple(_row(change) for change in most))),
        ("Every number, before and after", everything),
    )


def _mood(comparison: Comparison) -> str:
    """Return the class of the verdict: something grew, everything that changed shrank, or nothing can be said."""
    changed = [change for change in comparison.changes if change.significant]
    if not changed or any(not one.subjects for one in comparison.obstacles):
        return "unknown"
    return "trouble" if any(change.ratio is None or change.ratio > 1 for change in changed) else "calm"


def _row(change: Change) -> Row:
    low = change.low if change.low is not None else -1.0
    return Row(
        (
            Cell(change.subject, change.subject),
            Cell(change.quantity, change.quantity),
            _value(change.before, change),
            _value(change.after, change),
            Cell(change_text(change) if change.significant else NONE, _fold(change) if change.significant else 0.0),
            Cell(interval_text(change), low),
            Cell(p_text(change), change.p_adjusted),
            Cell(f"{change.before.n:,}", change.before.n),
            Cell(f"{change.after.n:,}", change.after.n),
        )
    )


def _value(estimate: Estimate, change: Change) -> Cell:
    return Cell(value_text(estimate, change), -1.0 if estimate.value is None else estimate.value)


def _fold(change: Change) -> float:
    """Return by how many times it went up or down; what is new or gone comes first."""
    if not change.ratio:
        return 1e300
    return math.exp(abs(math.log(change.ratio)))


def _names(runs: tuple[RunSummary, ...]) -> str:
    name = runs[0].path.rpartition("/")[2]
    return name if len(runs) == 1 else f"{name} and {len(runs) - 1} more"


def _source(side: str, runs: tuple[RunSummary, ...]) -> str:
    servers = ", ".join(dict.fromkeys(run.server for run in runs if run.server))
    return f"{side}: {_names(runs)}, {servers}, watched for {exposure_text(sum(run.exposure_s for run in runs))}"
