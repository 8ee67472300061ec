"""The stacks of a recording: every different one once, by the number that rows have in their ``stack`` column.

A stack is a list of functions, not of addresses, so that there are few: the outermost first, as a flame graph
draws them, the kernel's frames last. The table grows while it is recorded and travels in pieces beside the rows;
a piece is self-contained JSON, so that a recording that was cut short has every stack its rows name.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stallscope.tracer.errors import RecordingError
from stallscope.tracer.layout import NO_STACK

MAX_STACKS = 1 << 16
"""More different stacks are not kept: their rows have none. At 20 frames each it is 10 MB."""

MAX_FRAMES = 1 << 17
"""More different functions are not kept either."""

KERNEL = "[kernel]"
"""The file of the kernel's functions."""

NOT_UNWOUND = "[not unwound]"
"""The function of the outermost frame of a stack whose beginning is not known."""


@dataclass(frozen=True)
class StackFrame:
    """A function on a stack.

    Attributes:
        function: its name, "" where the file does not tell it.
        file: name of the file it is in, as ``libc.so.6`` or ``redis-server``; ``[kernel]``; "" where not known.
        offset: in the file, of the code without a name: bytes; 0 where the function has one.
    """

    function: str
    file: str
    offset: int = 0

    @property
    def name(self) -> str:
        """Return the function, or the place ``libc.so.6+0x1234`` where it has no name."""
        return self.function or f"{self.file or '[unknown]'}+{self.offset:#x}"

    @property
    def is_kernel(self) -> bool:
        """Return whether it is a function of the kernel."""
        return self.file == KERNEL


class StackTable:
    """Different stacks, numbered in the order in which they came; one thread may add while others read."""

    def __init__(self) -> None:
        self.frames: list[StackFrame] = []
        self.stacks: list[tuple[int, ...]] = []
        self._frame_ids: dict[StackFrame, int] = {}
        self._stack_ids: dict[tuple[int, ...], int] = {}
        self._lock = threading.Lock()

    def add(self, frames: Sequence[StackFrame]) -> int:
        """Return the number of a stack, outermost function first; ``NO_STACK`` when the table is full."""
        with self._lock:
            if len(self.frames) + len(frames) > MAX_FRAMES:
                return NO_STACK
            numbers = []
            for frame in frames:
                number = self._frame_ids.setdefault(frame, len(self.frames))
                if number == len(self.frames):
                    self.frames.append(frame)
                numbers.append(number)
            stack = tuple(numbers)
            if stack not in self._stack_ids:
                if len(self.stacks) >= MAX_STACKS:
                    return NO_STACK
                self._stack_ids[stack] = len(self.stacks)
                self.stacks.append(stack)
            return self._stack_ids[stack]

    def stack(self, number: int) -> tuple[StackFrame, ...]:
        """Return the frames of a stack, outermost first; none where there is no such stack."""
        if not 0 <= number < len(self.stacks):
            return ()
        return tuple(self.frames[frame] for frame in self.stacks[number])

    def piece(self, first_frame: int, first_stack: int) -> dict[str, Any]:
        """Return what was added since there were so many frames and stacks, as plain JSON data."""
        with self._lock:
            return {
                "first_frame": first_frame,
                "first_stack": first_stack,
                "frames": [[item.function, item.file, item.offset] for item in self.frames[first_frame:]],
                "stacks": [list(stack) for stack in self.stacks[first_stack:]],
            }

    def extend(self, piece: object) -> None:
        """Add a piece that :meth:`piece` made; what is known already is skipped.

        Raises:
            RecordingError: it has another form, or names frames that are not there.
        """
        try:
            first_frame, first_stack = piece["first_frame"], piece["first_stack"]  # type: ignore[index]
            frames = [StackFrame(str(function), str(file), int(offset)) for function, file, offset in piece["frames"]]  # type: ignore[index]
            stacks = [tuple(map(int, stack)) for stack in piece["stacks"]]  # type: ignore[index]
            known = max(len(self.frames), first_frame + len(frames))
            is_whole = 0 <= first_frame <= len(self.frames) and 0 <= first_stack <= len(self.stacks)
            is_whole = is_whole and all(0 <= number < known for stack in stacks for number in stack)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RecordingError("the recording's stacks are not readable; the file is damaged") from error
        if not is_whole:
            raise RecordingError("the recording's stacks name functions that it does not list; the file is damaged")
        with self._lock:
            for frame in frames[len(self.frames) - first_frame :]:
                self._frame_ids.setdefault(frame, len(self.frames))
                self.frames.append(frame)
            for stack in stacks[len(self.stacks) - first_stack :]:
                self._stack_ids.setdefault(stack, len(self.stacks))
                self.stacks.append(stack)
