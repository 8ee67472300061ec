"""A comparison for a terminal, a pipe or a mail."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from stallscope.reports.lines import INDENT, Line, faint, heading, plain, stripped, table_of
from stallscope.tracer.analysis.compare.changes import Change, Estimate
from stallscope.tracer.analysis.compare.comparison import Comparison, RunSummary
from stallscope.tracer.analysis.compare.headline import change_text, ratio_text
from stallscope.tracer.analysis.compare.limits import exposure_text, rate_text
from stallscope.tracer.units import format_duration_ns

NONE = "~"
"""What stands for a change that is not significant, as benchstat has it."""


def render(comparison: Comparison, console: Console) -> None:
    """Print a comparison."""
    for index, part in enumerate(_parts(comparison)):
        if index:
            console.print()
        for line in part:
            for segments in console.render_lines(line, console.options.update(height=None), pad=False):
                console.print(
                    Text.assemble(*((one.text, one.style or "") for one in stripped(segments))), soft_wrap=True
                )


def _parts(comparison: Comparison) -> list[list[Line]]:
    parts: list[list[Line]] = [[Text(plain(comparison.headline), style="bold")]]
    parts.append(_sides(comparison))
    if comparison.obstacles:
        lines = [Padding(Text(plain(f"{one.kind}: {one.text}"), style="red"), INDENT) for one in comparison.obstacles]
        parts.append([heading("Not comparable"), *lines])
    for subject in dict.fromkeys(change.subject for change in comparison.changes):
        changes = [change for change in comparison.changes if change.subject == subject]
        parts.append(_subject(subject, changes, comparison.confidence))
    notes = [Padding(faint(note), INDENT) for note in (*comparison.notes, legend(comparison))]
    return [*parts, [heading("How to read this"), *notes]]


def _sides(comparison: Comparison) -> list[Line]:
    table = table_of("", "watched", "clients", "connections/s", "commands/s", "recording", first_left=True)
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for name, runs in (("before", comparison.before), ("after", comparison.after)):
        for run in runs:
            table.add_row(name, *_run_cells(run))
    return [table]


def _run_cells(run: RunSummary) -> list[str]:
    numbers = (run.clients, run.connections_per_s, run.commands_per_s)
    told = ["?" if number is None else f"{number:,.0f}" for number in numbers]
    return [exposure_text(run.exposure_s), *told, plain(f"{run.path} ({run.server})")]


def _subject(subject: str, changes: list[Change], confidence: float) -> list[Line]:
    table = table_of("", "before", "after", "change", f"{confidence:.0%} interval", "p", "n", first_left=True)
    table.columns[0].no_wrap = True
    known = [change for change in changes if change.before.n or change.after.n]
    if not known:
        return [heading(subject), Padding(faint("nothing on either side"), INDENT)]
    for change in known:
        style = "" if not change.significant else "bold red" if (change.ratio or 2) > 1 else "bold green"
        table.add_row(
            change.quantity,
            value_text(change.before, change),
            value_text(change.after, change),
            Text(change_text(change) if change.significant else NONE, style=style),
            interval_text(change),
            p_text(change),
            f"{_short(change.before.n)}+{_short(change.after.n)}",
        )
    lines: list[Line] = [heading(subject), Padding(table, INDENT)]
    reasons = dict.fromkeys(change.why_not for change in known if change.why_not)
    for reason in reasons:
        which = [change.quantity for change in known if change.why_not == reason]
        names = "" if len(which) == len(known) else f"{', '.join(which)}: "
        lines.append(Padding(faint(f"{names}{reason}"), INDENT))
    return lines


def value_text(estimate: Estimate, change: Change) -> str:
    """Return a number of a change with its unit; rates before and after have the same, that of the lower."""
    unit = change.unit
    if estimate.value is None:
        return "-"
    sign = "< " if estimate.below else ""
    if unit == "ns":
        return sign + format_duration_ns(estimate.value)
    if unit == "ns/s":
        return f"{format_duration_ns(estimate.value)}/s"
    alike = min((one.value for one in (change.before, change.after) if one.value), default=estimate.value)
    short = rate_text(estimate.value, alike).replace(" per hour", "/h").replace(" per minute", "/min")
    return short.replace(" per second", "/s")


def interval_text(change: Change) -> str:
    """Return the interval of a change, with ``inf`` where it has no upper bound."""
    if change.low is None:
        return "-"
    high = "inf" if change.high is None else _bound(change.high)
    return f"[{_bound(change.low)}, {high}]"


def _short(number: int) -> str:
    """Return a number in at most four characters and a letter."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 10 * size:
            return f"{number / size:.0f}{unit}"
    return f"{number}"


def _bound(ratio: float) -> str:
    """Return a bound as a change, in whole percents where that tells enough."""
    return ratio_text(ratio) if ratio >= 3 or ratio < 0.05 else f"{(ratio - 1) * 100:+.0f}%"


def p_text(change: Change) -> str:
    """Return the p value after correction, and nothing where none was computed."""
    if change.why_not:
        return "-"
    value = max(change.p_adjusted, change.p_permutation if not change.significant else 0.0)
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def legend(comparison: Comparison) -> str:
    """Return what the columns mean and how they were computed."""
    return (
        f"{NONE}: no significant change, at {comparison.confidence:.0%} for all {comparison.comparisons} comparisons "
        "together (Holm). n: events before and after. Rates by exact Poisson tests, times and quantiles by "
        "bootstrap and permutation of time blocks."
    )
