"""``stallscope verify``: whether recordings after a change show that it did what it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stallscope.tracer.analysis.compare import checks
from stallscope.tracer.analysis.compare.checks import INCONCLUSIVE, NOT_VERIFIED, VERIFIED, Check
from stallscope.tracer.analysis.compare.comparable import (
    DEFAULT_LOAD_BAND,
    LOAD,
    NOTHING,
    WAIVABLE,
    Load,
    Obstacle,
    loads,
    obstacles,
    unsound,
)
from stallscope.tracer.analysis.compare.comparison import (
    DEFAULT_CONFIDENCE,
    RunSummary,
    finite,
    run_summaries,
)
from stallscope.tracer.analysis.compare.headline import silent_notes
from stallscope.tracer.analysis.compare.limits import OVERFLOW, STALL, Event, Limit, exposure_text
from stallscope.tracer.analysis.compare.sides import Side
from stallscope.tracer.errors import UsageError
from stallscope.tracer.units import format_count

VERIFICATION_VERSION = 1

NO_OVERFLOW = Limit(Event(OVERFLOW, 0, "overflow"), None, "no overflow")


@dataclass(frozen=True)
class Verification:
    """Everything ``stallscope verify`` says.

    Attributes:
        verdict: ``verified``, ``not verified`` or ``inconclusive``.
        paragraph: all of it in one plain paragraph, for a change ticket.
        obstacles: what keeps the sides from being compared; waived: what was overlooked by request.
        notes: what to know; more_s: how much longer to record, None where that is not the remedy.
    """

    verdict: str
    paragraph: str
    confidence: float
    load_band: float
    after: tuple[RunSummary, ...]
    baseline: tuple[RunSummary, ...]
    checks: tuple[Check, ...]
    obstacles: tuple[Obstacle, ...]
    waived: tuple[Obstacle, ...]
    load: tuple[Load, ...]
    notes: tuple[str, ...]
    more_s: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; what is unbounded or not known is null."""
        document: dict[str, Any] = finite(dataclasses.asdict(self))
        return {"verification_version": VERIFICATION_VERSION, **document}


def verify(
    after: Side,
    baseline: Side | None = None,
    limits: Sequence[Limit] = (),
    *,
    confidence: float = DEFAULT_CONFIDENCE,
    load_band: float = DEFAULT_LOAD_BAND,
    claim_per_s: float | None = None,
    despite: Sequence[str] = (),
) -> Verification:
    """Return whether the recordings show what is asked for.

    A limit that was broken is broken, whatever else; otherwise nothing is verified that is not comparable.

    Args:
        baseline: before the change.
        limits: all must hold. Without any, the baseline's stalls and overflows must have become rare.
        confidence: of the verdict, one-sided: so often is what is verified true.
        claim_per_s: the rate that what may never come must be shown to be below, events per second.
        despite: kinds of obstacles to overlook.

    Raises:
        UsageError: there is nothing to verify, or an obstacle that cannot be overlooked was to be.
    """
    for kind in despite:
        if kind not in WAIVABLE:
            raise UsageError(f'"{kind}" cannot be overlooked; choose among {", ".join(WAIVABLE)}')
    found = obstacles(baseline, after, load_band) if baseline is not None else unsound(after, "after")
    results: list[Check] = []
    if not any(one.kind == NOTHING for one in found):
        results = _checks(after, baseline, limits, confidence, claim_per_s)
    standing = [one for one in found if one.kind not in despite]
    verdict = _verdict(results, standing)
    waits = [one.more_s for one in results if one.verdict == INCONCLUSIVE]
    more_s = max((one for one in waits if one is not None), default=None) if None not in waits else None
    result = Verification(
        verdict, "", confidence, load_band,
        tuple(run_summaries(after)), tuple(run_summaries(baseline)) if baseline else (),
        tuple(results), tuple(standing), tuple(one for one in found if one.kind in despite),
        tuple(loads(baseline, after, load_band)) if baseline else (),
        tuple(silent_notes(baseline, after)) if baseline else (),
        more_s if not standing and verdict == INCONCLUSIVE else None,
    )  # fmt: skip
    return dataclasses.replace(result, paragraph=_paragraph(result))


def _checks(
    after: Side, baseline: Side | None, limits: Sequence[Limit], confidence: float, claim_per_s: float | None
) -> list[Check]:
    if limits:
        return [checks.check_limit(limit, after, baseline, confidence, claim_per_s) for limit in limits]
    if baseline is None:
        raise UsageError("nothing to verify; give --max, --max-rate, --no-overflow or --baseline")
    stall_ns = max(run.analysis.manifest.stall_ns for side in (baseline, after) for run in side.runs)
    wanted = [Event(STALL, stall_ns, "stall"), Event(OVERFLOW, 0, "overflow")]
    shown = [event for event in wanted if checks.count(baseline, event).count]
    if not shown:
        raise UsageError(
            "the baseline has neither stalls nor overflows, so there is nothing to verify; "
            "give --max, --max-rate or --no-overflow"
        )
    return [checks.check_reduced(event, after, baseline, confidence) for event in shown]


def _verdict(results: Sequence[Check], standing: Sequence[Obstacle]) -> str:
    broken = [one for one in results if one.verdict == NOT_VERIFIED]
    # seen is seen: no obstacle undoes that something came which may never come
    if any(one.is_broken for one in broken):
        return NOT_VERIFIED
    if standing or not results:
        return INCONCLUSIVE
    if broken:
        return NOT_VERIFIED
    return VERIFIED if all(one.verdict == VERIFIED for one in results) else INCONCLUSIVE


def _paragraph(result: Verification) -> str:
    servers = ", ".join(dict.fromkeys(run.server for run in result.after)) or "no server"
    watched = exposure_text(sum(run.exposure_s for run in result.after))
    text = f"{result.verdict.capitalize()}: {servers}, {format_count(len(result.after), 'recording')} of {watched}"
    if result.baseline:
        before = ", ".join(dict.fromkeys(run.server for run in result.baseline)) or "no server"
        watched = exposure_text(sum(run.exposure_s for run in result.baseline))
        text += f", against {before}, {format_count(len(result.baseline), 'recording')} of {watched}"
    parts = [f"{text}."]
    ordered = sorted(result.checks, key=lambda check: (NOT_VERIFIED, INCONCLUSIVE, VERIFIED).index(check.verdict))
    parts += [f"{_sentence(check.text)} ({check.verdict})." for check in ordered]
    if result.obstacles:
        parts += ["Not comparable: " + "; ".join(one.text for one in result.obstacles) + "."]
    if result.waived:
        parts += ["Overlooked on request: " + "; ".join(one.text for one in result.waived) + "."]
    parts += [f"{_sentence(note)}." for note in result.notes]
    if result.load and not any(one.kind == LOAD for one in (*result.obstacles, *result.waived)):
        known = [f"{one.before:,.0f} and {one.after:,.0f} {one.name}" for one in result.load if one.ratio is not None]
        if known:
            parts.append(f"The load was alike: {', '.join(known)}.")
        else:
            parts.append("Whether the load was alike is not known.")
    return " ".join(parts)


def _sentence(text: str) -> str:
    """Return a text as the beginning of a sentence; names of functions stay as they are."""
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if first.islower() and first.isalpha() else text
