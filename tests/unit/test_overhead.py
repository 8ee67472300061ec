"""The overhead guard: detail goes first, then events are thinned; back in steps, never swinging."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.tracer.watch.overhead import (
    ALLOW_DETAIL,
    DETACH_DETAIL,
    FIRST_WAIT_NS,
    LONGEST_WAIT_NS,
    MOST_THINNED,
    STILL_ABOVE,
    THIN,
    THIN_LESS,
    Decision,
    Load,
    OverheadState,
    decide,
)

S = 1_000_000_000
LIMIT = 0.01


def load(share: float, servers: int = 1) -> Load:
    return Load(S, round(share * S * servers / 1000), 0, 1000.0, servers=servers)


def run(shares: list[float], *, detail: bool = True) -> tuple[list[str], OverheadState]:
    """Give one load a second; detail probes stay attached until they are detached."""
    state, actions = OverheadState(), []
    for second, share in enumerate(shares, 1):
        decision = decide(state, load(share), LIMIT, second * S, detail_attached=detail)
        detail = detail and decision.action != DETACH_DETAIL
        state = decision.state
        if decision.action:
            actions.append(f"{second} {decision.action}")
    return actions, state


def test_the_share_is_hits_times_what_a_hit_costs() -> None:
    assert Load(2 * S, 300, 100, 15_000.0, other_ns=4_000_000).share == pytest.approx((400 * 15_000 + 4e6) / 2e9)
    assert load(0.02, servers=4).share == pytest.approx(0.02), "of all servers together"


def test_below_the_limit_nothing_is_done() -> None:
    assert run([0.0099] * 100 + [0.001] * 1000)[0] == []


def test_detail_goes_first_then_events_are_thinned_and_then_it_is_said_once() -> None:
    actions, state = run([0.02] * 20)
    assert actions == [f"1 {DETACH_DETAIL}", *(f"{second} {THIN}" for second in range(2, 8)), f"8 {STILL_ABOVE}"]
    assert (state.detail_allowed, state.keep_one_in) == (False, MOST_THINNED)


def test_without_detail_attached_events_are_thinned_at_once() -> None:
    actions, state = run([0.02], detail=False)
    assert actions == [f"1 {THIN}"]
    assert not state.detail_allowed


def test_what_is_done_is_said_with_numbers() -> None:
    detach = decide(OverheadState(), load(0.0234), LIMIT, S, detail_attached=True)
    assert detach.text == "tracing took 2.34% of the time, more than --max-overhead 1.00%: detail probes detached"
    thin = decide(detach.state, load(0.0234), LIMIT, S, detail_attached=False)
    assert thin.text.endswith("--max-overhead 1.00%: one event in 2 is kept")


def test_it_is_taken_back_in_steps_after_calm() -> None:
    actions, state = run([0.02] * 3 + [0.001] * 200)
    assert actions == [
        f"1 {DETACH_DETAIL}", f"2 {THIN}", f"3 {THIN}", f"64 {THIN_LESS}", f"124 {THIN_LESS}", f"184 {ALLOW_DETAIL}",
    ]  # fmt: skip
    assert (state.detail_allowed, state.keep_one_in) == (True, 1)


def test_neither_calm_nor_too_much_changes_nothing() -> None:
    assert run([0.02] + [0.008] * 500)[0] == [f"1 {DETACH_DETAIL}"]


def test_a_step_back_that_did_not_last_waits_twice_as_long_the_next_time() -> None:
    state = OverheadState(detail_allowed=False)
    now_ns, waits = S, []
    for _ in range(9):
        since = now_ns
        while not (decision := decide(state, load(0.0), LIMIT, now_ns, detail_attached=False)).action:
            state, now_ns = decision.state, now_ns + S
        assert decision.action == ALLOW_DETAIL
        waits.append((now_ns - since) // S)
        decision = decide(decision.state, load(0.05), LIMIT, now_ns + S, detail_attached=True)
        assert decision.action == DETACH_DETAIL
        state, now_ns = decision.state, now_ns + 2 * S
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    assert state.wait_ns == LONGEST_WAIT_NS
    while state.wait_ns != FIRST_WAIT_NS:
        state, now_ns = decide(state, load(0.0), LIMIT, now_ns, detail_attached=False).state, now_ns + 600 * S


@given(st.lists(st.tuples(st.floats(0, 0.1), st.booleans()), max_size=200))
def test_whatever_comes_the_state_stays_sane(seconds: list[tuple[float, bool]]) -> None:
    state = OverheadState()
    for second, (share, detail) in enumerate(seconds, 1):
        before = state
        decision: Decision = decide(
            state, load(share), LIMIT, second * S, detail_attached=detail and state.detail_allowed
        )
        state = decision.state
        assert 1 <= state.keep_one_in <= MOST_THINNED
        assert state.keep_one_in & (state.keep_one_in - 1) == 0
        assert FIRST_WAIT_NS <= state.wait_ns <= LONGEST_WAIT_NS
        assert bool(decision.action) == bool(decision.text)
        if share > 0.0101:
            assert state.keep_one_in >= before.keep_one_in
            assert not state.detail_allowed
        if (state.keep_one_in, state.detail_allowed) != (before.keep_one_in, before.detail_allowed):
            assert decision.action
