"""What another trim threshold would have changed, from the arguments of the recorded trims.

Redis trims a client's query buffer when more of it is unused than a threshold (1 KB up to 4.0, 4 KB since
commit cec404f0 in 5.0-rc4). With a higher one, those with less unused space are left alone: the time of
their trims is saved, and their unused space stays allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.clients import CLIENT_ID, FD
from stallscope.tracer.analysis.nesting import Nested
from stallscope.tracer.analysis.segments import range_of, sum_by
from stallscope.tracer.analysis.stalls import Stalls
from stallscope.tracer.analysis.tables import Ints, Tables
from stallscope.tracer.analysis.trees import CLIENT_VISIT
from stallscope.tracer.manifest import CALL, Manifest, ProbeCounters

TRIM = "sdsRemoveFreeSpace"

DEFAULT_BYTES = 32 * 1024
"""The buffer that one small command leaves behind: Redis makes room for 16 KB and takes twice that."""


@dataclass(frozen=True)
class WhatIf:
    """What would have been different, had only buffers with more than ``threshold_bytes`` unused been trimmed.

    Attributes:
        trims: those recorded; skipped: of them, those that would not have happened; saved_ns: their time.
        not_recorded: trims that were only counted, since they were shorter than the minimum duration or lost.
        kept_bytes: unused space of the skipped trims, which they gave back; the same client may be in it often.
        clients: connected, as INFO said, else those seen; kept_limit_bytes: more than this is never kept at
            a time, ``clients`` times the threshold.
        stalls: event loop iterations over the threshold; stalls_left: those that still would be.
        longest_stall_ns: the longest stall; longest_left_ns: what the longest would have been.
    """

    threshold_bytes: int
    trims: int
    skipped: int
    saved_ns: int
    not_recorded: int
    kept_bytes: int
    clients: int
    kept_limit_bytes: int
    stalls: int
    stalls_left: int
    longest_stall_ns: int
    longest_left_ns: int


@dataclass(frozen=True)
class Trims:
    """The recorded trims of query buffers.

    Attributes:
        free_bytes: unused space before each, ascending.
        duration_ns: its length, with the allocator's work in it.
        stall: the stall (row of ``Stalls.frame``) it was in, -1: none.
        not_recorded: how many more were only counted.
    """

    free_bytes: Ints
    duration_ns: Ints
    stall: Ints
    not_recorded: int


def find_trims(tables: Tables, nested: Nested, stalls: Stalls) -> Trims:
    """Return the trims that the cron made: calls of sdsRemoveFreeSpace inside a client's visit.

    Where the visits were not traced, all its calls.
    """
    calls = nested.calls
    place = np.flatnonzero(_of_a_visit(tables.manifest, nested)[calls["path"].to_numpy()])
    rows = calls.iloc[place]
    free = np.zeros(len(place), np.int64)
    known = np.zeros(len(place), np.bool_)
    missing = 0
    for probe in tables.manifest.probes:
        if probe.kind != CALL or probe.name != TRIM:
            continue
        counted = tables.recording.counters.by_probe.get(probe.id) if tables.recording.counters else None
        missing += (counted or ProbeCounters()).short_calls + (counted or ProbeCounters()).missing
        mine = rows["probe"].to_numpy() == probe.id
        decoded = tables.decode(probe, rows["start_ns"].to_numpy()[mine], rows["row"].to_numpy()[mine])
        if "free_bytes" in decoded:
            # a length beyond 2^63 is no length: it counts as larger than any threshold
            free[mine] = np.minimum(decoded["free_bytes"].astype(np.uint64), np.uint64(2**63 - 1)).astype(np.int64)
            known |= mine
    place, free, duration = place[known], free[known], rows["duration_ns"].to_numpy()[known]
    stall = range_of(place, stalls.frame["first_call"].to_numpy(), stalls.frame["last_call"].to_numpy())
    order = np.argsort(free, kind="stable")
    return Trims(free[order], duration[order], stall[order], missing)


def what_if(tables: Tables, trims: Trims, stalls: pd.DataFrame, threshold_bytes: int) -> WhatIf:
    """Return what a threshold would have changed.

    Args:
        stalls: ``Stalls.frame``.
        threshold_bytes: a buffer with at most this much unused space is left alone.
    """
    skipped = int(np.searchsorted(trims.free_bytes, threshold_bytes, side="right"))
    saved = trims.duration_ns[:skipped]
    in_stall = trims.stall[:skipped] >= 0
    saved_in = sum_by(trims.stall[:skipped][in_stall], saved[in_stall], len(stalls))
    length = stalls["duration_ns"].to_numpy()
    left = np.maximum(length - saved_in, 0)
    clients = _connected_clients(tables)
    return WhatIf(
        threshold_bytes=threshold_bytes,
        trims=len(trims.free_bytes),
        skipped=skipped,
        saved_ns=int(saved.sum()),
        not_recorded=trims.not_recorded,
        kept_bytes=int(trims.free_bytes[:skipped].sum()),
        clients=clients,
        kept_limit_bytes=clients * threshold_bytes,
        stalls=len(stalls),
        stalls_left=int(np.count_nonzero(left >= max(tables.manifest.stall_ns, 1))),
        longest_stall_ns=int(length.max(initial=0)),
        longest_left_ns=int(left.max(initial=0)),
    )


def _connected_clients(tables: Tables) -> int:
    """Return how many clients were connected, at the start or the end, whichever is more; else those visited."""
    told = 0
    for target in tables.manifest.targets:
        values = (target.info.get(name, "") for name in ("connected_clients", "connected_clients_end"))
        told += max((int(value) for value in values if value.isascii() and value.isdigit()), default=0)
    return told or _visited(tables)


def _visited(tables: Tables) -> int:
    """Return how many different clients the cron was seen to visit."""
    seen = 0
    for probe in tables.manifest.probes:
        name = next((item.name for item in probe.fields if item.name in (FD, CLIENT_ID)), "")
        if probe.kind == CALL and probe.name == CLIENT_VISIT and name:
            mine = tables.calls["probe"].to_numpy() == probe.id
            rows = tables.calls["row"].to_numpy()[mine]
            decoded = tables.decode(probe, tables.calls["start_ns"].to_numpy()[mine], rows)
            seen += len(pd.unique(decoded[name]))
    return seen


def _of_a_visit(manifest: Manifest, nested: Nested) -> npt.NDArray[np.bool_]:
    """Return for each path whether it ends in a trim made in a visit."""
    names = {probe.id: probe.name for probe in manifest.probes}
    traced = CLIENT_VISIT in names.values()
    visits = np.zeros(len(nested.paths), np.bool_)
    trims = np.zeros(len(nested.paths), np.bool_)
    for index, (parent, probe) in enumerate(nested.paths):
        within = parent >= 0 and bool(visits[parent])
        visits[index] = within or names.get(probe) == CLIENT_VISIT
        trims[index] = names.get(probe) == TRIM and (within or not traced)
    return trims
