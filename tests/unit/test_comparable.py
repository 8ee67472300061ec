"""What must not be compared is named, with its remedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pairs_made import CRON, HOST, PROBES, TRIM, recorded, side, told
from recordings import DATA

from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.compare import comparable
from stallscope.tracer.analysis.compare.comparable import Obstacle, obstacles, who_does_it_now, why_silent
from stallscope.tracer.analysis.compare.sides import STALLS, Side, make_side
from stallscope.tracer.manifest import Note, ProbeCounters

Made = Callable[..., list[Obstacle]]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Side:
    return side(recorded(tmp_path_factory.mktemp("made") / "before.stall", [10.0]))


@pytest.fixture
def against(ordinary: Side, tmp_path: Path) -> Made:
    """Return what makes a recording incomparable with an ordinary one."""

    def made(**changes: Any) -> list[Obstacle]:
        return obstacles(ordinary, side(recorded(tmp_path / "after.stall", [10.0], **changes)))

    return made


def the_only(found: list[Obstacle], kind: str) -> Obstacle:
    assert [one.kind for one in found] == [kind], found
    return found[0]


def probes(**changes: str) -> tuple[Any, ...]:
    """Return the probe list with the trim's probe changed."""
    return tuple(replace(probe, **changes) if probe.id == TRIM else probe for probe in PROBES)


def test_like_recordings_are_comparable(against: Made) -> None:
    assert against() == []


@pytest.mark.parametrize(
    ("changes", "option", "subject"),
    [
        ({"min_duration_ns": 1_000_000}, "--min-duration differs: 0 ns in", "serverCron"),
        ({"stall_ns": 20_000_000}, "--stall differs: 10.0 ms in", "stalls"),
        ({"sample_ns": 5_000_000}, "--sample differs: 10.0 ms in", "overflows"),
    ],
)
def test_thresholds(against: Made, changes: dict[str, Any], option: str, subject: str) -> None:
    found = the_only(against(**changes), comparable.THRESHOLDS)
    assert found.text.startswith(option)
    assert found.touches(subject)
    assert not found.touches("something else")


def test_rungs_of_what_is_measured(against: Made) -> None:
    found = the_only(
        against(rungs={"functions": "uprobe", "event loop": "not measured", "listener": "sampled every 10 ms"}),
        comparable.RUNGS,
    )
    assert found.text.startswith("event loop: measured by raw tracepoint before, by not measured after")
    assert found.touches(STALLS)


def test_a_function_measured_elsewhere(against: Made) -> None:
    found = the_only(against(probes=probes(note="inlined into clientsCron: it has no symbol")), comparable.PROBES)
    assert found.text.startswith("sdsRemoveFreeSpace was measured elsewhere after: inlined into clientsCron")


def test_other_probes(tmp_path: Path) -> None:
    fewer = tuple(probe for probe in PROBES if probe.name != "freeClient")
    before = side(recorded(tmp_path / "before.stall"))
    after = side(recorded(tmp_path / "after.stall", probes=fewer))
    assert the_only(obstacles(before, after), comparable.PROBES).text.startswith(
        "freeClient was traced before and not after"
    )
    assert the_only(obstacles(after, before), comparable.PROBES).text.startswith(
        "freeClient was traced after and not before"
    )


def test_losses(against: Made) -> None:
    lost = {CRON: ProbeCounters(hits=610, sent=600, lost=10)}
    found = the_only(against(counters=lost), comparable.LOSSES)
    assert "lost events: 10 of serverCron" in found.text
    assert found.touches("anything")


def test_calls_that_are_not_in_the_file(against: Made) -> None:
    found = the_only(against(counters={CRON: ProbeCounters(hits=607, sent=607)}), comparable.LOSSES)
    assert "lacks 7 calls that the kernel sent" in found.text


def test_a_recording_that_was_cut_short(against: Made) -> None:
    assert comparable.CUT_SHORT in [one.kind for one in against(complete=False)]


@pytest.mark.parametrize(
    ("key", "value", "told_as"),
    [
        ("connected_clients_end", "300", "100.0 clients before, 200.0 after"),
        ("total_connections_received_end", "2800", "20.0 connections/s before, 30.0 after"),
        ("total_commands_processed_end", "17000", "500.0 commands/s before, 200.0 after"),
    ],
)
def test_load_outside_the_band(against: Made, key: str, value: str, told_as: str) -> None:
    found = the_only(against(info={key: value}), comparable.LOAD)
    assert told_as in found.text
    assert "outside the band of 25%" in found.text


def test_load_inside_the_band(against: Made) -> None:
    assert against(info={"connected_clients": "120", "connected_clients_end": "120"}) == []


@pytest.mark.parametrize(
    ("key", "value"), [("machine", "aarch64"), ("cpus", "64"), ("cpu", "Another CPU"), ("kernel", "6.12.1")]
)
def test_another_host_class(against: Made, key: str, value: str) -> None:
    found = the_only(against(host={**HOST, key: value}), comparable.HOST)
    assert value[:4] in found.text


def test_another_patch_of_the_same_kernel_is_no_other_class(against: Made) -> None:
    assert against(host={**HOST, "kernel": "6.1.0-30-amd64"}) == []


def test_nothing_traced(tmp_path: Path) -> None:
    one = side(recorded(tmp_path / "one.stall"))
    made = side(recorded(tmp_path / "two.stall"))
    manifest = replace(made.runs[0].analysis.manifest, targets=())
    recording = replace(made.runs[0].analysis.recording, manifest=manifest)
    found = obstacles(one, make_side([analyse(recording)]))
    assert comparable.NOTHING in [each.kind for each in found]


class TestSilence:
    """A function that fired before and does not after is no fix, unless it is known why."""

    def test_where_its_caller_ran_and_calls_it_it_was_not_needed(self, tmp_path: Path) -> None:
        before = side(recorded(tmp_path / "before.stall"))
        after = side(recorded(tmp_path / "after.stall", calls_of_trim=False))
        assert obstacles(before, after) == []
        assert why_silent(after, "sdsRemoveFreeSpace") == (
            "sdsRemoveFreeSpace was not called, although clientsCronResizeQueryBuffer, whose code calls it, "
            "ran 600 times"
        )

    def test_in_a_release_where_the_work_moved_it_says_who_does_it_now(self, against: Made) -> None:
        found = the_only(against(version="8.0.1", calls_of_trim=False), comparable.SILENT)
        assert found.text.startswith("sdsRemoveFreeSpace never fired after and 600 times before, which is not a fix")
        assert "since redis 8.0 sdsfree does that work" in found.text

    def test_of_another_symbol_nothing_is_believed(self, against: Made) -> None:
        made = probes(symbol="sdsResize", note="in redis 6.2 it is sdsResize")
        found = the_only(against(probes=made, version="6.2", calls_of_trim=False), comparable.SILENT)
        assert "sdsResize may do that work" in found.text

    def test_a_function_that_is_gone_is_told_by_the_recorders_note(self, tmp_path: Path) -> None:
        text = "sdsRemoveFreeSpace is not traced in process 4711: redis 9 has no sdsRemoveFreeSpace"
        gone = tuple(probe for probe in PROBES if probe.id != TRIM)
        before = side(recorded(tmp_path / "before.stall"))
        made = recorded(tmp_path / "after.stall", calls_of_trim=False, probes=gone, notes=(Note(1, text),))
        found = the_only(obstacles(before, side(made)), comparable.SILENT)
        assert found.text.startswith("sdsRemoveFreeSpace fired 600 times before and was not traced after")
        assert text in found.text

    def test_a_function_inlined_into_another_is_told_by_that_ones_probe(self, tmp_path: Path) -> None:
        note = "also stands for sdsRemoveFreeSpace: inlined into clientsCron"
        made = tuple(replace(probe, note=note) if probe.name == "clientsCron" else probe for probe in PROBES)
        after = side(recorded(tmp_path / "a.stall", probes=tuple(probe for probe in made if probe.id != TRIM)))
        assert who_does_it_now(after, "sdsRemoveFreeSpace").startswith(f"clientsCron {note}")

    def test_an_unknown_function_is_left_to_the_probes_command(self, tmp_path: Path) -> None:
        assert "stallscope probes tells" in who_does_it_now(side(recorded(tmp_path / "a.stall")), "noSuchFunction")


def test_the_golden_recordings_that_lack_something_are_refused() -> None:
    kinds = {
        name: {one.kind for one in comparable.unsound(side(DATA / f"{name}.stall"), "after")}
        for name in ("known-call", "cut-short", "with-losses")
    }
    assert kinds["known-call"] == set()
    assert comparable.CUT_SHORT in kinds["cut-short"]
    assert kinds["with-losses"] == {comparable.LOSSES}


def test_the_load_of_a_side_is_weighted_by_time(tmp_path: Path) -> None:
    one = recorded(tmp_path / "one.stall")
    two = recorded(tmp_path / "two.stall", info={"connected_clients": "400", "connected_clients_end": "400"})
    assert side(one, two).mean("clients") == 250
    assert told().targets[0].info["connected_clients"] == "100"
