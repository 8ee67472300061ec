"""Chrome's trace event format as JSON, for chrome://tracing, Perfetto, and whatever else reads it.

    ============================ ==================================================================================
    in the recording             in the trace
    ============================ ==================================================================================
    call                         a complete event ("X") of its thread; decoded arguments, ``self_ns`` and the
                                 number of its stall are its args; an unfinished one lasts until the end of the
                                 recording and says so
    abandoned call               an instant of its thread
    stall, event loop iteration  an async pair ("b", "e") of its process, since they need not nest with calls
    accepted connection          an async pair of its process
    overflow, connection request an instant of the listener's process; of no process where that is not known
    accept queue                 counters: its length, limit and drops
    kernel counter               a counter of process 0, named kernel
    stack sample                 an instant of its thread
    imported packet              an instant of a process named imported
    SLOWLOG, LATENCY entry       an async pair of that process; ``uncertain_ns`` is in its args
    INFO field                   a counter of that process, with its unit in the name
    ============================ ==================================================================================

The format counts microseconds: ``ts`` is that since the recording's start (or the first event, if that is earlier:
readers drop what is before 0), with three decimals, so that no nanosecond is rounded off; ``otherData`` has its
zero on both clocks. It has no flow to an instant: an overflow names its stall by number instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.reports.export import rows
from stallscope.reports.export.arrow_text import joined, json_values, members, quoted, run_of_text, thousandths
from stallscope.reports.export.naming import (
    ABANDONED,
    ACCEPT_KIND,
    CALL_KIND,
    COUNTER_KIND,
    IMPORTED_SAMPLE_KIND,
    IMPORTED_SPAN_KIND,
    ITERATION_KIND,
    OVERFLOW_KIND,
    PACKET_KIND,
    QUEUE_COUNTERS,
    QUEUE_KIND,
    REQUEST_KIND,
    STACK_SAMPLE_KIND,
    process_names,
)
from stallscope.tracer.analysis.analysis import Analysis

KERNEL_PID = 0
IMPORTED_PID = 2**22 + 1
"""What was imported belongs to no process of this host; the kernel gives no number above 2^22 (PID_MAX_LIMIT)."""

_NOT_ARGUMENTS = {
    "id", "kind", "name", "time", "since_zero_ns", "since_start_ns", "duration_ns",
    "pid", "tid", "depth", "parent", "path",
}  # fmt: skip


def write(analysis: Analysis, out: BinaryIO) -> None:
    """Write the whole trace as one JSON object."""
    manifest = analysis.manifest
    zero_ns = _earliest_ns(analysis)
    about = {
        "exporter": "stallscope",
        "recording": analysis.recording.path.name,
        "complete": analysis.recording.complete,
        "zero_monotonic_ns": zero_ns,
        "zero_wall_clock": pd.Timestamp(zero_ns + manifest.wall_offset_ns, tz="UTC").isoformat(),
        "host": manifest.host,
        "command": list(manifest.command),
        "notes": [{"monotonic_ns": item.time_ns, "text": item.text} for item in manifest.notes],
    }
    out.write(b'{"displayTimeUnit":"ns","otherData":' + json.dumps(about).encode() + b',"traceEvents":[\n')
    out.write(",\n".join(json.dumps(event) for event in _names(analysis)).encode())
    for batch in rows.batches(analysis):
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns["since_zero_ns"] = pc.subtract(columns.pop("start_ns"), zero_ns)
        for events in _EVENTS[columns["kind"][0].as_py()](columns):
            out.write(run_of_text(joined(",\n", events)))
    out.write(b"\n]}\n")


_Columns = dict[str, Any]


def _earliest_ns(analysis: Analysis) -> int:
    tables, nested = analysis.tables, analysis.nested
    spans = (nested.calls, nested.abandoned, tables.iterations, tables.accepts)
    starts = [frame["start_ns"] for frame in spans]
    moments = (tables.queues, tables.counters, tables.requests, tables.samples)
    starts += [frame["time_ns"] for frame in (*moments, tables.packets, tables.imported_samples)]
    starts.append(tables.imported_spans["start_ns"])
    return min([analysis.manifest.started_ns, *(int(times.min()) for times in starts if len(times))])


def _names(analysis: Analysis) -> Iterator[dict[str, Any]]:
    """Yield the events that name processes and threads."""
    tables, nested = analysis.tables, analysis.nested
    spans = pd.concat([frame[["pid", "tid"]] for frame in (nested.calls, nested.abandoned, tables.iterations)])
    threads = spans.drop_duplicates().to_numpy().tolist()
    processes = process_names(analysis.manifest, {pid for pid, _ in threads})
    processes[KERNEL_PID] = "kernel"
    if any(len(frame) for frame in (tables.packets, tables.imported_spans, tables.imported_samples)):
        processes[IMPORTED_PID] = "imported"
    for pid, name in processes.items():
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": pid, "args": {"name": name}}
    for pid, tid in threads:
        name = "main thread" if tid == pid else f"thread {tid}"
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}


def _calls(columns: _Columns) -> Iterator[pa.Array]:
    duration = joined('"dur":', thousandths(columns["duration_ns"].to_numpy()))
    yield _event("X", columns, _name(columns), columns["since_zero_ns"], duration, _args(columns))


def _async(columns: _Columns, number: str = "tid") -> Iterator[pa.Array]:
    stalled = columns["stall"].is_valid()
    name = pc.if_else(stalled, '"stall"', _name(columns))
    pairs = joined('"id":"', columns["kind"], " ", columns[number], '"')
    end_ns = pc.add(columns["since_zero_ns"], columns["duration_ns"])
    begin = _event("b", columns, name, columns["since_zero_ns"], pairs, _args(columns))
    yield joined(begin, ",\n", _event("e", columns, name, end_ns, pairs))


def _instants(columns: _Columns) -> Iterator[pa.Array]:
    # an overflow happened before it was seen: its instant is the end of that interval
    seen_ns = pc.add(columns["since_zero_ns"], pc.fill_null(columns["duration_ns"], 0))
    scope = pc.if_else(columns["pid"].is_valid(), '"s":"p"', '"s":"g"')
    yield _event("i", columns, _name(columns), seen_ns, scope, _args(columns))


def _thread_instants(columns: _Columns) -> Iterator[pa.Array]:
    scope = pa.repeat(pa.scalar('"s":"t"'), len(columns["pid"]))
    yield _event("i", columns, _name(columns), columns["since_zero_ns"], scope, _args(columns))


def _queues(columns: _Columns) -> Iterator[pa.Array]:
    for column, label in QUEUE_COUNTERS.items():
        name = quoted(joined(f"{label}, ", columns["listener"]))
        yield _event("C", columns, name, columns["since_zero_ns"], _args({"connections": columns[column]}))


def _counters(columns: _Columns) -> Iterator[pa.Array]:
    spaces = pc.count_distinct(columns["namespace"]).as_py()
    name = columns["name"] if spaces < 2 else joined(columns["name"], ", namespace ", columns["namespace"])
    yield _event("C", columns, quoted(name), columns["since_zero_ns"], _args({"events": columns["count"]}))


def _imported(columns: _Columns) -> _Columns:
    return columns | {"pid": pa.repeat(pa.scalar(IMPORTED_PID), len(columns["id"]))}


def _packets(columns: _Columns) -> Iterator[pa.Array]:
    return _instants(_imported(columns))


def _imported_spans(columns: _Columns) -> Iterator[pa.Array]:
    # each pair has its own id: what Redis tells in whole seconds overlaps
    yield from _async(_imported(columns), "id")


def _imported_samples(columns: _Columns) -> Iterator[pa.Array]:
    columns = _imported(columns)
    unit = pc.if_else(columns["unit"].is_valid(), joined(", ", pc.fill_null(columns["unit"], "")), "")
    name = quoted(joined(columns["name"], unit))
    yield _event("C", columns, name, columns["since_zero_ns"], _args({"value": columns["value"]}))


_EVENTS: dict[str, Callable[[_Columns], Iterator[pa.Array]]] = {
    CALL_KIND: _calls,
    ABANDONED: _thread_instants,
    ITERATION_KIND: _async,
    ACCEPT_KIND: _async,
    QUEUE_KIND: _queues,
    COUNTER_KIND: _counters,
    REQUEST_KIND: _instants,
    OVERFLOW_KIND: _instants,
    PACKET_KIND: _packets,
    IMPORTED_SPAN_KIND: _imported_spans,
    IMPORTED_SAMPLE_KIND: _imported_samples,
    STACK_SAMPLE_KIND: _thread_instants,
}


def _event(phase: str, columns: _Columns, name: pa.Array, since_zero_ns: pa.Array, *more: pa.Array) -> pa.Array:
    pid = pc.fill_null(columns["pid"], KERNEL_PID)
    pieces = [
        joined('"name":', name),
        joined('"cat":"', columns["kind"], '"'),
        joined('"pid":', pid),
        joined('"tid":', pc.coalesce(columns["tid"], pid)),
        joined('"ts":', thousandths(since_zero_ns.to_numpy())),
    ]
    return joined(f'{{"ph":"{phase}",', members([*pieces, *more]), "}")


def _args(columns: _Columns) -> pa.Array:
    """Return ``"args"`` of each row: every column that has a value and is not told elsewhere."""
    if "unfinished" in columns:
        columns = columns | {"unfinished": pc.if_else(columns["unfinished"], True, None)}
    count = len(next(iter(columns.values())))
    told = [
        joined(f'"{name}":', json_values(column))
        for name, column in columns.items()
        if name not in _NOT_ARGUMENTS and column.null_count < len(column)
    ]
    return joined('"args":{', members(told), "}") if told else pa.repeat(pa.scalar('"args":{}'), count)


def _name(columns: _Columns) -> pa.Array:
    return quoted(columns["name"])
