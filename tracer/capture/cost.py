"""What tracing costs on this machine, measured here and now on ourselves.

A uprobe hit costs 1-3 us on hardware and 10-20 us under nested virtualisation: no constant would be
honest. So the same programs are attached to a libc function in this process and timed.
"""

from __future__ import annotations

import ctypes
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from stallscope.tracer.capture.probe_ids import MAX_PROBES
from stallscope.tracer.capture.program import Program
from stallscope.tracer.errors import StallscopeError

CALIBRATION_PROBE = MAX_PROBES - 1
"""Probe id that is compiled into the first program for the measurement only."""

_ROUNDS = 5
_CALLS_PER_ROUND = 40


def measure_call_cost_ns(program: Program) -> float:
    """Return what one traced call (entry and return probe) adds, in ns; 0.0 where it cannot be measured.

    The median of a few short rounds; under 10 ms. It leaves records with the id ``CALIBRATION_PROBE``.
    """
    function = ctypes.CDLL(None).abs
    place = _file_and_offset(ctypes.cast(function, ctypes.c_void_p).value or 0)
    if place is None:
        return 0.0
    plain_ns = _median_ns(function)
    try:
        handles = program.attach_call(CALIBRATION_PROBE, *place, os.getpid())
    except StallscopeError:
        return 0.0
    traced_ns = _median_ns(function)
    for handle in handles:
        program.detach(handle)
    return max(traced_ns - plain_ns, 0.0)


def _median_ns(function: Callable[[int], object]) -> float:
    rounds = []
    for _ in range(_ROUNDS):
        start_ns = time.perf_counter_ns()
        for _ in range(_CALLS_PER_ROUND):
            function(1)
        rounds.append((time.perf_counter_ns() - start_ns) / _CALLS_PER_ROUND)
    return sorted(rounds)[_ROUNDS // 2]


def measure_system_call_ns() -> float:
    """Return what one cheap system call takes here, in ns: before and after attaching the raw tracepoints."""
    best = float("inf")
    for _ in range(_ROUNDS):
        start_ns = time.perf_counter_ns()
        for _ in range(1000):
            os.getppid()
        best = min(best, (time.perf_counter_ns() - start_ns) / 1000)
    return best


def own_cpu_ns() -> int:
    """Return the CPU time this process has used, user and system, in ns."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return round((usage.ru_utime + usage.ru_stime) * 1e9)


def own_memory_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def _file_and_offset(address: int) -> tuple[str, int] | None:
    """Return the file that is mapped at an address of this process, and the place in it."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if start <= address < end and len(fields) == 6 and fields[5].startswith("/"):
            return fields[5], address - start + int(fields[2], 16)
    return None
