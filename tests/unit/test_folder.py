"""The folder of captures: bounds, order, leftovers, a full disk, one watch at a time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import DATA, ITERATION_ID, MS, PURGE, Builder
from watch_replay import watch

from stallscope.tracer.errors import UsageError
from stallscope.tracer.recording import read_recording
from stallscope.tracer.watch.captures import STARTED
from stallscope.tracer.watch.folder import CaptureFolder

WALL_NS = 1_790_000_000 * 10**9


def put(folder: CaptureFolder, size: int, *, wall_ns: int = WALL_NS, report: int = 0) -> Path:
    """Put a capture of so many bytes into the folder, as a writer does."""
    place = folder.new_place(wall_ns)
    folder.make_room(place, size)
    place.temporary.write_bytes(b"x" * size)
    path = folder.publish(place)
    if report:
        path.with_suffix(".html").write_bytes(b"x" * report)
    return path


def test_names_tell_number_and_time_and_are_in_order_when_the_clock_is_not(tmp_path: Path) -> None:
    folder = CaptureFolder(tmp_path, 10, 1000)
    first = put(folder, 1)
    second = put(folder, 1, wall_ns=WALL_NS - 86_400 * 10**9)
    assert first.name == "capture-000001-20260921T141320Z.stall"
    assert second.name == "capture-000002-20260920T141320Z.stall"
    assert [kept.path for kept in folder.kept()] == [first, second]
    folder.close()
    again = CaptureFolder(tmp_path, 10, 1000)
    assert again.new_place(WALL_NS).number == 3, "numbers go on after a restart"


def test_the_oldest_go_first_with_what_was_made_of_them(tmp_path: Path) -> None:
    (tmp_path / "mine.stall").write_bytes(b"x" * 5000)
    (tmp_path / "capture-notes.txt").write_text("keep")
    folder = CaptureFolder(tmp_path, 3, 1000)
    put(folder, 100, report=50)
    kept = [put(folder, 200), put(folder, 200), put(folder, 200)]
    assert [item.path for item in folder.kept()] == kept
    assert folder.removed == 1
    last = put(folder, 900)
    assert [item.path for item in folder.kept()] == [last], "the disk bound"
    assert (tmp_path / "mine.stall").exists(), "other files are nobody's business"
    assert (tmp_path / "capture-notes.txt").exists()
    assert not list(tmp_path.glob("*.html"))


def test_one_that_is_larger_than_the_bound_alone_does_not_fit(tmp_path: Path) -> None:
    folder = CaptureFolder(tmp_path, 3, 1000)
    put(folder, 100)
    place = folder.new_place(WALL_NS)
    assert folder.make_room(place, 500)
    assert not folder.make_room(place, 1001)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 700), max_size=12), st.integers(1, 5), st.integers(700, 2000))
def test_bounds_hold_and_only_the_oldest_are_missing(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], number: int, bound: int
) -> None:
    folder = CaptureFolder(tmp_path_factory.mktemp("folder"), number, bound)
    paths = []
    for size in sizes:
        paths.append(put(folder, size))
        kept = folder.kept()
        assert len(kept) <= number
        assert sum(item.size_bytes for item in kept) <= bound
        assert [item.path for item in kept] == paths[len(paths) - len(kept) :]
    assert folder.removed == len(sizes) - len(folder.kept())
    folder.close()


def test_leftovers_of_a_kill_are_finished_kept_as_cut_short_or_removed(tmp_path: Path) -> None:
    whole = tmp_path / ".capture-000004-20260921T135320Z.stall.part"
    torn = tmp_path / ".capture-000005-20260921T135321Z.stall.part"
    begun = tmp_path / ".capture-000006-20260921T135322Z.stall.part"
    whole.write_bytes((DATA / "known-call.stall").read_bytes())
    torn.write_bytes((DATA / "known-call.stall").read_bytes()[:-3000])
    begun.write_bytes(b"half a header")
    folder = CaptureFolder(tmp_path, 10, 10**9)
    names = [item.path.name for item in folder.kept()]
    assert names == ["capture-000004-20260921T135320Z.stall", "capture-000005-20260921T135321Z.cut-short.stall"]
    assert [read_recording(tmp_path / name).complete for name in names] == [True, False]
    assert not list(tmp_path.glob(".*.part"))
    assert folder.recovered == [
        "capture-000004-20260921T135320Z.stall: was complete, and has its name now",
        "capture-000005-20260921T135321Z.cut-short.stall: was cut short and is kept so",
        "capture-000006-20260921T135322Z.stall: was begun and held nothing; it was removed",
    ]
    assert folder.new_place(WALL_NS).number == 6


def test_one_folder_one_watch(tmp_path: Path) -> None:
    folder = CaptureFolder(tmp_path, 3, 1000)
    with pytest.raises(UsageError, match=r"another stallscope watch writes to .*; choose another folder with -o"):
        CaptureFolder(tmp_path, 3, 1000)
    folder.close()
    CaptureFolder(tmp_path, 3, 1000).close()


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write captures to"):
        CaptureFolder(tmp_path / "file" / "captures", 3, 1000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path]).returncode:
        pytest.skip("mounting a small file system needs root and CAP_SYS_ADMIN")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_is_said_the_beginning_is_kept_and_watching_goes_on(small_disk: Path) -> None:
    made = watch(small_disk, before=500, after=1000, cooldown=0)
    builder = Builder()
    for step in range(8000):
        builder.span(PURGE, step, 0.4, 1)
    builder.span(ITERATION_ID, 1000, 60).span(ITERATION_ID, 5000, 60)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 150_000)
    events = builder.events()
    made.play(events, 4000)
    (failed,) = made.finished
    assert not failed.complete
    assert "No space left on device" in failed.error
    assert "\n" not in failed.error
    assert failed.path is not None, "what was written before the disk was full is worth keeping"
    assert failed.path.name.endswith(".cut-short.stall")
    assert [item.text for item in read_recording(failed.path).manifest.triggers] == ["stall>50ms"]
    assert sorted(path.name for path in small_disk.glob("capture-*")) == [failed.path.name]
    assert not list(small_disk.glob(".*.part"))
    filler.unlink()
    failed.path.unlink()
    made.play(events, 8000, from_ms=4000)
    _, done = made.end()
    assert done.complete
    assert done.path is not None
    assert read_recording(done.path).complete
    assert [outcome for _, outcome in made.outcomes].count(STARTED) == 2
    made.folder.close()


def test_the_disk_bound_ends_a_capture_and_keeps_its_beginning(tmp_path: Path) -> None:
    made = watch(tmp_path, before=500, after=4000, max_bytes=60_000)
    builder = Builder().span(ITERATION_ID, 1000, 60)
    for step in range(6000):
        builder.span(PURGE, step, 0.4, 1)
    made.play(builder.events(), 6000)
    (done,) = made.end()
    assert not done.complete
    assert done.error == "the capture alone reached --max-disk"
    assert done.path is not None
    assert done.triggers[0].time_ns - done.started_ns >= 500 * MS
    assert read_recording(done.path).table.num_rows > 0
