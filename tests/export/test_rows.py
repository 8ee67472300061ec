"""DuckDB and a JSON Schema validator read the rows, and find the same in all three formats."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import duckdb
import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mixed import OTHER_PID
from recordings import CRON, MS, PID, PROBES, PURGE, STARTED_NS, TRIM, Builder, manifest

from stallscope.probes.catalogue import Field
from stallscope.reports.export import rows
from stallscope.reports.export.naming import KINDS
from stallscope.reports.export.ndjson import schema_text
from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.recording import read_recording

NAMES = ("known-call", "two-stalls", "refused", "with-losses", "empty", "cut-short", "mixed", "imported")
READERS = {
    "parquet": "read_parquet('{}')",
    "csv": "read_csv('{}')",
    "ndjson": "read_json('{}', format='newline_delimited')",
}
SPREADSHEET = shutil.which("ssconvert")

Of = Callable[[str], Analysis]
Export = Callable[[str, str], Path]


def query(path: Path, sql: str) -> list[tuple[object, ...]]:
    """Return what DuckDB finds in an export; ``events`` is the file."""
    source = READERS[path.suffix[1:]].format(path)
    return duckdb.sql(f"with events as (from {source}) {sql}").fetchall()


@pytest.mark.parametrize("format_name", READERS)
class TestDuckDB:
    def test_finds_what_is_known_of_the_storm(self, format_name: str, export: Export) -> None:
        """The truth of ``recordings.add_storm``: 490 ms of 618 in five trims, 41 + 2 refused, 512 accepted."""
        path = export("known-call", format_name)
        assert query(
            path,
            """select name, count(*), sum(duration_ns)::bigint, sum(self_ns)::bigint, max(depth)
            from events where kind = 'call' and stall = 0 group by name order by 4 desc""",
        ) == [
            ("sdsRemoveFreeSpace", 5, 590 * MS, 490 * MS, 3),
            ("je_pages_purge", 5, 100 * MS, 100 * MS, 4),
            ("clientsCron", 1, 616 * MS, 16 * MS, 1),
            ("clientsCronResizeQueryBuffer", 5, 600 * MS, 10 * MS, 2),
            ("serverCron", 1, 618 * MS, 2 * MS, 0),
        ]
        assert query(path, "select count(*), max(queue_length), max(queue_limit) from events where kind = 'queue'") == [
            (62, 512, 511)
        ]
        assert query(
            path,
            """select phase, sum(count)::bigint, min(stall), any_value(listener)
            from events where kind = 'overflow' group by phase order by phase""",
        ) == [("drain", 2, 0, "127.0.0.1:6379"), ("inside", 41, 0, "127.0.0.1:6379")]
        # the 2 of the drain were seen between the samples 622 and 630 ms after the stall began
        assert query(
            path, "select since_start_ns, duration_ns from events where kind = 'overflow' and phase = 'drain'"
        ) == [(1622 * MS, 8 * MS)]
        assert query(path, "select count(*) from events where kind = 'accept'") == [(512,)]

    def test_follows_a_call_to_its_callers(self, format_name: str, export: Export) -> None:
        assert query(
            export("known-call", format_name),
            """select distinct inner_call.path, outer_call.name from events inner_call
            join events outer_call on outer_call.id = inner_call.parent where inner_call.name = 'je_pages_purge'""",
        ) == [
            (
                "serverCron;clientsCron;clientsCronResizeQueryBuffer;sdsRemoveFreeSpace;je_pages_purge",
                "sdsRemoveFreeSpace",
            )
        ]

    def test_knows_arguments_and_wall_time(self, format_name: str, export: Export) -> None:
        assert query(
            export("known-call", format_name),
            """select sum(arg_purged_bytes)::bigint, sum(arg_length_bytes)::bigint, max(arg_idle_s), min(arg_fd),
            epoch_ns(min(time)::timestamp) from events where kind = 'call' and stall = 0""",
        ) == [(20_000_000, 140_000_000, 7, 77, 1_750_000_001_001_000_000)]

    def test_tells_several_processes_apart(self, format_name: str, export: Export) -> None:
        path = export("mixed", format_name)
        assert query(
            path,
            """select pid, tid, count(*), count(*) filter (unfinished), max(depth)
            from events where kind = 'call' group by all order by all""",
        ) == [(PID, PID, 19, 2, 4), (PID, 4713, 3, 0, 0), (OTHER_PID, OTHER_PID, 6, 0, 4)]
        assert query(path, "select name, since_start_ns, duration_ns from events where kind = 'abandoned'") == [
            ("je_pages_purge", 1050 * MS, None)
        ]
        assert query(path, "select peer, wait_ns from events where kind = 'request' order by id") == [
            ("[2001:db8::1]:33333", None),
            ("[2001:db8::1]:33333", 2 * MS),
        ]

    def test_finds_what_other_tools_told(self, format_name: str, export: Export, analysis_of: Of) -> None:
        path, tables = export("imported", format_name), analysis_of("imported").tables
        assert query(path, "select count(distinct connection), count(*) from events where name = 'SYN'") == [(50, 50)]
        assert query(path, "select distinct listener from events where kind = 'packet'") == [("127.0.0.1:7379",)]
        spans = query(path, "select name, duration_ns, text from events where kind = 'imported span' order by id")
        expected = tables.imported_spans[["source", "duration_ns", "text"]].to_records(index=False).tolist()
        assert spans == expected
        assert spans
        (found,) = query(path, "select max(value), any_value(unit) from events where name = 'connected_clients'")
        samples = tables.imported_samples.loc[tables.imported_samples["name"] == "connected_clients"]
        assert found == (samples["value"].max(), samples["unit"].iloc[0])

    @pytest.mark.parametrize("name", NAMES)
    def test_reads_every_row(self, name: str, format_name: str, export: Export, analysis_of: Of) -> None:
        """Rows of every kind are as many as in the tables."""
        analysis = analysis_of(name)
        tables = analysis.tables
        frames = (analysis.nested.calls, analysis.nested.abandoned, tables.iterations, tables.accepts,
                  tables.queues, tables.counters, tables.requests, analysis.stalls.overflows,
                  tables.packets, tables.imported_spans, tables.imported_samples, analysis.samples.frame)  # fmt: skip
        expected = {kind: len(frame) for kind, frame in zip(KINDS, frames, strict=True) if len(frame)}
        path = export(name, format_name)
        if not expected:
            assert rows.count_rows(analysis) == 0
            assert path.read_text() == "" if format_name == "ndjson" else query(path, "select * from events") == []
            return
        found = query(path, "select kind, count(*) from events group by kind")
        assert dict(found) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["refused", "mixed", "imported"])
def test_the_three_formats_hold_the_same(name: str, export: Export) -> None:
    columns = pq.read_schema(export(name, "parquet")).names
    found = []
    for format_name, reader in READERS.items():
        path = export(name, format_name)
        # NDJSON leaves a column out where no row has it
        known = duckdb.sql(f"from {reader.format(path)}").columns
        texts = ", ".join(f"{column}::varchar" if column in known else "null" for column in columns if column != "time")
        found.append(query(path, f"select {texts}, epoch_ns(time::timestamp) from events order by id"))
    assert found[0] == found[1] == found[2]


class TestSchema:
    def test_is_a_schema_of_the_columns(self) -> None:
        schema = json.loads(schema_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        assert list(schema["properties"]) == list(rows.COLUMNS)
        assert schema["properties"]["kind"]["enum"] == list(KINDS)
        types = {
            pa.float64(): "number",
            pa.int64(): "integer",
            pa.uint64(): "integer",
            pa.bool_(): "boolean",
            pa.string(): "string",
        }
        for name, kind in rows.COLUMNS.items():
            told = schema["properties"][name]
            assert told["description"].endswith(".")
            if "enum" not in told:
                assert told["type"] == types.get(kind, "string"), name

    @pytest.mark.parametrize("name", NAMES)
    def test_holds_for_every_line(self, name: str, export: Export, analysis_of: Of) -> None:
        validator = jsonschema.Draft202012Validator(json.loads(schema_text()))
        lines = export(name, "ndjson").read_text().splitlines()
        assert len(lines) == rows.count_rows(analysis_of(name))
        for number, line in enumerate(lines):
            row = json.loads(line)
            validator.validate(row)
            assert row["id"] == number

    @pytest.mark.parametrize(
        "change",
        [{"kind": "nonsense"}, {"self_ns": -1}, {"self_ns": None}, {"extra": 1}, {"time": "yesterday"}, {"arg_x": "1"}],
    )
    def test_refuses_what_is_no_row(self, change: dict[str, object], export: Export) -> None:
        row = json.loads(export("known-call", "ndjson").read_text().splitlines()[0])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**row, **change}, json.loads(schema_text()))


class TestArguments:
    """Fields of one name that no one 64-bit type holds."""

    def test_of_one_name_may_be_signed_and_unsigned(self, tmp_path: Path) -> None:
        big = 2**64 - 1
        probes = [
            replace(probe, fields=(Field("size_bytes", "bytes", 0, signed=probe.id == PURGE),))
            if probe.id in (TRIM, PURGE)
            else probe
            for probe in PROBES
        ]
        builder = Builder(manifest(probes=tuple(probes)))
        builder.span(TRIM, 100, 5, big).span(PURGE, 200, 5, big).span(CRON, 300, 5)
        analysis = analyse(read_recording(builder.write(tmp_path / "both.stall", 1000)))
        table = pa.Table.from_batches(rows.batches(analysis), rows.schema(analysis))
        assert [value and int(value) for value in table["arg_size_bytes"].to_pylist()] == [big, -1, None]

    def test_are_not_mixed_up_with_columns_of_events(self, export: Export) -> None:
        """A client's fd is an argument, the fd of an accepted connection is not."""
        found = query(
            export("known-call", "parquet"),
            "select kind, count(fd), count(arg_fd) from events where coalesce(fd, arg_fd) >= 0 group by 1 order by 1",
        )
        assert found == [("accept", 512, 0), ("call", 0, 5)]


def test_rows_come_in_batches_that_fit_together(monkeypatch: pytest.MonkeyPatch, analysis_of: Of) -> None:
    for name in ("mixed", "refused"):
        analysis = analysis_of(name)
        whole = pa.Table.from_batches(rows.batches(analysis), rows.schema(analysis))
        monkeypatch.setattr(rows, "ROWS_A_BATCH", 7)
        parts = list(rows.batches(analysis))
        assert max(part.num_rows for part in parts) == 7
        assert pa.Table.from_batches(parts, rows.schema(analysis)).equals(whole)
        monkeypatch.undo()


def test_parquet_keeps_the_manifest(export: Export, analysis_of: Of) -> None:
    document = json.loads(pq.read_schema(export("mixed", "parquet")).metadata[b"stallscope"])
    assert document["manifest"]["targets"][1]["exe"] == "/usr/bin/valkey-server"
    assert document["manifest"]["started_ns"] == STARTED_NS


def test_csv_is_read_by_a_plain_reader(export: Export, analysis_of: Of) -> None:
    with export("mixed", "csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    calls = analysis_of("mixed").nested.calls
    assert [int(line["self_ns"]) for line in lines if line["kind"] == "call"] == calls["self_ns"].tolist()
    assert {line["self_ns"] for line in lines if line["kind"] != "call"} == {""}
    assert np.unique([len(line) for line in lines]).tolist() == [len(lines[0])]


@pytest.mark.skipif(SPREADSHEET is None, reason="no spreadsheet is installed (apt-get install gnumeric)")
def test_csv_opens_in_a_spreadsheet(export: Export, tmp_path: Path) -> None:
    """Gnumeric reads every cell of it, as numbers where they are numbers."""
    assert SPREADSHEET is not None
    saved = tmp_path / "saved.csv"
    subprocess.run([SPREADSHEET, export("mixed", "csv"), saved], check=True, capture_output=True, timeout=120)
    with saved.open(newline="") as file, export("mixed", "csv").open(newline="") as original:
        cells, expected = list(csv.DictReader(file)), list(csv.DictReader(original))
    assert len(cells) == len(expected)
    for name in ("id", "kind", "name", "since_start_ns", "duration_ns", "self_ns", "listener", "peer", "path"):
        assert [row[name] for row in cells] == [row[name] for row in expected], name
