"""Samples the stacks of threads that run event loops: loaded with the loop's programs, attached by a few calls.

What comes out are registers and raw stacks; :mod:`stack_reader` makes frames of them.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.tracer.capture.asleep import sleeping_sample
from stallscope.tracer.capture.bpf import BpfMap, attach_cpu_clock, attach_raw_tracepoint
from stallscope.tracer.capture.btf import kernel_types
from stallscope.tracer.capture.loaded_programs import U32
from stallscope.tracer.capture.loader import PERF_EVENT, RAW_TRACEPOINT
from stallscope.tracer.capture.probe_ids import STACK_PROBE
from stallscope.tracer.capture.program import MoreSources, Program
from stallscope.tracer.capture.stack_ring import SAMPLE, StackRing
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.layout import struct_dtype
from stallscope.tracer.manifest import ProbeCounters

RING_BYTES = 8 << 20
"""Room for 330 samples: a third of a second at the highest rate."""

MAX_SAMPLED = 64
"""Threads sampled at a time; each has 25 KB of kernel memory for the stack it leaves the CPU with."""

_MAX_KERNEL_STACKS = 8192
_KERNEL_FRAMES = 64
_ASLEEP_NS = 1_000_000
"""A sleep in an iteration is worth a stack from here on, even where the iteration is no stall yet."""

_MEMBERS = {
    "TASK_PID": "task_struct.pid",
    "TASK_STATE": "task_struct.__state",
    "TASK_MM": "task_struct.mm",
    "TASK_UTASK": "task_struct.utask",
    "UTASK_VADDR": "uprobe_task.vaddr",
    "UTASK_RETURN_INSTANCES": "uprobe_task.return_instances",
    "RETURN_INSTANCE_STACK": "return_instance.stack",
    "RETURN_INSTANCE_ORIG_RET_VADDR": "return_instance.orig_ret_vaddr",
    "RETURN_INSTANCE_NEXT": "return_instance.next",
    "MM_XOL_AREA": "mm_struct.uprobes_state.xol_area",
    "XOL_AREA_VADDR": "xol_area.vaddr",
}
"""What the program reads of the kernel's structs, by the macro it has for the offset. ``__state`` is ``state`` before
Linux commit 2f064a59a11f, v5.14, but the helper for user registers came only with v5.15."""

_SAMPLED = struct_dtype("sampled_thread")
_KERNEL_STACK = np.dtype([("address", "<u8", (_KERNEL_FRAMES,))])
_ON_CPU, _SWITCHED = "stack_on_cpu", "stack_switched"


@dataclass(frozen=True)
class StackOptions:
    """When to sample stacks.

    Attributes:
        period_ns: of the samples on the CPU, in the thread's CPU time.
        always: also outside of stalls.
        on_demand: loaded with the rest, but attached to a process only when :meth:`StackCapture.add` asks for it.
    """

    period_ns: int
    always: bool
    on_demand: bool = False


def stack_sources() -> MoreSources:
    """Return what the event loop's programs are to be compiled with.

    Raises:
        SurroundingsError: this kernel has no type information.
    """
    offsets = kernel_types().offsets(_MEMBERS.values())
    return MoreSources(
        names=("stacks.bpf.c",),
        flags=(
            f"-DPROBE_STACK={STACK_PROBE}",
            f"-DSTACK_RING_PAGES={RING_BYTES // 4096}",
            f"-DMAX_KERNEL_STACKS={_MAX_KERNEL_STACKS}",
            f"-DMAX_SAMPLED={MAX_SAMPLED}",
            *(f"-D{name}={offsets[path]}" for name, path in _MEMBERS.items()),
        ),
        programs={_ON_CPU: PERF_EVENT, _SWITCHED: RAW_TRACEPOINT},
        maps=("stack_samples", "kernel_stacks", "sampled", "off_cpu"),
    )


class StackSampler:
    """The sampling programs of a compiled set, and the threads they are attached to.

    Nothing runs until a thread is added. Adding one is three map updates and a perf event; the first one attaches
    sched_switch too, and the last one to go detaches it.
    """

    def __init__(self, program: Program) -> None:
        """Take the programs from a set that was compiled with :func:`stack_sources`.

        Raises:
            SurroundingsError: the kernel refused one of them.
        """
        self._on_cpu = program.program(_ON_CPU)
        self._switched = program.program(_SWITCHED)
        self._program = program
        self._sampled = BpfMap(program.map("sampled"), U32, _SAMPLED)
        self._off_cpu = BpfMap(program.map("off_cpu"), U32, SAMPLE)
        self._kernel_stacks = BpfMap(program.map("kernel_stacks"), U32, _KERNEL_STACK)
        self.ring = StackRing(program.map("stack_samples"), RING_BYTES)
        self._clocks: dict[int, int] = {}
        self._switch = -1

    def add(self, tid: int, options: StackOptions, stall_ns: int) -> None:
        """Sample the main thread of a process from now on; if it sleeps, what it sleeps in counts from now on.

        Raises:
            SurroundingsError: the thread is gone, too many are sampled, or the kernel refuses.
        """
        thread = np.zeros(1, _SAMPLED)
        thread["after_ns"] = 0 if options.always else max(stall_ns, 1)
        thread["asleep_ns"], thread["period_ns"] = _ASLEEP_NS, options.period_ns
        try:
            self._off_cpu.update(tid, np.zeros(1, SAMPLE)[0])
            self._sampled.update(tid, thread[0])
        except OSError as error:
            raise SurroundingsError(
                f"the stacks of thread {tid} are not sampled: {MAX_SAMPLED} threads are already"
            ) from error
        try:
            if self._switch < 0:
                self._switch = attach_raw_tracepoint(self._switched, "sched_switch")
            self._clocks[tid] = attach_cpu_clock(self._on_cpu, tid, options.period_ns)
        except SurroundingsError:
            self.remove(tid)
            raise
        asleep = sleeping_sample(tid, tid)
        if asleep is not None:
            # if it wakes meanwhile, the next time it leaves the CPU overwrites this
            self._off_cpu.update(tid, asleep[0])

    def remove(self, tid: int) -> None:
        """Stop sampling this thread; one that is not sampled is fine."""
        clock = self._clocks.pop(tid, None)
        if clock is not None:
            os.close(clock)
        self._sampled.delete(tid)
        self._off_cpu.delete(tid)
        if not self._clocks and self._switch >= 0:
            os.close(self._switch)
            self._switch = -1

    def away(self, now_ns: int) -> npt.NDArray[np.void]:
        """Return samples (dtype ``SAMPLE``) of the threads that left the CPU in an iteration and are not back yet."""
        parts = [np.zeros(0, SAMPLE)]
        for tid in self._clocks:
            sample = self._off_cpu.lookup(tid)
            if sample is not None and sample["time_ns"][0]:
                sample["duration_ns"] = sample["weight_ns"] = max(now_ns - int(sample["time_ns"][0]), 0)
                parts.append(sample)
        return np.concatenate(parts)

    def kernel_frames(self, stack_id: int) -> list[int]:
        """Return the addresses of a kernel stack, innermost first; empty when there is none."""
        stack = self._kernel_stacks.lookup(stack_id) if stack_id >= 0 else None
        return [int(address) for address in stack["address"][0] if address] if stack is not None else []

    def counters(self) -> ProbeCounters:
        """Return how many samples were taken, sent and lost."""
        return self._program.counters([STACK_PROBE])[STACK_PROBE]

    def detach(self) -> None:
        """Stop sampling; samples that wait in the ring stay readable."""
        for tid in list(self._clocks):
            with contextlib.suppress(OSError):
                self.remove(tid)

    def close(self) -> None:
        """Detach and unmap; the programs are those of the set."""
        self.detach()
        self.ring.close()
