"""What the listeners' lanes show: refused connections, accept queues and rates."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.blame import CAUSES
from stallscope.tracer.analysis.overflows import NOT_ATTRIBUTABLE, increases, listener_step
from stallscope.tracer.analysis.requests import (
    ACCEPTED,
    ACK_REFUSED_WITH_RST,
    QUEUE_FULL,
    REFUSALS,
    SYN_TAKEN,
    requests_observed,
)
from stallscope.tracer.analysis.tables import Ints, Tables
from stallscope.tracer.manifest import ListenerInfo

LISTEN_DROPS = "ListenDrops"
SAMPLED_PATH = "accept queue full, sampled: path not seen"
OTHER_DROPS = "dropped for another reason (ListenDrops beyond overflows)"

MAX_REFUSALS = 100_000
"""Above this many, refusals on the same path within one of ``_MERGED_PARTS`` of the timeline are one entry."""
_MERGED_PARTS = 20_000
MAX_ADDRESSES = 5_000
_QUEUE_BINS = 3_000
_RATE_BINS = 20_000
_COLUMNS = ["after_ns", "seen_ns", "count", "path", "listener", "cause", "peer_high", "peer_low", "peer_port"]
_SYNS = (SYN_TAKEN, "SYN cookie sent")


@dataclass(frozen=True)
class Path:
    """One way of being refused: its name, whether the client is told (RST), and whether it was an overflow."""

    name: str
    rst: bool
    overflow: bool


@dataclass(frozen=True)
class Refusals:
    """Refused connections, times since the start of the timeline; every one of them is in ``count``.

    Attributes:
        paths: the ways in which they were refused.
        after_ns, seen_ns: it happened after the one and not after the other.
        count: how many; path: index in ``paths``; listener: index in the recording's list, -1: not attributable.
        cause: index in ``blame.CAUSES``, -1: it is no overflow.
        address: index in ``addresses`` of the client's address, -1: not known; port: its port, 0: not known.
        one_by_one: every overflow was seen at its own time.
    """

    paths: tuple[Path, ...]
    after_ns: Ints
    seen_ns: Ints
    count: Ints
    path: Ints
    listener: Ints
    cause: Ints
    address: Ints
    port: Ints
    addresses: tuple[str, ...]
    one_by_one: bool


@dataclass(frozen=True)
class QueueLane:
    """One accept queue: its length at some times, with every peak, and its limit at the same times."""

    listener: ListenerInfo
    time_ns: Ints
    length: Ints
    limit: Ints


@dataclass(frozen=True)
class RateLane:
    """Events of one kind at one server, counted in bins.

    Attributes:
        name: what is counted; pid: the server; bin_ns: width of a bin.
        bin: the bins that are not empty, ascending; count: events in each.
    """

    name: str
    pid: int
    bin_ns: int
    bin: Ints
    count: Ints


def refusals(analysis: Analysis, origin_ns: int, elapsed_ns: int) -> Refusals:
    """Return everything that was refused, whatever the path; no overflow is left out."""
    tables, overflows = analysis.tables, analysis.blame.overflows
    observed = requests_observed(tables.manifest)
    one_by_one = bool((overflows["connection"] >= 0).all()) if len(overflows) else observed
    parts = [_overflows_with_path(tables, overflows) if one_by_one else overflows.assign(path=SAMPLED_PATH)]
    if observed:
        events = tables.requests["event"]
        others = tables.requests.loc[events.isin(REFUSALS) & ~events.isin(QUEUE_FULL)]
        times = others["time_ns"]
        parts.append(others.assign(after_ns=times, seen_ns=times, count=1, path=others["event"].astype(object)))
    else:
        parts.append(_other_drops(tables).assign(path=OTHER_DROPS, listener=NOT_ATTRIBUTABLE))
    filled = [part.reindex(columns=_COLUMNS) for part in parts if len(part)]
    frame = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame({name: [] for name in _COLUMNS})
    return _packed(frame, origin_ns, elapsed_ns, one_by_one)


def _overflows_with_path(tables: Tables, overflows: pd.DataFrame) -> pd.DataFrame:
    """Return overflows seen one by one with the path and the client of the event each of them is."""
    known = {item.index: item.namespace for item in tables.manifest.listeners}
    rows = tables.requests
    rows = rows.loc[rows["event"].isin(QUEUE_FULL) & rows["listener"].isin(known)]
    # the order of requests.overflow_events
    order = np.lexsort((rows["listener"], rows["time_ns"], rows["listener"].map(known)))
    rows = rows.iloc[order].reset_index(drop=True)
    client = rows[["peer_high", "peer_low", "peer_port"]]
    return overflows.reset_index(drop=True).assign(path=rows["event"].astype(object), after_ns=rows["time_ns"],
                                                   seen_ns=rows["time_ns"], **client)  # fmt: skip


def queue_lanes(tables: Tables, origin_ns: int, elapsed_ns: int) -> tuple[QueueLane, ...]:
    """Return the accept queue of every listener that was observed, thinned so that every peak stays."""
    lanes = []
    requests = tables.requests.loc[tables.requests["event"] != ACCEPTED]
    for listener in tables.manifest.listeners:
        length, limit = (listener_step(tables, listener.index, name) for name in ("queue_length", "queue_limit"))
        mine = requests.loc[requests["listener"] == listener.index]
        time = np.concatenate([length.time_ns, mine["time_ns"].to_numpy()])
        value = np.concatenate([length.value, mine["queue_length"].to_numpy()])
        bound = np.concatenate([limit.value, mine["queue_limit"].to_numpy()])
        order = np.argsort(time, kind="stable")
        time, value, bound = time[order] - origin_ns, value[order], bound[order]
        kept = peaks(time, value, max(elapsed_ns // _QUEUE_BINS, 1))
        if len(kept):
            lanes.append(QueueLane(listener, time[kept], value[kept], bound[kept]))
    return tuple(lanes)


def peaks(time_ns: Ints, value: npt.NDArray[Any], bin_ns: int) -> Ints:
    """Return the places of the first, greatest, least and last value of every bin, ascending; all if they are few."""
    if len(time_ns) <= 4 * _QUEUE_BINS:
        return np.arange(len(time_ns))
    part = time_ns // bin_ns
    first = np.flatnonzero(np.diff(part, prepend=part[0] - 1))
    last = np.append(first[1:], len(part)) - 1
    # sorted by bin, then value: its ends are the least and the greatest of the bin
    order = np.lexsort((value, part))
    return np.unique(np.concatenate([first, last, order[first], order[last]]))


def rate_lanes(analysis: Analysis, origin_ns: int, elapsed_ns: int) -> tuple[RateLane, ...]:
    """Return, for every server, how many connections came and how many were accepted.

    Where SYNs were not seen, what came is reckoned: what the accept queue grew, was accepted and was refused.
    """
    tables = analysis.tables
    manifest = tables.manifest
    bin_ns = max(-(-elapsed_ns // _RATE_BINS), 1)
    lanes = []
    observed = requests_observed(manifest)
    for pid in dict.fromkeys(listener.pid for listener in manifest.listeners):
        mine = [listener.index for listener in manifest.listeners if listener.pid == pid]
        accepted = tables.accepts.loc[(tables.accepts["pid"] == pid) & (tables.accepts["fd"] >= 0), "start_ns"]
        taken = np.sort(accepted.to_numpy())
        if observed:
            rows = tables.requests
            is_syn = rows["event"].isin(_SYNS) | rows["event"].astype(str).str.startswith("SYN refused")
            syns = rows.loc[is_syn & rows["listener"].isin(mine), "time_ns"].to_numpy()
            lanes.append(counted("SYNs", pid, bin_ns, syns - origin_ns, np.ones(len(syns), np.int64)))
        elif len(taken):
            times, counts = _reckoned(analysis, pid, mine, taken)
            width = max(bin_ns, manifest.sample_ns)
            lanes.append(counted("connections that came (reckoned)", pid, width, times - origin_ns, counts))
        if len(taken):
            lanes.append(counted("accepted", pid, bin_ns, taken - origin_ns, np.ones(len(taken), np.int64)))
    return tuple(lane for lane in lanes if len(lane.bin))


def _packed(frame: pd.DataFrame, origin_ns: int, elapsed_ns: int, one_by_one: bool) -> Refusals:
    names = sorted(frame["path"].unique(), key=_path_order)
    peers = frame[["peer_high", "peer_low"]].fillna(0).astype(np.uint64)
    known, code = np.unique(peers.to_numpy(np.uint64).reshape(-1, 2), axis=0, return_inverse=True)
    addresses = tuple(_address(high, low) for high, low in known[:MAX_ADDRESSES].tolist())
    entries = pd.DataFrame(
        {
            "after_ns": frame["after_ns"].to_numpy(np.int64) - origin_ns,
            "seen_ns": frame["seen_ns"].to_numpy(np.int64) - origin_ns,
            "count": frame["count"].to_numpy(np.int64),
            "path": frame["path"].map({name: index for index, name in enumerate(names)}).to_numpy(np.int64),
            "listener": frame["listener"].to_numpy(np.int64),
            "cause": frame["cause"].map(CAUSES.index, na_action="ignore").fillna(-1).to_numpy(np.int64),
            "address": np.where(code < MAX_ADDRESSES, code, -1),
            "port": frame["peer_port"].fillna(0).to_numpy(np.int64),
        }
    )
    entries.loc[entries["port"] == 0, "address"] = -1
    if len(entries) > MAX_REFUSALS:
        part = entries["seen_ns"] // max(elapsed_ns // _MERGED_PARTS, 1)
        groups = entries.groupby([part, "path", "listener", "cause"], sort=False)
        entries = groups.agg(after_ns=("after_ns", "min"), last_ns=("seen_ns", "max"), count=("count", "sum"))
        entries = entries.reset_index().drop(columns="seen_ns").rename(columns={"last_ns": "seen_ns"})
        entries = entries.assign(address=-1, port=0)
    entries = entries.sort_values("seen_ns", kind="stable")
    columns = {name: entries[name].to_numpy(np.int64) for name in entries.columns}
    paths = tuple(Path(str(name), name == ACK_REFUSED_WITH_RST, _is_overflow(name)) for name in names)
    return Refusals(paths=paths, addresses=addresses, one_by_one=one_by_one, **columns)


def _is_overflow(name: str) -> bool:
    return name == SAMPLED_PATH or name in QUEUE_FULL


def _path_order(name: str) -> int:
    known = (SAMPLED_PATH, *REFUSALS, OTHER_DROPS)
    return known.index(name) if name in known else len(known)


def _other_drops(tables: Tables) -> pd.DataFrame:
    """Return what ListenDrops counted beyond ListenOverflows, by interval.

    The two counters may be seen to grow one after the other: what one is ahead only counts if the other never
    catches up.
    """
    drops, overflows = increases(tables, LISTEN_DROPS), increases(tables)
    parts = []
    for namespace, mine in drops.groupby("namespace"):
        others = overflows.loc[overflows["namespace"] == namespace]
        sofar = np.concatenate([[0], np.cumsum(others["count"].to_numpy())])
        place = np.searchsorted(others["seen_ns"].to_numpy(), mine["seen_ns"].to_numpy(), side="right")
        ahead = np.cumsum(mine["count"].to_numpy()) - sofar[place]
        ahead[-1] = min(ahead[-1], int(mine["count"].sum()) - int(sofar[-1]))
        lasting = np.maximum(np.minimum.accumulate(ahead[::-1])[::-1], 0)
        parts.append(mine.assign(count=np.diff(lasting, prepend=0)))
    rest = pd.concat(parts) if parts else drops
    return rest.loc[rest["count"] > 0, ["after_ns", "seen_ns", "count"]]


def _reckoned(analysis: Analysis, pid: int, listeners: list[int], taken: Ints) -> tuple[Ints, Ints]:
    """Return when how many connections came to the accept queues of one server.

    Between two samples that follow each other closely, all of them in the middle. Where the queue did not
    change, samples are far apart; then every connection that was accepted came when it was.
    """
    tables = analysis.tables
    steps = [listener_step(tables, index, "queue_length") for index in listeners]
    steps = [step for step in steps if len(step.time_ns)]
    if not steps:
        return taken, np.ones(len(taken), np.int64)
    time = np.unique(np.concatenate([step.time_ns for step in steps]))
    length = np.sum([step.at(time) for step in steps], axis=0)
    mine = analysis.stalls.overflows.loc[analysis.stalls.overflows["listener"].isin(listeners)].sort_values("seen_ns")
    refused = np.concatenate([[0], np.cumsum(mine["count"].to_numpy())])
    refused_at = refused[np.searchsorted(mine["seen_ns"].to_numpy(), time, side="right")]
    accepted_at = np.searchsorted(taken, time, side="right")
    came = np.maximum(np.diff(length + refused_at + accepted_at), 0)
    close = np.diff(time) <= 3 * tables.manifest.sample_ns
    place = np.searchsorted(time, taken, side="left") - 1
    # before the first sample and after the last one nothing is close
    apart = ~np.concatenate([[False], close, [False]])[np.minimum(place, len(close)) + 1]
    middle = (time[:-1] + time[1:]) // 2
    times = np.concatenate([middle[close], taken[apart]])
    return times, np.concatenate([came[close], np.ones(int(np.count_nonzero(apart)), np.int64)])


def counted(name: str, pid: int, bin_ns: int, time_ns: Ints, count: Ints) -> RateLane:
    """Return events counted in bins; what lies before the timeline is left out."""
    inside = time_ns >= 0
    total = np.bincount(time_ns[inside] // bin_ns, weights=count[inside]).astype(np.int64)
    filled = np.flatnonzero(total)
    return RateLane(name, pid, bin_ns, filled, total[filled])


def _address(high: int, low: int) -> str:
    address = IPv6Address(high << 64 | low)
    return str(address.ipv4_mapped or address)
