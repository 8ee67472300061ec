"""One quantity before and after: estimates with intervals, their ratio, and the tests of it.

A change is a ratio. Its interval is the widest of those that are sound: by bootstrap over time blocks, by Student's t
from the same blocks and the variation from recording to recording, and, for rates, the exact one of Poisson.

Two recordings of one server differ by more than chance: another load, a neighbour, memory laid out otherwise. With
several recordings a side that is measured; with one it is assumed (``DEFAULT_VARIATION``), and said so. Measured and
assumed are joined as in a moderated t test (Smyth 2004, doi 10.2202/1544-6115.1027), the assumption being worth
``_PRIOR`` recordings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from stallscope.tracer.analysis.compare import blocks as blocked
from stallscope.tracer.analysis.compare import events, rates
from stallscope.tracer.analysis.compare.blocks import PerSecond, Quantile, Resampled, Statistic
from stallscope.tracer.analysis.compare.sides import Side, Spans
from stallscope.tracer.analysis.functions import quantile

DEFAULT_VARIATION = 0.1
"""Standard deviation of a number from one recording to the next of the same server, as a share of it."""


_PRIOR = 8
_MIN_EVENTS = 10
"""A quantile has an interval only with so many events on either side."""

QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


@dataclass(frozen=True)
class Estimate:
    """One number of one side.

    Attributes:
        value: None where it is not known; low, high: its interval, None where there is none.
        below: the value is an upper bound: those calls were only counted.
        n: events it rests on; independent: as how many independent ones they count.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    independent: float
    below: bool = False


@dataclass(frozen=True)
class Change:
    """One quantity before and after.

    Attributes:
        subject: a function, ``stalls``, ``overflows`` or ``accept wait``.
        quantity: ``calls``, ``calls/client``, ``total`` and ``self`` (time), ``events`` or one of ``QUANTILES``.
        unit: ``1/s``, ``1/s/client``, ``ns/s`` or ``ns``.
        ratio: after to before; low, high: its interval, None: unbounded or not known.
        p_value: the parametric one, exact for rates; p_permutation: of blocks; p_adjusted: after Holm's correction.
        significant: all agree at the confidence asked for.
        method: how the interval and p_value were found; why_not: what keeps it from being told, "" if nothing does.
    """

    subject: str
    quantity: str
    unit: str
    before: Estimate
    after: Estimate
    ratio: float | None
    low: float | None
    high: float | None
    p_value: float
    p_permutation: float
    p_adjusted: float
    significant: bool
    method: str
    why_not: str = ""


class Changes:
    """The changes of one subject, not yet corrected for the number of comparisons."""

    def __init__(
        self, before: Side, after: Side, subject: str, confidence: float, variation: float, reason: str
    ) -> None:
        """Cut both sides into time blocks.

        Args:
            subject: as of ``Change``; confidence: of each interval.
            variation: standard deviation from recording to recording, as a share, where it is not measured.
            reason: what keeps it from being compared, "" if nothing does.
        """
        self.sides = (before, after)
        self.subject = subject
        self.confidence = confidence
        self.variation = variation
        self.reason = reason
        self.cuts = blocked.cuts(before, after, subject)
        self.spans = [[run.spans[subject] for run in side.runs if subject in run.spans] for side in self.sides]
        self.counts = [sum(one.count for one in side) for side in self.spans]
        self.exposures = [side.exposure_s for side in self.sides]
        self.factor = max(side_factor(side) for side in self.spans)

    def rate(self, quantity: str, unit: str, column: str) -> Change:
        """Return the change of a sum per second: of events exactly, of times by their blocks."""
        sums = self.counts if column == "count" else [self._sum(side, column) for side in (0, 1)]
        statistic = PerSecond(column)
        estimates = [self._rate_estimate(side, sums[side], statistic, column) for side in (0, 1)]
        # times have no exact test; where one side has none, the calls' does
        exact = column == "count" or not all(sums)
        return self._change(quantity, unit, statistic, estimates[0], estimates[1], exact=exact)

    def per_client(self) -> list[Change]:
        """Return the change of calls per second and client; nothing where clients are not known."""
        clients = [side.mean("clients") for side in self.sides]
        if not all(clients):
            return []
        change = self.rate("calls", "1/s", "count")
        known = [float(one or 0) for one in clients]
        scale = known[0] / known[1]
        estimates = [_scaled(one, 1 / number) for one, number in zip((change.before, change.after), known, strict=True)]
        bounds = [None if one is None else one * scale for one in (change.ratio, change.low, change.high)]
        moved = self._test(self._resampled(PerSecond("count")), bounds[0], scale=scale, exact=True)
        return [self._finish("calls/client", "1/s/client", estimates[0], estimates[1], bounds[0], moved)]

    def quantile(self, name: str, share: float) -> Change:
        """Return the change of a quantile of lengths."""
        estimates = [self._quantile_estimate(side, share) for side in (0, 1)]
        return self._change(name, "ns", Quantile(share), estimates[0], estimates[1], exact=False)

    def _sum(self, side: int, column: str) -> float:
        short = sum(float(one.short_ns[-1]) for one in self.spans[side])
        return sum(float(getattr(one, column).sum()) for one in self.spans[side]) + short

    def _rate_estimate(self, side: int, total: float, statistic: Statistic, column: str) -> Estimate:
        exposure, count = self.exposures[side], self.counts[side]
        if not exposure or not self.spans[side]:
            return Estimate(None, None, None, count, 0)
        low, high = self._side_bounds(side, statistic)
        if column == "count":
            exact = rates.rate_bounds(count, exposure, self.confidence, self.factor)
            low, high = _least(low, exact.low), _greatest(high, exact.high)
        elif not total:
            low, high = 0.0, None
        return Estimate(total / exposure, low, high, count, count / self.factor)

    def _quantile_estimate(self, side: int, share: float) -> Estimate:
        lengths = np.sort(np.concatenate([one.duration_ns for one in self.spans[side]] or [np.zeros(0, np.int64)]))
        short = sum(int(one.short_calls[-1]) for one in self.spans[side])
        count = len(lengths) + short
        value = quantile(lengths, short, share)
        if value is None:
            limit = float(self.cuts[0].length_ns[0]) if self.cuts and count else math.nan
            return Estimate(_known(limit), None, None, count, count / self.factor, below=True)
        low, high = self._side_bounds(side, Quantile(share)) if count >= _MIN_EVENTS else (None, None)
        return Estimate(float(value), _least(low, value), _greatest(high, value), count, count / self.factor)

    def _side_bounds(self, side: int, statistic: Statistic) -> tuple[float | None, float | None]:
        if not self.cuts:
            return None, None
        bounds = [blocked.side_bounds(cut.drawn[side], cut.length_ns, statistic, self.confidence) for cut in self.cuts]
        if any(math.isnan(low) for low, _ in bounds):
            return None, None
        return min(low for low, _ in bounds), max(high for _, high in bounds)

    def _resampled(self, statistic: Statistic) -> Resampled:
        return blocked.change(self.cuts, statistic, self.confidence)

    def _change(
        self, quantity: str, unit: str, statistic: Statistic, one: Estimate, two: Estimate, *, exact: bool
    ) -> Change:
        ratio = None if not one.value or two.value is None else two.value / one.value
        tested = self._test(self._resampled(statistic), ratio, exact=exact)
        return self._finish(quantity, unit, one, two, ratio, tested)

    def _test(self, found: Resampled, ratio: float | None, *, exact: bool, scale: float = 1.0) -> _Tested:
        """Return bounds of the ratio and p values, from the blocks and, for rates, from the counts.

        Args:
            scale: what the ratio was multiplied by after the rates were taken.
        """
        low, high, p_value = math.nan, math.nan, math.nan
        methods = []
        spread = found.variance + self._between(found)
        if ratio and math.isfinite(spread):
            freedom = self._freedom(found)
            error = math.sqrt(spread)
            reach = float(stats.t.ppf((1 + self.confidence) / 2, freedom)) * error
            low, high = ratio * math.exp(-reach), ratio * math.exp(reach)
            low, high = min(low, found.low * scale), max(high, found.high * scale)
            p_value = _t_test(math.log(ratio), error, freedom)
            methods.append("time blocks")
        if exact and self.counts != [0, 0] and all(self.exposures):
            pairs = [(count, exposure) for count, exposure in zip(self.counts, self.exposures, strict=True)]
            scaled = (pairs[0][0], pairs[0][1] * scale)
            bounds = rates.ratio_bounds(scaled, pairs[1], self.confidence, self.factor)
            if scale == 1.0 or not methods:
                low, high = _fmin(low, bounds.low), _fmax(high, bounds.high)
            p_exact = rates.ratio_test(scaled, pairs[1], self.factor)
            p_value = max(p_exact, 0.0 if math.isnan(p_value) else p_value)
            methods.append("exact Poisson")
        return _Tested(low, high, p_value, found.p_value, ", ".join(methods))

    def _between(self, found: Resampled) -> float:
        """Return what recordings of one server add to the variance of the logarithm of the ratio."""
        measured, freedom = found.runs
        prior = math.log1p(self.variation) ** 2
        joined = (_PRIOR * prior + freedom * measured) / (_PRIOR + freedom)
        return joined * sum(1 / len(side.runs) for side in self.sides)

    def _freedom(self, found: Resampled) -> float:
        """Return the degrees of freedom of the variance (Satterthwaite 1946)."""
        within, between = found.variance, self._between(found)
        own = max(found.blocks - 2 * max(len(side.runs) for side in self.sides), 2)
        square = within**2 / own + between**2 / (_PRIOR + found.runs[1])
        return (within + between) ** 2 / square if square else float(own)

    def _finish(
        self, quantity: str, unit: str, one: Estimate, two: Estimate, ratio: float | None, tested: _Tested
    ) -> Change:
        why = self.reason
        few = quantity in QUANTILES and min(one.n, two.n) < _MIN_EVENTS
        if not why and (few or math.isnan(tested.p_value)):
            why = "nothing on either side" if not one.n and not two.n else "too few to tell"
        if not why and not self.cuts:
            why = "too short to tell"
        p_value = 1.0 if math.isnan(tested.p_value) else tested.p_value
        low, high = (math.nan, math.nan) if few else (tested.low, tested.high)
        return Change(
            self.subject, quantity, unit, one, two, ratio, _known(low), _known(high),
            p_value, tested.p_permutation, 1.0, False, tested.method, why,
        )  # fmt: skip


@dataclass(frozen=True)
class _Tested:
    low: float
    high: float
    p_value: float
    p_permutation: float
    method: str


def side_factor(side: Sequence[Spans]) -> float:
    """Return as how many events one independent event counts: calls by their outermost call and storm."""
    found = [1.0]
    for spans in side:
        groups = np.maximum(spans.occasion, 0)
        if not len(groups):
            continue
        found.append(events.cluster_factor(events.sizes(groups, spans.weight)))
    return max(found)


def _t_test(log_ratio: float, error: float, freedom: float) -> float:
    if not error:
        return 0.0 if log_ratio else 1.0
    return float(2 * stats.t.sf(abs(log_ratio) / error, freedom))


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    values = [None if one is None else one * factor for one in (estimate.value, estimate.low, estimate.high)]
    return dataclasses.replace(estimate, value=values[0], low=values[1], high=values[2])


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _fmin(one: float, two: float) -> float:
    return two if math.isnan(one) else min(one, two)


def _fmax(one: float, two: float) -> float:
    return two if math.isnan(one) else max(one, two)


def _least(one: float | None, two: float) -> float:
    return two if one is None else min(one, two)


def _greatest(one: float | None, two: float) -> float:
    return two if one is None else max(one, two)
