"""Packets of a Perfetto trace, many events of one shape at once.

Everything is on one packet sequence: a name is interned when it is first needed, and its clock is
CLOCK_MONOTONIC. Field numbers are from Perfetto's protos/perfetto/trace/perfetto_trace.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from stallscope.reports.export.protobuf import (
    Matrix,
    bytes_field,
    constant_columns,
    fixed64_column,
    interleaved,
    message_column,
    number_column,
    number_field,
)
from stallscope.tracer.analysis.tables import Ints

BEGIN, END, INSTANT, COUNTER = 1, 2, 3, 4
"""TrackEvent.Type."""

CLOCK_REALTIME, CLOCK_MONOTONIC = 1, 3
"""BuiltinClock."""

_SEQUENCE = 1
_STATE_CLEARED, _NEEDS_STATE = 1, 2
_ROWS_A_WRITE = 1 << 17


class Packet:
    """Field numbers of TracePacket, and of the Trace that holds it."""

    IN_TRACE = 1
    CLOCK_SNAPSHOT = 6
    TIMESTAMP = 8
    SEQUENCE_ID = 10
    TRACK_EVENT = 11
    INTERNED_DATA = 12
    SEQUENCE_FLAGS = 13
    DEFAULTS = 59
    TRACK_DESCRIPTOR = 60
    DEFAULT_CLOCK = 58


class TrackEvent:
    """Field numbers of TrackEvent and of its DebugAnnotation."""

    CATEGORY_IIDS = 3
    DEBUG_ANNOTATIONS = 4
    TYPE = 9
    NAME_IID = 10
    TRACK_UUID = 11
    COUNTER_VALUE = 30
    FLOW_IDS = 47
    TERMINATING_FLOW_IDS = 48
    ANNOTATION_NAME_IID = 1
    ANNOTATION_BOOL = 2
    ANNOTATION_UINT = 3
    ANNOTATION_INT = 4
    ANNOTATION_TEXT_IID = 17


class Interned:
    """Field numbers of InternedData; its entries have an iid, 1, and a text, 2."""

    CATEGORIES = 1
    EVENT_NAMES = 2
    ANNOTATION_NAMES = 3
    ANNOTATION_TEXTS = 29


@dataclass(frozen=True)
class Values:
    """One debug annotation of many events.

    Attributes:
        numbers: a value for each event or, with ``texts``, the place of its text there.
        known: which events have it; None: all.
    """

    numbers: npt.NDArray[np.integer]
    known: npt.NDArray[np.bool_] | None = None
    texts: Sequence[str] | None = None

    def of(self, rows: Ints) -> Values:
        """Return the annotation of some of the events."""
        return Values(self.numbers[rows], None if self.known is None else self.known[rows], self.texts)


@dataclass(frozen=True)
class Events:
    """Track events of one type and name.

    Attributes:
        type: ``BEGIN``, ``END``, ``INSTANT`` or ``COUNTER``; name, category: "" for ends and counters.
        track: uuid of each event's track; time_ns: CLOCK_MONOTONIC.
        annotations: by name. count: the value, of counters. flow: the number of the flow that ends at each event.
        flows: the numbers of the flows that begin at some of the events, by place.
    """

    type: int
    track: Ints
    time_ns: Ints
    name: str = ""
    category: str = ""
    annotations: Mapping[str, Values] = field(default_factory=dict)
    count: Ints | None = None
    flow: Values | None = None
    flows: Mapping[int, Ints] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.time_ns)

    def of(self, rows: Ints) -> Events:
        """Return some of the events, without the flows that begin at them."""
        annotations = {name: values.of(rows) for name, values in self.annotations.items()}
        count = None if self.count is None else self.count[rows]
        flow = None if self.flow is None else self.flow.of(rows)
        return Events(
            self.type, self.track[rows], self.time_ns[rows], self.name, self.category, annotations, count, flow
        )


class PacketWriter:
    """Writes one trace: a track before its first event, events in any order of their times.

    A reader sorts by time and keeps the order of the file where times are equal.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._iids: dict[tuple[int, str], int] = {}
        self._new: list[bytes] = []
        clock = bytes_field(Packet.DEFAULTS, number_field(Packet.DEFAULT_CLOCK, CLOCK_MONOTONIC))
        self._packet(clock, _STATE_CLEARED)

    def clocks(self, time_ns: int, wall_ns: int) -> None:
        """Say what the wall clock showed at a time."""
        clocks = (
            bytes_field(1, number_field(1, clock) + number_field(2, reading))
            for clock, reading in ((CLOCK_MONOTONIC, time_ns), (CLOCK_REALTIME, wall_ns))
        )
        self._packet(bytes_field(Packet.CLOCK_SNAPSHOT, b"".join(clocks) + number_field(2, CLOCK_MONOTONIC)))

    def track(self, descriptor: bytes) -> None:
        """Declare a track."""
        self._packet(bytes_field(Packet.TRACK_DESCRIPTOR, descriptor))

    def write(self, events: Events) -> None:
        """Write events in their order; none of them begins a flow."""
        for low in range(0, len(events), _ROWS_A_WRITE):
            rows = np.arange(low, min(low + _ROWS_A_WRITE, len(events)))
            self.write_mixed([(rows - low, events.of(rows))])

    def write_slices(self, begins: Events, end_ns: Ints, unfinished: npt.NDArray[np.bool_]) -> None:
        """Write slices that do not overlap, each begin followed by its end, if it has one."""
        for low in range(0, len(begins), _ROWS_A_WRITE):
            high = min(low + _ROWS_A_WRITE, len(begins))
            rows = np.arange(low, high)
            flows = {place - low: ids for place, ids in begins.flows.items() if low <= place < high}
            finished = np.flatnonzero(~unfinished[low:high])
            places = 2 * np.arange(high - low) - (np.cumsum(unfinished[low:high]) - unfinished[low:high])
            ends = Events(END, begins.track[rows[finished]], end_ns[rows[finished]])
            self.write_mixed([(places, replace(begins.of(rows), flows=flows)), (places[finished] + 1, ends)])

    def write_mixed(self, shapes: Sequence[tuple[Ints, Events]]) -> None:
        """Write several kinds of events; with each the place of each of its events among all of them."""
        encoded = [
            (places[rows], matrix) for places, events in shapes if len(events) for rows, matrix in self._encoded(events)
        ]
        if self._new:
            interned, self._new = b"".join(self._new), []
            self._packet(bytes_field(Packet.INTERNED_DATA, interned))
        if encoded:
            self._out.write(interleaved(encoded))

    def _packet(self, content: bytes, flags: int = _NEEDS_STATE) -> None:
        tail = number_field(Packet.SEQUENCE_ID, _SEQUENCE) + number_field(Packet.SEQUENCE_FLAGS, flags)
        self._out.write(bytes_field(Packet.IN_TRACE, content + tail))

    def _iid(self, kind: int, text: str) -> int:
        """Return the number a text is interned under."""
        key = (kind, text)
        if key not in self._iids:
            number = self._iids[key] = len(self._iids) + 1
            self._new.append(bytes_field(kind, number_field(1, number) + bytes_field(2, text)))
        return self._iids[key]

    def _encoded(self, events: Events) -> Iterator[tuple[Ints, Matrix]]:
        """Yield the packets of events that have the same fields, with their places."""
        optional = [*events.annotations.values(), *([events.flow] if events.flow else [])]
        pattern = np.zeros(len(events), np.int64)
        for bit, known in enumerate(values.known for values in optional if values.known is not None):
            pattern |= known.astype(np.int64) << bit
        pattern[list(events.flows)] = -1
        for present in np.unique(pattern[pattern >= 0]):
            rows = np.flatnonzero(pattern == present)
            yield rows, self._packets(events.of(rows), b"")
        for place, ids in events.flows.items():
            rows = np.array([place])
            yield rows, self._packets(events.of(rows), fixed64_column(TrackEvent.FLOW_IDS, ids).tobytes())

    def _packets(self, events: Events, more: bytes) -> Matrix:
        """Return the packets of events that all have, or all lack, each annotation."""
        count = len(events)
        fixed = number_field(TrackEvent.TYPE, events.type)
        if events.name:
            fixed += number_field(TrackEvent.NAME_IID, self._iid(Interned.EVENT_NAMES, events.name))
        if events.category:
            fixed += number_field(TrackEvent.CATEGORY_IIDS, self._iid(Interned.CATEGORIES, events.category))
        event = [constant_columns(fixed, count), number_column(TrackEvent.TRACK_UUID, events.track)]
        for name, values in events.annotations.items():
            if values.known is None or values.known[0]:
                event.append(self._annotation(name, values))
        if events.count is not None:
            event.append(number_column(TrackEvent.COUNTER_VALUE, events.count))
        if events.flow is not None and (events.flow.known is None or events.flow.known[0]):
            event.append(fixed64_column(TrackEvent.TERMINATING_FLOW_IDS, events.flow.numbers))
        event.append(constant_columns(more, count))
        tail = number_field(Packet.SEQUENCE_ID, _SEQUENCE) + number_field(Packet.SEQUENCE_FLAGS, _NEEDS_STATE)
        packet = [
            number_column(Packet.TIMESTAMP, events.time_ns),
            constant_columns(tail, count),
            message_column(Packet.TRACK_EVENT, event),
        ]
        return message_column(Packet.IN_TRACE, packet)

    def _annotation(self, name: str, values: Values) -> Matrix:
        iid = number_field(TrackEvent.ANNOTATION_NAME_IID, self._iid(Interned.ANNOTATION_NAMES, name))
        numbers = values.numbers
        if values.texts is not None:
            different, places = np.unique(numbers, return_inverse=True)
            iids = [self._iid(Interned.ANNOTATION_TEXTS, values.texts[place]) for place in different]
            value = number_column(TrackEvent.ANNOTATION_TEXT_IID, np.array(iids, np.int64)[places])
        elif numbers.dtype == np.bool_:
            value = number_column(TrackEvent.ANNOTATION_BOOL, numbers)
        else:
            unsigned = numbers.dtype.kind == "u"
            value = number_column(TrackEvent.ANNOTATION_UINT if unsigned else TrackEvent.ANNOTATION_INT, numbers)
        return message_column(TrackEvent.DEBUG_ANNOTATIONS, [constant_columns(iid, len(numbers)), value])
