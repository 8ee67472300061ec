"""The whole comparison of two recordings: what changed is found, what did not is not, and both are readable."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pairs_made import HOST, recorded, side
from rich.console import Console

from stallscope.reports import comparison_text
from stallscope.tracer.analysis.compare.changes import Change, Estimate
from stallscope.tracer.analysis.compare.comparison import Comparison, compare

STALLSCOPE = str(Path(sys.executable).with_name("stallscope"))
OFTEN = [5.0 + 4 * number for number in range(14)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made")
    recorded(made / "slow-1.stall", OFTEN, length=3.0)
    recorded(made / "slow-2.stall", [one + 1 for one in OFTEN], length=3.2)
    recorded(made / "quick-1.stall", calls_of_trim=False)
    recorded(made / "quick-2.stall", calls_of_trim=False, length=1.1)
    recorded(made / "other.stall", host={**HOST, "cpus": "64"})
    recorded(made / "longer.stall", OFTEN, stall_ns=20_000_000)
    return made


@pytest.fixture(scope="module")
def result(folder: Path) -> Comparison:
    return compare(side(folder / "slow-1.stall"), side(folder / "quick-1.stall"))


def the(result: Comparison, subject: str, quantity: str) -> Change:
    (found,) = (one for one in result.changes if (one.subject, one.quantity) == (subject, quantity))
    return found


def test_what_became_less_is_found(result: Comparison) -> None:
    for subject, quantity in (
        ("stalls", "events"),
        ("serverCron", "p50"),
        ("serverCron", "max"),
        ("serverCron", "total"),
    ):
        change = the(result, subject, quantity)
        assert change.significant, change
        assert change.high is not None
        assert change.high < 1
    assert the(result, "serverCron", "p50").ratio == pytest.approx(1 / 3, rel=0.02)


def test_what_stayed_is_not(result: Comparison) -> None:
    for quantity in ("calls", "calls/client"):
        change = the(result, "serverCron", quantity)
        assert not change.significant
        assert change.ratio == 1.0
        assert change.low is not None
        assert change.high is not None
        assert change.low <= 1.0 <= change.high


def test_an_interval_leaves_no_change_out_only_where_it_is_significant(result: Comparison) -> None:
    for change in result.changes:
        if change.low is not None and not change.significant:
            assert change.low <= 1.0 <= (change.high or 1.0)
        if change.significant:
            assert change.p_adjusted <= 0.05
            assert change.p_adjusted >= change.p_value


def test_numbers_are_those_of_the_recordings(folder: Path, result: Comparison) -> None:
    frame = side(folder / "slow-1.stall").runs[0].analysis.nested.calls
    cron = frame.loc[frame["depth"] == 0]
    change = the(result, "serverCron", "total")
    assert change.before.value == pytest.approx(cron["duration_ns"].sum() / 60)
    assert the(result, "serverCron", "self").before.value == pytest.approx(cron["self_ns"].sum() / 60)
    assert the(result, "serverCron", "max").before.value == cron["duration_ns"].max()
    assert the(result, "stalls", "events").before.n == len(OFTEN)
    assert the(result, "serverCron", "calls/client").before.value == pytest.approx(10 / 100)


def test_several_recordings_are_pooled(folder: Path) -> None:
    found = compare(
        side(folder / "slow-1.stall", folder / "slow-2.stall"), side(folder / "quick-1.stall", folder / "quick-2.stall")
    )
    assert the(found, "serverCron", "calls").before.n == 1200
    assert the(found, "serverCron", "p50").significant
    assert not any("is assumed" in note for note in found.notes)


def test_what_is_not_comparable_is_not_tested(folder: Path) -> None:
    found = compare(side(folder / "slow-1.stall"), side(folder / "longer.stall"))
    assert "--stall differs" in the(found, "stalls", "events").why_not
    assert not the(found, "stalls", "events").significant
    assert the(found, "serverCron", "p50").why_not == ""
    assert compare(side(folder / "slow-1.stall"), side(folder / "other.stall")).headline.startswith("Not comparable: ")


def test_a_function_that_was_not_needed_is_said_to_be(result: Comparison) -> None:
    assert any("sdsRemoveFreeSpace was not called, although" in note for note in result.notes)
    assert the(result, "sdsRemoveFreeSpace", "calls").ratio == 0.0
    assert the(result, "sdsRemoveFreeSpace", "calls").significant


def test_distributions_come_along_for_a_page(result: Comparison) -> None:
    (found,) = (one for one in result.distributions if one.subject == "serverCron")
    shares, lengths = zip(*found.before.points, strict=True)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert list(lengths) == sorted(lengths)
    assert (found.before.n, found.after.n) == (600, 600)


@pytest.mark.parametrize("width", [80, 120])
def test_the_text_fits_the_terminal(result: Comparison, width: int) -> None:
    file = io.StringIO()
    comparison_text.render(result, Console(file=file, width=width))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    text = file.getvalue()
    assert "\n".join(lines[:2]).replace("\n", " ").startswith(result.headline[:60])
    (row,) = [line.split() for line in text.split("\nserverCron\n")[1].split("\n\n")[0].splitlines() if "p50" in line]
    assert row[-1] == "600+600"
    assert comparison_text.NONE in text


def test_the_command_prints_the_same_as_json_and_ends_with_3_where_nothing_is_comparable(folder: Path) -> None:
    words = [STALLSCOPE, "diff", str(folder / "slow-*.stall"), str(folder / "other.stall"), "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    document = json.loads(done.stdout)
    assert [Path(run["path"]).name for run in document["before"]] == ["slow-1.stall", "slow-2.stall"]
    assert document["obstacles"][0]["kind"] == "host"


def test_a_pattern_that_fits_nothing_is_one_line(folder: Path) -> None:
    done = subprocess.run([STALLSCOPE, "diff", str(folder / "no*.stall"), "x"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no file fits" in done.stderr


def test_rates_of_one_change_are_in_one_unit() -> None:
    before, after = (Estimate(per_s, None, None, 1, 1.0) for per_s in (1.44, 0.2))
    none = Estimate(0.0, None, None, 0, 0.0)
    for pair, said in (((before, after), ["5,184/h", "720/h"]), ((before, none), ["86.4/min", "0/min"])):
        change = Change("serverCron", "calls", "1/s", *pair, None, None, None, 1.0, 1.0, 1.0, False, "exact")
        assert [comparison_text.value_text(one, change) for one in pair] == said
