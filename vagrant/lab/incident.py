#!/usr/bin/env python3
"""Runs a command while a Redis server of its own goes through the incident, and says what its clients met.

Examples:
    incident.py                                          the incident alone: overflows, longest PING
    incident.py -- stallscope record --pid {pid} -o a.stall
    incident.py --build 5.0.6 --load-json fixed.json -- stallscope record --pid {pid} -o fixed.stall
    incident.py --recipe small-buffers --build 2.8.17-patched -- sleep 10
    incident.py --wait-for attached --attach 1 --interrupt -- stallscope record --pid {pid} -o a.stall

{pid} and {port} are replaced in the command, which starts when every client is in place and the load begins.
Nothing can stall before --attach seconds (5 by default) have passed: until then the stuck uploaders send a
byte now and then, so that their buffers are not trimmed. Give more where attaching is slow, as in an
emulated machine. The load ends 2 s after the trims; the exit code is the command's. With --interrupt the
command gets SIGINT at that moment, and the clients leave when it is done: what it records is the load alone. With
--wait-for the load begins when the command has said so on stderr, so that nothing depends on how long it takes.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab import LabError, LabUsageError
from lab.load import RECIPE_OPTIONS, add_recipe_options, chosen_recipe
from lab.outcome import Outcome
from lab.recipes import RECIPES, Recipe, check
from lab.server import FILES, HOST, LAUNCH, STOP_TIMEOUT_S, Server, running_server, stop

LOAD = Path(__file__).with_name("load.py")
REPORT_TIMEOUT_S = 240.0
"""Beyond every bound of the load itself: it prepares for 120 s at most, and runs for 120 s."""

LOOK_INTERVAL_S = 0.05
EXIT_SIGNALLED = 128

__all__ = ["PreparedLoad", "Result", "prepared_load", "run", "running_server"]


@dataclass(frozen=True)
class Result:
    """The command's exit status (None without one) and what the clients met (None when cut short)."""

    status: int | None
    outcome: Outcome | None


class PreparedLoad:
    """A load whose clients are in place and wait: ``start`` it, then ask for its ``outcome``."""

    def __init__(self, process: subprocess.Popen[bytes], messages: IO[bytes]) -> None:
        self._process = process
        self._messages = messages
        self._over = False

    def start(self) -> None:
        """Begin the measured window."""
        assert self._process.stdin is not None
        # A load that has ended meanwhile says why when it is asked for its outcome.
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"start\n")
            self._process.stdin.flush()

    @property
    def running(self) -> bool:
        """Whether the load is still preparing, waiting or under way."""
        return self._process.poll() is None

    @property
    def over(self) -> bool:
        """Whether the window has ended; the clients stay until ``outcome`` is asked for."""
        assert self._process.stdout is not None
        if not self._over and select.select([self._process.stdout], [], [], 0)[0]:
            self._over = self._process.stdout.readline() == b"over\n"
        return self._over

    def outcome(self) -> Outcome:
        """Wait for the end of the window and return what the clients met.

        Raises:
            LabError: the load failed; the message is its own.
        """
        try:
            document = self._process.communicate(timeout=REPORT_TIMEOUT_S)[0]
        except subprocess.TimeoutExpired:
            raise LabError(f"the load did not end within {REPORT_TIMEOUT_S:.0f} s; is the server stopped?") from None
        if self._process.returncode != 0:
            raise self._failure()
        return Outcome.from_json(document.decode().removeprefix("over\n"))

    def _wait_until_prepared(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"prepared\n":
            self._process.wait()
            raise self._failure()

    def _failure(self) -> LabError:
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        said = lines[-1].removeprefix("load.py: ") if lines else f"status {self._process.returncode}, no message"
        return LabError(f"the load failed: {said}")


@contextmanager
def prepared_load(server: Server, recipe: Recipe | str = "incident") -> Iterator[PreparedLoad]:
    """Bring a load's clients into place on a server and yield it, waiting; stop it whatever happens.

    Attach what should see the load in between, or before. The backlog is the server's, not the recipe's.

    Raises:
        LabError: a bound is broken or the clients could not be brought into place.
    """
    chosen = RECIPES[recipe] if isinstance(recipe, str) else recipe
    check(chosen, HOST)
    command = [sys.executable, "-I", "-S", str(LAUNCH), str(os.getpid()), str(FILES)]
    command += [sys.executable, str(LOAD), "--port", str(server.port), "--handshake", *_words(chosen)]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            start_new_session=True,
        )
        try:
            load = PreparedLoad(process, messages)
            load._wait_until_prepared()
            yield load
        finally:
            stop(process)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None and not pipe.closed:
                    pipe.close()


def run(
    command: Sequence[str] = (),
    *,
    build: str | Path = "2.8.17",
    recipe: Recipe | str = "incident",
    port: int | None = None,
    interrupt: bool = False,
    wait_for: str = "",
) -> Result:
    """Run a command beside the load on a server of its own; ``{pid}`` and ``{port}`` are replaced in it.

    When the command fails before the load is over, the load is cut short and there is no outcome.

    Args:
        wait_for: begin the load when the command has written this to stderr; "": at once.
        interrupt: send the command SIGINT when the window ends, and let the clients leave when it is done.

    Raises:
        LabError: the server or the load failed, or the command could not be started.
    """
    chosen = RECIPES[recipe] if isinstance(recipe, str) else recipe
    with (
        running_server(build, backlog=chosen.backlog, port=port) as server,
        prepared_load(server, chosen) as load,
    ):
        if not command:
            load.start()
            return Result(None, load.outcome())
        with _running_command(_fill_in(command, server), wait_for) as (process, has_said):
            while not has_said.is_set() and process.poll() is None:
                time.sleep(LOOK_INTERVAL_S)
            load.start()
            while load.running and not load.over:
                if process.poll():
                    return Result(_status(process), None)
                time.sleep(LOOK_INTERVAL_S)
            if interrupt and load.over:
                process.send_signal(signal.SIGINT)
                process.wait()
            outcome = load.outcome()
            process.wait()
            return Result(_status(process), outcome)


def _fill_in(command: Sequence[str], server: Server) -> list[str]:
    return [word.replace("{pid}", str(server.pid)).replace("{port}", str(server.port)) for word in command]


@contextmanager
def _running_command(
    command: Sequence[str], wait_for: str
) -> Iterator[tuple[subprocess.Popen[bytes], threading.Event]]:
    """Run it; yield it, and what is set when it has written those words to stderr, at once without any."""
    has_said = threading.Event()
    if not wait_for:
        has_said.set()
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE if wait_for else None)
    except OSError as error:
        raise LabUsageError(f"cannot run {command[0]}: {error.strerror}; is it installed and on PATH?") from None
    relay = threading.Thread(target=_relay, args=(process.stderr, wait_for.encode(), has_said), daemon=True)
    if wait_for:
        relay.start()
    try:
        yield process, has_said
    except KeyboardInterrupt:
        # The terminal sent it to the command as well: let it finish what it writes.
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        raise
    finally:
        stop(process)
        if wait_for:
            # a grandchild may hold the pipe open for longer
            relay.join(STOP_TIMEOUT_S)


def _relay(pipe: IO[bytes], words: bytes, has_said: threading.Event) -> None:
    """Pass on what a command says, and look for the words in it."""
    said = b""
    with pipe:
        while part := os.read(pipe.fileno(), 65536):
            sys.stderr.buffer.write(part)
            sys.stderr.buffer.flush()
            if not has_said.is_set():
                said += part
                if words in said:
                    has_said.set()


def _status(process: subprocess.Popen[bytes]) -> int:
    """Return the exit status as a shell gives it: 128 and the signal for a killed process."""
    assert process.returncode is not None
    return process.returncode if process.returncode >= 0 else EXIT_SIGNALLED - process.returncode


def _words(recipe: Recipe) -> list[str]:
    """Return the recipe as options of ``load.py``, every field of it."""
    return [word for flag, name, _, _ in RECIPE_OPTIONS for word in (flag, str(getattr(recipe, name)))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    try:
        result = run(
            command,
            build=options.server or options.build,
            recipe=chosen_recipe(options),
            port=None if options.port == "auto" else int(options.port),
            interrupt=options.interrupt,
            wait_for=options.wait_for,
        )
        if result.outcome is None:
            print(f"incident.py: {command[0]} failed early: the load was cut short", file=sys.stderr)
        else:
            print(f"clients: {result.outcome.summary()}", file=sys.stderr)
            if options.load_json is not None:
                options.load_json.write_text(result.outcome.to_json() + "\n")
    except LabError as error:
        print(f"incident.py: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"incident.py: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return LabError.exit_code
    except KeyboardInterrupt:
        return EXIT_SIGNALLED + signal.SIGINT
    return result.status or 0


def _leave(number: int, _frame: FrameType | None) -> None:
    """Unwind like any exception, so that everything started is stopped."""
    sys.exit(EXIT_SIGNALLED + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--build", default="2.8.17", help="a build of build.py --list (default: %(default)s)")
    which.add_argument("--server", type=Path, metavar="PATH", help="any other redis-server")
    add_recipe_options(parser, "incident")
    parser.add_argument("--port", type=_port, default="auto", help="a port, or auto for a free one (default)")
    parser.add_argument("--load-json", type=Path, metavar="FILE", help="write what the clients met to FILE")
    parser.add_argument("--wait-for", default="", metavar="WORDS", help="begin when the command said so on stderr")
    parser.add_argument("--interrupt", action="store_true", help="end the command by SIGINT when the load is over")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run meanwhile")
    return parser


def _port(text: str) -> str:
    if text != "auto" and not (text.isdigit() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f'"{text}" is not a port; write 1 to 65535, or auto')
    return text


if __name__ == "__main__":
    sys.exit(main())
