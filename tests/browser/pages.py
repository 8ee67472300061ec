"""Recordings for the browser that the golden files do not have: several servers, and imported rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from captures import WALL_NS, Connection, in_order, pcap
from recordings import (
    LIMIT,
    PURGE,
    QUEUE_ID,
    Builder,
    Counters,
    ListenerInfo,
    TargetInfo,
    add_storm,
    at,
    hits_of,
    manifest,
    quiet,
)

from stallscope.reports.timeline.calls import CALL_BUDGET
from stallscope.reports.timeline.compute import build_timeline
from stallscope.reports.timeline.page import render
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.imports.run import run_import
from stallscope.tracer.recording import RecordingWriter, read_recording

OTHER_PID = 4811
STARTED_WALL_NS = 1_750_000_000 * 10**9


def write_page(recording: Path, budget: int = CALL_BUDGET) -> Path:
    """Write the page of a recording beside it."""
    page = recording.with_suffix(".html")
    page.write_text(render(build_timeline(analyse(read_recording(recording)), budget=budget)), encoding="utf-8")
    return page


def several_servers(path: Path) -> Path:
    """Write two servers with a storm each, at 1 and at 2.5 s; the first has a second thread that purges."""
    first = manifest()
    both = replace(
        first,
        targets=(*first.targets, TargetInfo(OTHER_PID, at(400), "/opt/redis3/redis-server", version="3.0.5")),
        listeners=(*first.listeners, ListenerInfo(1, "127.0.0.1:6380", 6380, OTHER_PID, 1002, 0, LIMIT)),
    )
    builder = add_storm(Builder(both), 1000).span(PURGE, 1200, 300, 8_000_000, tid=4713)
    other = add_storm(Builder(both, tid=OTHER_PID), 2500, 943, 83).events()
    other["pid"] = OTHER_PID
    other["value"][:, 2] = np.where(other["probe"] == QUEUE_ID, 1, other["value"][:, 2])
    events = np.concatenate([builder.events(), other])
    counters = Counters(at(4000), hits_of(events, both.probes))
    namespace = replace(both.namespaces[0], counters_end={"ListenOverflows": 986, "ListenDrops": 1036})
    final = replace(both, ended_ns=at(4000), ended_by="duration", namespaces=(namespace,))
    writer = RecordingWriter(path, both)
    writer.finish(events, counters, final)
    return path


def imported(path: Path) -> Path:
    """Write a storm with a capture, a SLOWLOG and INFO dumps beside it."""
    storm = quiet(add_storm(Builder(), 1000), 4000, overflow=943, drops=83, after_ms=2000)
    recording = storm.write(path.with_name("storm.stall"), 4000, overflows_end=943)
    ahead_ms = (STARTED_WALL_NS - WALL_NS) / 1e6
    capture = path.with_name("storm.pcap")
    attempts = [Connection(peer_port=1000 + index).syn(ahead_ms + 1510 + index) for index in range(20)]
    capture.write_bytes(pcap(in_order(*(item.syn(ahead_ms + 2520) for item in attempts)), nanoseconds=True))
    slowlog = path.with_name("slowlog.txt")
    second = STARTED_WALL_NS // 10**9 + 2
    slowlog.write_text(
        f'1) 1) (integer) 7\n   2) (integer) {second}\n   3) (integer) 15000\n   4) 1) "KEYS"\n      2) "*"\n'
    )
    dumps = path.with_name("info.txt")
    dumps.write_text(
        "".join(
            f"{second - 2 + index}.5\n# Clients\nconnected_clients:{100 + 7 * index}\n# Memory\nused_memory:{10**9}\n"
            for index in range(4)
        )
    )
    run_import((capture, slowlog, dumps), recording, path, (), 0, force=True, command=("stallscope", "import"))
    return path
