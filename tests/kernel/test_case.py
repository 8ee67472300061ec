"""The case in its shortest form: one variant before and one after, recorded, asked about and measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from case import record
from case.examine import examine
from case.memory import measure
from case.steps import load_steps
from tracing import built

RUN = Path(record.__file__).with_name("run.py")
CLIENTS = 200
STORY = """
[variant.before]
about = "as it was"
build = "2.8.17"
recipe = "little"
load = { attach = 1 }
wait_for = "attached"
runs = 1

[variant.after]
about = "the fix"
build = "5.0.6"
recipe = "little"
load = { attach = 1 }
wait_for = "attached"
runs = 1

[memory]
builds = []
clients = 1
value_bytes = []
runs = 1

[question.difference]
words = ["diff", "{all:before}", "{typical:after}"]
status = [0, 3]
"""


@pytest.fixture(scope="module", autouse=True)
def possible() -> None:
    for build in ("2.8.17", "2.8.17-patched", "5.0.6"):
        built(build)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("case")


def run_file(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), "--steps", str(folder / "steps.toml"), *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, "STALLSCOPE_CASE": str(folder)}
    )


@pytest.fixture(scope="module")
def document(folder: Path) -> dict[str, Any]:
    (folder / "steps.toml").write_text(STORY, encoding="utf-8")
    done = run_file(folder, "record")
    assert done.returncode == 0, done.stderr
    return examine(load_steps(folder / "steps.toml"), folder, lambda _: None)


class TestRecorded:
    def test_the_old_server_trims_the_uploaders_and_refuses_connections(self, document: dict[str, Any]) -> None:
        (run,) = document["variants"]["before"]["runs"]
        assert run["trims"] >= document["variants"]["before"]["load"]["uploaders"]
        assert 0 < run["refused"] <= run["counted"]
        assert run["tick_max_ns"] >= run["trim_max_ns"] > 0
        assert (run["lost"], run["incomplete"]) == (0, 0)

    def test_the_new_server_trims_as_well_and_faster(self, document: dict[str, Any]) -> None:
        (before,), (after,) = (document["variants"][name]["runs"] for name in ("before", "after"))
        assert after["trims"] > 0
        assert after["trim_p50_ns"] < before["trim_max_ns"]
        assert document["variants"]["after"]["version"] == "5.0.6"

    def test_the_recording_ends_before_the_clients_leave(self, document: dict[str, Any], folder: Path) -> None:
        for name in ("before", "after"):
            made = json.loads((folder / name / "1.made.json").read_text())
            assert "(SIGINT)" in made["said"]
            summary = json.loads((folder / name / "1.summary.json").read_text())
            assert int(summary["targets"][0]["info"]["connected_clients_end"]) > document["variants"][name]["held"]

    def test_the_question_is_asked_as_a_user_would(self, document: dict[str, Any]) -> None:
        asked = document["questions"]["difference"]
        assert asked["command"] == "stallscope diff 'before/*.stall' after/1.stall"
        assert asked["output"]
        assert {change["subject"] for change in asked["json"]["changes"]} >= {"sdsRemoveFreeSpace"}

    def test_what_is_recorded_is_not_recorded_again(self, document: dict[str, Any], folder: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.stall")}
        done = run_file(folder, "record")
        assert (done.returncode, done.stderr) == (0, "")
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.stall")} == before
        assert run_file(folder, "list").stdout.splitlines()[0].split()[:4] == ["before", "1", "of", "1"]


class TestMemory:
    def test_the_patch_keeps_every_small_buffer_and_the_old_server_none(self) -> None:
        old, patched = (measure(build, CLIENTS, 10_000, 1) for build in ("2.8.17", "2.8.17-patched"))
        assert (old.settled.clients, patched.settled.clients) == (CLIENTS, CLIENTS)
        assert (old.settled.full_buffers, patched.settled.full_buffers) == (0, CLIENTS)
        assert patched.settled.buffer_bytes == CLIENTS * 32_768
        kept = patched.settled.used_bytes - old.settled.used_bytes
        assert kept > patched.settled.buffer_bytes
