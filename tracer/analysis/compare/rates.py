"""Exact inference on rates of events: intervals, ratios of two rates, and how long one must watch.

All of it rests on the Poisson distribution of independent events. Events that come in clusters are taken as so many
fewer: ``factor`` is :func:`events.cluster_factor`, and n events count as n / factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import special, stats


@dataclass(frozen=True)
class Interval:
    """A rate or a ratio of rates with its bounds; ``high`` may be infinite."""

    value: float
    low: float
    high: float


def rate_bounds(count: float, exposure: float, confidence: float, factor: float = 1.0) -> Interval:
    """Return a rate with its exact two-sided interval (Garwood 1936), in events per unit of exposure.

    Args:
        count: events seen; exposure: for how long, above 0.
        confidence: 0.95 leaves 2.5% on either side.
        factor: how many events come together.
    """
    tail = (1 - confidence) / 2
    high = upper_count(count / factor, 1 - tail) * factor
    return Interval(count / exposure, lower_count(count / factor, 1 - tail) * factor / exposure, high / exposure)


def upper_count(count: float, confidence: float) -> float:
    """Return the greatest mean of which so few events are not too unlikely, one-sided; 3.0 for none at 95%."""
    return float(special.gammaincinv(count + 1, confidence))


def lower_count(count: float, confidence: float) -> float:
    """Return the least mean of which so many events are not too unlikely, one-sided; 0 for none."""
    return float(special.gammaincinv(count, 1 - confidence)) if count > 0 else 0.0


def ratio_bounds(
    before: tuple[float, float], after: tuple[float, float], confidence: float, factor: float = 1.0
) -> Interval:
    """Return the ratio of two rates, after to before, with its exact two-sided interval (Clopper and Pearson 1934).

    Given how many events there were on both sides together, those after the change are binomial.

    Args:
        before, after: (events, exposure) of each side.
        confidence: two-sided, as 0.95.
        factor: how many events come together, on either side.
    """
    (count1, exposure1), (count2, exposure2) = before, after
    one, two = count1 / factor, count2 / factor
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(two, one + 1, tail)) if two else 0.0
    high = float(special.betaincinv(two + 1, one, 1 - tail)) if one else 1.0
    scale = exposure1 / exposure2
    value = math.nan if not count1 and not count2 else math.inf if not count1 else count2 / count1 * scale
    return Interval(value, _odds(low) * scale, _odds(high) * scale)


def ratio_test(before: tuple[float, float], after: tuple[float, float], factor: float = 1.0) -> float:
    """Return the two-sided p value of equal rates, exact and conditional (Przyborowski and Wilenski 1940).

    Clustered events are rounded so that the test is the more careful one: the higher rate down, the lower up.
    """
    (count1, exposure1), (count2, exposure2) = before, after
    if not count1 + count2:
        return 1.0
    first_higher = count1 / exposure1 >= count2 / exposure2
    one, two = count1 / factor, count2 / factor
    whole = (math.floor(one), math.ceil(two)) if first_higher else (math.ceil(one), math.floor(two))
    if not sum(whole):
        return 1.0
    share = exposure2 / (exposure1 + exposure2)
    return float(stats.binomtest(whole[1], sum(whole), share).pvalue)


def exposure_for(count: float, rate: float, confidence: float, factor: float = 1.0) -> float:
    """Return how long one must have watched, with so many events, to claim that the rate is below this one."""
    return upper_count(count / factor, confidence) * factor / rate


def chance_of(count: int, rate: float, exposure: float, factor: float = 1.0) -> float:
    """Return how likely it is to see at most so many events at a true rate, of clusters of this size."""
    return float(stats.poisson.cdf(math.floor(count / factor), rate * exposure / factor))


def _odds(share: float) -> float:
    return math.inf if share >= 1 else share / (1 - share)
