"""When a stall filled the queue, who waited in it and how long, and for which clients it worked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    ACCEPT_ID,
    CRON,
    FREE,
    ITERATION_ID,
    LIMIT,
    LISTENER_FD,
    MS,
    PID,
    PROBES,
    REQUEST_ID,
    RESIZE,
    Builder,
    ProbeCounters,
    hooked_manifest,
    known_call,
    manifest,
    refused,
)

from stallscope.probes.catalogue import Field
from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.analysis.clients import KEPT_CLIENTS, peer_address
from stallscope.tracer.analysis.segments import range_max, range_of, ranges, sum_by
from stallscope.tracer.manifest import ListenerInfo
from stallscope.tracer.recording import read_recording

FULL = "SYN refused: accept queue full"


def analysed(builder: Builder, tmp_path: Path, counters: dict[int, ProbeCounters] | None = None) -> Analysis:
    return analyse(read_recording(builder.write(tmp_path / "a.stall", 10_000, counters)))


def stall(analysis: Analysis, index: int = 0) -> dict[str, Any]:
    return dict(analysis.stalls.frame.iloc[index])


class TestFilling:
    def test_of_the_known_stall(self, tmp_path: Path) -> None:
        one = stall(analyse(read_recording(known_call(tmp_path / "a.stall"))))
        assert (one["full_ns"], one["first_overflow_ns"]) == (495 * MS, 505 * MS)

    def test_seen_by_the_kernel_before_the_sampler(self, tmp_path: Path) -> None:
        builder = Builder(hooked_manifest()).queue(990, 0, 0).span(ITERATION_ID, 1000, 100)
        builder.request(1031, FULL, 40000, queue_length=512).queue(1040, 512, 1).queue(1110, 0, 1)
        one = stall(analysed(builder, tmp_path))
        assert (one["full_ns"], one["first_overflow_ns"]) == (31 * MS, 31 * MS + 1)

    def test_the_length_at_accept_says_nothing_of_the_time_of_the_enqueue(self, tmp_path: Path) -> None:
        builder = Builder(hooked_manifest()).queue(990, 0, 0).span(ITERATION_ID, 1000, 100)
        builder.request(1010, "connection accepted", 40000, queue_length=512, wait_ms=200)
        assert stall(analysed(builder, tmp_path))["full_ns"] == -1

    def test_a_queue_full_before(self, tmp_path: Path) -> None:
        builder = Builder().queue(990, 512, 0).span(ITERATION_ID, 1000, 100).queue(1050, 512, 0)
        assert stall(analysed(builder, tmp_path))["full_ns"] == 0

    def test_a_queue_at_its_limit_is_not_full_yet(self, tmp_path: Path) -> None:
        builder = Builder().queue(990, 0, 0).span(ITERATION_ID, 1000, 100).queue(1050, LIMIT, 0)
        one = stall(analysed(builder, tmp_path))
        assert (one["queue_max"], one["full_ns"], one["first_overflow_ns"]) == (LIMIT, -1, -1)


class TestWaits:
    def test_told_by_the_kernel(self, tmp_path: Path) -> None:
        analysis = analyse(read_recording(refused(tmp_path / "a.stall")))
        one = stall(analysis)
        assert analysis.stalls.waits_exact
        assert (one["waited"], one["wait_median_ns"], one["wait_max_ns"]) == (5, 615 * MS, 615 * MS)

    def test_from_samples_and_accepts(self, tmp_path: Path) -> None:
        """Two are in the queue at 1010 ms and five at 1020 ms; they are accepted from 1101 ms on, 1 ms apart."""
        builder = Builder().queue(990, 0, 0).span(ITERATION_ID, 1000, 100).queue(1010, 2, 0).queue(1020, 5, 0)
        builder.accepts(1101, 5, 1).queue(1110, 0, 0)
        analysis = analysed(builder, tmp_path)
        one = stall(analysis)
        assert not analysis.stalls.waits_exact
        assert one["waited"] == 5
        accepted_ms = 1101.005
        waits = [accepted_ms + index - (1010 if index < 2 else 1020) for index in range(5)]
        assert one["wait_max_ns"] == pytest.approx(max(waits) * MS)
        assert one["wait_median_ns"] == pytest.approx(float(np.median(waits)) * MS)

    def test_what_came_after_the_stall_did_not_wait_in_it(self, tmp_path: Path) -> None:
        builder = Builder().queue(990, 0, 0).span(ITERATION_ID, 1000, 100).accepts(1200, 3, 20).queue(1195, 1, 0)
        one = stall(analysed(builder, tmp_path))
        assert (one["waited"], one["wait_max_ns"]) == (0, -1)

    def test_one_connection_may_wait_in_two_stalls(self, tmp_path: Path) -> None:
        builder = Builder(hooked_manifest()).span(ITERATION_ID, 1000, 100).span(ITERATION_ID, 1150, 100)
        builder.enters(1050, 40000, 220).enters(1190, 40001, 70)
        frame = analysed(builder, tmp_path).stalls.frame
        assert frame["waited"].tolist() == [1, 2]
        assert frame["wait_median_ns"].tolist() == [220 * MS, 145 * MS]

    def test_rows_that_are_missing_make_it_at_least(self, tmp_path: Path) -> None:
        builder = Builder(hooked_manifest()).span(ITERATION_ID, 1000, 100).enters(1050, 40000, 220)
        thinned = {REQUEST_ID["connection accepted"]: ProbeCounters(hits=9, sent=1, thinned=8)}
        analysis = analysed(builder, tmp_path, thinned)
        assert (stall(analysis)["waited"], analysis.stalls.waits_exact) == (1, False)
        assert analysed(builder, tmp_path).stalls.waits_exact

    @pytest.mark.parametrize("why", ["two listeners", "two queues", "lost"])
    def test_not_known(self, why: str, tmp_path: Path) -> None:
        listeners = (*manifest().listeners, ListenerInfo(1, "[::1]:6379", 6379, PID, 1002, 0, LIMIT))
        builder = Builder(manifest(listeners=listeners)).queue(990, 0, 0).span(ITERATION_ID, 1000, 100)
        builder.queue(1010, 2, 0).accepts(1101, 2)
        counters = {}
        if why == "two listeners":
            builder.span(ACCEPT_ID, 1105, 0.005, LISTENER_FD + 1, 300)
        elif why == "two queues":
            builder.queue(1011, 1, 0, listener=1)
        else:
            counters = {ACCEPT_ID: ProbeCounters(hits=9, sent=2, lost=7)}
        assert stall(analysed(builder, tmp_path, counters))["waited"] == -1

    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 150)), max_size=25), st.integers(1, 20))
    def test_bounds_are_never_longer_than_the_waits(self, visits: list[tuple[int, int]], every_ms: int) -> None:
        """A first-in-first-out queue sampled now and then: nobody is said to have waited longer than they did."""
        arrivals = sorted(1000 + arrival for arrival, _ in visits)
        taken: list[float] = []
        for index, (arrival, (_, pause)) in enumerate(zip(arrivals, visits, strict=True)):
            taken.append(max(arrival, taken[-1] if taken else 0) + pause + index / 1000)
        builder = Builder().span(ITERATION_ID, 1000, 400)
        for time_ms in range(990, 5000, every_ms):
            length = sum(arrival <= time_ms for arrival in arrivals) - sum(time <= time_ms for time in taken)
            builder.queue(time_ms, length, 0)
        for index, time in enumerate(taken):
            builder.span(ACCEPT_ID, time - 0.0005, 0.0005, LISTENER_FD, 100 + index)
        with TemporaryDirectory() as place:
            one = stall(analysed(builder, Path(place)))
        waits = [end - start for start, end in zip(arrivals, taken, strict=True) if start < 1400 and end > 1000]
        if one["waited"] > 0:
            assert one["waited"] <= len(waits)
            assert one["wait_max_ns"] <= max(waits) * MS + 1000


class TestClients:
    def test_most_time_first_with_what_was_called_for_them(self, tmp_path: Path) -> None:
        builder = Builder().span(ITERATION_ID, 1000, 100).span(CRON, 1001, 95)
        for index, length_ms in enumerate((5, 30, 10)):
            builder.span(RESIZE, 1002 + index * 31, length_ms, 100 + index, 64_000, 32_000)
            builder.span(FREE, 1003 + index * 31, 2)
        builder.span(RESIZE, 1090, 4, 100, 64_000, 1)
        analysis = analysed(builder, tmp_path)
        assert stall(analysis)["clients"] == 3
        clients = analysis.stalls.clients
        assert clients["client"].tolist() == [101, 102, 100]
        assert clients["total_ns"].tolist() == [30 * MS, 10 * MS, 9 * MS]
        assert clients["calls"].tolist() == [1, 1, 2]
        assert clients["free_bytes"].tolist() == [32_000] * 3
        assert set(clients["field"]) == {"fd"}
        assert set(clients["peer"]) == {""}

    def test_many_clients_are_counted_and_the_first_kept(self, tmp_path: Path) -> None:
        builder = Builder().span(ITERATION_ID, 1000, 200)
        for index in range(40):
            builder.span(RESIZE, 1001 + index * 4, 1 + index / 100, 500 + index)
        analysis = analysed(builder, tmp_path)
        assert stall(analysis)["clients"] == 40
        assert analysis.stalls.clients["client"].tolist() == list(range(539, 539 - KEPT_CLIENTS, -1))

    def test_no_call_told_a_client(self, tmp_path: Path) -> None:
        analysis = analysed(Builder().span(ITERATION_ID, 1000, 100).span(FREE, 1010, 50), tmp_path)
        assert stall(analysis)["clients"] == -1
        assert analysis.stalls.clients.empty

    def test_a_call_inside_another_for_a_client_counts_once(self, tmp_path: Path) -> None:
        by_id = (Field("client_id", "low 32 bits of the client id", 0, bits=32),)
        probes = tuple(replace(probe, fields=by_id) if probe.id in (RESIZE, FREE) else probe for probe in PROBES)
        builder = Builder(manifest(probes=probes)).span(ITERATION_ID, 1000, 100)
        builder.span(FREE, 1001, 50, 7_000_000_042).span(RESIZE, 1010, 20, 7_000_000_042)
        clients = analysed(builder, tmp_path).stalls.clients
        assert clients[["field", "client", "calls", "total_ns"]].to_numpy().tolist() == [
            ["client_id", 7_000_000_042 & 0xFFFF_FFFF, 1, 50 * MS]
        ]

    def test_the_peer_where_the_client_was_seen_to_come_in(self, tmp_path: Path) -> None:
        """fd 100 came twice: the second is meant. fd 101 came after the stall, fd 102 was not seen by the kernel."""
        builder = Builder(hooked_manifest())
        for enqueued_ms, accepted_ms, fd, port in (
            (10, 20, 100, 40000),
            (30, 40, 100, 40001),
            (2000, 2010, 101, 40002),
        ):
            builder.request(enqueued_ms, "connection accepted", port, wait_ms=accepted_ms - enqueued_ms + 0.002)
            builder.span(ACCEPT_ID, accepted_ms, 0.005, LISTENER_FD, fd)
        builder.span(ACCEPT_ID, 60, 0.005, LISTENER_FD, 102)
        builder.span(ITERATION_ID, 1000, 100)
        for index in range(3):
            builder.span(RESIZE, 1001 + index * 30, 29 - index, 100 + index)
        clients = analysed(builder, tmp_path).stalls.clients
        assert clients["client"].tolist() == [100, 101, 102]
        assert clients["peer"].tolist() == ["127.0.0.1:40001", "", ""]

    def test_addresses_as_people_write_them(self) -> None:
        assert peer_address(0, 0xFFFF_C000_0201, 50123) == "192.0.2.1:50123"
        assert peer_address(0xFE80_0000_0000_0000, 0xFFFF_FFFF_FFFF_FFFE, 1) == "[fe80::ffff:ffff:ffff:fffe]:1"


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=12), st.data())
def test_ranges_of_rows(steps: list[tuple[int, int]], data: st.DataObject) -> None:
    first = np.cumsum([gap + length for gap, length in [(0, 0), *steps]])[: len(steps)].astype(np.int64)
    last = first + np.array([length for _, length in steps], np.int64)
    value = np.array(data.draw(st.lists(st.integers(-9, 99), min_size=200, max_size=200)), np.int64)
    owner, place = ranges(first, last)
    expected = [(index, row) for index in range(len(first)) for row in range(first[index], last[index])]
    assert list(zip(owner.tolist(), place.tolist(), strict=True)) == expected
    assert sum_by(owner, value[place], len(first)).tolist() == [
        value[a:b].sum() for a, b in zip(first, last, strict=True)
    ]
    most = [max(value[a:b], default=-1) for a, b in zip(first, last, strict=True)]
    assert range_max(value, first, last).tolist() == most
    of = {row: index for index, row in expected}
    order = np.array(data.draw(st.permutations(range(len(first)))), np.int64)
    shuffled = range_of(np.arange(200), first[order], last[order])
    assert [order[index] if index >= 0 else -1 for index in shuffled] == [of.get(row, -1) for row in range(200)]
