"""The page itself: template, style and scripts from ``assets`` around one timeline, in one file."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from stallscope.reports import samples_text
from stallscope.reports.findings_text import WARNED_OF, blame_lines, threshold_text
from stallscope.reports.imported import imported_lines
from stallscope.reports.timeline.columns import gzip_text
from stallscope.reports.timeline.compute import Timeline
from stallscope.reports.timeline.document import describe, script_json
from stallscope.reports.timeline.tables import (
    functions_table,
    listeners_table,
    sampled_table,
    slowest_table,
    stalls_table,
    trees_table,
    trust,
)
from stallscope.tracer.analysis.listener_summary import OverflowCount
from stallscope.tracer.analysis.summary import Summary
from stallscope.tracer.units import format_duration_ns

SCRIPTS = (
    "format.js", "inflate.js", "columns.js", "state.js", "lanes.js", "flame.js", "imported.js", "figure.js",
    "stacks.js", "detail.js", "controls.js", "start.js",
)  # fmt: skip
"""In the order in which they run."""


SHOWN_FACTS = 20
"""Facts shown of one finding."""


@dataclass(frozen=True)
class KeyNumber:
    """One of the numbers on top: what it is, the number with its unit, and what qualifies it."""

    name: str
    value: str
    detail: str
    alarming: bool = False


@dataclass(frozen=True)
class Fact:
    """One fact behind a finding; ``time`` and ``window`` (start and length in ns) are "" where it has none."""

    text: str
    time: str = ""
    window: str = ""


@dataclass(frozen=True)
class ShownFinding:
    """One finding as the page shows it."""

    weight: str
    title: str
    remedy: str
    facts: tuple[Fact, ...]


def render(timeline: Timeline) -> str:
    """Return the page: HTML that needs nothing but a browser."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    document, columns = describe(timeline)
    summary = timeline.summary
    return environment.from_string(_asset("page.html")).render(
        summary=summary,
        file=summary.path.rpartition("/")[2],
        when=_when(timeline),
        length=format_duration_ns(timeline.elapsed_ns),
        window=f" of it, from {timeline.offset_ns / 1e9:.3f} s on" if timeline.offset_ns else "",
        mood=_mood(summary),
        key_numbers=key_numbers(timeline),
        findings=findings(timeline),
        causes=blame_lines(summary.blame) if summary.overflows.total else [],
        what_if=[threshold_text(result) for result in summary.what_if],
        imported=imported_lines(summary.imported) if summary.imported else [],
        trees=trees_table(timeline),
        stalls=stalls_table(timeline),
        slowest=slowest_table(timeline),
        functions=functions_table(timeline),
        sampled=sampled_table(timeline),
        sampled_title=samples_text.title(summary.sampled) if summary.sampled else "",
        sampled_how=samples_text.how(summary.sampled) if summary.sampled else "",
        listeners=listeners_table(timeline),
        trust=trust(timeline),
        calls_total=timeline.calls.total,
        slow=format_duration_ns(timeline.slow_ns),
        style=Markup(_asset("page.css")),
        document=Markup(script_json(document)),
        columns=columns,
        plotly=gzip_text(get_plotlyjs()),
        scripts=Markup("\n".join(_asset(name) for name in SCRIPTS)),
    )


def key_numbers(timeline: Timeline) -> tuple[KeyNumber, ...]:
    """Return what is read first, as text."""
    summary = timeline.summary
    longest = timeline.stalls.longest_ns
    count = f"{summary.stall_count:,} stall" + ("" if summary.stall_count == 1 else "s")
    together = f", {format_duration_ns(summary.stall_total_ns)} together" if summary.stall_count > 1 else ""
    threshold = f"none of at least {format_duration_ns(summary.stall_ns)}"
    refused = summary.overflows
    queue = max(summary.listeners, key=lambda item: (item.queue_max or 0) / max(item.queue_limit, 1), default=None)
    lost = sum(loss.lost for loss in summary.losses)
    numbers = [
        KeyNumber("Longest stall", format_duration_ns(longest) if longest else "none",
                  count + together if longest else threshold, longest > 0),
        KeyNumber("Refused connections",
                  f"{refused.total if summary.connections_refused is None else summary.connections_refused:,}",
                  _refused(refused, summary.connections_refused), refused.total > 0),
    ]  # fmt: skip
    if queue is None or queue.queue_max is None:
        numbers.append(KeyNumber("Accept queue", "?", "not observed"))
    else:
        full = queue.queue_max > queue.queue_limit
        numbers.append(
            KeyNumber("Longest accept queue", f"{queue.queue_max:,} of {queue.queue_limit:,}", queue.address, full)
        )
    calls = timeline.calls
    numbers.append(
        KeyNumber(
            "Calls recorded", f"{calls.total:,}", f"{calls.slow:,} of at least {format_duration_ns(timeline.slow_ns)}"
        )
    )
    loop = summary.loop
    if loop and timeline.elapsed_ns:
        share = f"{loop.busy_ns / timeline.elapsed_ns:.1%} of the time" if len(summary.targets) == 1 else "all servers"
        if loop.seen_ns is not None:
            share = f"seen for {format_duration_ns(loop.seen_ns)}"
        numbers.append(KeyNumber("Event loop busy", format_duration_ns(loop.busy_ns), share))
    numbers.append(KeyNumber("Events lost", f"{lost:,}", "" if summary.complete else "recording cut short", lost > 0))
    return tuple(numbers)


def findings(timeline: Timeline) -> tuple[ShownFinding, ...]:
    """Return the findings, without those that the warnings say too."""
    shown = []
    for finding in timeline.summary.findings:
        if finding.rule in WARNED_OF:
            continue
        facts = []
        for item in finding.evidence[:SHOWN_FACTS]:
            if item.start_ns is None:
                facts.append(Fact(item.text))
            else:
                time = f"{(item.start_ns + timeline.offset_ns) / 1e9:.3f} s"
                facts.append(Fact(item.text, time, f"{item.start_ns} {item.duration_ns}"))
        left = len(finding.evidence) - len(facts)
        if left > 0:
            facts.append(Fact(f"and {left:,} more like these"))
        shown.append(ShownFinding(finding.weight, finding.title, finding.remedy, tuple(facts)))
    return tuple(shown)


def _refused(count: OverflowCount, connections: int | None) -> str:
    """Return when connections were refused, and how often, where one was refused more than once."""
    parts = ((count.inside, "in stalls"), (count.drain, "draining"), (count.outside, "at other times"))
    named = [f"{number:,} {when}" for number, when in parts if number]
    times = "" if connections in (None, count.total) else f"{count.total:,} times, "
    if len(named) == 1:
        return times + named[0].replace(f"{count.total:,}", "all")
    return times + ", ".join(named) if named else "accept queue never overflowed"


def _mood(summary: Summary) -> str:
    """Return the class of the verdict: whether there is trouble, none, or nothing that was looked at."""
    if summary.stall_count or summary.overflows.total:
        return "trouble"
    seen = any(item.queue_max is not None for item in summary.listeners) or any(
        item.calls for item in summary.functions
    )
    return "calm" if seen or (summary.loop and summary.loop.iterations) else "unknown"


def _when(timeline: Timeline) -> str:
    try:
        moment = datetime.fromtimestamp(timeline.wall_ns / 1e9, timezone.utc)
    except (OverflowError, ValueError, OSError):
        return ""
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def _asset(name: str) -> str:
    return files("stallscope.reports.timeline").joinpath("assets", name).read_text(encoding="utf-8")
