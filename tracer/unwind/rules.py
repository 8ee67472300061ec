"""Unwind rules as arrays: for every stretch of code, where its caller's registers are.

A file has some 20,000 stretches and only a few hundred different sets of rules: stretches are sorted starts
with an index, the sets are small arrays beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from stallscope.tracer.unwind.expressions import Expression
from stallscope.tracer.unwind.registers import REGISTER_COUNT, RIP, RSP


class Kind(IntEnum):
    """How the caller's value of one register is found (DWARF 5, 6.4.1)."""

    SAME = 0
    UNDEFINED = 1
    OFFSET = 2  # in memory at CFA + value
    VAL_OFFSET = 3  # it is CFA + value
    REGISTER = 4  # in the register with the number value
    EXPRESSION = 5  # in memory at the result of expression number value
    VAL_EXPRESSION = 6  # it is the result of expression number value


NO_RULE = -1
"""The index of stretches that no rule covers."""


@dataclass(frozen=True)
class RuleSet:
    """The rules of one stretch of code.

    Attributes:
        cfa: register number and offset of the canonical frame address, or -1 and the expression's number.
        registers: (register, kind, value) for each register whose rule is not SAME.
        is_signal_frame: the frame is a signal's: its caller was interrupted and did not call.
    """

    cfa: tuple[int, int]
    registers: tuple[tuple[int, Kind, int], ...]
    is_signal_frame: bool


@dataclass(frozen=True)
class RuleTable:
    """The unwind rules of one file, by virtual address in that file.

    Attributes:
        starts: u64 (stretches,), ascending; each stretch ends where the next one starts.
        index: i4 (stretches,), the stretch's set of rules, or NO_RULE.
        cfa_register: i1 (sets,), -1 where the CFA is an expression.
        cfa_value: i8 (sets,), offset in bytes, or the expression's number.
        kind: u1 (sets, 17), a :class:`Kind` for each register.
        value: i8 (sets, 17).
        is_signal_frame: bool (sets,).
        expressions: what the expressions' numbers stand for.
    """

    starts: NDArray[np.uint64]
    index: NDArray[np.int32]
    cfa_register: NDArray[np.int8]
    cfa_value: NDArray[np.int64]
    kind: NDArray[np.uint8]
    value: NDArray[np.int64]
    is_signal_frame: NDArray[np.bool_]
    expressions: tuple[Expression, ...]

    def at(self, addresses: NDArray[np.uint64]) -> NDArray[np.int32]:
        """Return the index of the set of rules at each address, NO_RULE where there is none."""
        if not len(self.starts):
            return np.full(len(addresses), NO_RULE, np.int32)
        position = np.searchsorted(self.starts, addresses, side="right") - 1
        return np.where(position >= 0, self.index[position], np.int32(NO_RULE))


class RuleTableBuilder:
    """Collects stretches of code in any order."""

    def __init__(self) -> None:
        self._stretches: list[tuple[int, int, int]] = []
        self._sets: dict[RuleSet, int] = {}
        self._expressions: dict[Expression, int] = {}

    def expression(self, expression: Expression) -> int:
        """Return the number of an expression."""
        return self._expressions.setdefault(expression, len(self._expressions))

    def add(self, start: int, end: int, rules: RuleSet) -> None:
        """Say which rules hold from one address up to, not including, another.

        Raises:
            LookupError: no register, number or address is like that; the file is damaged.
        """
        values = (rules.cfa[1], *(value for _, _, value in rules.registers))
        registers = (rules.cfa[0], *(register for register, _, _ in rules.registers))
        if start < 0 or end > 2**64 or not all(-(2**63) <= value < 2**63 for value in values):
            raise LookupError("unwind rules for no address, or with no offset, of 64 bits")
        if not all(-1 <= register < REGISTER_COUNT for register in registers):
            raise LookupError("unwind rules with a register that is not known")
        if start < end:
            self._stretches.append((start, end, self._sets.setdefault(rules, len(self._sets))))

    def build(self) -> RuleTable:
        """Return the table; where stretches overlap, the one that starts later wins."""
        stretches = np.array(sorted(self._stretches), np.uint64).reshape(-1, 3)
        starts, ends = stretches[:, 0], stretches[:, 1]
        index = stretches[:, 2].astype(np.int32)
        # Where nothing follows directly, a stretch without rules begins.
        is_open = np.append(ends[:-1] < starts[1:], np.ones(min(len(ends), 1), np.bool_))
        starts = np.concatenate([starts, ends[is_open]])
        index = np.concatenate([index, np.full(int(is_open.sum()), NO_RULE, np.int32)])
        order = np.argsort(starts, kind="stable")
        sets = list(self._sets)
        kind = np.zeros((len(sets), REGISTER_COUNT), np.uint8)
        value = np.zeros((len(sets), REGISTER_COUNT), np.int64)
        # The CFA is the caller's stack pointer unless said otherwise; no return address, no caller.
        kind[:, RSP] = Kind.VAL_OFFSET
        kind[:, RIP] = Kind.UNDEFINED
        for row, rules in enumerate(sets):
            for register, how, what in rules.registers:
                kind[row, register] = how
                value[row, register] = what
        return RuleTable(
            starts[order],
            index[order],
            np.array([rules.cfa[0] for rules in sets], np.int8),
            np.array([rules.cfa[1] for rules in sets], np.int64),
            kind,
            value,
            np.array([rules.is_signal_frame for rules in sets], np.bool_),
            tuple(self._expressions),
        )
