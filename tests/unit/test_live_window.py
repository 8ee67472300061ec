"""Rows and counters whose truth is known, seen through the live window."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    ACCEPT_ID,
    CLIENTS,
    CRON,
    FREE,
    ITERATION_ID,
    LIMIT,
    MS,
    PID,
    PURGE,
    STARTED_NS,
    TRIM,
    WALL_OFFSET_NS,
    Builder,
    add_storm,
    at,
    hits_of,
    manifest,
)

from stallscope.tracer.analysis.nesting import nest
from stallscope.tracer.analysis.tables import build_tables
from stallscope.tracer.live.stalls import RecentCalls
from stallscope.tracer.live.view import FunctionView, LiveView
from stallscope.tracer.live.window import LiveWindow, histogram_edges
from stallscope.tracer.manifest import ProbeCounters, ProbeInfo
from stallscope.tracer.recording import read_recording


def function(view: LiveView, name: str) -> FunctionView:
    (found,) = [item for item in view.functions if item.name == name]
    return found


@pytest.fixture(scope="module")
def storm() -> LiveView:
    builder = add_storm(Builder(manifest(min_duration_ns=0)), 1000)
    window = LiveWindow(builder.manifest)
    events = builder.events()
    for part in np.array_split(events, 7):
        window.add(part)
    return window.view(at(3000), hits_of(events, builder.manifest.probes))


class TestStorm:
    def test_has_its_cause(self, storm: LiveView) -> None:
        (stall,) = storm.recent_stalls
        assert (stall.wall_ns, stall.duration_ns) == (at(1000) + WALL_OFFSET_NS, 620 * MS)
        assert stall.path == ("serverCron", "clientsCron", "clientsCronResizeQueryBuffer", "sdsRemoveFreeSpace")
        assert (stall.cause, stall.cause_calls, stall.cause_self_ns) == ("sdsRemoveFreeSpace", 5, 490 * MS)
        assert (stall.covered_ns, stall.pid) == (620 * MS, PID)
        assert storm.stalls == storm.recent_stalls == (storm.worst_stall,)

    def test_has_its_queue_and_its_overflows(self, storm: LiveView) -> None:
        (stall,), (listener,) = storm.recent_stalls, storm.listeners
        assert (stall.queue_max, stall.queue_limit, stall.overflows) == (512, LIMIT, 43), (
            "2 within one sampling interval after it"
        )
        assert (listener.window_max, listener.queue_limit) == (512, LIMIT)
        assert storm.overflows == storm.overflows_in_interval == 43
        assert sum(storm.overflow_history) == 43

    def test_has_the_lengths_of_its_calls(self, storm: LiveView) -> None:
        trim = function(storm, "sdsRemoveFreeSpace")
        assert (trim.calls, trim.calls_in_interval, trim.rate_per_s) == (5, 5, 5 / 3)
        assert trim.p50_ns == trim.p99_ns == trim.window_max_ns == trim.max_ns == 118 * MS
        assert trim.total_ns == trim.window_total_ns == 590 * MS
        assert function(storm, "freeClient").p99_ns is None

    def test_has_its_iteration(self, storm: LiveView) -> None:
        assert storm.loop is not None
        assert (storm.loop.stalls, storm.loop.longest_ns, storm.loop.iterations) == (1, 620 * MS, 1)
        assert storm.loop.busy_share == pytest.approx(620 / 3000)
        assert dict(storm.loop.histogram)[500 * MS] == 1

    def test_as_json_says_all_of_this(self, storm: LiveView) -> None:
        document = json.loads(json.dumps(storm.to_json()))
        assert document["stalls"][0]["cause"] == "sdsRemoveFreeSpace"
        assert {item["name"]: item["calls"] for item in document["functions"]}["je_pages_purge"] == 5
        assert document["listeners"][0]["window_max"] == 512
        assert "recent_stalls" not in document


class TestIntervals:
    def test_add_up_to_the_totals(self) -> None:
        window = LiveWindow(manifest())
        hits = [0, 7, 7, 1_000_003]
        views = [window.view(at(1000 * (n + 1)), {CRON: ProbeCounters(hits=count)}) for n, count in enumerate(hits)]
        crons = [function(view, "serverCron") for view in views]
        assert [cron.calls for cron in crons] == hits
        assert [cron.calls_in_interval for cron in crons] == [0, 7, 0, 999_996]
        assert [view.interval_ns for view in views] == [1000 * MS] * 4
        assert crons[-1].rate_per_s == 999_996

    def test_a_function_of_two_binaries_is_one(self) -> None:
        other = ProbeInfo(50, "serverCron", "call", "uprobe", pids=(2,))
        window = LiveWindow(manifest(min_duration_ns=0, probes=(*manifest().probes, other)))
        window.add(Builder().span(CRON, 100, 3).span(50, 200, 5).events())
        view = window.view(at(1000), {CRON: ProbeCounters(hits=2, lost=1), 50: ProbeCounters(hits=1, lost_starts=1)})
        cron = function(view, "serverCron")
        assert (cron.calls, cron.lost, cron.max_ns, cron.total_ns) == (3, 2, 5 * MS, 8 * MS)
        assert view.lost == 2

    def test_a_stall_is_told_once_and_when_its_last_sample_is_here(self) -> None:
        builder = add_storm(Builder(), 1000)
        window = LiveWindow(builder.manifest)
        events = builder.events()
        window.add(events[events["start_ns"] + events["duration_ns"] <= at(1620)])
        early = window.view(at(1621), {})
        assert (len(early.recent_stalls), early.stalls) == (1, ())
        window.add(events[events["start_ns"] + events["duration_ns"] > at(1620)])
        late = window.view(at(2621), {})
        assert [stall.overflows for stall in late.stalls] == [43]
        assert window.view(at(3621), {}).stalls == ()

    def test_an_overflow_counts_in_one_stall(self) -> None:
        """Seen at the next sample, it may have happened in either of two stalls: it counts in the first."""
        builder = Builder().span(ITERATION_ID, 100, 20).span(ITERATION_ID, 121, 20)
        builder.counter(90, 900).counter(105, 903).counter(125, 908).counter(135, 915).counter(200, 931)
        window = LiveWindow(manifest())
        window.add(builder.events())
        view = window.view(at(1000), {})
        assert [stall.overflows for stall in view.stalls] == [8, 7]
        assert view.overflows == 31

    def test_the_worst_is_kept_and_settled(self) -> None:
        builder = add_storm(Builder(), 1000)
        for index in range(200):
            builder.span(ITERATION_ID, 2000 + index * 15, 11)
        window = LiveWindow(builder.manifest)
        window.add(builder.events())
        view = window.view(at(6000), {})
        assert view.worst_stall is not None
        assert (view.worst_stall.duration_ns, view.worst_stall.overflows) == (620 * MS, 43)
        assert view.worst_stall not in view.recent_stalls

    def test_the_end_tells_of_every_stall(self) -> None:
        window = LiveWindow(manifest())
        window.add(Builder().span(ITERATION_ID, 100, 20).events())
        assert len(window.view(at(121), {}, is_last=True).stalls) == 1


class TestShortCalls:
    def test_count_in_rates_totals_and_quantiles(self) -> None:
        window = LiveWindow(manifest())
        window.add(Builder().span(TRIM, 100, 4).span(TRIM, 200, 2).events())
        counters = {TRIM: ProbeCounters(hits=200, sent=2, short_calls=198, short_ns=5 * MS)}
        trim = function(window.view(at(1000), counters), "sdsRemoveFreeSpace")
        assert (trim.calls, trim.p50_ns, trim.max_ns, trim.total_ns) == (200, None, 4 * MS, 11 * MS)
        assert trim.p99_ns is None, "rank 198 of 200"
        counters = {TRIM: replace(counters[TRIM], hits=199, short_calls=197)}
        window = LiveWindow(manifest())
        window.add(Builder().span(TRIM, 100, 4).span(TRIM, 200, 2).events())
        trim = function(window.view(at(1000), counters), "sdsRemoveFreeSpace")
        assert trim.p99_ns is not None
        assert 2 * MS <= trim.p99_ns <= 2 * MS * 33 // 32

    def test_leave_the_window_with_its_seconds(self) -> None:
        window = LiveWindow(manifest(started_ns=STARTED_NS), window_s=3)
        for second in range(1, 10):
            counters = {
                TRIM: ProbeCounters(short_ns=second * MS),
                ITERATION_ID: ProbeCounters(hits=second * 10, short_calls=second * 10, short_ns=second * 100 * MS),
            }
            view = window.view(at(second * 1000), counters)
        trim = function(view, "sdsRemoveFreeSpace")
        assert (trim.total_ns, trim.window_total_ns) == (9 * MS, 3 * MS)
        assert view.loop is not None
        assert view.loop.busy_share == pytest.approx(0.1)
        assert view.loop.histogram[0] == (0, 30)


class TestUnderWay:
    def test_a_blocked_loop_says_where_it_is(self) -> None:
        window = LiveWindow(manifest())
        under_way = (
            Builder().span(CLIENTS, 103, None).span(ITERATION_ID, 100, None).span(CRON, 101, None)
            .span(FREE, 90, None, tid=77).events()
        )  # fmt: skip
        view = window.view(at(200), {}, under_way)
        (blocked,) = view.blocked
        assert (blocked.pid, blocked.duration_ns, blocked.calls) == (PID, 100 * MS, ("serverCron", "clientsCron"))
        assert view.loop is not None
        assert view.loop.busy_share == pytest.approx(100 / 200)

    def test_an_iteration_shorter_than_a_stall_is_not_blocked(self) -> None:
        window = LiveWindow(manifest())
        assert window.view(at(109), {}, Builder().span(ITERATION_ID, 100, None).events()).blocked == ()

    def test_unfinished_spans_count_nowhere_else(self) -> None:
        window = LiveWindow(manifest())
        window.add(Builder().span(CRON, 1, None).span(ITERATION_ID, 1, None).events())
        view = window.view(at(100), {})
        assert function(view, "serverCron").max_ns is None
        assert view.recent_stalls == ()


class TestCause:
    def test_outside_every_traced_call(self) -> None:
        window = LiveWindow(manifest())
        window.add(Builder().span(CRON, 101, 4).span(ITERATION_ID, 100, 50).events())
        (stall,) = window.view(at(1000), {}).recent_stalls
        assert (stall.cause, stall.path, stall.cause_self_ns) == ("", (), 46 * MS)

    def test_without_any_call_is_all_of_it(self) -> None:
        window = LiveWindow(manifest())
        window.add(Builder().span(ITERATION_ID, 100, 50).events())
        (stall,) = window.view(at(1000), {}).recent_stalls
        assert (stall.cause, stall.cause_calls, stall.cause_self_ns) == ("", 0, 50 * MS)

    def test_of_another_thread_or_iteration_does_not_count(self) -> None:
        builder = Builder().span(PURGE, 101, 48, tid=PID + 1).span(TRIM, 20, 60).span(CRON, 110, 30)
        window = LiveWindow(manifest())
        window.add(builder.span(ITERATION_ID, 100, 50).events())
        (stall,) = window.view(at(1000), {}).recent_stalls
        assert (stall.cause, stall.cause_calls) == ("serverCron", 1)

    def test_of_more_calls_than_are_kept_is_that_of_the_last_part(self) -> None:
        builder = Builder()
        for index in range(100):
            builder.span(TRIM if index < 60 else PURGE, 100 + index, 0.9)
        events = builder.span(CRON, 100, 100).events()
        calls = RecentCalls(kept=21)
        for part in np.array_split(events, 13):
            calls.add(part)
        cause = calls.cause(PID, at(99), at(200))
        assert (cause.probe, cause.calls, cause.path) == (PURGE, 20, (CRON, PURGE))
        assert cause.covered_ns == at(200) - at(179.9)
        assert cause.self_ns == round(20 * 0.9 * MS)

    @settings(max_examples=60)
    @given(
        shape=st.lists(st.integers(0, 2), min_size=0, max_size=40),
        spans=st.lists(st.tuples(st.sampled_from([CRON, TRIM, PURGE]), st.integers(0, 9)), min_size=1, max_size=40),
        parts=st.integers(1, 5),
    )
    def test_is_that_of_the_whole_analysis(
        self, shape: list[int], spans: list[tuple[int, int]], parts: int, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """A random call tree in one iteration: the same self times as pandas finds in the recording of it."""
        builder = Builder()
        clock = 10.0
        open_calls: list[tuple[int, float]] = []
        for (probe, pause), step in zip(spans, [*shape, *[1] * len(spans)], strict=False):
            clock += 1 + pause
            if step == 0 and open_calls:
                outer, start = open_calls.pop()
                builder.span(outer, start, clock - start)
            clock += 1
            open_calls.append((probe, clock))
        while open_calls:
            clock += 1
            outer, start = open_calls.pop()
            builder.span(outer, start, clock - start)
        builder.span(ITERATION_ID, 5, clock)
        path = builder.write(tmp_path_factory.mktemp("tree") / "tree.stall", clock + 100)
        tables = build_tables(read_recording(path))
        nested = nest(tables.calls, tables.iterations).calls
        own = nested.groupby("probe")["self_ns"].sum()
        window = LiveWindow(manifest())
        for part in np.array_split(builder.events(), parts):
            window.add(part)
        (stall,) = window.view(at(clock + 100), {}).recent_stalls
        outside = round(clock * MS) - int(nested.loc[nested["depth"] == 0, "duration_ns"].sum())
        if own.max() >= outside:
            assert stall.cause_self_ns == own.max()
            named = {probe.name: probe.id for probe in manifest().probes}
            assert own[named[stall.cause]] == own.max()
            assert stall.cause_calls == (nested["probe"] == named[stall.cause]).sum()
        else:
            assert (stall.cause, stall.cause_self_ns) == ("", outside)


class TestSurroundings:
    def test_a_listener_that_is_silent_was_closed(self) -> None:
        window = LiveWindow(manifest())
        window.add(Builder().queue(1000, 3, 0).events())
        assert len(window.view(at(2000), {}).listeners) == 1
        assert window.view(at(7000), {}).listeners == ()

    def test_other_rows_do_not_matter(self) -> None:
        window = LiveWindow(manifest())
        window.add(Builder().span(ACCEPT_ID, 5, 1, 3, 4).span(999, 6, 1).queue(7, 1, 0, listener=5).events())
        assert window.view(at(100), {}).listeners == ()

    def test_a_probe_that_came_later_is_known_from_then_on(self) -> None:
        window = LiveWindow(manifest())
        later = manifest(probes=(*manifest().probes, ProbeInfo(60, "call", "call", "uprobe")))
        window.know(later)
        window.add(Builder().span(60, 5, 1).events())
        assert function(window.view(at(100), {60: ProbeCounters(hits=1)}), "call").max_ns == MS

    def test_without_the_event_loop_nothing_is_said_of_it(self) -> None:
        window = LiveWindow(manifest(rungs={"event loop": "not measured"}))
        assert window.view(at(100), {}).loop is None

    def test_memory_does_not_grow(self) -> None:
        """A million calls and ten thousand stalls: what is kept is what one second needs."""
        window = LiveWindow(manifest(min_duration_ns=0))
        batch = Builder()
        for index in range(100):
            batch.span(TRIM, index, 0.5)
        rows = batch.span(ITERATION_ID, 0, 101).events()
        for second in range(1000):
            rows["start_ns"] += 1000 * MS
            window.add(rows)
            window.view(at(1000 * second + 1200), {})
        assert len(window._stalls) == 50
        assert len(window._snapshots) <= 13
        assert window._calls._count <= 2 * len(rows)


def test_the_histogram_begins_at_the_threshold_and_goes_on_in_steps() -> None:
    assert [edge // MS for edge in histogram_edges(10 * MS)] == [10, 20, 50, 100, 200, 500, 1000]
    assert [edge / MS for edge in histogram_edges(3 * MS)] == [3, 5, 10, 20, 50, 100, 200]
    assert histogram_edges(0)[:4] == (1, 2, 5, 10)
