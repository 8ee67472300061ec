"""Memory and losses of the real ``stallscope record`` at five million events.

The traced program calls epoll_wait in a loop; with ``--stall 0`` every iteration is one record. So the
records come through the probes, the ring and the loop that a user's recording goes through, only faster
than a Redis server could cause them (a probed function would take minutes to be called that often).
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import workload
from attached import attached
from figures import BenchError, Figure, Findings
from tracers import places, stallscope

from stallscope.tracer.recording import Recording, read_recording

EVENTS = 5_000_000
FULL_RATE = 400_000
STEADY_RATE = 200_000
GOAL_MB = 150
_LOOK_INTERVAL_S = 0.005


def bench(*, quick: bool) -> Findings:
    """Return peak memory of the recorder and of its compiler process, own CPU per event, and losses."""
    found = Findings(f"record: the whole process at {EVENTS:,} events, at {FULL_RATE:,} and {STEADY_RATE:,} a second")
    with tempfile.TemporaryDirectory(prefix="stallscope-bench-") as folder:
        program = workload.build(Path(folder))
        for count, rate in ((EVENTS, FULL_RATE), (STEADY_RATE * (3 if quick else 15), STEADY_RATE)):
            _record(found, program, Path(folder) / "memory.stall", count, rate)
    return found


def _record(found: Findings, path: Path, output: Path, count: int, rate: int) -> None:
    with workload.running(path) as program:
        functions = places(program.pid, [workload.FUNCTION], any_program=True)
        command = stallscope(
            program.pid, output, "--no-default-probes", "--probe", workload.FUNCTION, "--stall", "0", "-q"
        )
        with _compiler_peak() as compiler, attached(command, program.pid, functions) as tracer:
            program.run(workload.WAIT, count, rate)
            peak_mb = _status_mb(tracer.pid, "VmHWM")
    recording = read_recording(output)
    sent, lost = _counted(recording)
    cpu_ns = recording.manifest.cost["own_cpu_ns"] / max(sent, 1)
    if count == EVENTS:
        found.figures += [
            Figure("peak memory of record, MB", [peak_mb], goal=f"under {GOAL_MB} MB", met=peak_mb < GOAL_MB),
            Figure("  of its compiler process (gone before recording), MB", [compiler.peak_mb]),
        ]
    found.figures += [
        Figure(f"{count:,} events at {rate:,}/s: whole process, CPU per event, ns", [cpu_ns]),
        Figure("  rows in the file", [float(recording.table.num_rows)]),
        Figure("  events lost", [float(lost)], goal="0" if rate == STEADY_RATE else "", met=lost == 0),
    ]


def _counted(recording: Recording) -> tuple[int, int]:
    """Return how many records were sent and lost, by the kernel's own counters."""
    if recording.counters is None or not recording.complete:
        raise BenchError(f"{recording.path} has no footer")
    probes = recording.counters.by_probe.values()
    return sum(probe.sent for probe in probes), sum(probe.missing for probe in probes)


class _CompilerPeak:
    """Peak memory of the recorder's compiler process, looked at while it lives."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self.over = threading.Event()

    def watch(self) -> None:
        """Look until ``over``; it is our child's child, and the kernel keeps its peak for us."""
        while not self.over.wait(_LOOK_INTERVAL_S):
            with suppress(psutil.Error, OSError, StopIteration):
                for recorder in psutil.Process().children():
                    for compiler in recorder.children():
                        self.peak_mb = max(self.peak_mb, _status_mb(compiler.pid, "VmHWM"))


@contextmanager
def _compiler_peak() -> Iterator[_CompilerPeak]:
    peak = _CompilerPeak()
    thread = threading.Thread(target=peak.watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        peak.over.set()
        thread.join()


def _status_mb(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1]) / 1024
