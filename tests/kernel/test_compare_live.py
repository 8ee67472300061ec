"""The same server recorded twice for real: comparable, and no false alarm. More pairs: make statistics-lab."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lab.recipes import RECIPES
from lab.server import Server, running_server
from tracing import STALLSCOPE, built

sys.path.append(str(Path(__file__).resolve().parents[1] / "statistics"))

from storms import storms

SECONDS = 8


def record(server: Server, path: Path) -> None:
    words = [STALLSCOPE, "record", "-p", str(server.pid), "-d", f"{SECONDS}s", "-q", "-o", str(path)]
    subprocess.run(words, check=True, capture_output=True)


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    built("2.8.17")
    folder = tmp_path_factory.mktemp("twice")
    paths = [folder / "before.stall", folder / "after.stall"]
    with (
        running_server("2.8.17", backlog=RECIPES["quiet"].backlog) as server,
        storms(server.port, uploaders=0, idle=100, connections_per_s=20),
    ):
        for path in paths:
            record(server, path)
    return paths


def test_nothing_is_found_where_nothing_changed(twice: list[Path]) -> None:
    done = subprocess.run([STALLSCOPE, "diff", *map(str, twice), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["obstacles"] == []
    assert [one for one in document["changes"] if one["significant"]] == []
    clients = [run["clients"] for side in ("before", "after") for run in document[side]]
    # the recorder's own question, the idle ones, and at times a short one
    assert all(101 <= number <= 103 for number in clients)
    (cron,) = (one for one in document["changes"] if (one["subject"], one["quantity"]) == ("serverCron", "calls"))
    assert cron["before"]["n"] > 0
    assert cron["low"] <= 1 <= cron["high"]


def test_none_seen_is_enough_for_one_claim_and_not_for_another(twice: list[Path]) -> None:
    words = [STALLSCOPE, "verify", str(twice[1]), "--max", "serverCron<100s", "--json"]
    enough = subprocess.run([*words, "--rate", "2/s"], capture_output=True, text=True)
    short = subprocess.run([*words, "--rate", "1/h"], capture_output=True, text=True)
    assert (enough.returncode, short.returncode) == (0, 3), enough.stdout + short.stdout
    assert json.loads(short.stdout)["more_s"] > 10_000
