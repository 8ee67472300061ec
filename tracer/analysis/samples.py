"""Where the main threads were in their stalls: sampled stacks, by stall, as trees and as culprits nobody named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from stallscope.probes.catalogue import functions as catalogued
from stallscope.tracer.analysis.sample_rows import RUNNABLE, STATES
from stallscope.tracer.analysis.stalls import Stalls
from stallscope.tracer.analysis.tables import Ints, Tables
from stallscope.tracer.manifest import CALL, Manifest
from stallscope.tracer.stack_table import KERNEL, StackFrame

NO_STALL = -1
ROOT = -1
"""The parent of the outermost functions of a tree."""

STACK_NOT_KEPT = "[stack not kept]"

NO_CPU = "no CPU"
"""What a stall mostly was in that the thread could have spent running, in place of a function's name."""

WORTH_NAMING = 0.2
"""A function is worth naming from this share of a stall on."""

MOST_OF = 0.5
"""A function is blamed rather than its caller as long as it has at least this share of the caller's time."""

PASSES_ON = frozenset(
    (
        "_start", "main", "__libc_start_main", "__libc_start_main_impl", "__libc_start_call_main", "aeMain",
        "aeProcessEvents", "beforeSleep",
        "readQueryFromClient", "connSocketEventHandler", "callHandler", "processInputBuffer", "processCommand",
        "processCommandAndResetClient", "processPendingCommandAndInputBuffer", "call", "serverCron", "clientsCron",
        "databasesCron", "processTimeEvents",
    )
)  # fmt: skip
"""Functions of every Redis through which all goes: that time was spent in them says nothing."""

INNER = re.compile(
    r"_|dict(?!RehashMilliseconds)|list[A-Z]|sds|z(?:m|c|re)alloc|zfree|zsl|je_|lua|SHA1|sha1|lzf_|crc\d|intset|zipl|lp[A-Z]"
    r"|rax|quicklist|stringmatch|string2l|ll2string|mem|siphash|(?:get|create|incrRef|decrRef)[A-Z]\w*Object|\w*[cC]ompare"
    r"|\w*[hH]ash(?:Function|Callback)|pqsort|qsort"
)
"""Data structures, strings, allocators, Lua: called so often that a probe on them would be the next stall."""

_CLONE = re.compile(r"\.(?:part|constprop|isra|cold|lto_priv|llvm)(?:\.\d+)*")


@dataclass(frozen=True)
class Culprit:
    """A function in which much of a stall was spent and which was not traced.

    Attributes:
        stall: row of ``Stalls.frame``.
        function: its name, as ``--probe`` takes it.
        path: the functions from below the event loop down to where the stall mostly was, the kernel's left out.
        weight_ns: sampled in it and what it called; total_ns: sampled in the stall.
    """

    stall: int
    function: str
    path: tuple[str, ...]
    weight_ns: int
    total_ns: int


class Samples:
    """The stack samples, each with its stall.

    Attributes:
        frame: the table ``samples`` (see :mod:`sample_rows`) and ``stall`` (int64): row of ``Stalls.frame``, or
            NO_STALL.
    """

    def __init__(self, tables: Tables, stalls: Stalls) -> None:
        """Give every sample its stall."""
        self._table = tables.recording.stacks
        self._manifest = tables.manifest
        self.frame = _with_stall(tables.samples, stalls)

    @property
    def are_in_stalls(self) -> bool:
        """Return whether any sample fell into a stall."""
        return bool((self.frame["stall"] != NO_STALL).any())

    @cached_property
    def weights(self) -> pd.DataFrame:
        """By ``stall``, ``stack`` and ``state`` (place in ``STATES``): ``samples`` and ``weight_ns``; int64."""
        frame = self.frame.assign(state=self.frame["state"].cat.codes.astype(np.int64))
        groups = frame.groupby(["stall", "stack", "state"], sort=True)["weight_ns"]
        return groups.agg(samples="size", weight_ns="sum").reset_index().astype(np.int64)

    def functions_of(self, stack: int) -> tuple[StackFrame, ...]:
        """Return the functions of a stack, outermost first."""
        return self._table.stack(stack) if stack >= 0 else (StackFrame(STACK_NOT_KEPT, ""),)

    def in_stalls(self) -> pd.DataFrame:
        """Return ``weights`` of the stalls alone."""
        return self.weights.loc[self.weights["stall"] != NO_STALL]

    def paths(self, weights: pd.DataFrame) -> pd.DataFrame:
        """Return the tree that these rows of ``weights`` make: one row for each different chain of functions.

        =========== ====== ==== ==========================================================
        parent      int64       row of the calling chain, ROOT: none; always a smaller number
        name        object      the function
        file        object      its file, as ``redis-server``
        samples     int64       in it and in what it called
        weight_ns   int64   ns  in it and in what it called
        self_ns     int64   ns  in itself
        off_ns      int64   ns  of ``weight_ns``, off the CPU
        =========== ====== ==== ==========================================================
        """
        tree = _Tree()
        columns = weights[["stack", "state", "samples", "weight_ns"]]
        for stack, state, samples, weight_ns in columns.itertuples(index=False, name=None):
            tree.add(self.functions_of(stack), samples, weight_ns, is_off=state != 0)
        return tree.frame()

    def by_stall(self, stalls: Iterable[int]) -> Iterator[tuple[int, pd.DataFrame]]:
        """Yield (stall, its tree) for those of these stalls in which samples were taken."""
        groups = dict(iter(self.in_stalls().groupby("stall")))
        for stall in stalls:
            if stall in groups:
                yield stall, self.paths(groups[stall])

    @cached_property
    def culprits(self) -> tuple[Culprit, ...]:
        """The function to trace next, of each stall that was mostly in functions not traced; by stall.

        None is blamed for a stall in which the thread wanted a CPU for so long that too little is left for any.
        """
        found = []
        files = _server_files(self._manifest)
        traced = _traced(self._manifest)
        for stall, mine in self.in_stalls().groupby("stall"):
            if stall in self._without_cpu:
                continue
            total_ns = int(mine["weight_ns"].sum())
            chain = _hot_path(self.paths(mine), total_ns)
            named = _to_blame(chain, files, traced)
            if named is not None:
                path = [plain_name(name) for name, file, _ in chain if file != KERNEL]
                shown = tuple(name for name in path if name not in PASSES_ON)
                found.append(Culprit(int(str(stall)), named[0], shown, named[1], total_ns))
        return tuple(found)

    @cached_property
    def told(self) -> dict[int, str]:
        """What each stall mostly was in, by the stall: the function to trace next, or NO_CPU."""
        functions = {culprit.stall: culprit.function for culprit in self.culprits}
        return functions | dict.fromkeys(self._without_cpu, NO_CPU)

    @cached_property
    def _without_cpu(self) -> frozenset[int]:
        weights = self.in_stalls()
        total = weights.groupby("stall")["weight_ns"].sum()
        waited = weights.loc[weights["state"] == STATES.index(RUNNABLE)].groupby("stall")["weight_ns"].sum()
        return frozenset(waited.index[waited > (1 - WORTH_NAMING) * total.loc[waited.index]].tolist())


class _Tree:
    """Chains of functions, each once, with their times."""

    def __init__(self) -> None:
        self._place: dict[tuple[int, StackFrame], int] = {}
        self._parent: list[int] = []
        self._function: list[StackFrame] = []
        self._numbers: list[list[int]] = []

    def add(self, frames: Sequence[StackFrame], samples: int, weight_ns: int, *, is_off: bool) -> None:
        parent = ROOT
        for frame in frames:
            place = self._place.setdefault((parent, frame), len(self._parent))
            if place == len(self._parent):
                self._parent.append(parent)
                self._function.append(frame)
                self._numbers.append([0, 0, 0, 0])
            numbers = self._numbers[place]
            numbers[0] += samples
            numbers[1] += weight_ns
            numbers[3] += weight_ns if is_off else 0
            parent = place
        if parent != ROOT:
            self._numbers[parent][2] += weight_ns

    def frame(self) -> pd.DataFrame:
        numbers = np.array(self._numbers, np.int64).reshape(-1, 4)
        return pd.DataFrame(
            {
                "parent": np.array(self._parent, np.int64),
                "name": pd.Series([item.name for item in self._function], dtype=object),
                "file": pd.Series([item.file for item in self._function], dtype=object),
                "samples": numbers[:, 0],
                "weight_ns": numbers[:, 1],
                "self_ns": numbers[:, 2],
                "off_ns": numbers[:, 3],
            }
        )


def plain_name(name: str) -> str:
    """Return a function's name as it is in the source: without what the compiler put behind it."""
    return _CLONE.sub("", name)


def state_times(weights: pd.DataFrame) -> dict[str, int]:
    """Return the time, ns, in each of ``STATES`` of these rows of ``Samples.weights``."""
    sums = weights.groupby("state")["weight_ns"].sum()
    return {name: int(sums.get(place, 0)) for place, name in enumerate(STATES)}


def _with_stall(samples: pd.DataFrame, stalls: Stalls) -> pd.DataFrame:
    stall = np.full(len(samples), NO_STALL, np.int64)
    tid, time = samples["tid"].to_numpy(), samples["time_ns"].to_numpy()
    frame = stalls.frame
    begin = frame["start_ns"].to_numpy()
    end = begin + frame["duration_ns"].to_numpy()
    for thread in np.unique(tid):
        mine = np.flatnonzero((frame["tid"] == thread).to_numpy())
        rows = np.flatnonzero(tid == thread)
        if len(mine) and len(rows):
            stall[rows] = _inside(time[rows], begin[mine], end[mine], mine)
    return samples.assign(stall=stall)


def _inside(time: Ints, begin: Ints, end: Ints, number: Ints) -> Ints:
    """Return in which of some spans, sorted by start, each moment lies."""
    place = np.searchsorted(begin, time, side="right") - 1
    found = (place >= 0) & (time <= end[np.maximum(place, 0)])
    return np.where(found, number[np.maximum(place, 0)], NO_STALL)


def _server_files(manifest: Manifest) -> set[str]:
    return {target.exe.rpartition("/")[2] for target in manifest.targets}


def _traced(manifest: Manifest) -> set[str]:
    return {plain_name(name) for probe in manifest.probes if probe.kind == CALL for name in (probe.name, probe.symbol)}


def _hot_path(tree: pd.DataFrame, total_ns: int) -> list[tuple[str, str, int]]:
    """Return (function, file, ns) from the outermost function down, as long as one callee has most of the time."""
    parent, weight = tree["parent"].to_numpy(), tree["weight_ns"].to_numpy()
    here, least = ROOT, WORTH_NAMING * total_ns
    chain: list[tuple[str, str, int]] = []
    while True:
        below = np.flatnonzero(parent == here)
        if not len(below):
            return chain
        here = int(below[np.argmax(weight[below])])
        passes_on = not chain or plain_name(chain[-1][0]) in PASSES_ON
        if weight[here] < least or (not passes_on and weight[here] < MOST_OF * chain[-1][2]):
            return chain
        chain.append((str(tree["name"].iloc[here]), str(tree["file"].iloc[here]), int(weight[here])))


def _to_blame(chain: Sequence[tuple[str, str, int]], files: set[str], traced: set[str]) -> tuple[str, int] | None:
    """Return the function of the server to trace, and its time; None where what is traced tells it already.

    It is the deepest one that is not called all the time; a command or a function of the catalogue before any below
    it, since these are what people know and what a probe may be put on.
    """
    known = set(catalogued())
    deepest = max((place for place, (name, _, _) in enumerate(chain) if plain_name(name) in traced), default=-1)
    candidates = [
        (plain_name(name), weight)
        for name, file, weight in chain[deepest + 1 :]
        if file in files and plain_name(name) not in PASSES_ON and not INNER.match(name)
    ]
    if not candidates:
        return None
    told = [item for item in candidates if item[0] in known or item[0].endswith("Command")]
    return (told or candidates)[-1]
