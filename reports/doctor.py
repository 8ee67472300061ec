"""The page of ``stallscope doctor``: what was looked at, what was found, how to reach more."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from stallscope.tracer.capture.preflight import FAILED, LIMITED, OK, Check

_MARKS = {OK: "[green]ok[/green]", LIMITED: "[yellow]limited[/yellow]", FAILED: "[red]FAILED[/red]"}


def describe(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Return the checks as plain JSON data."""
    return [dataclasses.asdict(check) for check in checks]


def render(checks: Sequence[Check], console: Console) -> None:
    """Print one row per check, the remedy below what is limited or failed."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        detail = check.detail + (f"\n[dim]remedy: {check.remedy}[/dim]" if check.remedy else "")
        table.add_row(_MARKS[check.state], check.name, detail)
    console.print(table)
