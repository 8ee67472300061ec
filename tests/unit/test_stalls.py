from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    CLIENTS,
    COUNTER_ID,
    CRON,
    ITERATION_ID,
    LIMIT,
    MS,
    PID,
    PURGE,
    QUEUE_ID,
    STARTED_NS,
    TRIM,
    Builder,
    known_call,
    manifest,
    two_stalls,
)

from stallscope.tracer.analysis.nesting import nest
from stallscope.tracer.analysis.overflows import attribute_overflows, increases
from stallscope.tracer.analysis.stalls import DRAIN, INSIDE, ITERATIONS, OUTSIDE, ROOT_CALLS, Stalls, find_stalls
from stallscope.tracer.analysis.tables import Tables, build_tables
from stallscope.tracer.manifest import ListenerInfo, NamespaceInfo, ProbeCounters
from stallscope.tracer.recording import read_recording

OTHER_PID = 4712
TWO_LISTENERS = (
    ListenerInfo(0, "127.0.0.1:6379", 6379, PID, 1001, 0, LIMIT),
    ListenerInfo(1, "127.0.0.1:6380", 6380, OTHER_PID, 1002, 0, LIMIT),
)


def tables_of(path: Path) -> Tables:
    return build_tables(read_recording(path))


def stalls_of(path: Path) -> Stalls:
    tables = tables_of(path)
    return find_stalls(tables, nest(tables.calls, tables.iterations))


def written(builder: Builder, tmp_path: Path, end_ms: float = 10_000) -> Path:
    return builder.write(tmp_path / "a.stall", end_ms)


def milliseconds(column: pd.Series[int]) -> list[float]:
    return (column / MS).tolist()


def test_the_known_call_and_what_it_did_to_the_queue(tmp_path: Path) -> None:
    stalls = stalls_of(known_call(tmp_path / "a.stall"))
    assert stalls.basis == ITERATIONS
    assert len(stalls.frame) == 1
    stall = stalls.frame.iloc[0]
    assert (stall["start_ns"] - STARTED_NS) / MS == 1000
    assert stall["duration_ns"] / MS == 620
    assert stall["explained_ns"] / MS == 618
    assert (stall["queue_start"], stall["queue_max"], stall["queue_end"], stall["queue_limit"]) == (3, 512, 512, 511)
    assert stall["drain_ns"] / MS == 30
    assert stall["drained"]
    assert (stall["accepted"], stall["accepted_drain"]) == (0, 512)
    assert (stall["overflows"], stall["overflows_drain"]) == (41, 2)


def test_the_time_of_each_function_inside(tmp_path: Path) -> None:
    functions = stalls_of(known_call(tmp_path / "a.stall")).functions
    assert functions["probe"].tolist()[:2] == [TRIM, PURGE]
    assert milliseconds(functions["self_ns"]) == [490, 100, 16, 10, 2]
    assert functions["calls"].tolist() == [5, 5, 1, 5, 1]
    assert milliseconds(functions["longest_ns"]) == [118, 20, 616, 120, 618]


def test_overflows_by_phase(tmp_path: Path) -> None:
    stalls = stalls_of(two_stalls(tmp_path / "a.stall"))
    by_phase = stalls.overflows.groupby("phase")["count"].sum().to_dict()
    assert by_phase == {INSIDE: 82, DRAIN: 4, OUTSIDE: 7}
    assert stalls.frame["overflows"].tolist() == [41, 41]
    assert stalls.frame["overflows_drain"].tolist() == [2, 2]
    assert milliseconds(stalls.frame["drain_ns"]) == [30, 30]
    assert stalls.frame["drained"].tolist() == [True, True]


def test_a_stall_that_begins_before_the_queue_has_drained_ends_the_drain(tmp_path: Path) -> None:
    builder = Builder().queue(0, 0, 0).span(ITERATION_ID, 1000, 500).queue(1400, 512, 0)
    builder.queue(1510, 400, 0).span(ITERATION_ID, 1520, 100).queue(1600, 450, 0).queue(1630, 30, 0)
    frame = stalls_of(written(builder, tmp_path)).frame
    assert milliseconds(frame["drain_ns"]) == [20, 10]
    assert frame["drained"].tolist() == [False, True]
    assert frame["queue_start"].tolist() == [0, 400]


def test_a_queue_as_long_as_it_was_before_is_normal_again(tmp_path: Path) -> None:
    builder = Builder().queue(990, 100, 0).span(ITERATION_ID, 1000, 50).queue(1040, 300, 0)
    builder.queue(1060, 150, 0).queue(1070, 100, 0).queue(1080, 0, 0)
    frame = stalls_of(written(builder, tmp_path)).frame
    assert milliseconds(frame["drain_ns"]) == [20]


def test_a_recording_that_ends_before_the_queue_has_drained(tmp_path: Path) -> None:
    builder = Builder().queue(990, 0, 0).span(ITERATION_ID, 1000, 50).queue(1040, 300, 0).queue(1060, 200, 0)
    frame = stalls_of(written(builder, tmp_path, end_ms=1200)).frame
    assert frame["drained"].tolist() == [False]
    assert milliseconds(frame["drain_ns"]) == [150]


def test_a_stall_in_progress_at_the_end_is_flagged(tmp_path: Path) -> None:
    builder = Builder().span(ITERATION_ID, 1000, None).span(CRON, 1010, None).span(PURGE, 1020, 30)
    stalls = stalls_of(written(builder, tmp_path, end_ms=1500))
    assert stalls.frame["unfinished"].tolist() == [True]
    assert milliseconds(stalls.frame["duration_ns"]) == [500]
    assert milliseconds(stalls.frame["explained_ns"]) == [490]
    assert milliseconds(stalls.functions["self_ns"]) == [460, 30]


def test_an_unfinished_iteration_below_the_threshold_is_no_stall(tmp_path: Path) -> None:
    builder = Builder().span(ITERATION_ID, 1000, None).span(CRON, 500, 5)
    assert stalls_of(written(builder, tmp_path, end_ms=1005)).frame.empty


def test_old_samples_say_nothing(tmp_path: Path) -> None:
    builder = Builder().queue(0, 5, 0).span(ITERATION_ID, 9000, 50)
    frame = stalls_of(written(builder, tmp_path)).frame
    assert frame["queue_start"].tolist() == [-1]
    assert frame["queue_max"].tolist() == [-1]
    assert frame["queue_end"].tolist() == [-1]
    assert frame["listener"].tolist() == [-1]
    assert frame["drained"].tolist() == [True]


def test_without_the_event_loop_calls_of_the_main_thread_stand_for_stalls(tmp_path: Path) -> None:
    probes = tuple(probe for probe in manifest().probes if probe.id not in (0, 1))
    builder = Builder(manifest(probes=probes)).queue(900, 1, 0)
    builder.span(CRON, 1000, 200).span(TRIM, 1050, 100).span(CRON, 2000, 5).span(PURGE, 3000, 500, tid=4999)
    stalls = stalls_of(written(builder, tmp_path))
    assert stalls.basis == ROOT_CALLS
    assert milliseconds(stalls.frame["duration_ns"]) == [200]
    assert milliseconds(stalls.frame["explained_ns"]) == [200]
    assert stalls.functions["probe"].tolist() == [CRON, TRIM]
    assert stalls.frame["accepted"].tolist() == [-1]


def test_an_event_loop_that_was_never_seen_does_not_count_as_observed(tmp_path: Path) -> None:
    builder = Builder().span(CRON, 1000, 200)
    assert stalls_of(written(builder, tmp_path)).basis == ROOT_CALLS
    counters = {ITERATION_ID: ProbeCounters(hits=9, short_calls=9, short_ns=9)}
    assert stalls_of(builder.write(tmp_path / "b.stall", 5000, counters)).basis == ITERATIONS


def test_a_call_that_began_before_the_iteration_is_not_inside_it(tmp_path: Path) -> None:
    """aeMain runs as long as the server does; a script may run a nested event loop."""
    builder = Builder().span(CLIENTS, 500, 5000).span(ITERATION_ID, 1000, 100).span(CRON, 1010, 60)
    stalls = stalls_of(written(builder, tmp_path))
    assert stalls.functions["probe"].tolist() == [CRON]
    assert milliseconds(stalls.frame["explained_ns"]) == [60]


def test_a_call_that_outlasts_the_iteration_counts_up_to_its_end(tmp_path: Path) -> None:
    builder = Builder().span(ITERATION_ID, 1000, 100).span(CRON, 1010, 500)
    stalls = stalls_of(written(builder, tmp_path))
    assert milliseconds(stalls.functions["self_ns"]) == [90]
    assert milliseconds(stalls.frame["explained_ns"]) == [90]


def test_an_increase_happened_after_the_sampling_before(tmp_path: Path) -> None:
    builder = Builder().counter(1000, 900).queue(1500, 7, 0).queue(1510, 8, 0).counter(1520, 905)
    grown = increases(tables_of(written(builder, tmp_path)))
    assert milliseconds(grown["after_ns"] - STARTED_NS) == [1510]
    assert milliseconds(grown["seen_ns"] - STARTED_NS) == [1520]
    assert grown["count"].tolist() == [5]


def test_what_was_counted_before_the_first_sample_is_seen_too(tmp_path: Path) -> None:
    grown = increases(tables_of(written(Builder().counter(5, 903).counter(1005, 903), tmp_path)))
    assert grown["count"].tolist() == [3]
    assert milliseconds(grown["after_ns"] - STARTED_NS) == [0]


def test_a_counter_that_goes_back_counts_nothing(tmp_path: Path) -> None:
    grown = increases(tables_of(written(Builder().counter(5, 900).counter(10, 3).counter(20, 4), tmp_path)))
    assert grown["count"].tolist() == [1]


def attributed(builder: Builder, tmp_path: Path) -> dict[int, int]:
    overflows = attribute_overflows(tables_of(written(builder, tmp_path)))
    totals: dict[int, int] = overflows.groupby("listener")["count"].sum().to_dict()
    return totals


def test_overflows_belong_to_the_listener_whose_drops_grew(tmp_path: Path) -> None:
    builder = Builder(manifest(listeners=TWO_LISTENERS))
    builder.queue(0, 0, 50).queue(0, 0, 70, listener=1).counter(0, 900)
    builder.queue(10, 512, 50, listener=1).queue(10, 512, 50)
    builder.queue(20, 512, 58).counter(20, 908)
    assert attributed(builder, tmp_path) == {0: 8}


def test_overflows_are_shared_by_the_growth_of_drops(tmp_path: Path) -> None:
    builder = Builder(manifest(listeners=TWO_LISTENERS))
    builder.queue(0, 0, 0).queue(0, 0, 0, listener=1).counter(0, 900)
    builder.queue(10, 512, 6).queue(10, 512, 3, listener=1).counter(10, 909)
    assert attributed(builder, tmp_path) == {0: 6, 1: 3}


def test_of_drops_for_other_reasons_none_is_made_an_overflow(tmp_path: Path) -> None:
    builder = Builder(manifest(listeners=TWO_LISTENERS))
    builder.queue(0, 0, 0).queue(0, 0, 0, listener=1).counter(0, 900)
    builder.queue(10, 512, 60).queue(10, 9, 30, listener=1).counter(10, 910)
    totals = attributed(builder, tmp_path)
    assert sum(totals.values()) == 10
    assert totals[0] >= 6


def test_what_fits_no_listener_is_not_attributable(tmp_path: Path) -> None:
    builder = Builder().queue(0, 3, 5).counter(0, 900).queue(10, 4, 5).counter(10, 907).queue(1000, 3, 5)
    assert attributed(builder, tmp_path) == {-1: 7}


def test_more_overflows_than_the_listener_dropped_are_somebody_elses(tmp_path: Path) -> None:
    builder = Builder().queue(0, 512, 5).counter(0, 900).queue(10, 512, 8).counter(10, 907).queue(20, 512, 8)
    assert attributed(builder, tmp_path) == {0: 3, -1: 4}


def test_a_drop_that_shows_at_the_listener_one_sampling_later_is_still_its_own(tmp_path: Path) -> None:
    builder = Builder().queue(0, 512, 0).counter(0, 900)
    builder.queue(10, 512, 4).counter(10, 905).queue(20, 512, 10).counter(20, 910)
    assert attributed(builder, tmp_path) == {0: 10}


@pytest.mark.parametrize(("length", "expected"), [(512, {0: 7}), (511, {-1: 7})])
def test_without_drops_a_queue_strictly_above_its_limit_decides(
    tmp_path: Path, length: int, expected: dict[int, int]
) -> None:
    builder = Builder().queue(0, length, 0).counter(0, 900).counter(10, 907)
    assert attributed(builder, tmp_path) == expected


def test_namespaces_are_kept_apart(tmp_path: Path) -> None:
    spaces = (*manifest().namespaces, NamespaceInfo(1, 4026539999, {"ListenOverflows": 10}))
    listeners = (TWO_LISTENERS[0], replace(TWO_LISTENERS[1], namespace=1))
    builder = Builder(manifest(namespaces=spaces, listeners=listeners))
    builder.queue(0, 512, 0).queue(0, 512, 0, listener=1).counter(0, 900).counter(0, 10, namespace=1)
    builder.queue(10, 512, 4).queue(10, 512, 4, listener=1).counter(10, 904).counter(20, 14, namespace=1)
    overflows = attribute_overflows(tables_of(written(builder, tmp_path)))
    assert overflows[["namespace", "listener", "count"]].to_numpy().tolist() == [[0, 0, 4], [1, 1, 4]]


def test_not_attributable_overflows_count_for_no_stall(tmp_path: Path) -> None:
    builder = Builder().queue(0, 0, 0).counter(0, 900).span(ITERATION_ID, 1000, 100)
    builder.queue(1010, 5, 0).counter(1020, 903).queue(1030, 6, 0)
    stalls = stalls_of(written(builder, tmp_path))
    assert stalls.frame["overflows"].tolist() == [0]
    assert stalls.overflows[["listener", "phase", "count"]].to_numpy().tolist() == [[-1, INSIDE, 3]]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(0, 600), st.integers(0, 9), st.integers(0, 9)), max_size=30),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), max_size=6),
)
def test_every_overflow_is_counted_exactly_once(
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[tuple[int, int, int, int]],
    iterations: list[tuple[int, int]],
) -> None:
    builder = Builder(manifest(listeners=TWO_LISTENERS, stall_ns=1)).counter(0, 900)
    time_ms, drops, count = 0, 0, 900
    for step, length, more_drops, more_overflows in samples:
        time_ms, drops, count = time_ms + step, drops + more_drops, count + more_overflows
        builder.queue(time_ms, length, drops, listener=step % 2).counter(time_ms, count)
    time_ms = 0
    for gap, length in iterations:
        builder.span(ITERATION_ID, time_ms + gap, length)
        time_ms += gap + length
    stalls = stalls_of(builder.write(tmp_path_factory.mktemp("f") / "a.stall", 10_000))
    assert stalls.overflows["count"].sum() == count - 900
    assert (stalls.overflows["count"] > 0).all()
    placed = stalls.overflows["stall"] >= 0
    assert (placed == (stalls.overflows["phase"] != OUTSIDE)).all()
    own = stalls.overflows["pid"] > 0
    in_frame = stalls.frame["overflows"].sum() + stalls.frame["overflows_drain"].sum()
    assert in_frame == stalls.overflows.loc[own & placed, "count"].sum()
    begins, ends = (
        stalls.frame["start_ns"].to_numpy(),
        (stalls.frame["start_ns"] + stalls.frame["duration_ns"]).to_numpy(),
    )
    for row in stalls.overflows.itertuples():
        if row.phase == INSIDE:
            assert begins[row.stall] < row.seen_ns
            assert ends[row.stall] > row.after_ns


def test_many_stalls_are_found_at_once(tmp_path: Path) -> None:
    builder = Builder()
    for index in range(300):
        builder.span(ITERATION_ID, index * 100, 50).span(CRON, index * 100 + 1, 40)
        builder.queue(index * 100 + 20, index, 0).queue(index * 100 + 60, 0, 0)
    stalls = stalls_of(written(builder, tmp_path, end_ms=40_000))
    assert len(stalls.frame) == 300
    assert stalls.frame["queue_max"].tolist() == list(range(300))
    assert (stalls.frame["explained_ns"] == 40 * MS).all()
    assert (stalls.functions["self_ns"] == 40 * MS).all()
    expected = np.where(np.arange(300) > LIMIT // 10, 10 * MS, 0)
    assert stalls.frame["drain_ns"].tolist() == expected.tolist()


def test_samples_have_their_own_probes() -> None:
    assert {QUEUE_ID, COUNTER_ID} == {2, 3}
