"""Captures as rows: the packets that say what became of each connection to some ports."""

from __future__ import annotations

import gzip
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from stallscope.probes.catalogue import Field
from stallscope.tracer.errors import UsageError
from stallscope.tracer.imports.handshakes import label
from stallscope.tracer.imports.pcap import Capture
from stallscope.tracer.imports.rows import Input
from stallscope.tracer.imports.segments import Seen, Segments, decode, joined
from stallscope.tracer.layout import EVENT, NO_STACK
from stallscope.tracer.manifest import PACKET, ProbeInfo
from stallscope.tracer.packet_events import EVENTS

GZIP_MAGIC = b"\x1f\x8b"

FIELDS = (
    Field("connection", "number", 0, bits=32),
    Field("peer_port", "port", 0, shift=32, bits=16),
    Field("port", "port", 0, shift=48, bits=16),
    Field("peer_high", "address", 1),
    Field("peer_low", "address", 2),
)
"""What the values of a packet's row mean; its ``stack`` is the place of the server's address in the texts."""

_SHOWN_PORTS = 5


@dataclass(frozen=True)
class Part:
    """One capture file, read; several may be parts of one capture."""

    file: str
    format: str
    segments: Segments
    counts: dict[str, int]
    notes: tuple[str, ...]


def read_captures(paths: Sequence[Path], ports: Iterable[int]) -> list[Input]:
    """Return the captures, each as an input; files that follow each other in time are one capture, rotated.

    Raises:
        UsageError: no ports are given, a file cannot be read or is no capture, or has no packet of these ports.
    """
    parts = sorted((read_part(path, tuple(ports)) for path in paths), key=lambda part: int(part.segments.time_ns.min()))
    groups: list[list[Part]] = []
    for part in parts:
        if groups and part.segments.time_ns.min() >= max(item.segments.time_ns.max() for item in groups[-1]):
            groups[-1].append(part)
        else:
            groups.append([part])
    return [_input(group) for group in groups]


def read_part(path: Path, ports: tuple[int, ...]) -> Part:
    """Return what one capture file has of these ports.

    Raises:
        UsageError: see :func:`read_captures`.
    """
    seen = Seen()
    with path.open("rb") as file:
        stream: BinaryIO = file
        if file.peek(2)[:2] == GZIP_MAGIC:
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=file))
        capture = Capture(stream)
        segments = joined([decode(frames, ports, seen) for frames in capture.frames()])
    if not len(segments):
        raise UsageError(f"{path} {_why_none(capture, seen, ports)}")
    counts = {
        "packets": capture.packets,
        "TCP packets of the port": len(segments),
        "lost by the capture itself": capture.dropped,
        "headers cut off": seen.cut,
        "later IP fragments": seen.fragments,
        "of another link type": sum(seen.other_links.values()),
    }
    notes = list(capture.notes)
    if capture.dropped:
        notes.append(
            f"{capture.dropped:,} packets were lost by the capture itself: some retransmissions may be first tries"
        )
    if seen.cut:
        notes.append(f"{seen.cut:,} packets were captured without their whole TCP header; capture with -s 128 or more")
    return Part(
        str(path), capture.format, segments, {name: count for name, count in counts.items() if count}, tuple(notes)
    )


def _why_none(capture: Capture, seen: Seen, ports: tuple[int, ...]) -> str:
    named = _ports(ports)
    if not capture.packets:
        return f"has no packet{''.join(f'; {note}' for note in capture.notes[:1])}"
    if seen.other_links and not seen.tcp:
        links = ", ".join(map(str, sorted(seen.other_links)))
        return f"has link type {links}, which is not read here; capture at an Ethernet interface or with -i any"
    busiest = sorted(seen.servers, key=lambda port: -seen.servers[port])[:_SHOWN_PORTS]
    others = f"; servers answered on {_ports(sorted(busiest))}" if busiest else ""
    if not ports:
        return f"is a capture, and nothing says which port is the server's{others}; give --port"
    return f"has no packet of {named} among {capture.packets:,}{others}; give its port with --port"


def _ports(ports: Sequence[int]) -> str:
    return f"port{'s' if len(ports) > 1 else ''} {', '.join(map(str, ports))}"


def _input(parts: Sequence[Part]) -> Input:
    labelled = label(joined([part.segments for part in parts]))
    segments = labelled.segments
    rows = np.zeros(len(segments), EVENT)
    rows["start_ns"] = segments.time_ns
    rows["probe"] = labelled.event
    values = rows["value"]
    values[:, 0] = labelled.connection.view(np.uint64) | (segments.peer_port.astype(np.uint64) << np.uint64(32))
    values[:, 0] |= segments.port.astype(np.uint64) << np.uint64(48)
    values[:, 1], values[:, 2] = segments.peer_high, segments.peer_low
    texts, rows["stack"] = _servers(segments)
    counts: dict[str, int] = {}
    for part in parts:
        for name, count in part.counts.items():
            counts[name] = counts.get(name, 0) + count
    if labelled.twice:
        counts["captured twice"] = labelled.twice
    probes = tuple(ProbeInfo(place, name, PACKET, "capture", FIELDS) for place, name in enumerate(EVENTS))
    several = len(parts) > 1
    notes = [f"{part.file}: {note}" if several else note for part in parts for note in part.notes]
    formats = ", ".join(dict.fromkeys(part.format for part in parts))
    return Input(", ".join(part.file for part in parts), formats, rows, probes, texts, counts, tuple(notes))


def _servers(segments: Segments) -> tuple[tuple[str, ...], np.ndarray[Any, np.dtype[np.int32]]]:
    """Return the servers' addresses with their ports, and the place of each row's among them."""
    dtype = [("high", "u8"), ("low", "u8"), ("port", "u2")]
    servers = np.zeros(len(segments), dtype)
    servers["high"], servers["low"], servers["port"] = segments.server_high, segments.server_low, segments.port
    # few servers: a run of equal ones is sorted once
    new = np.ones(len(servers), np.bool_)
    new[1:] = servers[1:] != servers[:-1]
    different, place = np.unique(servers[new], return_inverse=True)
    texts = tuple(_address(int(high), int(low), int(port)) for high, low, port in different.tolist())
    run = np.cumsum(new) - 1
    return texts, (place[run] if len(servers) else np.full(0, NO_STACK)).astype(np.int32)


def _address(high: int, low: int, port: int) -> str:
    address = ipaddress.IPv6Address(high << 64 | low)
    mapped = address.ipv4_mapped
    return f"{mapped}:{port}" if mapped else f"[{address}]:{port}"
