"""Captures: complete recordings with the trigger, its pre-roll and post-roll; extended, cooled down, bounded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import ITERATION_ID, MS, PURGE, TRIM, Builder, add_storm, at, manifest
from watch_replay import nothing, watch

from stallscope.reports.timeline.bands import NOT_ATTACHED
from stallscope.reports.timeline.compute import build_timeline
from stallscope.reports.timeline.document import describe
from stallscope.reports.triggers import describe_detail
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.summary import summarise
from stallscope.tracer.cli import cli
from stallscope.tracer.manifest import DetailInfo, Note
from stallscope.tracer.recording import read_recording
from stallscope.tracer.watch.captures import EXTENDED, MAX_TRIGGERS, STARTED, SUPPRESSED


def incident() -> np.ndarray:
    """Return a quiet server with calls every 100 ms, and one storm at 20 s."""
    builder = Builder().queue(0, 1, 40).counter(0, 900).counter(0, 950, counter=1)
    for step in range(1, 400):
        if not 200 <= step <= 207:
            builder.span(TRIM, step * 100, 0.5, 100, 200)
            builder.queue(step * 100, 1, 40 if step < 200 else 83)
            builder.counter(step * 100, 900 if step < 200 else 943)
    return add_storm(builder, 20_000).events()


def test_a_capture_is_a_complete_recording_with_its_trigger(tmp_path: Path) -> None:
    played = watch(tmp_path, "stall>50ms", "overflow>0", before=5000, after=10_000).play(incident(), 40_000)
    (done,) = played.end()
    assert done.complete
    assert done.error == ""
    assert done.path is not None
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".stall") == [done.path.name]
    recording = read_recording(done.path)
    found = recording.manifest
    assert recording.complete
    assert [(item.text, item.time_ns, item.under_way) for item in found.triggers] == [
        ("stall>50ms", at(20_050), True),
        ("overflow>0", at(20_505), False),
    ]
    # 5 s before the trigger at 20.05 s, from the boundary before it; 10 s after the end of the stall
    assert found.started_ns == at(15_000)
    assert found.ended_ns == at(30_650)
    assert played.outcomes == [(20_100, STARTED), (20_550, EXTENDED), (30_650, "finished")]
    starts = recording.frame()["start_ns"].astype("int64")
    assert starts.min() == at(15_000)
    summary = summarise(analyse(recording))
    assert (summary.stall_count, summary.stalls[0].duration_ns) == (1, 620 * MS)
    assert summary.overflows.total == 43
    assert summary.overflows.inside == 41
    assert not summary.losses
    assert [warning for warning in summary.warnings if "never fired" not in warning] == []
    (reconciliation,) = summary.reconciliation
    assert (reconciliation.observed, reconciliation.counted) == (43, 43)
    assert [item.text for item in summary.triggers] == ["stall>50ms", "overflow>0"]


def test_rows_and_counters_of_a_capture_agree(tmp_path: Path) -> None:
    played = watch(tmp_path, before=5000, after=1000).play(incident(), 25_000)
    (done,) = played.end()
    assert done.path is not None
    recording = read_recording(done.path)
    assert recording.counters is not None
    probes = recording.table.column("probe").to_numpy()
    for probe, counters in recording.counters.by_probe.items():
        rows = int(np.count_nonzero(probes == probe))
        assert (counters.sent, counters.hits, counters.lost) == (rows, rows + counters.short_calls, 0), probe
    assert done.rows == recording.table.num_rows
    assert done.size_bytes == done.path.stat().st_size
    assert all(item.time_ns >= recording.manifest.started_ns for item in recording.snapshots)


def test_hooked_functions_that_saw_nothing_are_compared_with_the_kernel(tmp_path: Path) -> None:
    """The kernel counted 43 overflows: that the hooks saw none of them is to be said, not that there were no hooks."""
    played = watch(tmp_path, before=5000, after=1000)
    played.hooked = ("ListenOverflows",)
    (done,) = played.play(incident(), 25_000).end()
    assert done.path is not None
    (namespace,) = read_recording(done.path).manifest.namespaces
    assert namespace.seen == namespace.seen_elsewhere == {"ListenOverflows": 0}
    assert namespace.counters_end["ListenOverflows"] - namespace.counters_start["ListenOverflows"] == 43


def test_summary_and_page_show_what_triggered(tmp_path: Path) -> None:
    played = watch(tmp_path / "captures", "stall>50ms", "overflow>0", before=5000, after=2000).play(incident(), 40_000)
    (done,) = played.end()
    runner = CliRunner()
    text = runner.invoke(cli, ["summary", str(done.path)], catch_exceptions=False)
    assert text.exit_code == 0
    assert "Redis was blocked for 620 ms" in text.stdout
    assert "stall>50ms" in text.stdout
    assert "overflow>0" in text.stdout
    document = json.loads(runner.invoke(cli, ["summary", "--json", str(done.path)], catch_exceptions=False).stdout)
    assert document["triggers"][0]["text"] == "stall>50ms"
    page = tmp_path / "page.html"
    assert runner.invoke(cli, ["report", str(done.path), "-o", str(page)], catch_exceptions=False).exit_code == 0
    assert "stall\\u003e50ms" in page.read_text()


def test_overlapping_triggers_extend_one_capture(tmp_path: Path) -> None:
    builder = Builder()
    for start_ms in (2000, 4000, 6000):
        builder.span(ITERATION_ID, start_ms, 60)
    played = watch(tmp_path, before=1000, after=3000, cooldown=0).play(builder.events(), 15_000)
    (done,) = played.end()
    assert [(item.time_ns - at(0)) / MS for item in done.triggers] == [2050, 4050, 6050]
    assert [outcome for _, outcome in played.outcomes] == [STARTED, EXTENDED, EXTENDED, "finished"]
    assert done.ended_ns == at(9100)


def test_a_cool_down_counts_and_the_next_capture_says_so(tmp_path: Path) -> None:
    builder = Builder()
    for start_ms in (2000, 5000, 7000, 12_000):
        builder.span(ITERATION_ID, start_ms, 60)
    played = watch(tmp_path, before=500, after=1000, cooldown=5000).play(builder.events(), 20_000)
    first, second = played.end()
    assert [outcome for _, outcome in played.outcomes] == [
        STARTED, "finished", SUPPRESSED, SUPPRESSED, STARTED, "finished",
    ]  # fmt: skip
    assert played.captures.suppressed == 2
    assert first.path is not None
    assert second.path is not None
    assert read_recording(first.path).manifest.notes == ()
    (note,) = read_recording(second.path).manifest.notes
    assert note.text == "2 triggers came true in the cool-down before this capture"


def test_a_condition_that_never_ends_is_cut_at_the_greatest_length(tmp_path: Path) -> None:
    endless = Builder().span(ITERATION_ID, 1000, 10**6).events()
    played = watch(tmp_path, before=500, after=1000, longest=8000).play(endless, 30_000)
    (done,) = played.end()
    assert done.path is not None
    recording = read_recording(done.path)
    assert recording.manifest.ended_by == "it was as long as captures may be"
    assert [outcome for _, outcome in played.outcomes] == [STARTED, "finished"]
    summary = summarise(analyse(recording))
    assert summary.stalls[0].unfinished, "the stall is in it, under way"


def test_too_little_memory_shortens_the_pre_roll_and_says_so(tmp_path: Path) -> None:
    builder = Builder()
    for step in range(4000):
        builder.span(PURGE, step, 0.5, 1)
    builder.span(ITERATION_ID, 3000, 60)
    made = watch(tmp_path, before=2000, after=100)
    made.preroll.max_bytes = 80_000
    (done,) = made.play(builder.events(), 4000).end()
    assert done.path is not None
    recording = read_recording(done.path)
    text = recording.manifest.notes[-1].text
    assert text.startswith("the first ")
    assert "of the pre-roll are missing: --memory held no more" in text
    assert recording.manifest.started_ns > at(1050)
    counters = recording.counters
    assert counters is not None
    assert counters.by_probe[PURGE].sent == int(np.count_nonzero(recording.table.column("probe").to_numpy() == PURGE))


def test_only_details_targets_and_notes_of_the_capture_are_in_it(tmp_path: Path) -> None:
    made = watch(tmp_path, before=1000, after=1000)
    (target,) = made.manifest.targets
    gone = replace(target, pid=4000, end_ns=at(500))
    made.manifest = replace(
        made.manifest,
        targets=(gone, target),
        details=(
            DetailInfo(at(100), at(200), at(300)),
            DetailInfo(at(5050), at(5080), 0, (PURGE,)),
        ),
        notes=tuple(Note(at(index), str(index)) for index in range(1000)),
    )
    (done,) = made.play(Builder().span(ITERATION_ID, 5000, 60).events(), 8000).end()
    assert done.path is not None
    found = read_recording(done.path).manifest
    assert [item.pid for item in found.targets] == [target.pid]
    assert [item.attached_ns for item in found.details] == [at(5080)]
    assert len(found.notes) == 200


def test_the_timeline_shows_triggers_and_when_detail_was_missing(tmp_path: Path) -> None:
    made = watch(tmp_path, before=1000, after=1000)
    detail = DetailInfo(at(5050), at(5080), at(5500), (PURGE,), "2 functions")
    made.manifest = replace(made.manifest, details=(detail,))
    (done,) = made.play(Builder().span(ITERATION_ID, 5000, 60).events(), 8000).end()
    assert done.path is not None
    recording = read_recording(done.path)
    started_ns = recording.manifest.started_ns
    timeline = build_timeline(analyse(recording))
    (trigger,) = describe(timeline)[0]["triggers"]
    assert trigger == {
        "time_ns": at(5050) - started_ns,
        "text": "stall>50ms",
        "seen": "60.0 ms, event loop of process 4711",
    }
    bands = [(band.start_ns + started_ns, band.end_ns + started_ns) for band in timeline.bands]
    assert bands == [(started_ns, at(5080)), (at(5500), recording.ended_ns)]
    assert {band.kind for band in timeline.bands} == {NOT_ATTACHED}
    (found,) = timeline.summary.details
    assert (found.attached_ns, found.detached_ns) == (at(5080) - started_ns, at(5500) - started_ns)
    assert describe_detail(found) == (
        f"detail probes attached at {(at(5080) - started_ns) / 1e9:.3f} s, 30.0 ms after the trigger, "
        f"detached at {(at(5500) - started_ns) / 1e9:.3f} s; 2 functions"
    )


def test_many_triggers_are_listed_up_to_a_number_and_counted(tmp_path: Path) -> None:
    builder = Builder()
    for index in range(150):
        builder.span(ITERATION_ID, 1000 + index * 100, 60)
    (done,) = watch(tmp_path, before=100, after=1000).play(builder.events(), 18_000).end()
    assert done.path is not None
    found = read_recording(done.path).manifest
    assert (len(found.triggers), found.further_triggers) == (MAX_TRIGGERS, 50)


def test_a_disk_that_does_not_keep_up_loses_counted_events(tmp_path: Path) -> None:
    made = watch(tmp_path, before=500, after=1000)
    made.captures.options = replace(made.captures.options, memory_bytes=-56 * 32_768 + 56 * 100)
    builder = Builder().span(ITERATION_ID, 1000, 60)
    for step in range(2000):
        builder.span(PURGE, step, 0.4, 1)
    (done,) = made.play(builder.events(), 3000).end()
    assert done.path is not None
    recording = read_recording(done.path)
    assert done.complete
    assert done.unwritten > 0
    assert recording.counters is not None
    assert sum(item.lost for item in recording.counters.by_probe.values()) == done.unwritten
    assert f"{done.unwritten:,} events not written: the disk was too slow" in recording.manifest.notes[-1].text


def test_a_folder_that_went_away_is_said_and_watching_goes_on(tmp_path: Path) -> None:
    made = watch(tmp_path / "there", before=500, after=1000, cooldown=0)
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    stalls = Builder().span(ITERATION_ID, 1000, 60).span(ITERATION_ID, 6000, 60).events()
    made.play(stalls, 4000)
    (failed,) = made.finished
    assert (failed.path, failed.complete) == (None, False)
    assert "cannot write" in failed.error
    (tmp_path / "elsewhere").rename(tmp_path / "there")
    made.play(stalls, 9000, from_ms=4000)
    _, done = made.end()
    assert done.complete


def test_the_end_of_the_watch_keeps_what_was_written(tmp_path: Path) -> None:
    made = watch(tmp_path, before=500, after=60_000).play(Builder().span(ITERATION_ID, 1000, 60).events(), 5000)
    (done,) = made.end()
    assert not done.complete
    assert done.error == "the watch ended"
    assert done.path is not None
    assert done.path.name.endswith(".cut-short.stall")
    recording = read_recording(done.path)
    assert not recording.complete
    assert recording.manifest.triggers[0].text == "stall>50ms"
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_nothing_to_capture_writes_nothing(tmp_path: Path) -> None:
    made = watch(tmp_path).play(nothing(), 5000)
    assert made.end() == []
    assert not made.captures.is_capturing
    assert list(tmp_path.glob("*.stall")) == []


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 15), min_size=1, max_size=6, unique=True),
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(0, 6),
)
def test_captures_follow_from_the_triggers_alone(
    tmp_path_factory: pytest.TempPathFactory, seconds: list[int], before: int, after: int, cooldown: int
) -> None:
    """Against a model: which triggers fall into which capture, and which into a cool-down."""
    path = tmp_path_factory.mktemp("captures")
    builder = Builder()
    for second in sorted(seconds):
        builder.span(ITERATION_ID, second * 1000, 60)
    made = watch(path, before=before * 1000, after=after * 1000, cooldown=cooldown * 1000)
    done = made.play(builder.events(), 22_000).end()
    expected: list[list[int]] = []
    ends = ready = -1.0
    for second in sorted(seconds):
        read_ms = second * 1000 + 100
        if expected and read_ms <= ends:
            expected[-1].append(second)
        elif read_ms >= ready:
            expected.append([second])
        else:
            continue
        # the condition held until the iteration's end; the step after that ends it
        ends = -(-(second * 1000 + 60 + after * 1000) // 50) * 50
        ready = ends + cooldown * 1000
    assert [[(item.time_ns - at(50)) // (1000 * MS) for item in one.triggers] for one in done] == expected
    for one in done:
        assert one.path is not None
        found = read_recording(one.path)
        assert found.complete
        wanted_ns = max(one.triggers[0].time_ns - before * 1000 * MS, at(0))
        assert wanted_ns - 500 * MS <= found.manifest.started_ns <= wanted_ns
        assert manifest().probes == found.manifest.probes
