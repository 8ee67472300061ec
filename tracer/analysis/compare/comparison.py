"""``stallscope diff``: every number before and after, its change with an interval, and whether it is significant.

How one change is found is in :mod:`changes`. It is significant when three tests agree: the parametric one (t, and
exact Poisson for rates) after Holm's correction for the number of comparisons, and the permutation of blocks. Where
they do not agree, the interval reaches to no change.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stallscope.tracer.analysis.compare.changes import DEFAULT_VARIATION, QUANTILES, Change, Changes
from stallscope.tracer.analysis.compare.comparable import DEFAULT_LOAD_BAND, Load, Obstacle, loads, obstacles
from stallscope.tracer.analysis.compare.headline import headline, notes
from stallscope.tracer.analysis.compare.sides import ACCEPT_WAIT, OVERFLOWS, STALLS, Side

COMPARISON_VERSION = 1

DEFAULT_CONFIDENCE = 0.95
POINTS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9995, 0.9999, 1.0)
"""Shares at which the distributions are told."""


@dataclass(frozen=True)
class Distribution:
    """How long events of one kind took, on one side.

    Attributes:
        points: (share, ns): that share of the events took at most so long; without those only counted.
        n: events recorded; short: those only counted, all shorter.
    """

    points: tuple[tuple[float, int], ...]
    n: int
    short: int


@dataclass(frozen=True)
class Distributions:
    """How long events of one kind took, on both sides."""

    subject: str
    before: Distribution
    after: Distribution


@dataclass(frozen=True)
class RunSummary:
    """One recording of a side: its file, the server in it and for how long it was watched.

    Attributes:
        clients, connections_per_s, commands_per_s: None where not known.
    """

    path: str
    server: str
    exposure_s: float
    started_wall_ns: int
    clients: float | None
    connections_per_s: float | None
    commands_per_s: float | None


@dataclass(frozen=True)
class Comparison:
    """Everything ``stallscope diff`` says.

    Attributes:
        headline: the sentence to read first.
        obstacles: what must not be compared; load: each side's, against the band; notes: what to know.
        changes: by subject, then quantity.
        comparisons: how many of them were tested, for Holm's correction.
    """

    headline: str
    before: tuple[RunSummary, ...]
    after: tuple[RunSummary, ...]
    confidence: float
    variation: float
    load_band: float
    obstacles: tuple[Obstacle, ...]
    load: tuple[Load, ...]
    notes: tuple[str, ...]
    changes: tuple[Change, ...]
    comparisons: int
    distributions: tuple[Distributions, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; what is unbounded or not known is null."""
        return {"comparison_version": COMPARISON_VERSION, **finite(dataclasses.asdict(self))}


def compare(
    before: Side,
    after: Side,
    *,
    confidence: float = DEFAULT_CONFIDENCE,
    variation: float = DEFAULT_VARIATION,
    load_band: float = DEFAULT_LOAD_BAND,
) -> Comparison:
    """Return what changed from one side to the other.

    Args:
        confidence: of every interval, and of the tests together.
        variation: standard deviation from recording to recording, as a share, where it is not measured.
        load_band: by how much the load may differ, as a share.
    """
    found = obstacles(before, after, load_band)
    changes: list[Change] = []
    for subject in subjects(before, after):
        reason = next((one.text for one in found if one.touches(subject)), "")
        changes += changes_of(before, after, subject, confidence, variation, reason)
    adjusted = corrected(changes, 1 - confidence)
    comparison = Comparison(
        headline="",
        before=tuple(run_summaries(before)),
        after=tuple(run_summaries(after)),
        confidence=confidence,
        variation=variation,
        load_band=load_band,
        obstacles=tuple(found),
        load=tuple(loads(before, after, load_band)),
        notes=(),
        changes=tuple(adjusted),
        comparisons=sum(_tested(change) for change in adjusted),
        distributions=tuple(
            Distributions(name, _distribution(before, name), _distribution(after, name))
            for name in subjects(before, after)
            if name != OVERFLOWS
        ),
    )
    comparison = dataclasses.replace(comparison, notes=tuple(notes(comparison, before, after)))
    return dataclasses.replace(comparison, headline=headline(comparison))


def subjects(before: Side, after: Side) -> list[str]:
    """Return what is compared: stalls, overflows, accept wait, and the functions that either side traced."""
    observed = {name for side in (before, after) for run in side.runs for name in run.spans}
    fixed = [name for name in (STALLS, OVERFLOWS, ACCEPT_WAIT) if name in observed]
    return fixed + list(dict.fromkeys((*before.names, *after.names)))


def changes_of(
    before: Side, after: Side, subject: str, confidence: float, variation: float, reason: str = ""
) -> list[Change]:
    """Return every quantity of one subject, not yet corrected for the number of comparisons.

    Args:
        reason: what keeps it from being compared, "" if nothing does.
    """
    reason = reason or _unknown(before, after, subject)
    maker = Changes(before, after, subject, confidence, variation, reason)
    result = []
    if subject != ACCEPT_WAIT:
        result.append(maker.rate("events" if subject in (STALLS, OVERFLOWS) else "calls", "1/s", "count"))
    if subject not in (STALLS, OVERFLOWS, ACCEPT_WAIT):
        result += maker.per_client()
    if subject != OVERFLOWS:
        result += [maker.quantile(name, share) for name, share in QUANTILES.items()]
    if subject not in (OVERFLOWS, ACCEPT_WAIT):
        result.append(maker.rate("total", "ns/s", "total_ns"))
    if subject not in (STALLS, OVERFLOWS, ACCEPT_WAIT):
        result.append(maker.rate("self", "ns/s", "self_ns"))
    return result


def _unknown(before: Side, after: Side, subject: str) -> str:
    """Return on which side a subject was not observed."""
    sides = [name for name, side in (("before", before), ("after", after))
             if not all(subject in run.spans for run in side.runs)]  # fmt: skip
    return f"not observed {' and '.join(sides)}" if sides else ""


def corrected(changes: Sequence[Change], level: float) -> list[Change]:
    """Return the changes with p values corrected for their number (Holm 1979), and whether they are significant."""
    tested = [index for index, change in enumerate(changes) if _tested(change)]
    order = sorted(tested, key=lambda index: changes[index].p_value)
    result = list(changes)
    running = 0.0
    for rank, index in enumerate(order):
        change = changes[index]
        running = max(running, min(change.p_value * (len(order) - rank), 1.0))
        significant = running <= level and change.p_permutation <= level
        result[index] = dataclasses.replace(change, p_adjusted=running, significant=significant)
    return [_consistent(change) for change in result]


def _consistent(change: Change) -> Change:
    """Return the change with an interval that reaches to no change where it is not significant."""
    if change.significant or change.low is None:
        return change
    high = change.high if change.high is None else max(change.high, 1.0)
    return dataclasses.replace(change, low=min(change.low, 1.0), high=high)


def _tested(change: Change) -> bool:
    return not change.why_not


def _distribution(side: Side, subject: str) -> Distribution:
    known = [run.spans[subject] for run in side.runs if subject in run.spans]
    lengths = np.sort(np.concatenate([one.duration_ns for one in known] or [np.zeros(0, np.int64)]))
    short = sum(int(one.short_calls[-1]) for one in known)
    count = len(lengths)
    places = [min(max(math.ceil(share * count) - 1, 0), count - 1) for share in POINTS if count]
    points = tuple((share, int(lengths[place])) for share, place in zip(POINTS, places, strict=False))
    return Distribution(points, count, short)


def run_summaries(side: Side) -> list[RunSummary]:
    """Return the recordings of a side, as plain data."""
    return [
        RunSummary(
            run.path,
            ", ".join(
                dict.fromkeys(
                    f"{one.product} {one.version}".strip() or one.exe for one in run.analysis.manifest.targets
                )
            ),
            run.exposure_s,
            run.analysis.manifest.started_ns + run.analysis.manifest.wall_offset_ns,
            run.clients,
            run.connections_per_s,
            run.commands_per_s,
        )
        for run in side.runs
    ]


def finite(value: Any) -> Any:
    """Return plain data in which infinite numbers are None, as JSON has none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
