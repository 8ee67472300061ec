"""CSV: the rows of :mod:`rows` for a spreadsheet or a script; comma separated, UTF-8, with a line of names.

Nothing stands where a column has no value, ``time`` is UTC (``2025-06-15 15:06:40.000000000Z``), durations are
whole nanoseconds. A spreadsheet takes 1,048,576 lines; a longer recording needs ``--min-duration``.
"""

from __future__ import annotations

from typing import BinaryIO

import pyarrow.csv as pa_csv

from stallscope.reports.export import rows
from stallscope.tracer.analysis.analysis import Analysis


def write(analysis: Analysis, out: BinaryIO) -> None:
    """Write all rows."""
    with pa_csv.CSVWriter(out, rows.schema(analysis)) as writer:
        for batch in rows.batches(analysis):
            writer.write_batch(batch)
