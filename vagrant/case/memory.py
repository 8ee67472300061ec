"""What the threshold patch keeps: the memory of a server whose clients have each sent one command, and idle.

Nothing of Stallscope's: the server's INFO and CLIENT LIST, and the kernel's smaps_rollup.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lab.clients import SOURCES
from lab.launch import allow_files
from lab.server import HOST, Server, running_server

from case import CaseError
from case.steps import MemoryStep

SETTLED_IDLE_S = 15
"""clientsCron() visits 50 clients in each of 10 ticks a second: 5,000 within 10 s, and trims what idled 3 s."""

LOOK_INTERVAL_S = 0.5
SETTLE_TIMEOUT_S = 120.0
SPARE_FILES = 64
_FIELD = re.compile(r"\b(idle|qbuf|qbuf-free)=(\d+)")


@dataclass(frozen=True)
class Reading:
    """One look at a server, in bytes.

    Attributes:
        used_bytes: what its allocator has handed out (INFO used_memory).
        resident_bytes: what is in memory (Rss of /proc/PID/smaps_rollup).
        buffer_bytes: allocated for the clients' query buffers, used and free (CLIENT LIST qbuf, qbuf-free).
        full_buffers: clients whose query buffer is not empty.
        clients: clients in CLIENT LIST, the asking one not counted.
    """

    used_bytes: int
    resident_bytes: int
    buffer_bytes: int
    full_buffers: int
    clients: int


@dataclass(frozen=True)
class MemoryRun:
    """One server measured: before its clients came, when each had been answered, and when all had idled.

    Attributes:
        build: of the lab; clients: connected; value_bytes: in the one command of each.
    """

    build: str
    clients: int
    value_bytes: int
    run: int
    before: Reading
    answered: Reading
    settled: Reading


def read_memory(server: Server) -> Reading:
    """Return how a server's memory is at this moment."""
    listed = server.command("CLIENT", "LIST").splitlines()
    buffers = [_buffer_bytes(line) for line in listed if "cmd=client" not in line]
    rollup = Path(f"/proc/{server.pid}/smaps_rollup").read_text()
    resident = re.search(r"^Rss:\s+(\d+) kB$", rollup, re.MULTILINE)
    used = re.search(r"^used_memory:(\d+)\r?$", server.command("INFO"), re.MULTILINE)
    if resident is None or used is None:
        raise CaseError("the server's memory cannot be read; INFO or smaps_rollup lacks a field")
    return Reading(
        used_bytes=int(used[1]),
        resident_bytes=int(resident[1]) * 1024,
        buffer_bytes=sum(buffers),
        full_buffers=sum(size > 0 for size in buffers),
        clients=len(buffers),
    )


def _fields(line: str) -> dict[str, int]:
    return {name: int(value) for name, value in _FIELD.findall(line)}


def _buffer_bytes(line: str) -> int:
    fields = _fields(line)
    return fields["qbuf"] + fields["qbuf-free"]


def measure(build: str, clients: int, value_bytes: int, run: int) -> MemoryRun:
    """Connect the clients to a server of that build, have each send one SET, and read its memory.

    Raises:
        CaseError: the clients do not come to rest in time.
        LabError: the server does not run.
    """
    allow_files(clients + SPARE_FILES)
    command = b"*3\r\n$3\r\nSET\r\n$5\r\nvalue\r\n$%d\r\n%s\r\n" % (value_bytes, b"x" * value_bytes)
    with ExitStack() as stack:
        server = stack.enter_context(running_server(build))
        before = read_memory(server)
        for number in range(clients):
            connection = stack.enter_context(socket.socket())
            connection.bind((SOURCES[number % len(SOURCES)], 0))
            connection.connect((HOST, server.port))
            connection.sendall(command)
            if connection.recv(16) != b"+OK\r\n":
                raise CaseError(f"Redis {build} did not take a value of {value_bytes} bytes; read its log")
        answered = read_memory(server)
        _wait_until_settled(server, clients)
        return MemoryRun(build, clients, value_bytes, run, before, answered, read_memory(server))


def _wait_until_settled(server: Server, clients: int) -> None:
    deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < deadline_s:
        idle_s = [_fields(line)["idle"] for line in server.command("CLIENT", "LIST").splitlines()]
        if sum(idle >= SETTLED_IDLE_S for idle in idle_s) >= clients:
            return
        time.sleep(LOOK_INTERVAL_S)
    raise CaseError(f"the clients of {server.path} were not idle within {SETTLE_TIMEOUT_S:.0f} s; try again")


def plan(step: MemoryStep) -> Sequence[tuple[str, int, int]]:
    """Return (build, value size, run) of all measurements, in rounds over the builds."""
    return [(build, size, run) for run in range(1, step.runs + 1) for size in step.value_bytes for build in step.builds]
