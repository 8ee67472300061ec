"""One compiled set of BPF programs: joins the sources, loads, attaches, counts, and lets go of it all."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stallscope.probes.catalogue import Decoder
from stallscope.tracer.capture.bcc_library import compile_program, load_bcc
from stallscope.tracer.capture.ring import RingReader
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.layout import EVENT, NO_STACK, UNFINISHED_NS, struct_dtype
from stallscope.tracer.manifest import ProbeCounters

ITERATION_PROBE = 0
ACCEPT_PROBE = 1
QUEUE_PROBE = 2
COUNTER_PROBE = 3
FIRST_CALL_PROBE = 4
MAX_PROBES = 256
"""Probe ids 0 to 3 are fixed; functions follow in the order in which they were added."""

_SYSTEM_CALLS = {
    # Linux arch/x86/entry/syscalls/syscall_64.tbl
    "x86_64": {"epoll_wait": 232, "epoll_pwait": 281, "epoll_pwait2": 441, "accept": 43, "accept4": 288},
}
_MAX_LOOPS = 256
_MAX_CALLS_IN_PROGRESS = 8192


@dataclass(frozen=True)
class CallProbe:
    """A function to compile programs for: its id in the probe list and how to read its arguments."""

    probe: int
    decoder: Decoder


class Program:
    """Compiled and loaded BPF programs with their maps.

    ``close`` detaches everything; so does the end of the process, however it ends, because every
    attachment is a file descriptor of ours.
    """

    def __init__(
        self, calls: Sequence[CallProbe], *, ring_bytes: int, min_duration_ns: int, iteration_min_ns: int, loop: bool = True
    ) -> None:
        """Compile the probes; nothing is attached yet.

        Args:
            calls: functions to compile an entry and a return program for.
            ring_bytes: size of the ring buffer, a power of two and a multiple of the page size.
            min_duration_ns: shorter calls are counted and not sent.
            iteration_min_ns: shorter event loop iterations are counted and not sent.
            loop: compile the event loop's programs too.

        Raises:
            SurroundingsError: bcc is missing or cannot compile here, or the machine is not x86-64.
        """
        numbers = _SYSTEM_CALLS.get(platform.machine())
        if numbers is None:
            raise SurroundingsError(f"stallscope traces x86-64 only; this machine is {platform.machine()}")
        flags = [
            f"-DRING_PAGES={ring_bytes // 4096}",
            f"-DMAX_PROBES={MAX_PROBES}",
            f"-DMAX_CALLS_IN_PROGRESS={_MAX_CALLS_IN_PROGRESS}",
            f"-DMIN_DURATION_NS={min_duration_ns}ULL",
            f"-DITERATION_MIN_NS={iteration_min_ns}ULL",
            f"-DMAX_LOOPS={_MAX_LOOPS}",
            f"-DPROBE_ITERATION={ITERATION_PROBE}",
            f"-DPROBE_ACCEPT={ACCEPT_PROBE}",
            *(f"-DSYS_{name}={number}" for name, number in numbers.items()),
        ]
        self._bpf = compile_program(_join_sources(calls, loop=loop), flags)
        self._lib = load_bcc().libbcc.lib
        self._attached: list[int] = []
        self._loop = loop
        self._check_layout()
        self.ring = RingReader(self._bpf[b"events"].map_fd, ring_bytes)
        self._counters_fd: int = self._bpf[b"counters"].map_fd
        self._possible_cpus = _possible_cpus()

    def attach_call(self, probe: int, path: str, offset: int, pid: int) -> tuple[int, int]:
        """Attach entry and return of a function in one process; returns handles for ``detach``.

        The entry goes first: a call that is under way is then simply not seen.

        Args:
            probe: id given in ``calls``.
            path: file that holds the function; offset: its place in that file, bytes.
            pid: the process to probe (all its threads).

        Raises:
            SurroundingsError: the kernel refuses.
        """
        entry = self._attach_uprobe(f"call_enter_{probe}", path, offset, pid, is_return=False)
        try:
            return entry, self._attach_uprobe(f"call_return_{probe}", path, offset, pid, is_return=True)
        except SurroundingsError:
            self.detach(entry)
            raise

    def attach_loop(self) -> None:
        """Attach the event loop's raw tracepoints (system-wide; they filter by thread).

        Raises:
            SurroundingsError: the kernel refuses.
        """
        for tracepoint in ("sys_enter", "sys_exit"):
            function = self._load(f"loop_{tracepoint}", load_bcc().BPF.RAW_TRACEPOINT)
            handle = self._lib.bpf_attach_raw_tracepoint(function.fd, tracepoint.encode())
            if handle < 0:
                raise SurroundingsError(
                    f"cannot attach raw tracepoint {tracepoint}: {os.strerror(ctypes.get_errno())}; it needs CAP_PERFMON or root"
                )
            self._attached.append(handle)

    def watch_loop(self, tid: int) -> None:
        """Follow the event loop that this thread runs."""
        table = self._bpf[b"loops"]
        table[table.Key(tid)] = table.Leaf()

    def unwatch_loop(self, tid: int) -> None:
        """Stop following the thread's event loop; unknown threads are ignored."""
        table = self._bpf[b"loops"]
        if table.Key(tid) in table:
            del table[table.Key(tid)]

    def detach(self, handle: int) -> None:
        """Let go of one attachment."""
        self._attached.remove(handle)
        os.close(handle)

    def detach_all(self) -> None:
        """Let go of every attachment; the maps stay readable."""
        for handle in list(self._attached):
            self.detach(handle)

    def counters(self, probes: Sequence[int]) -> dict[int, ProbeCounters]:
        """Return the in-kernel counters of these probes, summed over CPUs."""
        dtype = struct_dtype("probe_counters")
        values = np.zeros(self._possible_cpus, dtype)
        totals: dict[int, ProbeCounters] = {}
        for probe in probes:
            key = ctypes.c_uint32(probe)
            self._lib.bpf_lookup_elem(self._counters_fd, ctypes.byref(key), values.ctypes.data_as(ctypes.c_void_p))
            assert dtype.names is not None
            totals[probe] = ProbeCounters(**{name: int(values[name].sum()) for name in dtype.names})
        return totals

    def unfinished(self) -> npt.NDArray[np.void]:
        """Return the calls and iterations that have begun and not ended (dtype ``EVENT``).

        ``duration_ns`` is ``UNFINISHED_NS``. Entries that longjmp left behind are among them; whoever
        has the finished spans can tell (the thread moved on).
        """
        calls = [bytes(value) for value in self._bpf[b"calls_in_progress"].values()]
        events = np.frombuffer(b"".join(calls), EVENT).copy()
        iterations = np.zeros(0, EVENT)
        if self._loop:
            loops = [(key.value, value) for key, value in self._bpf[b"loops"].items() if value.wait_end_ns]
            iterations = np.zeros(len(loops), EVENT)
            for row, (tid, state) in zip(iterations, loops, strict=True):
                row["start_ns"], row["tid"], row["pid"] = state.wait_end_ns, tid, tid
                row["probe"], row["value"] = ITERATION_PROBE, (state.ready, state.accepted, 0)
        unfinished = np.concatenate([events, iterations])
        unfinished["duration_ns"] = UNFINISHED_NS
        unfinished["stack"] = NO_STACK
        return unfinished

    def close(self) -> None:
        """Detach everything and free the programs and maps."""
        self.detach_all()
        self.ring.close()
        self._bpf.cleanup()

    def _load(self, name: str, kind: int) -> Any:
        try:
            return self._bpf.load_func(name.encode(), kind)
        except Exception as error:
            raise SurroundingsError(f"the kernel refuses the program {name}: {error}") from error

    def _attach_uprobe(self, function: str, path: str, offset: int, pid: int, *, is_return: bool) -> int:
        loaded = self._load(function, load_bcc().BPF.KPROBE)
        event = f"stallscope_{function}_{pid}".encode()
        # the last argument (reference counter offset) is missing from bcc 0.26's own declaration
        handle: int = self._lib.bpf_attach_uprobe(
            loaded.fd, int(is_return), event, path.encode(), offset, pid, ctypes.c_uint32(0)
        )
        if handle < 0:
            reason = os.strerror(ctypes.get_errno()) if ctypes.get_errno() else "refused by the kernel"
            raise SurroundingsError(f"cannot attach a uprobe at offset {offset:#x} of {path} in process {pid}: {reason}")
        self._attached.append(handle)
        return handle

    def _check_layout(self) -> None:
        """Compare the dtype derived from event.h with what the compiler made of the struct."""
        leaf = self._bpf[b"calls_in_progress"].Leaf
        assert EVENT.names is not None
        compiled = {name: getattr(leaf, name).offset for name, *_ in leaf._fields_ if not name.startswith("__pad")}
        derived = {name: EVENT.fields[name][1] for name in EVENT.names} if EVENT.fields else {}
        if compiled != derived or ctypes.sizeof(leaf) != EVENT.itemsize:
            raise SurroundingsError(f"struct event differs: compiled {compiled}, read {derived}; report this as a bug")


def _join_sources(calls: Sequence[CallProbe], *, loop: bool) -> str:
    """Return one translation unit; bcc rewrites map accesses only in its main text, not in included files."""
    names = ["emit.bpf.c", "calls.bpf.c", *(["loop.bpf.c"] if loop else [])]
    parts = ["#include <uapi/linux/ptrace.h>", '#include "event.h"']
    for name in names:
        parts += [f'#line 1 "{name}"', files("stallscope.probes").joinpath(name).read_text(encoding="utf-8")]
    parts.append('#line 1 "calls"')
    for call in calls:
        arguments = ", ".join(str(parameter) for parameter in call.decoder.params)
        parts.append(f"CALL_ENTER({call.probe}, DECODE_{call.decoder.kind}({arguments}))")
        parts.append(f"CALL_RETURN({call.probe})")
    return "\n".join(parts) + "\n"


def _possible_cpus() -> int:
    """Return how many per-CPU values the kernel keeps: the highest possible CPU number plus one."""
    text = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii")
    return int(text.strip().replace("-", ",").split(",")[-1]) + 1
