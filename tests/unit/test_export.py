"""``stallscope export``: where it writes, what it refuses, and how the bulk encoders work."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from perfetto.protos.perfetto.trace import perfetto_trace_pb2
from recordings import (
    CRON,
    DATA,
    ITERATION_ID,
    MS,
    PROBES,
    PURGE,
    STARTED_NS,
    TRIM,
    Builder,
    hooked_manifest,
    known_call,
    manifest,
)

from stallscope.reports.export.arrow_text import run_of_text, thousandths
from stallscope.reports.export.call_edges import call_edges
from stallscope.reports.export.formats import FORMATS
from stallscope.reports.export.naming import call_names, listener_names, peer_addresses
from stallscope.reports.export.protobuf import (
    bytes_field,
    constant_columns,
    interleaved,
    message_column,
    number_column,
    number_field,
    varint,
)
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.nesting import Nested, nest
from stallscope.tracer.analysis.tables import build_tables
from stallscope.tracer.imports.run import run_import
from stallscope.tracer.layout import EVENT, EVENT_BYTES
from stallscope.tracer.manifest import COUNTER, ITERATION, QUEUE, ListenerInfo
from stallscope.tracer.recording import RecordingWriter, read_recording

STALLSCOPE = str(Path(sys.executable).with_name("stallscope"))
TEXT_FORMATS = sorted(name for name, item in FORMATS.items() if item.is_text)
BINARY_FORMATS = sorted(set(FORMATS) - set(TEXT_FORMATS))


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([STALLSCOPE, "export", *map(str, words)], capture_output=True, timeout=60, cwd=cwd)


def assert_refused(done: subprocess.CompletedProcess[bytes], status: int, said: str) -> None:
    assert (done.returncode, done.stdout) == (status, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("stallscope: ")
    assert said in line


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    return known_call(tmp_path / "night.stall")


class TestDestination:
    @pytest.mark.parametrize("name", FORMATS)
    def test_is_beside_the_recording(self, name: str, recording: Path, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        done = run(recording, "-f", name, cwd=elsewhere)
        written = tmp_path / f"night{FORMATS[name].suffix}"
        assert (done.returncode, done.stdout) == (0, b"")
        assert done.stderr.decode().startswith(f"wrote {written} (")
        assert written.stat().st_size > 0
        assert list(elsewhere.iterdir()) == []

    @pytest.mark.parametrize("name", TEXT_FORMATS)
    def test_may_be_stdout_for_text(self, name: str, recording: Path, tmp_path: Path) -> None:
        done = run(recording, "-f", name, "-o", "-")
        run(recording, "-f", name, "-o", tmp_path / "file")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == (tmp_path / "file").read_bytes()
        done.stdout.decode()

    @pytest.mark.parametrize("name", BINARY_FORMATS)
    def test_is_never_stdout_for_bytes(self, name: str, recording: Path) -> None:
        assert_refused(run(recording, "-f", name, "-o", "-"), 2, f"{name} is a binary format; name a file with -o")

    def test_is_not_overwritten_unasked(self, recording: Path, tmp_path: Path) -> None:
        target = tmp_path / "mine.csv"
        target.write_text("precious")
        assert_refused(run(recording, "-f", "csv", "-o", target), 2, f"{target} exists; choose another name with -o or")
        assert target.read_text() == "precious"
        assert run(recording, "-f", "csv", "-o", target, "--force").returncode == 0
        assert target.read_text().startswith('"id","kind"')

    def test_is_never_the_recording(self, recording: Path) -> None:
        before = recording.read_bytes()
        assert_refused(run(recording, "-f", "csv", "-o", recording, "--force"), 2, "is the recording itself")
        assert recording.read_bytes() == before

    def test_is_a_folder_that_exists(self, recording: Path, tmp_path: Path) -> None:
        assert_refused(
            run(recording, "-f", "csv", "-o", tmp_path / "no" / "x.csv"), 2, f"there is no folder {tmp_path}/no"
        )

    @pytest.mark.parametrize("name", FORMATS)
    def test_may_be_full(self, name: str, recording: Path) -> None:
        done = run(recording, "-f", name, "-o", "/dev/full", "--force")
        assert_refused(done, 1, "cannot write /dev/full: No space left on device; choose another file with -o")
        assert Path("/dev/full").is_char_device()

    def test_holds_nothing_half_written(self, recording: Path, tmp_path: Path) -> None:
        """A file that cannot be finished is removed."""
        target = tmp_path / "cut.ndjson"
        limited = f"ulimit -f 8; exec {STALLSCOPE} export {recording} -f ndjson -o {target}"
        done = subprocess.run(["bash", "-c", limited], capture_output=True, timeout=60)
        assert_refused(done, 1, f"cannot write {target}: File too large")
        assert not target.exists()

    def test_may_be_a_pipe_that_closes(self, recording: Path) -> None:
        command = f"{STALLSCOPE} export {recording} -f ndjson -o - | head -1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=60)
        assert json.loads(done.stdout)["id"] == 0
        assert done.stderr == b""


class TestRequest:
    def test_without_a_format_lists_them(self, recording: Path) -> None:
        done = run(recording)
        assert done.returncode == 2
        assert all(name in done.stderr.decode() for name in FORMATS)

    def test_of_what_is_no_recording(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"Hello, world. " * 999)
        assert_refused(run(tmp_path / "x", "-f", "csv", "-o", "-"), 2, "is not a stallscope recording")
        assert_refused(run(tmp_path / "none", "-f", "csv", "-o", "-"), 2, "does not exist")

    def test_of_the_schema_needs_no_recording(self) -> None:
        done = run("--schema")
        assert done.returncode == 0
        assert json.loads(done.stdout)["title"] == "One row of a Stallscope export"

    def test_without_short_calls_counts_them(self, recording: Path) -> None:
        """Three crons of 1.5, 2.0 and 2.5 ms, and five purges of 20 ms, are shorter than 21 ms."""
        done = run(recording, "-f", "ndjson", "-o", "-", "--min-duration", "21ms")
        assert done.stderr.decode() == "8 calls shorter than 21.0 ms were left out\n"
        calls = [row for row in map(json.loads, done.stdout.splitlines()) if row["kind"] == "call"]
        assert len(calls) == 12
        assert min(call["duration_ns"] for call in calls) >= 21 * MS
        # the purges' time is the trims' now
        assert {call["self_ns"] for call in calls if call["name"] == "sdsRemoveFreeSpace"} == {118 * MS}
        by_id = {call["id"]: call for call in calls}
        assert {by_id[call["parent"]]["name"] for call in calls if call["name"] == "sdsRemoveFreeSpace"} == {
            "clientsCronResizeQueryBuffer"
        }
        assert {call["stall"] for call in calls} == {0}

    def test_that_is_too_much_for_a_viewer_says_so(
        self, recording: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from stallscope.tracer import cli

        monkeypatch.setitem(FORMATS, "csv", replace(FORMATS["csv"], many_rows=7))
        cli.cli.main(["export", str(recording), "-f", "csv", "-o", os.devnull, "--force"], standalone_mode=False)
        (line, _) = capsys.readouterr().err.splitlines()
        assert line.endswith(" events: a spreadsheet takes 1,048,576 lines; leave out short calls with --min-duration")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("path", sorted(DATA.glob("*.stall")), ids=lambda path: path.stem)
def test_every_golden_recording_can_be_written(name: str, path: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with target.open("wb") as out:
        FORMATS[name].load()(analyse(read_recording(path)), out)
    nothing = {("folded", "empty"), ("folded", "slow-drain"), ("ndjson", "empty")}  # no call; nothing at all
    assert target.stat().st_size > 0 or (name, path.stem) in nothing


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kinds", [{ITERATION, QUEUE, COUNTER}, set()])
def test_a_recording_without_functions_can_be_written(name: str, kinds: set[str], tmp_path: Path) -> None:
    made = manifest(probes=tuple(probe for probe in PROBES if probe.kind in kinds))
    builder = Builder(made)
    if kinds:
        builder.span(ITERATION_ID, 10, 20, 1, 0).queue(15, 4, 0).counter(15, 901)
    out = io.BytesIO()
    FORMATS[name].load()(analyse(read_recording(builder.write(tmp_path / "x.stall", 100))), out)
    assert out.getvalue() or name in ("folded", "ndjson")


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_imported_is_written_or_said_to_be_left_out(name: str, tmp_path: Path) -> None:
    inputs = [
        DATA / "backlog-full.pcap",
        DATA / "redis-cli" / "slowlog-7.0.no-raw.txt",
        DATA / "redis-cli" / "info-7.0.txt",
    ]
    path = run_import(inputs, None, tmp_path / "x.stall", (7379,)).path
    done = run("-f", name, path)
    assert done.returncode == 0, done.stderr
    assert (b"imported rows left out" in done.stderr) is not FORMATS[name].has_imported
    content = FORMATS[name].beside(path).read_bytes()
    if name in ("chrome", "csv", "ndjson"):
        assert all(text in content for text in (b"SYN-ACK", b"SLOWLOG", b"connected_clients"))


def crossing(tmp_path: Path) -> Path:
    """Write a damaged recording: calls that cross instead of nesting, on two threads."""
    builder = Builder()
    for tid in (4711, 4713):
        for index in range(50):
            builder.span((CRON, TRIM, PURGE)[index % 3], index * 7 % 31, 10 + index % 5, tid=tid)
    return builder.write(tmp_path / "crossing.stall", 100)


class TestEdges:
    @pytest.mark.parametrize("damaged", [False, True])
    def test_nest_as_the_calls_do(self, damaged: bool, tmp_path: Path) -> None:
        path = crossing(tmp_path) if damaged else known_call(tmp_path / "x.stall")
        nested = analyse(read_recording(path)).nested
        assert nested.crossing is damaged
        edges = call_edges(nested)
        assert_brackets(nested)
        tid = nested.calls["tid"].to_numpy()[edges.call]
        assert (np.diff(edges.time_ns)[np.diff(tid) == 0] >= 0).all()

    @given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.sampled_from([1, 2])), max_size=40))
    def test_nest_whatever_was_recorded(self, spans: list[tuple[int, int, int]]) -> None:
        """Spans of any overlap, many of no length and at the same nanosecond."""
        tables = build_tables(read_recording(DATA / "empty.stall"))
        table = np.array(sorted((tid, start, -duration) for start, duration, tid in spans), np.int64).reshape(-1, 3)
        tid, start, shorter = table.T
        calls = tables.calls.reindex(range(len(spans))).assign(
            start_ns=start, duration_ns=-shorter, tid=tid.astype(np.uint32), pid=np.uint32(1), probe=np.uint16(CRON),
            unfinished=False, row=0,
        )  # fmt: skip
        assert_brackets(nest(calls))


def assert_brackets(nested: Nested) -> None:
    """Check that entries and returns pair like brackets, with every call inside its caller."""
    edges = call_edges(nested)
    assert len(edges) == 2 * len(nested.calls)
    parent, depth, tid = (nested.calls[name].to_numpy() for name in ("parent", "depth", "tid"))
    stack: list[int] = []
    last: dict[int, int] = {}
    for call, enters, time_ns in zip(edges.call.tolist(), edges.enters.tolist(), edges.time_ns.tolist(), strict=True):
        assert time_ns >= last.get(tid[call], time_ns)
        last[tid[call]] = time_ns
        if enters:
            assert (parent[call], depth[call]) == (stack[-1] if stack else -1, len(stack))
            stack.append(call)
        else:
            assert stack.pop() == call
    assert stack == []


INTEGERS = st.integers(-(2**63), 2**63 - 1)


def read_varint(data: Iterator[int]) -> int:
    """Return a number as the encoding's specification reads it: any length up to ten bytes."""
    value = 0
    for place, byte in zip(range(10), data, strict=False):
        value |= (byte & 0x7F) << 7 * place
        if not byte & 0x80:
            return value & (2**64 - 1)
    raise AssertionError("a varint of more than ten bytes")


class TestProtobuf:
    @given(st.lists(INTEGERS, min_size=1, max_size=20))
    def test_columns_hold_their_numbers(self, values: list[int]) -> None:
        matrix = number_column(3, np.array(values, np.int64))
        for row, value in zip(matrix, values, strict=True):
            data = iter(row.tolist())
            assert read_varint(data) == 3 << 3
            assert read_varint(data) == value & (2**64 - 1)
            assert list(data) == []

    @given(INTEGERS)
    def test_varints_are_as_short_as_they_can_be(self, value: int) -> None:
        encoded = varint(value)
        assert read_varint(iter(encoded)) == value & (2**64 - 1)
        assert len(encoded) == max(1, -(-(value & (2**64 - 1)).bit_length() // 7))

    def test_one_message_is_what_its_fields_are(self) -> None:
        """Where all numbers of a column are equally long, both ways of writing give the same bytes."""
        column = number_column(1, np.array([300, 301]))
        both = message_column(2, [column, constant_columns(bytes_field(5, "é"), 2)])
        for row, value in zip(both, (300, 301), strict=True):
            assert row.tobytes() == bytes_field(2, number_field(1, value) + bytes_field(5, "é"))

    def test_messages_of_several_shapes_keep_their_order(self) -> None:
        short = np.frombuffer(b"abc", np.uint8).reshape(3, 1)
        long = np.frombuffer(b"0011", np.uint8).reshape(2, 2)
        run = interleaved([(np.array([0, 2, 4]), short), (np.array([3, 1]), long)])
        assert bytes(run) == b"a11b00c"


class TestNames:
    def test_of_addresses(self) -> None:
        high = np.array([0, 0, 0x20010DB8 << 32, 0], np.uint64)
        low = np.array([0xFFFF_7F00_0001, 1, 1, 0xFFFF_7F00_0001], np.uint64)
        codes, addresses = peer_addresses(high, low)
        assert [addresses[code] for code in codes] == ["127.0.0.1", "[::1]", "[2001:db8::1]", "127.0.0.1"]

    def test_of_listeners_that_were_opened_twice(self, recording: Path) -> None:
        manifest = read_recording(recording).manifest
        again = ListenerInfo(1, "127.0.0.1:6379", 6379, 4711, 2002, 0, 511)
        names = listener_names(replace(manifest, listeners=(*manifest.listeners, again)), {-1, 7})
        assert names == {0: "127.0.0.1:6379 (socket 1001)", 1: "127.0.0.1:6379 (socket 2002)", 7: "listener 7"}

    def test_of_a_function_with_several_symbols(self, recording: Path) -> None:
        manifest = read_recording(recording).manifest
        twice = [replace(probe, name="purge") if probe.id in (TRIM, PURGE) else probe for probe in manifest.probes]
        names = call_names(replace(manifest, probes=tuple(twice)))
        assert (names[TRIM], names[PURGE], names[CRON]) == ("sdsRemoveFreeSpace", "je_pages_purge", "serverCron")


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20))
def test_microseconds_keep_every_nanosecond(values: list[int]) -> None:
    import pyarrow as pa

    texts = thousandths(np.array(values)).cast(pa.string())
    for text, value in zip(texts.to_pylist(), values, strict=True):
        whole, _, part = text.lstrip("-").partition(".")
        assert int(whole + part) == abs(value)
        assert (len(part), text.startswith("-")) == (3, value < 0)
    run = run_of_text(texts[1:])
    assert bytes(run).decode() == "".join(texts.to_pylist()[1:])


def test_times_are_on_the_monotonic_clock(recording: Path, tmp_path: Path) -> None:
    run(recording, "-f", "ndjson", "-o", tmp_path / "x.ndjson")
    row = json.loads((tmp_path / "x.ndjson").read_text().splitlines()[0])
    assert row["start_ns"] - row["since_start_ns"] == STARTED_NS


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([1, 4, 20, 62, 64]))
def test_damaged_rows_do_not_stop_an_export(seed: int, bits: int, tmp_path: Path) -> None:
    """Rows of random bits, as a damaged file may hold: every format is written to its end."""
    random = np.random.default_rng(seed)
    events = random.integers(0, 256, 200 * EVENT_BYTES, np.uint8).view(EVENT)
    for name in ("start_ns", "duration_ns", "value"):
        events[name] >>= np.uint64(64 - bits)
    events["start_ns"] += np.uint64(STARTED_NS)
    events["probe"] %= 25
    path = tmp_path / f"{seed}-{bits}.stall"
    with RecordingWriter(path, hooked_manifest()) as writer:
        writer.write(events)
    analysis = analyse(read_recording(path))
    for name, chosen in FORMATS.items():
        out = io.BytesIO()
        chosen.load()(analysis, out)
        if name in ("chrome", "speedscope"):
            json.loads(out.getvalue())
        elif name == "perfetto":
            assert perfetto_trace_pb2.Trace.FromString(out.getvalue()).packet
