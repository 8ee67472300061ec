from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import CLIENTS, CRON, DATA, FREE, ITERATION_ID, MS, PID, PURGE, TRIM, Builder, at, manifest

from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.analysis.trees import KEPT_TREES, TreeFunction, summarise_trees
from stallscope.tracer.recording import read_recording


def analysed(builder: Builder, tmp_path: Path, end_ms: float = 10_000) -> Analysis:
    return analyse(read_recording(builder.write(tmp_path / "a.stall", end_ms)))


def test_one_tick_of_the_cron() -> None:
    analysis = analyse(read_recording(DATA / "known-call.stall"))
    (tree,) = analysis.trees.frame.to_dict("records")
    assert (tree["start_ns"], tree["duration_ns"], tree["probe"]) == (at(1001), 618 * MS, CRON)
    assert (tree["clients"], tree["stall"], tree["last_call"] - tree["first_call"]) == (5, 0, 17)
    (summary,) = summarise_trees(analysis.trees, analysis.manifest)
    assert (summary.root, summary.start_ns, summary.clients, summary.calls) == ("serverCron", 1001 * MS, 5, 17)
    assert summary.functions == (
        TreeFunction("sdsRemoveFreeSpace", 5, 590 * MS, 490 * MS),
        TreeFunction("je_pages_purge", 5, 100 * MS, 100 * MS),
        TreeFunction("clientsCron", 1, 616 * MS, 16 * MS),
        TreeFunction("clientsCronResizeQueryBuffer", 5, 600 * MS, 10 * MS),
        TreeFunction("serverCron", 1, 618 * MS, 2 * MS),
    )


def test_recursion_counts_once_and_short_roots_are_no_trees(tmp_path: Path) -> None:
    builder = Builder().span(FREE, 100, 50).span(FREE, 110, 30).span(FREE, 115, 10).span(CRON, 200, 9)
    trees = analysed(builder, tmp_path).trees
    assert trees.frame["duration_ns"].tolist() == [50 * MS]
    assert trees.functions.to_dict("records") == [
        {"tree": 0, "probe": FREE, "calls": 3, "total_ns": 50 * MS, "self_ns": 50 * MS}
    ]


def test_trees_of_other_threads_and_of_no_stall(tmp_path: Path) -> None:
    builder = Builder().span(ITERATION_ID, 1000, 100).span(CRON, 1010, 80).span(CLIENTS, 1020, 60)
    builder.span(PURGE, 1030, 40, 4096, tid=PID + 1).span(TRIM, 3000, 20)
    trees = analysed(builder, tmp_path).trees
    found = trees.frame[["tid", "probe", "stall"]].to_numpy().tolist()
    assert found == [[PID, CRON, 0], [PID + 1, PURGE, -1], [PID, TRIM, -1]]


def test_only_the_longest_are_kept_for_the_summary(tmp_path: Path) -> None:
    builder = Builder()
    for index in range(KEPT_TREES + 5):
        builder.span(CRON, index * 100, 20 + index)
    analysis = analysed(builder, tmp_path)
    assert len(analysis.trees.frame) == KEPT_TREES + 5
    summaries = summarise_trees(analysis.trees, analysis.manifest)
    assert [tree.duration_ns // MS for tree in summaries] == list(range(25, 25 + KEPT_TREES))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 60), st.sampled_from([CRON, FREE, TRIM])), max_size=40))
def test_the_self_times_of_a_tree_add_up_to_its_length(spans: list[tuple[int, int, int]]) -> None:
    """Spans that cross others are left out: calls of one thread never do."""
    builder = Builder(manifest(stall_ns=5 * MS))
    kept: list[tuple[int, int]] = []
    for start, length, probe in sorted(spans, key=lambda span: (span[0], -span[1])):
        end = start + length
        if all(end <= other[1] or start >= other[1] for other in kept):
            kept.append((start, end))
            builder.span(probe, start, length)
    with TemporaryDirectory() as place:
        trees = analysed(builder, Path(place)).trees
    own = trees.functions.groupby("tree")["self_ns"].sum()
    assert own.tolist() == trees.frame["duration_ns"].tolist()
    within = trees.functions["tree"].map(trees.frame["duration_ns"])
    assert (trees.functions["total_ns"] <= within).all()
    assert (trees.functions["self_ns"] <= trees.functions["total_ns"]).all()
    assert trees.functions["calls"].sum() == (trees.frame["last_call"] - trees.frame["first_call"]).sum()
    roots = [span for span in kept if not any(o[0] <= span[0] and span[1] <= o[1] and o != span for o in kept)]
    long_roots = {span for span in roots if span[1] - span[0] >= 5}
    assert set(zip(trees.frame["start_ns"], trees.frame["duration_ns"], strict=True)) == {
        (at(start), (end - start) * MS) for start, end in long_roots
    }
