"""What made a capture of ``stallscope watch``, in words."""

from __future__ import annotations

from datetime import datetime, timezone

from rich.padding import Padding
from rich.text import Text

from stallscope.reports.lines import INDENT, Line, faint, heading, plain, table_of
from stallscope.tracer.analysis.summary import Summary
from stallscope.tracer.manifest import DetailInfo, TriggerInfo
from stallscope.tracer.units import format_duration_ns

SHOWN_TRIGGERS = 8


def trigger_lines(summary: Summary) -> list[Line]:
    """Return when each trigger came true and what was seen then, and when detail probes were attached."""
    title = "Triggers"
    count = len(summary.triggers) + summary.further_triggers
    if count > SHOWN_TRIGGERS:
        title += f" (the first {SHOWN_TRIGGERS} of {count:,})"
    table = table_of("at", "UTC", "trigger", "seen")
    table.columns[2].justify = table.columns[3].justify = "left"
    table.columns[3].no_wrap = False
    for item in sorted(summary.triggers, key=lambda trigger: trigger.time_ns)[:SHOWN_TRIGGERS]:
        wall_ns = summary.started_wall_ns + item.time_ns
        table.add_row(
            f"{item.time_ns / 1e9:.3f} s", _clock(wall_ns), Text(plain(item.text)), Text(plain(describe(item)))
        )
    lines: list[Line] = [heading(title), Padding(table, INDENT)]
    lines += [Padding(faint(describe_detail(item)), INDENT) for item in summary.details[:SHOWN_TRIGGERS]]
    return lines


def describe(item: TriggerInfo) -> str:
    """Return what was seen when a trigger came true, as ``50.0 ms so far, event loop of process 4711``."""
    if item.unit == "ns":
        amount = format_duration_ns(item.value) + (" so far" if item.under_way else "")
    elif item.unit == "%":
        amount = f"{item.value:.0f}%"
    else:
        amount = f"{item.value:,.0f} {item.unit}"
    where = f"{item.subject} of process {item.pid}" if item.pid and item.subject else item.subject
    return f"{amount}, {where}" if where else amount


def describe_detail(item: DetailInfo) -> str:
    """Return when detail probes were attached and how long that took, times since the start of the recording."""
    text = (
        f"detail probes attached at {item.attached_ns / 1e9:.3f} s, "
        f"{format_duration_ns(max(item.attached_ns - item.trigger_ns, 0))} after the trigger"
    )
    until = f", detached at {item.detached_ns / 1e9:.3f} s" if item.detached_ns else ""
    return f"{text}{until}" + (f"; {item.text}" if item.text else "")


def _clock(wall_ns: int) -> str:
    try:
        return datetime.fromtimestamp(wall_ns / 1e9, timezone.utc).strftime("%H:%M:%S.%f")[:-3]
    except (OverflowError, ValueError, OSError):
        return "?"
