"""Connection attempts, as a capture shows them: how many SYNs each took, and how long until it was answered.

A client whose SYN gets no answer sends it again after a second or more: that wait is what people notice. Whether
the server refused the SYN or the network lost it, a capture cannot tell; the recording beside it can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer import packet_events as names
from stallscope.tracer.analysis.functions import quantile
from stallscope.tracer.analysis.requests import refused_connections
from stallscope.tracer.analysis.rows import Ints
from stallscope.tracer.analysis.stalls import Stalls
from stallscope.tracer.analysis.tables import Tables

ANSWERED, REFUSED_WITH_RST, UNANSWERED = "answered", "refused with RST", "unanswered"
OUTCOMES = (ANSWERED, REFUSED_WITH_RST, UNANSWERED)

CLOCK_TOLERANCE_NS = 500_000_000
"""Clocks of hosts that both follow NTP differ by less; Linux sends no SYN again sooner than this."""

KEPT_SERVERS = 8

_NEVER = -1
_PEER = ["peer_high", "peer_low", "peer_port"]


@dataclass(frozen=True)
class CaptureSummary:
    """What one capture shows of the connections to the server's port.

    Attributes:
        file: place in the recording's list of imports; servers: the server's addresses, at most ``KEPT_SERVERS``.
        connections: attempts whose SYN was captured; syns: all their SYNs; first_ns, last_ns: of the packets.
        retried: attempts that sent more than one SYN, and how long they waited, until the answer or, without one, until
            their last SYN; retried_unanswered: how many of them got none.
        unanswered, refused_with_rst: attempts that got no answer at all, or a RST for one.
        unanswered_syns: SYNs that nothing followed but another SYN, or nothing at all.
        in_stalls: how many of those were sent in a stall or while the queue drained after one; None without stalls.
        refusals: what the recording has in the same time, None if nothing was recorded.
        handshakes_repeated: attempts in which the server sent its SYN-ACK again although the third ACK was captured.
        resets_by_server, resets_by_client, retransmissions_by_client, retransmissions_by_server: packets.
    """

    file: int
    servers: tuple[str, ...]
    first_ns: int
    last_ns: int
    connections: int
    syns: int
    retried: int
    retried_unanswered: int
    wait_min_ns: int | None
    wait_median_ns: int | None
    wait_max_ns: int | None
    unanswered: int
    refused_with_rst: int
    unanswered_syns: int
    in_stalls: int | None
    refusals: RecordedRefusals | None
    handshakes_repeated: int
    resets_by_server: int
    resets_by_client: int
    retransmissions_by_client: int
    retransmissions_by_server: int


@dataclass(frozen=True)
class RecordedRefusals:
    """Refusals that were recorded while the capture ran, to compare with it.

    Attributes:
        times: how often a watched listener refused a connection because its accept queue was full.
        connections: how many connections, None where refusals were only counted; captured: how many of these are
            attempts of the capture, by the client's address and port.
        clock_ns: how much later the capture has the refused packets than the kernel saw them, the median; None where
            not known.
    """

    times: int
    connections: int | None
    captured: int | None
    clock_ns: int | None


def find_attempts(packets: pd.DataFrame) -> pd.DataFrame:
    """Return one row per connection attempt, of table ``packets``; sorted by ``file``, ``first_ns``.

    ================ ======== ===== =====================================================================
    column           dtype    unit  meaning
    ================ ======== ===== =====================================================================
    file             int64          the capture
    connection       int64          as in ``packets``
    listener         int64          as in ``packets``
    server           category       as in ``packets``
    peer_high, ...                  the client, as in ``packets``
    syns             int64          how many SYNs it sent
    first_ns         int64    ns    its first SYN
    last_syn_ns      int64    ns    its last
    answered_ns      int64    ns    the first SYN-ACK; -1: none
    established_ns   int64    ns    the third ACK; -1: none
    reset_ns         int64    ns    the first RST from the server; -1: none
    syn_acks         int64          how many SYN-ACKs the server sent
    outcome          category       one of ``OUTCOMES``
    wait_ns          int64    ns    from the first SYN to the answer; without one, to the last SYN
    ================ ======== ===== =====================================================================
    """
    syn = _are(packets, names.SYN, names.SYN_AGAIN)
    syn_ack = _are(packets, names.SYN_ACK, names.SYN_ACK_AGAIN)
    time_ns = packets["time_ns"].to_numpy()
    group = _attempt_numbers(packets)
    count = int(group.max()) + 1 if len(group) else 0
    syns = np.bincount(group[syn], minlength=count)
    first_ns, answered_ns = _first(group, time_ns, syn, count), _first(group, time_ns, syn_ack, count)
    established_ns = _first(group, time_ns, _are(packets, names.THIRD_ACK), count)
    reset_ns = _first(group, time_ns, _are(packets, names.RST_FROM_SERVER), count)
    last_syn_ns = np.full(count, _NEVER, np.int64)
    last_syn_ns[group[syn]] = time_ns[syn]
    row = np.zeros(count, np.int64)
    row[group[syn][::-1]] = np.flatnonzero(syn)[::-1]
    refused = (answered_ns == _NEVER) & (reset_ns != _NEVER)
    outcome = np.select([answered_ns != _NEVER, refused], [0, 1], 2)
    until = np.select([answered_ns != _NEVER, refused], [answered_ns, reset_ns], last_syn_ns)
    frame = packets[["file", "connection", "listener", "server", *_PEER]].take(row).reset_index(drop=True)
    frame = frame.assign(
        syns=syns,
        first_ns=first_ns,
        last_syn_ns=last_syn_ns,
        answered_ns=answered_ns,
        established_ns=established_ns,
        reset_ns=reset_ns,
        syn_acks=np.bincount(group[syn_ack], minlength=count),
        outcome=pd.Categorical.from_codes(outcome, categories=pd.Index(OUTCOMES, dtype=object)),
        wait_ns=np.maximum(until - first_ns, 0),
    )
    # what began before the capture has no SYN
    return frame.loc[syns > 0].sort_values(["file", "first_ns"], kind="stable", ignore_index=True)


def unanswered_syns(packets: pd.DataFrame) -> pd.DataFrame:
    """Return the SYNs after which comes, in their connection, neither a SYN-ACK nor a RST but another SYN or nothing.

    Columns: those of ``packets``.
    """
    syn = _are(packets, names.SYN, names.SYN_AGAIN)
    rows = np.flatnonzero(syn | _are(packets, names.SYN_ACK, names.SYN_ACK_AGAIN, names.RST_FROM_SERVER))
    group = _attempt_numbers(packets)[rows]
    order = np.argsort(group, kind="stable")
    rows, group = rows[order], group[order]
    answered = np.zeros(len(rows), np.bool_)
    answered[:-1] = (group[1:] == group[:-1]) & ~syn[rows[1:]]
    return packets.iloc[np.sort(rows[syn[rows] & ~answered])]


def summarise_captures(tables: Tables, stalls: Stalls) -> tuple[CaptureSummary, ...]:
    """Return what each capture shows, by its place in the list of imports."""
    packets = tables.packets
    if packets.empty:
        return ()
    attempts = find_attempts(packets)
    unanswered = unanswered_syns(packets)
    return tuple(
        _summary(
            tables,
            stalls,
            packets.loc[packets["file"] == file],
            attempts.loc[attempts["file"] == file],
            unanswered.loc[unanswered["file"] == file],
        )
        for file in packets["file"].unique().tolist()
    )


def _summary(
    tables: Tables, stalls: Stalls, packets: pd.DataFrame, attempts: pd.DataFrame, unanswered: pd.DataFrame
) -> CaptureSummary:
    retried = attempts.loc[attempts["syns"] > 1]
    waits = np.sort(retried["wait_ns"].to_numpy())
    events = packets["event"].value_counts()
    outcomes = attempts["outcome"].value_counts()
    repeated = (attempts["syn_acks"] > 1) & (attempts["established_ns"] != _NEVER)
    first_ns, last_ns = int(packets["time_ns"].iloc[0]), int(packets["time_ns"].iloc[-1])
    return CaptureSummary(
        file=int(packets["file"].iloc[0]),
        servers=tuple(sorted(set(packets["server"].unique()))[:KEPT_SERVERS]),
        first_ns=first_ns - tables.manifest.started_ns,
        last_ns=last_ns - tables.manifest.started_ns,
        connections=len(attempts),
        syns=int(attempts["syns"].sum()),
        retried=len(retried),
        retried_unanswered=int((retried["outcome"] == UNANSWERED).sum()),
        wait_min_ns=int(waits[0]) if len(waits) else None,
        wait_median_ns=quantile(waits, 0, 0.5) if len(waits) else None,
        wait_max_ns=int(waits[-1]) if len(waits) else None,
        unanswered=int(outcomes.get(UNANSWERED, 0)),
        refused_with_rst=int(outcomes.get(REFUSED_WITH_RST, 0)),
        unanswered_syns=len(unanswered),
        in_stalls=_in_stalls(stalls, unanswered["time_ns"].to_numpy()),
        refusals=_recorded(tables, stalls, attempts, first_ns, last_ns),
        handshakes_repeated=int(repeated.sum()),
        resets_by_server=int(events.get(names.RST_FROM_SERVER, 0)),
        resets_by_client=int(events.get(names.RST_FROM_CLIENT, 0)),
        retransmissions_by_client=int(events.get(names.AGAIN_FROM_CLIENT, 0)),
        retransmissions_by_server=int(events.get(names.AGAIN_FROM_SERVER, 0)),
    )


def _are(packets: pd.DataFrame, *events: str) -> npt.NDArray[np.bool_]:
    return packets["event"].isin(events).to_numpy()


def _attempt_numbers(packets: pd.DataFrame) -> Ints:
    """Return the same number for the packets of one connection of one capture, from 0 on."""
    file, connection = packets["file"].to_numpy(), packets["connection"].to_numpy()
    # a connection's number has 32 bits
    numbers: Ints = pd.factorize(file << 32 | connection)[0].astype(np.int64)
    return numbers


def _first(group: Ints, time_ns: Ints, chosen: npt.NDArray[Any], count: int) -> Ints:
    """Return the time of the first chosen packet of each attempt, -1 where there is none; packets are in order."""
    first = np.full(count, _NEVER, np.int64)
    # of an index that comes several times numpy keeps the last: from the end on, that is the first packet
    first[group[chosen][::-1]] = time_ns[chosen][::-1]
    return first


def _in_stalls(stalls: Stalls, time_ns: Ints) -> int | None:
    """Return how many of these times lie in a stall or in the draining after one."""
    if stalls.frame.empty:
        return None
    begin = stalls.frame["start_ns"].to_numpy()
    end = begin + stalls.frame["duration_ns"].to_numpy() + stalls.frame["drain_ns"].to_numpy()
    reached = np.maximum.accumulate(end)
    place = np.searchsorted(begin, time_ns, side="right") - 1
    return int(np.count_nonzero((place >= 0) & (time_ns <= reached[np.maximum(place, 0)])))


def _recorded(
    tables: Tables, stalls: Stalls, attempts: pd.DataFrame, first_ns: int, last_ns: int
) -> RecordedRefusals | None:
    if not tables.manifest.listeners:
        return None
    rows = stalls.overflows
    meanwhile = (rows["seen_ns"] >= first_ns) & (rows["after_ns"] <= last_ns) & (rows["listener"] >= 0)
    times = int(rows.loc[meanwhile, "count"].sum())
    if tables.requests.empty:
        return RecordedRefusals(times, None, None, None)
    refused = refused_connections(tables.requests)
    refused = refused.loc[(refused["last_ns"] >= first_ns) & (refused["first_ns"] <= last_ns)]
    pairs = refused.reset_index(names="refused").merge(attempts, on=["listener", *_PEER], suffixes=("", "_captured"))
    near = (pairs["first_ns_captured"] <= pairs["last_ns"] + CLOCK_TOLERANCE_NS) & (
        pairs["last_syn_ns"] >= pairs["first_ns"] - CLOCK_TOLERANCE_NS
    )
    pairs = pairs.loc[near]
    apart = (pairs["first_ns_captured"] - pairs["first_ns"]).to_numpy()
    apart = apart[np.abs(apart) <= CLOCK_TOLERANCE_NS]
    clock_ns = int(np.median(apart)) if len(apart) else None
    return RecordedRefusals(times, len(refused), int(pairs["refused"].nunique()), clock_ns)
