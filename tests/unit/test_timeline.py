"""What the page's lanes show, against recordings whose truth is known; and that thinning drops nothing."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from recordings import (
    CRON,
    DATA,
    ITERATION_ID,
    MS,
    PURGE,
    STARTED_NS,
    TRIM,
    Builder,
    ProbeCounters,
    add_storm,
    at,
    hooked_manifest,
    manifest,
)

from stallscope.probes.catalogue import default_functions
from stallscope.reports.timeline import listeners as lanes
from stallscope.reports.timeline.bands import CUT_SHORT, GONE, LOST, NOT_ATTACHED, THINNED, bands
from stallscope.reports.timeline.calls import (
    HEAT_ROWS,
    MIN_SLOW_NS,
    choose_calls,
    density,
    heat,
    latency_row,
    slow_from_ns,
)
from stallscope.reports.timeline.compute import Timeline, build_timeline
from stallscope.reports.timeline.document import describe
from stallscope.reports.timeline.listeners import OTHER_DROPS, SAMPLED_PATH, peaks
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.blame import CAUSES, STALL
from stallscope.tracer.analysis.tables import build_tables
from stallscope.tracer.analysis.window import cut
from stallscope.tracer.manifest import Counters, TargetInfo
from stallscope.tracer.recording import Recording, read_recording


def timeline_of(path: Path, budget: int = 10_000) -> Timeline:
    return build_timeline(analyse(read_recording(path)), budget=budget)


@pytest.fixture(scope="module")
def storm() -> Timeline:
    return timeline_of(DATA / "known-call.stall")


@pytest.fixture(scope="module")
def hooked() -> Timeline:
    return timeline_of(DATA / "refused.stall")


class TestThinning:
    @settings(deadline=None, max_examples=200)
    @given(st.data())
    def test_keeps_every_slow_call_and_counts_all_others(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, 120))
        duration = data.draw(arrays(np.int64, count, elements=st.integers(0, 5 * 10**7)))
        in_stall = data.draw(arrays(np.bool_, count))
        thread, depth, function = (
            data.draw(arrays(np.int64, count, elements=st.integers(0, most))) for most in (2, 5, 4)
        )
        start = data.draw(arrays(np.int64, count, elements=st.integers(0, 10**9)))
        slow_ns = data.draw(st.integers(1, 4 * 10**7))
        budget = data.draw(st.integers(0, 130))
        kept = choose_calls(duration, in_stall, slow_ns, budget)
        slow = duration >= slow_ns
        assert kept[slow].all()
        assert np.count_nonzero(kept) == min(max(budget, np.count_nonzero(slow)), count)
        for group in (in_stall & ~slow, ~in_stall & ~slow):
            if (group & kept).any() and (group & ~kept).any():
                assert duration[group & kept].min() >= duration[group & ~kept].max()
        if (~in_stall & kept & ~slow).any():
            assert kept[in_stall].all()
        rest = ~kept
        cells = density(thread[rest], depth[rest], function[rest], start[rest], duration[rest], 10**9)
        assert cells.calls.sum() == np.count_nonzero(rest)
        assert cells.busy_ns.sum() == duration[rest].sum()
        counted: Counter[tuple[int, ...]] = Counter()
        for group_index, number in zip(cells.group.tolist(), cells.calls.tolist(), strict=True):
            counted[tuple(cells.groups[group_index].tolist())] += number
        assert counted == Counter(zip(*(item[rest].tolist() for item in (thread, depth, function)), strict=True))
        warm = heat(function, start, duration, 10**9)
        assert warm.calls.sum() == count
        assert Counter((warm.cell // HEAT_ROWS // warm.columns).repeat(warm.calls).tolist()) == Counter(
            function.tolist()
        )

    def test_keeps_what_encloses_a_kept_call(self) -> None:
        timeline = timeline_of(DATA / "two-stalls.stall", budget=0)
        calls = timeline.calls
        assert (len(calls.start_ns), calls.slow) == (34, 34), "every call of a storm is slow"
        builder = Builder()
        builder.span(ITERATION_ID, 0, 60).span(CRON, 1, 9).span(TRIM, 1, 9).span(PURGE, 1, 9).span(CRON, 20, 5)
        frame = analyse(_recording(builder, 100)).nested.calls
        kept = choose_calls(frame["duration_ns"].to_numpy(), np.ones(4, np.bool_), 10 * MS, 2)
        assert kept.tolist() == [True, True, False, False], "of equally long calls the outer ones stay"

    def test_counts_in_the_cell_of_the_start(self) -> None:
        none = np.zeros(3, np.int64)
        start, length = np.array([0, 5, 999]) * MS, np.array([1, 2, 3]) * MS
        cells = density(none, none, none, start, length, 1000 * MS)
        assert (cells.bin * cells.bin_ns <= start).all()
        assert (start < (cells.bin + 1) * cells.bin_ns).all()
        assert cells.longest_ns.tolist() == length.tolist()

    def test_slow_is_a_stall_of_its_own(self) -> None:
        none = np.zeros(0, np.int64)
        assert slow_from_ns(10 * MS, none) == 10 * MS
        assert slow_from_ns(0, none) == MIN_SLOW_NS

    @given(arrays(np.int64, st.integers(0, 60), elements=st.integers(0, 2 * 10**7)), st.integers(0, 20))
    def test_more_slow_calls_than_a_page_holds(self, duration: npt.NDArray[np.int64], most: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("stallscope.reports.timeline.calls.MOST_SLOW", most)
            limit = slow_from_ns(10 * MS, duration)
        slow = duration >= limit
        assert np.count_nonzero(slow) <= most
        assert limit == 10 * MS or np.count_nonzero(duration >= limit - 1) > most

    @pytest.mark.parametrize(("duration_ns", "row"), [(0, 0), (100, 0), (1_000, 8), (10**9, 56), (10**15, 71)])
    def test_rows_of_latency(self, duration_ns: int, row: int) -> None:
        assert latency_row(np.array([duration_ns]))[0] == row

    def test_many_groups_fit_the_grid(self) -> None:
        depth = np.arange(5_000)
        none = np.zeros(5_000, np.int64)
        cells = density(none, depth, none, depth * MS, none + 5, 5_000 * MS)
        assert (cells.calls.sum(), len(cells.groups)) == (5_000, 5_000)


def _recording(builder: Builder, end_ms: float) -> Recording:
    with TemporaryDirectory() as name:
        return read_recording(builder.write(Path(name) / "built.stall", end_ms))


class TestCalls:
    def test_all_of_the_storm(self, storm: Timeline) -> None:
        calls = storm.calls
        assert (calls.total, calls.slow, calls.thinned, storm.short_calls) == (20, 17, 0, 12)
        names = [storm.functions[index].name for index in calls.function]
        assert Counter(names) == {
            "serverCron": 4,
            "clientsCron": 1,
            "clientsCronResizeQueryBuffer": 5,
            "sdsRemoveFreeSpace": 5,
            "je_pages_purge": 5,
        }
        trims = calls.function == [item.name for item in storm.functions].index("sdsRemoveFreeSpace")
        assert calls.self_ns[trims].tolist() == [98 * MS] * 5
        assert calls.start_ns[trims][0] == 1004 * MS
        assert set(calls.depth[trims]) == {3}
        callers = calls.parent[trims]
        assert {names[index] for index in callers.tolist()} == {"clientsCronResizeQueryBuffer"}
        assert calls.start_ns[callers].tolist() == (calls.start_ns[trims] - 1 * MS).tolist()

    def test_arguments_are_named_with_units(self, storm: Timeline) -> None:
        index = [item.name for item in storm.functions].index("clientsCronResizeQueryBuffer")
        fields = {field.name: field.unit for field in storm.functions[index].fields}
        assert fields == {"fd": "file descriptor", "allocated_bytes": "bytes", "free_bytes": "bytes", "idle_s": "s"}
        assert storm.calls.arguments[index, "idle_s"].tolist() == [3, 4, 5, 6, 7]
        assert set(storm.calls.arguments[index, "free_bytes"]) == {28_000_000}

    def test_slowest_first(self, storm: Timeline) -> None:
        length = storm.calls.duration_ns[storm.slowest]
        assert (np.diff(length) <= 0).all()
        assert len(storm.slowest) == 20

    def test_threads_are_told_apart(self) -> None:
        builder = Builder().span(CRON, 10, 5).span(PURGE, 12, 20, 1, tid=4713).span(PURGE, 13, 1, 1)
        timeline = build_timeline(analyse(_recording(builder, 100)))
        assert [(item.tid, item.name, item.depth) for item in timeline.threads] == [
            (4711, "127.0.0.1:6379, main thread", 1),
            (4713, "127.0.0.1:6379, thread 4713", 0),
        ]
        assert timeline.calls.thread.tolist() == [0, 0, 1]


class TestRefusals:
    def test_sampled_by_interval(self, storm: Timeline) -> None:
        refusals = storm.refusals
        assert [path.name for path in refusals.paths] == [SAMPLED_PATH]
        assert (refusals.one_by_one, refusals.count.tolist()) == (False, [11, 20, 10, 2])
        assert refusals.seen_ns.tolist() == [1505 * MS, 1515 * MS, 1525 * MS, 1630 * MS]
        assert {CAUSES[cause] for cause in refusals.cause} == {STALL}

    def test_one_by_one_with_path_and_client(self, hooked: Timeline) -> None:
        refusals = hooked.refusals
        assert refusals.one_by_one
        assert [(path.name, path.rst, path.overflow) for path in refusals.paths] == [
            ("SYN refused: accept queue full", False, True),
            ("third ACK refused silently: accept queue full", False, True),
        ]
        assert np.bincount(refusals.path).tolist() == [41, 2]
        assert refusals.count.sum() == 43
        silent = refusals.path == 1
        assert set(refusals.port[silent]) == {40020}
        assert {refusals.addresses[index] for index in refusals.address} == {"127.0.0.1"}
        assert refusals.seen_ns[silent].tolist() == [1518 * MS, 1626 * MS]

    def test_rst_and_other_reasons(self) -> None:
        builder = add_storm(Builder(hooked_manifest()), 1000)
        builder.request(1500, "third ACK refused with RST: accept queue full", 1)
        builder.request(1501, "SYN refused: SYN queue full", 2)
        refusals = build_timeline(analyse(_recording(builder, 2000))).refusals
        assert [(path.name, path.rst, path.overflow) for path in refusals.paths] == [
            ("third ACK refused with RST: accept queue full", True, True),
            ("SYN refused: SYN queue full", False, False),
        ]
        assert refusals.cause.tolist() == [CAUSES.index(STALL), -1]

    @pytest.mark.parametrize("name", ["known-call", "two-stalls", "refused", "slow-drain"])
    def test_none_is_dropped_when_they_are_merged(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        analysis = analyse(read_recording(DATA / f"{name}.stall"))
        all_of_them = build_timeline(analysis).refusals
        monkeypatch.setattr(lanes, "MAX_REFUSALS", 1)
        monkeypatch.setattr(lanes, "_MERGED_PARTS", 5)
        merged = build_timeline(analysis).refusals
        assert len(merged.count) < len(all_of_them.count)
        assert merged.count.sum() == all_of_them.count.sum() == analysis.stalls.overflows["count"].sum()
        assert (merged.after_ns <= merged.seen_ns).all()
        for column in ("path", "cause", "listener"):
            before, after = (
                np.bincount(getattr(item, column) + 1, weights=item.count) for item in (all_of_them, merged)
            )
            assert before.tolist() == after.tolist()

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(1, 1000)), min_size=1, max_size=60), st.integers(1, 9))
    def test_counts_sum_up_however_many_there_are(self, seen: list[tuple[int, int]], most: int) -> None:
        times, counts = zip(*seen, strict=True)
        frame = pd.DataFrame({"seen_ns": np.array(times) + STARTED_NS, "count": counts})
        frame = frame.assign(after_ns=frame["seen_ns"] - 5, path=SAMPLED_PATH, listener=0, cause=STALL)
        frame = frame.reindex(columns=lanes._COLUMNS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lanes, "MAX_REFUSALS", most)
            merged = lanes._packed(frame, STARTED_NS, 10**9, False)
        assert merged.count.sum() == frame["count"].sum()

    def test_other_drops_are_what_never_is_an_overflow(self) -> None:
        builder = Builder()
        for time_ms, overflows, drops in ((0, 900, 950), (100, 900, 955), (110, 905, 955), (200, 905, 958)):
            builder.counter(time_ms, overflows).counter(time_ms, drops, counter=1)
        refusals = build_timeline(analyse(_recording(builder, 300))).refusals
        other = [path.name for path in refusals.paths].index(OTHER_DROPS)
        assert refusals.count[refusals.path == other].tolist() == [3]
        assert refusals.cause[refusals.path == other].tolist() == [-1]


class TestQueuesAndRates:
    def test_queue_with_its_limit(self, storm: Timeline) -> None:
        (lane,) = storm.queues
        assert (lane.length.max(), set(lane.limit)) == (512, {511})
        assert (np.diff(lane.time_ns) >= 0).all()

    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 2**32 - 1))
    def test_thinned_queue_keeps_every_peak(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        value = random.integers(0, 500, 20_000)
        time = np.sort(random.integers(0, 10**9, 20_000))
        kept = peaks(time, value, 10**6)
        assert len(kept) < len(time)
        part = time // 10**6
        wanted = pd.Series(value).groupby(part).agg(["min", "max", "first", "last"])
        found = pd.Series(value[kept]).groupby(part[kept]).agg(["min", "max", "first", "last"])
        pd.testing.assert_frame_equal(wanted, found)

    def test_what_came_is_reckoned_from_the_queue(self, storm: Timeline) -> None:
        lanes_by_name = {lane.name: lane for lane in storm.rates}
        assert lanes_by_name["accepted"].count.sum() == 512
        # 512 accepted, 43 refused, and the queue is 1 shorter at the end than at the start
        came = lanes_by_name["connections that came (reckoned)"]
        inside = (came.bin * came.bin_ns >= 990 * MS) & (came.bin * came.bin_ns < 1530 * MS)
        assert came.count[inside].sum() == 509 + 41

    def test_syns_are_counted_where_they_are_seen(self, hooked: Timeline) -> None:
        lanes_by_name = {lane.name: int(lane.count.sum()) for lane in hooked.rates}
        # 5 at once, 2 late and 40020's were taken; 41 were refused
        assert lanes_by_name == {"SYNs": 8 + 41, "accepted": 512}


class TestStalls:
    def test_tree_of_the_storm(self, storm: Timeline) -> None:
        lane = storm.stalls
        assert (lane.total, lane.total_ns, lane.frame["start_ns"].tolist()) == (1, 620 * MS, [1000 * MS])
        names = [storm.functions[storm.paths[path][1]].name for path in lane.trees["path"]]
        totals = dict(zip(names, lane.trees["total_ns"], strict=True))
        assert totals == {
            "serverCron": 618 * MS,
            "clientsCron": 616 * MS,
            "clientsCronResizeQueryBuffer": 600 * MS,
            "sdsRemoveFreeSpace": 590 * MS,
            "je_pages_purge": 100 * MS,
        }
        assert lane.trees["self_ns"].sum() == 618 * MS, "with what is unexplained it adds up to the stall"

    def test_none_with_a_refused_connection_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        builder = add_storm(Builder(), 1000)
        for index in range(40):
            builder.span(ITERATION_ID, 3000 + 50 * index, 20 + index / 10, 0, 0)
        monkeypatch.setattr("stallscope.reports.timeline.stalls.MAX_STALLS", 5)
        lane = build_timeline(analyse(_recording(builder, 6000))).stalls
        assert (lane.total, len(lane.frame)) == (41, 5)
        assert lane.frame["overflows"].sum() == 41
        assert lane.frame["duration_ns"].min() == round(23.6 * MS)


class TestBands:
    def test_losses_are_placed_between_snapshots(self) -> None:
        recording = read_recording(DATA / "with-losses.stall")
        snapshots = tuple(
            Counters(at(time_ms), {PURGE: ProbeCounters(lost=lost), TRIM: ProbeCounters(lost_starts=starts)})
            for time_ms, lost, starts in ((500, 0, 0), (1000, 2, 0), (1500, 2, 1), (2000, 2, 1), (2500, 3, 1))
        )
        found = bands(build_tables(replace(recording, snapshots=snapshots)), STARTED_NS)
        assert [(band.kind, band.start_ns, band.end_ns, band.text) for band in found] == [
            (LOST, 500 * MS, 1500 * MS, "events lost: 2 of je_pages_purge, 1 of sdsRemoveFreeSpace"),
            (LOST, 2000 * MS, 2500 * MS, "events lost: 1 of je_pages_purge"),
        ]

    def test_what_was_only_counted(self) -> None:
        recording = read_recording(DATA / "refused.stall")
        probe = next(item for item in recording.manifest.probes if item.name == "SYN taken")
        snapshots = tuple(
            Counters(at(time_ms), {probe.id: ProbeCounters(thinned=number)})
            for time_ms, number in ((1000, 0), (1500, 9))
        )
        (band,) = bands(build_tables(replace(recording, snapshots=snapshots)), STARTED_NS)
        assert (band.kind, band.start_ns, band.text) == (
            THINNED, 1000 * MS, "beyond the rate limit, only counted: 9 of SYN taken",
        )  # fmt: skip

    def test_servers_that_were_not_there_all_the_time(self) -> None:
        targets = (
            TargetInfo(4711, STARTED_NS, "/redis", version="2.8.17", end_ns=at(600)),
            TargetInfo(4811, at(700), "/redis", version="3.0.5"),
        )
        found = bands(build_tables(_recording(Builder(manifest(targets=targets)).queue(999, 1, 0), 1000)), STARTED_NS)
        assert [(band.kind, band.start_ns, band.end_ns, band.pid) for band in found] == [
            (NOT_ATTACHED, 0, 700 * MS, 4811),
            (GONE, 600 * MS, 1000 * MS, 4711),
        ]

    def test_cut_short_at_the_end(self) -> None:
        (band,) = timeline_of(DATA / "cut-short.stall").bands
        assert (band.kind, band.start_ns) == (CUT_SHORT, 1505 * MS)

    def test_none_where_all_was_seen(self, storm: Timeline) -> None:
        assert storm.bands == ()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_rows_make_a_page(data: st.DataObject) -> None:
    builder = Builder(hooked_manifest())
    known = [probe.id for probe in builder.manifest.probes]
    for _ in range(data.draw(st.integers(0, 25))):
        builder.span(
            data.draw(st.sampled_from([*known, 999])),
            data.draw(st.floats(-5, 2000)),
            data.draw(st.one_of(st.none(), st.floats(0, 3000))),
            *(data.draw(st.integers(0, 2**64 - 1)) for _ in range(3)),
            tid=data.draw(st.sampled_from([4711, 4713, 0, 1])),
        )
    recording = _recording(builder, 1500)
    first, last = sorted(data.draw(st.integers(1, 1499)) for _ in range(2))
    for part, offset_ns in ((recording, 0), (cut(recording, at(first), at(last + 1)), first * MS)):
        timeline = build_timeline(analyse(part), offset_ns=offset_ns, budget=data.draw(st.integers(0, 20)))
        document, _ = describe(timeline)
        json.dumps(document, allow_nan=False)
        assert timeline.calls.thinned == timeline.density.calls.sum()
        assert timeline.heat.calls.sum() == timeline.calls.total


def test_an_empty_recording_has_empty_lanes() -> None:
    timeline = timeline_of(DATA / "empty.stall")
    assert (timeline.calls.total, len(timeline.stalls.frame), len(timeline.refusals.count)) == (0, 0, 0)
    assert (timeline.queues, timeline.rates, timeline.threads, len(timeline.heat.cell)) == ((), (), (), 0)


def test_a_function_has_the_same_colour_on_every_page() -> None:
    seen: dict[str, set[int]] = {}
    for name in ("known-call", "two-stalls", "with-losses"):
        document, _ = describe(timeline_of(DATA / f"{name}.stall"))
        colours = {function["name"]: function["colour"] for function in document["functions"]}
        assert len(set(colours.values())) == len(colours), "no two of one page are alike"
        for function, colour in colours.items():
            seen.setdefault(function, set()).add(colour)
    assert seen["sdsRemoveFreeSpace"]
    usual = {function: colours for function, colours in seen.items() if function in default_functions()}
    assert all(len(colours) == 1 for colours in usual.values()), usual
