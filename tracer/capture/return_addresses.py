"""Undoes in a copied stack what probes did to it: uretprobes replace return addresses by their trampoline.

Without this, a stack would end at the first traced function. The kernel keeps what it replaced
(Linux include/linux/uprobes.h, struct return_instance), and the sampler copies that beside the stack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.tracer.unwind.registers import RIP, RSP

_PAGE_BYTES = 4096
_SLOT_BYTES = 128
"""Linux arch/x86/include/asm/uprobes.h, UPROBE_XOL_SLOT_BYTES; the page's first slot is the trampoline."""

_PUSHED_BYTES = 3 * 8
"""What the trampoline has saved at most: Linux arch/x86/kernel/uprobes.c, uretprobe_trampoline_entry."""

_LEFT_BYTES = {13: 16, 15: 8, 16: 0}
"""Behind its system call, by the offset: how far up the stack the return address is, in place of a register saved."""

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class CopiedStacks:
    """What an unwinder starts from.

    Attributes:
        registers: u64 (n, 17), in DWARF's order; stacks: u8 (n, size), from the stack pointer up.
        lengths: i8 (n,), bytes of each stack that were copied.
    """

    registers: Words
    stacks: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]


def restored(samples: npt.NDArray[np.void]) -> CopiedStacks:
    """Return the registers and stacks of samples (dtype ``SAMPLE``) as they would be without probes; copies."""
    registers: Words = samples["registers"].copy()
    stacks = np.ascontiguousarray(samples["stack"])
    stacks = stacks.copy() if stacks.base is not None else stacks
    lengths = samples["length"].astype(np.int64)
    trampoline = samples["trampoline"]
    _restore_return_addresses(samples, registers, stacks, lengths)
    # what lies in the page of the probes has wrapped around below it too, so one comparison is enough
    inside = registers[:, RIP] - trampoline
    in_page = (trampoline != 0) & (inside < _PAGE_BYTES)
    stepping = in_page & (inside >= _SLOT_BYTES)
    # behind the instruction once that was executed, which may have moved the stack pointer
    registers[stepping, RIP] = samples["probed_ip"][stepping] + inside[stepping] % _SLOT_BYTES
    for row in np.flatnonzero(in_page & ~stepping).tolist():
        _return_from_trampoline(samples[row], registers[row], stacks[row])
        lengths[row] -= int(registers[row, RSP]) - int(samples["registers"][row, RSP])
    return CopiedStacks(registers, stacks, np.maximum(lengths, 0))


def _restore_return_addresses(
    samples: npt.NDArray[np.void], registers: Words, stacks: npt.NDArray[np.uint8], lengths: npt.NDArray[np.int64]
) -> None:
    """Put back each return address that was replaced; what a longjmp has left behind is not there any more."""
    words = stacks.view("<u8")
    offset = samples["return_slot"] - registers[:, RSP, np.newaxis]
    there = (samples["return_slot"] != 0) & (offset % 8 == 0) & (offset.view(np.int64) >= 0)
    there &= offset.view(np.int64) <= lengths[:, np.newaxis] - 8
    row, call = np.nonzero(there)
    place = (offset[row, call] // 8).astype(np.int64)
    replaced = (words[row, place] - samples["trampoline"][row]) < _SLOT_BYTES
    row, call, place = row[replaced], call[replaced], place[replaced]
    words[row, place] = samples["return_address"][row, call]


def _return_from_trampoline(sample: np.void, registers: Words, stack: npt.NDArray[np.uint8]) -> None:
    """Let a thread that is in the trampoline have returned to where it will be sent: the function is over."""
    shift = int(sample["return_slot"][0]) + 8 - int(registers[RSP])
    inside = int(registers[RIP]) - int(sample["trampoline"])
    if 0 <= shift <= _PUSHED_BYTES:
        registers[RIP] = sample["return_address"][0]
    elif inside in _LEFT_BYTES and _LEFT_BYTES[inside] + 8 <= sample["length"]:
        # the kernel has forgotten the call, and put the return address where the trampoline's `ret` will find it
        registers[RIP] = stack.view("<u8")[_LEFT_BYTES[inside] // 8]
        shift = _LEFT_BYTES[inside] + 8
    else:
        return
    registers[RSP] += np.uint64(shift)
    if shift:
        stack[:-shift] = stack[shift:].copy()
