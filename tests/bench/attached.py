"""Runs a tracer and tells when its probes are in the target: by the breakpoints in the target's code.

Linux writes 0xCC over the first byte of a probed instruction (arch/x86/include/asm/uprobes.h,
UPROBE_SWBP_INSN), in every tool alike; so both are held against the same clock.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from figures import BenchError

BREAKPOINT = 0xCC
_LOOK_INTERVAL_S = 0.001
_TIMEOUT_S = 30.0
_SETTLE_S = 0.5
"""Our recorder calibrates after attaching; bpftrace 0.17 takes ten seconds to end when it is interrupted just before
its own loop begins."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Place:
    """A function in a running process: its symbol, its file, and its address there."""

    symbol: str
    path: str
    address: int


@dataclass(frozen=True)
class Attached:
    """A tracer whose probes are all in place, and what that took: seconds of wall-clock and of CPU time."""

    pid: int
    wall_s: float
    cpu_s: float
    messages: Path


def place(pid: int, symbol: str, path: str, offset: int) -> Place:
    """Return where a process has the byte ``offset`` of a file it has mapped; path may be /proc/PID/exe."""
    real = os.path.realpath(path)
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        span, flags, start, _, _, *rest = line.split(maxsplit=5)
        first, last = (int(part, 16) for part in span.split("-"))
        if rest == [real] and "x" in flags and 0 <= offset - int(start, 16) < last - first:
            return Place(symbol, real, first + offset - int(start, 16))
    raise BenchError(f"process {pid} has not mapped {symbol} of {real}")


@contextmanager
def attached(command: Sequence[str], target: int, places: Sequence[Place]) -> Iterator[Attached]:
    """Start a tracer, yield it once all its probes are in the target, and end it as Ctrl-C does.

    Raises:
        BenchError: it ended before that, or took too long; carries its last words.
    """
    wanted = {function.address for function in places}
    with tempfile.TemporaryDirectory(prefix="stallscope-bench-") as folder, _memory(target) as memory:
        messages = Path(folder) / "messages"
        with messages.open("wb") as sink:
            began = time.monotonic()
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        try:
            while _probed(memory, wanted) != wanted:
                if process.poll() is not None or time.monotonic() - began > _TIMEOUT_S:
                    raise BenchError(f"{Path(command[0]).name} did not attach: {_last_words(messages)}")
                time.sleep(_LOOK_INTERVAL_S)
            wall_s = time.monotonic() - began
            cpu_s = _cpu_s(process.pid)
            time.sleep(_SETTLE_S)
            yield Attached(process.pid, wall_s, cpu_s, messages)
        finally:
            _end(process)
        deadline = time.monotonic() + _TIMEOUT_S
        while _probed(memory, wanted) and time.monotonic() < deadline:
            time.sleep(_LOOK_INTERVAL_S)


@contextmanager
def _memory(pid: int) -> Iterator[int]:
    handle = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _probed(memory: int, addresses: set[int]) -> set[int]:
    """Return the addresses that hold a breakpoint."""
    return {address for address in addresses if os.pread(memory, 1, address)[0] == BREAKPOINT}


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:15]) / _TICKS_PER_S


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _last_words(messages: Path) -> str:
    lines = [line for line in messages.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
