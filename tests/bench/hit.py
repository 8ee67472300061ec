"""What one traced call of a function costs the traced process, ours beside bpftrace's."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import workload
from attached import Place, attached
from bpf_statistics import UPROBE_PROGRAMS, kernel_statistics, run_statistics
from figures import BenchError, Figure, Findings
from tracers import bpftrace, durations, places, stallscope

from stallscope.tracer.recording import read_recording

CALLS = 20_000


@dataclass(frozen=True)
class Cost:
    """Of one call (entry and return): wall-clock and CPU time added, and time inside the BPF programs, ns."""

    wall_ns: float
    cpu_ns: float
    bpf_ns: float


def bench(*, quick: bool) -> Findings:
    """Return the cost of a call by the program's own clocks, by the kernel's, and by our calibration."""
    rounds = 2 if quick else 5
    found = Findings(f"hit: one call with entry and return probe, of {CALLS:,} in a C loop")
    ours: list[Cost] = []
    theirs: list[Cost] = []
    calibrated: list[float] = []
    with tempfile.TemporaryDirectory(prefix="stallscope-bench-") as folder, kernel_statistics():
        output = Path(folder) / "hit.stall"
        with workload.running(workload.build(Path(folder))) as program:
            functions = places(program.pid, [workload.FUNCTION], any_program=True)
            options = ("--no-default-probes", "--probe", workload.FUNCTION)
            for _ in range(rounds):
                ours.append(_cost(stallscope(program.pid, output, *options), program, functions))
                calibrated.append(read_recording(output).manifest.cost["call_cost_ns"])
                try:
                    theirs.append(_cost(bpftrace(program.pid, durations(functions)), program, functions))
                except BenchError as error:
                    found.notes.append(str(error))
    peer = "bpftrace, hist"
    found.figures = [
        Figure("wall added per call, ns", [c.wall_ns for c in ours], peer, [c.wall_ns for c in theirs]),
        Figure("CPU added per call, ns", [c.cpu_ns for c in ours], peer, [c.cpu_ns for c in theirs]),
        Figure("  of it in the two BPF programs, ns", [c.bpf_ns for c in ours], peer, [c.bpf_ns for c in theirs]),
        Figure("our calibration beside the C loop, ns", calibrated, "our own wall added", [c.wall_ns for c in ours]),
    ]  # fmt: skip
    found.notes.append("ours keeps every call with its arguments and times; bpftrace only counts it into a histogram")
    return found


def _cost(command: Sequence[str], program: workload.Workload, functions: Sequence[Place]) -> Cost:
    plain = program.run(workload.CALL, CALLS)
    with attached(command, program.pid, functions) as tracer:
        before = run_statistics(tracer.pid, UPROBE_PROGRAMS).run_ns
        traced = program.run(workload.CALL, CALLS)
        bpf_ns = run_statistics(tracer.pid, UPROBE_PROGRAMS).run_ns - before
    return Cost((traced.wall_ns - plain.wall_ns) / CALLS, (traced.cpu_ns - plain.cpu_ns) / CALLS, bpf_ns / CALLS)
