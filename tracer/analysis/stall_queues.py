"""The accept queue before, in and after each stall."""

from __future__ import annotations

import numpy as np
import pandas as pd

from stallscope.tracer.analysis.overflows import Step, listener_step
from stallscope.tracer.analysis.requests import ACCEPTED
from stallscope.tracer.analysis.segments import NOT_KNOWN, range_max
from stallscope.tracer.analysis.tables import NS_PER_S, Ints, Tables
from stallscope.tracer.manifest import ListenerInfo

NORMAL_SHARE = 0.1
"""An accept queue filled to at most this share of its limit is normal."""

STALE_NS = 3 * NS_PER_S
"""Unchanged samples are stored once a second; when the last is older than this, the queue is not known."""


def normal_length(limit: Ints) -> Ints:
    """Return up to which length queues of these limits are normal."""
    return (limit * NORMAL_SHARE).astype(np.int64)


def with_queue(frame: pd.DataFrame, tables: Tables) -> pd.DataFrame:
    """Add the accept queue before, in and after each stall."""
    count = len(frame)
    begin = frame["start_ns"].to_numpy()
    end = begin + frame["duration_ns"].to_numpy()
    added = {
        name: np.full(count, NOT_KNOWN, np.int64)
        for name in ("listener", "queue_start", "queue_max", "queue_end", "queue_limit", "full_ns")
    }
    fill = np.full(count, -1.0)
    drain = np.zeros(count, np.int64)
    drained = np.ones(count, np.bool_)
    until = _next_start(frame, tables.end_ns)
    for listener in tables.manifest.listeners:
        mine = np.flatnonzero((frame["pid"] == listener.pid).to_numpy())
        if not len(mine):
            continue
        seen = _QueueAround(tables, listener, begin[mine], end[mine], until[mine])
        fuller = seen.known & (seen.fill > fill[mine])
        target = mine[fuller]
        fill[target] = seen.fill[fuller]
        added["listener"][target] = listener.index
        added["queue_start"][target] = seen.start[fuller]
        added["queue_max"][target] = seen.most[fuller]
        added["queue_end"][target] = seen.end[fuller]
        added["queue_limit"][target] = seen.limit[fuller]
        added["full_ns"][target] = seen.full[fuller]
        drain[mine] = np.maximum(drain[mine], seen.drain)
        drained[mine] &= seen.drained
    return frame.assign(**added, drain_ns=drain, drained=drained)


class _QueueAround:
    """One listener's queue around some stalls; every attribute has one value per stall."""

    def __init__(self, tables: Tables, listener: ListenerInfo, begin: Ints, end: Ints, until: Ints) -> None:
        length = listener_step(tables, listener.index, "queue_length")
        limits = listener_step(tables, listener.index, "queue_limit")
        time = length.time_ns
        count = len(begin)
        self.start = np.full(count, NOT_KNOWN, np.int64)
        self.most = np.full(count, NOT_KNOWN, np.int64)
        self.end = np.full(count, NOT_KNOWN, np.int64)
        self.limit = np.full(count, listener.limit, np.int64)
        self.drain = np.zeros(count, np.int64)
        self.drained = np.ones(count, np.bool_)
        if len(time):
            self.start, before = _fresh(length, begin)
            self.end, last = _fresh(length, end)
            after = last + 1
            self.most = np.maximum(self.start, range_max(length.value, before + 1, after))
            self.limit = limits.at(end)
            self._drain(time, length.value, after, end, until)
        self.known = self.most >= 0
        self.fill = self.most / np.maximum(self.limit, 1)
        self.full = _time_to_full(_times_full(tables, listener.index), begin, end)
        self.full[self.start > self.limit] = 0

    def _drain(self, time: Ints, value: Ints, after: Ints, end: Ints, until: Ints) -> None:
        start = np.where(2 * self.start > self.limit, 0, self.start)
        normal = np.maximum(start, normal_length(self.limit))
        for index in np.flatnonzero(self.most > normal):
            place = after[index]
            if place and value[place - 1] <= normal[index]:
                continue
            stop = np.searchsorted(time, until[index], side="right")
            back = np.flatnonzero(value[place:stop] <= normal[index])
            self.drained[index] = len(back) > 0
            self.drain[index] = (time[place + back[0]] if len(back) else until[index]) - end[index]


def _fresh(length: Step, moment: Ints) -> tuple[Ints, Ints]:
    """Return the length at each of these times, NOT_KNOWN where its sample is too old, and the sample's place."""
    place = np.searchsorted(length.time_ns, moment, side="right") - 1
    fresh = (place >= 0) & (moment - length.time_ns[np.maximum(place, 0)] <= STALE_NS)
    return np.where(fresh, length.value[np.maximum(place, 0)], NOT_KNOWN), place


def _times_full(tables: Tables, listener: int) -> Ints:
    """Return when a sample or a request found the queue full, which to Linux is strictly above its limit."""
    samples = tables.queues
    found = [samples.loc[(samples["listener"] == listener) & (samples["queue_length"] > samples["queue_limit"])]]
    rows = tables.requests
    # of an accepted connection the time is that of its enqueue, not that of the length
    found.append(
        rows.loc[
            (rows["listener"] == listener) & (rows["queue_length"] > rows["queue_limit"]) & (rows["event"] != ACCEPTED)
        ]
    )
    return np.sort(np.concatenate([part["time_ns"].to_numpy() for part in found]))


def _time_to_full(full: Ints, begin: Ints, end: Ints) -> Ints:
    """Return how long after each stall's start the queue was first found full, NOT_KNOWN where never inside it."""
    place = np.searchsorted(full, begin, side="left")
    first = np.append(full, np.iinfo(np.int64).max)[place]
    return np.where(first <= end, first - begin, NOT_KNOWN)


def _next_start(frame: pd.DataFrame, end_ns: int) -> Ints:
    """Return when the next stall of the same process began, or the end of the recording."""
    following = frame.groupby("pid")["start_ns"].shift(-1, fill_value=end_ns)
    return np.maximum(following.to_numpy(), (frame["start_ns"] + frame["duration_ns"]).to_numpy())
