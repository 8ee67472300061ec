"""A command on a pseudo-terminal, and what its screen shows: pyte interprets what is written."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import pyte
from tracing import until


class Screen:
    """The terminal of a running command."""

    def __init__(self, process: subprocess.Popen[bytes], master: int, slave: int, width: int, height: int) -> None:
        self.process = process
        self.written = b""
        self._master, self._slave = master, slave
        self._screen = pyte.Screen(width, height)
        self._stream = pyte.ByteStream(self._screen)

    @property
    def pyte_screen(self) -> pyte.Screen:
        self.read()
        return self._screen

    def read(self) -> None:
        while select.select([self._master], [], [], 0)[0]:
            try:
                part = os.read(self._master, 65536)
            except OSError:
                return  # the last one who had it open is gone
            if not part:
                return
            self.written += part
            self._stream.feed(part)

    def lines(self) -> list[str]:
        self.read()
        return [line.rstrip() for line in self._screen.display]

    def line(self, *parts: str) -> str:
        """Return the first line that holds all of these, "" for none."""
        return next((line for line in self.lines() if all(part in line for part in parts)), "")

    def wait_for(self, *parts: str) -> str:
        def is_there() -> bool:
            assert self.process.poll() is None or self.line(*parts), "\n".join(self.lines())
            return bool(self.line(*parts))

        until(is_there, f"a line with {parts}; the screen is\n" + "\n".join(self.lines()))
        return self.line(*parts)

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def resize(self, width: int, height: int) -> None:
        self._screen.resize(height, width)
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def modes(self) -> list[object]:
        """Return the terminal's settings, as ``stty`` would show them."""
        return termios.tcgetattr(self._slave)

    def ended(self) -> int:
        """Wait until the command has ended; returns its exit code."""

        def is_over() -> bool:
            self.read()
            return self.process.poll() is not None

        until(is_over, "the command ends")
        self.read()
        return self.process.returncode


@contextmanager
def on_screen(
    words: Sequence[str], *, width: int = 80, height: int = 24, environment: dict[str, str] | None = None
) -> Iterator[Screen]:
    """Run a command on a terminal of its own and yield its screen."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    base = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        words,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=base | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"} | (environment or {}),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    screen = Screen(process, master, slave, width, height)
    try:
        yield screen
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(master)
        os.close(slave)
