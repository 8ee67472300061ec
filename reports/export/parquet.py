"""Parquet: the rows of :mod:`rows`, for DuckDB, pandas, polars, Spark and everything else that reads columns.

All types and nulls are kept. The file's metadata ``stallscope`` holds the recording's manifest as JSON, as the
recording itself does: probes with their rungs, servers, thresholds and the kernel's counters.
"""

from __future__ import annotations

import json
from typing import BinaryIO

import pyarrow.parquet as pq

from stallscope.reports.export import rows
from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.recording import METADATA_KEY


def write(analysis: Analysis, out: BinaryIO) -> None:
    """Write all rows, compressed with zstd, a row group for each batch."""
    manifest = json.dumps({"manifest": analysis.manifest.to_json()})
    schema = rows.schema(analysis).with_metadata({METADATA_KEY: manifest})
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for batch in rows.batches(analysis):
            writer.write_batch(batch)
