"""Unwinding of samples that were taken in the midst of a breakpoint."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stallscope.tracer.capture.return_addresses import CopiedStacks
from stallscope.tracer.capture.stack_reader import _unwind
from stallscope.tracer.unwind.registers import REGISTER_COUNT, RIP
from stallscope.tracer.unwind.unwinder import MAX_FRAMES, Ended, Unwinder, UnwoundStacks

FUNCTION, MAIN = 0x40_1000, 0x40_2000


class Known(Unwinder):
    """Reaches the end from some addresses, and leads nowhere from all others."""

    def __init__(self, *good: int) -> None:
        super().__init__([], {})
        self.good = good
        self.asked: list[int] = []

    def unwind(
        self, registers: npt.NDArray[np.uint64], stacks: npt.NDArray[np.uint8], lengths: npt.NDArray[np.integer],
        *, below: int = 0,
    ) -> UnwoundStacks:  # fmt: skip
        count = len(registers)
        self.asked += registers[:, RIP].tolist()
        is_good = np.isin(registers[:, RIP], self.good)
        addresses = np.zeros((count, MAX_FRAMES), np.uint64)
        addresses[:, 0], addresses[:, 1] = registers[:, RIP], np.where(is_good, MAIN, 77)
        exact = np.zeros((count, MAX_FRAMES), np.bool_)
        exact[:, 0] = True
        ended = np.where(is_good, Ended.REACHED_END, Ended.NOT_CODE).astype(np.uint8)
        return UnwoundStacks(addresses, np.full(count, 2, np.int32), ended, exact)


def unwound(unwinder: Known, *trapped: tuple[int, bool]) -> UnwoundStacks:
    registers = np.zeros((len(trapped), REGISTER_COUNT), np.uint64)
    registers[:, RIP] = [ip for ip, _ in trapped]
    copied = CopiedStacks(registers, np.zeros((len(trapped), 64), np.uint8), np.full(len(trapped), 64))
    return _unwind(unwinder, copied, np.array([flag for _, flag in trapped], np.bool_))


def test_what_the_breakpoint_replaced_is_still_to_be_executed() -> None:
    result = unwound(Known(FUNCTION), (FUNCTION + 1, True))
    assert result.addresses[0, :3].tolist() == [FUNCTION, MAIN, 0]
    assert result.ended.tolist() == [Ended.REACHED_END]


def test_what_was_executed_stays_where_it_is() -> None:
    unwinder = Known(FUNCTION + 1)
    assert unwound(unwinder, (FUNCTION + 1, True)).addresses[0, 0] == FUNCTION + 1
    assert unwinder.asked == [FUNCTION + 1]


def test_no_other_stack_is_tried_twice() -> None:
    unwinder = Known(FUNCTION)
    result = unwound(unwinder, (FUNCTION + 1, False), (FUNCTION, False), (FUNCTION + 9, True))
    assert result.ended.tolist() == [Ended.NOT_CODE, Ended.REACHED_END, Ended.NOT_CODE]
    assert result.addresses[:, 0].tolist() == [FUNCTION + 1, FUNCTION, FUNCTION + 9]
    assert unwinder.asked[3:] == [FUNCTION + 8]
