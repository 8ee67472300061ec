"""Exact inference on rates, against scipy's own and against what follows from the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stallscope.tracer.analysis.compare import events, rates


def test_none_in_forty_minutes_is_below_four_and_a_half_an_hour() -> None:
    assert rates.upper_count(0, 0.95) / (40 / 60) == pytest.approx(4.49, abs=0.01)


@given(st.integers(0, 500), st.sampled_from([0.8, 0.95, 0.99]))
def test_bounds_of_a_count_are_those_of_its_distribution(count: int, confidence: float) -> None:
    high, low = rates.upper_count(count, confidence), rates.lower_count(count, confidence)
    assert stats.poisson.cdf(count, high) == pytest.approx(1 - confidence, abs=1e-9)
    if count:
        assert stats.poisson.sf(count - 1, low) == pytest.approx(1 - confidence, abs=1e-9)
    else:
        assert low == 0


@pytest.mark.parametrize(("one", "two"), [((31, 60.0), (2, 40.0)), ((5, 10.0), (5, 10.0)), ((0, 10.0), (9, 30.0))])
def test_equal_rates_are_tested_as_scipy_tests_them(one: tuple[int, float], two: tuple[int, float]) -> None:
    ours = rates.ratio_test(one, two)
    share = two[1] / (one[1] + two[1])
    assert ours == pytest.approx(stats.binomtest(two[0], one[0] + two[0], share).pvalue)
    # the E-test (Krishnamoorthy and Thomson 2004) is the less careful one, of the same size
    theirs = stats.poisson_means_test(two[0], two[1], one[0], one[1]).pvalue
    assert theirs <= ours + 1e-9


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0.1, 100), st.floats(0.1, 100))
def test_the_ratio_is_inside_its_bounds_and_they_agree_with_the_test(
    one: int, two: int, first: float, second: float
) -> None:
    bounds = rates.ratio_bounds((one, first), (two, second), 0.95)
    if one and two:
        assert bounds.low <= bounds.value <= bounds.high
    if one:
        # of the greatest ratio still believed, so few would be seen in 2.5% of all cases
        share = bounds.high * second / (first + bounds.high * second)
        assert stats.binom.cdf(two, one + two, share) == pytest.approx(0.025, abs=1e-6)
    else:
        assert bounds.high == math.inf


def test_clustered_events_count_as_fewer() -> None:
    plain, clustered = (rates.rate_bounds(50, 10, 0.95, factor) for factor in (1.0, 5.0))
    assert clustered.value == plain.value
    assert clustered.low < plain.low < plain.high < clustered.high
    assert rates.ratio_test((50, 10), (25, 10)) < 0.01 < rates.ratio_test((50, 10), (25, 10), 5.0)
    assert rates.exposure_for(0, 1.0, 0.95, 5.0) == pytest.approx(5 * rates.exposure_for(0, 1.0, 0.95))


def test_so_long_must_be_watched() -> None:
    needed = rates.exposure_for(2, 1 / 3600, 0.95)
    assert rates.upper_count(2, 0.95) / needed == pytest.approx(1 / 3600)
    assert rates.chance_of(2, 0.0, needed) == 1.0
    assert rates.chance_of(2, 1 / 3600, needed) == pytest.approx(0.05)


class TestEvents:
    def test_calls_of_one_root_are_one_occasion(self) -> None:
        assert events.occasions(np.arange(6), np.array([40, 40, 7, 7, 9, 9])).tolist() == [0, 0, 1, 1, 2, 2]
        assert events.occasions(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []

    def test_storms_are_parted_by_a_gap(self) -> None:
        times = np.array([0, 100, 200, 5000, 5100, 9000]) * 1_000_000
        assert events.storms(times).tolist() == [0, 0, 0, 1, 1, 2]

    def test_what_comes_all_the_time_is_no_storm(self) -> None:
        times = np.arange(600) * 100_000_000
        assert len(set(events.storms(times, events.storm_gap_ns(600, 60)).tolist())) == 600

    def test_the_cluster_factor_is_that_of_a_compound_poisson_process(self) -> None:
        random = np.random.default_rng(5)
        sizes = random.geometric(0.2, 4000)
        counts = [random.geometric(0.2, random.poisson(10)).sum() for _ in range(4000)]
        assert events.cluster_factor(sizes) == pytest.approx(np.var(counts) / np.mean(counts), rel=0.1)
        assert events.cluster_factor([]) == events.cluster_factor([1, 1, 1]) == 1.0
