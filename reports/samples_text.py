"""Where stalls were, by stack samples, as lines for a terminal and the page."""

from __future__ import annotations

from rich.padding import Padding
from rich.text import Text

from stallscope.reports.lines import INDENT, Line, faint, heading, percent, plain, table_of
from stallscope.tracer.analysis.sample_summary import IN_STALLS, SampleSummary
from stallscope.tracer.units import format_count, format_duration_ns

SHOWN_FUNCTIONS = 10
SHOWN_SHARE = 0.05
"""A function is shown from this share on."""


def sampled_stacks(summary: SampleSummary) -> list[Line]:
    """Return how much of the stalls was spent how and in which functions."""
    lines: list[Line] = [heading(title(summary)), Padding(faint(how(summary)), INDENT)]
    table = table_of("with callees", "self", "share", "mostly in")
    table.columns[-1].header = "function"
    for function in summary.functions[:SHOWN_FUNCTIONS]:
        if function.total_ns < SHOWN_SHARE * summary.total_ns:
            break
        where = f"{function.name}{'' if not function.file else f' ({function.file})'}"
        table.add_row(
            format_duration_ns(function.total_ns),
            format_duration_ns(function.self_ns),
            percent(function.total_ns, summary.total_ns),
            Text(plain(where + (", probed" if function.traced else ""))),
        )
    if table.row_count:
        lines.append(Padding(table, INDENT))
    return lines


def title(summary: SampleSummary) -> str:
    """Return what the times are of."""
    count = format_count(summary.samples_in_scope, "stack sample")
    return f"Where stalls were: {count}" if summary.scope == IN_STALLS else f"Where the time went, no stall: {count}"


def how(summary: SampleSummary) -> str:
    """Return how the time was spent: on the CPU, wanting it, asleep."""
    parts = (
        (summary.running_ns, "on the CPU"),
        (summary.runnable_ns, "ready to run without a CPU"),
        (summary.asleep_ns, "asleep"),
        (summary.blocked_ns, "blocked (disk, memory)"),
    )
    told = [f"{percent(part, summary.total_ns)} {name}" for part, name in parts if part]
    told += [f"{percent(summary.not_unwound_ns, summary.total_ns)} not unwound to the end"] * bool(
        summary.not_unwound_ns
    )
    told += [f"{summary.lost:,} samples lost"] * bool(summary.lost)
    return ", ".join(told)
