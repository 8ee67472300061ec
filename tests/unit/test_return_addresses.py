"""Copied stacks without what probes did to them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from stallscope.tracer.capture.return_addresses import restored
from stallscope.tracer.capture.stack_ring import SAMPLE
from stallscope.tracer.unwind.registers import RIP, RSP

TRAMPOLINE = 0x7FFF_FFFF_E000
STACK = 0x7FFC_0000_1000
CALLER, OUTER, HERE = 0x40_1000, 0x40_2000, 0x40_3000


def sample(ip: int = HERE, returns: tuple[tuple[int, int], ...] = ()) -> npt.NDArray[np.void]:
    """Return a sample whose stack holds its own word numbers, and the trampoline where a uretprobe put it.

    Args:
        returns: (word of the stack, original return address), innermost first.
    """
    made = np.zeros(1, SAMPLE)
    made["registers"][0, RIP], made["registers"][0, RSP] = ip, STACK
    made["trampoline"], made["probed_ip"], made["length"] = TRAMPOLINE, CALLER, 4096
    words = made["stack"][0].view("<u8")
    words[:] = np.arange(len(words))
    for number, (word, address) in enumerate(returns):
        words[word] = TRAMPOLINE
        made["return_slot"][0, number] = STACK + word * 8
        made["return_address"][0, number] = address
    return made


def words_of(samples: npt.NDArray[np.void]) -> list[int]:
    return restored(samples).stacks[0].view("<u8")[:512].tolist()


def test_what_has_no_probe_stays() -> None:
    made = sample()
    made["trampoline"] = 0
    assert words_of(made) == list(range(512))
    assert restored(made).registers.tolist() == made["registers"].tolist()
    assert restored(made).lengths.tolist() == [4096]


def test_return_addresses_are_put_back() -> None:
    expected = list(range(512))
    expected[3], expected[40] = CALLER, OUTER
    made = sample(returns=((3, CALLER), (40, OUTER)))
    assert words_of(made) == expected
    assert made["stack"][0].view("<u8")[3] == TRAMPOLINE, "the sample itself is not changed"


def test_a_frame_that_a_longjmp_left_is_not_touched() -> None:
    made = sample(returns=((3, CALLER),))
    made["stack"][0].view("<u8")[3] = 77
    assert words_of(made)[3] == 77


@pytest.mark.parametrize("slot", [STACK - 8, STACK + 4096, STACK + 4092, STACK + (1 << 40), 8])
def test_a_place_that_was_not_copied_is_not_touched(slot: int) -> None:
    made = sample()
    made["return_slot"][0, 0], made["return_address"][0, 0] = slot, CALLER
    assert words_of(made) == list(range(512))


@pytest.mark.parametrize("saved", [0, 3])
def test_in_the_trampoline_the_function_has_returned(saved: int) -> None:
    """Linux before v6.11 has a breakpoint there, later ones save three registers and make a system call."""
    made = sample(ip=TRAMPOLINE + (1 if not saved else 0xD))
    made["return_slot"][0, 0], made["return_address"][0, 0] = STACK + saved * 8 - 8, CALLER
    copied = restored(made)
    assert copied.registers[0, [RIP, RSP]].tolist() == [CALLER, STACK + saved * 8]
    assert copied.stacks[0].view("<u8")[:100].tolist() == list(range(saved, 100 + saved))
    assert copied.lengths.tolist() == [4096 - saved * 8]


@pytest.mark.parametrize(("offset", "word"), [(13, 2), (15, 1), (16, 0)])
@pytest.mark.parametrize("outer", [(), ((40, OUTER),)])
def test_behind_the_system_call_the_return_address_is_on_the_stack(
    offset: int, word: int, outer: tuple[tuple[int, int], ...]
) -> None:
    made = sample(ip=TRAMPOLINE + offset, returns=outer)
    made["stack"][0].view("<u8")[word] = CALLER
    copied = restored(made)
    assert copied.registers[0, [RIP, RSP]].tolist() == [CALLER, STACK + word * 8 + 8]
    assert copied.stacks[0].view("<u8")[0] == word + 1
    assert copied.stacks[0].view("<u8")[40 - word - 1] == (OUTER if outer else 40)
    made["length"] = word * 8
    assert restored(made).registers[0, RIP] == TRAMPOLINE + offset, "that word was not copied"


def test_an_instruction_stepped_out_of_line_is_where_it_was() -> None:
    copied = restored(sample(ip=TRAMPOLINE + 128))
    assert copied.registers[0, [RIP, RSP]].tolist() == [CALLER, STACK]


def test_an_instruction_that_was_stepped_out_of_line_has_been_executed() -> None:
    copied = restored(sample(ip=TRAMPOLINE + 3 * 128 + 4))
    assert copied.registers[0, [RIP, RSP]].tolist() == [CALLER + 4, STACK]


def test_samples_do_not_mix() -> None:
    made = np.concatenate([sample(), sample(returns=((3, CALLER),)), sample(ip=TRAMPOLINE + 128)])
    copied = restored(made)
    assert [row.view("<u8")[3] for row in copied.stacks] == [3, CALLER, 3]
    assert copied.registers[:, RIP].tolist() == [HERE, HERE, CALLER]
    assert len(restored(np.zeros(0, SAMPLE)).lengths) == 0
