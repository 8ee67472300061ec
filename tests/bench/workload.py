"""The C program that the benches trace, and what it takes to build and command it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from figures import BenchError

SOURCE = Path(__file__).with_name("workload.c")
FUNCTION = "traced_call"
GETPPID, WAIT, CALL, CONNECT = "getppid", "wait", "call", "connect"


@dataclass(frozen=True)
class Run:
    """What one run took: events, and wall-clock and CPU time of the process in ns."""

    events: int
    wall_ns: int
    cpu_ns: int


class Workload:
    """The running program."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self._process = process
        self.path = path
        self.pid = process.pid
        assert process.stdout is not None
        self.port = int(process.stdout.readline())

    def start(self, work: str, count: int, rate: int = 0) -> None:
        """Begin ``count`` events at ``rate`` per second (0: as fast as it goes)."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{work} {count} {rate}\n")
        self._process.stdin.flush()

    def result(self) -> Run:
        """Wait for the end of what was started."""
        assert self._process.stdout is not None
        events, wall_ns, cpu_ns = map(int, self._process.stdout.readline().split())
        return Run(events, wall_ns, cpu_ns)

    def run(self, work: str, count: int, rate: int = 0) -> Run:
        """Begin and wait."""
        self.start(work, count, rate)
        return self.result()


def build(folder: Path) -> Path:
    """Return the compiled program.

    Raises:
        BenchError: there is no C compiler, or it fails.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BenchError("no C compiler for the traced program; apt-get install gcc")
    path = folder / "workload"
    done = subprocess.run([compiler, "-O2", "-pthread", "-o", path, SOURCE], capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{SOURCE.name} does not compile: {done.stderr.strip().splitlines()[0]}")
    return path


@contextmanager
def running(path: Path) -> Iterator[Workload]:
    """Start the program and stop it at the end, by its pid."""
    process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Workload(process, path)
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
