"""Folded stacks: a line for each call path with its self time, for flamegraph.pl, inferno and speedscope.

    redis-server 2.8.17 (4711);serverCron;clientsCron 16000

The first frame is the process (with ``thread TID`` where it is not the main thread), the number the self time of
all calls of that path, in microseconds (rounded, paths below half a microsecond left out). Calls under way at the
end count until the end of the recording. Semicolons in names become colons.
"""

from __future__ import annotations

from typing import BinaryIO

from stallscope.reports.export.naming import call_names, process_names
from stallscope.tracer.analysis.analysis import Analysis

NS_PER_US = 1000


def write(analysis: Analysis, out: BinaryIO) -> None:
    """Write all paths, by thread and in the order of the call tree."""
    nested = analysis.nested
    names = call_names(analysis.manifest)
    by_path = nested.calls.groupby(["pid", "tid", "path"], sort=True)["self_ns"].sum().reset_index()
    processes = process_names(analysis.manifest, nested.calls["pid"].unique().tolist())
    lines = []
    for pid, tid, path, self_ns in by_path.to_numpy().tolist():
        thread = f"{processes[pid]} ({pid})" + ("" if tid == pid else f" thread {tid}")
        frames = [thread, *(names[probe] for probe in nested.path(path))]
        self_us = round(self_ns / NS_PER_US)
        if self_us:
            lines.append(";".join(frame.replace(";", ":") for frame in frames) + f" {self_us}\n")
    out.write("".join(sorted(lines)).encode())
