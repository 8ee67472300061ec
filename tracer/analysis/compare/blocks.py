"""Quantiles, sums and their changes over time blocks: bootstrap for intervals, permutations for significance.

Calls in one cron tick are not independent, nor are ticks of one storm; blocks of time nearly are, if they are long
enough. So what is drawn again, or exchanged between the sides, are whole blocks. How long is enough is not known: it
is done with several lengths, and the most careful answer counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stallscope.tracer.analysis.compare.sides import Run, Side, Spans
from stallscope.tracer.analysis.tables import NS_PER_S, Ints

Floats = npt.NDArray[np.float64]

LEVELS = (24, 12, 6)
"""Blocks that the shorter side is cut into, for each length."""

MIN_BLOCK_S = 0.5
"""Five cron ticks at ``hz`` 10; what the kernel only counted is known twice a second."""

RESAMPLES = 499
_SEED = 20_241_201
_GROWTH = 1.015
"""Bins hold 1.5% of the calls that are longer: exact in the tail, half a percent in the middle."""


@dataclass(frozen=True)
class Blocks:
    """One kind of event on one side, in time blocks; arrays have a row for each block, of all recordings in turn.

    Attributes:
        run: the recording of each block; exposure_s: for how long servers were watched in it.
        count: events, those only counted included; total_ns, self_ns: sums of times.
        bins: events by length, shape (blocks, bins); the first bin is for those only counted.
    """

    run: Ints
    exposure_s: Floats
    count: Floats
    total_ns: Floats
    self_ns: Floats
    bins: Floats

    def __len__(self) -> int:
        return len(self.run)

    @property
    def occupied(self) -> int:
        """Return how many blocks have any event."""
        return int(np.count_nonzero(self.count))


@dataclass(frozen=True)
class Weighted:
    """Blocks with many weightings of them; shape of weights: (many, blocks)."""

    blocks: Blocks
    weights: Floats

    @cached_property
    def exposure_s(self) -> Floats:
        """Return for how long servers were watched, for each weighting."""
        return self.weights @ self.blocks.exposure_s

    @cached_property
    def running(self) -> Floats:
        """Return how many events are in each bin or a lower one, for each weighting; shape (many, bins)."""
        return np.cumsum(self.weights @ self.blocks.bins, axis=1)


@dataclass(frozen=True)
class Cut:
    """Both sides cut into blocks of one length, with common bins of lengths.

    Attributes:
        length_ns: of the events in each bin: the greatest; first of those only counted, NaN if not known.
    """

    before: Blocks
    after: Blocks
    length_ns: Floats

    @cached_property
    def drawn(self) -> tuple[Weighted, Weighted]:
        """Return both sides with their blocks drawn again, within each recording."""
        rng = np.random.default_rng(_SEED)
        one, two = (Weighted(blocks, _drawn(blocks, RESAMPLES, rng)) for blocks in (self.before, self.after))
        return one, two

    @cached_property
    def dealt(self) -> tuple[Weighted, Weighted]:
        """Return both sides with the blocks of both dealt at random; the first as they were."""
        pooled = _joined([self.before, self.after])
        order = np.argsort(np.random.default_rng(_SEED).random((RESAMPLES, len(pooled))), axis=1)
        taken = np.zeros((RESAMPLES + 1, len(pooled)))
        np.put_along_axis(taken[1:], order[:, : len(self.after)], 1.0, axis=1)
        taken[0, len(self.before) :] = 1.0
        return Weighted(pooled, 1.0 - taken), Weighted(pooled, taken)


def cuts(before: Side, after: Side, name: str) -> list[Cut]:
    """Return both sides in blocks of each length that makes sense; empty where a side is too short for any."""
    spans = [[run.spans.get(name) for run in side.runs] for side in (before, after)]
    known = [one.duration_ns for side in spans for one in side if one is not None]
    lengths = np.sort(np.concatenate(known)) if known else np.zeros(0, np.int64)
    edges = _bin_edges(lengths)
    middles = np.concatenate([[_shortest_recorded(before, after)], lengths[edges[1:] - 1].astype(float)])
    bounds = lengths[edges[1:-1] - 1] if len(edges) > 2 else np.zeros(0, np.int64)
    shortest = min(sum(run.seconds for run in side.runs) for side in (before, after))
    result = []
    for level in LEVELS:
        block_s = shortest / level
        if block_s >= MIN_BLOCK_S:
            made = [
                _side_blocks(side.runs, one, block_s, bounds, len(middles))
                for side, one in zip((before, after), spans, strict=True)
            ]
            result.append(Cut(made[0], made[1], middles))
    return result


def _shortest_recorded(before: Side, after: Side) -> float:
    """Return what calls that were only counted are shorter than, ns; NaN where the recordings differ."""
    limits = {run.analysis.manifest.min_duration_ns for side in (before, after) for run in side.runs}
    return float(limits.pop()) or math.nan if len(limits) == 1 else math.nan


def _bin_edges(lengths: Ints) -> Ints:
    """Return where bins of sorted lengths begin and end: ranks from the top in geometric steps."""
    count = len(lengths)
    if not count:
        return np.zeros(1, np.int64)
    steps = max(int(math.log(count) / math.log(_GROWTH)) + 2, 2)
    ranks = np.unique(np.minimum(np.floor(_GROWTH ** np.arange(steps)), count).astype(np.int64))
    edges = np.unique(np.concatenate([[0], count - ranks, [count]]))
    # equal lengths belong together
    first = np.searchsorted(lengths, lengths[np.minimum(edges, count - 1)], side="left")
    return np.append(np.unique(first), count).astype(np.int64)


def _side_blocks(runs: Sequence[Run], spans: Sequence[Spans | None], block_s: float, bounds: Ints, bins: int) -> Blocks:
    parts = []
    for index, (run, one) in enumerate(zip(runs, spans, strict=True)):
        number = max(round(run.seconds / block_s), 1)
        edges = np.linspace(0, run.seconds, number + 1)
        exposure = run.exposures(edges)
        count, total, own = np.zeros(number), np.zeros(number), np.zeros(number)
        table = np.zeros((number, bins))
        if one is not None:
            place = np.clip(np.searchsorted(edges * NS_PER_S, one.time_ns, side="right") - 1, 0, number - 1)
            for array, values in ((count, one.weight), (total, one.total_ns), (own, one.self_ns)):
                np.add.at(array, place, values)
            np.add.at(table, (place, 1 + np.searchsorted(bounds, one.duration_ns, side="left")), 1)
            short = np.diff(np.interp(edges, one.short_at_s, one.short_calls))
            short_ns = np.diff(np.interp(edges, one.short_at_s, one.short_ns))
            count, total, own = count + short, total + short_ns, own + short_ns
            table[:, 0] = short
        parts.append(Blocks(np.full(number, index), exposure, count, total, own, table))
    return _joined(parts)


_ARRAYS = ("run", "exposure_s", "count", "total_ns", "self_ns", "bins")


def _joined(parts: Sequence[Blocks]) -> Blocks:
    return Blocks(*(np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS))


def _drawn(blocks: Blocks, draws: int, rng: np.random.Generator) -> Floats:
    """Return how often each block is drawn, within its recording; shape (draws, blocks)."""
    weights = np.zeros((draws, len(blocks)))
    for run in np.unique(blocks.run):
        mine = np.flatnonzero(blocks.run == run)
        weights[:, mine] = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), size=draws)
    return weights


class Statistic:
    """A number of a side, computed for many weightings of its blocks at once."""

    def of(self, weighted: Weighted, length_ns: Floats) -> Floats:
        """Return the number for each weighting; NaN where there is none."""
        raise NotImplementedError


@dataclass(frozen=True)
class PerSecond(Statistic):
    """A column of the blocks per second of watching."""

    column: str

    def of(self, weighted: Weighted, length_ns: Floats) -> Floats:
        """Return the sum over the exposure."""
        total = weighted.weights @ getattr(weighted.blocks, self.column)
        exposure = weighted.exposure_s
        return np.divide(total, exposure, out=np.full(len(total), np.nan), where=exposure > 0)


@dataclass(frozen=True)
class Quantile(Statistic):
    """A quantile of lengths, by nearest rank; 1.0 is the greatest."""

    share: float

    def of(self, weighted: Weighted, length_ns: Floats) -> Floats:
        """Return the quantile, in ns; NaN where it is below what was recorded."""
        running = weighted.running
        count = running[:, -1]
        # shares of whole calls: a thousandth forgives what interpolation made of those only counted
        rank = np.maximum(np.ceil(self.share * count - 1e-3), 1e-9)
        place = np.argmax(running >= rank[:, None] - 1e-6, axis=1)
        return np.where(count > 0, length_ns[place], np.nan)


@dataclass(frozen=True)
class Resampled:
    """What blocks tell of a change, on the scale of natural logarithms.

    Attributes:
        variance: of the logarithm of the ratio, from within the recordings; NaN: too few blocks with events.
        low, high: bounds of the ratio by bootstrap, percentiles; NaN likewise.
        p_value: by permutation; 1 where it cannot be told.
        blocks: of the coarsest cut, both sides together.
        runs: variance among the recordings of a side beyond that within, and its degrees of freedom.
    """

    variance: float
    low: float
    high: float
    p_value: float
    blocks: int
    runs: tuple[float, int]


def change(sides: Sequence[Cut], statistic: Statistic, confidence: float) -> Resampled:
    """Return what the blocks tell of the change of a number, the most careful of all block lengths."""
    variances, lows, highs, p_values = [], [], [], []
    runs = (0.0, 0)
    for cut in sides:
        p_values.append(_permuted(cut, statistic))
        one, two = (_logarithms(side, cut.length_ns, statistic) for side in cut.drawn)
        if one is None or two is None:
            continue
        many = min(len(one), len(two))
        tails = np.quantile(two[:many] - one[:many], [(1 - confidence) / 2, (1 + confidence) / 2])
        variances.append(_grown(float(np.var(one)), cut.before) + _grown(float(np.var(two)), cut.after))
        lows.append(float(tails[0]))
        highs.append(float(tails[1]))
        runs = _between(cut, statistic)
    if not sides:
        return Resampled(math.nan, math.nan, math.nan, 1.0, 0, runs)
    blocks = len(sides[-1].before) + len(sides[-1].after)
    if len(variances) < len(sides):
        return Resampled(math.nan, math.nan, math.nan, max(p_values), blocks, runs)
    return Resampled(max(variances), math.exp(min(lows)), math.exp(max(highs)), max(p_values), blocks, runs)


def side_bounds(side: Weighted, length_ns: Floats, statistic: Statistic, confidence: float) -> tuple[float, float]:
    """Return the bounds of one side's number by bootstrap; NaN where too few blocks have events."""
    logs = _logarithms(side, length_ns, statistic)
    if logs is None:
        return math.nan, math.nan
    low, high = np.quantile(logs, [(1 - confidence) / 2, (1 + confidence) / 2])
    return math.exp(low), math.exp(high)


_FEWEST = 3
"""Blocks with events that a side needs for a bootstrap."""


def _logarithms(side: Weighted, length_ns: Floats, statistic: Statistic) -> Floats | None:
    """Return logarithms of the number for each weighting that has one; None: too few blocks have events."""
    if side.blocks.occupied < _FEWEST:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(statistic.of(side, length_ns))
    logs = logs[np.isfinite(logs)]
    return logs if len(logs) >= len(side.weights) // 2 else None


def _grown(variance: float, blocks: Blocks) -> float:
    """Return the variance as it would be had the mean not been taken from the same blocks."""
    number = len(blocks) - len(np.unique(blocks.run))
    return float(variance) * len(blocks) / number if number else math.inf


def _permuted(cut: Cut, statistic: Statistic) -> float:
    """Return how often a change at least as great comes about when blocks are dealt to the sides at random."""
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = (np.log(statistic.of(side, cut.length_ns)) for side in cut.dealt)
        size = np.abs(two - one)
    # nothing on one side is the greatest change there is; nothing on both is none
    size = np.where(np.isnan(size), 0.0, size)
    return float(np.mean(size >= size[0] - 1e-12))


def _between(cut: Cut, statistic: Statistic) -> tuple[float, int]:
    """Return the variance of the logarithm among recordings of a side beyond that within, and its freedom."""
    squares, freedom = 0.0, 0
    for side in cut.drawn:
        numbers = np.unique(side.blocks.run)
        values, within = [], []
        for run in numbers if len(numbers) > 1 else ():
            mine = side.blocks.run == run
            part = Blocks(*(getattr(side.blocks, name)[mine] for name in _ARRAYS))
            with np.errstate(divide="ignore", invalid="ignore"):
                value = float(np.log(statistic.of(Weighted(part, np.ones((1, len(part)))), cut.length_ns))[0])
            logs = _logarithms(Weighted(part, side.weights[:, mine]), cut.length_ns, statistic)
            if math.isfinite(value):
                values.append(value)
                within.append(0.0 if logs is None else _grown(float(np.var(logs)), part))
        if len(values) > 1:
            squares += max(float(np.var(values, ddof=1)) - float(np.mean(within)), 0.0) * (len(values) - 1)
            freedom += len(values) - 1
    return (squares / freedom if freedom else 0.0), freedom
