"""Every event as one row of one wide table: what Parquet, CSV and NDJSON hold.

The columns and what they mean are documented in ``ndjson.schema.json`` beside this file, once for all three
formats. Here is how the analysis' tables become rows: calls first, then the other kinds, each in the order its
table has; a row's ``id`` is its place, so a caller's ``id`` is its row in ``Nested.calls``. What a kind does not
have is null. Decoded arguments of functions are columns of their own, ``arg_`` and the argument's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

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
    QUEUE_KIND,
    REQUEST_KIND,
    STACK_SAMPLE_KIND,
    call_names,
    counter_names,
    listener_names,
    peer_addresses,
)
from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.containment import NO_PARENT
from stallscope.tracer.analysis.requests import ACCEPTED
from stallscope.tracer.manifest import CALL

ROWS_A_BATCH = 1 << 17
ARGUMENT_PREFIX = "arg_"
PATH_SEPARATOR = ";"

COLUMNS: dict[str, pa.DataType] = {
    "id": pa.int64(),
    "kind": pa.string(),
    "name": pa.string(),
    "time": pa.timestamp("ns", "UTC"),
    "start_ns": pa.int64(),
    "since_start_ns": pa.int64(),
    "duration_ns": pa.int64(),
    "self_ns": pa.int64(),
    "pid": pa.int64(),
    "tid": pa.int64(),
    "depth": pa.int64(),
    "parent": pa.int64(),
    "path": pa.string(),
    "unfinished": pa.bool_(),
    "stall": pa.int64(),
    "phase": pa.string(),
    "listener": pa.string(),
    "peer": pa.string(),
    "queue_length": pa.int64(),
    "queue_limit": pa.int64(),
    "syn_queue_length": pa.int64(),
    "drops": pa.int64(),
    "wait_ns": pa.int64(),
    "count": pa.int64(),
    "namespace": pa.int64(),
    "ready": pa.uint64(),
    "accepted": pa.uint64(),
    "listener_fd": pa.int64(),
    "fd": pa.int64(),
    "connection": pa.int64(),
    "uncertain_ns": pa.int64(),
    "text": pa.string(),
    "value": pa.float64(),
    "unit": pa.string(),
    "weight_ns": pa.int64(),
    "state": pa.string(),
}
"""The columns that every export has; those of arguments follow."""

_Filled = dict[str, Any]


def schema(analysis: Analysis) -> pa.Schema:
    """Return the columns of this recording's rows: ``COLUMNS`` and one for each argument of a traced function."""
    return pa.schema([*COLUMNS.items(), *_argument_types(analysis).items()])


def count_rows(analysis: Analysis) -> int:
    """Return how many rows :func:`batches` yields, all together."""
    return sum(part.count for part in _parts(analysis))


def batches(analysis: Analysis) -> Iterator[pa.RecordBatch]:
    """Yield all rows, in batches of at most ``ROWS_A_BATCH``."""
    columns = schema(analysis)
    manifest = analysis.manifest
    first_id = 0
    for part in _parts(analysis):
        for low in range(0, part.count, ROWS_A_BATCH):
            high = min(low + ROWS_A_BATCH, part.count)
            filled = part.fill(low, high)
            start = filled["start_ns"]
            filled["id"] = np.arange(first_id + low, first_id + high)
            filled["kind"] = pa.repeat(pa.scalar(part.kind), high - low)
            filled["since_start_ns"] = start - manifest.started_ns
            filled["time"] = pa.array(start + manifest.wall_offset_ns, pa.timestamp("ns", "UTC"))
            yield pa.record_batch([_array(filled.get(item.name), item.type, high - low) for item in columns], columns)
        first_id += part.count


@dataclass(frozen=True)
class _Part:
    """All rows of one kind.

    Attributes:
        fill: the columns of the rows from one place up to another, as numpy or Arrow arrays.
    """

    kind: str
    count: int
    fill: Callable[[int, int], _Filled]


def _parts(analysis: Analysis) -> tuple[_Part, ...]:
    tables, overflows = analysis.tables, analysis.stalls.overflows
    calls, gone = _Calls(analysis, analysis.nested.calls), _Calls(analysis, analysis.nested.abandoned)
    listeners = listener_names(
        analysis.manifest, {*tables.queues["listener"], *tables.requests["listener"], *overflows["listener"]}
    )
    return (
        _Part(CALL_KIND, len(calls.frame), calls.nested),
        _Part(ABANDONED, len(gone.frame), gone.abandoned),
        _Part(ITERATION_KIND, len(tables.iterations), lambda low, high: _iterations(analysis, low, high)),
        _Part(ACCEPT_KIND, len(tables.accepts), lambda low, high: _plain(tables.accepts[low:high], "accept")),
        _Part(QUEUE_KIND, len(tables.queues), lambda low, high: _queues(analysis, low, high, listeners)),
        _Part(COUNTER_KIND, len(tables.counters), lambda low, high: _counters(analysis, low, high)),
        _Part(REQUEST_KIND, len(tables.requests), lambda low, high: _requests(tables.requests[low:high], listeners)),
        _Part(OVERFLOW_KIND, len(overflows), lambda low, high: _overflows(overflows[low:high], listeners)),
        _Part(PACKET_KIND, len(tables.packets), lambda low, high: _packets(tables.packets[low:high])),
        _Part(
            IMPORTED_SPAN_KIND, len(tables.imported_spans), lambda low, high: _spans(tables.imported_spans[low:high])
        ),
        _Part(
            IMPORTED_SAMPLE_KIND,
            len(tables.imported_samples),
            lambda low, high: _samples(tables.imported_samples[low:high]),
        ),
        _Part(STACK_SAMPLE_KIND, len(analysis.samples.frame), lambda low, high: _stacks(analysis, low, high)),
    )


class _Calls:
    """The rows of calls: names, paths, stalls and arguments."""

    def __init__(self, analysis: Analysis, frame: pd.DataFrame) -> None:
        self.frame = frame
        self._tables = analysis.tables
        self._probes = [probe for probe in analysis.manifest.probes if probe.kind == CALL]
        self._types = _argument_types(analysis)
        names = call_names(analysis.manifest)
        self._names = names
        self._path = pa.array(
            [
                PATH_SEPARATOR.join(names[probe] for probe in analysis.nested.path(index))
                for index in range(len(analysis.nested.paths))
            ],
            pa.string(),
        )
        self._stall = analysis.stalls.frame[["first_call", "last_call"]].sort_values("first_call", kind="stable")

    def abandoned(self, low: int, high: int) -> _Filled:
        """Return rows of calls that never returned."""
        frame = self.frame.iloc[low:high]
        filled = _columns(frame, "start_ns", "pid", "tid")
        filled["name"] = _named(self._names, frame["probe"])
        return filled | self._arguments(frame)

    def nested(self, low: int, high: int) -> _Filled:
        """Return rows of calls with their places in the call tree."""
        frame = self.frame.iloc[low:high]
        filled = _columns(frame, "start_ns", "duration_ns", "self_ns", "pid", "tid", "depth", "unfinished")
        filled["name"] = _named(self._names, frame["probe"])
        filled["parent"] = _known(frame["parent"], NO_PARENT)
        filled["path"] = self._path.take(pa.array(frame["path"].to_numpy()))
        filled["stall"] = self._stalls(low, high)
        return filled | self._arguments(frame)

    def _stalls(self, low: int, high: int) -> pa.Array:
        first, last = (self._stall[name].to_numpy() for name in ("first_call", "last_call"))
        index = np.arange(low, high)
        place = np.searchsorted(first, index, side="right") - 1
        inside = place >= 0
        inside[inside] = index[inside] < last[place[inside]]
        number = np.full(high - low, -1, np.int64)
        number[inside] = self._stall.index.to_numpy()[place[inside]]
        return _known(number, -1)

    def _arguments(self, frame: pd.DataFrame) -> _Filled:
        probe_ids, start, row = (frame[name].to_numpy() for name in ("probe", "start_ns", "row"))
        # one buffer for each argument and type: signed and unsigned may share a name
        parts: dict[tuple[str, str], tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]] = {}
        for probe in self._probes:
            mine = np.flatnonzero(probe_ids == probe.id)
            if not len(mine):
                continue
            for name, values in self._tables.decode(probe, start[mine], row[mine]).items():
                key = (ARGUMENT_PREFIX + name, values.dtype.str)
                if key not in parts:
                    parts[key] = (np.zeros(len(frame), values.dtype), np.ones(len(frame), np.bool_))
                parts[key][0][mine] = values
                parts[key][1][mine] = False
        filled: _Filled = {}
        for (name, _), (values, missing) in parts.items():
            column = pa.array(values, mask=missing).cast(self._types[name])
            filled[name] = pc.coalesce(filled[name], column) if name in filled else column
        return filled


def _argument_types(analysis: Analysis) -> dict[str, pa.DataType]:
    types: dict[str, pa.DataType] = {}
    nothing = np.zeros(0, np.int64)
    for probe in analysis.manifest.probes:
        if probe.kind != CALL:
            continue
        for name, values in analysis.tables.decode(probe, nothing, nothing).items():
            column, kind = ARGUMENT_PREFIX + name, pa.from_numpy_dtype(values.dtype)
            # no 64-bit type holds both signed and unsigned numbers of 64 bits
            types[column] = kind if types.get(column, kind) == kind else pa.decimal128(20, 0)
    return types


def _iterations(analysis: Analysis, low: int, high: int) -> _Filled:
    frame = analysis.tables.iterations.iloc[low:high]
    filled = _plain(frame, "event loop iteration")
    stalls = analysis.stalls.frame
    numbers = pd.Series(stalls.index, pd.MultiIndex.from_frame(stalls[["tid", "start_ns"]]))
    keys = pd.MultiIndex.from_arrays([frame["tid"].astype(np.int64), frame["start_ns"]])
    filled["stall"] = _known(numbers.reindex(keys, fill_value=-1), -1)
    return filled


def _plain(frame: pd.DataFrame, name: str) -> _Filled:
    filled = _columns(frame, *frame.columns)
    filled["name"] = pa.repeat(pa.scalar(name), len(frame))
    return filled


def _queues(analysis: Analysis, low: int, high: int, listeners: dict[int, str]) -> _Filled:
    frame = analysis.tables.queues.iloc[low:high]
    filled = _plain(frame.rename(columns={"time_ns": "start_ns"}), "accept queue")
    owners = {listener.index: listener.pid for listener in analysis.manifest.listeners}
    pid = frame["listener"].map(owners).fillna(-1)
    return filled | {"listener": _named(listeners, frame["listener"]), "pid": _known(pid, -1)}


def _counters(analysis: Analysis, low: int, high: int) -> _Filled:
    frame = analysis.tables.counters.iloc[low:high]
    filled = _columns(frame.rename(columns={"time_ns": "start_ns"}), "start_ns", "count", "namespace")
    return filled | {"name": _named(counter_names(analysis.manifest), frame["counter"])}


def _requests(frame: pd.DataFrame, listeners: dict[int, str]) -> _Filled:
    columns = {"time_ns": "start_ns"}
    filled = _columns(
        frame.rename(columns=columns), "start_ns", "pid", "queue_length", "queue_limit", "syn_queue_length"
    )
    waited = (frame["event"] == ACCEPTED).to_numpy()
    return filled | {
        "start_ns": frame["time_ns"].to_numpy(),
        "name": _category(frame["event"]),
        "listener": _named(listeners, frame["listener"]),
        "peer": _peers(frame),
        "wait_ns": pa.array(frame["wait_ns"].to_numpy(), mask=~waited),
    }


def _overflows(frame: pd.DataFrame, listeners: dict[int, str]) -> _Filled:
    filled = _columns(frame, "count", "namespace")
    start = frame["after_ns"].to_numpy()
    return filled | {
        "start_ns": start,
        "duration_ns": frame["seen_ns"].to_numpy() - start,
        "name": pa.repeat(pa.scalar("overflow"), len(frame)),
        "pid": _known(frame["pid"], 0),
        "stall": _known(frame["stall"], -1),
        "phase": pa.array(frame["phase"].to_numpy(), pa.string()),
        "listener": _named(listeners, frame["listener"]),
    }


def _packets(frame: pd.DataFrame) -> _Filled:
    return _columns(frame, "connection") | {
        "start_ns": frame["time_ns"].to_numpy(),
        "name": _category(frame["event"]),
        "listener": _category(frame["server"]),
        "peer": _peers(frame),
    }


def _spans(frame: pd.DataFrame) -> _Filled:
    filled = _columns(frame, "start_ns", "duration_ns", "uncertain_ns")
    return filled | {"name": _category(frame["source"]), "text": _category(frame["text"])}


def _samples(frame: pd.DataFrame) -> _Filled:
    return _columns(frame, "value") | {
        "start_ns": frame["time_ns"].to_numpy(),
        "name": _category(frame["name"]),
        "unit": _category(frame["unit"]),
    }


def _stacks(analysis: Analysis, low: int, high: int) -> _Filled:
    frame = analysis.samples.frame.iloc[low:high]
    codes, stacks = pd.factorize(frame["stack"])
    functions = [[item.name for item in analysis.samples.functions_of(int(stack))] for stack in stacks]
    filled = _columns(frame, "duration_ns", "weight_ns", "pid", "tid")
    return filled | {
        "start_ns": frame["time_ns"].to_numpy(),
        "name": pa.array([names[-1] for names in functions], pa.string()).take(pa.array(codes)),
        "path": pa.array([PATH_SEPARATOR.join(names) for names in functions], pa.string()).take(pa.array(codes)),
        "stall": _known(frame["stall"], -1),
        "state": _category(frame["state"]),
    }


def _peers(frame: pd.DataFrame) -> pa.Array:
    """Return address and port of each row's client."""
    codes, addresses = peer_addresses(frame["peer_high"].to_numpy(), frame["peer_low"].to_numpy())
    ports = pa.array(frame["peer_port"].to_numpy()).cast(pa.string())
    return pc.binary_join_element_wise(pa.array(addresses, pa.string()).take(pa.array(codes)), ports, ":")


def _category(values: pd.Series[Any]) -> pa.Array:
    """Return a categorical column as text; null where it says nothing."""
    names = [name or None for name in values.cat.categories]
    return pa.array(names, pa.string()).take(pa.array(values.cat.codes.to_numpy()))


def _columns(frame: pd.DataFrame, *names: str) -> _Filled:
    return {name: frame[name].to_numpy() for name in names}


def _named(names: dict[int, str], numbers: pd.Series[Any]) -> pa.Array:
    """Return the names of these numbers; null for those that have none."""
    codes, different = pd.factorize(numbers)
    return pa.array([names.get(int(number)) for number in different], pa.string()).take(pa.array(codes))


def _known(values: pd.Series[Any] | npt.NDArray[Any], unknown: int) -> pa.Array:
    """Return the values as integers, null where they say that it is not known."""
    numbers = np.asarray(values).astype(np.int64)
    return pa.array(numbers, mask=numbers == unknown)


def _array(values: Any, kind: pa.DataType, count: int) -> pa.Array:
    if values is None:
        return pa.nulls(count, kind)
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values).cast(kind)
