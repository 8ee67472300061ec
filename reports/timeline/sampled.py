"""The sampled stacks of each stall, as the trees that the page draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.samples import ROOT, plain_name
from stallscope.tracer.analysis.tables import Ints

MAX_TREES = 300
"""Stalls whose samples are kept as a tree: the first of those asked for, which are the worst."""

MAX_NODES = 400
"""Chains of functions kept of one tree, by time."""

ABOVE_THE_LOOP = frozenset(
    (
        "_start", "main", "__libc_start_main", "__libc_start_main_impl", "__libc_start_call_main", "aeMain",
        "aeProcessEvents",
    )
)  # fmt: skip
"""The same at the root of every stack: left out, so that there is room for what differs."""


@dataclass(frozen=True)
class SampledTrees:
    """The trees of the stalls, one after the other.

    Attributes:
        functions: each different (name, file).
        nodes: ``stall`` (row of the page's stalls), ``parent`` (row in ``nodes``, ROOT: none; always smaller),
            ``function`` (place in ``functions``), ``samples``, ``weight_ns``, ``self_ns``, ``off_ns`` as in
            :meth:`Samples.paths`; int64.
    """

    functions: tuple[tuple[str, str], ...]
    nodes: pd.DataFrame


_NUMBERS = ["samples", "weight_ns", "self_ns", "off_ns"]


def sampled_trees(analysis: Analysis, stalls: Ints, worst: Ints) -> SampledTrees:
    """Return the trees of the worst stalls that were sampled.

    Args:
        stalls: rows of ``Stalls.frame`` that the page shows, ascending.
        worst: those of them to keep trees of, the worst first.
    """
    functions: dict[tuple[str, str], int] = {}
    parts = []
    rows = 0
    for stall, tree in analysis.samples.by_stall(np.sort(worst[:MAX_TREES]).tolist()):
        part = _pruned(_below_the_loop(tree))
        names = zip(part["name"], part["file"], strict=True)
        part["function"] = [functions.setdefault(name, len(functions)) for name in names]
        part["stall"] = int(np.searchsorted(stalls, stall))
        part["parent"] = np.where(part["parent"] == ROOT, ROOT, part["parent"] + rows)
        rows += len(part)
        parts.append(part)
    columns = ["stall", "parent", "function", *_NUMBERS]
    nodes = pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)
    return SampledTrees(tuple(functions), nodes.astype(np.int64))


def _below_the_loop(tree: pd.DataFrame) -> pd.DataFrame:
    """Return a tree without what is above the event loop."""
    parent = tree["parent"].to_numpy()
    dropped = np.zeros(len(tree), bool)
    for row, name in enumerate(tree["name"]):
        above = parent[row] == ROOT or dropped[parent[row]]
        dropped[row] = above and plain_name(name) in ABOVE_THE_LOOP
    # time in the loop itself keeps its function
    dropped &= tree["self_ns"].to_numpy() == 0
    return _without(tree, dropped)


def _pruned(tree: pd.DataFrame) -> pd.DataFrame:
    """Return a tree with at most ``MAX_NODES``, the heaviest: a caller has at least its callee's time."""
    order = np.lexsort((tree.index.to_numpy(), -tree["weight_ns"].to_numpy()))
    dropped = np.zeros(len(tree), bool)
    dropped[order[MAX_NODES:]] = True
    return _without(tree, dropped)


def _without(tree: pd.DataFrame, dropped: npt.NDArray[np.bool_]) -> pd.DataFrame:
    """Return a tree without some rows; what was called from those has no caller."""
    parent = tree["parent"].to_numpy()
    place = np.append(np.cumsum(~dropped) - 1, ROOT)
    place[:-1][dropped] = ROOT
    return tree.loc[~dropped].assign(parent=place[parent][~dropped]).reset_index(drop=True)
