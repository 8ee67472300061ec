from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import CLIENTS, CRON, ITERATION_ID, PURGE, RESIZE, TRIM, Builder, add_storm

from stallscope.tracer.analysis import containment
from stallscope.tracer.analysis.containment import self_times
from stallscope.tracer.analysis.nesting import find_parents, nest
from stallscope.tracer.analysis.tables import Tables, build_tables, span_order
from stallscope.tracer.recording import read_recording


def tables_of(builder: Builder, tmp_path: Path, end_ms: float = 10_000) -> Tables:
    return build_tables(read_recording(builder.write(tmp_path / "a.stall", end_ms)))


@dataclass
class Span:
    """A call and the calls inside it, as a program would make them."""

    start: int
    end: int
    parent: int
    depth: int
    thread: int


@st.composite
def call_trees(draw: st.DrawFn) -> list[Span]:
    """Return spans in the order of their starts, callers first; gaps and lengths may be 0."""
    spans: list[Span] = []

    def call(start: int, parent: int, depth: int, thread: int) -> int:
        index = len(spans)
        spans.append(Span(start, start, parent, depth, thread))
        now = start + draw(st.integers(0, 3))
        for _ in range(draw(st.integers(0, 3)) if depth < 5 and len(spans) < 60 else 0):
            now = call(now, index, depth + 1, thread) + draw(st.integers(0, 3))
        spans[index].end = now
        return now

    for thread in range(draw(st.integers(1, 3))):
        now = draw(st.integers(0, 5))
        for _ in range(draw(st.integers(0, 4))):
            now = call(now, -1, 0, 100 + thread) + draw(st.integers(0, 3))
    return spans


def columns(spans: list[Span]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tid = np.array([span.thread for span in spans], np.uint32)
    start = np.array([span.start for span in spans], np.int64)
    duration = np.array([span.end - span.start for span in spans], np.int64)
    return tid, start, duration


@settings(deadline=None)
@given(call_trees())
def test_self_times_sum_to_the_total_of_the_roots(spans: list[Span]) -> None:
    tid, start, duration = columns(spans)
    order = np.lexsort((-duration, start, tid))
    parent, depth, crossing = find_parents(tid[order], start[order], duration[order])
    own = self_times(parent, duration[order])
    assert not crossing
    assert (own >= 0).all()
    for thread in np.unique(tid):
        mine = tid[order] == thread
        assert own[mine].sum() == duration[order][mine & (depth == 0)].sum()


@settings(deadline=None)
@given(call_trees())
def test_every_call_lies_inside_its_parent_and_one_level_deeper(spans: list[Span]) -> None:
    tid, start, duration = columns(spans)
    order = np.lexsort((-duration, start, tid))
    tid, start, duration = tid[order], start[order], duration[order]
    parent, depth, _ = find_parents(tid, start, duration)
    for index, outer in enumerate(parent):
        if outer < 0:
            assert depth[index] == 0
            continue
        assert outer < index
        assert tid[outer] == tid[index]
        assert depth[index] == depth[outer] + 1
        assert start[outer] <= start[index]
        assert start[index] + duration[index] <= start[outer] + duration[outer]


@settings(deadline=None)
@given(call_trees())
def test_the_tree_is_the_one_the_program_made_where_time_tells_it(spans: list[Span]) -> None:
    """Where all starts and ends of a thread differ, nothing is ambiguous."""
    spread = [
        Span(1000 * span.start + index, 1000 * span.end + 999 - index, span.parent, span.depth, span.thread)
        for index, span in enumerate(spans)
    ]
    for index, span in enumerate(spread):
        if span.parent >= 0:
            outer = spread[span.parent]
            span.end = min(span.end, outer.end - 1)
        earlier = [other for other in spread[:index] if other.thread == span.thread and other.parent == span.parent]
        if any(other.end >= span.start for other in earlier):
            return
    tid, start, duration = columns(spread)
    parent, depth, crossing = find_parents(tid, start, duration)
    assert parent.tolist() == [span.parent for span in spread]
    assert depth.tolist() == [span.depth for span in spread]
    assert not crossing


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_spans_that_cross_end_in_a_tree_too(rows: list[tuple[int, int, int]]) -> None:
    frame = pd.DataFrame(rows, columns=["tid", "start", "duration"]).astype(np.int64)
    frame = frame.sort_values(["tid", "start", "duration"], ascending=[True, True, False], kind="stable")
    tid, start, duration = (frame[name].to_numpy() for name in ("tid", "start", "duration"))
    parent, depth, _ = find_parents(tid.astype(np.uint32), start, duration)
    inner = parent >= 0
    assert (parent < np.arange(len(parent))).all()
    assert (tid[parent[inner]] == tid[inner]).all()
    assert (depth[inner] == depth[parent[inner]] + 1).all()
    assert (self_times(parent, duration) >= 0).all()


@pytest.mark.parametrize("huge", [2**61, 2**62 - 1])
def test_times_that_span_all_64_bits_are_nested_all_the_same(huge: int) -> None:
    tid = np.array([1, 1, 2, 2], np.uint32)
    start = np.array([0, 5, 0, huge], np.int64)
    parent, depth, _ = find_parents(tid, start, np.array([10, 2, huge + 10, 3], np.int64))
    assert parent.tolist() == [-1, 0, -1, 2]
    assert depth.tolist() == [0, 1, 0, 1]


def test_a_recursion_ten_thousand_deep() -> None:
    count = 10_000
    start = np.arange(count, dtype=np.int64)
    parent, depth, crossing = find_parents(np.ones(count, np.uint32), start, 2 * count - 2 * start)
    assert parent.tolist() == list(range(-1, count - 1))
    assert depth.tolist() == list(range(count))
    assert not crossing


@settings(deadline=None)
@given(call_trees())
def test_searching_and_passing_over_the_levels_agree(spans: list[Span]) -> None:
    tid, start, duration = columns(spans)
    order = np.lexsort((-duration, start, tid))
    shallow, *_ = find_parents(tid[order], start[order], duration[order])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containment, "_SHALLOW", -1)
        deep, *_ = find_parents(tid[order], start[order], duration[order])
    assert shallow.tolist() == deep.tolist()


def test_of_equal_spans_the_one_recorded_later_is_the_caller() -> None:
    order = span_order(np.ones(3, np.uint32), np.array([5, 5, 5]), np.array([7, 7, 9]))
    assert order is not None
    assert order.tolist() == [2, 1, 0]


def test_the_storm_nests_as_it_was_made(tmp_path: Path) -> None:
    nested = nest(tables_of(add_storm(Builder(), 1000), tmp_path).calls)
    calls = nested.calls
    by_probe = calls.groupby("probe")
    assert by_probe["depth"].agg(["min", "max"]).to_numpy().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4]]
    own_ms = (by_probe["self_ns"].sum() / 1e6).to_dict()
    assert own_ms == {CRON: 2.0, CLIENTS: 16.0, RESIZE: 10.0, TRIM: 490.0, PURGE: 100.0}
    deepest = calls.loc[calls["probe"] == PURGE, "path"]
    assert deepest.nunique() == 1
    assert nested.path(int(deepest.iloc[0])) == (CRON, CLIENTS, RESIZE, TRIM, PURGE)
    assert nested.outermost().all()
    assert nested.abandoned.empty


def test_recursion_counts_once(tmp_path: Path) -> None:
    builder = Builder().span(CRON, 10, 100).span(TRIM, 11, 90).span(CRON, 12, 80).span(CRON, 13, 5).span(CRON, 200, 1)
    nested = nest(tables_of(builder, tmp_path).calls)
    assert nested.calls["probe"].tolist() == [CRON, TRIM, CRON, CRON, CRON]
    assert nested.outermost().tolist() == [True, True, False, False, True]
    assert (nested.calls["self_ns"] // 1_000_000).tolist() == [10, 10, 75, 5, 1]


def test_threads_do_not_nest_in_each_other(tmp_path: Path) -> None:
    builder = Builder().span(CRON, 10, 100).span(PURGE, 20, 5, tid=9).span(TRIM, 30, 5)
    calls = nest(tables_of(builder, tmp_path).calls).calls
    assert calls.loc[calls["probe"] == PURGE, "parent"].tolist() == [-1]
    assert calls.loc[calls["probe"] == TRIM, "depth"].tolist() == [1]


def test_an_unfinished_call_lasts_until_the_end_and_is_flagged(tmp_path: Path) -> None:
    builder = Builder().span(CRON, 1000, None).span(TRIM, 1100, None).span(PURGE, 1200, 50)
    nested = nest(tables_of(builder, tmp_path, end_ms=3000).calls)
    calls = nested.calls
    assert calls["probe"].tolist() == [CRON, TRIM, PURGE]
    assert (calls["duration_ns"] // 1_000_000).tolist() == [2000, 1900, 50]
    assert calls["unfinished"].tolist() == [True, True, False]
    assert (calls["self_ns"] // 1_000_000).tolist() == [100, 1850, 50]
    assert nested.abandoned.empty


def test_a_call_whose_caller_returned_without_it_was_abandoned(tmp_path: Path) -> None:
    builder = Builder().span(CRON, 1000, 100).span(TRIM, 1050, None).span(PURGE, 1060, 5).span(CRON, 2000, None)
    nested = nest(tables_of(builder, tmp_path).calls)
    assert nested.abandoned["probe"].tolist() == [TRIM]
    assert nested.calls["probe"].tolist() == [CRON, PURGE, CRON]
    assert nested.calls["parent"].tolist() == [-1, 0, -1]


def test_a_call_from_an_iteration_that_ended_was_abandoned(tmp_path: Path) -> None:
    builder = Builder().span(ITERATION_ID, 1000, 100).span(TRIM, 1050, None).span(PURGE, 1050, None, tid=9)
    tables = tables_of(builder, tmp_path)
    nested = nest(tables.calls, tables.iterations)
    assert nested.abandoned["probe"].tolist() == [TRIM]
    assert nested.calls["probe"].tolist() == [PURGE]
    assert nest(tables.calls).abandoned.empty


def test_no_calls_at_all(tmp_path: Path) -> None:
    nested = nest(tables_of(Builder(), tmp_path).calls)
    assert nested.calls.empty
    assert nested.paths == []
    assert nested.outermost().tolist() == []
