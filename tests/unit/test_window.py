"""A window of a recording: whole stalls, the right counters, and the words for times."""

from __future__ import annotations

from pathlib import Path

import pytest
from recordings import (
    CRON,
    DATA,
    MS,
    PURGE,
    STARTED_NS,
    WALL_OFFSET_NS,
    Builder,
    add_storm,
    at,
    hooked_manifest,
    manifest,
    quiet,
)

from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.analysis.summary import summarise
from stallscope.tracer.analysis.window import cut, parse_moment
from stallscope.tracer.errors import UsageError
from stallscope.tracer.recording import Recording, read_recording


def golden(name: str) -> Recording:
    return read_recording(DATA / f"{name}.stall")


def window(recording: Recording, first_ms: float | None, last_ms: float | None) -> Analysis:
    ends = [None if time_ms is None else at(time_ms) for time_ms in (first_ms, last_ms)]
    return analyse(cut(recording, *ends))


class TestCut:
    def test_all_of_it_says_the_same(self) -> None:
        for name in ("known-call", "two-stalls", "refused", "slow-drain", "empty"):
            whole, same = summarise(analyse(golden(name))), summarise(window(golden(name), None, None))
            assert same.verdict == whole.verdict
            assert same.overflows == whole.overflows
            assert same.findings == whole.findings
            assert [item.counted for item in same.reconciliation] == [item.counted for item in whole.reconciliation]
            assert same.functions == whole.functions

    def test_one_of_two_stalls(self) -> None:
        analysis = window(golden("two-stalls"), 1680, 2400)
        summary = summarise(analysis)
        assert summary.stall_count == 1
        assert summary.stalls[0].start_ns == 10 * MS
        assert (summary.stalls[0].overflows, summary.stalls[0].overflows_drain) == (41, 2)
        assert [(item.observed, item.counted) for item in summary.reconciliation] == [(43, 43)]
        assert summary.elapsed_ns == 720 * MS
        assert not summary.warnings[1:], "only that freeClient never fired"

    def test_a_stall_at_an_edge_is_whole(self) -> None:
        for first, last in ((1500, 1600), (1500, None), (None, 1100)):
            analysis = window(golden("known-call"), first, last)
            (stall,) = summarise(analysis).stalls
            assert (stall.duration_ns, stall.unexplained_ns, stall.unfinished) == (620 * MS, 2 * MS, False)
            assert len(analysis.nested.calls.loc[analysis.nested.calls["probe"] == PURGE]) == 5

    def test_without_iterations_calls_of_the_main_thread_are_whole(self, tmp_path: Path) -> None:
        builder = Builder().span(CRON, 100, 50).span(PURGE, 110, 30, 1).span(CRON, 300, 50)
        path = builder.write(tmp_path / "x.stall", 500)
        calls = window(read_recording(path), 120, 200).tables.calls
        assert calls["duration_ns"].tolist() == [50 * MS, 30 * MS]
        assert not calls["unfinished"].any()

    def test_a_span_of_another_thread_that_goes_on_is_unfinished(self, tmp_path: Path) -> None:
        builder = add_storm(Builder(), 100).span(PURGE, 50, 5000, 1, tid=9)
        analysis = window(read_recording(builder.write(tmp_path / "x.stall", 6000)), 800, 2000)
        (call,) = analysis.tables.calls.itertuples()
        assert (call.unfinished, call.start_ns + call.duration_ns, analysis.tables.end_ns) == (True, at(2000), at(2000))

    def test_samples_before_the_window_stand_at_its_start(self) -> None:
        tables = window(golden("known-call"), 1700, 1900).tables
        assert tables.queues[["time_ns", "queue_length"]].to_numpy().tolist() == [[at(1700), 2]]
        assert tables.counters["count"].tolist() == [943, 950]

    def test_counters_are_those_of_the_window(self, tmp_path: Path) -> None:
        builder = quiet(add_storm(Builder(hooked_manifest()), 1000), 900)
        for index in range(7):
            builder.request(1500 + 100 * index, "SYN refused: accept queue full", index, queue_length=512)
        path = builder.write(tmp_path / "x.stall", 4000)
        analysis = window(read_recording(path), 1990, 3000)
        assert analysis.recording.counters is not None
        hits = {probe: item.hits for probe, item in analysis.recording.counters.by_probe.items() if item.hits}
        assert sum(hits.values()) == 2, "two refusals at 2.0 and 2.1 s and nothing else"
        assert summarise(analysis).overflows.total == 2

    def test_a_window_before_the_cut_is_complete(self) -> None:
        assert not window(golden("cut-short"), None, None).recording.complete
        assert window(golden("cut-short"), 0, 1400).recording.complete

    @pytest.mark.parametrize(
        ("first_ms", "last_ms", "words"),
        [
            (2000, 1000, "the window ends at 1 s, not after its start at 2 s; the recording lasts 4.00 s"),
            (4000, None, "the window starts at 4 s, after the end of the recording; it lasts 4.00 s"),
            (9000, 9500, "the window starts at 9 s, after the end of the recording; it lasts 4.00 s"),
            (-2000, -500, "the window ends 500 ms before the recording; it lasts 4.00 s"),
            (1000, 1000, "not after its start"),
        ],
    )
    def test_nothing_in_it(self, first_ms: float, last_ms: float | None, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            window(golden("known-call"), first_ms, last_ms)


class TestMoment:
    # the recording starts at 2025-06-15 15:06:40 UTC
    @pytest.mark.parametrize(
        ("text", "time_ms"),
        [
            ("12.5s", 12_500),
            ("0", 0),
            ("1500ms", 1_500),
            ("2m", 120_000),
            ("15:06:41", 1_000),
            ("15:06:41.25", 1_250),
            ("15:06:41,250", 1_250),
            ("15:07", 20_000),
            ("00:00:01", 32_001_000),
            ("2025-06-15T15:06:42Z", 2_000),
            ("2025-06-15 15:06:42.500", 2_500),
            ("2025-06-15T17:06:43+02:00", 3_000),
        ],
    )
    def test_words(self, text: str, time_ms: float) -> None:
        assert WALL_OFFSET_NS + STARTED_NS == 1_750_000_000 * 10**9
        assert parse_moment(text, manifest()) == at(time_ms)

    @pytest.mark.parametrize("text", ["", "soon", "12", "12.5x", "25:99", "2025-13-45", "1e9s", "-5s", "99:00:00:00"])
    def test_what_is_no_time(self, text: str) -> None:
        with pytest.raises(UsageError, match=r"cannot read .* as a time; write 12\.5s after the start"):
            parse_moment(text, manifest())
