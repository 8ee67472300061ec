"""The two tracers side by side: the commands that put the same probes on a process."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from attached import Place, place
from figures import BenchError

from stallscope.probes.catalogue import default_functions
from stallscope.tracer.capture.redis_target import open_target
from stallscope.tracer.capture.symbols import resolve

# Linux arch/x86/entry/syscalls/syscall_64.tbl: epoll_wait, epoll_pwait, epoll_pwait2
_WAITS = (232, 281, 441)


def places(pid: int, functions: Sequence[str] = (), *, any_program: bool = False) -> list[Place]:
    """Return where our tracer would attach in a process: the default set, or these functions."""
    target = open_target(pid, any_program=any_program)
    try:
        found = resolve(target.image, functions or default_functions(), redis_version=target.version or None)
        spots = {(spot.offset, spot.path): spot for resolution in found for spot in resolution.attachments}
        return [place(pid, spot.symbol, spot.path, spot.offset) for spot in spots.values()]
    finally:
        target.close()


def stallscope(pid: int, output: Path, *options: str) -> list[str]:
    """Return the command that records a process until it is interrupted."""
    script = Path(sys.executable).with_name("stallscope")
    start = [str(script)] if script.is_file() else [sys.executable, "-m", "stallscope.tracer.cli"]
    return [*start, "record", "-p", str(pid), "-o", str(output), "--force", *options]


def bpftrace(pid: int, program: str) -> list[str]:
    """Return the command that runs a program on one process.

    Raises:
        BenchError: bpftrace is not installed.
    """
    path = shutil.which("bpftrace")
    if path is None:
        raise BenchError("bpftrace is not installed; apt-get install bpftrace")
    return [path, "-p", str(pid), "-e", program]


def durations(functions: Sequence[Place]) -> str:
    """Return a bpftrace program that keeps a histogram of each function's durations."""
    return "\n".join(
        f"uprobe:{function.path}:{function.symbol} {{ @start[tid, {number}] = nsecs; }}\n"
        f"uretprobe:{function.path}:{function.symbol} /@start[tid, {number}]/ "
        f"{{ @took[{number}] = hist(nsecs - @start[tid, {number}]); delete(@start[tid, {number}]); }}"
        for number, function in enumerate(functions)
    )


def loop_by_tracepoints(pid: int) -> str:
    """Return a bpftrace program for event loop iterations and accepts, on raw tracepoints as ours."""
    waits = " || ".join(f"@call[tid] == {number}" for number in _WAITS)
    return f"""
rawtracepoint:sys_enter /pid == {pid}/ {{ @call[tid] = arg1; @entered[tid] = nsecs;
  if (({waits}) && @began[tid]) {{ @iteration = hist(nsecs - @began[tid]); @began[tid] = 0; }} }}
rawtracepoint:sys_exit /pid == {pid}/ {{ if ({waits}) {{ @began[tid] = nsecs; }}
  if (@call[tid] == 43 || @call[tid] == 288) {{ @accept = hist(nsecs - @entered[tid]); }} }}"""


def loop_by_libc(pid: int) -> str:
    """Return a bpftrace program for the same through probes on the C library's functions.

    Raises:
        BenchError: the process has no C library mapped.
    """
    libc = next(
        (
            line.split(maxsplit=5)[5]
            for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
            if "/libc.so" in line or "/libc-" in line
        ),
        None,
    )
    if libc is None:
        raise BenchError(f"process {pid} has no libc.so mapped")
    return f"""
uprobe:{libc}:epoll_wait /@began[tid]/ {{ @iteration = hist(nsecs - @began[tid]); @began[tid] = 0; }}
uretprobe:{libc}:epoll_wait {{ @began[tid] = nsecs; }}
uprobe:{libc}:accept {{ @entered[tid] = nsecs; }}
uretprobe:{libc}:accept /@entered[tid]/ {{ @accept = hist(nsecs - @entered[tid]); }}"""


@cache
def why_no_tracepoints() -> str:
    """Return why bpftrace cannot use raw tracepoints here, "" if it can (they came with version 0.19)."""
    path = shutil.which("bpftrace")
    if path is None:
        return "it is not installed"
    version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.split()[-1]
    done = subprocess.run(
        [path, "-e", "rawtracepoint:sys_enter { exit(); }"],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "RLIMIT_MEMLOCK" not in line]
    return f"{version} says: {lines[-1]}" if done.returncode and lines else ""
