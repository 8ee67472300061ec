"""The probes on a program that knows the truth: counts, nesting and times of every call it made."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from tracing import (
    Call,
    Nesting,
    Rows,
    build_nesting,
    inside,
    recording,
    require_tracing,
    running_nesting,
    until,
)

from stallscope.probes.catalogue import Decoder, Field
from stallscope.tracer.capture.probe_ids import FIRST_CALL_PROBE
from stallscope.tracer.capture.program import CallProbe, Program
from stallscope.tracer.capture.redis_target import open_target
from stallscope.tracer.capture.symbols import resolve
from stallscope.tracer.capture.trace_options import TraceOptions
from stallscope.tracer.capture.traced import TracedSet
from stallscope.tracer.layout import UNFINISHED_NS
from stallscope.tracer.manifest import ProbeCounters
from stallscope.tracer.recording import read_recording

INT3 = 0xCC
FUNCTIONS = (
    "leaf", "outer", "middle", "inner", "recurse", "tail_first", "tail_second", "jump_and_land", "jumper",
    "hold", "leave_thread", "cloned", "libc:labs",
)  # fmt: skip

# Every count is prime and used once, so that no other total can look like it.
COMMANDS = {
    "leaf": "leaf 211",
    "nested": "nested 23",
    "recurse": "recurse 17 13",
    "tail": "tail 31",
    "jump": "jump 19 5",
    "clone": "clone 29",
    "libc": "libc 37",
    "threads": "threads 53 7",
    "fork": "fork 41",
    "leave": "leave 1 3",
}


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_tracing()
    return build_nesting(tmp_path_factory.mktemp("nesting"))


@pytest.fixture
def program(binary: Path) -> Iterator[Nesting]:
    with running_nesting(binary) as running:
        yield running


@dataclass(frozen=True)
class Recorded:
    """One recording of a program that went through all commands, and what it says about each of them."""

    rows: Rows
    truth: dict[str, list[Call]]
    pid: int
    said: str

    def spans(self, function: str, command: str) -> pd.DataFrame:
        """Return the finished spans of a function while a command ran, in the order of their starts."""
        calls = self.truth[command]
        first, last = min(call.before for call in calls), max(max(call.after, call.begin) for call in calls)
        spans = self.rows.of(function)
        spans = spans[spans["is_finished"] & (spans["start_ns"] >= first) & (spans["start_ns"] <= last)]
        return spans.reset_index(drop=True)

    def calls(self, function: str, command: str) -> list[Call]:
        return sorted((c for c in self.truth[command] if c.function == function), key=lambda c: c.before)


@pytest.fixture(scope="module")
def recorded(binary: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    path = tmp_path_factory.mktemp("recorded") / "all.stall"
    probes = [word for function in FUNCTIONS for word in ("--probe", function)]
    with (
        running_nesting(binary) as program,
        recording(path, "-p", str(program.pid), "--no-default-probes", *probes) as recorder,
    ):
        truth = {name: program.run(command) for name, command in COMMANDS.items()}
        assert recorder.stop() == 0
        return Recorded(Rows(recorder.recording()), truth, program.pid, recorder.said)


def assert_brackets(spans: pd.DataFrame, calls: Sequence[Call]) -> None:
    """Each span holds what the function measured in itself and lies in what its caller measured around it."""
    assert len(spans) == len(calls)
    for span, call in zip(spans.itertuples(), calls, strict=True):
        assert span.tid == call.tid
        assert call.before <= span.start_ns <= call.begin
        assert call.end <= span.end_ns
        assert not call.after or span.end_ns <= call.after


class TestSpans:
    @pytest.mark.parametrize(
        ("function", "command", "count"),
        [
            ("leaf", "leaf", 211),
            ("outer", "nested", 23),
            ("middle", "nested", 2 * 23),
            ("inner", "nested", 6 * 23),
            ("recurse", "recurse", 17 * 13),
            ("tail_first", "tail", 31),
            ("tail_second", "tail", 31),
            ("jump_and_land", "jump", 19),
            ("cloned", "clone", 29),
        ],
    )
    def test_are_all_there_and_bracket_what_the_program_measured(
        self, recorded: Recorded, function: str, command: str, count: int
    ) -> None:
        calls = recorded.calls(function, command)
        assert len(calls) == count
        assert_brackets(recorded.spans(function, command), calls)

    def test_nest_as_the_calls_did(self, recorded: Recorded) -> None:
        outer, middle, inner = (recorded.spans(name, "nested") for name in ("outer", "middle", "inner"))
        assert inside(middle, outer).tolist() == [number // 2 for number in range(2 * 23)]
        assert inside(inner, middle).tolist() == [number // 3 for number in range(6 * 23)]

    def test_of_a_recursion_pair_level_by_level(self, recorded: Recorded) -> None:
        spans = recorded.spans("recurse", "recurse")
        for turn in range(17):
            levels = spans.iloc[turn * 13 : (turn + 1) * 13]
            assert levels["start_ns"].is_monotonic_increasing
            assert levels["end_ns"].is_monotonic_decreasing
        assert recorded.rows.counters("recurse").hits == 17 * 13

    def test_of_a_tail_call_end_together(self, recorded: Recorded, binary: Path) -> None:
        if shutil.which("objdump") is None:
            pytest.skip("requires objdump: apt-get install binutils")
        listing = subprocess.run(
            ["objdump", "-d", "--disassemble=tail_first", str(binary)], capture_output=True, text=True
        ).stdout
        assert re.search(r"\bjmp .*<tail_second>", listing), "this gcc made no tail call"
        first, second = (recorded.spans(name, "tail") for name in ("tail_first", "tail_second"))
        assert inside(second, first).tolist() == list(range(31))

    def test_of_threads_do_not_mix(self, recorded: Recorded) -> None:
        spans, calls = recorded.spans("leaf", "threads"), recorded.calls("leaf", "threads")
        tids = {call.tid for call in calls}
        assert len(tids) == 7
        assert set(spans["tid"]) == tids
        assert set(spans["pid"]) == {recorded.pid}
        for tid in tids:
            of_thread = [call for call in calls if call.tid == tid]
            assert len(of_thread) == 53
            assert_brackets(spans[spans["tid"] == tid], of_thread)

    def test_are_only_of_the_process_asked_for(self, recorded: Recorded) -> None:
        calls = 211 + 7 * 53
        assert recorded.rows.counters("leaf").hits == calls, "a child made 41 calls more"
        assert set(recorded.rows.all[recorded.rows.all["pid"] != 0]["pid"]) == {recorded.pid}

    def test_of_functions_left_by_longjmp_do_not_exist(self, recorded: Recorded) -> None:
        assert recorded.spans("jumper", "jump").empty
        counters = recorded.rows.counters("jumper")
        assert counters.hits == 19 * 5
        assert counters.sent == counters.short_calls == counters.unpaired == 0
        # The last round's may still look under way: nothing has used their frames since, but they are inside
        # a call that has ended, so the analysis leaves them out.
        left = recorded.rows.of("jumper")
        assert counters.abandoned + len(left) == 19 * 5
        assert len(left) <= 5
        assert (left["start_ns"] < recorded.rows.of("jump_and_land")["end_ns"].max()).all()

    def test_of_a_thread_that_ended_in_a_call_do_not_exist(self, recorded: Recorded) -> None:
        assert recorded.rows.of("leave_thread").empty
        assert recorded.rows.counters("leave_thread").hits == 3
        assert recorded.rows.counters("leave_thread").abandoned == 3

    def test_of_a_clone_are_found_by_the_name_in_the_source(self, recorded: Recorded) -> None:
        (probe,) = recorded.rows.probes("cloned")
        assert re.fullmatch(r"cloned\.(constprop|isra)\.\d+", probe.symbol)

    def test_of_a_library(self, recorded: Recorded) -> None:
        (probe,) = recorded.rows.probes("libc:labs")
        assert "libc" in probe.path
        assert recorded.rows.counters("libc:labs").hits == 37
        assert len(recorded.rows.of("libc:labs")) == 37


class TestCounters:
    def test_account_for_every_row_and_every_call(self, recorded: Recorded) -> None:
        for function in FUNCTIONS:
            counters = recorded.rows.counters(function)
            rows = recorded.rows.of(function)
            assert counters.sent == rows["is_finished"].sum()
            under_way = (~rows["is_finished"]).sum()
            assert counters.hits == counters.sent + counters.abandoned + under_way
            assert counters.lost == counters.lost_starts == counters.short_calls == 0

    def test_nothing_is_recorded_from_outside_the_recording(self, recorded: Recorded) -> None:
        manifest, rows = recorded.rows.manifest, recorded.rows.all
        assert (rows["start_ns"] >= manifest.started_ns).all()
        assert (rows["end_ns"] <= manifest.ended_ns).all()

    def test_are_in_what_the_recorder_says(self, recorded: Recorded) -> None:
        hits = sum(recorded.rows.counters(function).hits for function in FUNCTIONS)
        assert f", {hits:,} calls; see: stallscope summary " in recorded.said
        assert recorded.said.splitlines()[-1].startswith("recorded ")
        assert "(SIGINT)" in recorded.said


class Traced:
    """Functions of the program traced through the library, for as long as the test says."""

    def __init__(self, pid: int, *functions: str, min_duration_ns: int = 0, ring_bytes: int = 1 << 20) -> None:
        self.set = TracedSet(TraceOptions(functions, min_duration_ns, 10**7, 10**7, ring_bytes))
        self.target = open_target(pid, any_program=True)
        self.set.prepare([self.target])

    def attach(self) -> None:
        self.set.attach([self.target])

    def probe(self, function: str) -> int:
        return next(probe.id for probe in self.set.probes if probe.name == function)

    def counters(self, function: str) -> ProbeCounters:
        return self.set.counters()[self.probe(function)]


@pytest.fixture
def traced(program: Nesting, request: pytest.FixtureRequest) -> Iterator[Traced]:
    options: dict = getattr(request, "param", {})
    one = Traced(program.pid, "hold", "leaf", "recurse", "flooded", **options)
    yield one
    one.set.close()


class TestUnderWay:
    def test_a_call_that_began_before_attaching_is_not_invented(self, program: Nesting, traced: Traced) -> None:
        program.send("hold")
        program.told("held")
        traced.attach()
        program.send("go on")
        program.told()
        ended_ns, unfinished, counters = traced.set.stop()
        assert len(traced.set.read()) == len(unfinished) == 0
        assert counters[traced.probe("hold")].hits == 0
        assert ended_ns > 0

    def test_attaching_amid_calls_leaves_none_half_seen(self, program: Nesting, traced: Traced) -> None:
        program.send("flood-on")
        program.told("flooding")
        traced.attach()
        probe = traced.probe("flooded")
        until(lambda: traced.set.counters()[probe].hits > 0, "a call begins after that")
        program.send("enough")
        program.told()
        program.told()
        _, unfinished, counters = traced.set.stop()
        seen = counters[probe]
        assert len(unfinished) == 0
        assert seen.abandoned == 0, "entries without a return between the two probes of one function"
        assert seen.hits == seen.sent + seen.lost > 0

    def test_a_call_that_has_not_ended_is_recorded_as_unfinished(self, program: Nesting, traced: Traced) -> None:
        traced.attach()
        program.run("leaf 7")
        program.send("hold")
        program.told("held")
        _, unfinished, counters = traced.set.stop()
        (row,) = unfinished
        assert (row["probe"], row["pid"], row["tid"]) == (traced.probe("hold"), program.pid, program.pid)
        assert row["duration_ns"] == UNFINISHED_NS
        program.send("go on")
        (call,) = program.told()
        assert call.before <= row["start_ns"] <= call.begin
        assert (counters[traced.probe("hold")].hits, counters[traced.probe("hold")].sent) == (1, 0)
        assert not (traced.set.read()["probe"] == traced.probe("hold")).any()

    def test_a_recursion_deeper_than_the_kernel_follows_is_accounted_for(
        self, program: Nesting, traced: Traced
    ) -> None:
        """The kernel follows 64 return probes in a thread: Linux include/linux/uprobes.h, MAX_URETPROBE_DEPTH."""
        traced.attach()
        calls = program.run("recurse 3 101")
        _, unfinished, counters = traced.set.stop()
        rows = traced.set.read()
        seen = counters[traced.probe("recurse")]
        assert seen.hits == 3 * 101
        assert len(rows) == seen.sent == 3 * 64
        assert seen.abandoned + len(unfinished) == 3 * 37
        assert seen.abandoned >= 2 * 37
        begun = {call.before: call for call in calls}
        for row in rows:
            call = begun[max(before for before in begun if before <= row["start_ns"])]
            assert row["start_ns"] <= call.begin
            assert call.end <= row["start_ns"] + row["duration_ns"] <= call.after

    @pytest.mark.parametrize("traced", [{"min_duration_ns": 10**12}], indirect=True)
    def test_calls_below_the_minimum_are_counted_and_not_recorded(self, program: Nesting, traced: Traced) -> None:
        traced.attach()
        calls = program.run("leaf 409")
        program.send("hold")
        program.told("held")
        _, unfinished, counters = traced.set.stop()
        assert len(traced.set.read()) == 0
        leaf, hold = counters[traced.probe("leaf")], counters[traced.probe("hold")]
        assert (leaf.hits, leaf.sent, leaf.short_calls) == (409, 0, 409)
        assert sum(call.end - call.begin for call in calls) <= leaf.short_ns
        assert leaf.short_ns <= sum(call.after - call.before for call in calls)
        assert (hold.hits, hold.short_calls, len(unfinished)) == (1, 0, 1)

    def test_a_minimum_divides_the_calls_by_their_own_duration(self, program: Nesting) -> None:
        minimum_ns = 60_000
        traced = Traced(program.pid, "leaf", "recurse", min_duration_ns=minimum_ns)
        try:
            traced.attach()
            program.run("recurse 11 13")
            _, _, counters = traced.set.stop()
            rows = traced.set.read()
            seen = counters[traced.probe("recurse")]
            assert seen.hits == 11 * 13 == seen.sent + seen.short_calls
            assert len(rows) == seen.sent
            assert (rows["duration_ns"] >= minimum_ns).all()
        finally:
            traced.set.close()


class TestLosses:
    @pytest.mark.parametrize("traced", [{"ring_bytes": 65536}], indirect=True)
    def test_a_ring_that_nobody_empties_loses_and_counts_exactly(self, program: Nesting, traced: Traced) -> None:
        traced.attach()
        calls = program.run("leaf 5003")
        _, unfinished, counters = traced.set.stop()
        rows = traced.set.read()
        leaf = counters[traced.probe("leaf")]
        assert len(unfinished) == 0
        assert leaf.hits == 5003 == leaf.sent + leaf.lost
        assert leaf.sent == len(rows) == 65536 // 64 - 1
        for row, call in zip(rows, calls, strict=False):
            assert call.before <= row["start_ns"] <= call.begin
        program.run("leaf 11")
        assert len(traced.set.read()) == 0, "nothing is attached any more"

    def test_a_recorder_that_was_held_up_says_what_it_lost(self, program: Nesting, tmp_path: Path) -> None:
        words = ("-p", str(program.pid), "--no-default-probes", "--probe", "flooded", "--ring-size", "64K")
        with recording(tmp_path / "lossy.stall", *words) as recorder:
            os.kill(recorder.pid, signal.SIGSTOP)
            until(lambda: "T (stopped)" in Path(f"/proc/{recorder.pid}/status").read_text(), "it is stopped")
            program.run("flood 7001")
            os.kill(recorder.pid, signal.SIGCONT)
            assert recorder.stop(signal.SIGTERM) == 5
            rows = Rows(recorder.recording())
        counters = rows.counters("flooded")
        assert counters.hits == 7001 == counters.sent + counters.lost
        assert len(rows.of("flooded")) == counters.sent < 7001
        assert rows.recording.complete
        assert f"stallscope: {counters.lost:,} events were lost; use a larger --ring-size" in recorder.said

    def test_a_ring_that_is_emptied_in_time_loses_nothing(self, program: Nesting, traced: Traced) -> None:
        traced.attach()
        program.send("flood 20011")
        rows = 0
        while traced.counters("flooded").hits < 20011 or rows < 20011:
            rows += len(traced.set.read())
        program.told()
        assert rows == 20011
        assert traced.counters("flooded").lost == 0


def test_the_registers_decoder_reads_the_arguments(program: Nesting, binary: Path) -> None:
    fields = (Field("third", "", 0, signed=True), Field("first", "", 1), Field("second", "", 2, signed=True))
    (resolution,) = resolve(program.pid, ["leaf"])
    (place,) = resolution.attachments
    traced = Program(
        [CallProbe(FIRST_CALL_PROBE, Decoder("registers", (3, 1, 2), fields))],
        ring_bytes=1 << 20,
        min_duration_ns=0,
        iteration_min_ns=0,
        loop=False,
    )
    try:
        traced.attach_call(FIRST_CALL_PROBE, place.path, place.offset, program.pid)
        program.run("leaf 101")
        values = traced.ring.read()["value"].astype("int64")
    finally:
        traced.close()
    assert values.tolist() == [[turn << 40, turn, -turn] for turn in range(101)]


ENDS = {
    "duration": ("the duration was over", None, 0),
    "SIGTERM": ("SIGTERM", signal.SIGTERM, 0),
    "SIGINT": ("SIGINT", signal.SIGINT, 0),
    "SIGHUP": ("SIGHUP", signal.SIGHUP, 0),
}


class TestEnd:
    @pytest.fixture
    def place(self, program: Nesting) -> tuple[str, int]:
        (attachment,) = resolve(program.pid, ["leaf"])[0].attachments
        return attachment.path, attachment.offset

    @pytest.mark.parametrize("end", ENDS)
    def test_leaves_the_program_as_it_was(
        self, program: Nesting, tmp_path: Path, place: tuple[str, int], end: str
    ) -> None:
        ended_by, number, status = ENDS[end]
        original = program.byte_at(*place)
        duration = ("-d", "500ms") if number is None else ()
        words = ("-p", str(program.pid), "--no-default-probes", "--probe", "leaf", *duration)
        with recording(tmp_path / "end.stall", *words) as recorder:
            if number is None:
                assert recorder.process.wait(60) == status
            else:
                assert program.byte_at(*place) == INT3 != original
                program.run("leaf 43")
                assert recorder.stop(number) == status
                assert len(Rows(recorder.recording()).of("leaf")) == 43
        found = read_recording(tmp_path / "end.stall")
        assert (found.complete, found.manifest.ended_by) == (True, ended_by)
        assert found.manifest.ended_ns > found.manifest.started_ns
        assert program.byte_at(*place) == original
        assert len(program.run("leaf 3")) == 3

    def test_does_not_wait_for_the_next_sample_of_the_accept_queue(self, program: Nesting, tmp_path: Path) -> None:
        words = ("-p", str(program.pid), "--no-default-probes", "--probe", "leaf", "--sample", "1h")
        with recording(tmp_path / "rare.stall", *words) as recorder:
            program.run("leaf 67")
            recorder.wait_until_it_has(67, "leaf")
            assert recorder.stop(signal.SIGTERM) == 0
        with recording(tmp_path / "brief.stall", *words, "-d", "100ms") as recorder:
            assert recorder.process.wait(60) == 0

    def test_by_kill_9_leaves_a_readable_file_and_no_probe(
        self, program: Nesting, tmp_path: Path, place: tuple[str, int]
    ) -> None:
        original = program.byte_at(*place)
        words = ("-p", str(program.pid), "--no-default-probes", "--probe", "leaf")
        with recording(tmp_path / "cut.stall", *words) as recorder:
            program.run("leaf 47")
            recorder.wait_until_it_has(47, "leaf")
            assert recorder.stop(signal.SIGKILL) == -signal.SIGKILL
            rows = Rows(recorder.recording())
        until(lambda: program.byte_at(*place) == original, "the probe is gone")
        assert not rows.recording.complete
        assert rows.manifest.ended_ns == 0
        assert len(rows.of("leaf")) == 47 == rows.counters("leaf").sent
        assert len(program.run("leaf 3")) == 3

    def test_of_the_program_ends_the_recording(self, program: Nesting, tmp_path: Path) -> None:
        words = ("-p", str(program.pid), "--no-default-probes", "--probe", "leaf", "--probe", "hold")
        with recording(tmp_path / "died.stall", *words) as recorder:
            program.run("leaf 59")
            program.send("hold")
            program.told("held")
            os.kill(program.pid, signal.SIGKILL)
            assert recorder.process.wait(60) == 0
            assert f"process {program.pid} ({program.binary}) ended or was replaced" in recorder.said
            rows = Rows(recorder.recording())
        assert rows.manifest.ended_by == "the traced process ended"
        assert len(rows.of("leaf")) == 59
        assert rows.of("hold")["is_finished"].tolist() == [False], "it died in this call"
        (target,) = rows.manifest.targets
        assert target.end_ns > rows.of("leaf")["end_ns"].max()
