"""``stallscope plan``: how long to record until a claim about a rate can be made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from stallscope.tracer.analysis.compare import checks, rates
from stallscope.tracer.analysis.compare.checks import REDUCED_TO
from stallscope.tracer.analysis.compare.comparison import DEFAULT_CONFIDENCE, finite
from stallscope.tracer.analysis.compare.limits import STALL, Event, exposure_text, rate_text
from stallscope.tracer.analysis.compare.sides import Side
from stallscope.tracer.errors import UsageError

PLAN_VERSION = 1

_ALLOWED = (0, 1, 2, 3, 5)
TRUE_SHARES = (0.0, 0.1, 0.25, 0.5)
"""True rates, as shares of the one claimed, for which the chance of a verdict is told."""


@dataclass(frozen=True)
class Step:
    """How long to record if so many events may come.

    Attributes:
        events: at most so many.
        exposure_s: for so long a server must be watched.
        chances: (share, chance): how likely it is to be verified then, if the true rate is that share of the claim.
        expected_before: how many would have come at the baseline's rate.
    """

    events: int
    exposure_s: float
    chances: tuple[tuple[float, float], ...]
    expected_before: float


@dataclass(frozen=True)
class Plan:
    """Everything ``stallscope plan`` says.

    Attributes:
        text: the sentence to read first.
        claim_per_s: the rate to stay below; by default ``checks.REDUCED_TO`` of the baseline's.
        before_count, before_exposure_s, before_per_s, before_low_per_s, before_high_per_s: the baseline's rate, with
            its two-sided interval.
        factor: how many events come together.
    """

    text: str
    event: str
    confidence: float
    claim_per_s: float
    before_count: int
    before_exposure_s: float
    before_per_s: float
    before_low_per_s: float
    before_high_per_s: float
    factor: float
    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        document: dict[str, Any] = finite(dataclasses.asdict(self))
        return {"plan_version": PLAN_VERSION, **document}


def plan(
    baseline: Side, event: Event | None = None, claim_per_s: float | None = None, confidence: float = DEFAULT_CONFIDENCE
) -> Plan:
    """Return how long to record after a change until a rate can be claimed.

    Args:
        event: what is counted; by default stalls.
        claim_per_s: the rate to stay below, events per second; by default a share of the baseline's.

    Raises:
        UsageError: the baseline does not tell about the event, or has none and no rate was given.
    """
    if event is None:
        stall_ns = max(run.analysis.manifest.stall_ns for run in baseline.runs)
        event = Event(STALL, stall_ns, "stall")
    reason = checks.unobserved(baseline, event)
    if reason:
        raise UsageError(f"the baseline does not tell about {event.plural}: {reason}")
    before = checks.count(baseline, event)
    if not before.exposure_s:
        raise UsageError("nothing was watched in the baseline; give a recording of a server")
    if claim_per_s is None:
        if not before.count:
            raise UsageError(f"the baseline has no {event.plural}; give the rate to claim with --rate")
        claim_per_s = before.per_s * REDUCED_TO
    bounds = rates.rate_bounds(before.count, before.exposure_s, confidence, before.factor)
    steps = tuple(_step(number, claim_per_s, before, confidence) for number in _ALLOWED)
    text = (
        f"To claim {event.plural} below {rate_text(claim_per_s)} at {confidence * 100:.4g}%, record "
        f"{checks.more_text(steps[0].exposure_s)} without any, {checks.more_text(steps[1].exposure_s)} with one. "
        f"Before it was {rate_text(before.per_s)} ({before.count:,} in {exposure_text(before.exposure_s)})"
    )
    if before.factor > 1.05:
        text += f", {before.factor:.1f} at a time, which is why it takes so much longer"
    return Plan(
        f"{text}.", event.text, confidence, claim_per_s, before.count, before.exposure_s, before.per_s,
        bounds.low, bounds.high, before.factor, steps,
    )  # fmt: skip


def _step(number: int, claim_per_s: float, before: checks.Count, confidence: float) -> Step:
    exposure_s = rates.exposure_for(number, claim_per_s, confidence, before.factor)
    chances = tuple(
        (share, rates.chance_of(number, claim_per_s * share, exposure_s, before.factor)) for share in TRUE_SHARES
    )
    return Step(number, exposure_s, chances, before.per_s * exposure_s)
