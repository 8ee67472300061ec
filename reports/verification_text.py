"""A verification and a plan for a terminal, a pipe or a change ticket."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from stallscope.reports.lines import INDENT, Line, faint, heading, plain, stripped, table_of
from stallscope.tracer.analysis.compare.checks import INCONCLUSIVE, NOT_VERIFIED, VERIFIED, more_text
from stallscope.tracer.analysis.compare.plan import TRUE_SHARES, Plan
from stallscope.tracer.analysis.compare.verify import Verification

_STYLES = {VERIFIED: "bold green", NOT_VERIFIED: "bold red", INCONCLUSIVE: "bold yellow"}


def render(result: Verification, console: Console) -> None:
    """Print the verdict as one paragraph, then each check and obstacle on lines of their own."""
    lines: list[Line] = [Text(plain(result.paragraph))]
    rows = [(check.verdict, check.limit) for check in result.checks]
    rows += [(f"not comparable ({one.kind})", one.text) for one in result.obstacles]
    table = table_of("", "", first_left=True)
    table.show_header = False
    table.columns[1].justify, table.columns[1].no_wrap = "left", False
    for verdict, text in rows:
        table.add_row(Text(verdict, style=_STYLES.get(verdict, "yellow")), Text(plain(text)))
    _print([*lines, Text(""), table], console)


def render_plan(result: Plan, console: Console) -> None:
    """Print how long to record, and the chance of a verdict then."""
    titles = [f"at {share:.0%}" for share in TRUE_SHARES]
    table = table_of("seen", "record", *titles, "before")
    for step in result.steps:
        chances = [f"{chance:.0%}" for _, chance in step.chances]
        events = "none" if not step.events else f"at most {step.events}"
        table.add_row(events, more_text(step.exposure_s), *chances, f"{step.expected_before:,.1f}")
    legend = (
        "at 10%: the chance to be verified after that time, if the true rate is 10% of the one claimed; "
        "before: how many would come in that time at the baseline's rate"
    )
    _print([Text(plain(result.text)), Text(""), heading("How long"), Padding(table, INDENT), faint(legend)], console)


def _print(lines: list[Line], console: Console) -> None:
    for line in lines:
        for segments in console.render_lines(line, console.options.update(height=None), pad=False):
            console.print(Text.assemble(*((one.text, one.style or "") for one in stripped(segments))), soft_wrap=True)
