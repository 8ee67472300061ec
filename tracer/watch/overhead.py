"""The overhead guard: what to do when tracing takes more of a server than it may. Pure: numbers in, a decision out.

What tracing takes is hits times what a hit was measured to cost on this machine, as a share of the time. Above the
limit detail probes are detached first; if it is still above, events are thinned, twice as much each time. When it
has been below half of the limit for long enough, one step is taken back; each time that proves too early, the next
wait is twice as long, so that it does not swing for weeks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

DETACH_DETAIL, THIN, THIN_LESS, ALLOW_DETAIL, STILL_ABOVE = (
    "detach detail", "thin", "thin less", "allow detail", "still above",
)  # fmt: skip
"""What is to be done."""

MOST_THINNED = 64
"""At most one event in so many is kept."""

FIRST_WAIT_NS = 60_000_000_000
LONGEST_WAIT_NS = 3_600_000_000_000
_CALM_SHARE = 0.5


@dataclass(frozen=True)
class Load:
    """What was seen since the last evaluation, a second or so.

    Attributes:
        elapsed_ns: the time it is about.
        hits: probe hits in the traced servers, by tier.
        hit_ns: what one costs here; other_ns: further time taken from the servers, as by the raw tracepoints.
        servers: how many are traced: the share is of all their time.
    """

    elapsed_ns: int
    standing_hits: int
    detail_hits: int
    hit_ns: float
    other_ns: float = 0.0
    servers: int = 1

    @property
    def share(self) -> float:
        """Return the share of the servers' time that tracing took."""
        taken_ns = (self.standing_hits + self.detail_hits) * self.hit_ns + self.other_ns
        return taken_ns / (max(self.elapsed_ns, 1) * max(self.servers, 1))


@dataclass(frozen=True)
class OverheadState:
    """What has been decided so far.

    Attributes:
        detail_allowed: detail probes may be attached. keep_one_in: 1: every event is kept.
        calm_ns: since when (CLOCK_MONOTONIC) it has been calm, 0: it is not. wait_ns: how long it has to be.
        said_above: it was said that nothing more can be done.
    """

    detail_allowed: bool = True
    keep_one_in: int = 1
    calm_ns: int = 0
    wait_ns: int = FIRST_WAIT_NS
    eased_ns: int = 0
    said_above: bool = False


@dataclass(frozen=True)
class Decision:
    """What to do now: ``action`` is one of the module's, "" for nothing; ``text`` says it for the timeline."""

    state: OverheadState
    action: str = ""
    text: str = ""


def decide(state: OverheadState, load: Load, limit: float, now_ns: int, *, detail_attached: bool) -> Decision:
    """Return what to do about the load of the last second.

    Args:
        limit: greatest share of the servers' time, from 0 to 1.
        now_ns: CLOCK_MONOTONIC.
        detail_attached: detail probes are attached at this moment.
    """
    share = load.share
    if share > limit:
        return _less(state, f"tracing took {share:.2%} of the time, more than --max-overhead {limit:.2%}", now_ns,
                     detail_attached=detail_attached)  # fmt: skip
    if share > limit * _CALM_SHARE:
        return Decision(replace(state, calm_ns=0))
    if not state.calm_ns:
        return Decision(replace(state, calm_ns=now_ns))
    if now_ns - state.calm_ns < state.wait_ns:
        return Decision(state)
    eased = replace(state, calm_ns=now_ns, eased_ns=now_ns, said_above=False)
    if state.keep_one_in > 1:
        eased = replace(eased, keep_one_in=state.keep_one_in // 2)
        return Decision(eased, THIN_LESS, f"tracing is cheap again: {_kept(eased.keep_one_in)}")
    if not state.detail_allowed:
        return Decision(
            replace(eased, detail_allowed=True), ALLOW_DETAIL, "tracing is cheap again: detail probes are allowed"
        )
    return Decision(replace(state, wait_ns=FIRST_WAIT_NS, said_above=False))


def _less(state: OverheadState, why: str, now_ns: int, *, detail_attached: bool) -> Decision:
    # a step back that did not last: wait longer before the next
    if state.eased_ns and now_ns - state.eased_ns < state.wait_ns:
        state = replace(state, wait_ns=min(state.wait_ns * 2, LONGEST_WAIT_NS))
    state = replace(state, calm_ns=0, eased_ns=0)
    if state.detail_allowed:
        if detail_attached:
            return Decision(replace(state, detail_allowed=False), DETACH_DETAIL, f"{why}: detail probes detached")
        state = replace(state, detail_allowed=False)
    if state.keep_one_in < MOST_THINNED:
        thinner = replace(state, keep_one_in=state.keep_one_in * 2)
        return Decision(thinner, THIN, f"{why}: {_kept(thinner.keep_one_in)}")
    if state.said_above:
        return Decision(state)
    return Decision(replace(state, said_above=True), STILL_ABOVE, f"{why}, although nothing is left to be spared")


def _kept(keep_one_in: int) -> str:
    return "every event is kept" if keep_one_in == 1 else f"one event in {keep_one_in} is kept"
