"""The call frame information of .eh_frame as a table of unwind rules.

pyelftools reads the entries and their instructions; the rows are made here: its own ``get_decoded`` ends at
DW_CFA_GNU_args_size, which libc has, and makes a dictionary of each row.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from elftools.dwarf.callframe import CIE, FDE, CallFrameInfo
from elftools.dwarf.structs import DWARFStructs

from stallscope.tracer.unwind.expressions import UnsupportedExpressionError, parse
from stallscope.tracer.unwind.registers import REGISTER_COUNT, RIP, RSP
from stallscope.tracer.unwind.rules import Kind, RuleSet, RuleTable, RuleTableBuilder

# Opcodes of DWARF 5, 7.24, and GNU's own; the first three carry an argument in their low six bits.
_ADVANCE_LOC, _OFFSET, _RESTORE = 0x40, 0x80, 0xC0
_NOP, _SET_LOC, _ADVANCE_LOC1, _ADVANCE_LOC2, _ADVANCE_LOC4 = 0x00, 0x01, 0x02, 0x03, 0x04
_OFFSET_EXTENDED, _RESTORE_EXTENDED, _UNDEFINED, _SAME_VALUE, _REGISTER = 0x05, 0x06, 0x07, 0x08, 0x09
_REMEMBER_STATE, _RESTORE_STATE = 0x0A, 0x0B
_DEF_CFA, _DEF_CFA_REGISTER, _DEF_CFA_OFFSET, _DEF_CFA_EXPRESSION = 0x0C, 0x0D, 0x0E, 0x0F
_EXPRESSION, _OFFSET_EXTENDED_SF, _DEF_CFA_SF, _DEF_CFA_OFFSET_SF = 0x10, 0x11, 0x12, 0x13
_VAL_OFFSET, _VAL_OFFSET_SF, _VAL_EXPRESSION = 0x14, 0x15, 0x16
_GNU_ARGS_SIZE = 0x2E

_NO_CFA = (-1, -1)
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


def decode(content: bytes, address: int, stubs: Sequence[tuple[int, int]] = ()) -> RuleTable:
    """Return the unwind rules of an .eh_frame section.

    An entry with an instruction or an expression that no rule of x86-64 needs leaves its function without
    rules; the others are not affected.

    Args:
        content: the section's bytes.
        address: its virtual address in the file.
        stubs: first address and the one behind the last of code that is known to leave the stack as it was
            called; what the section says itself of such code goes before.
    """
    structs = DWARFStructs(little_endian=True, dwarf_format=32, address_size=8)
    information = CallFrameInfo(
        stream=io.BytesIO(content), size=len(content), address=address, base_structs=structs, for_eh_frame=True
    )
    builder = RuleTableBuilder()
    covered: list[tuple[int, int]] = []
    first_rows: dict[int, _Row] = {}
    for entry in information.get_entries():
        if not isinstance(entry, FDE) or not isinstance(entry.cie, CIE):
            continue
        start = int(entry.header["initial_location"])
        end = start + int(entry.header["address_range"])
        covered.append((start, end))
        try:
            if entry.cie.offset not in first_rows:
                machine = _Machine(builder, entry.cie, _Row(_NO_CFA, {}))
                first_rows[entry.cie.offset] = machine.run(entry.cie.instructions, 0, 0)
            _Machine(builder, entry.cie, first_rows[entry.cie.offset]).run(entry.instructions, start, end)
        except (UnsupportedExpressionError, LookupError):
            continue
    for start, end in stubs:
        if not any(first < end and start < last for first, last in covered):
            builder.add(start, end, _AS_CALLED)
    return builder.build()
