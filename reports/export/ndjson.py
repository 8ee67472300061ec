"""NDJSON: each row of :mod:`rows` as a JSON object on a line of its own.

What has no value in a row is left out. ``ndjson.schema.json`` beside this file is the published JSON Schema of a
line; it also documents the columns of Parquet and CSV, which are the same.
"""

from __future__ import annotations

from importlib.resources import files
from typing import BinaryIO

from stallscope.reports.export import rows
from stallscope.reports.export.arrow_text import joined, json_values, members, run_of_text
from stallscope.tracer.analysis.analysis import Analysis


def schema_text() -> str:
    """Return the JSON Schema of a line."""
    return files("stallscope.reports.export").joinpath("ndjson.schema.json").read_text(encoding="utf-8")


def write(analysis: Analysis, out: BinaryIO) -> None:
    """Write all rows."""
    for batch in rows.batches(analysis):
        pieces = [
            joined(f'"{name}":', json_values(column))
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
            if column.null_count < len(column)
        ]
        out.write(run_of_text(joined("{", members(pieces), "}\n")))
