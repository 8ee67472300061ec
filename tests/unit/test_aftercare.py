"""After a capture: findings, page and command in the background; what fails or hangs is told and ended."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from recordings import DATA

from stallscope.tracer.recording import read_recording
from stallscope.tracer.watch import aftercare
from stallscope.tracer.watch.aftercare import MAX_WAITING, Aftercare, AfterResult
from stallscope.tracer.watch.writer import Finished


def capture(folder: Path, name: str = "capture-000001-Z.stall") -> Finished:
    path = folder / name
    shutil.copy(DATA / "known-call.stall", path)
    found = read_recording(path)
    return Finished(path, True, found.manifest.triggers, found.manifest.started_ns, found.ended_ns, 1, 1)


def results(care: Aftercare, count: int) -> list[AfterResult]:
    """Wait for so many results."""
    found: list[AfterResult] = []
    limit = time.monotonic() + 120
    while len(found) < count and time.monotonic() < limit:
        with care._condition:
            care._condition.wait(0.2)
        found += care.take_results()
    assert len(found) == count, found
    return found


@pytest.fixture
def without_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    """The analysis in the child is another program that prints a document, and costs nothing."""
    monkeypatch.setattr(aftercare, "_COMMAND_LINE", ("/bin/sh", "-c", 'echo \'{"verdict": "v", "findings": []}\''))


def test_a_folder_named_from_here_is_found_by_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captures").mkdir()
    care = Aftercare('cat > document; cd /; cat "$STALLSCOPE_CAPTURE" > /dev/null', report=True)
    care.submit(capture(Path("captures")))
    assert [(step.step, step.text) for step in results(care, 3)] == [
        ("report", "done"),
        ("summary", "done"),
        ("exec", "done"),
    ]
    document = json.loads((tmp_path / "document").read_text())
    assert document["capture"] == str(tmp_path / "captures" / "capture-000001-Z.stall")
    assert Path(document["report"]).is_file()
    care.close()


def test_the_command_gets_path_findings_and_summary_on_stdin(tmp_path: Path) -> None:
    wanted = tmp_path / "out.json"
    care = Aftercare(f'cat > {wanted}; printf %s "$STALLSCOPE_CAPTURE" > {wanted}.path', report=True)
    done = capture(tmp_path)
    care.submit(done)
    steps = results(care, 3)
    assert [(step.step, step.ok, step.text) for step in steps] == [
        ("report", True, "done"),
        ("summary", True, "done"),
        ("exec", True, "done"),
    ]
    document = json.loads(wanted.read_text())
    assert document["capture"] == str(done.path)
    assert document["complete"] is True
    assert document["report"] == str(tmp_path / "capture-000001-Z.html")
    assert "Redis was blocked for 620 ms" in document["verdict"]
    assert document["findings"]
    assert document["findings"] == document["summary"]["findings"]
    assert document["triggers"] == []
    assert Path(f"{wanted}.path").read_text() == str(done.path)
    assert Path(document["report"]).read_text().startswith("<!DOCTYPE html>")
    care.close()


def test_a_capture_that_cannot_be_read_is_told_and_the_command_still_runs(tmp_path: Path) -> None:
    wanted = tmp_path / "out.json"
    care = Aftercare(f"cat > {wanted}")
    path = tmp_path / "capture-000001-Z.stall"
    path.write_bytes(b"torn")
    care.submit(Finished(path, False, (), 0, 1, 0, 4, error="the disk was full"))
    first, second = results(care, 2)
    assert (first.step, first.ok, first.text) == ("summary", False, "ended with exit code 2")
    assert (second.step, second.ok) == ("exec", True)
    document = json.loads(wanted.read_text())
    assert (document["complete"], document["summary"], document["verdict"]) == (False, None, None)
    care.close()


@pytest.mark.usefixtures("without_analysis")
def test_a_command_that_fails_is_told(tmp_path: Path) -> None:
    for command, text in (
        ("exit 3", "ended with exit code 3"),
        ("kill -TERM $$", "killed by SIGTERM"),
        ("nonsense-of-a-command", "ended with exit code 127"),
    ):
        care = Aftercare(command)
        care.submit(capture(tmp_path))
        last = results(care, 2)[-1]
        assert (last.step, last.ok, last.text) == ("exec", False, text)
        care.close()


@pytest.mark.usefixtures("without_analysis")
def test_a_command_that_does_not_read_its_input_is_fine(tmp_path: Path) -> None:
    care = Aftercare("exec true")
    care.submit(capture(tmp_path))
    assert results(care, 2)[-1].ok
    care.close()


@pytest.mark.usefixtures("without_analysis")
def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    care = Aftercare(f"sleep 1000 & echo $! > {pid}; wait", command_ns=500_000_000)
    care.submit(capture(tmp_path))
    last = results(care, 2)[-1]
    assert (last.ok, last.text) == (False, "killed: it took more than 500 ms")
    child = int(pid.read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    care.close()


@pytest.mark.usefixtures("without_analysis")
def test_submitting_never_waits_and_what_is_too_much_is_told(tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    care = Aftercare(f"read line < {go}")
    submitted = [capture(tmp_path, f"capture-{number:06d}-Z.stall") for number in range(1, MAX_WAITING + 5)]
    care.submit(submitted[0])
    (first,) = results(care, 1)
    assert first.step == "summary"  # the first one's command is about to wait
    for item in submitted[1:]:
        care.submit(item)
    passed = results(care, 3)
    assert [result.capture for result in passed] == [item.path for item in submitted[1:4]]
    assert {result.text for result in passed} == {"passed over: captures come faster than they are worked up"}
    care.close(0.0)
    assert care.take_results()[-1].ok is False


def test_nothing_is_run_where_nothing_is_wanted(tmp_path: Path) -> None:
    care = Aftercare()
    care.submit(capture(tmp_path))
    care.command = "true"
    care.submit(Finished(None, False, (), 0, 0, 0, 0, error="nothing was written"))
    assert care._thread is None
    care.close()
    assert care.take_results() == []
