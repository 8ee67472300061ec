"""One limit held against recordings: three verdicts, by exact inference on rates.

What is counted are independent events as far as they can be told: calls that come in one event loop iteration are
one. Events still come in storms; how many at a time, and how unevenly over the recording, is taken from both sides
(the greater counts) and makes every bound wider: :func:`clustering`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stallscope.tracer.analysis.compare import events, rates
from stallscope.tracer.analysis.compare.blocks import LEVELS, MIN_BLOCK_S
from stallscope.tracer.analysis.compare.comparable import who_does_it_now, why_silent
from stallscope.tracer.analysis.compare.limits import OVERFLOW, STALL, Event, Limit, exposure_text, rate_text
from stallscope.tracer.analysis.compare.sides import OVERFLOWS, STALLS, Run, Side
from stallscope.tracer.analysis.tables import Ints
from stallscope.tracer.units import format_count, format_duration_ns

VERIFIED, NOT_VERIFIED, INCONCLUSIVE = "verified", "not verified", "inconclusive"

REDUCED_TO = 0.5
"""Where only a baseline tells what to hold events against: they must be shown to be less often than this share."""

_FEW = 10
"""Fewer events do not tell how unevenly they come."""


@dataclass(frozen=True)
class Count:
    """How often an event came on one side.

    Attributes:
        count: events; calls: the calls in them, where those of one iteration are one event.
        factor: how many events come together.
        worst_ns: the longest, 0 for none; worst_at_s, worst_in: when, and in which recording.
    """

    count: int
    exposure_s: float
    calls: int
    factor: float
    worst_ns: int
    worst_at_s: float
    worst_in: str

    @property
    def per_s(self) -> float:
        """Return the rate, events per second."""
        return self.count / self.exposure_s if self.exposure_s else math.nan


@dataclass(frozen=True)
class Check:
    """One limit and what the recordings say about it.

    Attributes:
        limit: as it was written; verdict: ``verified``, ``not verified`` or ``inconclusive``; text: why.
        limit_per_s: the rate it is held against; None where a baseline is.
        count, exposure_s, per_s: events afterwards; low_per_s, high_per_s: the true rate's bounds, each one-sided.
        before_count, before_exposure_s, before_per_s: the same of the baseline, None without.
        factor: how many events come together.
        more_s: how much longer to record for a verdict, if no more comes; None where that is not the remedy.
        worst_ns: the longest one afterwards, None where there was none.
        is_broken: what may never come was seen.
    """

    limit: str
    verdict: str
    text: str
    limit_per_s: float | None
    count: int
    exposure_s: float
    per_s: float
    low_per_s: float
    high_per_s: float
    before_count: int | None
    before_exposure_s: float | None
    before_per_s: float | None
    factor: float
    more_s: float | None
    worst_ns: int | None
    is_broken: bool = False


def count(side: Side, event: Event) -> Count:
    """Return how often an event came on a side."""
    found = [_times(run, event) for run in side.runs]
    total = sum(int(weights.sum()) for _, weights, _ in found)
    worst_ns, worst_at_s, worst_in = 0, 0.0, ""
    for run in side.runs:
        spans = run.spans.get(_name(event))
        if spans is not None and len(spans.duration_ns):
            place = int(np.argmax(spans.duration_ns))
            if int(spans.duration_ns[place]) > worst_ns:
                worst_ns = int(spans.duration_ns[place])
                worst_at_s, worst_in = float(spans.time_ns[place]) / 1e9, run.path
    factor = clustering(side.runs, [(times, weights) for times, weights, _ in found])
    return Count(total, side.exposure_s, sum(calls for _, _, calls in found), factor, worst_ns, worst_at_s, worst_in)


def clustering(runs: Sequence[Run], found: Sequence[tuple[Ints, Ints]]) -> float:
    """Return as how many events one independent event counts: by storms, and by how uneven time blocks are.

    Args:
        found: times in ns and weights of each recording's events.
    """
    total_s = sum(run.seconds for run in runs)
    gap_ns = events.storm_gap_ns(sum(len(times) for times, _ in found), total_s)
    sizes = [events.sizes(events.storms(times, gap_ns), weights) for times, weights in found if len(times)]
    if not sizes:
        return 1.0
    factor = events.cluster_factor(np.concatenate(sizes))
    if sum(int(weights.sum()) for _, weights in found) < _FEW:
        return factor
    for level in LEVELS:
        block_s = total_s / level
        if block_s < MIN_BLOCK_S:
            continue
        counts = []
        for run, (times, weights) in zip(runs, found, strict=True):
            number = max(round(run.seconds / block_s), 1)
            place = np.clip((times * (number / (run.seconds * 1e9))).astype(np.int64), 0, number - 1)
            counts.append(np.bincount(place, weights=weights, minlength=number))
        together = np.concatenate(counts).astype(float)
        if len(together) > 1:
            factor = max(factor, float(np.var(together, ddof=1) / np.mean(together)))
    return factor


def _name(event: Event) -> str:
    return {STALL: STALLS, OVERFLOW: OVERFLOWS}.get(event.subject, event.subject)


def _times(run: Run, event: Event) -> tuple[Ints, Ints, int]:
    """Return when an event came in one recording, ns, how many each stands for, and how many calls they were."""
    spans = run.spans.get(_name(event))
    if spans is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    rows = np.flatnonzero(spans.duration_ns >= event.at_least_ns)
    if event.subject in (STALL, OVERFLOW):
        return spans.time_ns[rows], spans.weight[rows], len(rows)
    _, first = np.unique(spans.occasion[rows], return_index=True)
    times = np.sort(spans.time_ns[rows][first])
    return times, np.ones(len(times), np.int64), len(rows)


def unobserved(side: Side, event: Event) -> str:
    """Return why recordings cannot tell about an event, with the remedy; "" if they can."""
    name = _name(event)
    for run in side.runs:
        manifest = run.analysis.manifest
        if event.subject == STALL:
            if 0 < event.at_least_ns < manifest.stall_ns:
                shortest = format_duration_ns(manifest.stall_ns)
                return f"{run.path} has stalls from {shortest} on only; record with --stall {_option(event)}"
        elif event.subject == OVERFLOW:
            if OVERFLOWS not in run.spans or run.analysis.tables.queues.empty:
                return f"{run.path} did not watch a listener; record with the server's port open"
            seen = run.analysis.stalls.overflows
            stray = int(seen.loc[seen["listener"] < 0, "count"].sum())
            if stray:
                return f"{run.path} has {format_count(stray, 'overflow')} that may be of another listener"
        elif name not in run.spans:
            return f"{run.path} did not trace {name}: {who_does_it_now(side, name)}"
        elif event.at_least_ns < manifest.min_duration_ns:
            shortest = format_duration_ns(manifest.min_duration_ns)
            return f"{run.path} has calls from {shortest} on only; record with --min-duration {_option(event)}"
    if event.subject not in (STALL, OVERFLOW):
        inlined = [probe.note for probe in side.probes(name) if "inlined" in probe.note or "bypassed" in probe.note]
        if inlined:
            return f"{name} was not measured itself: {inlined[0]}; name the function that was"
        if not side.hits(name) and not why_silent(side, name):
            return f"{name} never fired, which says nothing: {who_does_it_now(side, name)}"
    return ""


def _option(event: Event) -> str:
    return f"{event.at_least_ns // 1000}us"


def check_limit(
    limit: Limit, after: Side, baseline: Side | None, confidence: float, claim_per_s: float | None = None
) -> Check:
    """Return the verdict on one limit.

    Args:
        confidence: of the verdict, one-sided.
        claim_per_s: the rate that what may never come must be shown to be below; None: what the baseline tells.
    """
    seen = count(after, limit.event)
    before = count(baseline, limit.event) if baseline is not None and not unobserved(baseline, limit.event) else None
    factor = max(seen.factor, before.factor if before else 1.0)
    judge = _Judge(limit, seen, before, factor, confidence)
    reason = unobserved(after, limit.event)
    if limit.per_s is None and seen.count:
        return judge.broken()
    if reason:
        return judge.made(INCONCLUSIVE, f"{limit.text}: {reason}")
    if limit.per_s is not None or claim_per_s is not None:
        return judge.against_rate(limit.per_s or claim_per_s or 0.0)
    if before is None:
        return judge.made(
            INCONCLUSIVE,
            f"{judge.so_many()}; there is nothing to hold that against: give --baseline, or --rate "
            "with what must not be exceeded",
        )
    return judge.against_baseline(before)


def check_reduced(event: Event, after: Side, baseline: Side, confidence: float) -> Check:
    """Return whether an event is shown to come at most ``REDUCED_TO`` times as often as in the baseline."""
    seen, before = count(after, event), count(baseline, event)
    limit = Limit(event, None, f"{event.plural}: at most {REDUCED_TO:.0%} of the baseline's rate")
    judge = _Judge(limit, seen, before, max(seen.factor, before.factor), confidence)
    for name, side in (("after", after), ("before", baseline)):
        reason = unobserved(side, event)
        if reason:
            return judge.made(INCONCLUSIVE, f"{event.plural} ({name}): {reason}")
    return judge.against_baseline(before)


class _Judge:
    """Comes to the verdict on one limit."""

    def __init__(self, limit: Limit, seen: Count, before: Count | None, factor: float, confidence: float) -> None:
        self.limit, self.seen, self.before, self.factor, self.confidence = limit, seen, before, factor, confidence
        exposure = seen.exposure_s or math.nan
        self.unit_per_s = limit.per_s or (before.per_s if before else 0.0) or None
        self.high = rates.upper_count(seen.count / factor, confidence) * factor / exposure
        self.low = rates.lower_count(seen.count / factor, confidence) * factor / exposure

    def made(self, verdict: str, text: str, limit_per_s: float | None = None, more_s: float | None = None) -> Check:
        seen, before = self.seen, self.before
        return Check(
            self.limit.text, verdict, text, limit_per_s,
            seen.count, seen.exposure_s, seen.per_s, self.low, self.high,
            before.count if before else None, before.exposure_s if before else None, before.per_s if before else None,
            self.factor, more_s, seen.worst_ns or None,
        )  # fmt: skip

    def so_many(self) -> str:
        """Return what was seen, and the true rate's bound."""
        text = f"{self._seen()}: the true rate is below {self._rate(self.high)} at {self._percent()}"
        if self.factor > 1.05:
            text += f", as they come {self.factor:.1f} at a time"
        elif not self.seen.count and not (self.before and self.before.count):
            text += ", if they come one by one"
        return text

    def broken(self) -> Check:
        seen = self.seen
        where = f"the longest took {format_duration_ns(seen.worst_ns)}, {exposure_text(seen.worst_at_s)} into "
        longest = f"; {where}{seen.worst_in}" if seen.worst_ns else ""
        text = f"{self._seen()}, none is allowed{longest}{self._before_text()}"
        return dataclasses.replace(self.made(NOT_VERIFIED, text), is_broken=True)

    def against_rate(self, limit_per_s: float) -> Check:
        self.unit_per_s = limit_per_s
        wanted = rate_text(limit_per_s)
        if self.high < limit_per_s:
            text = f"{self.so_many()}{self._before_text()}; the limit is {wanted}"
            return self.made(VERIFIED, text, limit_per_s)
        if self.low > limit_per_s:
            text = f"{self._seen()}: the true rate is above {self._rate(self.low)} at {self._percent()}"
            return self.made(NOT_VERIFIED, f"{text}{self._before_text()}; the limit is {wanted}", limit_per_s)
        needed = rates.exposure_for(self.seen.count, limit_per_s, self.confidence, self.factor)
        more_s = max(needed - self.seen.exposure_s, 0.0)
        none_more = " without another one" if self.seen.count else ""
        text = (
            f"{self.so_many()}{self._before_text()}; need {more_text(more_s)} more{none_more} to claim below {wanted}"
        )
        return self.made(INCONCLUSIVE, text, limit_per_s, more_s)

    def against_baseline(self, before: Count) -> Check:
        seen = self.seen
        if not before.count:
            text = f"{self.so_many()}; the baseline has none either in {exposure_text(before.exposure_s)}"
            return self.made(INCONCLUSIVE, f"{text}: give --rate with what must not be exceeded")
        pairs = (before.count, before.exposure_s), (seen.count, seen.exposure_s)
        bounds = rates.ratio_bounds(*pairs, 2 * self.confidence - 1, self.factor)
        text = f"{self.so_many()}{self._before_text()}"
        if bounds.high < REDUCED_TO:
            return self.made(VERIFIED, f"{text}, at most {bounds.high:.1%} of that")
        if bounds.low > REDUCED_TO:
            return self.made(
                NOT_VERIFIED,
                f"{self._seen()}{self._before_text()}: at {self._percent()} at least {bounds.low:.0%} of that",
            )
        if seen.count:
            return self.made(
                INCONCLUSIVE,
                f"{text}; that may be anything from {bounds.low:.0%} to {bounds.high:.0%} of it: record longer",
            )
        share = 1 - (1 - self.confidence) ** (self.factor / before.count)
        needed = share / (1 - share) * before.exposure_s / REDUCED_TO
        more_s = max(needed - seen.exposure_s, 0.0)
        return self.made(
            INCONCLUSIVE, f"{text}; need {more_text(more_s)} more to claim below {REDUCED_TO:.0%} of that", None, more_s
        )

    def _seen(self) -> str:
        seen, event = self.seen, self.limit.event
        text = f"{seen.count:,} {event.plural} in {exposure_text(seen.exposure_s)}"
        if seen.calls != seen.count and event.subject not in (STALL, OVERFLOW):
            ticks = format_count(seen.count, "event loop iteration")
            text = f"{seen.calls:,} {event.plural} in {ticks} in {exposure_text(seen.exposure_s)}"
        return text

    def _before_text(self) -> str:
        return f"; before it was {self._rate(self.before.per_s)}" if self.before is not None else ""

    def _rate(self, per_s: float) -> str:
        return rate_text(per_s, self.unit_per_s)

    def _percent(self) -> str:
        return f"{self.confidence * 100:.4g}%"


def more_text(seconds: float) -> str:
    """Return how much longer to record, rounded up to a whole second or minute."""
    unit = 1 if seconds < 120 else 60 if seconds < 7200 else 360
    return exposure_text(max(math.ceil(seconds / unit), 1) * unit)
