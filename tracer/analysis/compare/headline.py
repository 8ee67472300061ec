"""The sentence of a comparison to read first, and what one must know to read the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stallscope.tracer.analysis.compare.changes import Change
from stallscope.tracer.analysis.compare.comparable import why_silent
from stallscope.tracer.analysis.compare.sides import Side
from stallscope.tracer.units import format_count

if TYPE_CHECKING:
    from stallscope.tracer.analysis.compare.comparison import Comparison

_NAMED = 3


def headline(comparison: Comparison) -> str:
    """Return how many numbers changed and which the most, or why nothing can be said."""
    total = [one for one in comparison.obstacles if not one.subjects]
    if total:
        return f"Not comparable: {total[0].text}" + (f" (and {len(total) - 1} more)." if total[1:] else ".")
    changed = [change for change in comparison.changes if change.significant]
    tested = format_count(comparison.comparisons, "comparison")
    text = f"No significant change in {tested}" if not changed else ""
    if changed:
        worst = sorted(changed, key=lambda change: -_size(change))[:_NAMED]
        named = ", ".join(f"{change.subject} {change.quantity} {change_text(change)}" for change in worst)
        text = f"{len(changed)} of {tested} changed significantly; most: {named}"
    text += f" ({comparison.confidence:.0%} for all of them together)."
    if comparison.obstacles:
        text += f" {format_count(len(comparison.obstacles), 'thing')} not comparable, see below."
    return text


def change_text(change: Change) -> str:
    """Return a change as ``-97.5%``, ``12.3x`` from three times on, or ``new``."""
    return ratio_text(change.ratio, bool(change.after.value))


def ratio_text(ratio: float | None, is_new: bool = False) -> str:
    """Return a ratio as a change: ``+12.5%`` up to threefold, then ``12.3x``."""
    if ratio is None:
        return "new" if is_new else "-"
    if ratio >= 3:
        return f"{ratio:,.1f}x" if ratio < 100 else f"{ratio:,.0f}x"
    percent = (ratio - 1) * 100
    if ratio and percent < -99.9:
        return f"{percent:+.2f}%" if percent >= -99.99 else "< -99.99%"
    return f"{percent:+.1f}%" if abs(percent) >= 0.05 else "0.0%"


def notes(comparison: Comparison, before: Side, after: Side) -> list[str]:
    """Return what makes intervals wider than they look, or what was assumed."""
    found = []
    alone = [name for name, side in (("before", before), ("after", after)) if len(side.runs) == 1]
    if alone:
        found.append(
            f"one recording {' and '.join(alone)}: that two recordings of one server differ by "
            f"{comparison.variation:.0%} is assumed, not measured; give several a side"
        )
    unknown = [load.name for load in comparison.load if load.before is None or load.after is None]
    if unknown:
        found.append(f"not known whether the load was the same: {', '.join(unknown)}; INFO did not answer")
    return found + silent_notes(before, after)


def silent_notes(before: Side, after: Side) -> list[str]:
    """Return why functions that fired before and not after are believed not to have been called."""
    found = []
    for name in before.names:
        if before.hits(name) and name in after.names and not after.hits(name):
            reason = why_silent(after, name)
            if reason:
                found.append(reason)
    return found


def _size(change: Change) -> float:
    if not change.ratio:
        return float("inf")
    return max(change.ratio, 1 / change.ratio)
