"""DWARF expressions of unwind rules, evaluated for many stacks at once.

Linkers write one for the procedure linkage table, compilers one to find the frame of a function that
aligned its stack, libc one for each register of a signal's frame. None of them branches, so every stack
takes the same steps and a value is an array with one element a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from elftools.dwarf.dwarf_expr import DWARFExprParser
from elftools.dwarf.structs import DWARFStructs
from numpy.typing import NDArray

from stallscope.tracer.unwind.registers import REGISTER_COUNT

Words = NDArray[np.uint64]
Expression = tuple[tuple[str, tuple[int, ...]], ...]
"""Operations by name, as ``DW_OP_breg7``, each with its arguments."""

Reader = Callable[[Words, int], tuple[Words, NDArray[np.bool_]]]
"""Reads so many bytes at an address of each stack: the values, and which of them could be read."""

_STRUCTS = DWARFStructs(little_endian=True, dwarf_format=32, address_size=8)
_CONSTANTS = {f"DW_OP_const{size}{sign}" for size in (1, 2, 4, 8) for sign in "us"} | {
    "DW_OP_constu",
    "DW_OP_consts",
    "DW_OP_addr",
}
_WORD = (1 << 64) - 1


class UnsupportedExpressionError(ValueError):
    """An expression does what no unwind rule needs, or takes more values than there are."""


def _signed(words: Words) -> NDArray[np.int64]:
    return words.view(np.int64)


def _shift(shift: Callable[[Words, Words], Words], words: Words, by: Words) -> Words:
    return np.where(by < 64, shift(words, np.minimum(by, np.uint64(63))), np.uint64(0))


def _arithmetic_shift(words: Words, by: Words) -> Words:
    return (_signed(words) >> _signed(np.minimum(by, np.uint64(63)))).view(np.uint64)


def _divide(left: Words, right: Words) -> Words:
    """Divide as DWARF does: signed, towards zero; by zero gives zero, which is no frame's address."""
    divisor = np.where(right == 0, np.uint64(1), right)
    quotient = np.abs(_signed(left)).view(np.uint64) // np.abs(_signed(divisor)).view(np.uint64)
    is_negative = (_signed(left) < 0) != (_signed(right) < 0)
    return np.where(right == 0, np.uint64(0), np.where(is_negative, np.uint64(0) - quotient, quotient))


_UNARY: dict[str, Callable[[Words], Words]] = {
    "DW_OP_abs": lambda top: np.abs(_signed(top)).view(np.uint64),
    "DW_OP_neg": lambda top: np.uint64(0) - top,
    "DW_OP_not": lambda top: ~top,
}
# The operand that was pushed last is the right one.
_BINARY: dict[str, Callable[[Words, Words], Words]] = {
    "DW_OP_and": lambda left, right: left & right,
    "DW_OP_or": lambda left, right: left | right,
    "DW_OP_xor": lambda left, right: left ^ right,
    "DW_OP_plus": lambda left, right: left + right,
    "DW_OP_minus": lambda left, right: left - right,
    "DW_OP_mul": lambda left, right: left * right,
    "DW_OP_div": _divide,
    "DW_OP_mod": lambda left, right: np.where(right == 0, np.uint64(0), left % np.maximum(right, np.uint64(1))),
    "DW_OP_shl": lambda left, right: _shift(np.left_shift, left, right),
    "DW_OP_shr": lambda left, right: _shift(np.right_shift, left, right),
    "DW_OP_shra": _arithmetic_shift,
    "DW_OP_eq": lambda left, right: (left == right).astype(np.uint64),
    "DW_OP_ne": lambda left, right: (left != right).astype(np.uint64),
    "DW_OP_lt": lambda left, right: (_signed(left) < _signed(right)).astype(np.uint64),
    "DW_OP_le": lambda left, right: (_signed(left) <= _signed(right)).astype(np.uint64),
    "DW_OP_gt": lambda left, right: (_signed(left) > _signed(right)).astype(np.uint64),
    "DW_OP_ge": lambda left, right: (_signed(left) >= _signed(right)).astype(np.uint64),
}
# How many values each of the others needs and leaves.
_OTHERS = {
    "DW_OP_dup": (1, 2),
    "DW_OP_drop": (1, 0),
    "DW_OP_over": (2, 3),
    "DW_OP_swap": (2, 2),
    "DW_OP_rot": (3, 3),
    "DW_OP_nop": (0, 0),
    "DW_OP_plus_uconst": (1, 1),
    "DW_OP_deref": (1, 1),
    "DW_OP_deref_size": (1, 1),
}


def parse(content: Sequence[int], *, starts_with_cfa: bool) -> Expression:
    """Return the operations of an expression.

    Args:
        content: its bytes.
        starts_with_cfa: the CFA is on the stack before the first operation, as for every rule but the CFA's.

    Raises:
        UnsupportedExpressionError: it branches, calls, names a register that is not one of the 17, or uses more
            values than it has: nothing that :func:`evaluate` could meet later.
    """
    expression: list[tuple[str, tuple[int, ...]]] = []
    depth = int(starts_with_cfa)
    for operation in DWARFExprParser(_STRUCTS).parse_expr(list(content)):
        name, arguments = operation.op_name, tuple(operation.args)
        if name.startswith("DW_OP_lit"):
            name, arguments = "DW_OP_constu", (int(name[9:]),)
        elif name.startswith("DW_OP_breg") and name != "DW_OP_bregx":
            name, arguments = "DW_OP_bregx", (int(name[10:]), *arguments)
        if name in _CONSTANTS:
            name, needs, leaves = "DW_OP_constu", 0, 1
        elif name == "DW_OP_bregx" and arguments[0] < REGISTER_COUNT:
            needs, leaves = 0, 1
        elif name == "DW_OP_pick":
            needs, leaves = arguments[0] + 1, arguments[0] + 2
        elif name in _UNARY:
            needs, leaves = 1, 1
        elif name in _BINARY:
            needs, leaves = 2, 1
        elif name in _OTHERS and not (name == "DW_OP_deref_size" and arguments[0] not in (1, 2, 4, 8)):
            needs, leaves = _OTHERS[name]
        else:
            raise UnsupportedExpressionError(f"{name} {arguments}")
        if depth < needs:
            raise UnsupportedExpressionError(f"{name} without values")
        depth += leaves - needs
        expression.append((name, arguments))
    if not depth:
        raise UnsupportedExpressionError("no result")
    return tuple(expression)


def evaluate(
    expression: Expression, registers: Words, cfa: Words | None, read: Reader
) -> tuple[Words, NDArray[np.bool_]]:
    """Return an expression's value for each stack, and where all it reads could be read.

    Args:
        expression: from :func:`parse`.
        registers: u64 (stacks, 17).
        cfa: u64 (stacks,), what is on the stack before the first operation; None for nothing.
        read: reads memory.
    """
    known = np.ones(len(registers), np.bool_)
    stack = [cfa] if cfa is not None else []
    for name, arguments in expression:
        if name == "DW_OP_constu":
            stack.append(np.full(len(registers), arguments[0] & _WORD, np.uint64))
        elif name == "DW_OP_bregx":
            stack.append(registers[:, arguments[0]] + np.uint64(arguments[1] & _WORD))
        elif name == "DW_OP_plus_uconst":
            stack[-1] = stack[-1] + np.uint64(arguments[0] & _WORD)
        elif name.startswith("DW_OP_deref"):
            stack[-1], could_read = read(stack[-1], arguments[0] if arguments else 8)
            known &= could_read
        elif name in _UNARY:
            stack[-1] = _UNARY[name](stack[-1])
        elif name in _BINARY:
            right = stack.pop()
            stack[-1] = _BINARY[name](stack[-1], right)
        else:
            _rearrange(name, arguments, stack)
    return stack[-1], known


def _rearrange(name: str, arguments: tuple[int, ...], stack: list[Words]) -> None:
    if name == "DW_OP_dup":
        stack.append(stack[-1])
    elif name == "DW_OP_drop":
        stack.pop()
    elif name == "DW_OP_over":
        stack.append(stack[-2])
    elif name == "DW_OP_pick":
        stack.append(stack[-1 - arguments[0]])
    elif name == "DW_OP_swap":
        stack[-1], stack[-2] = stack[-2], stack[-1]
    elif name == "DW_OP_rot":
        stack[-1], stack[-2], stack[-3] = stack[-2], stack[-3], stack[-1]
