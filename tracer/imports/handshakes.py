"""What each segment is to its connection: the SYN, a SYN again, its answer, the third ACK, a RST.

A client that got no answer sends the same SYN, with the same sequence number, again: so no timer has to be
guessed. The same packet captured at several interfaces (``tcpdump -i any`` on a host with bridges) is
one packet: it has the IP identification of the first or follows faster than any retransmission.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stallscope.tracer import packet_events as names
from stallscope.tracer.imports.pcap import Ints
from stallscope.tracer.imports.segments import ACK, FIN, RST, SYN, Segments

_ATTEMPT_NS = 121_000_000_000
"""Linux waits no longer than TCP_RTO_MAX, 120 s, between two SYNs (include/net/tcp.h)."""

_SAME_IDENT_NS = 500_000_000
_SYN_TWICE_NS = 10_000_000
_OTHER_TWICE_NS = 1_000_000
"""A copy of a packet comes sooner than this. Linux waits 1 s for a SYN-ACK (TCP_TIMEOUT_INIT) and at least two
timer ticks for a tail loss probe; no stack sends two packets with one IP identification on purpose."""

_NOT_KEPT = -1


@dataclass(frozen=True)
class Labelled:
    """The segments that say something about a connection attempt, in the order of their times.

    Attributes:
        segments: those that are kept; event: index in ``packet_events.EVENTS``, int64, shape (n,).
        connection: number of the connection in the capture, in the order of their first packets.
        twice: how many segments were left out as copies.
    """

    segments: Segments
    event: Ints
    connection: Ints
    twice: int


def label(segments: Segments) -> Labelled:
    """Return what each segment is to its connection; those that are none of ``EVENTS`` are left out."""
    if (np.diff(segments.time_ns) < 0).any():
        segments = segments.take(np.argsort(segments.time_ns, kind="stable"))
    flow_key = _mixed(
        segments.server_high, segments.server_low, segments.port,
        segments.peer_high, segments.peer_low, segments.peer_port,
    )  # fmt: skip
    order = np.argsort(flow_key, kind="stable")
    copies = _copies(segments, flow_key)
    if len(copies):
        kept = np.ones(len(segments), np.bool_)
        kept[copies] = False
        order = order[kept[order]]
    sorted_segments = segments.take(order)
    connection = _connections(sorted_segments)
    event = _events(sorted_segments, connection)
    rows = np.flatnonzero(event != _NOT_KEPT)
    # back to the order of time; the connections are numbered by their first packets
    rows = rows[np.argsort(order[rows], kind="stable")]
    return Labelled(sorted_segments.take(rows), event[rows], _renumbered(connection[rows]), len(copies))


def _mixed(*columns: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return one number for the values of a row: rows that differ get different ones, but for chance (2^-64)."""
    key = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        key = (key ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _copies(segments: Segments, flow_key: npt.NDArray[np.uint64]) -> Ints:
    """Return the places of segments that are the one before, captured once more."""
    key = _mixed(
        flow_key, segments.to_server, segments.flags, segments.sequence, segments.acknowledged, segments.payload
    )
    order = np.argsort(key, kind="stable")
    later, earlier = order[1:], order[:-1]
    passed = segments.time_ns[later] - segments.time_ns[earlier]
    ident = segments.ident[later]
    same_packet = (ident != 0) & (ident == segments.ident[earlier]) & (passed < _SAME_IDENT_NS)
    limit = np.where(segments.flags[later] & SYN, _SYN_TWICE_NS, _OTHER_TWICE_NS)
    # two identifications are two packets, however fast
    unnamed = (ident == 0) | (segments.ident[earlier] == 0)
    same = (key[later] == key[earlier]) & (same_packet | (unnamed & (passed < limit)))
    return later[same]


def _connections(segments: Segments) -> Ints:
    """Return a number for the connection of each segment; segments are sorted by flow and time.

    One flow (both addresses and ports) is a new connection with each SYN of another sequence number.
    """
    new = np.zeros(len(segments), np.bool_)
    new[:1] = True
    for name in ("server_high", "server_low", "port", "peer_high", "peer_low", "peer_port"):
        column = getattr(segments, name)
        new[1:] |= column[1:] != column[:-1]
    flow = np.cumsum(new)
    syns = np.flatnonzero(segments.to_server & (segments.flags & (SYN | ACK | RST) == SYN))
    other = np.ones(len(syns), np.bool_)
    other[1:] = (
        (flow[syns[1:]] != flow[syns[:-1]])
        | (segments.sequence[syns[1:]] != segments.sequence[syns[:-1]])
        | (np.diff(segments.time_ns[syns]) > _ATTEMPT_NS)
    )
    new[syns[other]] = True
    return (np.cumsum(new) - 1).astype(np.int64)


def _events(segments: Segments, connection: Ints) -> Ints:
    event = np.full(len(segments), _NOT_KEPT, np.int64)
    if not len(segments):
        return event
    code = {name: place for place, name in enumerate(names.EVENTS)}
    flags, to_server = segments.flags, segments.to_server
    count = int(connection[-1]) + 1
    reset = (flags & RST) != 0
    syn = to_server & (flags & (SYN | ACK | RST) == SYN)
    syn_ack = ~to_server & (flags & (SYN | ACK | RST) == SYN | ACK)
    client_isn = _first_of(connection, syn, segments.sequence, count)
    server_isn = _first_of(connection, syn_ack, segments.sequence, count)

    repeated = _sent_again(segments, connection)
    event[repeated & to_server] = code[names.AGAIN_FROM_CLIENT]
    event[repeated & ~to_server] = code[names.AGAIN_FROM_SERVER]

    # it acknowledges the SYN-ACK, unless only one direction was captured, and sends from after the SYN
    isn, answer = client_isn[connection], server_isn[connection]
    acknowledges = to_server & ~reset & (flags & (SYN | ACK | FIN) == ACK) & (isn >= 0)
    acknowledges &= segments.sequence == (isn + 1) & 0xFFFF_FFFF
    acknowledges &= (answer < 0) | (segments.acknowledged == (answer + 1) & 0xFFFF_FFFF)
    third = _firsts(connection, acknowledges)
    pure = acknowledges & (segments.payload == 0)
    again = _answers_again(connection, syn_ack, pure | third) & pure & ~third
    event[third] = code[names.THIRD_ACK]
    event[again] = code[names.THIRD_ACK_AGAIN]

    event[syn] = code[names.SYN_AGAIN]
    event[_firsts(connection, syn)] = code[names.SYN]
    event[syn_ack] = code[names.SYN_ACK_AGAIN]
    event[_firsts(connection, syn_ack)] = code[names.SYN_ACK]
    event[reset & to_server] = code[names.RST_FROM_CLIENT]
    event[reset & ~to_server] = code[names.RST_FROM_SERVER]
    return event


def _first_of(connection: Ints, chosen: npt.NDArray[np.bool_], values: npt.NDArray[np.uint32], count: int) -> Ints:
    """Return the value of the first chosen row of every connection, -1 where there is none."""
    result = np.full(count, -1, np.int64)
    rows = np.flatnonzero(_firsts(connection, chosen))
    result[connection[rows]] = values[rows]
    return result


def _firsts(connection: Ints, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which rows are the first chosen one of their connection; connections are in order."""
    rows = np.flatnonzero(chosen)
    first = np.zeros(len(chosen), np.bool_)
    if len(rows):
        new = np.ones(len(rows), np.bool_)
        new[1:] = connection[rows[1:]] != connection[rows[:-1]]
        first[rows[new]] = True
    return first


def _answers_again(
    connection: Ints, syn_ack: npt.NDArray[np.bool_], candidates: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Return the candidates that follow another SYN-ACK of their connection than the candidate before them."""
    result = np.zeros(len(connection), np.bool_)
    answers = np.cumsum(syn_ack)
    rows = np.flatnonzero(candidates)
    same = connection[rows[1:]] == connection[rows[:-1]]
    result[rows[1:]] = same & (answers[rows[1:]] > answers[rows[:-1]])
    return result


def _sent_again(segments: Segments, connection: Ints) -> npt.NDArray[np.bool_]:
    """Return which segments carry only data, or the FIN, that their sender had sent before.

    Sequence numbers wrap at 2^32: a position is the sum of the signed steps before it. One byte of data is a
    keep-alive probe (RFC 9293 section 3.8.4).
    """
    again = np.zeros(len(segments), np.bool_)
    fin = segments.flags & FIN != 0
    length = segments.payload + fin
    rows = np.flatnonzero((length > 0) & ((segments.flags & (SYN | RST)) == 0))
    stream = connection[rows] * 2 + segments.to_server[rows]
    order = np.argsort(stream, kind="stable")
    rows, stream = rows[order], stream[order]
    if len(rows) < 2:
        return again
    new = np.ones(len(rows), np.bool_)
    new[1:] = stream[1:] != stream[:-1]
    steps = np.zeros(len(rows), np.int64)
    steps[1:] = np.diff(segments.sequence[rows]).view(np.int32)
    steps[new] = 0
    position = np.cumsum(steps)
    begin = np.flatnonzero(new)
    stream_number = np.cumsum(new) - 1
    position -= position[begin][stream_number]
    end = position + length[rows]
    # one running maximum for all streams: each lies above the one before
    span = int(end.max() - position.min()) + 1
    reached = np.maximum.accumulate(end - position.min() + stream_number * span)
    before = np.zeros(len(rows), np.int64)
    before[1:] = reached[:-1] - stream_number[1:] * span + position.min()
    again[rows[~new & (end <= before) & (fin | (length > 1))[rows]]] = True
    return again


def _renumbered(connection: Ints) -> Ints:
    """Return the same numbers in the order in which they first appear, from 0 on."""
    _, first, place = np.unique(connection, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    return rank[place]
