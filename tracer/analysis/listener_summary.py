"""Each listener as plain data: its queue, its overflows, and how they agree with the kernel's own count."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.tracer.analysis.overflows import LISTEN_OVERFLOWS, NOT_ATTRIBUTABLE, increases, listener_step
from stallscope.tracer.analysis.requests import QUEUE_FULL, event_hits, requests_observed
from stallscope.tracer.analysis.stalls import DRAIN, INSIDE, OUTSIDE, Stalls
from stallscope.tracer.analysis.tables import Tables
from stallscope.tracer.manifest import NamespaceInfo


@dataclass(frozen=True)
class OverflowCount:
    """Overflows by when they fell: inside a stall, while the queue drained after one, or neither."""

    inside: int = 0
    drain: int = 0
    outside: int = 0

    @property
    def total(self) -> int:
        """Return all of them."""
        return self.inside + self.drain + self.outside


@dataclass(frozen=True)
class ListenerSummary:
    """One listener: the greatest length of its accept queue, its limit, and what was refused.

    Attributes:
        queue_max: None when it was never sampled.
        overflows: attributed to it.
        drops: growth of its own drop counter, which counts other reasons too.
    """

    address: str
    pid: int
    queue_max: int | None
    queue_limit: int
    drops: int
    overflows: OverflowCount


@dataclass(frozen=True)
class CounterMatch:
    """What the hooked functions added to one of the kernel's counters, against all that it gained.

    Attributes:
        name: the kernel's name of the counter.
        observed: at all listeners of the namespace; ``unwatched`` of it at those that were not watched.
        counted: what the kernel's counter gained; ``unexplained`` is what of it was not observed.
    """

    name: str
    observed: int
    unwatched: int
    counted: int
    unexplained: int


@dataclass(frozen=True)
class Reconciliation:
    """Overflows seen while recording, against the kernel's own counter at start and end, of one namespace.

    Attributes:
        observed: seen, in samples or one by one; counted: the kernel's difference, None when the end is not known.
        not_attributable: observed, but at no listener that was watched.
        one_by_one: the kernel's functions were hooked; then ``unwatched`` of the observed were of listeners that
            were not watched, and ``unexplained`` is what was counted and not observed, None when not known.
        matches: the same for each counter that the hooked functions add to, ListenOverflows first; empty where
            they were not hooked or the end is not known.
    """

    namespace: int
    observed: int
    counted: int | None
    not_attributable: OverflowCount
    other_counters: dict[str, int]
    one_by_one: bool = False
    unwatched: int = 0
    unexplained: int | None = None
    matches: tuple[CounterMatch, ...] = ()


def summarise_listeners(tables: Tables, stalls: Stalls) -> tuple[ListenerSummary, ...]:
    """Return all listeners of a recording."""
    summaries = []
    for listener in tables.manifest.listeners:
        length = listener_step(tables, listener.index, "queue_length").value
        limit = listener_step(tables, listener.index, "queue_limit").value
        drops = listener_step(tables, listener.index, "drops").value
        mine = stalls.overflows.loc[stalls.overflows["listener"] == listener.index]
        summaries.append(
            ListenerSummary(
                listener.address,
                listener.pid,
                int(length.max()) if len(length) else None,
                int(limit[-1]) if len(limit) else listener.limit,
                max(int(drops[-1]) - int(drops[0]), 0) if len(drops) else 0,
                by_phase(mine),
            )
        )
    return tuple(summaries)


def reconcile(tables: Tables, stalls: Stalls, namespace: NamespaceInfo) -> Reconciliation:
    """Return the overflows seen in one network namespace beside those that its kernel counted."""
    mine = stalls.overflows.loc[stalls.overflows["namespace"] == namespace.index]
    ended = namespace.counters_end.get(LISTEN_OVERFLOWS)
    started = namespace.counters_start.get(LISTEN_OVERFLOWS)
    others = {}
    for name in tables.manifest.counter_names:
        if name != LISTEN_OVERFLOWS:
            grown = increases(tables, name)
            others[name] = int(grown.loc[grown["namespace"] == namespace.index, "count"].sum())
    sampled = Reconciliation(
        namespace=namespace.index,
        observed=int(mine["count"].sum()),
        counted=None if ended is None or started is None else ended - started,
        not_attributable=by_phase(mine.loc[mine["listener"] == NOT_ATTRIBUTABLE]),
        other_counters=others,
    )
    if not requests_observed(tables.manifest):
        return sampled
    unwatched = namespace.seen_elsewhere.get(LISTEN_OVERFLOWS, 0)
    watched = namespace.seen.get(LISTEN_OVERFLOWS)
    observed = (_seen_one_by_one(tables, namespace) if watched is None else watched) + unwatched
    return dataclasses.replace(
        sampled,
        observed=observed,
        one_by_one=True,
        unwatched=unwatched,
        unexplained=None if sampled.counted is None else sampled.counted - observed,
        matches=tuple(_match(namespace, name) for name in namespace.seen if name in namespace.counters_end),
    )


def _match(namespace: NamespaceInfo, name: str) -> CounterMatch:
    unwatched = namespace.seen_elsewhere.get(name, 0)
    observed = namespace.seen[name] + unwatched
    counted = namespace.counters_end[name] - namespace.counters_start.get(name, 0)
    return CounterMatch(name, observed, unwatched, counted, counted - observed)


def _seen_one_by_one(tables: Tables, namespace: NamespaceInfo) -> int:
    """Return the overflows of watched listeners, as far as they are known before the end of a recording.

    Of several namespaces these are only those that are rows.
    """
    if len(tables.manifest.namespaces) == 1:
        hits = event_hits(tables)
        return sum(hits.get(name, 0) for name in QUEUE_FULL)
    mine = [item.index for item in tables.manifest.listeners if item.namespace == namespace.index]
    rows = tables.requests
    return int((rows["event"].isin(QUEUE_FULL) & rows["listener"].isin(mine)).sum())


def refused_connections_in(overflows: pd.DataFrame) -> int | None:
    """Return how many different connections these overflows refused, None where that is not known."""
    known = overflows["connection"].to_numpy()
    return int(np.unique(known).size) if (known >= 0).all() and len(known) else None


def by_phase(overflows: pd.DataFrame) -> OverflowCount:
    """Return how many of these overflows fell inside stalls, in drains and elsewhere."""
    total = overflows.groupby("phase")["count"].sum()
    return OverflowCount(*(int(total.get(phase, 0)) for phase in (INSIDE, DRAIN, OUTSIDE)))
