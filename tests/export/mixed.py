"""A recording with everything an exporter may stumble over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from recordings import (
    CRON,
    FREE,
    ITERATION_ID,
    LIMIT,
    PID,
    PURGE,
    REQUEST_ID,
    STARTED_NS,
    TRIM,
    WALL_OFFSET_NS,
    Builder,
    add_storm,
    at,
    hooked_manifest,
)

from stallscope.tracer.layout import UNFINISHED_NS
from stallscope.tracer.manifest import Counters, ListenerInfo, NamespaceInfo, Note, ProbeCounters, TargetInfo
from stallscope.tracer.recording import RecordingWriter

OTHER_PID, OTHER_THREAD = 4712, 4713
END_MS = 4000
DRIFT_NS = 1500
NOTE = 'a note with "quotes", a ; and an ü'


def mixed_recording(path: Path) -> Path:
    """Write a recording of two processes and three threads.

    The truth, beside the storm of process 4711 at 1000 ms:
    - thread 4713 of 4711 purges 3 times, 5 ms each, at 1100, 1105 and 1110 ms: one ends when the next begins.
    - 4712 calls freeClient inside itself, four deep: 2000 ms + 0, 1, 2, 3 ms, each 2 ms shorter than the one around;
      and a freeClient of no length at 2003.5 ms in the innermost. One more began 20 ms before the recording, for 5 ms.
    - 4711 began a serverCron at 3900 ms, and in it a trim at 3910 ms, that had not returned at 4000 ms.
    - a purge begun at 1050 ms inside the storm's iteration never returned: it was abandoned.
    - at 2500 ms ListenOverflows grew by 7 in the second namespace, whose listener (of 4712) has no drops: they
      belong to no stall.
    - one client of 4712's listener comes over IPv6.
    - the wall clock gained 1500 ns on the other until the end.
    """
    first = add_storm(Builder(), 1000)
    first.span(CRON, 3900, None).span(TRIM, 3910, None, 5, 6).span(PURGE, 1050, None, 4096)
    for start_ms in (1100, 1105, 1110):
        first.span(PURGE, start_ms, 5, 8192, tid=OTHER_THREAD)
    second = Builder(tid=OTHER_PID)
    for level in range(4):
        second.span(FREE, 2000 + level, 8 - 2 * level)
    second.span(FREE, 2003.5, 0)
    second.span(ITERATION_ID, 1999, 12, 3, 2)
    second.span(FREE, -20, 5)
    second.queue(2400, 1, 0, listener=1).queue(2500, 512, 0, listener=1).queue(2600, 0, 0, listener=1)
    second.counter(2400, 50, namespace=1).counter(2500, 57, namespace=1)
    second.request(2450, "SYN taken", 33333, listener=1, peer=(0x20010DB8 << 32, 1))
    second.request(2451, "connection accepted", 33333, listener=1, peer=(0x20010DB8 << 32, 1), wait_ms=2)
    parts = [first.events(), second.events()]
    parts[1]["pid"] = OTHER_PID
    events = np.concatenate(parts)
    ends = np.where(events["duration_ns"] == UNFINISHED_NS, at(END_MS), events["start_ns"] + events["duration_ns"])
    events = events[np.argsort(ends, kind="stable")]
    made = hooked_manifest()
    other = TargetInfo(OTHER_PID, STARTED_NS, "/usr/bin/valkey-server", version="8.1", namespace=1)
    made = replace(
        made,
        targets=(*made.targets, other),
        listeners=(*made.listeners, ListenerInfo(1, "[::1]:6380", 6380, OTHER_PID, 1002, 1, LIMIT)),
        namespaces=(*made.namespaces, NamespaceInfo(1, 4026531999, {"ListenOverflows": 50})),
        notes=(Note(at(3000), NOTE),),
        # overflows are attributed by drops, as where nothing is hooked: not every overflow is a row
        rungs={**made.rungs, "overflows": "sampled every 10 ms"},
    )
    counters = Counters(
        at(END_MS), {PURGE: ProbeCounters(hits=12, sent=9, lost=3), REQUEST_ID["SYN taken"]: ProbeCounters(1, 1)}
    )
    writer = RecordingWriter(path, made)
    writer.write(events)
    final = replace(made, ended_ns=at(END_MS), wall_offset_end_ns=WALL_OFFSET_NS + DRIFT_NS, ended_by="duration")
    writer.finish(events[:0], counters, final)
    assert set(events["pid"].tolist()) == {PID, OTHER_PID}
    return path
