"""Reads a BPF ring buffer in bulk: the kernel's pages mapped, all waiting records as one numpy array.

Nobody is woken for a record; the caller polls. Linux kernel/bpf/ringbuf.c: the consumer page may be
written by user space, the producer page is followed by the data pages, mapped twice so that a record
never wraps.
"""

from __future__ import annotations

import ctypes
import gc
import mmap

import numpy as np
import numpy.typing as npt

from stallscope.tracer.layout import RING_RECORD, waiting_records

# glibc malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 << 20


class RingReader:
    """One ring buffer, one reader."""

    def __init__(self, map_fd: int, ring_bytes: int) -> None:
        """Map the pages of the ring buffer ``map_fd``, whose data area is ``ring_bytes`` long.

        Raises:
            OSError: the kernel refuses the mapping.
        """
        _keep_freed_memory()
        page = mmap.PAGESIZE
        self._consumer_map = mmap.mmap(map_fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer_map = mmap.mmap(map_fd, page + 2 * ring_bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._consumer = np.frombuffer(self._consumer_map, "<u8", 1)
        self._producer = np.frombuffer(self._producer_map, "<u8", 1)
        self._data = np.frombuffer(self._producer_map, RING_RECORD, 2 * ring_bytes // RING_RECORD.itemsize, page)

    @property
    def waiting_bytes(self) -> int:
        """Return how much of the ring's data area is in use."""
        return int(self._producer[0]) - int(self._consumer[0])

    def read(self) -> npt.NDArray[np.void]:
        """Return all committed records (dtype ``EVENT``, a copy) and give their room back to the kernel."""
        # x86-64 loads are ordered: the position read here is never newer than the records behind it
        events, consumer = waiting_records(self._data, int(self._consumer[0]), int(self._producer[0]))
        self._consumer[0] = consumer
        return events

    def close(self) -> None:
        """Unmap the pages."""
        del self._consumer, self._producer, self._data
        self._consumer_map.close()
        self._producer_map.close()


def give_memory_back() -> None:
    """Return freed memory to the kernel after all: for those who run for weeks, after something large."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def _keep_freed_memory() -> None:
    """Have malloc use freed memory again instead of returning it to the kernel.

    Batches of some megabytes come and go 20 times a second; with fresh pages for each one, page faults
    would be a quarter of the reader's cost.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
