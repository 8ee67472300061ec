"""Unwinding of many copied stacks at once.

All stacks take their n-th step together: one look-up of all program counters, one gather of all saved
registers. A stack leaves when it has reached its end or cannot go on, and says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from stallscope.tracer.errors import SymbolError
from stallscope.tracer.unwind.cfi import FrameRules
from stallscope.tracer.unwind.code import CodeImage, CodeMapping
from stallscope.tracer.unwind.expressions import evaluate
from stallscope.tracer.unwind.registers import REGISTER_COUNT, RIP, RSP
from stallscope.tracer.unwind.rules import NO_RULE, Kind, RuleTable

MAX_FRAMES = 128
"""Frames kept of one stack; the kernel's own limit is 127 (perf_event_max_stack)."""

Words = NDArray[np.uint64]
Flags = NDArray[np.bool_]


class Ended(IntEnum):
    """Why a stack's last frame is its last one."""

    REACHED_END = 1
    """The outermost function: its rules say that nobody called it."""
    STACK_TOO_SHORT = 2
    """The next return address or saved register lies outside what was copied."""
    NO_RULE = 3
    """The code is in a file without rules for it."""
    NOT_CODE = 4
    """The return address is in no executable mapping: made at run time, or the stack is damaged."""
    NO_PROGRESS = 5
    """The caller's stack pointer is not above its callee's: the stack is damaged."""
    TOO_DEEP = 6
    """There are more than MAX_FRAMES frames."""


@dataclass(frozen=True)
class UnwoundStacks:
    """Stacks as addresses.

    Attributes:
        addresses: u64 (stacks, MAX_FRAMES), innermost first, padded with 0.
        depth: i4 (stacks,), frames of each stack, at least 1.
        ended: u1 (stacks,), an :class:`Ended` for each stack.
        is_exact: bool (stacks, MAX_FRAMES), the address was being executed: of the innermost frame, and of what
            a signal interrupted. All others are return addresses, which may lie behind the calling function.
    """

    addresses: Words
    depth: NDArray[np.int32]
    ended: NDArray[np.uint8]
    is_exact: Flags

    @cached_property
    def places(self) -> Words:
        """Every address where its function is to be looked up: return addresses less one, padded with 0."""
        return self.addresses - ((self.addresses != 0) & ~self.is_exact)


@dataclass(frozen=True)
class Frame:
    """What is known of one address.

    Attributes:
        function: its name, empty when the file does not tell.
        file: the file's name, as ``libc.so.6``; empty when the address is in no mapping.
        offset: bytes from the function's start, or from address 0 of the file when there is no function.
        start: the function's first address in the process, 0 when there is no function.
    """

    function: str
    file: str
    offset: int
    start: int = 0

    def __str__(self) -> str:
        """Return ``function``, or ``libc.so.6+0x1234`` when its name is not known."""
        return self.function or (f"{self.file}+{self.offset:#x}" if self.file else f"{self.offset:#x}")


class Unwinder:
    """The mapped code of one process."""

    def __init__(self, mappings: Sequence[CodeMapping], images: Mapping[str, CodeImage]) -> None:
        """Keep what is mapped where.

        Args:
            mappings: the executable mappings; one without an image, or with another build-id than its image (a
                file replaced since), ends a stack as Ended.NO_RULE.
            images: by path.
        """
        self._unreadable: list[str] = []
        self._frame_rules: dict[int, FrameRules] = {}
        self._mappings = sorted(mappings, key=lambda mapping: mapping.start)
        self._starts = np.array([mapping.start for mapping in self._mappings], np.uint64)
        self._ends = np.array([mapping.end for mapping in self._mappings], np.uint64)
        self._images: list[CodeImage | None] = []
        # Added to an address of the process it gives the file's, modulo 2**64.
        self._shifts = np.zeros(len(self._mappings), np.uint64)
        for index, mapping in enumerate(self._mappings):
            image = images.get(mapping.path)
            if image is not None and mapping.build_id and image.build_id and mapping.build_id != image.build_id:
                image = None
            if image is not None:
                try:
                    shift = image.code_address(mapping.file_offset) - mapping.start
                    self._shifts[index] = np.uint64(shift & ((1 << 64) - 1))
                except SymbolError:
                    image = None
            self._images.append(image)

    def unwind(
        self, registers: Words, stacks: NDArray[np.uint8], lengths: NDArray[np.integer], *, below: int = 0
    ) -> UnwoundStacks:
        """Return the frames of each stack.

        Args:
            registers: (stacks, 17), in the order of :data:`~stallscope.tracer.unwind.registers.REGISTERS`.
            stacks: (stacks, size), the memory from the stack pointer upwards.
            lengths: (stacks,), bytes of each row that were copied.
            below: the rows start this many bytes below the stack pointer. With RED_ZONE_BYTES also what a leaf
                function saved there is known. Without, a saved register below the stack pointer is taken to be
                restored already, which it is in an epilogue.
        """
        return _Walk(self, registers, stacks, lengths, below).run()

    def frames(self, addresses: Words, is_exact: Flags | None = None) -> list[Frame]:
        """Return what is known of each of some addresses.

        Args:
            addresses: (n,), for speed each of them once.
            is_exact: (n,), as in :class:`UnwoundStacks`; None when all are.
        """
        exact = np.ones(len(addresses), np.bool_) if is_exact is None else is_exact
        places = addresses - ~exact
        mapped = self._mapping_of(places)
        return [
            self._frame(int(address), int(place), int(index))
            for address, place, index in zip(addresses, places, mapped, strict=True)
        ]

    def _frame(self, address: int, place: int, index: int) -> Frame:
        if index < 0:
            return Frame("", "", address)
        image = self._images[index]
        mapping = self._mappings[index]
        if image is None:
            return Frame("", mapping.path.rpartition("/")[2], address - mapping.start + mapping.file_offset)
        shift = int(self._shifts[index])
        function = image.function_at((place + shift) & ((1 << 64) - 1))
        in_file = (address + shift) & ((1 << 64) - 1)
        if function is None:
            return Frame("", image.name, in_file)
        return Frame(function.name, image.name, in_file - function.start, address - in_file + function.start)

    def _mapping_of(self, addresses: Words) -> NDArray[np.int64]:
        """Return the index of the mapping that contains each address, -1 where none does."""
        index = np.searchsorted(self._starts, addresses, side="right") - 1
        is_inside = index >= 0
        is_inside[is_inside] = addresses[is_inside] < self._ends[index[is_inside]]
        return np.where(is_inside, index, -1)

    def rules_at(self, places: Words) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return for each address the index of its mapping, and the number of its set of rules in that table.

        Both are -1 where there is none.
        """
        mapped = self._mapping_of(places)
        rules = np.full(len(places), NO_RULE, np.int32)
        for index in np.unique(mapped[mapped >= 0]):
            here = mapped == index
            rules[here] = self._rules(int(index)).at(places[here] + self._shifts[index])
        return mapped, rules

    def table(self, index: int) -> RuleTable:
        """Return the unwind rules of a mapping, as far as :meth:`rules_at` was asked for them."""
        return self._rules(index).table

    def _rules(self, index: int) -> FrameRules:
        """Return the rules of a mapping; none when it has no image or its rules cannot be read."""
        rules = self._frame_rules.get(index)
        if rules is None:
            image = self._images[index]
            rules = FrameRules(b"", 0)
            try:
                rules = image.rules if image is not None else rules
            except SymbolError as error:
                self._unreadable.append(str(error))
            self._frame_rules[index] = rules
        return rules

    @property
    def problems(self) -> list[str]:
        """One line for each file whose rules are damaged; frames in such a function end as Ended.NO_RULE."""
        damaged = {
            self._mappings[index].path: rules.damaged for index, rules in self._frame_rules.items() if rules.damaged
        }
        return self._unreadable + [
            f"cannot unwind {count} functions of {path}: damaged .eh_frame; reinstall the package"
            for path, count in damaged.items()
        ]


class _Walk:
    """One call of :meth:`Unwinder.unwind`: the stacks that are still under way."""

    def __init__(
        self,
        unwinder: Unwinder,
        registers: Words,
        stacks: NDArray[np.uint8],
        lengths: NDArray[np.integer],
        below: int,
    ) -> None:
        count = len(registers)
        if registers.shape != (count, REGISTER_COUNT) or stacks.shape[:1] != (count,) or lengths.shape != (count,):
            raise ValueError(f"registers {registers.shape}, stacks {stacks.shape} and lengths {lengths.shape}")
        self._unwinder = unwinder
        self._stacks = stacks
        self._lengths = np.minimum(lengths, stacks.shape[1]).astype(np.int64)
        self._bottoms = registers[:, RSP] - np.uint64(below)
        self._registers = registers.copy()
        self._addresses = np.zeros((count, MAX_FRAMES), np.uint64)
        self._depth = np.zeros(count, np.int32)
        self._ended = np.zeros(count, np.uint8)
        self._exact = np.zeros((count, MAX_FRAMES), np.bool_)

    def run(self) -> UnwoundStacks:
        """Take steps until no stack is left."""
        rows = np.arange(len(self._registers))
        exact = np.ones(len(rows), np.bool_)
        for depth in range(MAX_FRAMES):
            self._addresses[rows, depth] = self._registers[rows, RIP]
            self._exact[rows, depth] = exact
            self._depth[rows] += 1
            rows, exact = self._step(rows, exact)
            if not len(rows):
                break
        self._ended[rows] = Ended.TOO_DEEP
        return UnwoundStacks(self._addresses, self._depth, self._ended, self._exact)

    def _step(self, rows: NDArray[np.int64], exact: Flags) -> tuple[NDArray[np.int64], Flags]:
        """Put the callers' registers in place of the callees'; return the stacks that go on.

        Args:
            rows: the stacks under way.
            exact: whether the program counter of each is exact.

        Returns:
            The same for the callers.
        """
        mapped, rules = self._unwinder.rules_at(self._registers[rows, RIP] - ~exact)
        self._ended[rows[rules < 0]] = Ended.NO_RULE
        self._ended[rows[mapped < 0]] = Ended.NOT_CODE
        next_exact = np.zeros(len(rows), np.bool_)
        for index in np.unique(mapped[rules >= 0]):
            here = (mapped == index) & (rules >= 0)
            table = self._unwinder.table(int(index))
            self._return(table, rules[here], rows[here], exact[here])
            next_exact[here] = table.is_signal_frame[rules[here]]
        goes_on = self._ended[rows] == 0
        return rows[goes_on], next_exact[goes_on]

    def _return(self, table: RuleTable, rules: NDArray[np.int32], rows: NDArray[np.int64], exact: Flags) -> None:
        """Give some stacks, whose code is in one file, the registers of their callers, or the reason why not."""
        callee = self._registers[rows]
        kind = table.kind[rules]
        value = table.value[rules].view(np.uint64)
        cfa, could_read = self._frame_addresses(table, rules, rows, callee)
        caller = np.where(kind == Kind.VAL_OFFSET, cfa[:, np.newaxis] + value, callee)

        stack, register = np.nonzero(kind == Kind.REGISTER)
        caller[stack, register] = callee[stack, table.value[rules[stack], register]]

        stack, register = np.nonzero(kind == Kind.OFFSET)
        saved, is_known = self._read(rows[stack], cfa[stack] + value[stack, register], 8)
        caller[stack, register] = np.where(is_known, saved, callee[stack, register])
        is_lost = np.zeros(kind.shape, np.bool_)
        is_lost[stack, register] = ~is_known

        stack, register = np.nonzero((kind == Kind.EXPRESSION) | (kind == Kind.VAL_EXPRESSION))
        numbers = table.value[rules[stack], register]
        for number in np.unique(numbers):
            chosen = numbers == number
            at, column = stack[chosen], register[chosen]
            result, is_known = evaluate(
                table.expressions[number],
                callee[at],
                cfa[at],
                partial(self._read, rows[at]),
            )
            in_memory = kind[at, column] == Kind.EXPRESSION
            saved, is_saved = self._read(rows[at], result, 8)
            is_known &= is_saved | ~in_memory
            caller[at, column] = np.where(is_known, np.where(in_memory, saved, result), callee[at, column])
            is_lost[at, column] = ~is_known

        # A callee-saved register below the copy was restored before its place was given up: see unwind().
        could_read &= ~(is_lost[:, RIP] | is_lost[:, RSP])
        ended = np.zeros(len(rows), np.uint8)
        # A signal may have its own stack, and a longjmp has left its own when it loads the stack pointer.
        may_stay = table.is_signal_frame[rules] | (exact & (caller[:, RSP] == callee[:, RSP]))
        ended[(caller[:, RSP] <= callee[:, RSP]) & ~may_stay] = Ended.NO_PROGRESS
        ended[caller[:, RIP] == 0] = Ended.REACHED_END
        ended[~could_read] = Ended.STACK_TOO_SHORT
        ended[kind[:, RIP] == Kind.UNDEFINED] = Ended.REACHED_END
        self._ended[rows] = ended
        self._registers[rows] = caller

    def _frame_addresses(
        self, table: RuleTable, rules: NDArray[np.int32], rows: NDArray[np.int64], callee: Words
    ) -> tuple[Words, Flags]:
        """Return each stack's canonical frame address, and where all that it takes could be read."""
        base = table.cfa_register[rules].astype(np.intp)
        value = table.cfa_value[rules]
        cfa = callee[np.arange(len(rows)), base] + value.view(np.uint64)
        could_read = np.ones(len(rows), np.bool_)
        for number in np.unique(value[base < 0]):
            here = np.flatnonzero((base < 0) & (value == number))
            cfa[here], could_read[here] = evaluate(
                table.expressions[number],
                callee[here],
                None,
                partial(self._read, rows[here]),
            )
        return cfa, could_read

    def _read(self, rows: NDArray[np.int64], addresses: Words, size: int) -> tuple[Words, Flags]:
        """Return what each stack holds at an address, 0 where that was not copied, and where it was."""
        offsets = (addresses - self._bottoms[rows]).view(np.int64)
        is_copied = (offsets >= 0) & (offsets <= self._lengths[rows] - size)
        words = np.zeros(len(rows), np.uint64)
        content = words[:, np.newaxis].view(np.uint8)
        columns = offsets[is_copied, np.newaxis] + np.arange(size)
        content[is_copied, :size] = self._stacks[rows[is_copied, np.newaxis], columns]
        return words, is_copied
