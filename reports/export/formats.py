"""The formats ``stallscope export`` writes.

Each is a module of its own beside this one, loaded when it is used; this list needs nothing, so the command line
can show it at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from stallscope.tracer.analysis.analysis import Analysis

    Exporter = Callable[[Analysis, BinaryIO], None]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: what ``-f`` takes; suffix: of its files; description: what opens it, in a few words.
        is_text: it may go to a terminal or through a pipe.
        load: returns the function that writes an analysis to a binary stream.
        many_rows: above so many events opening it takes half a minute and more, or fails; None: it does not matter.
        why: what happens then, for the reader.
        load_samples: returns the function that writes the stack samples instead of calls; None: it has none.
        has_imported: what ``stallscope import`` added is in it.
    """

    name: str
    suffix: str
    description: str
    is_text: bool
    load: Callable[[], Exporter]
    many_rows: int | None = None
    why: str = ""
    load_samples: Callable[[], Exporter] | None = None
    has_imported: bool = False

    def beside(self, recording: Path) -> Path:
        """Return the name of the export that belongs to a recording: the same with the format's suffix."""
        return recording.with_name(recording.stem + self.suffix)


def _perfetto() -> Exporter:
    from stallscope.reports.export import perfetto

    return perfetto.write


def _chrome() -> Exporter:
    from stallscope.reports.export import chrome

    return chrome.write


def _speedscope() -> Exporter:
    from stallscope.reports.export import speedscope

    return speedscope.write


def _folded() -> Exporter:
    from stallscope.reports.export import folded

    return folded.write


def _speedscope_samples() -> Exporter:
    from stallscope.reports.export import samples

    return samples.write_speedscope


def _folded_samples() -> Exporter:
    from stallscope.reports.export import samples

    return samples.write_folded


def _parquet() -> Exporter:
    from stallscope.reports.export import parquet

    return parquet.write


def _csv() -> Exporter:
    from stallscope.reports.export import csv

    return csv.write


def _ndjson() -> Exporter:
    from stallscope.reports.export import ndjson

    return ndjson.write


_SLOW = "what shows it needs more than half a minute to open"
_SPREADSHEET_LINES = 1_048_576

FORMATS = {
    item.name: item
    for item in (
        Format(
            "perfetto", ".pftrace", "Perfetto: ui.perfetto.dev, trace_processor", False, _perfetto, 2_000_000, _SLOW
        ),
        Format(
            "chrome", ".trace.json", "Chrome's trace events: chrome://tracing", True, _chrome, 2_000_000, _SLOW,
            has_imported=True,
        ),
        Format(
            "speedscope", ".speedscope.json", "speedscope: speedscope.app", True, _speedscope, 2_000_000, _SLOW,
            _speedscope_samples,
        ),
        Format(
            "folded", ".folded", "folded stacks, self time in us: flamegraph.pl, inferno", True, _folded,
            load_samples=_folded_samples,
        ),
        Format("parquet", ".parquet", "one row an event: DuckDB, pandas, polars", False, _parquet, has_imported=True),
        Format(
            "csv", ".csv", "the same rows: spreadsheets", True, _csv, _SPREADSHEET_LINES - 1,
            f"a spreadsheet takes {_SPREADSHEET_LINES:,} lines", has_imported=True,
        ),
        Format(
            "ndjson", ".ndjson", "the same rows, a JSON object a line: jq, log pipelines", True, _ndjson,
            has_imported=True,
        ),
    )
}  # fmt: skip
"""All formats by name."""
