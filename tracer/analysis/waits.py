"""How long connections waited in the accept queue while a stall lasted.

Where the kernel's functions were hooked, every accepted connection tells when it was enqueued. Elsewhere
two things are known: the queue's length whenever it was sampled, and when each connection was accepted.
The queue is first in, first out: a sample of length n says that the next n connections to be accepted were
in it at that time. So each wait is known to be at least from the first sample that counted the connection
until it was accepted.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from stallscope.tracer.analysis.requests import ACCEPTED, event_hits
from stallscope.tracer.analysis.segments import NOT_KNOWN, ranges
from stallscope.tracer.analysis.tables import Ints, Tables
from stallscope.tracer.manifest import ACCEPT

_Waits = tuple[Ints, Ints]
"""Since when each connection was in the queue, and when it was accepted; both ns, sorted by the first."""


def with_waits(frame: pd.DataFrame, tables: Tables) -> tuple[pd.DataFrame, bool]:
    """Return the stalls with ``waited``, ``wait_median_ns`` and ``wait_max_ns``, and whether those are exact.

    Without kernel hooks the waits of a process are known only if it accepted on one listener, that was the
    only one with a queue, and no accept was lost. A connection that was still in the queue when the
    recording ended is not counted.
    """
    accepted = tables.requests.loc[tables.requests["event"] == ACCEPTED]
    told = not accepted.empty
    names = ("waited", "wait_median_ns", "wait_max_ns")
    columns = {name: np.full(len(frame), NOT_KNOWN, np.int64) for name in names}
    begin = frame["start_ns"].to_numpy()
    end = begin + frame["duration_ns"].to_numpy()
    for pid in frame["pid"].unique():
        mine = np.flatnonzero((frame["pid"] == pid).to_numpy())
        waits = _told(accepted.loc[accepted["pid"] == pid]) if told else _bounded(tables, int(pid))
        if waits is None:
            continue
        inside = _overlapping(waits, begin[mine], end[mine]).groupby("stall")["wait_ns"]
        summary = inside.agg(["size", "median", "max"]).reindex(range(len(mine)))
        columns["waited"][mine] = summary["size"].fillna(0)
        columns["wait_median_ns"][mine] = summary["median"].fillna(NOT_KNOWN)
        columns["wait_max_ns"][mine] = summary["max"].fillna(NOT_KNOWN)
    return frame.assign(**columns), told and len(accepted) == event_hits(tables)[ACCEPTED]


def accept_waits(tables: Tables) -> _Waits | None:
    """Return all waits in the accept queue that are known: since when, and until accept(); sorted by the first.

    Where the kernel was hooked, of every connection; elsewhere of those that a sample saw waiting, and at least.
    None where nothing is known.
    """
    accepted = tables.requests.loc[tables.requests["event"] == ACCEPTED]
    if not accepted.empty:
        return _told(accepted)
    known = [_bounded(tables, pid) for pid in {listener.pid for listener in tables.manifest.listeners}]
    parts = [waits for waits in known if waits is not None]
    if not parts:
        return None
    since, until = (np.concatenate(ends) for ends in zip(*parts, strict=True))
    order = np.argsort(since, kind="stable")
    return since[order], until[order]


def _told(accepted: pd.DataFrame) -> _Waits:
    since = accepted["time_ns"].to_numpy()
    order = np.argsort(since, kind="stable")
    return since[order], (since + accepted["wait_ns"].to_numpy())[order]


def _bounded(tables: Tables, pid: int) -> _Waits | None:
    """Return since when each accepted connection is known to have been in the queue; None: not known."""
    accepts = tables.accepts.loc[tables.accepts["pid"] == pid]
    if accepts["listener_fd"].nunique() != 1 or tables.missing(ACCEPT):
        return None
    listeners = [listener.index for listener in tables.manifest.listeners if listener.pid == pid]
    samples = tables.queues.loc[tables.queues["listener"].isin(listeners)]
    filled = samples.loc[samples["queue_length"] > 0, "listener"].unique()
    if len(filled) != 1:
        return None
    samples = samples.loc[samples["listener"] == filled[0]]
    time, length = samples["time_ns"].to_numpy(), samples["queue_length"].to_numpy()
    taken = np.sort((accepts["start_ns"] + accepts["duration_ns"]).to_numpy())
    # how many had come by each sample: those accepted before, and those in the queue
    come = np.maximum.accumulate(np.searchsorted(taken, time, side="right") + length)
    first = np.searchsorted(come, np.arange(1, len(taken) + 1), side="left")
    since = np.append(time, np.iinfo(np.int64).max)[first]
    seen = since < taken
    return since[seen], taken[seen]


def _overlapping(waits: _Waits, begin: Ints, end: Ints) -> pd.DataFrame:
    """Return, for each stall, the waits that overlap it: ``stall`` and ``wait_ns``."""
    since, until = waits
    # with several listeners the queue is not first in, first out: look from the first that may overlap
    low = np.searchsorted(np.maximum.accumulate(until), begin, side="right")
    stall, place = ranges(low, np.searchsorted(since, end, side="left"))
    inside = until[place] > begin[stall]
    return pd.DataFrame({"stall": stall[inside], "wait_ns": (until - since)[place[inside]]}, copy=False)
