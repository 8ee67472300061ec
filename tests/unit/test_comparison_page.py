from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from recordings import CLIENTS, CRON, MS, PURGE, TRIM, Builder, add_storm, manifest, quiet

from stallscope.reports.comparison.compute import AFTER, BEFORE, compute_sides
from stallscope.reports.comparison.page import describe
from stallscope.reports.comparison.words import page_of, tables_of, text_of
from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.analysis.compare.comparison import compare
from stallscope.tracer.analysis.compare.sides import make_side
from stallscope.tracer.cli import cli
from stallscope.tracer.errors import UsageError
from stallscope.tracer.manifest import ProbeCounters
from stallscope.tracer.recording import read_recording


def analysed(builder: Builder, path: Path, end_ms: float, **counters: ProbeCounters) -> Analysis:
    given = {int(name[1:]): counter for name, counter in counters.items()} or None
    return analyse(read_recording(builder.write(path, end_ms, given)))


@pytest.fixture
def storm(tmp_path: Path) -> Analysis:
    return analysed(quiet(add_storm(Builder(), 1000), 4000, overflow=943, drops=83, after_ms=2000),
                    tmp_path / "storm.stall", 4000)  # fmt: skip


@pytest.fixture
def calm(tmp_path: Path) -> Analysis:
    builder = Builder().span(CRON, 500, 4).span(CLIENTS, 501, 2).span(PURGE, 2000, 1, 4096)
    return analysed(quiet(builder, 8000), tmp_path / "calm.stall", 8000)


def test_both_timelines_have_one_axis(storm: Analysis, calm: Analysis) -> None:
    sides = compute_sides([storm], [calm])
    before, after = sides.timelines
    assert (before.side, after.side, sides.elapsed_ns) == (BEFORE, AFTER, 8000 * MS)
    assert before.bin_ns == after.bin_ns
    assert (before.stall_start_ns.tolist(), before.stall_duration_ns.tolist()) == ([1000 * MS], [620 * MS])
    assert before.stall_refused.tolist() == [43]
    assert before.refused.sum() == 43
    assert np.nanmax(before.queue_share) == 512 / 511
    # where the fullest moment is, in time: the queue is full from 495 ms after the stall's start
    assert int(np.nanargmax(before.queue_share)) * before.bin_ns <= 1495 * MS
    assert len(after.stall_start_ns) == after.refused.sum() == 0


def test_distributions_are_the_calls_by_rank(storm: Analysis, calm: Analysis) -> None:
    found = compute_sides([storm], [calm]).distributions
    assert next(iter(found)) == "serverCron"  # the most time
    before, after = found["je_pages_purge"]
    assert (before.side, before.calls, before.duration_ns.tolist()) == (BEFORE, 5, [20 * MS] * 5)
    assert before.share.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert (after.side, after.calls, after.share.tolist()) == (AFTER, 1, [1.0])
    (only,) = found["sdsRemoveFreeSpace"]
    assert only.side == BEFORE


def test_calls_that_were_only_counted_are_the_quickest(tmp_path: Path, calm: Analysis) -> None:
    builder = Builder(manifest(min_duration_ns=MS)).span(TRIM, 100, 2).span(TRIM, 200, 3)
    short = analysed(builder, tmp_path / "short.stall", 1000, **{f"p{TRIM}": ProbeCounters(10, 2, 8, 4_000_000)})
    (trims,) = compute_sides([short], [calm]).distributions["sdsRemoveFreeSpace"]
    assert (trims.calls, trims.short) == (10, 8)
    assert trims.share.tolist() == [0.9, 1.0]


def test_many_calls_are_thinned_and_keep_their_ends(tmp_path: Path, calm: Analysis) -> None:
    builder = Builder()
    lengths = [1 + index * 0.001 for index in range(3000)]
    for index, length in enumerate(lengths):
        builder.span(TRIM, index * 10, length)
    (trims,) = compute_sides([analysed(builder, tmp_path / "m.stall", 40_000)], [calm]).distributions[
        "sdsRemoveFreeSpace"
    ]
    exact = np.sort(np.round(np.array(lengths) * MS).astype(np.int64))
    assert len(trims.duration_ns) <= 400
    assert trims.duration_ns[0] == exact[0]
    # the longest ten are all there: the tail is what people look for
    assert trims.duration_ns[-10:].tolist() == exact[-10:].tolist()
    ranks = np.round(trims.share * 3000).astype(np.int64)
    assert (exact[ranks - 1] == trims.duration_ns).all()


def test_the_graph_is_time_per_second_of_each_side(storm: Analysis, calm: Analysis) -> None:
    sides = compute_sides([storm], [calm])
    by_path = {}
    for node in sides.graph:
        above = sides.graph[node.parent].name if node.parent >= 0 else ""
        by_path[above, node.name] = node
    cron = by_path["", "serverCron"]
    assert (cron.before, cron.before_total) == (2 * MS / 4, 618 * MS / 4)
    assert (cron.after, cron.after_total) == (2 * MS / 8, 4 * MS / 8)
    assert by_path["sdsRemoveFreeSpace", "je_pages_purge"].after_total == 0
    assert by_path["", "je_pages_purge"].before_total == 0
    assert by_path["", "je_pages_purge"].after == MS / 8
    roots = [node for node in sides.graph if node.parent < 0]
    assert sum(node.before_total for node in roots) == pytest.approx(sum(node.before for node in sides.graph))


def test_several_recordings_of_a_side_are_pooled(storm: Analysis, calm: Analysis) -> None:
    sides = compute_sides([storm, storm], [calm])
    assert [timeline.side for timeline in sides.timelines] == [BEFORE, BEFORE, AFTER]
    assert sides.distributions["je_pages_purge"][0].calls == 10
    alone = compute_sides([storm], [calm])
    assert [node.before for node in sides.graph] == [node.before for node in alone.graph]


def test_nothing_in_common_and_nothing_at_all(tmp_path: Path, storm: Analysis) -> None:
    empty = analysed(Builder(), tmp_path / "empty.stall", 1000)
    sides = compute_sides([empty], [empty])
    assert (sides.distributions, sides.graph) == ({}, ())
    assert compute_sides([empty], [storm]).graph[0].before_total == 0
    document = json.dumps(describe(sides), allow_nan=False)
    assert json.loads(document)["timelines"][0]["queue"]["bin"] == []


def test_the_page_says_what_the_terminal_says(storm: Analysis, calm: Analysis) -> None:
    before, after = make_side([storm]), make_side([calm])
    comparison = compare(before, after)
    text = text_of(comparison)
    assert text.verdict == comparison.headline
    assert [source.split(":")[0] for source in text.sources] == ["before", "after"]
    *_, (heading, table) = tables_of(comparison)
    assert heading == "Every number, before and after"
    known = [change for change in comparison.changes if change.before.n or change.after.n]
    assert [(row.cells[0].text, row.cells[1].text) for row in table.rows] == [
        (change.subject, change.quantity) for change in known
    ]
    assert all(len(row.cells) == len(table.columns) for row in table.rows)
    assert text.mood == "unknown"  # one storm in 4 s is no evidence
    assert comparison.headline in page_of(comparison, before, after)


def test_a_change_that_is_certain_comes_first(tmp_path: Path) -> None:
    """The trims of one server take 50 ms, those of the other 1 ms, ten times a second for a minute."""
    sides = []
    for name, length in (("slow", 50), ("quick", 1)):
        builder = Builder()
        for index in range(600):
            builder.span(TRIM, 100 * index, length + index % 7 * 0.01)
        sides.append(make_side([analysed(quiet(builder, 60_000), tmp_path / f"{name}.stall", 60_000)]))
    for before, after, mood in ((sides[0], sides[1], "calm"), (sides[1], sides[0], "trouble")):
        comparison = compare(before, after)
        (heading, table), _ = tables_of(comparison)
        assert heading.startswith("What changed significantly")
        assert {row.cells[0].text for row in table.rows} == {"sdsRemoveFreeSpace", "stalls"}
        assert text_of(comparison).mood == mood


def test_the_command_writes_it_once(tmp_path: Path, storm: Analysis, calm: Analysis) -> None:
    page = tmp_path / "diff.html"
    words = ["diff", str(storm.recording.path), str(calm.recording.path), "-o", str(page)]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    with pytest.raises(UsageError, match=r"diff\.html exists"):
        CliRunner().invoke(cli, words, catch_exceptions=False)
    with pytest.raises(UsageError, match="is the recording itself"):
        CliRunner().invoke(cli, [*words[:-1], str(calm.recording.path), "--force"], catch_exceptions=False)
    assert read_recording(calm.recording.path).complete
