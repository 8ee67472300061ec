"""What the tests of ``stallscope watch`` share: a running watch, what it says, and the captures it keeps."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lab.server import HOST, Server
from tracing import STALLSCOPE, Command, Rows, started, until

from stallscope.tracer.manifest import ITERATION
from stallscope.tracer.recording import read_recording

CAPTURED = re.compile(r"^captured .*?: (\S+\.stall)", re.MULTILINE)
TRIGGERED = re.compile(r"^trigger: (.*)$", re.MULTILINE)


class Watch(Command):
    """A ``stallscope watch`` that is under way."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        super().__init__(process)
        self.folder = folder

    def captured(self) -> list[Path]:
        """Return the captures it has told of, in their order."""
        return [Path(path) for path in CAPTURED.findall(self.said)]

    def triggered(self) -> list[str]:
        return TRIGGERED.findall(self.said)

    def capture(self, number: int) -> Rows:
        """Wait for its capture of this number, from 0, and return its rows."""
        until(lambda: len(self.captured()) > number or self.process.poll() is not None, f"capture {number}")
        assert len(self.captured()) > number, self.said
        return Rows(read_recording(self.captured()[number]))

    def resident_kb(self) -> int:
        """Return its resident memory, kB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")))


@contextmanager
def watching(
    folder: Path, *words: str, prefix: Sequence[str] = (), environment: dict[str, str] | None = None
) -> Iterator[Watch]:
    """Run ``stallscope watch`` with these words, and yield it once it watches."""
    watch = Watch(started([*prefix, STALLSCOPE, "watch", "-o", str(folder), *words], environment), folder)
    try:
        watch.wait_until_it_says("watching ")
        yield watch
    finally:
        watch.close()


@contextmanager
def watching_closely(folder: Path, server: Server, *triggers: str) -> Iterator[Watch]:
    """Watch a server for these triggers: nothing is left out, and 2 s before and 1 s after are in a capture."""
    words = ["-p", str(server.pid), "--before", "2s", "--after", "1s", "--cooldown", "0", "--max-overhead", "100%"]
    for trigger in triggers:
        words += ["--trigger", trigger]
    with watching(folder, *words) as watch:
        yield watch


def iterations(rows: Rows, at_least_ns: int) -> list[tuple[int, int]]:
    """Return (start, end) of the event loop iterations that took so long."""
    (probe,) = [probe.id for probe in rows.manifest.probes if probe.kind == ITERATION]
    found = rows.all[(rows.all["probe"] == probe) & rows.all["is_finished"]]
    found = found[found["end_ns"] - found["start_ns"] >= at_least_ns]
    return list(zip(found["start_ns"].tolist(), found["end_ns"].tolist(), strict=True))


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Stop a server's process, as a debugger does: the kernel goes on to take connections for it."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        until(lambda: _state(server.pid) == "T", "the server is stopped")
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@contextmanager
def connecting(server: Server, count: int) -> Iterator[list[socket.socket]]:
    """Begin that many connections, whatever becomes of them."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((HOST, server.port))
            clients.append(client)
        yield clients


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
