"""Slow trees: calls that nothing recorded encloses and that took long, with everything they called.

Redis runs its periodic work as one call of serverCron. So one slow tree is one tick: how many clients it
visited, how long that took, and in which function the time went.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.tracer.analysis.nesting import Nested
from stallscope.tracer.analysis.segments import range_of, ranges
from stallscope.tracer.analysis.tables import Tables
from stallscope.tracer.manifest import CALL, Manifest

CLIENT_VISIT = "clientsCronResizeQueryBuffer"
"""The function that the cron calls once for each client it visits."""

KEPT_TREES = 20


@dataclass(frozen=True)
class Trees:
    """The slow trees of a recording.

    Attributes:
        frame: one row per tree whose root took at least the stall threshold, sorted by start:

            =========== ===== ===== ==================================================================
            start_ns    int64 ns    entry of the root
            duration_ns int64 ns    its length; until the end of the recording if unfinished
            pid, tid    int64       process and thread
            unfinished  bool        the root had not returned when the recording ended
            probe       int64       the root's function, id in the probe list
            first_call, int64       the calls of the tree, the root first: this range of rows of
            last_call               ``Nested.calls``, the end not included
            clients     int64       calls of clientsCronResizeQueryBuffer in it
            stall       int64       the stall (row of ``Stalls.frame``) it began in, -1: none
            =========== ===== ===== ==================================================================

        functions: what each tree called, the root included: ``tree`` (row of ``frame``), ``probe``, ``calls``,
            ``total_ns`` (recursion counted once), ``self_ns``, all int64; sorted by tree and, greatest
            first, self time. The self times of a tree add up to its duration.
    """

    frame: pd.DataFrame
    functions: pd.DataFrame


@dataclass(frozen=True)
class TreeFunction:
    """One function in one slow tree: its calls, their time with recursion counted once, and their own."""

    name: str
    calls: int
    total_ns: int
    self_ns: int


@dataclass(frozen=True)
class TreeSummary:
    """One slow tree as plain data.

    Attributes:
        root: name of the outermost function; start_ns: since the recording's start; calls: in it.
        clients: visits of clients.
        functions: most self time first.
    """

    root: str
    start_ns: int
    duration_ns: int
    pid: int
    tid: int
    unfinished: bool
    calls: int
    clients: int
    functions: tuple[TreeFunction, ...]


def find_trees(tables: Tables, nested: Nested, stalls: pd.DataFrame) -> Trees:
    """Return the slow trees.

    Args:
        stalls: ``Stalls.frame``, for the stall each tree is part of.
    """
    calls = nested.calls
    roots = np.flatnonzero(calls["depth"].to_numpy() == 0)
    slow = np.flatnonzero(calls["duration_ns"].to_numpy()[roots] >= max(tables.manifest.stall_ns, 1))
    # calls are sorted by thread and start, so a tree is the rows from its root to the next root
    ends = np.append(roots, len(calls))[slow + 1]
    first = roots[slow]
    frame = calls.iloc[first][["start_ns", "duration_ns", "pid", "tid", "unfinished", "probe"]]
    frame = frame.astype({"pid": np.int64, "tid": np.int64, "probe": np.int64})
    frame = frame.assign(first_call=first, last_call=ends).sort_values("start_ns", kind="stable", ignore_index=True)
    functions = _functions(frame, nested)
    visits = {probe.id for probe in tables.manifest.probes if probe.kind == CALL and probe.name == CLIENT_VISIT}
    clients = functions.loc[functions["probe"].isin(visits)].groupby("tree")["calls"].sum()
    frame["clients"] = clients.reindex(frame.index, fill_value=0).astype(np.int64)
    stall = range_of(frame["first_call"].to_numpy(), stalls["first_call"].to_numpy(), stalls["last_call"].to_numpy())
    return Trees(frame.assign(stall=stall), functions)


def summarise_trees(trees: Trees, manifest: Manifest) -> tuple[TreeSummary, ...]:
    """Return the longest trees, at most ``KEPT_TREES``, sorted by start."""
    names = {probe.id: probe.name for probe in manifest.probes}
    longest = trees.frame.nlargest(KEPT_TREES, "duration_ns").sort_index()
    summaries = []
    for index in longest.index.tolist():
        row = longest.loc[index]
        inside = trees.functions.loc[trees.functions["tree"] == index, ["probe", "calls", "total_ns", "self_ns"]]
        summaries.append(
            TreeSummary(
                root=names.get(int(row["probe"]), str(row["probe"])),
                start_ns=int(row["start_ns"]) - manifest.started_ns,
                duration_ns=int(row["duration_ns"]),
                pid=int(row["pid"]),
                tid=int(row["tid"]),
                unfinished=bool(row["unfinished"]),
                calls=int(row["last_call"]) - int(row["first_call"]),
                clients=int(row["clients"]),
                functions=tuple(
                    TreeFunction(names.get(probe, str(probe)), calls, total_ns, self_ns)
                    for probe, calls, total_ns, self_ns in inside.itertuples(index=False, name=None)
                ),
            )
        )
    return tuple(summaries)


def _functions(frame: pd.DataFrame, nested: Nested) -> pd.DataFrame:
    tree, call = ranges(frame["first_call"].to_numpy(), frame["last_call"].to_numpy())
    calls = nested.calls
    duration = calls["duration_ns"].to_numpy()[call]
    inside = pd.DataFrame(
        {
            "tree": tree,
            "probe": calls["probe"].to_numpy()[call].astype(np.int64),
            "total_ns": np.where(nested.outermost()[call], duration, 0),
            "self_ns": calls["self_ns"].to_numpy()[call],
        },
        copy=False,
    )
    groups = inside.groupby(["tree", "probe"], sort=True, as_index=False)
    result = groups.agg(calls=("self_ns", "size"), total_ns=("total_ns", "sum"), self_ns=("self_ns", "sum"))
    return result.sort_values(["tree", "self_ns"], ascending=[True, False], kind="stable", ignore_index=True)
