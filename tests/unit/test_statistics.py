"""The simulations of tests/statistics, fewer of them: diff and verify are wrong at most as often as they say.

``make statistics`` runs thousands of each kind and writes docs/power.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulated import simulate

from check import diff_false_alarms, diff_power, reduced_shares, verify_shares  # isort: skip  # by simulated's path


@pytest.mark.parametrize("name", ["steady ticks", "a storm every 5-30 s", "storms and drift"])
def test_diff_finds_nothing_where_nothing_is(name: str) -> None:
    _, marked, anything = diff_false_alarms(simulate.PROCESSES[name], 60, 1, 12, 0.1)
    assert marked.runs == 12 * 7
    assert not marked.is_too_often
    assert anything.hits <= 1


def test_diff_finds_what_is_there() -> None:
    process = simulate.PROCESSES["storms and drift"]
    found = diff_power(process, replace(process, scale=0.2), 60, 5)
    assert found["p50"].hits == 5
    # storms make up most of the total, and come at another rate each time
    assert found["total"].hits >= 3
    assert found["calls"].hits == 0


@pytest.mark.parametrize("how", simulate.STALLS_BY)
def test_verify_says_verified_at_most_in_five_percent_above_the_limit(how: str) -> None:
    for expected in (3.5, 10):
        verified, _ = verify_shares(how, 1.0, expected, 200, with_baseline=True)
        assert not verified.is_too_often, (how, expected, verified)


def test_verify_says_verified_where_the_rate_is_far_below() -> None:
    verified, not_verified = verify_shares("independent", 0.1, 10, 100, with_baseline=True)
    assert (verified.hits > 90, not_verified.hits) == (True, 0)


def test_a_rate_that_was_only_halved_is_not_verified_as_less() -> None:
    assert not reduced_shares("in storms of 5", 0.5, 30, 200).is_too_often
    assert reduced_shares("independent", 0.02, 30, 50).hits > 45
