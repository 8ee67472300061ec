"""What imported rows show, against truth written by hand, and the golden capture of a full backlog."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import pytest
from captures import WALL_NS, Connection, in_order, pcap
from recordings import DATA, MS, STARTED_NS, WALL_OFFSET_NS, Builder, add_storm, quiet, refused
from rich.console import Console

from stallscope.reports.imported import SHOWN_SAMPLES, imported_lines
from stallscope.reports.terminal import render
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.imported import ImportedSummary, SpanSource
from stallscope.tracer.analysis.packets import (
    ANSWERED,
    REFUSED_WITH_RST,
    UNANSWERED,
    RecordedRefusals,
    find_attempts,
    unanswered_syns,
)
from stallscope.tracer.analysis.summary import Summary, summarise
from stallscope.tracer.analysis.tables import build_tables
from stallscope.tracer.imports.run import run_import
from stallscope.tracer.recording import read_recording

CAPTURE = DATA / "backlog-full.pcap"
"""Redis 7.0.15 with a backlog of 5, stopped: 50 clients connect, 6 get in at once, the others after 5 s. The kernel of
the test counted TCPSynRetrans 220; tshark counts 270 SYNs and 92 other retransmissions in the file."""


def summary_of(path: Path) -> Summary:
    return summarise(analyse(read_recording(path)))


def imported(path: Path) -> ImportedSummary:
    found = summary_of(path).imported
    assert found is not None
    json.dumps(summary_of(path).to_json(), allow_nan=False)
    return found


def printed(path: Path) -> str:
    file = io.StringIO()
    render(summary_of(path), Console(file=file, width=200))
    return file.getvalue()


@pytest.fixture
def storm(tmp_path: Path) -> Path:
    return quiet(add_storm(Builder(), 1000), 4000, overflow=943, drops=83, after_ms=2000).write(
        tmp_path / "storm.stall", 4000, overflows_end=943
    )


def write(tmp_path: Path, *connections: Connection) -> Path:
    path = tmp_path / "cap.pcap"
    path.write_bytes(pcap(in_order(*connections), nanoseconds=True))
    return path


def several() -> list[Connection]:
    return [
        Connection(peer_port=1).syn(0).syn_ack(1).ack(2),
        Connection(peer_port=2).syn(10).syn(1010).syn(3010).syn_ack(3011).ack(3012),
        Connection(peer_port=3).syn(20).syn(1020).rst(1021),
        Connection(peer_port=4).syn(30).syn(1030),
        Connection(peer_port=5).syn(40).syn_ack(41).ack(42).syn_ack(1041).ack(1042),
        Connection(peer_port=6).send(50, b"PING\r\n").send(260, b"PING\r\n").rst(270).rst(300, to_server=True),
    ]


class TestAttempts:
    @pytest.fixture
    def packets(self, tmp_path: Path) -> pd.DataFrame:
        done = run_import([write(tmp_path, *several())], None, tmp_path / "alone.stall", (6379,))
        return build_tables(read_recording(done.path)).packets

    def test_are_linked_by_their_client(self, packets: pd.DataFrame) -> None:
        found = find_attempts(packets)
        assert found["peer_port"].tolist() == [1, 2, 3, 4, 5]
        assert found["syns"].tolist() == [1, 3, 2, 2, 1]
        assert found["outcome"].tolist() == [ANSWERED, ANSWERED, REFUSED_WITH_RST, UNANSWERED, ANSWERED]
        assert found["wait_ns"].tolist() == [1 * MS, 3001 * MS, 1001 * MS, 1000 * MS, 1 * MS]
        assert found["syn_acks"].tolist() == [1, 1, 0, 0, 2]
        assert (found["established_ns"] > 0).tolist() == [True, True, False, False, True]
        assert (found["last_syn_ns"] - found["first_ns"]).tolist() == [0, 3000 * MS, 1000 * MS, 1000 * MS, 0]

    def test_leave_the_syns_that_nothing_answered(self, packets: pd.DataFrame) -> None:
        found = unanswered_syns(packets)
        assert found["peer_port"].tolist() == [2, 3, 4, 2, 4]
        assert [round((time - found["time_ns"].iloc[0]) / MS) for time in found["time_ns"]] == [0, 10, 20, 1000, 1020]

    def test_of_nothing_are_none(self, packets: pd.DataFrame) -> None:
        assert find_attempts(packets.iloc[:0]).empty
        assert unanswered_syns(packets.iloc[:0]).empty

    def test_are_summed_up(self, tmp_path: Path) -> None:
        done = run_import([write(tmp_path, *several())], None, tmp_path / "alone.stall", (6379,))
        (capture,) = imported(done.path).captures
        assert (capture.connections, capture.syns, capture.retried, capture.retried_unanswered) == (5, 9, 3, 1)
        assert (capture.wait_min_ns, capture.wait_median_ns, capture.wait_max_ns) == (1000 * MS, 1001 * MS, 3001 * MS)
        assert (capture.unanswered, capture.refused_with_rst, capture.unanswered_syns) == (1, 1, 5)
        assert (capture.handshakes_repeated, capture.resets_by_server, capture.resets_by_client) == (1, 2, 1)
        assert (capture.retransmissions_by_client, capture.retransmissions_by_server) == (1, 0)
        assert (capture.in_stalls, capture.refusals) == (None, None)
        assert capture.servers == ("192.0.2.1:6379",)
        text = printed(done.path)
        assert text.startswith(
            f"Nothing was traced. Of 5 connections in {tmp_path}/cap.pcap 3 had to send their SYN again and waited "
            "1.00 s to 3.00 s; 1 got no answer; 1 were refused with RST."
        )
        assert "tcpdump: 5 connections sent 9 SYNs, 3 waited 1.00 s to 3.00 s, 1 of them in vain" in text
        assert "  1 never answered, 1 refused with RST, 1 SYN-ACK sent again after the third ACK, 2 RST by the" in text
        assert "5 SYNs got no answer\n" in text


class TestBesideARecording:
    def test_syns_are_counted_in_its_stalls(self, storm: Path, tmp_path: Path) -> None:
        """The stall lasts from 1000 to 1620 ms, the queue is normal again at 1650 ms."""
        inside = Connection(peer_port=1).syn(1510).syn(2510).syn_ack(2511).ack(2512)
        draining = Connection(peer_port=2).syn(1640).syn(2640).syn_ack(2641).ack(2642)
        outside = Connection(peer_port=3).syn(990).syn(1990).syn_ack(1991).ack(1992)
        done = run_import([write(tmp_path, inside, draining, outside)], storm, tmp_path / "all.stall")
        (capture,) = imported(done.path).captures
        assert (capture.unanswered_syns, capture.in_stalls) == (3, 2)
        assert capture.refusals == RecordedRefusals(times=43, connections=None, captured=None, clock_ns=None)
        text = printed(done.path)
        assert "3 SYNs got no answer, 2 of them in a stall or the draining after it; " in text
        assert "the recording has 43 refusals meanwhile" in text

    def test_refused_connections_are_found_in_the_capture(self, tmp_path: Path) -> None:
        """Ports 40000 to 40019 are refused at their SYN, 40020 at its third ACK; the capture's clock is 3 ms late."""
        clients = []
        for index in range(15):
            client = Connection(peer_port=40000 + index, client="127.0.0.1", isn=index)
            client.syn(1501 + index / 10 + 3).syn(1515 + index / 10 + 3)
            clients.append(client)
        clients.append(Connection(peer_port=50000, client="127.0.0.1").syn(1005).syn_ack(1005.1))
        path = refused(tmp_path / "refused.stall")
        done = run_import([write(tmp_path, *clients)], path, tmp_path / "all.stall")
        (capture,) = imported(done.path).captures
        assert capture.refusals is not None
        assert (capture.refusals.connections, capture.refusals.captured) == (21, 15)
        assert capture.refusals.clock_ns == 3 * MS
        assert (
            "15 of 21 refused connections are in the capture, their first SYN 3.00 ms later than the refusal"
            in printed(done.path)
        )

    def test_a_slowlog_without_an_entry_says_that_no_stall_is_in_it(self, storm: Path, tmp_path: Path) -> None:
        log = tmp_path / "log.txt"
        log.write_text("127.0.0.1:6379> slowlog get\n(empty array)\n")
        done = run_import([log], storm, tmp_path / "all.stall")
        assert imported(done.path).spans == (SpanSource("SLOWLOG", 0, 0, "", 0),)
        assert "SLOWLOG: nothing in the recording's time; none of the 1 stall is in it" in printed(done.path)

    @pytest.mark.parametrize(
        ("ended_s", "duration_ms", "stalls"),
        [
            (1, 620, 1),  # ended between 1 and 2 s
            (1, 310, 1),
            (1, 309, 0),  # less than half of the stall
            (0, 700, 1),  # may have ended at 1 s, where the stall begins
            (2, 620, 1),
            (3, 620, 0),
        ],
    )
    def test_entries_are_compared_with_its_stalls(
        self, storm: Path, tmp_path: Path, ended_s: int, duration_ms: int, stalls: int
    ) -> None:
        log = tmp_path / "log.json"
        log.write_text(f'[[1, {WALL_NS // 10**9 + ended_s}, {duration_ms * 1000}, ["keys", "*"]]]')
        done = run_import([log], storm, tmp_path / "all.stall")
        (source,) = imported(done.path).spans
        assert (source.count, source.longest_ns, source.longest_text) == (1, duration_ms * MS, "keys *")
        assert source.stalls == stalls

    def test_nothing_imported_is_none(self, storm: Path) -> None:
        assert summary_of(storm).imported is None
        assert "Imported" not in printed(storm)


class TestInfo:
    def test_fields_are_told_from_first_to_last(self, tmp_path: Path) -> None:
        path = tmp_path / "info.txt"
        dumps = [(10, 5, 1000), (11, 17, 3000), (12, 8, 2000)]
        path.write_text(
            "".join(
                f"{WALL_NS // 10**9 + second}.5\n# Clients\nconnected_clients:{clients}\nused_memory:{memory}\n"
                for second, clients, memory in dumps
            )
        )
        done = run_import([path], None, tmp_path / "alone.stall")
        found = build_tables(read_recording(done.path)).imported_samples
        clients = found.loc[found["name"] == "connected_clients"]
        assert clients["value"].tolist() == [5.0, 17.0, 8.0]
        assert set(clients["unit"]) == {"clients"}
        assert (clients["time_ns"].diff().dropna() == 1000 * MS).all()
        lines = imported_lines(imported(done.path))
        assert "INFO connected_clients: 5 clients first, 8 clients last, between 5 clients and 17 clients" in lines
        assert "INFO used_memory: 1.00 kB first, 2.00 kB last, between 1.00 kB and 3.00 kB" in lines

    def test_of_a_real_server_shows_the_first_and_counts_the_rest(self, tmp_path: Path) -> None:
        done = run_import([DATA / "redis-cli" / "info-7.0.txt"], None, tmp_path / "alone.stall")
        found = imported(done.path)
        lines = imported_lines(found)
        assert lines[0].startswith("INFO connected_clients: ")
        assert lines[SHOWN_SAMPLES] == f"INFO: {len(found.samples) - SHOWN_SAMPLES} more fields are in the recording"


class TestGoldenCapture:
    @pytest.mark.parametrize("nanoseconds", [False])
    def test_shows_who_waited_for_the_full_backlog(self, tmp_path: Path, nanoseconds: bool) -> None:
        done = run_import([CAPTURE], None, tmp_path / "alone.stall", (7379,))
        (capture,) = imported(done.path).captures
        assert (capture.connections, capture.syns, capture.retried) == (50, 270, 44)
        assert (capture.unanswered, capture.unanswered_syns) == (0, 220)
        assert capture.retransmissions_by_client == 92
        assert capture.wait_min_ns is not None
        assert 5.0 < capture.wait_min_ns / 1e9 < 5.2
        events = build_tables(read_recording(done.path)).packets["event"].value_counts()
        assert events["SYN-ACK"] == events["third ACK"] == 50


def test_times_of_the_helpers_agree() -> None:
    assert STARTED_NS + WALL_OFFSET_NS == WALL_NS
