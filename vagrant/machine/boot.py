"""One run: start the machine, stream what its command prints, keep to the time, leave nothing behind."""

from __future__ import annotations

import contextlib
import enum
import os
import selectors
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from . import cargo, qemu
from .errors import DidNotComeUpError

EXIT_TIMED_OUT = 124
EXIT_DID_NOT_COME_UP = 125

GREETING = b"stallscope-vm ready "
CONSOLE_LINES = 40
# The guest ends the command itself when its time is up; this is for its result and the power-off.
AFTER_COMMAND_S = 60.0
KILLED_WITHIN_S = 10.0

WORKSPACE = "stallscope-vm."


@dataclass(frozen=True)
class Limits:
    """How long a run may take, and bring back.

    Attributes:
        boot_s: Seconds from the start of qemu to the greeting of the guest's init.
        command_s: Seconds for the command, measured inside the guest.
        results_mib: Size of the disk of results; it takes room only for what is written.
    """

    boot_s: float = 180.0
    command_s: int = 1500
    results_mib: int = 512


class Ending(enum.Enum):
    """How qemu came to its end."""

    POWERED_OFF = "powered off"
    NOT_UP_IN_TIME = "not up in time"
    TIMED_OUT = "timed out"


def run(
    machine: qemu.Machine,
    project: Path,
    command: str,
    *,
    output: BinaryIO,
    note: Callable[[str], None],
    out: Path | None = None,
    limits: Limits | None = None,
) -> int:
    """Run a shell command as root in a fresh machine and return its exit code.

    Args:
        machine: What to boot.
        project: The folder that becomes /vagrant, where the command starts.
        command: For bash; what it leaves in $STALLSCOPE_OUT comes back.
        output: Receives the command's stdout and stderr as they come.
        note: Receives the runner's own messages, a line each.
        out: Folder for the files that come back, and console.log; made when it is missing.
        limits: Time and size.

    Returns:
        The command's exit code; 124 when its time was up.

    Raises:
        DidNotComeUpError: The guest ended, or was ended, before it could say how the command ended.
        MachineError: qemu is missing, or the project cannot be read.
    """
    limits = limits or Limits()
    with _workspace() as work:
        cargo_in, cargo_out, console = work / "in.tar", work / "out.tar", work / "console.log"
        with cargo_in.open("wb") as disk:
            cargo.pack(disk, project, command, limits.command_s)
        with cargo_out.open("wb") as disk:
            disk.truncate(limits.results_mib << 20)
        console.touch()
        try:
            ending = watch(qemu.arguments(machine, cargo_in, cargo_out, console), output, note, limits)
            returned = cargo.unpack(cargo_out, out)
        finally:
            if out:
                out.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(console, out / "console.log")
        if ending is Ending.TIMED_OUT:
            note(f"the command took longer than {limits.command_s} s and the machine did not end it: killed")
            return EXIT_TIMED_OUT
        if returned is None:
            what = "the machine ended before its command did; its kernel's last lines say why"
            if ending is Ending.NOT_UP_IN_TIME:
                what = f"the machine was not up after {limits.boot_s:.0f} s; on a busy host raise --boot-timeout"
            raise DidNotComeUpError(what, _last_lines(console))
        if returned.exit_code == EXIT_TIMED_OUT:
            note(f"the command's time of {limits.command_s} s may be up; see --timeout")
        if not returned.complete:
            note(f"results are cut off: more than {limits.results_mib} MiB; raise --results-mib")
            return returned.exit_code or EXIT_DID_NOT_COME_UP
        return returned.exit_code


def watch(argv: list[str], output: BinaryIO, note: Callable[[str], None], limits: Limits) -> Ending:
    """Start qemu and copy what it prints, after the guest's greeting, until it ends or must be ended.

    Whatever interrupts this, qemu is dead when it returns.

    Raises:
        MachineError: There is no such program.
    """
    try:
        # A session of its own, so that Ctrl-C reaches us and not qemu.
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise qemu.missing_qemu() from error
    assert process.stdout is not None
    greeted = False
    waiting = b""
    deadline = time.monotonic() + limits.boot_s
    try:
        with selectors.DefaultSelector() as selector, process.stdout as stream:
            selector.register(stream, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return Ending.TIMED_OUT if greeted else Ending.NOT_UP_IN_TIME
                data = os.read(stream.fileno(), 1 << 16)
                if not data:
                    break
                if not greeted:
                    waiting += data
                    greeting, newline, rest = waiting.partition(b"\n")
                    if not newline:
                        continue
                    if greeting.startswith(GREETING):
                        greeted = True
                        deadline = time.monotonic() + limits.command_s + AFTER_COMMAND_S
                        note(_announcement(greeting))
                    else:
                        note(greeting.decode(errors="replace").strip())  # qemu itself complains
                    waiting, data = (b"", rest) if greeted else (rest, b"")
                output.write(data)
                output.flush()
        if waiting.strip():
            note(waiting.decode(errors="replace").strip())
        process.wait(KILLED_WITHIN_S)
        return Ending.POWERED_OFF
    except subprocess.TimeoutExpired:
        return Ending.TIMED_OUT
    finally:
        _end(process, note)


def _announcement(greeting: bytes) -> str:
    release, _, uptime_s = greeting[len(GREETING) :].decode(errors="replace").strip().partition(" ")
    return f"Linux {release} is up, {uptime_s} s after its start"


def _end(process: subprocess.Popen[bytes], note: Callable[[str], None]) -> None:
    if process.poll() is not None:
        return
    process.kill()
    try:
        process.wait(KILLED_WITHIN_S)
    except subprocess.TimeoutExpired:
        note(f"qemu (pid {process.pid}) does not die: its KVM hangs; use --accel tcg")


def _last_lines(console: Path) -> str:
    lines = console.read_text(errors="replace").splitlines()
    return "\n".join(lines[-CONSOLE_LINES:])


@contextlib.contextmanager
def _workspace() -> Iterator[Path]:
    """Make a temporary folder, named after this process; remove those that killed runs left behind."""
    for old in Path(tempfile.gettempdir()).glob(f"{WORKSPACE}[0-9]*.*"):
        pid = old.name.split(".")[1]
        if old.is_dir() and not Path("/proc", pid).exists():
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{WORKSPACE}{os.getpid()}.") as folder:
        yield Path(folder)
