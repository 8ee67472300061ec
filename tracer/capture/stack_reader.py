"""Makes rows and named stacks of raw samples, in a thread beside the recorder's loop.

The ring of samples is the only buffer: what the thread has not read when it is full is lost and counted, so
memory is bounded and the loop that reads the other rings never waits for an unwinder. The thread keeps the usual
priority, because a thread that sleeps with Python's interpreter lock in hand would stop the recorder.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stallscope.probes.catalogue import Field
from stallscope.tracer.capture.kernel_symbols import kernel_symbols
from stallscope.tracer.capture.probe_ids import STACK_PROBE
from stallscope.tracer.capture.process_code import open_unwinder
from stallscope.tracer.capture.return_addresses import CopiedStacks, restored
from stallscope.tracer.capture.stack_ring import SAMPLE
from stallscope.tracer.capture.stack_sampler import StackOptions, StackSampler
from stallscope.tracer.errors import StallscopeError, TargetError
from stallscope.tracer.layout import EVENT
from stallscope.tracer.manifest import STACK, ProbeInfo
from stallscope.tracer.recording import joined_events
from stallscope.tracer.stack_table import KERNEL, NOT_UNWOUND, StackFrame, StackTable
from stallscope.tracer.unwind.code import CodeImage
from stallscope.tracer.unwind.registers import RIP
from stallscope.tracer.unwind.unwinder import Ended, Unwinder, UnwoundStacks

STACK_FIELDS = (Field("weight_ns", "ns", 0), Field("state", "", 1, bits=32))
"""``weight_ns`` is what a sample stands for; ``state`` the task's when it left the CPU, or STATE_ON_CPU."""

_READ_S = 0.05
_BATCH = 128
"""Samples unwound at a time: 3 MB."""

_REMEMBERED_NS = 5_000_000_000
"""For how long the code of a process that has ended is kept: its last samples may wait in the ring."""

_REMAP_NS = 1_000_000_000
"""A process's mappings are read again at most this often, when a stack ends in code that was not mapped before."""

_BREAKPOINT = "asm_exc_int3"
"""The kernel's entry from a breakpoint, which is what an entry probe is."""

_SCHEDULE = ("schedule", "preempt_schedule_irq", "preempt_schedule_common", "preempt_schedule_notrace", "__schedule")
"""Below these on the kernel's stack is only how a task leaves the CPU, and our own program."""


def stack_probe(options: StackOptions) -> ProbeInfo:
    """Return the entry of the probe list for the samples."""
    rate = round(1e9 / options.period_ns)
    when = "always" if options.always else "in stalls"
    return ProbeInfo(
        STACK_PROBE, "stack sample", STACK, f"CPU clock at {rate} Hz and sched_switch, {when}", STACK_FIELDS
    )


class StackReader:
    """Reads a sampler's ring until it is closed."""

    def __init__(self, sampler: StackSampler) -> None:
        """Start the thread."""
        self.table = StackTable()
        self._sampler = sampler
        self._code: dict[int, Unwinder] = {}
        self._images: dict[tuple[str, str], CodeImage] = {}
        self._mapped_ns: dict[int, int] = {}
        self._frames: dict[tuple[int, int, bool], StackFrame] = {}
        self._kernel: dict[int, tuple[StackFrame, ...]] = {}
        self._rows: list[npt.NDArray[np.void]] = []
        self._away = np.zeros(0, SAMPLE)
        self._wanted: list[int] = []
        self._gone: dict[int, int] = {}
        self._notes: list[str] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stacks", daemon=True)
        self._thread.start()

    def add(self, pid: int) -> None:
        """Read this process's code before it is needed, and while the process is there."""
        with self._lock:
            self._wanted.append(pid)
            self._gone.pop(pid, None)

    def remove(self, pid: int) -> None:
        """Forget a process's code, once its last samples were read."""
        with self._lock:
            self._gone[pid] = time.monotonic_ns() + _REMEMBERED_NS

    def renew(self) -> None:
        """Begin a new table: no row is wanted any more that names a stack of the present one."""
        with self._lock:
            if self.table.stacks:
                self.table = StackTable()

    def take(self) -> tuple[npt.NDArray[np.void], list[str]]:
        """Return the rows (dtype ``EVENT``) made since the last time, and notes on what cannot be unwound."""
        with self._lock:
            rows, self._rows = self._rows, []
            notes, self._notes = self._notes, []
        return joined_events(rows), notes

    def stop(self, now_ns: int) -> None:
        """Detach the sampler, keeping the stacks of threads that are off the CPU at this moment.

        Args:
            now_ns: CLOCK_MONOTONIC; no sample is later.
        """
        self._away = self._sampler.away(now_ns)
        self._sampler.detach()

    def finish(self) -> tuple[npt.NDArray[np.void], list[str]]:
        """End the thread after ``stop``; returns what :meth:`take` returns, of all that was left."""
        self.close()
        while self._read():
            pass
        self._make_rows(self._away)
        return self.take()

    def close(self) -> None:
        """End the thread; may be called more than once."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._open_wanted()
            self._forget_gone()
            if not self._read():
                self._stopped.wait(_READ_S)

    def _read(self) -> bool:
        """Make rows of a batch of samples; returns whether there were any."""
        samples = self._sampler.ring.read(_BATCH)
        self._make_rows(samples)
        return bool(len(samples))

    def _make_rows(self, samples: npt.NDArray[np.void]) -> None:
        for pid in np.unique(samples["pid"]):
            mine = samples[samples["pid"] == pid]
            rows = np.zeros(len(mine), EVENT)
            for name in ("duration_ns", "pid", "tid", "cpu"):
                rows[name] = mine[name]
            rows["start_ns"], rows["probe"] = mine["time_ns"], STACK_PROBE
            rows["value"][:, 0], rows["value"][:, 1] = mine["weight_ns"], mine["state"]
            stacks = self._stacks(int(pid), mine)
            with self._lock:
                rows["stack"] = [self.table.add(stack) for stack in stacks]
                self._rows.append(rows)

    def _stacks(self, pid: int, samples: npt.NDArray[np.void]) -> list[list[StackFrame]]:
        """Return the frames of each sample, outermost first, the kernel's last."""
        kernel = [self._kernel_frames(int(stack_id)) for stack_id in samples["kernel_stack"]]
        unwinder = self._unwinder(pid)
        if unwinder is None:
            return [[StackFrame(NOT_UNWOUND, ""), *frames] for frames in kernel]
        copied = restored(samples)
        trapped = np.array([bool(frames) and frames[0].name == _BREAKPOINT for frames in kernel], np.bool_)
        unwound = _unwind(unwinder, copied, trapped)
        if (unwound.ended == Ended.NOT_CODE).any() and self._map_again(pid):
            unwinder = self._code[pid]
            unwound = _unwind(unwinder, copied, trapped)
        self._name(pid, unwinder, unwound.addresses, unwound.is_exact)
        result = []
        for row, depth in enumerate(unwound.depth.tolist()):
            addresses, exact = unwound.addresses[row, :depth].tolist(), unwound.is_exact[row, :depth].tolist()
            user = [self._frames[pid, address, is_exact] for address, is_exact in zip(addresses, exact, strict=True)]
            begins = [] if unwound.ended[row] == Ended.REACHED_END else [StackFrame(NOT_UNWOUND, "")]
            result.append([*begins, *reversed(user), *kernel[row]])
        return result

    def _name(
        self, pid: int, unwinder: Unwinder, addresses: npt.NDArray[np.uint64], is_exact: npt.NDArray[np.bool_]
    ) -> None:
        """Name the addresses that are new."""
        seen = addresses != 0
        pairs = np.unique(np.column_stack([addresses[seen], is_exact[seen].astype(np.uint64)]), axis=0)
        new = [(int(address), bool(exact)) for address, exact in pairs if (pid, int(address), bool(exact))
               not in self._frames]  # fmt: skip
        if not new:
            return
        exact = np.array([flag for _, flag in new], np.bool_)
        frames = unwinder.frames(np.array([address for address, _ in new], np.uint64), exact)
        for (address, flag), frame in zip(new, frames, strict=True):
            offset = 0 if frame.function else frame.offset
            self._frames[pid, address, flag] = StackFrame(frame.function.partition("@")[0], frame.file, offset)

    def _kernel_frames(self, stack_id: int) -> tuple[StackFrame, ...]:
        """Return the frames of a kernel stack, outermost first; an id means the same stack for ever."""
        if stack_id < 0:
            return ()
        if stack_id not in self._kernel:
            names = [kernel_symbols().at(address) for address in self._sampler.kernel_frames(stack_id)]
            leaves = [place for place, name in enumerate(names) if name in _SCHEDULE]
            names = names[leaves[-1] :] if leaves else [name for name in names if not name.startswith("bpf_")]
            self._kernel[stack_id] = tuple(StackFrame(name, KERNEL) for name in reversed(names) if name)
        return self._kernel[stack_id]

    def _unwinder(self, pid: int) -> Unwinder | None:
        if pid not in self._code:
            self._open(pid)
        return self._code.get(pid)

    def _open_wanted(self) -> None:
        with self._lock:
            wanted, self._wanted = self._wanted, []
        for pid in wanted:
            self._open(pid)

    def _forget_gone(self) -> None:
        now_ns = time.monotonic_ns()
        with self._lock:
            over = [pid for pid, until_ns in self._gone.items() if until_ns < now_ns]
            for pid in over:
                del self._gone[pid]
        if not over:
            return
        for pid in over:
            self._code.pop(pid, None)
            self._mapped_ns.pop(pid, None)
        self._frames = {key: frame for key, frame in self._frames.items() if key[0] not in over}
        if not self._code:
            self._images.clear()  # of binaries that were replaced, too

    def _open(self, pid: int) -> None:
        self._mapped_ns[pid] = time.monotonic_ns()
        try:
            unwinder, failures = open_unwinder(pid, self._images)
        except TargetError:
            return
        except StallscopeError as error:
            self._note([str(error)])
            return
        self._frames = {key: frame for key, frame in self._frames.items() if key[0] != pid}
        self._code[pid] = unwinder
        self._note(failures)

    def _map_again(self, pid: int) -> bool:
        """Read a process's mappings again, unless that was a moment ago; returns whether it was done."""
        if time.monotonic_ns() - self._mapped_ns.get(pid, 0) < _REMAP_NS:
            return False
        self._open(pid)
        return True

    def _note(self, lines: Sequence[str]) -> None:
        if lines:
            with self._lock:
                self._notes += [f"stacks are not unwound beyond it: {line}" for line in lines]


def _unwind(unwinder: Unwinder, copied: CopiedStacks, trapped: npt.NDArray[np.bool_]) -> UnwoundStacks:
    """Unwind stacks, of which some threads are ``trapped`` in a breakpoint.

    A breakpoint leaves the program counter behind its one byte, and the kernel sets it back a moment later. Where a
    probed function begins with an instruction of one byte (``push %rbp``), nothing tells one that is still to be
    executed from one that was, but that its stack leads nowhere.
    """
    unwound = unwinder.unwind(copied.registers, copied.stacks, copied.lengths)
    rows = np.flatnonzero(trapped & (unwound.ended != Ended.REACHED_END))
    if len(rows):
        registers = copied.registers[rows]
        registers[:, RIP] -= np.uint64(1)
        again = unwinder.unwind(registers, copied.stacks[rows], copied.lengths[rows])
        better = again.ended == Ended.REACHED_END
        for name in ("addresses", "depth", "ended", "is_exact"):
            getattr(unwound, name)[rows[better]] = getattr(again, name)[better]
    return unwound
