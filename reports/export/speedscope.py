"""speedscope's own file format, evented (https://www.speedscope.app/file-format-schema.json).

A profile for each thread, with an entry ("O") and a return ("C") of every call, in nanoseconds since the
recording's start; so the time-order view is a timeline of calls and the left-heavy view adds up equal paths.
A profile for each event loop has the stalls. Calls and stalls under way at the end are closed at the end of the
recording. The format has no place for arguments, counters or instants: overflows and queues are in the other
formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from stallscope.reports.export.arrow_text import joined, run_of_text
from stallscope.reports.export.call_edges import Edges, call_edges
from stallscope.reports.export.naming import call_names, process_names
from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.tables import Ints

SCHEMA = "https://www.speedscope.app/file-format-schema.json"
STALL = "stall"


@dataclass(frozen=True)
class _Profile:
    """One profile.

    Attributes:
        edges: entries and returns; frames: the place in the list of frames of what each ``edges.call`` is.
    """

    name: str
    edges: Edges
    frames: Ints


def write(analysis: Analysis, out: BinaryIO) -> None:
    """Write the profile of every thread, the one with most self time first, and of every event loop that stalled."""
    names = call_names(analysis.manifest)
    paths = {probe.id: probe.path for probe in analysis.manifest.probes}
    frames = [{"name": name} | ({"file": paths[probe]} if paths[probe] else {}) for probe, name in names.items()]
    head = {
        "$schema": SCHEMA,
        "exporter": "stallscope",
        "name": analysis.recording.path.name,
        "activeProfileIndex": 0,
        "shared": {"frames": [*frames, {"name": STALL}]},
    }
    out.write(json.dumps(head).encode()[:-1] + b',"profiles":[')
    prefixes = _prefixes(len(frames) + 1)
    profiles = [
        *_threads(analysis, {probe: place for place, probe in enumerate(names)}),
        *_stalls(analysis, len(frames)),
    ]
    nothing = np.zeros(0, np.int64)
    for number, profile in enumerate(profiles or [_Profile("no calls", Edges(nothing, nothing > 0, nothing), nothing)]):
        out.write(b",\n" if number else b"\n")
        _write_profile(profile, prefixes, analysis, out)
    out.write(b"\n]}\n")


def _threads(analysis: Analysis, place: dict[int, int]) -> Iterator[_Profile]:
    calls = analysis.nested.calls
    edges = call_edges(analysis.nested)
    lookup = np.zeros(max(place, default=0) + 1, np.int64)
    lookup[list(place)] = list(place.values())
    frames = lookup[calls["probe"].to_numpy()]
    threads = calls.groupby(["pid", "tid"], sort=True)["self_ns"].sum().sort_values(ascending=False, kind="stable")
    processes = process_names(analysis.manifest, threads.index.get_level_values("pid"))
    tid = calls["tid"].to_numpy()
    for pid, thread in threads.index:
        low, high = (2 * int(place) for place in np.searchsorted(tid, [thread, thread + 1]))
        name = f"{processes[pid]} ({pid})" + ("" if pid == thread else f" thread {thread}")
        yield _Profile(name, edges.part(low, high), frames)


def _stalls(analysis: Analysis, frame: int) -> Iterator[_Profile]:
    for (pid, thread), stalls in analysis.stalls.frame.groupby(["pid", "tid"], sort=True):
        start = stalls["start_ns"].to_numpy()
        count = len(stalls)
        edges = Edges(
            np.repeat(np.arange(count), 2),
            np.tile([True, False], count),
            np.maximum.accumulate(np.stack([start, start + stalls["duration_ns"].to_numpy()], axis=1).ravel()),
        )
        yield _Profile(f"stalls of process {pid}, thread {thread}", edges, np.full(count, frame))


def _prefixes(frames: int) -> pa.Array:
    """Return how an event begins, by twice its frame and one more for an entry."""
    return pa.array(
        [f'{{"type":"{kind}","frame":{frame},"at":' for frame in range(frames) for kind in ("C", "O")], pa.string()
    )


def _write_profile(profile: _Profile, prefixes: pa.Array, analysis: Analysis, out: BinaryIO) -> None:
    origin_ns = analysis.manifest.started_ns
    times = profile.edges.time_ns
    head = {
        "type": "evented",
        "name": profile.name,
        "unit": "nanoseconds",
        "startValue": int(min(times.min(initial=origin_ns), origin_ns)) - origin_ns,
        "endValue": int(max(times.max(initial=origin_ns), analysis.tables.end_ns)) - origin_ns,
    }
    out.write(json.dumps(head).encode()[:-1] + b',"events":[')
    first = True
    for edges in profile.edges.chunks():
        prefix = prefixes.take(pa.array(2 * profile.frames[edges.call] + edges.enters))
        text = run_of_text(joined(",", prefix, pa.array(edges.time_ns - origin_ns), "}"))
        out.write(text[1:] if first else text)
        first = False
    out.write(b"]}")
