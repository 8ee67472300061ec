"""When the kernel refused connections, and at which listener.

ListenOverflows is counted for a whole network namespace, and seen when it is sampled. So each increase
has an interval, from the sampling before to the one that saw it, and the listener is inferred: the one
whose own drops grew at that time, or else the one whose queue was above its limit. What fits no watched
listener stays unattributed; other listeners live in the namespace too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.tables import Ints, Tables

LISTEN_OVERFLOWS = "ListenOverflows"
NOT_ATTRIBUTABLE = -1


@dataclass(frozen=True)
class Step:
    """The value of something sampled, between samples too: it is what the last sample said.

    Attributes:
        time_ns: when it was sampled, ascending; value: what was seen then.
    """

    time_ns: Ints
    value: Ints

    def at(self, time_ns: Ints) -> Ints:
        """Return the values at these times; before the first sample, what the first one said."""
        place = np.searchsorted(self.time_ns, time_ns, side="right") - 1
        return self.value[np.maximum(place, 0)]


def increases(tables: Tables, counter: str = LISTEN_OVERFLOWS) -> pd.DataFrame:
    """Return every increase of a kernel counter that was seen; sorted by namespace and time.

    Columns: ``namespace`` (int64, index), ``after_ns`` and ``seen_ns`` (int64): it happened after the one
    and not after the other; ``count`` (int64, events).
    """
    manifest = tables.manifest
    parts = []
    for namespace in manifest.namespaces:
        samples = _counter(tables, namespace.index, counter)
        if not len(samples.time_ns):
            continue
        before = np.concatenate([[namespace.counters_start.get(counter, samples.value[0])], samples.value[:-1]])
        grown = samples.value - before
        rows = np.flatnonzero(grown > 0)
        ticks = _sampling_times(tables, namespace.index)
        seen = samples.time_ns[rows]
        place = np.searchsorted(ticks, seen, side="left") - 1
        after = np.where(place >= 0, ticks[np.maximum(place, 0)], np.minimum(manifest.started_ns, seen))
        parts.append(
            pd.DataFrame(
                {"namespace": namespace.index, "after_ns": after, "seen_ns": seen, "count": grown[rows]}
            ).astype(np.int64)
        )
    if parts:
        return pd.concat(parts, ignore_index=True)
    return pd.DataFrame({name: np.zeros(0, np.int64) for name in ("namespace", "after_ns", "seen_ns", "count")})


def attribute_overflows(tables: Tables) -> pd.DataFrame:
    """Return the overflows by interval and listener; sorted by namespace and time.

    The columns of :func:`increases` and ``listener`` (int64, index in the listener list, -1: not
    attributable) and ``pid`` (int64, 0: none). One interval may have several rows, of several listeners.
    """
    grown = increases(tables)
    manifest = tables.manifest
    parts = []
    for namespace in manifest.namespaces:
        mine = grown.loc[grown["namespace"] == namespace.index].reset_index(drop=True)
        if mine.empty:
            continue
        owners = [listener for listener in manifest.listeners if listener.namespace == namespace.index]
        shares = _shares(tables, mine, [listener.index for listener in owners])
        for column, listener in enumerate(owners):
            parts.append(mine.assign(count=shares[:, column], listener=listener.index, pid=listener.pid))
        rest = mine["count"].to_numpy() - shares.sum(axis=1)
        parts.append(mine.assign(count=rest, listener=NOT_ATTRIBUTABLE, pid=0))
    if not parts:
        return grown.assign(listener=np.zeros(0, np.int64), pid=np.zeros(0, np.int64))
    all_rows = pd.concat(parts, ignore_index=True)
    all_rows = all_rows.loc[all_rows["count"] > 0]
    return all_rows.sort_values(["namespace", "seen_ns", "listener"], kind="stable", ignore_index=True)


def listener_step(tables: Tables, listener: int, column: str) -> Step:
    """Return one column of one listener's queue samples as a step function."""
    rows = tables.queues.loc[tables.queues["listener"] == listener]
    return Step(rows["time_ns"].to_numpy(), rows[column].to_numpy())


def _shares(tables: Tables, grown: pd.DataFrame, listeners: list[int]) -> npt.NDArray[np.int64]:
    """Return how many overflows of each interval belong to each listener; shape (intervals, listeners).

    Queue and counter are read one after the other, so a drop may show in the counter one sampling before
    it shows at the listener: the growth of drops is taken up to the sampling after.
    """
    count = grown["count"].to_numpy()
    shares = np.zeros((len(grown), len(listeners)), np.int64)
    if grown.empty:
        return shares
    after, seen = grown["after_ns"].to_numpy(), grown["seen_ns"].to_numpy()
    ticks = _sampling_times(tables, int(grown["namespace"].iloc[0]))
    following = ticks[np.minimum(np.searchsorted(ticks, seen, side="right"), len(ticks) - 1)]
    above = np.zeros(shares.shape, np.bool_)
    for column, listener in enumerate(listeners):
        drops = listener_step(tables, listener, "drops")
        if not len(drops.time_ns):
            continue
        grew = np.maximum(drops.at(np.maximum(seen, following)) - drops.at(after), 0)
        taken = np.cumsum(np.minimum(grew, count))
        room = np.maximum(drops.at(np.maximum(seen, following)) - drops.value[0], 0)
        # the sampling after is looked at for two intervals: never give out more than there were
        surplus = np.maximum.accumulate(np.maximum(taken - room, 0))
        shares[:, column] = np.diff(taken - surplus, prepend=0)
        length, limit = (listener_step(tables, listener, name) for name in ("queue_length", "queue_limit"))
        # Linux sk_acceptq_is_full: strictly above
        above[:, column] = (length.at(seen) > limit.at(seen)) | (length.at(after) > limit.at(after))
    total = shares.sum(axis=1)
    # listeners drop for other reasons too: those with a full queue come first
    full = _share_out(count, np.where(above, shares, 0))
    shares = full + _share_out(count - full.sum(axis=1), np.where(above, 0, shares))
    # a kernel or a listener that counts no drops of its own
    silent = (total == 0) & (above.sum(axis=1) == 1)
    shares[silent] = np.where(above[silent], count[silent][:, None], 0)
    return shares


def _share_out(amount: Ints, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return ``wanted`` where the amount suffices, else its parts in proportion; shape (rows, columns)."""
    total = wanted.sum(axis=1)
    short = np.flatnonzero(total > amount)
    if not len(short):
        return wanted
    given = wanted.copy()
    given[short] = wanted[short] * (amount[short] / total[short])[:, None]
    given[short, wanted[short].argmax(axis=1)] += amount[short] - given[short].sum(axis=1)
    return given


def _counter(tables: Tables, namespace: int, counter: str) -> Step:
    names = tables.manifest.counter_names
    if counter not in names:
        return Step(np.zeros(0, np.int64), np.zeros(0, np.int64))
    rows = tables.counters
    rows = rows.loc[(rows["namespace"] == namespace) & (rows["counter"] == names.index(counter))]
    return Step(rows["time_ns"].to_numpy(), rows["count"].to_numpy())


def _sampling_times(tables: Tables, namespace: int) -> Ints:
    """Return the times at which the namespace is known to have been sampled; unchanged values leave no trace."""
    listeners = [item.index for item in tables.manifest.listeners if item.namespace == namespace]
    queues = tables.queues.loc[tables.queues["listener"].isin(listeners), "time_ns"].to_numpy()
    counters = tables.counters.loc[tables.counters["namespace"] == namespace, "time_ns"].to_numpy()
    return np.unique(np.concatenate([queues, counters]))
