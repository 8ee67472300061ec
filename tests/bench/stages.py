"""Works one recording through and writes its page; prints seconds and peak memory of each stage as JSON.

    python tests/bench/stages.py REC.stall PAGE.html

A process of its own for every recording: memory that an earlier one has freed is not used again here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stallscope.reports.timeline.compute import build_timeline
from stallscope.reports.timeline.page import render
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.recording import read_recording

_T = TypeVar("_T")


def main() -> None:
    """Measure the stages one after the other."""
    recording, page = Path(sys.argv[1]), Path(sys.argv[2])
    stages: list[dict[str, str | float]] = []

    def measured(name: str, work: Callable[[], _T]) -> _T:
        _forget_peak()
        began = time.perf_counter()
        result = work()
        stages.append({"name": name, "seconds": time.perf_counter() - began, "peak_mb": _peak_mb()})
        return result

    read = measured("load", lambda: read_recording(recording))
    analysis = measured("analysis", lambda: analyse(read))
    timeline = measured("report: lanes", lambda: build_timeline(analysis))
    measured("report: page", lambda: page.write_text(render(timeline), encoding="utf-8"))
    print(json.dumps(stages))


def _forget_peak() -> None:
    """Let VmHWM start again from the memory in use (Linux, proc_pid_clear_refs(5))."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024


if __name__ == "__main__":
    main()
