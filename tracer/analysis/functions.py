"""Statistics of one traced function over a whole recording."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.probes.catalogue import Field
from stallscope.tracer.analysis.nesting import Nested
from stallscope.tracer.analysis.tables import Ints, Tables
from stallscope.tracer.manifest import CALL, ProbeCounters, ProbeInfo

QUANTILES = {"p50_ns": 0.5, "p99_ns": 0.99, "p999_ns": 0.999}


@dataclass(frozen=True)
class FieldSummary:
    """One decoded argument over the recorded calls; all numbers in ``unit``.

    Attributes:
        total: the sum for byte counts, None for what is no amount (a file descriptor, a time).
    """

    name: str
    unit: str
    total: int | None
    minimum: int
    median: int
    maximum: int


@dataclass(frozen=True)
class FunctionSummary:
    """One traced function over the whole recording.

    Attributes:
        probe: id in the probe list; name, symbol, rung, note: as there.
        calls: ``recorded`` + ``short_calls``; what statistics are about.
        recorded: calls with a row; unfinished: of them, still under way at the end, with the time until then.
        short_calls: calls below the minimum duration, only counted; short_ns: their total duration.
        hits: entries the kernel saw; 0 with ``counted``: attached, but it never fired.
        counted: the kernel's counters for it are in the recording.
        lost: calls that were seen and could not be kept; unpaired: returns without an entry.
        abandoned: calls that never returned (longjmp).
        p50_ns, p99_ns, p999_ns: nearest-rank quantiles over all calls; None where that call was only
            counted, so it is below the minimum duration, or where there was no call.
        max_ns: the longest call, None where all were only counted.
        total_ns: time inside the function, recursion counted once.
        self_ns: the same without recorded calls inside it; includes calls too short to be recorded.
        busy_share: total_ns as a share of the event loop's busy time, None if that is not known.
        elapsed_share: total_ns as a share of the time the targets were watched.
        fields: decoded arguments, of recorded calls.
    """

    probe: int
    name: str
    symbol: str
    rung: str
    note: str
    calls: int
    recorded: int
    unfinished: int
    short_calls: int
    short_ns: int
    hits: int
    counted: bool
    lost: int
    unpaired: int
    abandoned: int
    p50_ns: int | None
    p99_ns: int | None
    p999_ns: int | None
    max_ns: int | None
    total_ns: int
    self_ns: int
    busy_share: float | None
    elapsed_share: float | None
    fields: tuple[FieldSummary, ...]


def summarise_functions(
    tables: Tables, nested: Nested, busy_ns: int | None, watched_ns: int
) -> tuple[FunctionSummary, ...]:
    """Return every function of the probe list, most self time first.

    Args:
        busy_ns: how long the event loops were busy, None if they were not observed.
        watched_ns: how long the targets were watched, all together.
    """
    calls = nested.calls
    probe_column = calls["probe"].to_numpy()
    # one stable radix sort instead of one comparison per function
    order = np.argsort(probe_column, kind="stable")
    bounds = np.searchsorted(probe_column[order], np.arange(2**16 + 1))
    duration = calls["duration_ns"].to_numpy()
    own = calls["self_ns"].to_numpy()
    unfinished = calls["unfinished"].to_numpy()
    outermost = nested.outermost()
    counters = tables.recording.counters
    gone = nested.abandoned["probe"].value_counts()
    summaries = []
    for probe in _functions(tables):
        counted = counters.by_probe.get(probe.id) if counters else None
        kernel = counted or ProbeCounters()
        rows = order[bounds[probe.id] : bounds[probe.id + 1]]
        lengths = np.sort(duration[rows])
        total_ns = int(duration[rows[outermost[rows]]].sum()) + kernel.short_ns
        summaries.append(
            FunctionSummary(
                probe=probe.id,
                name=_label(probe, tables),
                symbol=probe.symbol,
                rung=probe.rung,
                note=probe.note,
                calls=len(rows) + kernel.short_calls,
                recorded=len(rows),
                unfinished=int(np.count_nonzero(unfinished[rows])),
                short_calls=kernel.short_calls,
                short_ns=kernel.short_ns,
                hits=kernel.hits,
                counted=counted is not None,
                lost=kernel.missing,
                unpaired=kernel.unpaired,
                abandoned=kernel.abandoned + int(gone.get(probe.id, 0)),
                **{name: quantile(lengths, kernel.short_calls, share) for name, share in QUANTILES.items()},
                max_ns=int(lengths[-1]) if len(lengths) else None,
                total_ns=total_ns,
                self_ns=int(own[rows].sum()) + kernel.short_ns,
                busy_share=total_ns / busy_ns if busy_ns else None,
                elapsed_share=total_ns / watched_ns if watched_ns else None,
                fields=_fields(tables, probe, calls, rows),
            )
        )
    return tuple(sorted(summaries, key=lambda function: -function.self_ns))


def quantile(lengths: Ints, short_calls: int, share: float) -> int | None:
    """Return the nearest-rank quantile of calls of which the shortest were only counted.

    Args:
        lengths: durations of the recorded calls, ascending.
        short_calls: how many more there were, all shorter.
        share: 0.99 for the 99th percentile.
    """
    count = len(lengths) + short_calls
    rank = max(int(np.ceil(share * count)), 1)
    if count == 0 or rank <= short_calls:
        return None
    return int(lengths[rank - short_calls - 1])


def _functions(tables: Tables) -> list[ProbeInfo]:
    return [probe for probe in tables.manifest.probes if probe.kind == CALL]


def _label(probe: ProbeInfo, tables: Tables) -> str:
    """Return the function's name, or the symbol where several were attached for that name."""
    alone = sum(other.name == probe.name for other in _functions(tables)) == 1
    return probe.name if alone or not probe.symbol else probe.symbol


def _fields(tables: Tables, probe: ProbeInfo, calls: pd.DataFrame, rows: Ints) -> tuple[FieldSummary, ...]:
    if not len(rows) or not probe.fields:
        return ()
    decoded = tables.decode(probe, calls["start_ns"].to_numpy()[rows], calls["row"].to_numpy()[rows])
    fields = [*probe.fields, Field("idle_s", "s", 0)] if "idle_s" in decoded else list(probe.fields)
    summaries = {}
    for item in fields:
        values = decoded[item.name]
        total = int(values.sum()) if values.sum(dtype=np.float64) < 2**62 else int(values.sum(dtype=np.float64))
        middle = (len(values) - 1) // 2
        summaries[item.name] = FieldSummary(
            item.name,
            item.unit,
            total if item.name.endswith("_bytes") else None,
            int(values.min()),
            int(np.partition(values, middle)[middle]),
            int(values.max()),
        )
    return tuple(summaries.values())
