"""Loaded BPF programs of any kind: sources joined, maps, ring buffer, counters, and letting go of it all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path

import numpy as np

from stallscope.tracer.capture.bpf import MappedArray
from stallscope.tracer.capture.loader import Loader
from stallscope.tracer.capture.probe_ids import MAX_PROBES
from stallscope.tracer.capture.ring import RingReader
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.layout import struct_dtype
from stallscope.tracer.manifest import ProbeCounters

U32 = np.dtype("<u4")
_C_BYTES = {"unsigned long long": 8, "unsigned int": 4, "int": 4, "unsigned short": 2, "unsigned char": 1}


class LoadedPrograms:
    """Loaded BPF programs with their maps, ring buffer and counters.

    ``close`` detaches everything; so does the end of the process, however it ends, because every
    attachment is a file descriptor of ours.
    """

    def __init__(
        self,
        text: str,
        flags: Sequence[str],
        programs: dict[str, str],
        maps: Sequence[str],
        *,
        ring_bytes: int,
        loader: Loader | None = None,
    ) -> None:
        """Compile and load; nothing is attached yet.

        Args:
            text: BPF C that begins with emit.bpf.c. flags: its compiler flags.
            programs: kind by function name; maps: names, besides those of emit.bpf.c.
            ring_bytes: size of the ring buffer, a power of two and a multiple of the page size.
            loader: one that was started earlier, to save its start.

        Raises:
            SurroundingsError: bcc is missing or cannot compile here.
        """
        cpus = _possible_cpus()
        sizes = {"RING_PAGES": ring_bytes // 4096, "MAX_PROBES": MAX_PROBES, "MAX_CPUS": cpus}
        flags = [*(f"-D{name}={size}" for name, size in sizes.items()), *flags]
        self._loaded = (loader or Loader()).load(text, flags, programs, ["events", "counters", *maps])
        self._attached: list[int] = []
        _check_layout(self._loaded.leaf_types)
        fds = self._loaded.maps
        self.ring = RingReader(fds["events"], ring_bytes)
        self._counters = MappedArray(fds["counters"], struct_dtype("probe_counters"), (cpus, MAX_PROBES))

    def detach(self, handle: int) -> None:
        """Let go of one attachment."""
        self._attached.remove(handle)
        os.close(handle)

    def detach_many(self, handles: Sequence[int]) -> None:
        """Let go of several attachments; the maps stay readable.

        The kernel waits tens of milliseconds for running probes at each one; side by side it waits once. What was
        let go of already is left out, so that another thread may call it.
        """
        mine = []
        for handle in handles:
            with contextlib.suppress(ValueError):
                self._attached.remove(handle)
                mine.append(handle)
        if mine:
            with ThreadPoolExecutor(max_workers=len(mine)) as pool:
                list(pool.map(os.close, mine))

    def detach_all(self) -> None:
        """Let go of every attachment; the maps stay readable."""
        self.detach_many(list(self._attached))

    def counters(self, probes: Iterable[int]) -> dict[int, ProbeCounters]:
        """Return the in-kernel counters of these probes, summed over CPUs."""
        totals: dict[int, ProbeCounters] = {}
        for probe in probes:
            values = self._counters.values[:, probe]
            totals[probe] = ProbeCounters(**{name: int(values[name].sum()) for name in values.dtype.names or ()})
        return totals

    def program(self, name: str) -> int:
        """Return the file descriptor of a program, which stays ours.

        Raises:
            SurroundingsError: the kernel refused it; says why.
        """
        if name in self._loaded.refused:
            raise SurroundingsError(f"the kernel refuses the program {name}: {self._loaded.refused[name]}")
        return self._loaded.programs[name]

    def has(self, name: str) -> bool:
        """Return whether a map was asked for."""
        return name in self._loaded.maps

    def map(self, name: str) -> int:
        """Return the file descriptor of a map that was asked for; it stays ours."""
        return self._loaded.maps[name]

    def close(self) -> None:
        """Detach everything and free the programs and maps."""
        self.detach_all()
        self.ring.close()
        self._counters.close()
        for fd in (*self._loaded.programs.values(), *self._loaded.maps.values()):
            os.close(fd)
        self._loaded.programs.clear()
        self._loaded.maps.clear()

    def _keep(self, handle: int) -> int:
        self._attached.append(handle)
        return handle


def _check_layout(leaf_types: Mapping[str, str]) -> None:
    """Compare the dtypes derived from event.h with what bcc's compiler made of the structs.

    Raises:
        SurroundingsError: they differ, which is a defect of ours.
    """
    for table, struct in (
        ("calls_in_progress", "event"),
        ("counters", "probe_counters"),
        ("loops", "loop_state"),
        ("sampled", "sampled_thread"),
        ("off_cpu", "stack_sample"),
        ("listeners", "watched_listener"),
        ("counted_requests", "counted_requests"),
    ):
        if table not in leaf_types:
            continue
        dtype = struct_dtype(struct)
        derived = [(name, dtype[name].itemsize) for name in dtype.names or ()]
        compiled = [
            (member[0], _C_BYTES.get(member[1], 0) * (member[2][0] if len(member) > 2 else 1))
            for member in json.loads(leaf_types[table])[1]
            if not member[0].startswith("__pad")
        ]
        if compiled != derived:
            raise SurroundingsError(f"struct {struct}: compiled {compiled}, declared {derived}; please report this")


def join_sources(names: Sequence[str], last_lines: Sequence[str] = ()) -> str:
    """Return one translation unit: emit.bpf.c, the named files, and the given lines.

    bcc rewrites map accesses only in its main text, not in included files.
    """
    parts = ["#include <uapi/linux/ptrace.h>", '#include "event.h"']
    for name in ("emit.bpf.c", *names):
        parts += [f'#line 1 "{name}"', files("stallscope.probes").joinpath(name).read_text(encoding="utf-8")]
    return "\n".join([*parts, *last_lines]) + "\n"


def _possible_cpus() -> int:
    """Return how many per-CPU values the kernel keeps: the highest possible CPU number plus one."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii")
    return int(text.strip().replace("-", ",").split(",")[-1]) + 1
