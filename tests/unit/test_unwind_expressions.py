"""DWARF expressions over many stacks at once, against the arithmetic of one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.tracer.unwind.expressions import UnsupportedExpressionError, evaluate, parse
from stallscope.tracer.unwind.registers import REGISTER_COUNT, REGISTERS

WORD = (1 << 64) - 1
MEMORY = {0x1000: 0x1122_3344_5566_7788, 0x2000: 7}
# Opcodes of DWARF 5, 7.7.1.
CONST8U, LIT0, BREG0, DEREF, DEREF_SIZE, PLUS_UCONST, NOP = 0x0E, 0x30, 0x70, 0x06, 0x94, 0x23, 0x96
DUP, DROP, OVER, PICK, SWAP, ROT = 0x12, 0x13, 0x14, 0x15, 0x16, 0x17


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def quotient(left: int, right: int) -> int:
    if not right:
        return 0
    result = abs(signed(left)) // abs(signed(right))
    return -result if (signed(left) < 0) != (signed(right) < 0) else result


BINARY = {
    0x1A: lambda left, right: left & right,
    0x1B: quotient,
    0x1C: lambda left, right: left - right,
    0x1D: lambda left, right: left % right if right else 0,
    0x1E: lambda left, right: left * right,
    0x21: lambda left, right: left | right,
    0x22: lambda left, right: left + right,
    0x24: lambda left, right: left << right if right < 64 else 0,
    0x25: lambda left, right: left >> right if right < 64 else 0,
    0x26: lambda left, right: signed(left) >> min(right, 63),
    0x27: lambda left, right: left ^ right,
    0x29: lambda left, right: left == right,
    0x2A: lambda left, right: signed(left) >= signed(right),
    0x2B: lambda left, right: signed(left) > signed(right),
    0x2C: lambda left, right: signed(left) <= signed(right),
    0x2D: lambda left, right: signed(left) < signed(right),
    0x2E: lambda left, right: left != right,
}
UNARY = {0x19: lambda top: abs(signed(top)), 0x1F: lambda top: -top, 0x20: lambda top: ~top}


def read(addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    known = np.array([int(address) in MEMORY for address in addresses])
    words = [MEMORY.get(int(address), 0) & ((1 << 8 * size) - 1) for address in addresses]
    return np.array(words, np.uint64), known


def value(content: list[int], registers: dict[str, int] | None = None, cfa: int | None = None) -> tuple[int, bool]:
    rows = np.zeros((2, REGISTER_COUNT), np.uint64)
    for name, word in (registers or {}).items():
        rows[0, REGISTERS.index(name)] = word
    start = None if cfa is None else np.array([cfa, 0], np.uint64)
    values, known = evaluate(parse(content, starts_with_cfa=cfa is not None), rows, start, read)
    return int(values[0]), bool(known[0])


words = st.integers(0, WORD) | st.sampled_from([0, 1, 63, 64, 65, WORD, 1 << 63, (1 << 63) - 1])


@given(opcode=st.sampled_from(sorted(BINARY)), left=words, right=words)
def test_binary_operations(opcode: int, left: int, right: int) -> None:
    content = [CONST8U, *left.to_bytes(8, "little"), CONST8U, *right.to_bytes(8, "little"), opcode]
    assert value(content) == (int(BINARY[opcode](left, right)) & WORD, True)


@given(opcode=st.sampled_from(sorted(UNARY)), top=words)
def test_unary_operations(opcode: int, top: int) -> None:
    assert value([CONST8U, *top.to_bytes(8, "little"), opcode]) == (UNARY[opcode](top) & WORD, True)


@pytest.mark.parametrize("rip", range(0x4000, 0x4010))
def test_linkage_table(rip: int) -> None:
    """What binutils writes for .plt: 8 more once the stub has pushed its index, 11 bytes into its 16."""
    content = [0x77, 8, 0x80, 0, LIT0 + 15, 0x1A, LIT0 + 11, 0x2A, LIT0 + 3, 0x24, 0x22]
    assert value(content, {"rsp": 0x7000, "rip": rip}) == (0x7000 + 8 + 8 * (rip % 16 >= 11), True)


def test_memory_and_registers() -> None:
    assert value([BREG0 + 6, 0x78, DEREF], {"rbp": 0x1008}) == (0x1122_3344_5566_7788, True)  # breg6 -8; deref
    assert value([BREG0 + 6, 0x78, DEREF_SIZE, 2], {"rbp": 0x1008}) == (0x7788, True)
    assert value([DEREF, PLUS_UCONST, 0x80, 1], cfa=0x2000) == (7 + 128, True)
    assert value([0x92, 0x07, 0x7F], {"rsp": 5}) == (4, True)  # bregx 7, -1
    assert value([DEREF], cfa=0x3000)[1] is False
    assert value([0x09, 0xFE]) == (WORD - 1, True)  # const1s -2


def test_rearranging() -> None:
    one_two_three = [LIT0 + 1, LIT0 + 2, LIT0 + 3]
    minus = 0x1C
    assert value([*one_two_three, DROP])[0] == 2
    assert value([*one_two_three, DUP, 0x22])[0] == 6
    assert value([*one_two_three, OVER])[0] == 2
    assert value([*one_two_three, PICK, 2])[0] == 1
    assert value([*one_two_three, SWAP, minus])[0] == 1
    # rot: the top goes below the next two: 3 1 2
    assert [value([*one_two_three, ROT, *[DROP] * count])[0] for count in range(3)] == [2, 1, 3]
    assert value([*one_two_three, NOP])[0] == 3


@pytest.mark.parametrize(
    "content",
    [
        [],
        [0x22],
        [LIT0, 0x22],
        [LIT0, DROP],
        [LIT0, PICK, 1],
        [0x28, 0, 0],
        [LIT0, 0x28, 0, 0],
        [BREG0 + 17, 0],
        [0x50],
        [LIT0, DEREF_SIZE, 3],
    ],
)
def test_what_no_rule_needs_is_refused(content: list[int]) -> None:
    with pytest.raises(UnsupportedExpressionError):
        parse(content, starts_with_cfa=False)
