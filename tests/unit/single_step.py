"""A program run one instruction at a time, with a shadow stack: every return address that is on its stack.

The truth an unwinder is held against: a call puts its return address there and nothing else does, and it is
gone once the stack pointer is above it, however that happened (return, tail call, longjmp).
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from capstone import CS_ARCH_X86, CS_GRP_CALL, CS_MODE_64, Cs
from mapped_code import mapped_code
from numpy.typing import NDArray

from stallscope.tracer.unwind.code import CodeImage, CodeMapping
from stallscope.tracer.unwind.registers import REGISTERS, RIP, RSP

# ptrace(2), sys/ptrace.h and the order of struct user_regs_struct in sys/user.h.
TRACEME, SINGLESTEP, CONT, GETREGS = 0, 9, 7, 12
USER_REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
DWARF_ORDER = [USER_REGISTERS.index(name) for name in REGISTERS]


@dataclass(frozen=True)
class Steps:
    """What was seen before each instruction.

    Attributes:
        truth: for each, the addresses of its frames, innermost first, up to the function that raised.
        exact: for each, at which depths these are no return addresses.
    """

    mappings: list[CodeMapping]
    images: dict[str, CodeImage]
    registers: NDArray[np.uint64]
    stacks: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    truth: list[list[int]]
    exact: list[list[int]]


@dataclass(frozen=True)
class _Entry:
    slot: int  # where the return address is
    address: int
    is_exact: bool = False


class _Traced:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        self._libc.ptrace.restype = ctypes.c_long
        self._memory = -1
        self._registers = (ctypes.c_uint64 * len(USER_REGISTERS))()

    def open_memory(self) -> None:
        """Open the memory of the program that was executed: an earlier opening shows that of the fork."""
        self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY)

    def request(self, what: int, data: int = 0) -> None:
        if self._libc.ptrace(what, self.pid, None, data):
            raise OSError(ctypes.get_errno(), "ptrace")

    def wait(self) -> int:
        """Return the signal the program stopped with, -1 when it is gone."""
        _, status = os.waitpid(self.pid, 0)
        return os.WSTOPSIG(status) if os.WIFSTOPPED(status) else -1

    def registers(self) -> list[int]:
        if self._libc.ptrace(GETREGS, self.pid, None, ctypes.addressof(self._registers)):
            raise OSError(ctypes.get_errno(), "ptrace")
        return [self._registers[index] for index in DWARF_ORDER]

    def read(self, address: int, size: int) -> bytes:
        return os.pread(self._memory, size, address)

    def word(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")

    def close(self) -> None:
        if self._memory >= 0:
            os.close(self._memory)


def run(program: Path, *, size: int, below: int, limit: int) -> Steps:
    """Step through what a program does from its ``raise(SIGTRAP)`` to its end.

    Only calls made meanwhile are known: the truth is each stack's inner part.

    Args:
        size: bytes of the stack to keep before each instruction, from the stack pointer upwards.
        below: and below it.
        limit: instructions at most.
    """
    # On one CPU the two take turns without waiting for another to wake.
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    pid = os.fork()
    if not pid:
        ctypes.CDLL(None).ptrace(TRACEME, 0, None, None)
        os.execv(program, [str(program)])
    traced = _Traced(pid)
    try:
        assert traced.wait() == signal.SIGTRAP  # the exec
        traced.open_memory()
        traced.request(CONT)
        assert traced.wait() == signal.SIGTRAP  # the first raise
        mappings, images = mapped_code(pid)
        seen = list(_steps(traced, size, below, limit))
    finally:
        os.sched_setaffinity(0, allowed)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            traced.wait()
        traced.close()
    stacks = np.zeros((len(seen), below + size), np.uint8)
    for row, (_, copy, _) in enumerate(seen):
        stacks[row, : len(copy)] = np.frombuffer(copy, np.uint8)
    return Steps(
        mappings,
        images,
        np.array([registers for registers, _, _ in seen], np.uint64),
        stacks,
        np.array([len(copy) for _, copy, _ in seen], np.int64),
        [[registers[RIP], *(entry.address for entry in entries)] for registers, _, entries in seen],
        [[0, *(depth for depth, entry in enumerate(entries, 1) if entry.is_exact)] for _, _, entries in seen],
    )


def _steps(traced: _Traced, size: int, below: int, limit: int) -> Iterator[tuple[list[int], bytes, list[_Entry]]]:
    decoder = Cs(CS_ARCH_X86, CS_MODE_64)
    decoder.detail = True
    calls: dict[int, int] = {}  # by address: where the call returns to, 0 for all else
    shadow: list[_Entry] = []
    before = traced.registers()
    delivered = 0
    for _ in range(limit):
        traced.request(SINGLESTEP, delivered)
        stopped = traced.wait()
        if stopped == -1:
            return
        now = traced.registers()
        if delivered and now[RSP] < before[RSP] - 128:
            # The kernel entered a handler: it put a return address there, and that of what it interrupted.
            shadow.append(_Entry(before[RSP] - 1, before[RIP], is_exact=True))
            shadow.append(_Entry(now[RSP], traced.word(now[RSP])))
        delivered = 0
        if stopped != signal.SIGTRAP:
            delivered = stopped
            before = now
            continue
        at = before[RIP]
        if at not in calls:
            code = next(decoder.disasm(traced.read(at, 15), at, 1), None)
            calls[at] = code.address + code.size if code is not None and code.group(CS_GRP_CALL) else 0
        if calls[at] and now[RSP] == before[RSP] - 8:
            shadow.append(_Entry(now[RSP], calls[at]))
        while shadow and shadow[-1].slot < now[RSP]:
            shadow.pop()
        before = now
        if shadow:
            yield now, traced.read(now[RSP] - below, below + size), shadow[::-1]
