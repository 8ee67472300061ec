"""The call frame information of .eh_frame as unwind rules.

pyelftools reads the entries and their instructions; the rows are made here: its own ``get_decoded`` ends at
DW_CFA_GNU_args_size, which libc has, and makes a dictionary of each row.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from elftools.dwarf.callframe import CIE, FDE, CallFrameInfo
from elftools.dwarf.structs import DWARFStructs
from numpy.typing import NDArray

from stallscope.tracer.capture.elf import DAMAGE
from stallscope.tracer.unwind.expressions import UnsupportedExpressionError, parse
from stallscope.tracer.unwind.registers import REGISTER_COUNT, RIP, RSP
from stallscope.tracer.unwind.rules import Kind, RuleSet, RuleTableBuilder

# Opcodes of DWARF 5, 7.24, and GNU's own; the first three carry an argument in their low six bits.
_ADVANCE_LOC, _OFFSET, _RESTORE = 0x40, 0x80, 0xC0
_NOP, _SET_LOC, _ADVANCE_LOC1, _ADVANCE_LOC2, _ADVANCE_LOC4 = 0x00, 0x01, 0x02, 0x03, 0x04
_OFFSET_EXTENDED, _RESTORE_EXTENDED, _UNDEFINED, _SAME_VALUE, _REGISTER = 0x05, 0x06, 0x07, 0x08, 0x09
_REMEMBER_STATE, _RESTORE_STATE = 0x0A, 0x0B
_DEF_CFA, _DEF_CFA_REGISTER, _DEF_CFA_OFFSET, _DEF_CFA_EXPRESSION = 0x0C, 0x0D, 0x0E, 0x0F
_EXPRESSION, _OFFSET_EXTENDED_SF, _DEF_CFA_SF, _DEF_CFA_OFFSET_SF = 0x10, 0x11, 0x12, 0x13
_VAL_OFFSET, _VAL_OFFSET_SF, _VAL_EXPRESSION = 0x14, 0x15, 0x16
_GNU_ARGS_SIZE = 0x2E

# Pointer encodings of .eh_frame_hdr (Linux Standard Base 5.0, 10.5.1).
_UDATA4, _DATAREL_SDATA4 = 0x03, 0x3B

_STRUCTS = DWARFStructs(little_endian=True, dwarf_format=32, address_size=8)
_NO_CFA = (-1, -1)
_CHANGES_OF_CFA = (_DEF_CFA_OFFSET, _DEF_CFA_OFFSET_SF, _DEF_CFA_REGISTER)
_AS_CALLED = RuleSet((RSP, 8), ((RIP, Kind.OFFSET, -8),), False)


class _Row:
    """The state of DWARF's row machine (DWARF 5, 6.4.2): where the CFA and the registers are."""

    def __init__(self, cfa: tuple[int, int], registers: dict[int, tuple[Kind, int]]) -> None:
        self.cfa = cfa
        self.registers = registers

    def copy(self) -> _Row:
        return _Row(self.cfa, self.registers.copy())


class _Machine:
    """Runs the instructions of one entry."""

    def __init__(self, builder: RuleTableBuilder, cie: Any, first: _Row) -> None:
        self._builder = builder
        self._code_alignment = int(cie.header["code_alignment_factor"])
        self._data_alignment = int(cie.header["data_alignment_factor"])
        self._is_signal_frame = b"S" in cie.header["augmentation"]
        self._first = first
        self._row = first.copy()
        self._remembered: list[_Row] = []

    def run(self, instructions: list[Any], start: int, end: int) -> _Row:
        """Add the rows from start up to end to the table; return the last one."""
        at = start
        for instruction in instructions:
            opcode, arguments = int(instruction.opcode), instruction.args
            if opcode in (_ADVANCE_LOC, _ADVANCE_LOC1, _ADVANCE_LOC2, _ADVANCE_LOC4, _SET_LOC):
                following = arguments[0] if opcode == _SET_LOC else at + arguments[0] * self._code_alignment
                self._emit(at, min(following, end))
                at = following
            else:
                self._apply(opcode, arguments)
        self._emit(at, end)
        return self._row

    def _emit(self, start: int, end: int) -> None:
        if start < end and self._row.cfa != _NO_CFA:
            registers = self._row.registers
            rules = tuple((number, *registers[number]) for number in sorted(registers))
            self._builder.add(start, end, RuleSet(self._row.cfa, rules, self._is_signal_frame))

    def _apply(self, opcode: int, arguments: list[Any]) -> None:
        row = self._row
        if opcode in _CHANGES_OF_CFA and row.cfa[0] < 0:
            raise UnsupportedExpressionError("the CFA is no register whose offset could change")
        if opcode in (_OFFSET, _OFFSET_EXTENDED, _OFFSET_EXTENDED_SF):
            self._set(arguments[0], Kind.OFFSET, arguments[1] * self._data_alignment)
        elif opcode == _DEF_CFA_OFFSET:
            row.cfa = (row.cfa[0], arguments[0])
        elif opcode == _REMEMBER_STATE:
            self._remembered.append(row.copy())
        elif opcode == _RESTORE_STATE:
            self._row = self._remembered.pop()
        elif opcode == _DEF_CFA:
            row.cfa = (_general(arguments[0]), arguments[1])
        elif opcode == _DEF_CFA_REGISTER:
            row.cfa = (_general(arguments[0]), row.cfa[1])
        elif opcode == _DEF_CFA_SF:
            row.cfa = (_general(arguments[0]), arguments[1] * self._data_alignment)
        elif opcode == _DEF_CFA_OFFSET_SF:
            row.cfa = (row.cfa[0], arguments[0] * self._data_alignment)
        elif opcode == _DEF_CFA_EXPRESSION:
            row.cfa = (-1, self._builder.expression(parse(arguments[0], starts_with_cfa=False)))
        elif opcode in (_RESTORE, _RESTORE_EXTENDED):
            row.registers.pop(arguments[0], None)
            if arguments[0] in self._first.registers:
                row.registers[arguments[0]] = self._first.registers[arguments[0]]
        elif opcode == _UNDEFINED:
            self._set(arguments[0], Kind.UNDEFINED, 0)
        elif opcode == _SAME_VALUE:
            self._set(arguments[0], Kind.SAME, 0)
        elif opcode == _REGISTER:
            self._set(arguments[0], Kind.REGISTER, _general(arguments[1]))
        elif opcode in (_VAL_OFFSET, _VAL_OFFSET_SF):
            self._set(arguments[0], Kind.VAL_OFFSET, arguments[1] * self._data_alignment)
        elif opcode in (_EXPRESSION, _VAL_EXPRESSION):
            kind = Kind.EXPRESSION if opcode == _EXPRESSION else Kind.VAL_EXPRESSION
            self._set(arguments[0], kind, self._builder.expression(parse(arguments[1], starts_with_cfa=True)))
        elif opcode not in (_NOP, _GNU_ARGS_SIZE):
            raise UnsupportedExpressionError(f"call frame instruction {opcode:#x}")

    def _set(self, register: int, kind: Kind, value: int) -> None:
        # Registers of vectors and floating point are nobody's return address.
        if register < REGISTER_COUNT:
            self._row.registers[register] = (kind, value)


def _general(register: int) -> int:
    if register >= REGISTER_COUNT:
        raise UnsupportedExpressionError(f"register {register}")
    return register


@dataclass(frozen=True)
class FrameIndex:
    """Where the entry of each function is, from .eh_frame_hdr.

    Attributes:
        starts: u64 (functions,), the virtual address each function starts at, ascending.
        offsets: i8 (functions,), where its entry starts in .eh_frame.
    """

    starts: NDArray[np.uint64]
    offsets: NDArray[np.int64]


def read_index(content: bytes, address: int, frames_address: int) -> FrameIndex | None:
    """Return the index that .eh_frame_hdr holds, None when there is none or its encoding is not the usual one.

    Source: Linux Standard Base 5.0, 10.6.2. GNU ld, gold and lld write the same encoding: the table's addresses
    relative to this section's in four signed bytes.

    Args:
        content: the section's bytes.
        address: its virtual address.
        frames_address: that of .eh_frame.
    """
    if content[:1] != b"\1" or content[2:4] != bytes([_UDATA4, _DATAREL_SDATA4]):
        return None
    count = int.from_bytes(content[8:12], "little")
    if not 0 < count <= (len(content) - 12) // 8:
        return None
    table = np.frombuffer(content, "<i4", 2 * count, 12).reshape(-1, 2).astype(np.int64)
    starts = table[:, 0].astype(np.uint64) + np.uint64(address)
    if np.any(starts[1:] < starts[:-1]):
        return None
    return FrameIndex(starts, table[:, 1] + (address - frames_address))


class FrameRules:
    """The unwind rules of one file, decoded function by function as they are asked for.

    A server's stacks are in some hundred of the thousands of functions that it and its libraries have, and decoding
    all of them takes seconds. May be used from several threads.

    Attributes:
        table: the rules decoded so far. It is replaced as it grows; the numbers of its sets stay.
        damaged: entries that could not be decoded; their functions have no rules.
    """

    def __init__(
        self, content: bytes, address: int, index: FrameIndex | None = None, stubs: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Decode nothing yet.

        Args:
            content: the bytes of .eh_frame.
            address: its virtual address in the file.
            index: where each function's entry is; None to decode all entries at the first use.
            stubs: first address and the one behind the last of code that is known to leave the stack as it was
                called; what the section says itself of such code goes before.
        """
        self._content = content
        self._address = address
        self._index = index
        self._is_decoded = np.zeros(len(index.starts) if index is not None else 1, np.bool_)
        self._stubs = list(stubs)
        self._builder = RuleTableBuilder()
        self._covered: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        self.table = self._builder.build()
        self.damaged = 0

    def at(self, addresses: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Return the number, in :attr:`table`, of the set of rules at each address; NO_RULE where there is none."""
        with self._lock:
            wanted = self._entries_of(addresses)
            new = np.unique(wanted[~self._is_decoded[wanted]])
            if len(new) or self._stubs:
                self._decode(new)
                self._cover_stubs()
                self.table = self._builder.build()
            return self.table.at(addresses)

    def _entries_of(self, addresses: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the number of the one entry that may cover each address, without those before the first."""
        if self._index is None:
            return np.zeros(1, np.int64)
        found = np.searchsorted(self._index.starts, addresses, side="right") - 1
        return found[found >= 0]

    def _decode(self, wanted: NDArray[np.int64]) -> None:
        self._is_decoded[wanted] = True
        for number in wanted.tolist():
            try:
                if self._index is None:
                    self._add(self._content, self._address)
                else:
                    self._add(*self._entry(int(self._index.offsets[number])))
            except DAMAGE:
                self.damaged += 1

    def _entry(self, offset: int) -> tuple[bytes, int]:
        """Return a section that holds one function's entry and the CIE it refers to, and its address."""
        entry = self._one(offset)
        cie = self._one(offset + 4 - int.from_bytes(entry[4:8], "little"))
        # The reference is a distance, from its own place.
        entry = entry[:4] + (len(cie) + 4).to_bytes(4, "little") + entry[8:]
        return cie + entry, self._address + offset - len(cie)

    def _one(self, offset: int) -> bytes:
        length = int.from_bytes(self._content[offset : offset + 4], "little") if offset >= 0 else 0
        # 64-bit DWARF, which no compiler writes into .eh_frame, would have 0xffffffff here.
        if not 8 <= length <= len(self._content) - offset - 4:
            raise ValueError(f"entry of {length} bytes at {offset:#x}")
        return self._content[offset : offset + 4 + length]

    def _add(self, content: bytes, address: int) -> None:
        """Add the rules of all entries of a section."""
        information = CallFrameInfo(
            stream=io.BytesIO(content), size=len(content), address=address, base_structs=_STRUCTS, for_eh_frame=True
        )
        first_rows: dict[int, _Row] = {}
        for entry in information.get_entries():
            if not isinstance(entry, FDE) or not isinstance(entry.cie, CIE):
                continue
            start = int(entry.header["initial_location"])
            end = min(start + int(entry.header["address_range"]), (1 << 64) - 1)
            # What this function's rules say stays known even if they are of no use.
            self._covered.append((start, end))
            try:
                if entry.cie.offset not in first_rows:
                    machine = _Machine(self._builder, entry.cie, _Row(_NO_CFA, {}))
                    first_rows[entry.cie.offset] = machine.run(entry.cie.instructions, 0, 0)
                _Machine(self._builder, entry.cie, first_rows[entry.cie.offset]).run(entry.instructions, start, end)
            except (UnsupportedExpressionError, LookupError):
                self.damaged += 1

    def _cover_stubs(self) -> None:
        """Give the stubs that have no rules of their own those of code that leaves the stack as it was called."""
        for start, end in self._stubs:
            nearest = self._entries_of(np.array([start, end - 1], np.uint64))
            self._decode(nearest[~self._is_decoded[nearest]])
            if not any(first < end and start < last for first, last in self._covered):
                self._builder.add(start, end, _AS_CALLED)
        self._stubs = []
