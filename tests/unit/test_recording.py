from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from recordings import DATA, GOLDEN, Builder, add_storm, at, known_call, manifest

from stallscope.tracer.errors import RecordingError, StallscopeError
from stallscope.tracer.layout import UNFINISHED_NS
from stallscope.tracer.manifest import Counters, Note, ProbeCounters
from stallscope.tracer.recording import COLUMNS, RecordingWriter, empty_events, read_recording


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    builder = add_storm(Builder(), 1000).span(4, 3000, None, 1, 2**64 - 1, 3)
    events = builder.events()
    recording = read_recording(builder.write(tmp_path / "a.stall", 4000))
    frame = recording.frame()
    assert tuple(frame.columns) == COLUMNS
    for name in ("start_ns", "duration_ns", "pid", "tid", "probe", "cpu", "stack"):
        assert (frame[name].to_numpy() == events[name]).all()
        assert frame[name].dtype == events[name].dtype
    for slot in range(3):
        assert (frame[f"value{slot}"].to_numpy() == events["value"][:, slot]).all()
    assert int(frame["duration_ns"].iloc[-1]) == UNFINISHED_NS
    assert recording.complete
    assert recording.ended_ns == at(4000)


def test_the_newest_manifest_and_counters_are_the_ones_that_count(tmp_path: Path) -> None:
    path = tmp_path / "a.stall"
    with RecordingWriter(path, manifest()) as writer:
        writer.write(empty_events(3), Counters(5, {4: ProbeCounters(hits=1)}))
        writer.write(empty_events(), Counters(6, {4: ProbeCounters(hits=2)}), manifest(notes=(Note(1, "restart"),)))
        writer.write(empty_events(2))
        assert writer.rows == 5
    recording = read_recording(path)
    assert recording.counters == Counters(6, {4: ProbeCounters(hits=2)})
    assert [note.text for note in recording.manifest.notes] == ["restart"]
    assert not recording.complete
    assert recording.table.num_rows == 5


def test_anyone_can_read_the_rows_with_pyarrow_alone(tmp_path: Path) -> None:
    path = known_call(tmp_path / "a.stall")
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_stream(source).read_all()
    assert tuple(table.column_names) == COLUMNS
    assert table.num_rows == len(read_recording(path).table)


def test_a_recording_is_readable_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.stall"
    writer = RecordingWriter(path, manifest())
    for count in range(5):
        recording = read_recording(path)
        assert recording.table.num_rows == 7 * count
        assert not recording.complete
        writer.write(empty_events(7), Counters(count, {}))
    writer.finish(empty_events(), Counters(9, {}), manifest(ended_ns=10))
    recording = read_recording(path)
    assert recording.complete
    assert recording.table.num_rows == 35


def test_a_file_cut_at_any_byte_is_readable_or_says_that_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "whole.stall"
    small = dataclasses.replace(manifest(), probes=(), targets=(), listeners=())
    with RecordingWriter(path, small) as writer:
        for number in range(3):
            events = empty_events(2)
            events["start_ns"] = [10 * number, 10 * number + 1]
            writer.write(events, Counters(number, {}))
        writer.finish(empty_events(1), Counters(3, {}), small)
    whole = path.read_bytes()
    cut = tmp_path / "cut.stall"
    rows = -1
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        try:
            recording = read_recording(cut)
        except RecordingError as error:
            assert rows == -1, "a longer file must not be less readable"
            assert "\n" not in str(error)  # noqa: PT017
            continue
        now = recording.table.num_rows
        assert now >= rows
        assert recording.frame()["start_ns"].tolist() == [0, 1, 10, 11, 20, 21, 0][:now]
        if recording.counters and now < 7:
            assert recording.counters.time_ns == now // 2 - 1
        rows = now
    assert rows == 7
    assert read_recording(path).complete


def test_what_is_no_recording_is_refused_in_one_line(tmp_path: Path) -> None:
    cases = {
        "missing.stall": None,
        "empty.stall": b"",
        "text.stall": b"hello" * 100,
        "zeros.stall": bytes(1000),
        "huge-length.stall": struct.pack("<II", 0xFFFFFFFF, 0x7FFFFFF0) + bytes(64),
    }
    for name, content in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(RecordingError, match=r"stallscope record|not a recording") as caught:
            read_recording(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(RecordingError, match="is not a file"):
        read_recording(tmp_path)


def arrow_file(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return path


def test_an_arrow_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="is not a stallscope recording"):
        read_recording(arrow_file(tmp_path / "a", pa.table({"x": [1, 2]})))


@pytest.mark.parametrize(
    "metadata", [b"", b"{", b"[]", b"3", b'{"manifest": 3}', b"\xff\xfe", b"[" * 100_000, b"9" * 10_000]
)
def test_broken_metadata_is_refused(tmp_path: Path, metadata: bytes) -> None:
    table = read_recording(known_call(tmp_path / "a")).table.replace_schema_metadata({b"stallscope": metadata})
    with pytest.raises(RecordingError):
        read_recording(arrow_file(tmp_path / "b", table))


def test_other_columns_are_refused(tmp_path: Path) -> None:
    table = read_recording(known_call(tmp_path / "a")).table
    for other in (table.drop_columns(["cpu"]), table.set_column(0, "start_ns", table["start_ns"].cast(pa.int64()))):
        with pytest.raises(RecordingError, match="other columns"):
            read_recording(arrow_file(tmp_path / "b", other))


def test_rows_without_a_value_end_what_is_readable(tmp_path: Path) -> None:
    """Arrow columns may hold nulls, ours never do."""
    table = read_recording(known_call(tmp_path / "a")).table
    holes = pa.array([None] * len(table), pa.uint64())
    recording = read_recording(arrow_file(tmp_path / "b", table.set_column(1, table.field(1), holes)))
    assert recording.table.num_rows == 0
    assert not recording.complete


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StallscopeError, match="choose another file with -o"):
        RecordingWriter(tmp_path / "no" / "such" / "folder.stall", manifest())


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_files_are_what_their_makers_make(name: str, tmp_path: Path) -> None:
    """Read, not compared byte by byte: another pyarrow may write other padding."""
    committed = read_recording(DATA / f"{name}.stall")
    made = read_recording(GOLDEN[name](tmp_path / "made.stall"))
    assert committed.table.equals(made.table)
    assert committed.manifest == made.manifest
    assert committed.counters == made.counters
    assert committed.complete == made.complete


def test_a_million_rows_are_read_without_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "big.stall"
    events = np.zeros(1_000_000, empty_events().dtype)
    before = pa.total_allocated_bytes()
    with RecordingWriter(path, manifest()) as writer:
        writer.write(events)
    del events
    recording = read_recording(path)
    assert recording.table.num_rows == 1_000_000
    assert pa.total_allocated_bytes() - before < 1_000_000
