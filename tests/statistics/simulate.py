"""Recordings of which the truth is known, made of random numbers: what the statistics are held against.

Only what the comparison reads is made: spans by name, and thresholds. Every process is one that a Redis server shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from stallscope.tracer.analysis.compare.sides import STALLS, Run, Side, Spans

FUNCTION = "serverCron"
TICK_S = 0.1
CALLS = 5
"""Calls of the function in one tick."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Process:
    """How calls come about.

    Attributes:
        rate_per_s: of ticks, or of storms.
        storm_every_s: bounds of the time from one storm to the next; () for none.
        drift: standard deviation of the logarithm of lengths from one second to the next but a few.
        scale: of all lengths.
        spread: standard deviation of the logarithm of lengths from one recording to the next.
    """

    storm_every_s: tuple[float, float] | tuple[()] = ()
    storm_ticks: int = 3
    storm_factor: float = 60.0
    drift: float = 0.0
    scale: float = 1.0
    spread: float = 0.0


PROCESSES = {
    "steady ticks": Process(),
    "drifting ticks": Process(drift=0.3),
    "a storm every 5-30 s": Process(storm_every_s=(5, 30)),
    "storms and drift": Process(storm_every_s=(5, 30), drift=0.3),
}


def side(spans: list[dict[str, Spans]], seconds: float) -> Side:
    """Return a side of recordings of one length that have these spans."""
    manifest: Any = SimpleNamespace(min_duration_ns=0, stall_ns=10_000_000, targets=(), probes=())
    analysis: Any = SimpleNamespace(manifest=manifest, recording=SimpleNamespace(path="simulated.stall"))
    return Side(tuple(Run(analysis, seconds, ((0.0, seconds),), one, {FUNCTION: 1}) for one in spans))


def calls(process: Process, seconds: float, rng: np.random.Generator) -> dict[str, Spans]:
    """Return the calls of one recording."""
    ticks = np.arange(rng.uniform(0, TICK_S), seconds, TICK_S)
    level = rng.normal(0, 0.3, len(ticks)) + rng.normal(0, process.spread) + _drift(len(ticks), process.drift, rng)
    for start in _storms(process, seconds, rng):
        first = int(start / TICK_S)
        level[first : first + process.storm_ticks] += np.log(process.storm_factor)
    number = rng.poisson(CALLS, len(ticks))
    occasion = np.repeat(np.arange(len(ticks)), number)
    lengths = np.exp(np.log(50_000 * process.scale) + level[occasion] + rng.normal(0, 0.5, len(occasion)))
    times = ticks[occasion] * 1e9 + np.arange(len(occasion)) % 50
    return {FUNCTION: spans(times, lengths, occasion)}


def stalls(starts_s: Floats, rng: np.random.Generator) -> dict[str, Spans]:
    """Return stalls of at least 10 ms that begin at these times."""
    times = np.sort(starts_s)
    return {STALLS: spans(times * 1e9, 10_000_000 + rng.exponential(40_000_000, len(times)), np.arange(len(times)))}


def spans(times_ns: Floats, lengths_ns: Floats, occasion: npt.NDArray[np.int64]) -> Spans:
    """Return calls as one recording's spans."""
    lengths = lengths_ns.astype(np.int64)
    ones = np.ones(len(lengths), np.int64)
    return Spans(times_ns.astype(np.int64), lengths, lengths, lengths, occasion.astype(np.int64), ones)


def independent(rate_per_s: float, seconds: float, rng: np.random.Generator) -> Floats:
    """Return the times of independent stalls."""
    return rng.uniform(0, seconds, rng.poisson(rate_per_s * seconds))


def in_storms(rate_per_s: float, seconds: float, rng: np.random.Generator, size: float = 5.0) -> Floats:
    """Return the times of stalls that come in storms: a geometric number each time, tick after tick."""
    starts = rng.uniform(0, seconds, rng.poisson(rate_per_s / size * seconds))
    return _spread_out(starts, rng.geometric(1 / size, len(starts)), seconds)


def in_regular_storms(rate_per_s: float, seconds: float, rng: np.random.Generator, size: float = 5.0) -> Floats:
    """Return the times of stalls in storms that come at uneven but never at very short intervals."""
    mean = size / rate_per_s
    steps = rng.uniform(0.29, 1.71, int(seconds / mean * 3) + 10) * mean
    starts = np.cumsum(steps) - rng.uniform(0, 2) * mean
    starts = starts[(starts >= 0) & (starts < seconds)]
    return _spread_out(starts, rng.geometric(1 / size, len(starts)), seconds)


STALLS_BY: dict[str, Callable[[float, float, np.random.Generator], Floats]] = {
    "independent": independent,
    "in storms of 5": in_storms,
    "in storms of 5, one every so often": in_regular_storms,
}


def _spread_out(starts: Floats, sizes: npt.NDArray[np.int64], seconds: float) -> Floats:
    if not len(starts):
        return np.zeros(0)
    times = np.concatenate([start + TICK_S * np.arange(size) for start, size in zip(starts, sizes, strict=True)])
    return times[times < seconds]


def _storms(process: Process, seconds: float, rng: np.random.Generator) -> Floats:
    if not process.storm_every_s:
        return np.zeros(0)
    low, high = process.storm_every_s
    steps = rng.uniform(low, high, int(seconds / low) + 2)
    starts = np.cumsum(steps) - rng.uniform(0, high)
    return starts[(starts >= 0) & (starts < seconds)]


def _drift(number: int, deviation: float, rng: np.random.Generator) -> Floats:
    """Return a first-order autoregression with a memory of 2 s, and this standard deviation."""
    kept = np.exp(-TICK_S / 2.0)
    noise = rng.normal(0, deviation * np.sqrt(1 - kept**2), number)
    values = np.zeros(number)
    for index in range(number):
        values[index] = (values[index - 1] if index else rng.normal(0, deviation)) * kept + noise[index]
    return values
