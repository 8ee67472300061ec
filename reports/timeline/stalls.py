"""What the stall lane shows, and for each stall what filled it, as a tree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.reports.timeline.sampled import SampledTrees, sampled_trees
from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.segments import ranges
from stallscope.tracer.analysis.tables import Ints

MAX_STALLS = 20_000
"""Stalls drawn one by one: those with refused connections and then the longest. The others are counted."""

MAX_TREES = 1_000
"""Stalls whose calls are kept as a tree, the worst."""

MAX_TREE_PATHS = 200
"""Chains of functions kept of one tree, by time."""


@dataclass(frozen=True)
class StallLane:
    """The stalls, the worst of them with their trees.

    Attributes:
        frame: the columns of ``Stalls.frame`` that the page shows, of the kept stalls, by start, times since the
            start of the timeline, and ``tree`` (bool): its calls are in ``trees``.
        total: all stalls; total_ns: all their time, also of those not kept; longest_ns: of the longest, 0: none.
        trees: time by stall and chain of functions: ``stall`` (row of ``frame``), ``path`` (index in
            ``Nested.paths``), ``calls``, ``total_ns``, ``self_ns``, ``longest_ns``; int64.
        sampled: the trees of their sampled stacks.
    """

    frame: pd.DataFrame
    total: int
    total_ns: int
    longest_ns: int
    trees: pd.DataFrame
    sampled: SampledTrees


_COLUMNS = [
    "start_ns",
    "duration_ns",
    "pid",
    "tid",
    "unfinished",
    "listener",
    "queue_start",
    "queue_max",
    "queue_limit",
    "drain_ns",
    "drained",
    "accepted",
    "accepted_drain",
    "overflows",
    "overflows_drain",
    "connections",
    "explained_ns",
]


def stall_lane(analysis: Analysis, origin_ns: int) -> StallLane:
    """Return the stalls to draw; none in which a connection was refused is left out unless there are too many."""
    frame = analysis.stalls.frame
    badness = frame.assign(refused=frame["overflows"] + frame["overflows_drain"])
    worst = badness.nlargest(MAX_STALLS, ["refused", "duration_ns"]).index
    kept = np.sort(worst.to_numpy())
    with_tree = np.sort(worst[:MAX_TREES].to_numpy())
    shown = frame.loc[kept, _COLUMNS].reset_index(drop=True)
    shown["start_ns"] -= origin_ns
    shown["tree"] = np.isin(kept, with_tree)
    trees = stall_trees(analysis, with_tree)
    trees["stall"] = np.searchsorted(kept, trees["stall"].to_numpy())
    lengths = frame["duration_ns"].to_numpy()
    sampled = sampled_trees(analysis, kept, worst.to_numpy())
    return StallLane(shown, len(frame), int(lengths.sum()), int(lengths.max(initial=0)), trees, sampled)


def stall_trees(analysis: Analysis, rows: Ints) -> pd.DataFrame:
    """Return ``StallLane.trees`` of these stalls; ``stall`` is the row of ``Stalls.frame``."""
    frame = analysis.stalls.frame.loc[rows]
    calls = analysis.nested.calls
    owner, call = ranges(frame["first_call"].to_numpy(), frame["last_call"].to_numpy())
    end = (frame["start_ns"] + frame["duration_ns"]).to_numpy()[owner]
    left = end - calls["start_ns"].to_numpy()[call]
    duration = np.minimum(calls["duration_ns"].to_numpy()[call], left)
    inside = pd.DataFrame(
        {
            "stall": rows[owner],
            "path": calls["path"].to_numpy()[call].astype(np.int64),
            "duration_ns": duration,
            "self_ns": np.minimum(calls["self_ns"].to_numpy()[call], left),
        }
    )
    trees = (
        inside.groupby(["stall", "path"], sort=True)
        .agg(
            calls=("self_ns", "size"),
            total_ns=("duration_ns", "sum"),
            self_ns=("self_ns", "sum"),
            longest_ns=("duration_ns", "max"),
        )
        .reset_index()
        .astype(np.int64)
    )
    # what encloses a chain took at least its time, so no kept chain loses its caller
    place = trees.sort_values(["stall", "total_ns", "path"], ascending=[True, False, True]).groupby("stall").cumcount()
    return trees.loc[(place < MAX_TREE_PATHS).reindex(trees.index)].reset_index(drop=True)
