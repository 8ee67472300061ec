"""The test against chance: tiny where overflows lie in stalls, uniform where they have nothing to do with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from recordings import DATA, MS

from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.chance import FEWEST_STEPS, MOST_STEPS, Coincidence, Series, compare_with_chance
from stallscope.tracer.recording import read_recording

LENGTH_NS = 10_000 * MS
TRIALS = 400


def series(stalls: list[tuple[float, float]], overflows: list[tuple[float, int]]) -> Series:
    """Return a series from (start, length) of stalls in ms and (time in ms, count) of overflows."""
    begin = np.array([start * MS for start, _ in stalls], np.int64)
    length = np.array([length * MS for _, length in stalls], np.int64)
    return Series(
        begin,
        begin + length,
        np.array([time * MS for time, _ in overflows], np.int64),
        np.array([count for _, count in overflows], np.int64),
    )


def compared(*processes: Series, length_ns: int = LENGTH_NS) -> Coincidence:
    result = compare_with_chance(processes, 0, length_ns)
    assert result is not None
    return result


def test_one_burst_in_one_stall_is_worth_as_much_as_the_stall_is_short() -> None:
    result = compared(series([(5000, 500)], [(5200, 10), (5201, 5)]))
    assert (result.overflows, result.together, result.stalls) == (15, 15, 1)
    assert result.p_value == pytest.approx(0.05, abs=0.001)
    assert result.expected == pytest.approx(15 * 0.05, rel=0.01)
    assert result.stall_share == pytest.approx(0.05, abs=0.001)


def test_it_is_what_trying_every_shift_gives() -> None:
    random = np.random.default_rng(3)
    stalls = [(float(start), 40.0) for start in np.sort(random.choice(240, 12, replace=False)) * 40]
    overflows = [(float(random.uniform(0, 9990)), int(random.integers(1, 9))) for _ in range(60)]
    result = compared(series(stalls, overflows))
    steps = result.shifts
    stalled = np.zeros(steps, np.int64)
    weight = np.zeros(steps, np.int64)
    for start, length in stalls:
        stalled[int(start / 10_000 * steps) : int((start + length) / 10_000 * steps) + 1] = 1
    for time, count in overflows:
        weight[int(time / 10_000 * steps)] += count
    tried = np.array([int(np.roll(stalled, shift) @ weight) for shift in range(steps)])
    assert result.together == tried[0]
    assert result.p_value == np.count_nonzero(tried >= tried[0]) / steps
    assert result.expected == pytest.approx(tried.mean())


def test_bursts_in_most_stalls_are_no_chance() -> None:
    times = np.cumsum(np.random.default_rng(1).integers(100, 700, 20))
    length_ns = int(times[-1] + 500) * MS
    inside = series([(float(time), 30.0) for time in times], [(float(time) + 20, 9) for time in times])
    result = compared(inside, length_ns=length_ns)
    assert result.together == result.overflows == 180
    assert result.p_value < 0.01
    assert result.expected < 30


def test_p_is_uniform_where_the_series_are_independent() -> None:
    """Of 400 independent pairs the share with p at or below q is q, within four standard deviations."""
    random = np.random.default_rng(20240607)
    p_values = []
    for _ in range(TRIALS):
        stalls = np.cumsum(random.exponential(200, 40)) + random.uniform(0, 200)
        bursts = np.repeat(random.uniform(0, 10_000, 40), 3) + random.uniform(0, 15, 120)
        one = series(
            [(float(start), float(random.uniform(20, 120))) for start in stalls if start < 9_800],
            [(float(time) % 10_000, 1) for time in bursts],
        )
        p_values.append(compared(one).p_value)
    for share in (0.05, 0.1, 0.25, 0.5, 0.75, 0.9):
        found = np.mean(np.array(p_values) <= share)
        assert abs(found - share) <= 4 * math.sqrt(share * (1 - share) / TRIALS) + 1 / FEWEST_STEPS


def test_with_one_stall_and_one_burst_p_is_never_too_small() -> None:
    """Ties make it larger than uniform, never smaller."""
    random = np.random.default_rng(7)
    p_values = np.array(
        [
            compared(series([(float(random.uniform(0, 9000)), 700)], [(float(random.uniform(0, 10_000)), 50)])).p_value
            for _ in range(TRIALS)
        ]
    )
    for share in (0.05, 0.1, 0.5):
        assert np.mean(p_values <= share) <= share + 4 * math.sqrt(share * (1 - share) / TRIALS)


def test_processes_are_shifted_together() -> None:
    one, other = series([(1000, 500)], [(1200, 4)]), series([(7000, 500)], [(7300, 6)])
    result = compared(one, other)
    assert (result.overflows, result.together, result.stalls) == (10, 10, 2)
    assert result.stall_share == pytest.approx(0.05, abs=0.001)
    # each burst is inside for as long as its stall lasts: together for 500 - 100 ms of shifts
    assert result.p_value == pytest.approx(0.04, abs=0.001)


def test_there_is_nothing_to_compare_without_stalls_overflows_or_time() -> None:
    assert compare_with_chance([], 0, LENGTH_NS) is None
    assert compare_with_chance([series([(1, 10)], [])], 0, LENGTH_NS) is None
    assert compare_with_chance([series([], [(1, 10)])], 0, LENGTH_NS) is None
    assert compare_with_chance([series([(1, 10)], [(1, 10)])], 5, 5) is None


@pytest.mark.parametrize(("length_ns", "steps"), [(MS, FEWEST_STEPS), (60_000 * MS, 65_536), (10**15, MOST_STEPS)])
def test_the_number_of_shifts_is_bounded(length_ns: int, steps: int) -> None:
    result = compared(series([(0.1, 0.5)], [(0.2, 3)]), length_ns=length_ns)
    assert (result.shifts, result.together) == (steps, 3)
    assert 1 / steps <= result.p_value <= 1


def test_times_outside_the_recording_do_no_harm() -> None:
    result = compared(series([(-50, 100), (9_990, 100)], [(-5, 1), (20_000, 2)]))
    assert (result.overflows, result.together) == (3, 3)


def test_the_golden_incident_is_not_called_certain() -> None:
    """One stall of 620 ms in 4 s and one burst in it: they meet by chance in one case of eight."""
    coincidence = analyse(read_recording(DATA / "known-call.stall")).blame.coincidence
    assert coincidence is not None
    assert (coincidence.overflows, coincidence.together, coincidence.stalls) == (43, 43, 1)
    assert 0.1 < coincidence.p_value < 0.16
