"""What counts as one event: things that come together are no independent evidence.

The calls of one cron tick come together, and so do the ticks of one storm. A rate's uncertainty follows the number of
independent events, not of calls: of a compound Poisson process with c calls each time, the variance of the number of
calls is E[c^2] / E[c] times that of a plain one (Feller, An Introduction to Probability Theory, volume 1, XII.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

STORM_GAP_NS = 1_000_000_000
"""Events less than this apart are of one storm: Redis visits all clients in a second or a few, tick after tick."""


def occasions(time_ns: Ints, root: Ints) -> Ints:
    """Return a number for each call: the same for calls made in the same outermost call; by time, ascending.

    Args:
        time_ns: ascending.
        root: any number that tells the outermost calls apart.
    """
    _, first, inverse = np.unique(root, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[inverse.reshape(-1)] if len(time_ns) else np.zeros(0, np.int64)


def storm_gap_ns(count: int, seconds: float) -> int:
    """Return the gap that parts storms where so many events came in so long: less than a tenth of the usual one.

    Where events come all the time, those close by chance are no storm.
    """
    return min(STORM_GAP_NS, int(seconds * 1e9 / (10 * max(count, 1))))


def storms(time_ns: Ints, gap_ns: int = STORM_GAP_NS) -> Ints:
    """Return a number for each event, ascending in time: the same for those less than a gap after the one before."""
    return np.cumsum(np.diff(time_ns, prepend=time_ns[:1]) >= gap_ns).astype(np.int64)


def cluster_factor(sizes: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Return E[c^2] / E[c] of the sizes of what came together, at least 1; 1 for none."""
    known = np.asarray(sizes, float)
    known = known[known > 0]
    return max(float((known**2).sum() / known.sum()), 1.0) if len(known) else 1.0


def sizes(group: Ints, weight: Ints) -> npt.NDArray[np.float64]:
    """Return the sum of the weights of each group, as numbered from 0."""
    return np.bincount(group, weights=weight).astype(np.float64) if len(group) else np.zeros(0)
