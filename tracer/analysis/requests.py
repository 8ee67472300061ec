"""Connection requests: what became of each in the kernel, where its functions were hooked.

A client that is refused tries again, from the same port: so refusals are linked by listener and peer to
the connection they were meant for, and one connection may be refused many times. How often each event
happened is exact even where rows are missing; what is linked then is a lower bound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.functions import quantile
from stallscope.tracer.analysis.tables import NS_PER_S, Ints, Tables
from stallscope.tracer.manifest import LISTENER, Manifest, ProbeCounters

SYN_TAKEN = "SYN taken"
ACK_REFUSED_WITH_RST = "third ACK refused with RST: accept queue full"
ENQUEUED = "connection enqueued"
ACCEPTED = "connection accepted"

QUEUE_FULL = (
    "SYN refused: accept queue full",
    "third ACK refused silently: accept queue full",
    ACK_REFUSED_WITH_RST,
    "cookie ACK refused: accept queue full",
)
"""The events that the kernel counts as ListenOverflows."""

REFUSALS = (
    *QUEUE_FULL,
    "SYN refused: SYN queue full",
    "SYN refused otherwise",
    "third ACK refused otherwise",
)

RETRY_NS = 121 * NS_PER_S
"""Linux never waits longer than TCP_RTO_MAX, 120 s, before it tries again; after that it is another connection."""

_RUNGS = {"fentry", "kprobe"}
_PEER = ["listener", "peer_high", "peer_low", "peer_port"]


@dataclass(frozen=True)
class EventCount:
    """One kind of event: how often it happened, and how many of them are rows of the recording."""

    name: str
    count: int
    rows: int


@dataclass(frozen=True)
class RefusedConnections:
    """The connections that were refused at least once.

    Attributes:
        connections: how many; times: how often they were refused, all together.
        taken: how many of them got in after all: they reached the accept queue or, where the recording
            has no row of any connection that did, their SYN was taken after the last refusal.
        wait_min_ns, wait_median_ns, wait_max_ns: from the first refusal until it got in, or else until
            the last refusal.
    """

    connections: int
    times: int
    taken: int
    wait_min_ns: int
    wait_median_ns: int
    wait_max_ns: int


@dataclass(frozen=True)
class QueueWait:
    """Time from the accept queue's tail to accept(), of the connections that were seen to get there."""

    connections: int
    p50_ns: int
    p99_ns: int
    max_ns: int


@dataclass(frozen=True)
class ListenerRequests:
    """The requests at one listener.

    Attributes:
        events: those that happened, in the order of the probe list.
        exact: the counts are the kernel's. Otherwise rows are missing and may have been any listener's.
        refused, wait: None where there was none.
    """

    address: str
    pid: int
    events: tuple[EventCount, ...]
    exact: bool
    refused: RefusedConnections | None
    wait: QueueWait | None


@dataclass(frozen=True)
class RequestSummary:
    """All requests that reached a listener that was watched.

    Attributes:
        listeners: those where anything happened.
        complete: every event is a row; otherwise numbers of connections are lower bounds.
        thinned: events that were counted and not recorded, because too many came in a second.
        lost: events that were counted and not recorded, because the ring buffer was full.
    """

    listeners: tuple[ListenerRequests, ...]
    complete: bool
    thinned: int
    lost: int


def requests_observed(manifest: Manifest) -> bool:
    """Return whether the kernel's functions were hooked, so that every request was seen."""
    names = {probe.name for probe in manifest.probes if probe.kind == LISTENER}
    return bool(set(manifest.rungs.get("overflows", "").split(" and ")) & _RUNGS) and names >= set(QUEUE_FULL)


def summarise_requests(tables: Tables) -> RequestSummary | None:
    """Return what became of the connection requests; None where the kernel's functions were not hooked."""
    if not requests_observed(tables.manifest):
        return None
    hits = event_hits(tables)
    owners = {item.index: (item.address, item.pid) for item in tables.manifest.listeners}
    rows = tables.requests
    refused = refused_connections(rows)
    alone = len(owners) == 1
    complete = _all_are_rows(tables, hits)
    listeners = []
    for index in sorted(set(owners) | set(rows["listener"])):
        mine = rows.loc[rows["listener"] == index]
        in_rows = mine["event"].value_counts()
        counts = {name: int(in_rows.get(name, 0)) for name in hits}
        events = tuple(
            EventCount(name, hits[name] if alone else counts[name], counts[name])
            for name in hits
            if counts[name] or (alone and hits[name])
        )
        if events:
            address, pid = owners.get(index, ("", 0))
            listeners.append(
                ListenerRequests(
                    address or f"listener {index}",
                    pid,
                    events,
                    alone or complete,
                    _refused(refused.loc[refused["listener"] == index]),
                    _wait(mine.loc[mine["event"] == ACCEPTED, "wait_ns"].to_numpy()),
                )
            )
    counters = _counters(tables).values()
    return RequestSummary(
        tuple(listeners), complete, sum(item.thinned for item in counters), sum(item.missing for item in counters)
    )


def event_hits(tables: Tables) -> dict[str, int]:
    """Return how often each event happened, at all watched listeners, by name.

    The kernel's counters may be a second older than the last rows of a recording that was cut short.
    """
    counters = _counters(tables)
    in_rows = tables.requests["event"].value_counts()
    hits: dict[str, int] = {}
    for probe in tables.manifest.probes:
        if probe.kind == LISTENER:
            hits[probe.name] = hits.get(probe.name, 0) + counters.get(probe.id, ProbeCounters()).hits
    return {name: max(count, int(in_rows.get(name, 0))) for name, count in hits.items()}


def overflow_events(tables: Tables) -> pd.DataFrame | None:
    """Return every overflow of a watched listener at its own time; None unless every one is a row.

    The columns of :func:`overflows.attribute_overflows`, of intervals of 1 ns, and ``connection`` (int64):
    the same number for the refusals of one connection.
    """
    if not requests_observed(tables.manifest) or not _all_are_rows(tables, QUEUE_FULL):
        return None
    rows = tables.requests.loc[tables.requests["event"].isin(QUEUE_FULL)]
    namespaces = {item.index: item.namespace for item in tables.manifest.listeners}
    rows = rows.loc[rows["listener"].isin(namespaces)]
    connection = _linked(tables.requests)["connection"].reindex(rows.index)
    frame = pd.DataFrame(
        {
            "namespace": rows["listener"].map(namespaces),
            "after_ns": rows["time_ns"],
            "seen_ns": rows["time_ns"] + 1,
            "count": 1,
            "listener": rows["listener"],
            "pid": rows["pid"],
            "connection": connection,
        }
    ).astype(np.int64)
    return frame.sort_values(["namespace", "seen_ns", "listener"], kind="stable", ignore_index=True)


def refused_connections(requests: pd.DataFrame) -> pd.DataFrame:
    """Return one row per connection that was refused at least once; sorted by its first refusal.

    Columns: ``listener``, ``peer_high``, ``peer_low``, ``peer_port``, ``first_ns`` and ``last_ns`` of its
    refusals, ``times`` (how many), ``taken`` (bool), ``wait_ns`` until it got in or was refused the last time.
    """
    steps = _linked(requests)
    refusals = steps.loc[steps["refused"]].groupby("connection", sort=True)
    result = refusals.agg(
        **{name: (name, "first") for name in _PEER},
        first_ns=("time_ns", "min"),
        last_ns=("time_ns", "max"),
        times=("time_ns", "size"),
    )
    got_in = steps.loc[steps["taken"]].groupby("connection")["time_ns"].max().reindex(result.index)
    result["taken"] = (got_in >= result["last_ns"]).to_numpy(dtype=np.bool_)
    until = got_in.where(result["taken"], result["last_ns"])
    result["wait_ns"] = until.to_numpy().astype(np.int64) - result["first_ns"].to_numpy()
    return result.sort_values("first_ns", kind="stable", ignore_index=True)


def _linked(requests: pd.DataFrame) -> pd.DataFrame:
    """Return the refusals and what got in, with the number of their connection, indexed as ``requests``.

    A peer's next connection begins once it got in, once it was refused with RST, or after ``RETRY_NS``.
    """
    event = requests["event"]
    entered = event.isin([ENQUEUED, ACCEPTED]).to_numpy()
    # without a hook at the accept queue the SYN is all there is
    taken = entered if entered.any() else (event == SYN_TAKEN).to_numpy()
    refused = event.isin(REFUSALS).to_numpy()
    over = entered | (event == ACK_REFUSED_WITH_RST).to_numpy()
    steps = requests[[*_PEER, "time_ns"]].assign(refused=refused, taken=taken, over=over)
    steps = steps.loc[refused | taken].sort_values([*_PEER, "time_ns"], kind="stable")
    peers = steps.groupby(_PEER, sort=False)
    pause = peers["time_ns"].diff().fillna(0).to_numpy() > RETRY_NS
    before = peers["over"].shift(1, fill_value=False).to_numpy(dtype=np.bool_)
    first_of_peer = (peers.cumcount() == 0).to_numpy()
    # an accepted connection has two rows of the same time: the second is no connection of its own
    steps["connection"] = np.cumsum(first_of_peer | pause | (before & ~_same_entry(steps)))
    return steps


def _same_entry(steps: pd.DataFrame) -> npt.NDArray[np.bool_]:
    over, time_ns = steps["over"].to_numpy() & ~steps["refused"].to_numpy(), steps["time_ns"].to_numpy()
    same = np.zeros(len(steps), np.bool_)
    same[1:] = over[1:] & over[:-1] & (time_ns[1:] == time_ns[:-1])
    return same


def _refused(connections: pd.DataFrame) -> RefusedConnections | None:
    if connections.empty:
        return None
    waits = np.sort(connections["wait_ns"].to_numpy())
    return RefusedConnections(
        len(connections),
        int(connections["times"].sum()),
        int(connections["taken"].sum()),
        int(waits[0]),
        quantile(waits, 0, 0.5) or 0,
        int(waits[-1]),
    )


def _wait(waits: Ints) -> QueueWait | None:
    if not len(waits):
        return None
    waits = np.sort(waits)
    return QueueWait(len(waits), quantile(waits, 0, 0.5) or 0, quantile(waits, 0, 0.99) or 0, int(waits[-1]))


def _all_are_rows(tables: Tables, names: Iterable[str]) -> bool:
    hits, in_rows = event_hits(tables), tables.requests["event"].value_counts()
    return all(int(in_rows.get(name, 0)) == hits.get(name, 0) for name in names)


def _counters(tables: Tables) -> dict[int, ProbeCounters]:
    counters = tables.recording.counters
    if counters is None:
        return {}
    ids = {probe.id for probe in tables.manifest.probes if probe.kind == LISTENER}
    return {probe: item for probe, item in counters.by_probe.items() if probe in ids}
