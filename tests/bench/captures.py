"""``stallscope import`` of a large capture: seconds and peak memory, beside tshark that reads the same fields of it.

The capture is written here: clients that connect, send PING, get PONG and close, eight packets each, cut at 68 bytes.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from figures import Figure, Findings

PORT = 6379
SIZES = (1_000_000, 3_000_000, 10_000_000)
QUICK_SIZES = SIZES[:1]
_FIN, _SYN, _PSH, _ACK = 0x01, 0x02, 0x08, 0x10
_SHOWN = ("frame.time_epoch", "ip.src", "tcp.srcport", "tcp.dstport", "tcp.flags", "tcp.analysis.retransmission")

_PACKETS = (
    # to the server, flags, sequence and acknowledgement after the first numbers, bytes of payload
    (1, _SYN, 0, 0, 0),
    (0, _SYN | _ACK, 0, 1, 0),
    (1, _ACK, 1, 1, 0),
    (1, _PSH | _ACK, 1, 1, 6),
    (0, _PSH | _ACK, 1, 7, 7),
    (1, _FIN | _ACK, 7, 8, 0),
    (0, _FIN | _ACK, 8, 8, 0),
    (1, _ACK, 8, 9, 0),
)
_CUT_AT = 68
_RECORD = np.dtype(
    [
        ("second", "<u4"), ("microsecond", "<u4"), ("captured", "<u4"), ("length", "<u4"),
        ("ethernet", "u1", 12), ("type", ">u2"),
        ("version", "u1"), ("service", "u1"), ("total", ">u2"), ("ident", ">u2"), ("fragment", ">u2"), ("ttl", "u1"),
        ("protocol", "u1"), ("ip_checksum", ">u2"), ("source", ">u4"), ("destination", ">u4"),
        ("source_port", ">u2"), ("destination_port", ">u2"), ("sequence", ">u4"), ("acknowledged", ">u4"),
        ("offset", "u1"), ("flags", "u1"), ("window", ">u2"), ("tcp_checksum", ">u2"), ("urgent", ">u2"),
        ("rest", "u1", 14),
    ]
)  # fmt: skip


def bench(*, quick: bool) -> Findings:
    """Return how long the import of a capture takes, and how much memory, by its number of packets."""
    found = Findings("import: a capture of short connections, all of the server's port")
    with tempfile.TemporaryDirectory(prefix="stallscope-bench-") as folder:
        path = Path(folder) / "bench.pcap"
        for count in QUICK_SIZES if quick else SIZES:
            write_capture(path, count)
            words = ["import", str(path), "--port", str(PORT), "-o", f"{folder}/out.stall", "--force"]
            ours = _measured([_stallscope(), *words])
            theirs: list[float] = []
            if count == SIZES[0] and shutil.which("tshark"):
                shown = [word for name in _SHOWN for word in ("-e", name)]
                words = ["-r", str(path), "-Y", f"tcp.port == {PORT}", "-T", "fields", *shown]
                theirs = [_measured(["tshark", *words])[0]]
            found.figures += [
                Figure(f"{count:,} packets, s", [ours[0]], "tshark" if theirs else "", theirs),
                Figure("  peak memory, MB", [ours[1]]),
            ]
    if not shutil.which("tshark"):
        found.notes.append("tshark is not installed: apt-get install tshark")
    return found


def write_capture(path: Path, packets: int) -> None:
    """Write a pcap file of so many packets, in the order of their times."""
    random = np.random.default_rng(1)
    kind = np.array(_PACKETS)
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _CUT_AT, 1))
        for first in range(0, packets // len(kind), 100_000):
            connection = np.arange(first, min(first + 100_000, packets // len(kind)))
            file.write(_packets(connection, kind, random).tobytes())


def _packets(connection: np.ndarray, kind: np.ndarray, random: np.random.Generator) -> np.ndarray:
    count = len(connection)
    first_numbers = random.integers(0, 2**32, (2, count))
    number, step = np.repeat(connection, len(kind)), np.tile(np.arange(len(kind)), count)
    to_server, flags, sequence, acknowledged, payload = kind[step].T
    client_first, server_first = np.repeat(first_numbers, len(kind), axis=1)
    time_us = 1_750_000_000_000_000 + number * 400 + step * 30
    client, port = 0x0A000000 + number % 50_000, 20_000 + number // 50_000
    up = to_server == 1
    rows = np.zeros(len(number), _RECORD)
    rows["second"], rows["microsecond"] = np.divmod(time_us, 1_000_000)
    rows["length"], rows["captured"], rows["type"], rows["version"] = 54 + payload, _CUT_AT, 0x0800, 0x45
    rows["total"], rows["ident"], rows["ttl"], rows["protocol"] = 40 + payload, number * 8 + step + 1 & 0xFFFF, 64, 6
    rows["source"], rows["destination"] = np.where(up, client, 0x0A0A0A0A), np.where(up, 0x0A0A0A0A, client)
    rows["source_port"], rows["destination_port"] = np.where(up, port, PORT), np.where(up, PORT, port)
    rows["sequence"] = np.where(up, client_first, server_first) + sequence & 0xFFFF_FFFF
    rows["acknowledged"] = np.where(up, server_first, client_first) + acknowledged & 0xFFFF_FFFF
    rows["offset"], rows["flags"] = 0x50, flags
    return rows[np.argsort(time_us, kind="stable")]


def _stallscope() -> str:
    return str(Path(sys.executable).with_name("stallscope"))


def _measured(command: Sequence[str]) -> tuple[float, float]:
    """Return the seconds and the peak memory, MB, of a command."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.monotonic() - began, used.ru_maxrss / 1024
