"""The parts of a summary that explain: findings, slow call trees, causes, and what a threshold would change."""

from __future__ import annotations

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stallscope.reports.lines import INDENT, Line, faint, heading, plain, table_of
from stallscope.tracer.analysis.blame import BlameSummary
from stallscope.tracer.analysis.chance import Coincidence
from stallscope.tracer.analysis.findings import CAUSE, CLEARED, CONTRIBUTES, NOTICE
from stallscope.tracer.analysis.stall_summary import StallSummary
from stallscope.tracer.analysis.summary import Summary
from stallscope.tracer.analysis.whatif import WhatIf
from stallscope.tracer.units import format_bytes, format_count, format_duration_ns

SHOWN_TREES = 5
SHOWN_EVIDENCE = {CAUSE: 4, CONTRIBUTES: 1}
"""Facts shown of a finding of this weight; the JSON document has all."""

_STYLES = {CAUSE: "bold red", CONTRIBUTES: "yellow", NOTICE: "", CLEARED: "green"}

WARNED_OF = {"losses", "never-fired"}
"""Findings that the warnings at the end say too."""


def findings(summary: Summary) -> list[Line]:
    """Return the findings, each with what to do and, of the weightiest, the facts; nothing if there are none."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in summary.findings:
        if finding.rule in WARNED_OF:
            continue
        table.add_row(Text(finding.weight, style=_STYLES[finding.weight]), Text(plain(finding.title)))
        for fact in finding.evidence[: SHOWN_EVIDENCE.get(finding.weight, 0)]:
            when = "" if fact.start_ns is None else f"at {fact.start_ns / 1e9:.3f} s: "
            table.add_row("", faint(f"- {when}{fact.text}"))
        if finding.remedy:
            table.add_row("", Text(f"> {plain(finding.remedy)}", style="italic"))
    return [heading("Findings"), Padding(table, INDENT)] if table.row_count else []


def around_a_stall(stall: StallSummary, *, waits_exact: bool) -> list[Line]:
    """Return what a stall did to the queue and to whom, one line each for what is known."""
    lines = []
    if stall.queue_max is not None:
        lengths = ((stall.queue_start, "before"), (stall.queue_max, "at most"), (stall.queue_end, "at the end"))
        known = [f"{length:,} {when}" for length, when in lengths if length is not None]
        lines.append(f"accept queue: {', '.join(known)}; limit {stall.queue_limit:,}")
    if stall.full_ns is not None:
        text = f"queue full after {format_duration_ns(stall.full_ns)}"
        if stall.first_overflow_ns is not None:
            text += f", first overflow seen after {format_duration_ns(stall.first_overflow_ns)}"
        lines.append(text)
    elif stall.first_overflow_ns is not None:
        lines.append(f"first overflow seen after {format_duration_ns(stall.first_overflow_ns)}")
    if stall.waited and stall.wait_max_ns is not None:
        at_least = "" if waits_exact else "at least "
        lines.append(
            f"waited in the queue: {at_least}{format_count(stall.waited, 'connection')}, the longest {at_least}"
            f"{format_duration_ns(stall.wait_max_ns)}"
        )
    if stall.clients:
        most = ", ".join(
            f"{client.field} {client.client}{f' ({client.peer})' if client.peer else ''} "
            f"{format_duration_ns(client.total_ns)}"
            for client in stall.clients_blamed[:3]
        )
        lines.append(f"for {format_count(stall.clients, 'client')}, most for {most}")
    return [Padding(faint(line), INDENT) for line in lines]


def trees(summary: Summary) -> list[Line]:
    """Return the longest call trees: one row each, with the function that took most of it."""
    longest = sorted(summary.trees, key=lambda tree: -tree.duration_ns)[:SHOWN_TREES]
    table = table_of("at", "took", "clients", "calls", "of it", "mostly in")
    for tree in sorted(longest, key=lambda tree: tree.start_ns):
        most = tree.functions[0]
        path = most.name if most.name == tree.root else f"{most.name} (in {tree.root})"
        table.add_row(
            f"{tree.start_ns / 1e9:.3f} s",
            ("> " if tree.unfinished else "") + format_duration_ns(tree.duration_ns),
            f"{tree.clients:,}" if tree.clients else "-",
            f"{tree.calls:,}",
            format_duration_ns(most.self_ns),
            Text(plain(path)),
        )
    title = f"Slow calls with all they called, at least {format_duration_ns(summary.stall_ns)}"
    if summary.tree_count > len(longest):
        title += f" (the longest {len(longest)} of {summary.tree_count:,})"
    return [heading(title), Padding(table, INDENT)]


def blame(result: BlameSummary) -> list[Line]:
    """Return how many overflows have which cause, and whether that may be chance."""
    return [Padding(faint(line), INDENT) for line in blame_lines(result)]


def blame_lines(result: BlameSummary) -> list[str]:
    """Return the same as plain text."""
    causes = [f"{number:,} {cause}" for cause, number in result.causes.items() if number]
    lines = [f"by cause: {', '.join(causes)}"] if causes else []
    lines += [f"no known cause: {number:,} {reason}" for reason, number in result.reasons.items()]
    if result.coincidence is not None:
        lines.append(_against_chance(result.coincidence))
    return lines


def what_if(summary: Summary) -> list[Line]:
    """Return what each trim threshold would have changed, a line or two each."""
    lines: list[Line] = [heading("What if only query buffers with more unused space were trimmed")]
    for result in summary.what_if:
        lines.append(Padding(Text(threshold_text(result)), INDENT))
    return lines


def threshold_text(result: WhatIf) -> str:
    """Return what one trim threshold would have changed, in one line."""
    size = result.threshold_bytes
    threshold = f"{size // 1024:,} KB" if size and size % 1024 == 0 else f"{size:,} B"
    text = (
        f"above {threshold}: {result.skipped:,} of {format_count(result.trims, 'trim')} "
        f"skipped, {format_duration_ns(result.saved_ns)} saved, {format_bytes(result.kept_bytes)} not given back "
        f"(at a time at most {format_bytes(result.kept_limit_bytes)}: {format_count(result.clients, 'client')})"
    )
    if result.stalls:
        text += f"; stalls {result.stalls:,} -> {result.stalls_left:,}, the longest "
        text += f"{format_duration_ns(result.longest_stall_ns)} -> {format_duration_ns(result.longest_left_ns)}"
    if result.not_recorded:
        text += f"; {format_count(result.not_recorded, 'more trim was', 'more trims were')} not recorded"
    return text


def _against_chance(result: Coincidence) -> str:
    return (
        f"in stalls: {result.together:,} of {result.overflows:,}; by chance {result.expected:,.0f}, since "
        f"{format_count(result.stalls, 'stall')} took {result.stall_share:.1%} of the time; as many or more in "
        f"{result.p_value:.2g} of all shifts"
    )
