"""The wire format as numpy dtypes, derived from ``probes/event.h``.

The C header is the only declaration of the record; this module reads its text. Nothing here touches
bcc, so decoding is tested without a kernel.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt

_STRUCT = re.compile(r"struct\s+(\w+)\s*\{(.*?)\n\};", re.DOTALL)
_MEMBER = re.compile(r"^\s*(u64|s64|u32|s32|u16|s16|u8|s8)\s+(\w+)(?:\[(\d+)\])?;", re.MULTILINE)
_NUMPY_TYPE = {
    "u64": "<u8",
    "s64": "<i8",
    "u32": "<u4",
    "s32": "<i4",
    "u16": "<u2",
    "s16": "<i2",
    "u8": "u1",
    "s8": "i1",
}

UNFINISHED_NS = 2**64 - 1
"""``duration_ns`` of a span that had not ended when it was recorded (``UNFINISHED_NS`` in event.h)."""

NO_STACK = -1
"""``stack`` of a record without one (``NO_STACK`` in event.h)."""

STATE_ON_CPU = 0x8000_0000
"""``state`` of a stack sample that was taken on the CPU (``STATE_ON_CPU`` in event.h)."""

MAX_SPAN_NS = 2**62
"""Longest duration a finished span can have; anything above marks a damaged record or UNFINISHED_NS."""


@cache
def header_text() -> str:
    """Return the text of ``probes/event.h``."""
    return files("stallscope.probes").joinpath("event.h").read_text(encoding="utf-8")


@cache
def struct_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of one struct of ``event.h``, aligned as the C compiler aligns it.

    Raises:
        KeyError: the header has no such struct.
    """
    for match in _STRUCT.finditer(header_text()):
        if match[1] == name:
            members: list[tuple[str, str] | tuple[str, str, tuple[int]]] = [
                (member, _NUMPY_TYPE[kind], (int(count),)) if count else (member, _NUMPY_TYPE[kind])
                for kind, member, count in _MEMBER.findall(match[2])
            ]
            return np.dtype(members, align=True)
    raise KeyError(name)


EVENT = struct_dtype("event")
"""One record: ``start_ns, duration_ns, value[3], pid, tid, probe, cpu, stack``; 56 bytes."""

EVENT_BYTES = EVENT.itemsize

RING_HEADER_BYTES = 8
"""Size of the header in front of each ring buffer record: Linux include/uapi/linux/bpf.h, BPF_RINGBUF_HDR_SZ."""

RING_RECORD = np.dtype([("length", "<u4"), ("page_offset", "<u4"), ("event", EVENT)])
"""One record as it lies in the ring buffer's pages; 64 bytes, so records never straddle unevenly."""

BUSY_BIT = np.uint32(1 << 31)
DISCARD_BIT = np.uint32(1 << 30)


def waiting_records(data: npt.NDArray[np.void], consumer: int, producer: int) -> tuple[npt.NDArray[np.void], int]:
    """Return a copy of the committed records and the new consumer position.

    Args:
        data: the ring's pages mapped twice in a row, as an array of ``RING_RECORD``; its length is twice
            the ring's capacity in records, so any run of waiting records is contiguous.
        consumer: consumer position, bytes since the ring was made.
        producer: producer position, bytes since the ring was made.

    Returns:
        The ``event`` fields (dtype ``EVENT``) of the records up to the first one still being written, without
        those discarded, and the consumer position after them.
    """
    capacity = len(data) // 2
    first = (consumer // RING_RECORD.itemsize) % capacity
    run = data[first : first + (producer - consumer) // RING_RECORD.itemsize]
    length = run["length"]
    busy = np.flatnonzero(length & BUSY_BIT)
    if busy.size:
        run = run[: busy[0]]
        length = run["length"]
    # copied as words: field by field it takes four times as long; a single record is contiguous without a copy
    words = run.view("<u8").reshape(-1, RING_RECORD.itemsize // 8)
    events = words[:, RING_HEADER_BYTES // 8 :].copy().view(EVENT).reshape(-1)
    discarded = (length & DISCARD_BIT) != 0
    if discarded.any():
        events = events[~discarded]
    return events, consumer + len(run) * RING_RECORD.itemsize


def mark_unfinished(duration_ns: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return which of the durations stand for spans that had not ended; same shape."""
    return duration_ns == np.uint64(UNFINISHED_NS)
