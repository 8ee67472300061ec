"""Which rows of a probe belong to a count of it: counters are read at a moment, rows come later and in batches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def first_of_each_probe(rows: npt.NDArray[np.void], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which rows are the first ``counts[probe]`` of their probe, as a mask; the counts go down by them.

    Args:
        rows: dtype ``EVENT``, in the order in which they were sent.
        counts: by probe, shape (MAX_PROBES,), none below 0.
    """
    chosen = np.zeros(len(rows), bool)
    for probe in np.flatnonzero(counts).tolist():
        mine = np.flatnonzero(rows["probe"] == probe)[: counts[probe]]
        chosen[mine] = True
        counts[probe] -= len(mine)
    return chosen


def identity(row: np.void) -> tuple[int, int, int]:
    """Return what one span is known by while it is under way and when it has ended."""
    return int(row["tid"]), int(row["probe"]), int(row["start_ns"])


def without_finished(unfinished: npt.NDArray[np.void], finished: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Return the unfinished spans that are not among the finished ones (both dtype ``EVENT``)."""
    alike = finished[np.isin(finished["start_ns"], unfinished["start_ns"])]
    done = {identity(row) for row in alike}
    return unfinished[np.array([identity(row) not in done for row in unfinished], bool)]
