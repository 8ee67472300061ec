"""The DataFrames everything else works on, made from a recording.

Times are nanoseconds on CLOCK_MONOTONIC. All columns of all tables are documented here:

calls: one row per call of a traced function; sorted by ``tid``, ``start_ns``, longest first.
    ============= ======= ===== ======================================================================
    column        dtype   unit  meaning
    ============= ======= ===== ======================================================================
    start_ns      int64   ns    entry of the call
    duration_ns   int64   ns    entry to return; until the end of the recording for unfinished calls
    tid           uint32        thread that made the call
    pid           uint32        its process
    probe         uint16        id in the recording's probe list
    unfinished    bool          the call had not returned when the recording ended
    row           int64         place in the recording; what the values are looked up by
    ============= ======= ===== ======================================================================

    The decoded arguments are not spread over this table, since every function has its own:
    :meth:`Tables.decoded` returns those of one function, by name.

iterations: one row per recorded event loop iteration; sorted by ``tid``, ``start_ns``.
    The columns of ``calls`` without ``probe`` and ``row``, and
    ready         uint64        file descriptors that epoll_wait returned
    accepted      uint64        connections accepted in it

accepts: one row per accepted connection; sorted by ``tid``, ``start_ns``.
    The columns of ``calls`` without ``probe``, ``unfinished`` and ``row``, and
    listener_fd   int64         file descriptor of the listener
    fd            int64         file descriptor of the connection

queues: one row per stored sample of a listener's accept queue; sorted by ``listener``, ``time_ns``.
    time_ns       int64   ns    when it was sampled
    listener      int64         index in the recording's listener list
    queue_length  int64         connections that wait for accept()
    queue_limit   int64         the queue is full above this length
    drops         int64         sk_drops: what the socket dropped since it was made, for any reason

counters: one row per stored sample of a kernel counter; sorted by ``namespace``, ``counter``, ``time_ns``.
    time_ns       int64   ns    when it was sampled
    namespace     int64         index in the recording's namespace list
    counter       int64         index in the recording's ``counter_names``
    count         int64         absolute value

requests: one row per kept event of a listener in the kernel; sorted by ``listener``, ``time_ns``. The columns
    that begin with ``peer`` together tell one client's connections from each other.
    ================ ======== ===== ===================================================================
    time_ns          int64    ns    when it happened; of ``connection accepted``, when it was enqueued
    event            category       the event's name, from the recording's probe list
    listener         int64          index in the recording's listener list
    pid              uint32         the listener's process
    queue_length     int64          connections in the accept queue, with this one if it was enqueued
    queue_limit      int64          the queue is full above this length
    syn_queue_length int64          connections in the SYN queue
    peer_high        uint64         upper half of the client's IPv6 address
    peer_low         uint64         lower half; IPv4 addresses are mapped (``::ffff:192.0.2.1``)
    peer_port        int64          the client's port
    wait_ns          int64    ns    ``connection accepted``: from the enqueue to accept(); others 0
    ================ ======== ===== ===================================================================

samples: one row per stack sample, by :func:`sample_rows.stack_samples`.

What ``stallscope import`` added; ``file`` is the place in the recording's list of imports:

packets: one row per kept packet of a capture; sorted by ``file``, ``time_ns``.
    time_ns       int64    ns   when it was captured
    event         category      what the packet is: one of ``packet_events.EVENTS``
    file          int64         the capture
    connection    int64         number of the connection attempt in that capture; the same for all its packets
    listener      int64         index in the recording's listener list, by port; -1: none has that port
    server        category      the server's address and port, as ``192.0.2.1:6379``; "" where not kept
    port          int64         the server's port
    peer_high, peer_low, peer_port   the client, as in ``requests``

imported_spans: one row per SLOWLOG entry or LATENCY sample; sorted by ``start_ns``.
    start_ns      int64    ns   the earliest it can have begun
    duration_ns   int64    ns   as Redis measured it
    uncertain_ns  int64    ns   it may have begun this much later: Redis tells whole seconds
    source        category      ``SLOWLOG``, or ``LATENCY`` and the event's name
    text          category      the command and its client; "" where there is none
    file          int64         the input

imported_samples: one row per number of an INFO dump; sorted by ``name``, ``time_ns``.
    time_ns       int64    ns   when INFO was asked
    name          category      the field of INFO, as ``connected_clients``
    value         float64       its value, in ``unit``
    unit          category      ``B``, ``s``, ``clients``, ``commands/s``; "" for a plain number
    file          int64         the input
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.imported_tables import imported_tables
from stallscope.tracer.analysis.rows import Ints as Ints
from stallscope.tracer.analysis.rows import column, field_values, of_probe
from stallscope.tracer.analysis.rows import extract as extract
from stallscope.tracer.analysis.sample_rows import stack_samples
from stallscope.tracer.errors import RecordingError
from stallscope.tracer.layout import MAX_SPAN_NS, mark_unfinished
from stallscope.tracer.manifest import (
    ACCEPT,
    CALL,
    COUNTER,
    ITERATION,
    KINDS,
    LISTENER,
    QUEUE,
    Manifest,
    ProbeInfo,
)
from stallscope.tracer.recording import Recording

NS_PER_S = 1_000_000_000
_MAX_TIME_NS = 2**62
_UNKNOWN = 255


@dataclass(frozen=True)
class Tables:
    """All rows of one recording, by kind; see this module's documentation for the columns.

    Attributes:
        end_ns: end of what was recorded; unfinished spans are clipped to it.
        damaged_rows: rows with an impossible time, which were left out.
        unknown_rows: rows of probes the manifest does not list, which were left out.
    """

    recording: Recording
    calls: pd.DataFrame
    iterations: pd.DataFrame
    accepts: pd.DataFrame
    queues: pd.DataFrame
    counters: pd.DataFrame
    requests: pd.DataFrame
    samples: pd.DataFrame
    packets: pd.DataFrame
    imported_spans: pd.DataFrame
    imported_samples: pd.DataFrame
    end_ns: int
    damaged_rows: int
    unknown_rows: int
    _values: dict[int, npt.NDArray[np.uint64]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def manifest(self) -> Manifest:
        """Return the recording's manifest."""
        return self.recording.manifest

    def missing(self, kind: str) -> int:
        """Return how many events of one kind of probe were seen and could not be kept."""
        by_probe = self.recording.counters.by_probe if self.recording.counters else {}
        ids = [probe.id for probe in self.manifest.probes if probe.kind == kind]
        return sum(by_probe[probe].missing for probe in ids if probe in by_probe)

    def decoded(self, probe: ProbeInfo, calls: pd.DataFrame | None = None) -> pd.DataFrame:
        """Return the decoded arguments of one function's calls, a column per field, indexed as ``calls``.

        Columns are int64, or uint64 for fields of 64 unsigned bits, in the field's unit. Where the last
        interaction of a client is known, ``idle_s`` (int64, seconds) is the time since then.

        Args:
            probe: the function, from the recording's probe list.
            calls: rows to decode, of ``calls`` or of anything with its columns; by default all rows.
        """
        table = self.calls if calls is None else calls
        table = table.loc[table["probe"].to_numpy() == probe.id]
        columns = self.decode(probe, table["start_ns"].to_numpy(), table["row"].to_numpy())
        return pd.DataFrame(columns, index=table.index)

    def decode(self, probe: ProbeInfo, start_ns: Ints, rows: Ints) -> dict[str, npt.NDArray[Any]]:
        """Return what :meth:`decoded` returns, as arrays, of the calls at these places in the recording."""
        columns: dict[str, npt.NDArray[Any]] = {
            item.name: extract(self.values(item.slot)[rows], item) for item in probe.fields
        }
        last = columns.get("last_interaction_s")
        if last is not None:
            wall_s = (start_ns + self.manifest.wall_offset_ns) // NS_PER_S
            columns["idle_s"] = wall_s - last.astype(np.int64)
        return columns

    def values(self, slot: int) -> npt.NDArray[np.uint64]:
        """Return one of the three value columns of the whole recording, in the order it was written."""
        if slot not in self._values:
            self._values[slot] = self.recording.table[f"value{slot}"].to_numpy()
        return self._values[slot]


def build_tables(recording: Recording) -> Tables:
    """Return the rows of a recording by kind, checked, clipped to its end and sorted.

    Raises:
        RecordingError: the probe list contradicts the format.
    """
    manifest = recording.manifest
    check_fields(manifest)
    probe = column(recording, "probe")
    start = column(recording, "start_ns")
    duration = column(recording, "duration_ns")
    unfinished = mark_unfinished(duration)
    damaged = (start >= np.uint64(_MAX_TIME_NS)) | ((duration > np.uint64(MAX_SPAN_NS)) & ~unfinished)
    kinds = _kinds_by_probe(manifest)[probe]
    unknown_rows = int(np.count_nonzero(kinds == _UNKNOWN))
    damaged_rows = int(np.count_nonzero(damaged))
    if damaged_rows:
        kinds = np.where(damaged, np.uint8(_UNKNOWN), kinds)
    end_ns = _end_ns(recording, start, duration, unfinished, damaged)
    finished = np.where(unfinished, np.uint64(0), duration)
    imported = imported_tables(recording, kinds, start, finished)
    spans = _Spans(recording, kinds, start, duration, unfinished, end_ns)
    return Tables(
        recording=recording,
        calls=spans.frame(CALL, "probe", "row"),
        iterations=spans.with_fields(ITERATION, "ready", "accepted").astype({"ready": "uint64", "accepted": "uint64"}),
        accepts=spans.with_fields(ACCEPT, "listener_fd", "fd").drop(columns="unfinished"),
        queues=spans.samples(QUEUE, ("listener", "queue_length", "queue_limit", "drops"), ("listener",)),
        counters=spans.samples(COUNTER, ("namespace", "counter", "count"), ("namespace", "counter")),
        requests=spans.requests(),
        samples=stack_samples(recording, kinds, start, finished),
        packets=imported.packets,
        imported_spans=imported.spans,
        imported_samples=imported.samples,
        end_ns=end_ns,
        damaged_rows=damaged_rows,
        unknown_rows=unknown_rows,
    )


def check_fields(manifest: Manifest) -> None:
    """Check that every field of the probe list lies inside the three 64-bit values.

    Raises:
        RecordingError: one does not.
    """
    for probe in manifest.probes:
        if not 0 <= probe.id < 2**16:
            raise RecordingError(f"probe id {probe.id} of the recording is impossible; the file is damaged")
        for item in probe.fields:
            inside = 0 <= item.slot <= 2 and 0 <= item.shift < 64 and 1 <= item.bits <= 64
            if not inside or (item.bits == 64 and item.shift):
                raise RecordingError(f"field {item.name} of probe {probe.name} is impossible; the file is damaged")


class _Spans:
    """Cuts the recording's columns into the tables."""

    def __init__(
        self,
        recording: Recording,
        kinds: npt.NDArray[np.uint8],
        start: npt.NDArray[np.uint64],
        duration: npt.NDArray[np.uint64],
        unfinished: npt.NDArray[np.bool_],
        end_ns: int,
    ) -> None:
        self._recording = recording
        self._kinds = kinds
        self._start = start
        self._duration = duration
        self._unfinished = unfinished
        self._end_ns = end_ns

    def frame(self, kind: str, *more: str) -> pd.DataFrame:
        """Return the spans of one kind, sorted by thread, start and, longest first, duration."""
        rows = np.flatnonzero(self._kinds == KINDS.index(kind))
        start = self._start[rows].view(np.int64)
        duration = self._duration[rows].view(np.int64)
        unfinished = self._unfinished[rows]
        if unfinished.any():
            duration[unfinished] = np.maximum(self._end_ns - start[unfinished], 0)
        tid = column(self._recording, "tid")[rows]
        order = span_order(tid, start, duration)
        if order is not None:
            start, duration, tid = start[order], duration[order], tid[order]
            unfinished, rows = unfinished[order], rows[order]
        columns: dict[str, npt.NDArray[Any]] = {
            "start_ns": start,
            "duration_ns": duration,
            "tid": tid,
            "pid": column(self._recording, "pid")[rows],
        }
        if "probe" in more:
            columns["probe"] = column(self._recording, "probe")[rows]
        columns["unfinished"] = unfinished
        if "row" in more:
            columns["row"] = rows
        return pd.DataFrame(columns, copy=False)

    def with_fields(self, kind: str, *names: str) -> pd.DataFrame:
        """Return the spans of one kind with the fields of these names beside them."""
        frame = self.frame(kind, "probe", "row")
        for name in names:
            frame[name] = field_values(self._recording, kind, frame["row"].to_numpy(), frame["probe"].to_numpy(), name)
        return frame.drop(columns=["probe", "row"])

    def samples(self, kind: str, names: Sequence[str], keys: Sequence[str]) -> pd.DataFrame:
        """Return the samples of one kind, sorted by key and time."""
        rows = np.flatnonzero(self._kinds == KINDS.index(kind))
        probe = column(self._recording, "probe")[rows]
        frame = pd.DataFrame({"time_ns": self._start[rows].astype(np.int64)})
        for name in names:
            frame[name] = field_values(self._recording, kind, rows, probe, name)
        return frame.sort_values([*keys, "time_ns"], kind="stable", ignore_index=True)

    def requests(self) -> pd.DataFrame:
        """Return the listener events, sorted by listener and time."""
        rows = np.flatnonzero(self._kinds == KINDS.index(LISTENER))
        probe = column(self._recording, "probe")[rows]
        fields = {
            name: field_values(self._recording, LISTENER, rows, probe, name)
            for name in ("queue_length", "queue_limit", "peer_high", "peer_low", "peer_port")
        }
        frame = pd.DataFrame(
            {
                "time_ns": self._start[rows].astype(np.int64),
                "event": of_probe(self._recording.manifest, LISTENER, probe),
                "listener": column(self._recording, "tid")[rows].astype(np.int64),
                "pid": column(self._recording, "pid")[rows],
                "queue_length": fields["queue_length"],
                "queue_limit": fields["queue_limit"],
                "syn_queue_length": column(self._recording, "stack")[rows].astype(np.int64),
                "peer_high": fields["peer_high"].view(np.uint64),
                "peer_low": fields["peer_low"].view(np.uint64),
                "peer_port": fields["peer_port"],
                "wait_ns": np.where(self._unfinished[rows], 0, self._duration[rows]).astype(np.int64),
            }
        )
        return frame.sort_values(["listener", "time_ns"], kind="stable", ignore_index=True)


def span_order(tid: npt.NDArray[np.uint32], start: Ints, duration: Ints) -> Ints | None:
    """Return the order by thread, start, longest first and, last recorded first; None if it is that already.

    A caller is recorded after what it calls, so for equal spans the later record is the outer one.
    """
    if len(start) < 2:
        return None
    key = thread_time_key(tid, start, start)
    if key is None:
        return np.lexsort((-np.arange(len(start)), -duration, start, tid)).astype(np.int64)
    begin = key[0]
    steps = np.diff(begin)
    if (steps > 0).all():
        return None
    order = np.argsort(begin, kind="stable")
    if (np.diff(begin[order]) == 0).any():
        return np.lexsort((-np.arange(len(start)), -duration, begin)).astype(np.int64)
    return order.astype(np.int64, copy=False)


def thread_time_key(tid: npt.NDArray[np.uint32], start: Ints, end: Ints) -> tuple[Ints, Ints] | None:
    """Return start and end moved so that the threads lie one after the other on one axis.

    Order and differences inside a thread stay; so one sort or one search does for all threads. None
    when the times span too much for 64 bits (a damaged recording).
    """
    threads = np.sort(pd.unique(tid))
    origin = int(start.min())
    room = int(end.max()) - origin + 2
    if room * len(threads) >= 2**62:
        return None
    if len(threads) == 1:
        return start - origin, end - origin
    lane = np.searchsorted(threads, tid) * np.int64(room)
    return lane + (start - origin), lane + (end - origin)


def _kinds_by_probe(manifest: Manifest) -> npt.NDArray[np.uint8]:
    kinds = np.full(2**16, _UNKNOWN, np.uint8)
    for probe in manifest.probes:
        if probe.kind in KINDS:
            kinds[probe.id] = KINDS.index(probe.kind)
    return kinds


def _end_ns(
    recording: Recording,
    start: npt.NDArray[np.uint64],
    duration: npt.NDArray[np.uint64],
    unfinished: npt.NDArray[np.bool_],
    damaged: npt.NDArray[np.bool_],
) -> int:
    """Return the latest time known: the footer's end, or the end of a row that is later."""
    manifest = recording.manifest
    counted = recording.counters.time_ns if recording.counters else 0
    known = max(manifest.ended_ns, manifest.started_ns, counted)
    if len(start):
        ends = start + np.where(unfinished, np.uint64(0), duration)
        known = max(known, int(ends.max(where=~damaged, initial=0)))
    return min(known, _MAX_TIME_NS)
