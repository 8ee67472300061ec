"""Every overflow has exactly one cause; each test of the module's documentation has its case here."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    CRON,
    DATA,
    ITERATION_ID,
    LIMIT,
    MS,
    PID,
    Builder,
    ProbeCounters,
    add_storm,
    at,
    hooked_manifest,
    manifest,
    quiet,
)

from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.analysis.blame import (
    CAUSES,
    CUT_SHORT,
    LOOP_LOST,
    LOOP_UNSEEN,
    NO_KNOWN_CAUSE,
    NOT_ACCEPTING,
    QUEUE_UNSEEN,
    SLOW_DRAIN,
    SMALL_BACKLOG,
    STALL,
    UNWATCHED,
    Blame,
    summarise_blame,
)
from stallscope.tracer.manifest import ListenerInfo
from stallscope.tracer.recording import read_recording

FULL = "SYN refused: accept queue full"
LOOP = {ITERATION_ID: ProbeCounters(hits=500, short_calls=500, short_ns=100 * MS)}


def golden(name: str) -> Blame:
    return analyse(read_recording(DATA / f"{name}.stall")).blame


def analysed(builder: Builder, tmp_path: Path, end_ms: float = 10_000, **more: object) -> Analysis:
    counters = {**LOOP, **more.pop("counters", {})}  # type: ignore[dict-item]
    return analyse(read_recording(builder.write(tmp_path / "a.stall", end_ms, counters, **more)))  # type: ignore[arg-type]


def causes(blame: Blame) -> dict[str, int]:
    """Return the causes that occur."""
    return {cause: number for cause, number in blame.counts().items() if number}


def burst(builder: Builder, start_ms: float = 1000, before: int = 0) -> Builder:
    """Add a burst that fills the queue between two samples, is refused 30 times, and is gone with the next one."""
    builder.queue(start_ms, 2, before).counter(start_ms, 900 + before)
    builder.queue(start_ms + 10, 512, before + 30).counter(start_ms + 10, 930 + before)
    return builder.accepts(start_ms + 11, 512, 0.002).queue(start_ms + 20, 1, before + 30)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("known-call", {STALL: 43}),
        ("refused", {STALL: 43}),
        ("with-losses", {STALL: 43}),
        ("two-stalls", {STALL: 86, SMALL_BACKLOG: 7}),
        ("slow-drain", {SLOW_DRAIN: 488}),
        ("cut-short", {NO_KNOWN_CAUSE: 11}),
        ("empty", {}),
    ],
)
def test_the_golden_recordings(name: str, expected: dict[str, int]) -> None:
    assert causes(golden(name)) == expected


def test_the_known_slow_drain() -> None:
    (episode,) = golden("slow-drain").episodes.to_dict("records")
    assert (episode["start_ns"], episode["end_ns"]) == (at(1050), at(2000))
    assert (episode["overflows"], episode["accepted"], episode["came"]) == (488, 1900, 2850)
    assert (episode["cause"], episode["from_normal"], episode["queue_limit"]) == (SLOW_DRAIN, True, LIMIT)
    assert episode["pause_ns"] <= 5 * MS


def test_a_burst_that_does_not_fit(tmp_path: Path) -> None:
    blame = analysed(burst(Builder()), tmp_path).blame
    assert causes(blame) == {SMALL_BACKLOG: 30}
    (episode,) = blame.episodes.to_dict("records")
    assert (episode["start_ns"], episode["end_ns"], episode["came"]) == (at(1000), at(1010), 510 + 30)


def test_a_server_that_does_not_accept_at_all(tmp_path: Path) -> None:
    """The process was stopped while it waited for events: no iteration is long, nothing is accepted."""
    builder = Builder().queue(1000, 0, 0).counter(1000, 900)
    for step in range(1, 60):
        builder.queue(1000 + step * 10, min(step * 20, 512), max(step * 20 - 512, 0))
        builder.counter(1000 + step * 10, 900 + max(step * 20 - 512, 0))
    blame = analysed(builder.queue(1600, 0, 668), tmp_path).blame
    assert summarise_blame(blame).reasons == {NOT_ACCEPTING: 668}


def test_without_the_event_loop_a_stall_cannot_be_excluded(tmp_path: Path) -> None:
    probes = tuple(probe for probe in manifest().probes if probe.id not in (0, 1))
    builder = Builder(manifest(probes=probes)).queue(1000, 2, 0).counter(1000, 900)
    builder.queue(1010, 512, 30).counter(1010, 930).queue(1020, 1, 30)
    assert summarise_blame(analysed(builder, tmp_path).blame).reasons == {LOOP_UNSEEN: 30}


def test_calls_stand_for_stalls_where_the_event_loop_was_not_observed(tmp_path: Path) -> None:
    probes = tuple(probe for probe in manifest().probes if probe.id not in (0, 1))
    builder = Builder(manifest(probes=probes)).span(CRON, 1000, 200).queue(1000, 2, 0).counter(1000, 900)
    builder.queue(1100, 512, 30).counter(1100, 930).queue(1210, 1, 30)
    assert causes(analysed(builder, tmp_path).blame) == {STALL: 30}


def test_losses_in_the_middle_take_the_certainty_away(tmp_path: Path) -> None:
    lost = {ITERATION_ID: ProbeCounters(hits=501, short_calls=500, lost=1)}
    blame = analysed(burst(Builder()), tmp_path, counters=lost).blame
    assert summarise_blame(blame).reasons == {LOOP_LOST: 30}


def test_what_ends_with_a_recording_that_was_cut_short(tmp_path: Path) -> None:
    builder = burst(burst(Builder()), 5000, 30)
    blame = analysed(builder, tmp_path, end_ms=5020, complete=False).blame
    assert causes(blame) == {SMALL_BACKLOG: 30, NO_KNOWN_CAUSE: 30}
    assert summarise_blame(blame).reasons == {CUT_SHORT: 30}
    assert causes(analysed(builder, tmp_path, end_ms=5020).blame) == {SMALL_BACKLOG: 60}
    assert summarise_blame(golden("cut-short")).reasons == {CUT_SHORT: 11}


def test_a_queue_that_was_not_sampled_then(tmp_path: Path) -> None:
    """Kernel probes saw the overflow, but the sampler had stood still for seconds."""
    builder = Builder(hooked_manifest()).queue(0, 0, 0).request(5000, FULL, 40000, queue_length=512)
    assert summarise_blame(analysed(builder, tmp_path).blame).reasons == {QUEUE_UNSEEN: 1}


def test_overflows_of_no_watched_listener(tmp_path: Path) -> None:
    builder = Builder().queue(0, 0, 0).counter(0, 900).span(ITERATION_ID, 1000, 100)
    builder.queue(1010, 5, 0).counter(1020, 903).queue(1030, 6, 0)
    blame = analysed(builder, tmp_path).blame
    assert summarise_blame(blame).reasons == {UNWATCHED: 3}
    assert blame.coincidence is None


def test_each_overflow_the_kernel_saw_has_its_own_cause(tmp_path: Path) -> None:
    """The first two belong to the stall, the third to its drain, the last to a burst two seconds later."""
    builder = Builder(hooked_manifest()).queue(990, 0, 0).span(ITERATION_ID, 1000, 100).queue(1050, 512, 0)
    for time_ms, port in ((1060, 1), (1099, 2), (1105, 3), (3005, 4)):
        builder.request(time_ms, FULL, 40000 + port, queue_length=512)
    builder.queue(1110, 0, 0).queue(3000, 0, 0).queue(3010, 512, 0).queue(3020, 0, 0).enters(3001, 50000, 5)
    blame = analysed(builder, tmp_path).blame
    assert blame.overflows["cause"].tolist() == [STALL, STALL, STALL, SMALL_BACKLOG]
    assert blame.overflows["episode"].tolist() == [-1, -1, -1, 0]
    assert blame.by_stall(1).tolist() == [3]


def overload(builder: Builder, start_ms: float, end_ms: float, *, accepted_every_ms: float) -> Builder:
    """Add a queue that stays full, with 5 overflows every 10 ms, while connections are accepted now and then."""
    time_ms, refused = start_ms, 0
    while time_ms <= end_ms:
        builder.queue(time_ms, 511 + int(time_ms / 10) % 2, refused).counter(time_ms, 900 + refused)
        time_ms, refused = time_ms + 10, refused + 5
    return builder.accepts(start_ms + 1, int((end_ms - start_ms) / accepted_every_ms), accepted_every_ms)


def test_the_late_part_of_a_drain_is_slow_drain_where_the_accepts_show_it(tmp_path: Path) -> None:
    """A stall of 50 ms, then a second in which Redis accepts and the queue stays full."""
    builder = Builder().queue(990, 0, 0).counter(990, 900).span(ITERATION_ID, 1000, 50)
    overload(builder, 1050, 2050, accepted_every_ms=5).queue(2060, 0, 500)
    blame = analysed(builder, tmp_path).blame
    in_time = blame.overflows.loc[blame.overflows["cause"] == STALL]
    assert (in_time["after_ns"] < at(1100)).all()
    late = blame.overflows.loc[blame.overflows["cause"] == SLOW_DRAIN]
    assert (late["after_ns"] >= at(1100)).all()
    assert len(in_time) + len(late) == len(blame.overflows)
    assert late["count"].sum() > 400
    assert blame.episodes["stall"].tolist() == [0]


def test_the_late_part_of_a_drain_stays_with_the_stall_where_they_do_not(tmp_path: Path) -> None:
    builder = Builder().queue(990, 0, 0).counter(990, 900).span(ITERATION_ID, 1000, 50)
    overload(builder, 1050, 2050, accepted_every_ms=400).queue(2060, 0, 500)
    assert causes(analysed(builder, tmp_path).blame).keys() == {STALL}


def test_two_stalls_back_to_back_each_have_their_own(tmp_path: Path) -> None:
    assert golden("two-stalls").by_stall(2).tolist() == [43, 43]


def test_a_second_listener_has_its_own_episodes(tmp_path: Path) -> None:
    listeners = (*manifest().listeners, ListenerInfo(1, "[::1]:6379", 6379, PID, 1002, 0, LIMIT))
    builder = burst(Builder(manifest(listeners=listeners)))
    builder.queue(5000, 0, 0, listener=1).queue(5010, 512, 4, listener=1).counter(5010, 934)
    builder.queue(5020, 0, 4, listener=1)
    blame = analysed(builder, tmp_path).blame
    assert blame.episodes[["listener", "overflows"]].to_numpy().tolist() == [[0, 30], [1, 4]]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.sampled_from([0, 3, 60, 300, 511, 512]), st.integers(0, 9), st.integers(0, 9)),
        max_size=40,
    ),
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 90)), max_size=6),
    st.integers(0, 60),
    st.booleans(),
)
def test_every_overflow_has_exactly_one_cause(
    samples: list[tuple[int, int, int, int]], iterations: list[tuple[int, int]], accepts: int, complete: bool
) -> None:
    builder = Builder(manifest(stall_ns=10 * MS)).counter(0, 900).accepts(5, accepts, 17)
    time_ms, drops, count = 0, 0, 900
    for step, length, more_drops, more_overflows in samples:
        time_ms, drops, count = time_ms + step, drops + more_drops, count + more_overflows
        builder.queue(time_ms, length, drops).counter(time_ms, count)
    time_ms = 0
    for gap, length in iterations:
        builder.span(ITERATION_ID, time_ms + gap, length)
        time_ms += gap + length
    with TemporaryDirectory() as place:
        check_that_each_has_one_cause(analysed(builder, Path(place), complete=complete, batches=2 if complete else 1))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 900), st.sampled_from([0, 40, 300, 512])), max_size=25),
    st.lists(st.tuples(st.integers(0, 999), st.integers(0, 8)), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(1, 200), st.integers(10, 90)), max_size=5),
    st.integers(0, 90),
)
def test_every_overflow_that_the_kernel_saw_has_exactly_one_cause(
    samples: list[tuple[int, int]], refused: list[tuple[int, int]], iterations: list[tuple[int, int]], accepts: int
) -> None:
    builder = Builder(hooked_manifest()).accepts(5, accepts, 11)
    for time_ms, length in sorted(samples):
        builder.queue(time_ms, length, 0)
    for time_ms, port in sorted(refused):
        builder.request(time_ms, FULL, 40000 + port, queue_length=512)
    time_ms = 0
    for gap, length in iterations:
        builder.span(ITERATION_ID, time_ms + gap, length)
        time_ms += gap + length
    with TemporaryDirectory() as place:
        analysis = analysed(builder, Path(place))
    assert len(analysis.blame.overflows) == len(refused)
    check_that_each_has_one_cause(analysis)


def check_that_each_has_one_cause(analysis: Analysis) -> None:
    """Check that causes, episodes and stalls share out the overflows without loss or double counting."""
    blame = analysis.blame
    assert len(blame.overflows) == len(analysis.stalls.overflows)
    assert blame.overflows["count"].tolist() == analysis.stalls.overflows["count"].tolist()
    assert set(blame.overflows["cause"]) <= set(CAUSES)
    assert sum(blame.counts().values()) == blame.overflows["count"].sum()
    unknown = blame.overflows["cause"] == NO_KNOWN_CAUSE
    assert ((blame.overflows["reason"] != "") == unknown).all()
    assert sum(summarise_blame(blame).reasons.values()) == blame.counts()[NO_KNOWN_CAUSE]
    # what has a stall as its cause is counted in one, and the other way round
    by_stall = blame.by_stall(len(analysis.stalls.frame))
    assert by_stall.sum() == blame.counts()[STALL]
    placed = blame.overflows.loc[blame.overflows["cause"] == STALL, "stall"]
    assert ((placed >= 0) & (placed < len(by_stall))).all()
    grouped = blame.overflows.loc[blame.overflows["episode"] >= 0]
    per_episode = np.bincount(grouped["episode"], weights=grouped["count"], minlength=len(blame.episodes))
    assert per_episode.tolist() == blame.episodes["overflows"].tolist()


def test_a_quiet_recording_blames_nothing(tmp_path: Path) -> None:
    blame = analysed(quiet(Builder(), 9_000), tmp_path).blame
    assert (causes(blame), len(blame.episodes), blame.coincidence) == ({}, 0, None)


def test_overflows_in_many_stalls_are_no_chance(tmp_path: Path) -> None:
    builder = Builder()
    for index, start_ms in enumerate((1000, 2700, 4900, 6300, 8800)):
        add_storm(builder, start_ms, 900 + 43 * index, 40 + 43 * index)
    coincidence = analysed(builder, tmp_path, end_ms=60_000).blame.coincidence
    assert coincidence is not None
    assert coincidence.together == coincidence.overflows == 5 * 43
    assert coincidence.p_value < 0.02
