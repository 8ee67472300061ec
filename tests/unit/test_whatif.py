from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    CLIENTS,
    CRON,
    DATA,
    ITERATION_ID,
    MS,
    PURGE,
    RESIZE,
    TRIM,
    Builder,
    ProbeCounters,
    manifest,
)

from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.analysis.whatif import DEFAULT_BYTES, WhatIf, what_if
from stallscope.tracer.recording import read_recording

KB = 1024


def asked(analysis: Analysis, threshold_bytes: int) -> WhatIf:
    return what_if(analysis.tables, analysis.trims, analysis.stalls.frame, threshold_bytes)


def analysed(builder: Builder, tmp_path: Path, **counters: ProbeCounters) -> Analysis:
    by_id = {TRIM: counters["trim"]} if "trim" in counters else {}
    return analyse(read_recording(builder.write(tmp_path / "a.stall", 10_000, by_id)))


def tick(builder: Builder, start_ms: float, frees: list[int], trim_ms: float = 2) -> Builder:
    """Add a tick of the cron in an iteration of its own: visits of ``trim_ms`` + 1 each, every one trims."""
    length = len(frees) * (trim_ms + 1)
    builder.span(ITERATION_ID, start_ms, length + 3).span(CRON, start_ms + 1, length + 1)
    builder.span(CLIENTS, start_ms + 1, length + 0.5)
    for index, free in enumerate(frees):
        begin = start_ms + 1 + index * (trim_ms + 1)
        builder.resize(begin, trim_ms + 1, idle_s=3, allocated=2 * free, free=free)
        builder.span(TRIM, begin + 0.5, trim_ms, free, free)
    return builder


def test_the_many_small_buffers_of_the_article(tmp_path: Path) -> None:
    """Ten trims of 32 KB buffers and two of 1 MB, 2 ms each: a stall of 39 ms becomes one of 19 ms."""
    server = replace(manifest().targets[0], info={"connected_clients": "4000", "connected_clients_end": "5000"})
    builder = tick(Builder(manifest(targets=(server,))), 1000, [32 * KB] * 10 + [1024 * KB] * 2)
    result = asked(analysed(builder, tmp_path), DEFAULT_BYTES)
    assert (result.trims, result.skipped, result.saved_ns) == (12, 10, 20 * MS)
    assert result.kept_bytes == 10 * 32 * KB
    assert (result.clients, result.kept_limit_bytes) == (5000, 5000 * 32 * KB)
    assert round(result.kept_limit_bytes / 1e6) == 164  # "160 MB" of the article
    assert (result.stalls, result.stalls_left) == (1, 1)
    assert (result.longest_stall_ns, result.longest_left_ns) == (39 * MS, 19 * MS)


def test_a_threshold_ends_a_stall(tmp_path: Path) -> None:
    builder = tick(tick(Builder(), 1000, [32 * KB] * 6), 2000, [64 * KB] * 6)
    analysis = analysed(builder, tmp_path)
    assert [asked(analysis, size * KB).stalls_left for size in (31, 32, 64)] == [2, 1, 0]
    assert asked(analysis, 64 * KB).longest_left_ns == 9 * MS


def test_large_buffers_are_trimmed_as_before() -> None:
    analysis = analyse(read_recording(DATA / "known-call.stall"))
    result = asked(analysis, DEFAULT_BYTES)
    assert (result.trims, result.skipped, result.saved_ns, result.kept_bytes) == (5, 0, 0, 0)
    assert result.longest_left_ns == result.longest_stall_ns == 620 * MS
    everything = asked(analysis, 28_000_000)
    assert (everything.skipped, everything.saved_ns, everything.kept_bytes) == (5, 590 * MS, 140_000_000)
    assert everything.longest_left_ns == 30 * MS


def test_without_info_the_clients_seen_are_counted(tmp_path: Path) -> None:
    assert asked(analysed(tick(Builder(), 1000, [32 * KB] * 3), tmp_path), 32 * KB).clients == 1  # all of fd 77


def test_strings_shortened_elsewhere_are_no_trims(tmp_path: Path) -> None:
    builder = Builder().span(CRON, 100, 20).span(TRIM, 105, 5, 100, 100).span(TRIM, 200, 5, 100, 100)
    assert asked(analysed(builder, tmp_path), DEFAULT_BYTES).trims == 0


def test_without_visits_all_calls_are_trims(tmp_path: Path) -> None:
    probes = tuple(probe for probe in manifest().probes if probe.id != RESIZE)
    builder = Builder(manifest(probes=probes)).span(CRON, 100, 20).span(TRIM, 105, 5, 100, 100).span(PURGE, 106, 1)
    assert asked(analysed(builder, tmp_path), DEFAULT_BYTES).skipped == 1


def test_what_was_only_counted_is_owned_up_to(tmp_path: Path) -> None:
    builder = tick(Builder(), 1000, [32 * KB] * 3)
    counters = ProbeCounters(hits=50, sent=3, short_calls=40, lost=7)
    assert asked(analysed(builder, tmp_path, trim=counters), DEFAULT_BYTES).not_recorded == 47


def test_a_length_that_is_none_is_larger_than_any_threshold(tmp_path: Path) -> None:
    builder = tick(Builder(), 1000, [32 * KB]).span(CLIENTS, 2000, 50)
    builder.resize(2010, 30, idle_s=3, allocated=0, free=0).span(TRIM, 2011, 20, 0, 2**64 - 1)
    analysis = analysed(builder, tmp_path)
    assert asked(analysis, 2**62).skipped == 1


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 300_000), min_size=1, max_size=8), max_size=5),
    st.lists(st.integers(0, 320_000), min_size=2, max_size=6),
)
def test_a_higher_threshold_skips_more_saves_more_and_keeps_more(ticks: list[list[int]], sizes: list[int]) -> None:
    builder = Builder()
    for index, frees in enumerate(ticks):
        tick(builder, 100 + index * 100, frees)
    with TemporaryDirectory() as place:
        analysis = analysed(builder, Path(place))
    results = [asked(analysis, size) for size in sorted(sizes)]
    everything = asked(analysis, 300_000)
    assert everything.skipped == everything.trims == sum(map(len, ticks))
    assert everything.kept_bytes == sum(map(sum, ticks))
    for low, high in pairwise(results):
        assert low.skipped <= high.skipped <= high.trims
        assert low.saved_ns <= high.saved_ns
        assert low.kept_bytes <= high.kept_bytes
        assert low.stalls_left >= high.stalls_left
        assert low.longest_left_ns >= high.longest_left_ns
    for result in results:
        expected = [free for frees in ticks for free in frees if free <= result.threshold_bytes]
        assert (result.skipped, result.kept_bytes) == (len(expected), sum(expected))
        assert result.saved_ns == pytest.approx(len(expected) * 2 * MS)
