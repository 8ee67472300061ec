from __future__ import annotations

import re
import struct

import numpy as np
import numpy.typing as npt
import pytest

from stallscope.tracer.layout import (
    BUSY_BIT,
    DISCARD_BIT,
    EVENT,
    NO_STACK,
    RING_RECORD,
    UNFINISHED_NS,
    header_text,
    mark_unfinished,
    struct_dtype,
    waiting_records,
)

CAPACITY = 8
RECORD_BYTES = 64


def test_every_bit_of_an_event_is_where_the_compiler_puts_it() -> None:
    packed = struct.pack("<QQQQQIIHHi", 1 << 63, 2**64 - 1, 3, 1 << 40, 5, 2**32 - 1, 7, 2**16 - 1, 9, -1)
    assert len(packed) == EVENT.itemsize == 56
    event = np.frombuffer(packed, EVENT)[0]
    assert int(event["start_ns"]) == 1 << 63
    assert int(event["duration_ns"]) == UNFINISHED_NS
    assert event["value"].tolist() == [3, 1 << 40, 5]
    assert (int(event["pid"]), int(event["tid"])) == (2**32 - 1, 7)
    assert (int(event["probe"]), int(event["cpu"]), int(event["stack"])) == (2**16 - 1, 9, NO_STACK)


@pytest.mark.parametrize("bit", range(56 * 8))
def test_one_bit_belongs_to_one_member(bit: int) -> None:
    data = bytearray(56)
    data[bit // 8] = 1 << (bit % 8)
    event = np.frombuffer(bytes(data), EVENT)[0]
    assert EVENT.names is not None
    changed = [name for name in EVENT.names if np.any(event[name])]
    expected = ["start_ns", "duration_ns", "value", "value", "value", None, None][min(bit // 64, 6)]
    if expected is None:
        expected = {40: "pid", 44: "tid", 48: "probe", 50: "cpu", 52: "stack"}[
            max(offset for offset in (40, 44, 48, 50, 52) if offset <= bit // 8)
        ]
    assert changed == [expected]


def test_a_ring_record_is_one_cache_line() -> None:
    assert RING_RECORD.itemsize == RECORD_BYTES
    assert RING_RECORD.fields is not None
    assert RING_RECORD.fields["event"][1] == 8


@pytest.mark.parametrize(("name", "size"), [("probe_counters", 72), ("loop_state", 40)])
def test_other_structs_have_the_size_of_the_compiler(name: str, size: int) -> None:
    assert struct_dtype(name).itemsize == size


def test_a_struct_that_is_not_declared_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        struct_dtype("nothing")


def test_the_sentinels_are_those_of_the_header() -> None:
    defined = dict(re.findall(r"#define (\w+)\s+(\S+)", header_text()))
    assert defined == {"UNFINISHED_NS": "(~0ULL)", "NO_STACK": "(-1)", "STATE_ON_CPU": "0x80000000U"}


def test_only_the_sentinel_is_unfinished() -> None:
    durations = np.array([0, 1, UNFINISHED_NS - 1, UNFINISHED_NS], np.uint64)
    assert mark_unfinished(durations).tolist() == [False, False, False, True]


class Ring:
    """A ring buffer as the kernel maps it: its data twice in a row."""

    def __init__(self) -> None:
        self.records = np.zeros(CAPACITY, RING_RECORD)
        self.consumer = 0
        self.producer = 0

    def produce(self, count: int, flag: int = 0) -> None:
        for _ in range(count):
            place = (self.producer // RECORD_BYTES) % CAPACITY
            self.records[place]["length"] = 56 | flag
            self.records[place]["event"]["start_ns"] = self.producer // RECORD_BYTES
            self.producer += RECORD_BYTES

    def commit(self, number: int) -> None:
        self.records[number % CAPACITY]["length"] = 56

    def read(self) -> list[int]:
        data: npt.NDArray[np.void] = np.concatenate([self.records, self.records])
        events, consumer = waiting_records(data, self.consumer, self.producer)
        self.consumer = consumer
        numbers: list[int] = events["start_ns"].tolist()
        return numbers


def test_an_empty_ring_has_no_records() -> None:
    ring = Ring()
    assert ring.read() == []
    assert ring.consumer == 0


def test_a_full_ring_is_read_at_once() -> None:
    ring = Ring()
    ring.produce(CAPACITY)
    assert ring.read() == list(range(CAPACITY))
    assert ring.consumer == ring.producer
    assert ring.read() == []


def test_records_are_read_in_order_across_the_end_of_the_ring() -> None:
    ring = Ring()
    seen = []
    for count in (5, 6, 7, 8, 1, 8, 3):
        ring.produce(count)
        seen += ring.read()
    assert seen == list(range(38))


def test_reading_stops_at_a_record_that_is_being_written_and_goes_on_later() -> None:
    ring = Ring()
    ring.produce(6)
    ring.read()
    ring.produce(2)
    ring.produce(1, int(BUSY_BIT))
    ring.produce(3)
    assert ring.read() == [6, 7]
    assert ring.read() == []
    ring.commit(8)
    assert ring.read() == [8, 9, 10, 11]


def test_discarded_records_are_skipped_and_their_room_given_back() -> None:
    ring = Ring()
    ring.produce(1)
    ring.produce(2, int(DISCARD_BIT))
    ring.produce(1)
    assert ring.read() == [0, 3]
    assert ring.consumer == ring.producer


def test_a_busy_record_hides_a_discarded_one_behind_it() -> None:
    ring = Ring()
    ring.produce(1, int(DISCARD_BIT))
    ring.produce(1, int(BUSY_BIT))
    ring.produce(1, int(DISCARD_BIT))
    assert ring.read() == []
    assert ring.consumer == RECORD_BYTES


@pytest.mark.parametrize("count", [1, 2, CAPACITY])
def test_what_was_read_is_a_copy(count: int) -> None:
    """The kernel writes over the room that was given back, while the reader still holds what it read."""
    ring = Ring()
    ring.produce(count)
    data: npt.NDArray[np.void] = np.concatenate([ring.records, ring.records])
    events, _ = waiting_records(data, 0, ring.producer)
    assert len(events) == count
    assert not np.shares_memory(events, data)
