"""Each stall as plain data: what filled it, what the queue did, who waited, and for which clients it worked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from stallscope.tracer.analysis.nesting import Nested
from stallscope.tracer.analysis.stalls import Stalls
from stallscope.tracer.analysis.tables import Tables

KEPT_STALLS = 50
KEPT_CALLS = 3


@dataclass(frozen=True)
class FunctionTime:
    """One function inside one stall: calls that began there, their self time, the longest of them."""

    name: str
    calls: int
    self_ns: int
    longest_ns: int


@dataclass(frozen=True)
class CallInStall:
    """One call inside a stall: ``path`` names its callers from the root down, and itself last."""

    path: tuple[str, ...]
    start_ns: int
    duration_ns: int
    self_ns: int
    arguments: dict[str, int]


@dataclass(frozen=True)
class ClientInStall:
    """One client that a stall was spent on.

    Attributes:
        field: what tells it: ``fd`` or ``client_id``; client: the value; peer: its address, "" if not known.
        calls: made for it; total_ns: their time, with what they called.
        free_bytes: unused in its query buffer before, None where not known.
    """

    field: str
    client: int
    peer: str
    calls: int
    total_ns: int
    free_bytes: int | None


@dataclass(frozen=True)
class StallSummary:
    """One stall; see :class:`stalls.Stalls` for how each number is found.

    Attributes:
        start_ns: since the recording's start; wall_ns: since 1970.
        listener: address of the fullest listener, "" if none is known.
        queue_start, queue_max, queue_end, queue_limit, accepted, accepted_drain: None where not observed.
        connections_refused: how many different connections the overflows refused, None where only
            the refusals could be counted.
        functions: time by function, most self time first; unexplained_ns: the rest of ``duration_ns``.
        blamed: the function with the most self time, with its callers from the root down; empty when
            less than half of the stall is explained.
        calls: the calls with the most self time.
        full_ns: from the start until the queue was first found full; first_overflow_ns: until the first
            overflow was seen; None: it was not.
        waited: connections that were in the queue during the stall and accepted later, None where not
            known; wait_median_ns, wait_max_ns: how long they were in it.
        clients: how many its calls were made for, None where no call told one; clients_blamed: those that
            took most of it, most time first.
        sampled_in: the function not traced in which its sampled stacks mostly were, NO_CPU where the thread mostly
            wanted one, "" where they tell neither.
    """

    start_ns: int
    wall_ns: int
    duration_ns: int
    pid: int
    unfinished: bool
    listener: str
    queue_start: int | None
    queue_max: int | None
    queue_end: int | None
    queue_limit: int | None
    drain_ns: int
    drained: bool
    accepted: int | None
    accepted_drain: int | None
    overflows: int
    overflows_drain: int
    connections_refused: int | None
    unexplained_ns: int
    blamed: tuple[str, ...]
    functions: tuple[FunctionTime, ...]
    calls: tuple[CallInStall, ...]
    full_ns: int | None
    first_overflow_ns: int | None
    waited: int | None
    wait_median_ns: int | None
    wait_max_ns: int | None
    clients: int | None
    clients_blamed: tuple[ClientInStall, ...]
    sampled_in: str = ""


def summarise_stalls(
    tables: Tables, nested: Nested, stalls: Stalls, sampled_in: Mapping[int, str] = MappingProxyType({})
) -> tuple[StallSummary, ...]:
    """Return the stalls with most overflows and, of those with as many, the longest; sorted by time.

    Args:
        sampled_in: what their sampled stacks tell, by row of ``Stalls.frame``.
    """
    frame = stalls.frame
    names = {probe.id: probe.name for probe in tables.manifest.probes}
    refused = frame["overflows"] + frame["overflows_drain"]
    worst = frame.assign(refused=refused).nlargest(KEPT_STALLS, ["refused", "duration_ns"]).index.sort_values()
    listeners = {listener.index: listener.address for listener in tables.manifest.listeners}
    functions = stalls.functions.loc[stalls.functions["stall"].isin(worst)]
    by_stall = dict(iter(functions.groupby("stall")))
    summaries = []
    for index in worst:
        row = frame.loc[index]
        inside = by_stall.get(index, functions.iloc[:0])
        start_ns = int(row["start_ns"])
        duration_ns = int(row["duration_ns"])
        unexplained_ns = max(duration_ns - int(row["explained_ns"]), 0)
        blamed: tuple[str, ...] = ()
        if len(inside) and 2 * unexplained_ns <= duration_ns:
            call = int(inside["longest_call"].iloc[0])
            blamed = _path(nested, call, names, since=int(row["first_call"]))
        summaries.append(
            StallSummary(
                start_ns=start_ns - tables.manifest.started_ns,
                wall_ns=start_ns + tables.manifest.wall_offset_ns,
                duration_ns=duration_ns,
                pid=int(row["pid"]),
                unfinished=bool(row["unfinished"]),
                listener=listeners.get(int(row["listener"]), ""),
                queue_start=_known(row["queue_start"]),
                queue_max=_known(row["queue_max"]),
                queue_end=_known(row["queue_end"]),
                queue_limit=_known(row["queue_limit"]),
                drain_ns=int(row["drain_ns"]),
                drained=bool(row["drained"]),
                accepted=_known(row["accepted"]),
                accepted_drain=_known(row["accepted_drain"]),
                overflows=int(row["overflows"]),
                overflows_drain=int(row["overflows_drain"]),
                connections_refused=_known(row["connections"]),
                unexplained_ns=unexplained_ns,
                blamed=blamed,
                functions=tuple(
                    FunctionTime(names.get(probe, str(probe)), calls, self_ns, longest_ns)
                    for probe, calls, self_ns, longest_ns in inside[
                        ["probe", "calls", "self_ns", "longest_ns"]
                    ].itertuples(index=False)
                ),
                calls=_worst_calls(tables, nested, row, names),
                full_ns=_known(row["full_ns"]),
                first_overflow_ns=_known(row["first_overflow_ns"]),
                waited=_known(row["waited"]),
                wait_median_ns=_known(row["wait_median_ns"]),
                wait_max_ns=_known(row["wait_max_ns"]),
                clients=_known(row["clients"]),
                clients_blamed=_clients(stalls, int(index)),
                sampled_in=sampled_in.get(int(index), ""),
            )
        )
    return tuple(summaries)


def _clients(stalls: Stalls, stall: int) -> tuple[ClientInStall, ...]:
    mine = stalls.clients.loc[stalls.clients["stall"] == stall]
    columns = ["field", "client", "peer", "calls", "total_ns", "free_bytes"]
    return tuple(
        ClientInStall(field, client, peer, calls, total_ns, _known(free_bytes))
        for field, client, peer, calls, total_ns, free_bytes in mine[columns].itertuples(index=False, name=None)
    )


def _worst_calls(tables: Tables, nested: Nested, row: pd.Series[Any], names: dict[int, str]) -> tuple[CallInStall, ...]:
    first, last = int(row["first_call"]), int(row["last_call"])
    inside = nested.calls.iloc[first:last]
    worst = inside.iloc[np.argsort(-inside["self_ns"].to_numpy(), kind="stable")[:KEPT_CALLS]]
    calls = []
    for index in worst.index:
        call = worst.loc[[index]]
        probe = tables.manifest.probe(int(call["probe"].iloc[0]))
        decoded = tables.decoded(probe, call) if probe else pd.DataFrame()
        calls.append(
            CallInStall(
                _path(nested, int(index), names, since=first),
                int(call["start_ns"].iloc[0]) - tables.manifest.started_ns,
                int(call["duration_ns"].iloc[0]),
                int(call["self_ns"].iloc[0]),
                {str(name): int(decoded[name].iloc[0]) for name in decoded.columns},
            )
        )
    return tuple(calls)


def _path(nested: Nested, call: int, names: dict[int, str], since: int) -> tuple[str, ...]:
    """Return the names from the outermost call that is not before ``since`` down to this call."""
    parent, probe = nested.calls["parent"].to_numpy(), nested.calls["probe"].to_numpy()
    chain: list[str] = []
    while call >= since:
        chain.append(names.get(int(probe[call]), str(probe[call])))
        call = int(parent[call])
    return tuple(reversed(chain))


def _known(value: int) -> int | None:
    return None if value < 0 else int(value)
