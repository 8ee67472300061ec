"""Stack samples as folded stacks and as speedscope's sampled profiles.

Time off the CPU is in it, under a last function that says why: ``[ready to run]``, ``[asleep]`` or ``[blocked]``.
"""

from __future__ import annotations

import json
from typing import Any, BinaryIO

import pandas as pd

from stallscope.reports.export.naming import process_names
from stallscope.reports.export.speedscope import SCHEMA
from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.sample_rows import ASLEEP, BLOCKED, RUNNABLE, STATES
from stallscope.tracer.analysis.samples import NO_STALL
from stallscope.tracer.stack_table import StackFrame
from stallscope.tracer.units import format_duration_ns

NS_PER_US = 1000
MAX_STALLS = 200
"""So many stalls have a profile of their own in speedscope's file: the longest."""

OFF_CPU = {RUNNABLE: "[ready to run]", ASLEEP: "[asleep]", BLOCKED: "[blocked]"}
IN_STALLS, BETWEEN_STALLS = "in stalls", "between stalls"


def write_folded(analysis: Analysis, out: BinaryIO) -> None:
    """Write a line for each different stack with its time in microseconds, for flamegraph.pl and inferno.

    The first frame is the process, the second, where samples were taken outside of stalls too, which of the two it
    was. Semicolons in names become colons; stacks below half a microsecond are left out.
    """
    samples = analysis.samples
    frame = samples.frame.assign(in_stall=samples.frame["stall"] != NO_STALL)
    both = frame["in_stall"].nunique() > 1
    sums = frame.groupby(["pid", "in_stall", "stack", "state"], sort=True, observed=True)["weight_ns"].sum()
    names = process_names(analysis.manifest, frame["pid"].unique().tolist())
    lines: dict[str, int] = {}
    for pid, in_stall, stack, state, weight_ns in sums.reset_index().itertuples(index=False, name=None):
        parts = [f"{names[pid]} ({pid})", *([IN_STALLS if in_stall else BETWEEN_STALLS] if both else [])]
        parts += [item.name for item in _functions(analysis, stack, state)]
        line = ";".join(part.replace(";", ":") for part in parts)
        lines[line] = lines.get(line, 0) + int(weight_ns)
    told = ((line, round(weight_ns / NS_PER_US)) for line, weight_ns in sorted(lines.items()))
    out.write("".join(f"{line} {weight_us}\n" for line, weight_us in told if weight_us).encode())


def write_speedscope(analysis: Analysis, out: BinaryIO) -> None:
    """Write a profile of all stalls together, of each of the longest, and of everything sampled, by process."""
    frame = analysis.samples.frame
    stalls = analysis.stalls.frame
    names = process_names(analysis.manifest, frame["pid"].unique().tolist())
    frames: dict[tuple[str, str], int] = {}
    profiles = []
    for pid, mine in frame.groupby("pid", sort=True):
        name = f"{names[int(str(pid))]} ({pid})"
        inside = mine.loc[mine["stall"] != NO_STALL]
        if len(inside):
            profiles.append(_profile(analysis, f"{name}, stalls", inside, frames))
        longest = stalls.loc[inside["stall"].unique()].nlargest(MAX_STALLS, "duration_ns").index.sort_values()
        starts, lengths = (stalls.loc[longest, column].tolist() for column in ("start_ns", "duration_ns"))
        for stall, start_ns, length_ns in zip(longest.tolist(), starts, lengths, strict=True):
            place = (
                f"stall of {format_duration_ns(length_ns)} at {(start_ns - analysis.manifest.started_ns) / 1e9:.3f} s"
            )
            profiles.append(_profile(analysis, f"{name}, {place}", inside.loc[inside["stall"] == stall], frames))
        if len(inside) < len(mine):
            profiles.append(_profile(analysis, f"{name}, everything sampled", mine, frames))
    document = {
        "$schema": SCHEMA,
        "exporter": "stallscope",
        "name": analysis.recording.path.name,
        "activeProfileIndex": 0,
        "shared": {"frames": [{"name": name} | ({"file": file} if file else {}) for name, file in frames]},
        "profiles": profiles or [_profile(analysis, "no samples", frame, frames)],
    }
    out.write(json.dumps(document, separators=(",", ":")).encode() + b"\n")


def _profile(
    analysis: Analysis, name: str, samples: pd.DataFrame, frames: dict[tuple[str, str], int]
) -> dict[str, Any]:
    """Return a sampled profile, in the order of time; what is new is added to ``frames``."""
    stacks = []
    known: dict[tuple[int, str], list[int]] = {}
    for key in zip(samples["stack"], samples["state"], strict=True):
        if key not in known:
            known[key] = [frames.setdefault((item.name, item.file), len(frames)) for item in _functions(analysis, *key)]
        stacks.append(known[key])
    weights = samples["weight_ns"].tolist()
    return {
        "type": "sampled",
        "name": name,
        "unit": "nanoseconds",
        "startValue": 0,
        "endValue": sum(weights),
        "samples": stacks,
        "weights": weights,
    }


def _functions(analysis: Analysis, stack: int, state: str) -> list[StackFrame]:
    frames = list(analysis.samples.functions_of(int(stack)))
    return frames if state == STATES[0] else [*frames, StackFrame(OFF_CPU[state], "")]
