"""Perfetto's native trace: TrackEvents in protobuf, for https://ui.perfetto.dev and the trace processor.

    ============================ ==================================================================================
    in the recording             in the trace
    ============================ ==================================================================================
    process, thread              a process and a thread track, with their numbers
    call                         a slice on its thread's track, nested as the calls were; decoded arguments and
                                 ``self_ns`` are its debug annotations; without an end if it had none
    abandoned call               an instant on its thread's track, of category ``abandoned``
    stall, event loop iteration  a slice on the track ``stalls`` beside the thread; what the analysis found out
                                 about the stall are its annotations
    accepted connection          a slice on the track ``accepts`` beside the thread
    overflow                     an instant on the listener's track ``overflows``, at the end of the interval in
                                 which it was seen; a flow leads to it from its stall
    accept queue                 counters: its length and limit in connections, and what the socket dropped
    kernel counter               a counter, of the network namespace
    connection request           an instant on the listener's track ``requests``
    note; the recording itself   an instant and a slice on the track ``recording``
    what was imported            nothing; Chrome's format has it
    ============================ ==================================================================================

Times are CLOCK_MONOTONIC, so the trace fits beside others of that clock; clock snapshots at both ends tie it to
wall time (SQL: ``to_realtime(ts)``). Units are in the names of annotations.

Field numbers are those of Perfetto's published protos (protos/perfetto/trace/perfetto_trace.proto), of which
tests check every packet. Their generated Python classes build one message after the other: 15 us a call instead
of 1.5, and two more packages to install.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import pandas as pd

from stallscope.reports.export.call_edges import call_edges
from stallscope.reports.export.naming import (
    ABANDONED,
    ACCEPT_KIND,
    CALL_KIND,
    ITERATION_KIND,
    OVERFLOW_KIND,
    QUEUE_COUNTERS,
    REQUEST_KIND,
    call_names,
    peer_addresses,
)
from stallscope.reports.export.perfetto_packets import (
    BEGIN,
    COUNTER,
    END,
    INSTANT,
    Events,
    PacketWriter,
    Values,
)
from stallscope.reports.export.perfetto_tracks import Tracks
from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.requests import ACCEPTED
from stallscope.tracer.analysis.segments import NOT_KNOWN
from stallscope.tracer.analysis.stalls import DRAIN, INSIDE, ITERATIONS, OUTSIDE
from stallscope.tracer.analysis.tables import Ints
from stallscope.tracer.manifest import CALL, ProbeInfo

STALL = "stall"
REQUEST_COLUMNS = ("queue_length", "queue_limit", "syn_queue_length", "peer_port")
PHASES = (INSIDE, DRAIN, OUTSIDE)


def write(analysis: Analysis, out: BinaryIO) -> None:
    """Write the whole trace."""
    packets = PacketWriter(out)
    manifest = analysis.manifest
    packets.clocks(manifest.started_ns, manifest.started_ns + manifest.wall_offset_ns)
    if manifest.wall_offset_end_ns:
        packets.clocks(analysis.tables.end_ns, analysis.tables.end_ns + manifest.wall_offset_end_ns)
    trace = _Trace(analysis, packets, Tracks(analysis, packets))
    trace.recording()
    trace.calls()
    trace.abandoned()
    trace.stalls()
    trace.overflows()
    trace.accepts()
    trace.queues()
    trace.counters()
    trace.requests()


class _Trace:
    """Writes the events of each table."""

    def __init__(self, analysis: Analysis, packets: PacketWriter, tracks: Tracks) -> None:
        self._analysis = analysis
        self._tables = analysis.tables
        self._packets = packets
        self._tracks = tracks
        self._names = call_names(analysis.manifest)
        overflows = analysis.stalls.overflows
        # a flow for each row of overflows that belongs to a stall, numbered from 1 on
        self._flow = np.where(overflows["stall"].to_numpy() >= 0, np.arange(1, len(overflows) + 1), 0)

    def recording(self) -> None:
        """Write the recording as a slice, and its notes."""
        manifest, recording = self._analysis.manifest, self._analysis.recording
        counters = recording.counters.by_probe.values() if recording.counters else ()
        facts = {
            "complete": np.array([recording.complete]),
            "lost_events": np.array([sum(item.missing for item in counters)]),
            "thinned_events": np.array([sum(item.thinned for item in counters)]),
            "min_duration_ns": np.array([manifest.min_duration_ns]),
            "stall_threshold_ns": np.array([manifest.stall_ns]),
            "sample_interval_ns": np.array([manifest.sample_ns]),
        }
        annotations = {name: Values(value) for name, value in facts.items()}
        annotations["command"] = _text(" ".join(manifest.command))
        annotations |= {name: _text(text) for name, text in sorted(manifest.host.items())}
        track, start_ns = np.array([self._tracks.recording]), np.array([manifest.started_ns])
        begin = Events(BEGIN, track, start_ns, "recording", "recording", annotations)
        self._packets.write_slices(begin, np.array([self._tables.end_ns]), np.array([False]))
        for note in manifest.notes:
            self._packets.write(Events(INSTANT, track, np.array([note.time_ns]), note.text, "note"))

    def calls(self) -> None:
        """Write the calls as nested slices, thread by thread."""
        calls = self._analysis.nested.calls
        edges = call_edges(self._analysis.nested)
        unfinished = calls["unfinished"].to_numpy()
        probe_ids, track = calls["probe"].to_numpy(), self._tracks.threads(calls)
        if unfinished.any():
            edges = edges.where(edges.enters | ~unfinished[edges.call])
        for part in edges.chunks():
            returns = np.flatnonzero(~part.enters)
            shapes = [(returns, Events(END, track[part.call[returns]], part.time_ns[returns]))]
            entered = np.where(part.enters, probe_ids[part.call].astype(np.int64), -1)
            for probe in self._functions():
                places = np.flatnonzero(entered == probe.id)
                if len(places):
                    rows = part.call[places]
                    shapes.append(
                        (places, self._of_function(BEGIN, probe, calls.iloc[rows], part.time_ns[places], track[rows]))
                    )
            self._packets.write_mixed(shapes)

    def abandoned(self) -> None:
        """Write the calls that never returned as instants."""
        frame = self._analysis.nested.abandoned
        track, time_ns = self._tracks.threads(frame), frame["start_ns"].to_numpy()
        for probe in self._functions():
            mine = np.flatnonzero(frame["probe"].to_numpy() == probe.id)
            self._packets.write(self._of_function(INSTANT, probe, frame.iloc[mine], time_ns[mine], track[mine]))

    def stalls(self) -> None:
        """Write stalls, with the flows to their overflows, and the iterations that are none."""
        frame = self._analysis.stalls.frame
        columns = ("explained_ns", "queue_start", "queue_max", "queue_limit", "drain_ns", "accepted",
                   "accepted_drain", "overflows", "overflows_drain", "connections")  # fmt: skip
        annotations = {"stall": Values(frame.index.to_numpy().astype(np.int64))}
        annotations |= {name: _known(frame[name].to_numpy(), NOT_KNOWN) for name in columns}
        annotations["drained"] = Values(frame["drained"].to_numpy())
        annotations["listener"] = self._listener(frame["listener"].to_numpy())
        begin = frame["start_ns"].to_numpy()
        track = self._tracks.beside_threads(frame, "stalls")
        events = Events(BEGIN, track, begin, STALL, STALL, annotations, flows=self._flows())
        self._packets.write_slices(events, begin + frame["duration_ns"].to_numpy(), frame["unfinished"].to_numpy())
        others = self._tables.iterations
        if self._analysis.stalls.basis == ITERATIONS:
            others = others.loc[others["duration_ns"] < max(self._analysis.manifest.stall_ns, 1)]
        self._spans(others, "stalls", "event loop iteration", ITERATION_KIND, ("ready", "accepted"))

    def overflows(self) -> None:
        """Write the overflows; each may be several refused connections, seen at once."""
        frame = self._analysis.stalls.overflows
        annotations = {
            "count": Values(frame["count"].to_numpy()),
            "interval_ns": Values((frame["seen_ns"] - frame["after_ns"]).to_numpy()),
            "phase": Values(np.array(pd.Categorical(frame["phase"], PHASES).codes), texts=PHASES),
            "stall": _known(frame["stall"].to_numpy(), NOT_KNOWN),
            "connection": _known(frame["connection"].to_numpy(), NOT_KNOWN),
        }
        track = self._tracks.of_listeners(frame["listener"].to_numpy(), "overflows")
        seen = frame["seen_ns"].to_numpy()
        self._packets.write(
            Events(INSTANT, track, seen, OVERFLOW_KIND, OVERFLOW_KIND, annotations, flow=_known(self._flow, 0))
        )

    def accepts(self) -> None:
        """Write the accepted connections."""
        self._spans(self._tables.accepts, "accepts", ACCEPT_KIND, ACCEPT_KIND, ("listener_fd", "fd"))

    def queues(self) -> None:
        """Write the samples of the accept queues."""
        frame = self._tables.queues
        for column, name in QUEUE_COUNTERS.items():
            track = self._tracks.of_listeners(frame["listener"].to_numpy(), name, unit="connections")
            self._counter(track, frame["time_ns"].to_numpy(), frame[column].to_numpy())

    def counters(self) -> None:
        """Write the samples of the kernel's counters."""
        frame = self._tables.counters
        track = self._tracks.kernel_counters(frame["namespace"].to_numpy(), frame["counter"].to_numpy())
        self._counter(track, frame["time_ns"].to_numpy(), frame["count"].to_numpy())

    def requests(self) -> None:
        """Write what the kernel did with connection requests."""
        frame = self._tables.requests
        codes, addresses = peer_addresses(frame["peer_high"].to_numpy(), frame["peer_low"].to_numpy())
        track = self._tracks.of_listeners(frame["listener"].to_numpy(), "requests")
        annotations = {name: Values(frame[name].to_numpy()) for name in REQUEST_COLUMNS}
        annotations["peer"] = Values(codes, texts=addresses)
        annotations["wait_ns"] = Values(frame["wait_ns"].to_numpy(), (frame["event"] == ACCEPTED).to_numpy())
        for name in frame["event"].cat.categories:
            events = Events(INSTANT, track, frame["time_ns"].to_numpy(), name, REQUEST_KIND, annotations)
            self._packets.write(events.of(np.flatnonzero((frame["event"] == name).to_numpy())))

    def _functions(self) -> list[ProbeInfo]:
        return [probe for probe in self._analysis.manifest.probes if probe.kind == CALL]

    def _of_function(self, kind: int, probe: ProbeInfo, calls: pd.DataFrame, time_ns: Ints, track: Ints) -> Events:
        decoded = self._tables.decode(probe, calls["start_ns"].to_numpy(), calls["row"].to_numpy())
        annotations = {name: Values(values) for name, values in decoded.items()}
        if "self_ns" in calls:
            annotations["self_ns"] = Values(calls["self_ns"].to_numpy())
        category = CALL_KIND if kind == BEGIN else ABANDONED
        return Events(kind, track, time_ns, self._names[probe.id], category, annotations)

    def _spans(self, frame: pd.DataFrame, track: str, name: str, category: str, columns: tuple[str, ...]) -> None:
        annotations = {column: Values(frame[column].to_numpy()) for column in columns}
        begin = frame["start_ns"].to_numpy()
        events = Events(BEGIN, self._tracks.beside_threads(frame, track), begin, name, category, annotations)
        unfinished = frame["unfinished"].to_numpy() if "unfinished" in frame else np.zeros(len(frame), np.bool_)
        self._packets.write_slices(events, begin + frame["duration_ns"].to_numpy(), unfinished)

    def _counter(self, track: Ints, time_ns: Ints, count: Ints) -> None:
        self._packets.write(Events(COUNTER, track, time_ns, count=count))

    def _listener(self, indexes: Ints) -> Values:
        names = self._tracks.listener_names
        return Values(np.searchsorted(list(names), indexes), indexes >= 0, list(names.values()))

    def _flows(self) -> dict[int, Ints]:
        """Return the flows that begin at each stall that has any."""
        stall = self._analysis.stalls.overflows["stall"].to_numpy()
        order = np.argsort(stall, kind="stable")
        order = order[stall[order] >= 0]
        stalls, first = np.unique(stall[order], return_index=True)
        parts = np.split(self._flow[order], first)[1:]
        return dict(zip(stalls.tolist(), parts, strict=True))


def _known(values: Ints, unknown: int) -> Values:
    return Values(values, values != unknown)


def _text(text: str) -> Values:
    return Values(np.zeros(1, np.int64), texts=[text])
