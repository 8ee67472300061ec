"""What things are called in every export."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import PurePath

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.manifest import CALL, Manifest

CALL_KIND, ABANDONED, ITERATION_KIND, ACCEPT_KIND = "call", "abandoned", "iteration", "accept"
QUEUE_KIND, COUNTER_KIND, REQUEST_KIND, OVERFLOW_KIND = "queue", "counter", "request", "overflow"
PACKET_KIND, IMPORTED_SPAN_KIND, IMPORTED_SAMPLE_KIND = "packet", "imported span", "imported sample"
STACK_SAMPLE_KIND = "stack sample"
KINDS = (
    CALL_KIND, ABANDONED, ITERATION_KIND, ACCEPT_KIND, QUEUE_KIND, COUNTER_KIND, REQUEST_KIND, OVERFLOW_KIND,
    PACKET_KIND, IMPORTED_SPAN_KIND, IMPORTED_SAMPLE_KIND, STACK_SAMPLE_KIND,
)  # fmt: skip
"""The kinds of rows and of events; what they mean is in ``ndjson.schema.json``."""

QUEUE_COUNTERS = {"queue_length": "accept queue length", "queue_limit": "accept queue limit", "drops": "socket drops"}
"""What a sample of an accept queue tells, by column of the table ``queues``; all count connections."""


def call_names(manifest: Manifest) -> dict[int, str]:
    """Return the name of each traced function by probe id: the symbol where one name stands for several."""
    probes = [probe for probe in manifest.probes if probe.kind == CALL]
    names = [probe.name for probe in probes]
    return {probe.id: probe.symbol if probe.symbol and names.count(probe.name) > 1 else probe.name for probe in probes}


def process_names(manifest: Manifest, pids: Iterable[int]) -> dict[int, str]:
    """Return the name of each process: its binary and version, as ``redis-server 2.8.17``."""
    known = {
        target.pid: f"{PurePath(target.exe).name or target.product} {target.version}".strip()
        for target in manifest.targets
    }
    return {pid: known.get(pid, "process") for pid in sorted({*known, *pids})}


def listener_names(manifest: Manifest, indexes: Iterable[int] = ()) -> dict[int, str]:
    """Return the address of each listener by its index; with the socket's number where addresses repeat."""
    addresses = [listener.address for listener in manifest.listeners]
    known = {
        listener.index: listener.address
        if addresses.count(listener.address) == 1
        else f"{listener.address} (socket {listener.inode})"
        for listener in manifest.listeners
    }
    return {index: known.get(index, f"listener {index}") for index in sorted({*known, *indexes} - {-1})}


def counter_names(manifest: Manifest) -> dict[int, str]:
    """Return the name of each sampled kernel counter by its index."""
    return dict(enumerate(manifest.counter_names))


def peer_addresses(
    high: npt.NDArray[np.uint64], low: npt.NDArray[np.uint64]
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return the clients' addresses: the place of each in the list of different ones, and that list.

    IPv6 addresses are in brackets, so that a port may follow.
    """
    peers = pd.DataFrame({"high": high, "low": low}).groupby(["high", "low"], sort=False)
    different = peers.size().index.to_frame().to_numpy(np.uint64).tolist()
    return np.asarray(peers.ngroup(), np.int64), [_address(upper << 64 | lower) for upper, lower in different]


def _address(number: int) -> str:
    address = ipaddress.IPv6Address(number)
    return str(address.ipv4_mapped) if address.ipv4_mapped else f"[{address}]"
