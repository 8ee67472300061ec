"""Whether overflows fall into stalls more often than chance would have it.

Both series come in clusters, so counting how many overflows "would" fall into stalls needs a comparison that
keeps the clusters: one series is turned against the other, as on a ring, by every possible shift. If the two
had nothing to do with each other, the real position would be one of these shifts like any other. So the
share of the shifts with as much overlap or more is a p-value, and the mean over all shifts is what chance
alone explains.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.tracer.analysis.tables import Ints

STEP_NS = 1_000_000
"""Shifts are this far apart, at most; farther where that would be more than ``MOST_STEPS``."""

FEWEST_STEPS, MOST_STEPS = 2**10, 2**20


@dataclass(frozen=True)
class Coincidence:
    """How many overflows fall into stalls, against chance.

    Attributes:
        overflows: those compared; together: of them, those in a stall.
        expected: as many would be in a stall by chance: the mean over all shifts.
        p_value: share of all shifts, the real one among them, with as many together or more; so never 0.
            With few stalls it cannot be small: one stall and one burst inside it meet by chance as often as
            the stall is long.
        shifts: how many were compared; stalls: how many intervals; stall_share: of the recording's time.
    """

    overflows: int
    together: int
    expected: float
    p_value: float
    shifts: int
    stalls: int
    stall_share: float


@dataclass(frozen=True)
class Series:
    """The stalls and the overflows of one process.

    Attributes:
        begin_ns, end_ns: of each stall.
        time_ns, count: when overflows were seen, and how many then.
    """

    begin_ns: Ints
    end_ns: Ints
    time_ns: Ints
    count: Ints


def compare_with_chance(processes: Iterable[Series], start_ns: int, end_ns: int) -> Coincidence | None:
    """Return how the overflows fall into the stalls of their process, against all circular shifts.

    Time is cut into steps; a step that a stall touches belongs to it, at every shift. All processes are
    shifted together. None where there are no stalls, no overflows or no time.

    Args:
        processes: each with its own stalls and overflows.
        start_ns: begin of the recording; end_ns: its end.
    """
    length_ns = end_ns - start_ns
    if length_ns <= 0:
        return None
    steps = int(np.clip(2 ** np.ceil(np.log2(max(length_ns / STEP_NS, 1))), FEWEST_STEPS, MOST_STEPS))
    overlap = np.zeros(steps)
    overflows = stalls = stalled_steps = rings = 0
    for one in processes:
        weight = np.zeros(steps)
        np.add.at(weight, _step(one.time_ns, start_ns, length_ns, steps), one.count)
        stalled = _touched(one, start_ns, length_ns, steps)
        # the cross-correlation of two rings is a product of their spectra
        overlap += np.fft.irfft(np.conj(np.fft.rfft(stalled)) * np.fft.rfft(weight), steps)
        overflows += int(weight.sum())
        stalls += len(one.begin_ns)
        stalled_steps += int(stalled.sum())
        rings += 1
    if not overflows or not stalls:
        return None
    # sums of whole numbers: what is left of them is rounding of the transform
    counts = np.rint(overlap).astype(np.int64)
    return Coincidence(
        overflows=overflows,
        together=int(counts[0]),
        expected=float(counts.mean()),
        p_value=float(np.count_nonzero(counts >= counts[0]) / steps),
        shifts=steps,
        stalls=stalls,
        stall_share=stalled_steps / (steps * rings),
    )


def _step(time_ns: Ints, start_ns: int, length_ns: int, steps: int) -> Ints:
    share = np.clip((time_ns - start_ns) / length_ns, 0, 1)
    return np.minimum((share * steps).astype(np.int64), steps - 1)


def _touched(one: Series, start_ns: int, length_ns: int, steps: int) -> npt.NDArray[np.float64]:
    """Return 1 for the steps that a stall touches and 0 for the others; shape (steps,)."""
    edges = np.zeros(steps + 1, np.int64)
    np.add.at(edges, _step(one.begin_ns, start_ns, length_ns, steps), 1)
    np.add.at(edges, _step(one.end_ns, start_ns, length_ns, steps) + 1, -1)
    return (np.cumsum(edges[:-1]) > 0).astype(np.float64)
