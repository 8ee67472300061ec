"""The terminal of a full-screen command: keys one by one, the other screen, and everything as it was afterwards."""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import termios
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType

from stallscope.tracer.errors import UsageError

_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]?|O.?)?")
"""An arrow or a function key comes as an escape and letters that nobody pressed (ECMA-48, 5.4)."""

_INPUT_FLAGS, _LOCAL_FLAGS = 0, 3


def require_terminal(remedy: str) -> None:
    """Check that there is a terminal to draw on and to read keys from.

    Raises:
        UsageError: there is none; it names the remedy.
    """
    for name, stream in (("stdin", sys.stdin), ("stdout", sys.stdout)):
        if not stream.isatty():
            raise UsageError(f"{name} is not a terminal; {remedy}")
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        raise UsageError(f"the terminal cannot be drawn on (TERM={os.environ.get('TERM', '')}); {remedy}")


class TerminalGoneError(Exception):
    """The terminal was closed."""


class Terminal:
    """Stdin without line editing and the alternate screen of stdout, between ``with`` and its end."""

    def __init__(self) -> None:
        """Nothing is changed yet."""
        self.console = Console(highlight=False)
        self.was_resized = False
        self._is_suspended = False
        self._saved: list[Any] | None = None

    @property
    def ascii_only(self) -> bool:
        """Return whether the terminal shows nothing but ASCII for sure."""
        return not self.console.encoding.lower().startswith("utf")

    def __enter__(self) -> Terminal:
        for number, handler in ((signal.SIGWINCH, self._on_resize), (signal.SIGTSTP, self._on_suspend)):
            signal.signal(number, handler)
        self._take_over()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()
        for number in (signal.SIGWINCH, signal.SIGTSTP):
            signal.signal(number, signal.SIG_DFL)

    def draw(self, renderable: RenderableType) -> None:
        """Draw on the whole screen.

        Raises:
            TerminalGoneError: there is no terminal any more.
        """
        try:
            self.console.update_screen(renderable)
        except OSError as error:
            raise TerminalGoneError from error

    def size(self) -> tuple[int, int]:
        """Return columns and lines, asked anew."""
        self.was_resized = False
        try:
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            columns, lines = 0, 0
        size = (columns or 80, lines or 24)
        self.console.width, self.console.height = size
        return size

    def keys(self, until_ns: int) -> str:
        """Return the keys that were pressed, or "" when none was until that time (CLOCK_MONOTONIC).

        Raises:
            TerminalGoneError: there is no terminal any more.
        """
        if self._is_suspended:
            self._suspend()
        seconds = max(until_ns - time.monotonic_ns(), 0) / 1e9
        if not select.select([sys.stdin.fileno()], [], [], seconds)[0]:
            return ""
        try:
            pressed = os.read(sys.stdin.fileno(), 64)
        except OSError as error:
            raise TerminalGoneError from error
        if not pressed:
            raise TerminalGoneError
        return _ESCAPE_SEQUENCE.sub("", pressed.decode("ascii", "replace"))

    def _take_over(self) -> None:
        descriptor = sys.stdin.fileno()
        self._saved = termios.tcgetattr(descriptor)
        mode = termios.tcgetattr(descriptor)
        mode[_LOCAL_FLAGS] &= ~(termios.ECHO | termios.ICANON)
        mode[_INPUT_FLAGS] &= ~termios.IXON  # Ctrl-S would hold up the reader, and events would be lost
        termios.tcsetattr(descriptor, termios.TCSADRAIN, mode)
        self.size()
        self.console.set_alt_screen(True)
        self.console.show_cursor(False)

    def _give_back(self) -> None:
        """Restore the terminal; one that is gone needs nothing."""
        with suppress(OSError):
            self.console.show_cursor(True)
            self.console.set_alt_screen(False)
        saved, self._saved = self._saved, None
        if saved is not None:
            with suppress(termios.error):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, saved)

    def _suspend(self) -> None:
        """Stop as Ctrl-Z asks, with the shell's terminal as it was; go on when the shell says so."""
        self._is_suspended = False
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._on_suspend)
        self._take_over()
        self.was_resized = True

    def _on_resize(self, _number: int, _frame: object) -> None:
        self.was_resized = True

    def _on_suspend(self, _number: int, _frame: object) -> None:
        self._is_suspended = True
