"""Which clients a stall was spent on, from the client that a call's arguments tell."""

from __future__ import annotations

from ipaddress import IPv6Address

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.nesting import Nested
from stallscope.tracer.analysis.requests import ACCEPTED
from stallscope.tracer.analysis.segments import NOT_KNOWN, ranges
from stallscope.tracer.analysis.tables import Tables
from stallscope.tracer.manifest import CALL

FD, CLIENT_ID = "fd", "client_id"
"""The fields that tell a client: its file descriptor up to Redis 5.0, the low half of its id since 6.0."""

KEPT_CLIENTS = 10
"""So many clients of each stall are kept."""

_KEYS = ["stall", "field", "client"]


def with_clients(frame: pd.DataFrame, tables: Tables, nested: Nested) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the stalls with ``clients``, how many each was spent on, and those that took most of each.

    The second table has at most ``KEPT_CLIENTS`` rows a stall, sorted by stall and, greatest first, time.
    Columns: ``stall`` (int64, row of ``frame``), ``field`` (``fd`` or ``client_id``), ``client`` (int64, its
    value), ``calls`` (int64), ``total_ns`` (int64: their durations inside the stall, with what they called),
    ``free_bytes`` (int64: unused space in its query buffer before the first call, -1: not known) and
    ``peer`` (text: ``127.0.0.1:50123``, "" where the connection was not seen to come in).

    A call inside another call for a client is not counted again.
    """
    clients = _clients(frame, tables, nested)
    counted = clients.groupby("stall").size().reindex(frame.index)
    frame = frame.assign(clients=counted.fillna(NOT_KNOWN).astype(np.int64))
    most = clients.groupby("stall").head(KEPT_CLIENTS).reset_index(drop=True)
    return frame, most.assign(peer=_peers(most, frame, tables))


def _clients(frame: pd.DataFrame, tables: Tables, nested: Nested) -> pd.DataFrame:
    stall, call = ranges(frame["first_call"].to_numpy(), frame["last_call"].to_numpy())
    calls = nested.calls
    outermost = _outermost_for_a_client(tables, nested)[calls["path"].to_numpy()[call]]
    stall, call = stall[outermost], call[outermost]
    end = (frame["start_ns"] + frame["duration_ns"]).to_numpy()
    probes, start_ns, row = (calls[name].to_numpy()[call] for name in ("probe", "start_ns", "row"))
    time_ns = np.minimum(calls["duration_ns"].to_numpy()[call], end[stall] - start_ns)
    parts = [_empty()]
    for probe in tables.manifest.probes:
        field = next((item.name for item in probe.fields if item.name in (FD, CLIENT_ID)), "")
        mine = np.flatnonzero(probes == probe.id)
        if probe.kind != CALL or not field or not len(mine):
            continue
        decoded = tables.decode(probe, start_ns[mine], row[mine])
        parts.append(
            pd.DataFrame(
                {
                    "stall": stall[mine],
                    "field": field,
                    "client": decoded[field].astype(np.int64),
                    "time_ns": time_ns[mine],
                    "free_bytes": decoded.get("free_bytes", np.full(len(mine), NOT_KNOWN)).astype(np.int64),
                },
                copy=False,
            )
        )
    told = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
    clients = told.groupby(_KEYS, sort=True, as_index=False).agg(
        calls=("time_ns", "size"), total_ns=("time_ns", "sum"), free_bytes=("free_bytes", "first")
    )
    return clients.sort_values(["stall", "total_ns"], ascending=[True, False], kind="stable", ignore_index=True)


def _empty() -> pd.DataFrame:
    columns = {name: np.zeros(0, np.int64) for name in ("stall", "client", "time_ns", "free_bytes")}
    return pd.DataFrame({**columns, "field": np.zeros(0, object)})


def _outermost_for_a_client(tables: Tables, nested: Nested) -> npt.NDArray[np.bool_]:
    """Return for each path whether its function tells a client and none of its callers does."""
    telling = {
        probe.id
        for probe in tables.manifest.probes
        if probe.kind == CALL and any(item.name in (FD, CLIENT_ID) for item in probe.fields)
    }
    inside = np.zeros(len(nested.paths), np.bool_)
    outermost = np.zeros(len(nested.paths), np.bool_)
    for index, (parent, probe) in enumerate(nested.paths):
        within = parent >= 0 and inside[parent]
        outermost[index] = probe in telling and not within
        inside[index] = within or probe in telling
    return outermost


def _peers(clients: pd.DataFrame, frame: pd.DataFrame, tables: Tables) -> list[str]:
    """Return the peer of each client that is told by its file descriptor and whose accept was seen.

    The file descriptor leads to the last accept that returned it before the stall, and its time to the
    connection that the kernel saw leave the accept queue then.
    """
    peers = [""] * len(clients)
    accepted = tables.requests.loc[tables.requests["event"] == ACCEPTED]
    by_fd = clients.loc[clients["field"] == FD]
    if accepted.empty or by_fd.empty or tables.accepts.empty:
        return peers
    wanted = pd.DataFrame(
        {
            "place": by_fd.index,
            "pid": frame["pid"].to_numpy()[by_fd["stall"]],
            "fd": by_fd["client"].to_numpy(),
            "time_ns": frame["start_ns"].to_numpy()[by_fd["stall"]],
        }
    ).sort_values("time_ns", kind="stable")
    accepts = tables.accepts[["pid", "fd", "start_ns", "duration_ns"]].astype(np.int64)
    accepts = accepts.sort_values("start_ns", kind="stable")
    found = pd.merge_asof(wanted, accepts, left_on="time_ns", right_on="start_ns", by=["pid", "fd"]).dropna()
    # the row's number, not the address: 64 bits do not survive a join with gaps
    left = pd.DataFrame(
        {
            "pid": accepted["pid"].astype(np.int64),
            "left_ns": accepted["time_ns"] + accepted["wait_ns"],
            "row": np.arange(len(accepted)),
        }
    ).sort_values("left_ns", kind="stable")
    found = found.astype({"start_ns": np.int64}).sort_values("start_ns", kind="stable")
    found = pd.merge_asof(found, left, left_on="start_ns", right_on="left_ns", by="pid", direction="forward").dropna()
    found = found.loc[found["left_ns"] <= found["start_ns"] + found["duration_ns"]]
    names = accepted[["peer_high", "peer_low", "peer_port"]].iloc[found["row"].astype(np.int64)]
    for place, address in zip(found["place"], names.itertuples(index=False, name=None), strict=True):
        peers[int(place)] = peer_address(*map(int, address))
    return peers


def peer_address(high: int, low: int, port: int) -> str:
    """Return an address and port as people write them; IPv4 where the address is a mapped one."""
    address = IPv6Address(high << 64 | low)
    return f"{address.ipv4_mapped}:{port}" if address.ipv4_mapped else f"[{address}]:{port}"
