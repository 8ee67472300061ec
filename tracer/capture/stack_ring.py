"""The ring buffer of stack samples: 25 KB a record, read in bulk as one array.

Like :mod:`ring`, for records of one other size: they do not fit its pages evenly, but since the data pages are
mapped twice in a row, every run of waiting records is contiguous.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from stallscope.tracer.layout import BUSY_BIT, DISCARD_BIT, RING_HEADER_BYTES, struct_dtype

SAMPLE = struct_dtype("stack_sample")
"""One sample (``struct stack_sample`` in event.h)."""

_RECORD = np.dtype(
    {
        "names": ["length", "sample"],
        "formats": ["<u4", SAMPLE],
        "offsets": [0, RING_HEADER_BYTES],
        "itemsize": RING_HEADER_BYTES + -(-SAMPLE.itemsize // 8) * 8,
    }
)


class StackRing:
    """One ring buffer of samples, one reader."""

    def __init__(self, map_fd: int, ring_bytes: int) -> None:
        """Map the pages of the ring buffer ``map_fd``, whose data area is ``ring_bytes`` long.

        Raises:
            OSError: the kernel refuses the mapping.
        """
        page = mmap.PAGESIZE
        self._ring_bytes = ring_bytes
        self._consumer_map = mmap.mmap(map_fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer_map = mmap.mmap(map_fd, page + 2 * ring_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumer = np.frombuffer(self._consumer_map, "<u8", 1)
        self._producer = np.frombuffer(self._producer_map, "<u8", 1)
        self._data = np.frombuffer(self._producer_map, np.uint8, 2 * ring_bytes, page)

    def read(self, limit: int) -> npt.NDArray[np.void]:
        """Return up to ``limit`` committed samples (dtype ``SAMPLE``, a copy) and give their room back."""
        consumer = int(self._consumer[0])
        count = min((int(self._producer[0]) - consumer) // _RECORD.itemsize, limit)
        begin = consumer % self._ring_bytes
        run = self._data[begin : begin + count * _RECORD.itemsize].view(_RECORD)
        busy = np.flatnonzero(run["length"] & BUSY_BIT)
        run = run[: busy[0]] if busy.size else run
        samples = run["sample"][(run["length"] & DISCARD_BIT) == 0]
        self._consumer[0] = consumer + len(run) * _RECORD.itemsize
        return samples

    def close(self) -> None:
        """Unmap the pages."""
        del self._consumer, self._producer, self._data
        self._consumer_map.close()
        self._producer_map.close()
