"""The stack of a thread that is asleep already when its stacks begin to be sampled.

Nobody saw it leave the CPU: what a sampler would have copied then is read from /proc, without stopping anything.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallscope.tracer.capture.event_loop import WAITS
from stallscope.tracer.capture.stack_ring import SAMPLE
from stallscope.tracer.unwind.registers import REGISTERS

NO_KERNEL_STACK = -1

_STATES = {"S": 1, "D": 2, "T": 4, "t": 8}
"""Linux include/linux/sched.h: TASK_INTERRUPTIBLE and its neighbours, by the letter in /proc/PID/stat."""

_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
"""Where a system call's arguments are, in their order."""


def sleeping_sample(pid: int, tid: int) -> npt.NDArray[np.void] | None:
    """Return what a thread sleeps in, dtype ``SAMPLE``, shape (1,); None if it runs or waits for events.

    The kernel tells stack pointer, program counter and the arguments of the system call; what the other registers
    hold it does not tell, so that frames which need them end the stack. Source: Linux fs/proc/base.c,
    proc_pid_syscall.
    """
    folder = Path(f"/proc/{pid}/task/{tid}")
    try:
        words = (folder / "syscall").read_text(encoding="ascii").split()
        letter = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        state = _STATES.get(letter)
        # "running", or number [arguments] stack-pointer program-counter; -1 outside of a system call
        if state is None or len(words) not in (3, 9) or int(words[0]) in WAITS.values():
            return None
        sample = np.zeros(1, SAMPLE)
        registers = sample["registers"][0]
        named = dict(zip(_ARGUMENTS, words[1:-2], strict=False)) | {"rsp": words[-2], "rip": words[-1]}
        for name, word in named.items():
            registers[REGISTERS.index(name)] = int(word, 16)
        copied = _memory(pid, int(words[-2], 16), sample["stack"].shape[1])
    except (OSError, ValueError):
        return None
    sample["stack"][0, : len(copied)] = np.frombuffer(copied, np.uint8)
    sample["length"], sample["state"], sample["kernel_stack"] = len(copied), state, NO_KERNEL_STACK
    sample["pid"], sample["tid"], sample["time_ns"] = pid, tid, time.monotonic_ns()
    return sample


def _memory(pid: int, address: int, size: int) -> bytes:
    """Return a process's memory from an address on, as far as there is any.

    Raises:
        OSError: it may not be read, or the process is gone.
    """
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        return os.pread(memory, size, address)
    finally:
        os.close(memory)
