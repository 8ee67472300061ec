"""What looks at a thread say about its event loop, on event loops that the test makes up."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest

from stallscope.tracer.capture.standstill import Span, Standstill, late_iteration, longest_iteration, merged

MS = 1_000_000
THRESHOLD = 50 * MS
INTERVAL = 5 * MS

WAITING, READING, BUSY = "waiting", "reading", "busy"


def looked_at(
    state: Callable[[int], str], looks: Iterable[int], *, stays: bool = False
) -> tuple[list[Span], Standstill]:
    """Return the stalls found by looks at these times at a thread that is in ``state(time)``.

    ``stays``: every look that finds it busy finds that it did not go to sleep since the one before.
    """
    standstill = Standstill(THRESHOLD, INTERVAL)
    found = []
    for now_ns in looks:
        is_in = state(now_ns)
        span = standstill.look(now_ns, waits=is_in == WAITING, moved=is_in == READING, stayed=stays)
        if span is not None:
            found.append(span)
    return found, standstill


def busy_during(*spans: Span, otherwise: str = WAITING) -> Callable[[int], str]:
    return lambda now_ns: BUSY if any(span.start_ns <= now_ns < span.end_ns for span in spans) else otherwise


@pytest.mark.parametrize("otherwise", [WAITING, READING])
@pytest.mark.parametrize("seed", range(50))
def test_a_stall_is_known_to_one_interval_at_each_end(seed: int, otherwise: str) -> None:
    chance = random.Random(seed)
    start_ns = chance.randrange(100 * MS, 200 * MS)
    stall = Span(start_ns, start_ns + chance.randrange(THRESHOLD, 20 * THRESHOLD))
    looks = range(chance.randrange(1, INTERVAL), 2_000 * MS, INTERVAL)
    (found,), _ = looked_at(busy_during(stall, otherwise=otherwise), looks)
    # never later than it began, never earlier than it ended
    assert stall.start_ns - 2 * INTERVAL <= found.start_ns <= stall.start_ns
    assert stall.end_ns <= found.end_ns <= stall.end_ns + INTERVAL


def test_what_is_far_from_the_threshold_is_no_stall() -> None:
    short = [Span(at, at + THRESHOLD - 3 * INTERVAL) for at in range(100 * MS, 1_000 * MS, 100 * MS)]
    assert looked_at(busy_during(*short), range(1, 1_100 * MS, INTERVAL))[0] == []


def test_a_busy_loop_that_reads_is_no_stall() -> None:
    assert looked_at(lambda _: READING, range(1, 1_000 * MS, INTERVAL))[0] == []


def test_stalls_that_follow_each_other_are_apart() -> None:
    spans = [Span(100 * MS, 200 * MS), Span(212 * MS, 300 * MS)]
    assert len(looked_at(busy_during(*spans), range(1, 400 * MS, INTERVAL))[0]) == 2


def test_a_stall_in_progress_is_told_with_its_start_once_it_is_one() -> None:
    stall = Span(102 * MS, 900 * MS)
    looks = range(100 * MS, 800 * MS, INTERVAL)
    for end in looks:
        _, standstill = looked_at(busy_during(stall), range(looks[0], end + 1, INTERVAL))
        assert standstill.since_ns == (100 * MS if end >= 100 * MS + THRESHOLD else 0)
        assert standstill.is_suspect == (end >= 100 * MS + THRESHOLD // 2)


def test_the_time_in_which_nobody_looked_is_no_stall() -> None:
    # met busy twice, 200 ms apart: in between it may have waited
    busy = busy_during(Span(104 * MS, 106 * MS), Span(304 * MS, 306 * MS))
    assert looked_at(busy, [95 * MS, 100 * MS, 105 * MS, 305 * MS, 310 * MS])[0] == []
    # and a late look at the end adds no more than one interval
    (found,), _ = looked_at(busy_during(Span(100 * MS, 160 * MS)), [*range(95 * MS, 160 * MS, INTERVAL), 400 * MS])
    assert found == Span(95 * MS, 160 * MS)


def test_what_did_not_go_to_sleep_while_nobody_looked_is_a_stall_from_its_start() -> None:
    looks = [95 * MS, 100 * MS, 105 * MS, 305 * MS, 310 * MS]
    busy = busy_during(Span(104 * MS, 306 * MS))
    assert looked_at(busy, looks)[0] == []
    assert looked_at(busy, looks, stays=True)[0] == [Span(100 * MS, 310 * MS)]


def test_a_stall_that_is_known_outlasts_a_late_look() -> None:
    looks = [*range(100 * MS, 300 * MS, INTERVAL), 350 * MS, 355 * MS]
    (found,), _ = looked_at(busy_during(Span(101 * MS, 352 * MS)), looks)
    assert found == Span(100 * MS, 355 * MS)


def test_looks_that_come_more_often_while_it_is_suspect_change_nothing() -> None:
    looks = [*range(100 * MS, 140 * MS, INTERVAL), *range(140 * MS, 200 * MS, MS)]
    (found,), _ = looked_at(busy_during(Span(102 * MS, 160 * MS)), looks)
    assert found == Span(100 * MS, 160 * MS)


class TestSecondWitness:
    def test_without_the_cron_a_standstill_may_be_one_iteration(self) -> None:
        assert longest_iteration(Span(0, 90), []) == Span(0, 90)
        assert longest_iteration(Span(0, 90), [-10, 50, 100]) == Span(0, 90)

    def test_a_loop_that_ran_the_cron_again_and_again_turned(self) -> None:
        assert longest_iteration(Span(0, 90), [2, 12, 22, 32, 42, 52, 62, 72, 82]).duration_ns == 20

    def test_the_iteration_that_held_it_up_remains(self) -> None:
        assert longest_iteration(Span(0, 200), [5, 15, 25, 125, 140]) == Span(25, 140)
        assert longest_iteration(Span(0, 200), [10, 20]) == Span(10, 200)

    def test_the_cron_in_time_shows_its_own_duration(self) -> None:
        assert late_iteration(Span(0, 2), Span(102, 105), 100) == Span(102, 105)
        # and sooner than it asked for, no more
        assert late_iteration(Span(0, 2), Span(90, 95), 100) == Span(90, 95)

    def test_the_cron_too_late_shows_what_kept_it_waiting(self) -> None:
        assert late_iteration(Span(0, 2), Span(182, 185), 100) == Span(102, 185)


def test_what_overlaps_is_one_iteration_unless_it_is_only_the_inexact_ends() -> None:
    assert merged([], 2) == []
    assert merged([Span(20, 30), Span(0, 10)], 2) == [Span(0, 10), Span(20, 30)]
    assert merged([Span(0, 10), Span(8, 20)], 2) == [Span(0, 10), Span(8, 20)]
    assert merged([Span(0, 10), Span(7, 20), Span(12, 15), Span(16, 40)], 2) == [Span(0, 40)]
