"""The registers of x86-64 under their DWARF numbers.

Source: System V ABI, AMD64 supplement, figure 3.36 "DWARF Register Number Mapping".
"""

from __future__ import annotations

REGISTERS = (
    "rax",
    "rdx",
    "rcx",
    "rbx",
    "rsi",
    "rdi",
    "rbp",
    "rsp",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rip",
)
"""Names by DWARF number, and the order of the columns wherever registers are an array."""

REGISTER_COUNT = len(REGISTERS)
RSP = REGISTERS.index("rsp")
RIP = REGISTERS.index("rip")
"""The column of the return address, which the rules treat as a register."""

RED_ZONE_BYTES = 128
"""What a function may use below its stack pointer without moving it (System V ABI, 3.2.2)."""
