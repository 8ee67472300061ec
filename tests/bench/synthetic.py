"""Writes recordings of any size that look like the incident: quiet cron ticks, and a storm now and then.

    python tests/bench/synthetic.py 10000000 big.stall

Everything is computed for whole arrays; ten million rows take a few seconds. The numbers have no meaning beyond
their size and shape: nested calls of five functions, accepted connections, queue samples and counters.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "unit")]

import recordings  # noqa: E402

from stallscope.tracer.layout import NO_STACK  # noqa: E402
from stallscope.tracer.manifest import Counters  # noqa: E402
from stallscope.tracer.recording import RecordingWriter, empty_events  # noqa: E402

CLIENTS = 50
"""Clients visited in one tick, as Redis 2.8 does."""

TICK_NS = 100_000_000
STORM_EVERY = 600
_ACCEPTS = 20
_ROWS = 3 + 3 * CLIENTS + _ACCEPTS + 1
"""Rows of a tick: iteration, serverCron, clientsCron; three calls a client; accepts; a sample of the queue."""

_BATCH_TICKS = 2_000


def write(path: Path, rows: int) -> int:
    """Write a recording of about this many rows; return how many there are."""
    ticks = max(rows // _ROWS, 2)
    random = np.random.default_rng(20_241_124)
    manifest = recordings.manifest(min_duration_ns=0)
    writer = RecordingWriter(path, manifest)
    written, overflows = 0, 900
    every = []
    for first in range(0, ticks, _BATCH_TICKS):
        count = min(_BATCH_TICKS, ticks - first)
        events, overflows = _ticks(first, count, overflows, random)
        every.append(_hits(events))
        written += len(events)
        writer.write(events)
    end_ns = recordings.STARTED_NS + (ticks + 1) * TICK_NS
    hits = np.sum(every, axis=0)
    counters = {
        probe.id: recordings.ProbeCounters(hits=int(hits[probe.id]), sent=int(hits[probe.id]))
        for probe in recordings.PROBES
        if probe.id not in (recordings.QUEUE_ID, recordings.COUNTER_ID)
    }
    namespace = replace(
        manifest.namespaces[0], counters_end={"ListenOverflows": overflows, "ListenDrops": overflows + 50}
    )
    final = replace(manifest, ended_ns=end_ns, ended_by="duration", namespaces=(namespace,))
    writer.finish(empty_events(), Counters(end_ns, counters), final)
    return written


def _ticks(first: int, count: int, overflows: int, random: np.random.Generator) -> tuple[npt.NDArray[np.void], int]:
    """Return the rows of some ticks in the order of their ends, and ListenOverflows after them."""
    number = np.arange(first, first + count)
    storm = number % STORM_EVERY == STORM_EVERY // 2
    begin = recordings.STARTED_NS + (number + 1) * TICK_NS
    purge = random.lognormal(8.2, 0.6, (count, CLIENTS))
    trim = purge + random.lognormal(9.0, 0.8, (count, CLIENTS))
    # all of a tick's calls together fit into it, in a storm nearly filling it
    scale = np.where(storm, 0.85 * TICK_NS / trim.sum(axis=1), 1)[:, None]
    purge, trim = (purge * scale).astype(np.int64), (trim * scale).astype(np.int64)
    resize = trim + 400
    ends = np.cumsum(resize + 200, axis=1) + 3_000 + begin[:, None]
    starts = ends - resize
    last = ends[:, -1]
    parts = [
        _rows(recordings.RESIZE, starts, resize, 77, 32_768 + trim, trim),
        _rows(recordings.TRIM, starts + 200, trim, 16_384, trim),
        _rows(recordings.PURGE, starts + 300, purge, purge),
        _rows(recordings.CLIENTS, begin + 2_000, last + 500 - begin - 2_000),
        _rows(recordings.CRON, begin + 1_000, last + 1_500 - begin - 1_000),
        _rows(recordings.ITERATION_ID, begin, last + 3_000 - begin, 4),
    ]
    accepted = last[:, None] + 5_000 + np.arange(_ACCEPTS) * 20_000
    parts.append(_rows(recordings.ACCEPT_ID, accepted, np.full(accepted.shape, 5_000), 5, 100))
    queue = np.where(storm, 512, random.integers(0, 4, count))
    drops = overflows + np.cumsum(np.where(storm, 37, 0))
    parts.append(_rows(recordings.QUEUE_ID, last - 1_000, np.zeros(count, np.int64), queue | 511 << 32, drops, 0))
    parts.append(_rows(recordings.COUNTER_ID, last - 900, np.zeros(count, np.int64), 0, drops, 0))
    events = np.concatenate(parts)
    order = np.argsort(events["start_ns"] + events["duration_ns"], kind="stable")
    return events[order], int(drops[-1])


def _rows(
    probe: int, start: npt.NDArray[np.int64], duration: npt.NDArray[np.int64], *values: int | npt.NDArray[np.int64]
) -> npt.NDArray[np.void]:
    events = empty_events(start.size)
    events["start_ns"], events["duration_ns"] = start.ravel(), duration.ravel()
    for slot, value in enumerate(values):
        events["value"][:, slot] = np.broadcast_to(value, start.shape).ravel()
    events["probe"], events["stack"] = probe, NO_STACK
    events["pid"] = events["tid"] = recordings.PID
    return events


def _hits(events: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    return np.bincount(events["probe"], minlength=16)


def main() -> None:
    """Write one recording."""
    rows, path = int(sys.argv[1]), Path(sys.argv[2])
    print(f"{path}: {write(path, rows):,} rows")


if __name__ == "__main__":
    main()
