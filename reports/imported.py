"""What was imported, as lines of text for the summary."""

from __future__ import annotations

from collections.abc import Iterator

from stallscope.tracer.analysis.imported import ImportedSummary, SampleSeries, SpanSource, wait_range
from stallscope.tracer.analysis.packets import CaptureSummary
from stallscope.tracer.units import format_bytes, format_duration_ns

SHOWN_SAMPLES = 12
"""Fields of INFO in the summary; those that are always kept come first."""


def imported_lines(imported: ImportedSummary) -> list[str]:
    """Return what other tools said, a line for each source, and what is missing from it."""
    lines: list[str] = []
    for capture in imported.captures:
        lines += _capture(capture, imported.files[capture.file].file)
    lines += [_span(source, imported.stalls) for source in imported.spans]
    lines += [_series(series) for series in imported.samples[:SHOWN_SAMPLES]]
    if len(imported.samples) > SHOWN_SAMPLES:
        lines.append(f"INFO: {len(imported.samples) - SHOWN_SAMPLES:,} more fields are in the recording")
    for item in imported.files:
        if item.outside:
            lines.append(f"{item.file}: {_count(item.outside, 'row')} before or after the recording left out")
        lines += [f"{item.file}: {note}" for note in item.notes]
    return lines


def _capture(capture: CaptureSummary, file: str) -> Iterator[str]:
    text = f"tcpdump: {_count(capture.connections, 'connection')} sent {_count(capture.syns, 'SYN')}"
    if capture.retried:
        text += f", {capture.retried:,} waited {wait_range(capture)}"
        if capture.retried_unanswered:
            text += f", {capture.retried_unanswered:,} of them in vain"
    yield f"{text} ({file}, {', '.join(capture.servers)})"
    counts = (
        (capture.unanswered, "never answered"),
        (capture.refused_with_rst, "refused with RST"),
        (capture.handshakes_repeated, "SYN-ACK sent again after the third ACK"),
        (capture.resets_by_server, "RST by the server"),
        (capture.resets_by_client, "RST by clients"),
        (capture.retransmissions_by_client, "data or FIN sent again by clients"),
        (capture.retransmissions_by_server, "data or FIN sent again by the server"),
    )
    told = [f"{count:,} {what}" for count, what in counts if count]
    if told:
        yield f"  {', '.join(told)}"
    if capture.unanswered_syns:
        text = f"{_count(capture.unanswered_syns, 'SYN')} got no answer"
        if capture.in_stalls is not None:
            text += f", {capture.in_stalls:,} of them in a stall or the draining after it"
        if capture.refusals:
            text += f"; the recording has {_count(capture.refusals.times, 'refusal')} meanwhile"
        yield f"  {text}"
    if capture.refusals and capture.refusals.connections:
        known = capture.refusals
        text = f"{known.captured:,} of {_count(known.connections or 0, 'refused connection')} are in the capture"
        if known.clock_ns is not None:
            text += f", their first SYN {format_duration_ns(abs(known.clock_ns))} "
            text += "earlier than the refusal" if known.clock_ns <= 0 else "later than the refusal"
        yield f"  {text}"


def _span(source: SpanSource, stalls: int) -> str:
    if not source.count:
        text = f"{source.source}: nothing in the recording's time"
    else:
        what = f" ({source.longest_text})" if source.longest_text else ""
        entries = "1 entry" if source.count == 1 else f"{source.count:,} entries"
        text = f"{source.source}: {entries}, longest {format_duration_ns(source.longest_ns)}{what}"
    if source.stalls is None:
        return text
    if not source.stalls:
        return f"{text}; none of the {_count(stalls, 'stall')} is in it"
    return f"{text}; {source.stalls:,} of the {_count(stalls, 'stall')} may be in it"


def _series(series: SampleSeries) -> str:
    text = f"INFO {series.name}: {_number(series.first, series.unit)}"
    if series.minimum == series.maximum:
        return text
    return (
        f"{text} first, {_number(series.last, series.unit)} last, "
        f"between {_number(series.minimum, series.unit)} and {_number(series.maximum, series.unit)}"
    )


def _number(value: float, unit: str) -> str:
    if unit == "B":
        return format_bytes(value)
    return f"{value:,.10g} {unit}".rstrip()


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
