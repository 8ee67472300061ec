"""What one traced call of a function costs the traced process, ours beside bpftrace's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import workload
from attached import Place, attached
from figures import BenchError, Figure, Findings
from tracers import bpftrace, durations, places, stallscope

from stallscope.tracer.recording import read_recording

CALLS = 20_000
STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_UPROBE_PROGRAM = "2"  # Linux include/uapi/linux/bpf.h, BPF_PROG_TYPE_KPROBE


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
    with tempfile.TemporaryDirectory(prefix="stallscope-bench-") as folder, _statistics():
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
        before = _bpf_run_ns(tracer.pid)
        traced = program.run(workload.CALL, CALLS)
        bpf_ns = _bpf_run_ns(tracer.pid) - before
    return Cost((traced.wall_ns - plain.wall_ns) / CALLS, (traced.cpu_ns - plain.cpu_ns) / CALLS, bpf_ns / CALLS)


def _bpf_run_ns(pid: int) -> int:
    """Return the run time of the uprobe programs that a process holds, each once: fdinfo, ``run_time_ns``."""
    times: dict[str, int] = {}
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            fields = dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if fields.get("prog_type") == _UPROBE_PROGRAM:
            times[fields["prog_id"]] = int(fields["run_time_ns"])
    return sum(times.values())


@contextmanager
def _statistics() -> Iterator[None]:
    """Have the kernel time BPF programs for as long as this lasts."""
    before = STATS.read_text()
    STATS.write_text("1\n")
    try:
        yield
    finally:
        STATS.write_text(before)
