"""Imported rows on a recording's clock: which are kept, where they lie, and what is said about the others."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from captures import WALL_NS, Connection, in_order, pcap
from recordings import DATA, MS, STARTED_NS, WALL_OFFSET_NS, Builder, add_storm, manifest, quiet

from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.tables import Tables, build_tables
from stallscope.tracer.errors import UsageError
from stallscope.tracer.imports import timeline
from stallscope.tracer.imports.rows import Input, Span, spans_input
from stallscope.tracer.imports.run import run_import
from stallscope.tracer.imports.timeline import MAX_TEXTS, place_in, recording_of
from stallscope.tracer.manifest import IMPORTED_SPAN, ProbeInfo
from stallscope.tracer.recording import RecordingWriter, read_recording
from stallscope.tracer.units import parse_offset_ns

STALLSCOPE = str(Path(sys.executable).with_name("stallscope"))
S = 1_000_000_000
START_WALL_NS = STARTED_NS + WALL_OFFSET_NS
assert START_WALL_NS == WALL_NS, "packets and recordings begin together"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([STALLSCOPE, *map(str, words)], capture_output=True, text=True, timeout=60)


def slow(ended_s: float, duration_ms: float, text: str = "") -> Span:
    """Return an entry that ended this many seconds after the recording's start."""
    return Span("SLOWLOG", START_WALL_NS // S + int(ended_s), round(duration_ms * MS), text)


def entries(*spans: Span) -> Input:
    return spans_input("slow.txt", "SLOWLOG", "test", spans, {"entries": len(spans)})


def tables(path: Path) -> Tables:
    return build_tables(read_recording(path))


@pytest.fixture
def storm(tmp_path: Path) -> Path:
    return quiet(add_storm(Builder(), 1000), 4000, overflow=943, drops=83, after_ms=2000).write(
        tmp_path / "storm.stall", 4000, overflows_end=943
    )


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    """Write three clients: before the stall, refused in it until its end, and after the recording."""
    before = Connection(peer_port=1).syn(500).syn_ack(500.1).ack(500.2)
    during = Connection(peer_port=2).syn(1510).syn(2510).syn_ack(2510.1).ack(2510.2)
    after = Connection(peer_port=3).syn(4001).syn_ack(4002).ack(4003)
    path = tmp_path / "cap.pcap"
    path.write_bytes(pcap(in_order(before, during, after)))
    return path


class TestInto:
    def test_a_recording_puts_packets_where_they_happened(self, storm: Path, capture: Path, tmp_path: Path) -> None:
        done = run_import([capture], storm, tmp_path / "all.stall")
        found = tables(done.path).packets
        assert (found["time_ns"] - STARTED_NS).tolist() == [
            round(ms * MS) for ms in (500, 500.1, 500.2, 1510, 2510, 2510.1, 2510.2)
        ]
        assert found["event"].tolist() == [
            "SYN",
            "SYN-ACK",
            "third ACK",
            "SYN",
            "SYN retransmitted",
            "SYN-ACK",
            "third ACK",
        ]
        assert found["peer_port"].tolist() == [1, 1, 1, 2, 2, 2, 2]
        assert found["connection"].tolist() == [0, 0, 0, 1, 1, 1, 1]
        assert set(found["listener"]) == {0}
        assert set(found["server"]) == {"192.0.2.1:6379"}
        assert done.lines == (
            f"{capture}: pcap, 10 packets, 10 TCP packets of the port: 7 rows, 3 outside the recording left out",
        )

    def test_a_recording_changes_nothing_else(self, storm: Path, capture: Path, tmp_path: Path) -> None:
        before = hashlib.sha256(storm.read_bytes()).digest()
        run_import([capture], storm, tmp_path / "all.stall")
        assert hashlib.sha256(storm.read_bytes()).digest() == before
        old, new = read_recording(storm), read_recording(tmp_path / "all.stall")
        assert new.table.slice(0, old.table.num_rows).equals(old.table)
        assert new.table.num_rows == old.table.num_rows + 7
        assert (new.complete, new.counters) == (True, old.counters)
        same = replace(new.manifest, imports=(), texts=(), probes=new.manifest.probes[: len(old.manifest.probes)])
        assert same == old.manifest
        stalls = [analyse(recording).stalls.frame for recording in (old, new)]
        assert stalls[0].equals(stalls[1])

    def test_a_recording_that_was_cut_short_leaves_it_so(self, tmp_path: Path, capture: Path) -> None:
        done = run_import([capture], DATA / "cut-short.stall", tmp_path / "all.stall")
        old, new = read_recording(DATA / "cut-short.stall"), read_recording(done.path)
        assert not new.complete
        assert new.counters == old.counters
        # it is known to have run for 1505 ms
        assert len(build_tables(new).packets) == 3
        assert new.manifest.imports[0].outside == 7

    def test_the_same_again_adds_to_what_is_there(self, storm: Path, capture: Path, tmp_path: Path) -> None:
        run_import([capture], storm, tmp_path / "one.stall")
        run_import([capture], tmp_path / "one.stall", tmp_path / "two.stall", offset_ns=10 * MS)
        found = tables(tmp_path / "two.stall")
        assert found.packets.groupby("file").size().tolist() == [7, 7]
        assert [item.offset_ns for item in found.manifest.imports] == [0, 10 * MS]
        kinds = [(probe.kind, probe.name) for probe in found.manifest.probes]
        assert len(set(kinds)) == len(kinds)
        assert found.manifest.texts == ("192.0.2.1:6379",)

    def test_an_offset_moves_the_rows(self, storm: Path, capture: Path, tmp_path: Path) -> None:
        run_import([capture], storm, tmp_path / "all.stall", offset_ns=-500 * MS)
        found = tables(tmp_path / "all.stall").packets
        assert int(found["time_ns"].iloc[0]) == STARTED_NS
        assert len(found) == 10

    def test_the_recordings_own_listeners_are_the_ports(self, tmp_path: Path, storm: Path) -> None:
        path = tmp_path / "other.pcap"
        path.write_bytes(pcap(in_order(Connection(port=6380).syn(100).syn_ack(101))))
        with pytest.raises(UsageError, match="has no packet of port 6379 among 2; servers answered on port 6380; give"):
            run_import([path], storm, tmp_path / "all.stall")
        run_import([path], storm, tmp_path / "all.stall", (6380,))
        assert tables(tmp_path / "all.stall").packets["listener"].tolist() == [-1, -1]


class TestWindow:
    def test_keeps_what_may_lie_in_the_recording(self, storm: Path) -> None:
        recording = read_recording(storm)
        spans = [slow(-2, 5), slow(-1, 5), slow(0, 3000), slow(4, 5), slow(4, 0), slow(5, 0), slow(7, 3500)]
        placed = place_in(recording, [entries(*spans)])
        starts = (placed.events["start_ns"].astype(np.int64) - STARTED_NS).tolist()
        # an entry ends within the second that is told: what ended in the second before may have ended at its start
        assert starts == [-S - 5 * MS, -3000 * MS, 3995 * MS, 4 * S, 3500 * MS]
        assert (placed.imports[0].rows, placed.imports[0].outside) == (5, 2)

    def test_says_by_how_much_everything_misses_it(self, storm: Path) -> None:
        recording = read_recording(storm)
        with pytest.raises(
            UsageError, match=r"nothing of slow.txt lies in the recording: it begins 3,596.000 s after"
        ) as after:
            place_in(recording, [entries(slow(3600, 0), slow(3700, 0))])
        assert "correct it with --offset, by at least -3597s" in str(after.value)
        with pytest.raises(UsageError, match=r"it ends 7,200\.000 s before the recording starts") as before:
            place_in(recording, [entries(slow(-9000, 0), slow(-7200, 0))])
        assert "by at least +7201s" in str(before.value)
        assert "\n" not in str(after.value) + str(before.value)

    def test_the_offset_that_is_suggested_is_enough(self, storm: Path, tmp_path: Path) -> None:
        path = tmp_path / "cap.pcap"
        path.write_bytes(pcap(in_order(Connection().syn(3_600_000.5))))
        done = run("import", path, "--into", storm, "-o", tmp_path / "all.stall")
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        offset = line.rpartition("by at least ")[2]
        assert run("import", path, "--into", storm, "-o", tmp_path / "all.stall", "--offset", offset).returncode == 0

    def test_with_nothing_to_place_is_no_error(self, storm: Path) -> None:
        placed = place_in(read_recording(storm), [entries()])
        assert (len(placed.events), placed.imports[0].rows) == (0, 0)


class TestClock:
    def test_that_was_slewed_while_recording_is_followed(self, tmp_path: Path) -> None:
        # 1 ms in 4 s are 250 ppm
        path = Builder(manifest()).write(tmp_path / "a.stall", 4000)
        recording = read_recording(path)
        slewed = replace(recording, manifest=replace(recording.manifest, wall_offset_end_ns=WALL_OFFSET_NS + MS))
        placed = place_in(slewed, [entries(slow(0, 0), slow(2, 0), slow(4, 0))])
        starts = (placed.events["start_ns"].astype(np.int64) - STARTED_NS).tolist()
        assert starts == [0, 2 * S - MS // 2, 4 * S - MS]
        assert placed.manifest.notes == ()

    def test_that_was_set_while_recording_is_told(self, tmp_path: Path) -> None:
        path = Builder(manifest()).write(tmp_path / "a.stall", 4000)
        recording = read_recording(path)
        stepped = replace(recording, manifest=replace(recording.manifest, wall_offset_end_ns=WALL_OFFSET_NS + S))
        placed = place_in(stepped, [entries(slow(2, 0))])
        assert (placed.events["start_ns"].astype(np.int64) - STARTED_NS).tolist() == [2 * S]
        (note,) = placed.manifest.notes
        assert note.text == "the wall clock was set by 1.00 s while recording: imported rows may be off by that"

    def test_that_began_after_the_row_did_shows_it_from_its_beginning(self, tmp_path: Path) -> None:
        path = Builder(manifest()).write(tmp_path / "a.stall", 4000)
        placed = place_in(read_recording(path), [entries(slow(1, 8_000_000))])
        assert placed.events["start_ns"].tolist() == [0]


class TestAlone:
    def test_a_recording_starts_at_the_first_row(self, capture: Path, tmp_path: Path) -> None:
        log = tmp_path / "slow.json"
        log.write_text(f'[[1, {WALL_NS // S + 2}, 500000, ["keys", "*"]]]')
        done = run_import([capture, log], None, tmp_path / "alone.stall", (6379,))
        found = tables(done.path)
        manifest_ = found.manifest
        assert manifest_.started_ns + manifest_.wall_offset_ns == WALL_NS + 500 * MS
        assert int(found.packets["time_ns"].iloc[0]) == manifest_.started_ns
        assert int(found.packets["time_ns"].iloc[-1]) == manifest_.ended_ns == found.end_ns
        (span,) = found.imported_spans.itertuples()
        assert (span.start_ns + manifest_.wall_offset_ns, span.duration_ns) == (WALL_NS + 1500 * MS, 500 * MS)
        assert (span.uncertain_ns, span.source, span.text, span.file) == (S, "SLOWLOG", "keys *", 1)
        assert read_recording(done.path).complete

    def test_without_a_port_names_those_that_answered(self, capture: Path, tmp_path: Path) -> None:
        with pytest.raises(
            UsageError, match="nothing says which port is the server's; servers answered on port 6379; give"
        ):
            run_import([capture], None, tmp_path / "alone.stall")

    def test_of_nothing_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "slow.txt"
        path.write_text("\n")
        with pytest.raises(UsageError, match="nothing to import"):
            run_import([path], None, tmp_path / "alone.stall")
        assert not (tmp_path / "alone.stall").exists()


class TestCaptures:
    def test_that_follow_each_other_are_one(self, tmp_path: Path) -> None:
        packets = in_order(Connection().syn(0).syn(1000).syn(3000).syn_ack(3001).ack(3002))
        paths = [tmp_path / f"cap{index}" for index in range(3)]
        for path, part in zip(reversed(paths), (packets[:1], packets[1:2], packets[2:]), strict=True):
            path.write_bytes(pcap(part))
        done = run_import(paths, None, tmp_path / "alone.stall", (6379,))
        found = tables(done.path)
        assert found.packets["event"].tolist() == [
            "SYN", "SYN retransmitted", "SYN retransmitted", "SYN-ACK", "third ACK",
        ]  # fmt: skip
        assert [item.file for item in found.manifest.imports] == [", ".join(map(str, reversed(paths)))]

    def test_that_overlap_are_two_of_the_same(self, tmp_path: Path) -> None:
        client, server = tmp_path / "client.pcap", tmp_path / "server.pcap"
        client.write_bytes(pcap(in_order(Connection().syn(0).syn(1000).syn_ack(1001).ack(1002))))
        server.write_bytes(pcap(in_order(Connection().syn(1000.4).syn_ack(1000.5).ack(1002.4))))
        found = tables(run_import([client, server], None, tmp_path / "alone.stall", (6379,)).path)
        assert found.packets.groupby("file")["event"].apply(list).tolist() == [
            ["SYN", "SYN retransmitted", "SYN-ACK", "third ACK"], ["SYN", "SYN-ACK", "third ACK"],
        ]  # fmt: skip


class TestRoom:
    def test_for_texts_is_bounded_and_what_is_lost_is_counted(self, storm: Path) -> None:
        placed = place_in(
            read_recording(storm), [entries(*(slow(2, 1, f"get {index}") for index in range(MAX_TEXTS + 3)))]
        )
        assert len(placed.manifest.texts) == MAX_TEXTS
        assert placed.imports[0].notes == ("3 rows have no text: a recording keeps 10,000 different ones",)
        assert int((placed.events["stack"] < 0).sum()) == 3

    def test_for_kinds_of_rows_ends_in_one_line(self, tmp_path: Path) -> None:
        full = manifest(probes=(ProbeInfo(2**16 - 1, "last", IMPORTED_SPAN, ""),))
        with RecordingWriter(tmp_path / "a.stall", full) as writer:
            writer.write(Builder().events())
        with pytest.raises(UsageError, match="no room for more kinds of rows"):
            place_in(read_recording(tmp_path / "a.stall"), [entries(slow(0, 1))])


class TestCommand:
    def test_says_on_stderr_what_became_of_each_input(self, storm: Path, capture: Path, tmp_path: Path) -> None:
        log = tmp_path / "slow.txt"
        log.write_text("\n")
        done = run("import", capture, log, "--into", storm, "-o", tmp_path / "all.stall")
        assert (done.returncode, done.stdout) == (0, "")
        assert done.stderr.splitlines() == [
            f"{capture}: pcap, 10 packets, 10 TCP packets of the port: 7 rows, 3 outside the recording left out",
            f"{log}: nothing in it: 0 rows",
            f"{log}: it is empty: no entry, no sample",
            f"wrote {tmp_path / 'all.stall'}; see: stallscope summary {tmp_path / 'all.stall'}",
        ]

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"Hello, world.\n", "it is not a capture (pcap, pcapng), or what redis-cli prints for"),
            (bytes(100), "it is not a capture"),
            (b"\x1f\x8b" + bytes(50), "cannot be read"),
            (pcap([]), "has no packet"),
            (pcap([])[:20], "has no packet; the file is cut off in its header"),
            (pcap(in_order(Connection().syn(0)), link=127), "has link type 127, which is not read here"),
            (pcap(in_order(Connection(port=22).syn(0))), "has no packet of port 6379 among 1"),
            (struct.pack("<II", 0x0A0D0D0A, 28) + b"\x4d\x3c\x2b\x1a" + bytes(4), "has no packet; the file is cut off"),
        ],
    )
    def test_of_a_bad_input_is_one_line(self, tmp_path: Path, content: bytes, said: str) -> None:
        path = tmp_path / "input"
        path.write_bytes(content)
        done = run("import", path, "--port", 6379, "-o", tmp_path / "out.stall")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"stallscope: {path}")
        assert said in line
        assert not (tmp_path / "out.stall").exists()

    def test_of_what_is_not_there_or_a_folder_is_one_line(self, tmp_path: Path) -> None:
        for path, said in (
            (tmp_path / "none", "No such file"),
            (tmp_path, "it is not a file"),
            (Path("/dev/null"), "it is not a file"),
        ):
            done = run("import", path, "-o", tmp_path / "out.stall")
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert said in done.stderr

    def test_never_overwrites_the_recording_itself(self, storm: Path, capture: Path) -> None:
        before = storm.read_bytes()
        assert "exists; choose another name" in run("import", capture, "--into", storm, "-o", storm).stderr
        done = run("import", capture, "--into", storm, "-o", storm, "--force")
        assert (done.returncode, storm.read_bytes()) == (2, before)
        assert "is the recording itself, which is not changed" in done.stderr

    def test_names_its_output_after_the_recording(self, storm: Path, capture: Path, tmp_path: Path) -> None:
        words = [STALLSCOPE, "import", str(capture), "--into", str(storm)]
        assert subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=60).returncode == 0
        assert (tmp_path / "storm-imported.stall").exists()


@pytest.mark.parametrize(
    ("text", "expected"), [("-1.5s", -1_500_000_000), ("+2m", 120 * S), ("10ms", 10 * MS), ("0", 0), ("-0", 0)]
)
def test_offsets_have_a_sign(text: str, expected: int) -> None:
    assert parse_offset_ns(text) == expected


def test_an_offset_that_cannot_be_read_is_refused() -> None:
    for text in ("", "-", "--1s", "1", "+ 1 parsec"):
        with pytest.raises(UsageError, match="as a duration; write a number and a unit"):
            parse_offset_ns(text)


def test_a_recording_of_imports_has_no_clock_at_zero() -> None:
    placed = recording_of([entries(slow(0, 0))])
    assert placed.manifest.started_ns == placed.manifest.ended_ns == timeline._FIRST_NS > 0
