"""The table of stacks: numbered once, travelling in pieces, readable however the recording ended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from recordings import PID, PROBES, STACK_ID, STACK_PROBE, Builder, at, manifest

from stallscope.tracer import stack_table
from stallscope.tracer.errors import RecordingError
from stallscope.tracer.layout import NO_STACK
from stallscope.tracer.manifest import Counters
from stallscope.tracer.recording import RecordingWriter, empty_events, extend_recording, read_recording
from stallscope.tracer.stack_table import KERNEL, StackFrame, StackTable

MAIN, CALL, WRITE = StackFrame("main", "redis-server"), StackFrame("call", "redis-server"), StackFrame("write", KERNEL)
NAMELESS = StackFrame("", "libc.so.6", 0x1234)


def sample_of(stack: int) -> np.ndarray:
    row = empty_events(1)
    row["start_ns"], row["probe"], row["pid"], row["tid"], row["stack"] = at(1), STACK_ID, PID, PID, stack
    return row


class TestTable:
    def test_gives_a_stack_one_number(self) -> None:
        table = StackTable()
        assert [table.add(frames) for frames in ([MAIN, CALL], [MAIN], [MAIN, CALL], [])] == [0, 1, 0, 2]
        assert table.frames == [MAIN, CALL]
        assert table.stack(0) == (MAIN, CALL)
        assert table.stack(2) == table.stack(3) == table.stack(NO_STACK) == ()

    def test_names_what_has_no_name_by_its_place(self) -> None:
        assert NAMELESS.name == "libc.so.6+0x1234"
        assert StackFrame("", "", 0x10).name == "[unknown]+0x10"
        assert WRITE.is_kernel
        assert not MAIN.is_kernel

    def test_is_full_at_its_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stack_table, "MAX_STACKS", 2)
        table = StackTable()
        assert [table.add(frames) for frames in ([MAIN], [CALL], [MAIN, CALL], [CALL])] == [0, 1, NO_STACK, 1]
        monkeypatch.setattr(stack_table, "MAX_STACKS", 10)
        monkeypatch.setattr(stack_table, "MAX_FRAMES", 2)
        assert table.add([WRITE]) == NO_STACK
        assert len(table.frames) == 2


class TestPieces:
    def test_make_the_same_table(self) -> None:
        table, other = StackTable(), StackTable()
        table.add([MAIN])
        pieces = [table.piece(0, 0)]
        table.add([MAIN, CALL, NAMELESS])
        table.add([CALL])
        pieces.append(table.piece(1, 1))
        for piece in pieces:
            other.extend(json.loads(json.dumps(piece)))
        assert (other.frames, other.stacks) == (table.frames, table.stacks)
        assert other.add([MAIN, CALL, NAMELESS]) == 1

    def test_may_come_twice(self) -> None:
        table, other = StackTable(), StackTable()
        table.add([MAIN, CALL])
        for _ in range(2):
            other.extend(table.piece(0, 0))
        assert (other.frames, other.stacks) == (table.frames, table.stacks)

    @pytest.mark.parametrize(
        "change",
        [
            {"first_frame": 1}, {"first_frame": -1}, {"first_frame": "x"}, {"first_stack": 1}, {"first_stack": None},
            {"frames": [["main"]]}, {"frames": 7}, {"frames": [["main", "file", "zero"]]}, {"stacks": [[2]]},
            {"stacks": [[-1]]}, {"stacks": [["x"]]}, {"stacks": [7]},
        ],
    )  # fmt: skip
    def test_that_are_damaged_are_refused(self, change: dict[str, object]) -> None:
        table = StackTable()
        table.add([MAIN, CALL])
        with pytest.raises(RecordingError):
            StackTable().extend({**table.piece(0, 0), **change})
        for piece in (None, [], {}, 7, "x"):
            with pytest.raises(RecordingError):
                StackTable().extend(piece)


class TestRecording:
    def test_has_every_stack_its_rows_name_when_it_was_cut_short(self, tmp_path: Path) -> None:
        table = StackTable()
        writer = RecordingWriter(tmp_path / "a.stall", manifest(probes=(*PROBES, STACK_PROBE)), table)
        lengths = []
        for functions in ([MAIN], [MAIN, CALL], [CALL]):
            writer.write(sample_of(table.add(functions)))
            lengths.append((tmp_path / "a.stall").stat().st_size)
        writer.abandon()
        data = (tmp_path / "a.stall").read_bytes()
        for kept, length in enumerate(lengths, 1):
            (tmp_path / "b.stall").write_bytes(data[:length])
            recording = read_recording(tmp_path / "b.stall")
            assert recording.stacks.stacks == table.stacks[:kept]
            assert recording.table.num_rows == kept

    def test_writes_a_stack_once(self, tmp_path: Path) -> None:
        table = StackTable()
        writer = RecordingWriter(tmp_path / "a.stall", manifest(), table)
        number = table.add([StackFrame("a_name_like_no_other", "redis-server")])
        for _ in range(5):
            writer.write(sample_of(number))
        writer.finish(empty_events(), Counters(at(5), {}), replace(manifest(), ended_ns=at(5)))
        assert (tmp_path / "a.stall").read_bytes().count(b"a_name_like_no_other") == 1

    def test_keeps_its_stacks_when_it_is_extended(self, tmp_path: Path) -> None:
        builder = Builder(manifest(probes=(*PROBES, STACK_PROBE)))
        recording = read_recording(builder.sample(100, "call").write(tmp_path / "a.stall", 1000))
        extend_recording(recording, tmp_path / "b.stall", empty_events(), recording.manifest)
        extended = read_recording(tmp_path / "b.stall")
        assert extended.stacks.stacks == recording.stacks.stacks != []
        assert extended.stacks.frames == recording.stacks.frames

    def test_without_stacks_is_read_as_before(self, tmp_path: Path) -> None:
        recording = read_recording(Builder().span(0, 100, 20, 1, 0).write(tmp_path / "a.stall", 1000))
        assert recording.stacks.stacks == []
        assert recording.manifest.ended_ns == at(1000)
