"""Runs one Redis server of the lab on loopback, in a folder of its own, and always stops it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab import LabError, LabUsageError
from lab.build import is_built, load_builds, server_path

HOST = "127.0.0.1"
MAX_CLIENTS = 20_000
FILES = MAX_CLIENTS + 64
"""Descriptors: Redis wants 32 besides those of its clients."""

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
LAUNCH = Path(__file__).with_name("launch.py")


@dataclass(frozen=True)
class Server:
    """A running server: its process, its port on 127.0.0.1, its binary, its version and its folder."""

    pid: int
    port: int
    path: Path
    version: tuple[int, int, int]
    folder: Path

    def command(self, *words: str) -> str:
        """Return the server's answer to one command, on a connection of its own; strings only.

        Raises:
            LabError: the server answered with an error or not at all.
        """
        request = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w.encode()) for w in words)
        try:
            with socket.create_connection((HOST, self.port), timeout=STOP_TIMEOUT_S) as connection:
                connection.sendall(request)
                with connection.makefile("rb") as answer:
                    first = answer.readline().rstrip(b"\r\n")
                    if first.startswith(b"$"):
                        return answer.read(int(first[1:])).decode()
        except OSError as error:
            raise LabError(f"{self.path} does not answer {words[0]} on port {self.port}: {error}") from error
        if not first.startswith((b"+", b":")):
            raise LabError(f"{self.path} answered {words[0]} with {first.decode()!r}")
        return first[1:].decode()


@contextmanager
def running_server(
    build: str | Path = "2.8.17",
    *,
    backlog: int = 511,
    port: int | None = None,
    options: tuple[str, ...] = (),
) -> Iterator[Server]:
    """Start a server, yield it once it answers, and stop it by its pid whatever happens.

    Args:
        build: a name in ``builds.toml``, or the path of any redis-server.
        backlog: its tcp-backlog; the kernel's accept queue then holds one connection more.
        port: the port on 127.0.0.1; a free one when None.
        options: further words for its command line, as ``("--hz", "50")``.

    Raises:
        LabError: it is not built, the backlog is beyond the kernel's limit, or it did not start.
    """
    path = find_server(build)
    version = read_version(path)
    somaxconn = int(SOMAXCONN.read_text())
    if backlog > somaxconn:
        raise LabError(f"a backlog of {backlog} would be cut to {somaxconn}; sysctl -w net.core.somaxconn={backlog}")
    with tempfile.TemporaryDirectory(prefix="stallscope-lab-") as name:
        folder = Path(name)
        chosen = port or _free_port()
        log = folder / "redis.log"
        words = ["--port", str(chosen), "--bind", HOST, "--save", "", "--maxclients", str(MAX_CLIENTS)]
        words += ["--tcp-backlog", str(backlog), "--dir", name, "--logfile", str(log), *options]
        if version >= (3, 2, 0):
            # The load comes from 127.0.0.1 to .200; newer protected mode knows only 127.0.0.1 as its own.
            words += ["--protected-mode", "no"]
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCH), str(os.getpid()), str(FILES), str(path), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            _wait_until_it_answers(process, chosen, path, log)
            yield Server(process.pid, chosen, path, version, folder)
        finally:
            stop(process)


def find_server(build: str | Path) -> Path:
    """Return the absolute path of a built server, by its name in ``builds.toml`` or its own path.

    Raises:
        LabError: there is no such build, or it is not built yet; the message names the command.
    """
    if isinstance(build, Path) or "/" in build:
        # Not resolved: Debian's redis-server is a link, and its name says what it is to do.
        path = Path(build).absolute()
        if not path.is_file():
            raise LabUsageError(f"there is no redis-server at {path}; give the path of one, or --build NAME")
        return path
    builds = load_builds()
    if build not in builds:
        raise LabUsageError(f'there is no build "{build}"; choose among {", ".join(builds)}')
    if not is_built(builds[build]):
        raise LabError(f"Redis {build} is not built, or its inputs have changed; run vagrant/lab/build.py {build}")
    return server_path(build)


def read_version(path: Path) -> tuple[int, int, int]:
    """Return the version that ``redis-server --version`` prints.

    Raises:
        LabError: it cannot be run, or is not a Redis server.
    """
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=STOP_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"cannot run {path} --version: {error}; give the path of a redis-server") from error
    found = re.search(r"\bv=(\d+)\.(\d+)\.(\d+)", done.stdout)
    if found is None:
        raise LabError(f"{path} --version names no version; give the path of a redis-server")
    return int(found[1]), int(found[2]), int(found[3])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Stop a process this program started: ask, wait, then kill; return when it is gone."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, path: Path, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            said = lines[-1].strip()[-160:] if lines else "nothing in its log"
            raise LabError(f"{path} ended with status {process.returncode} at its start: {said}")
        try:
            with socket.create_connection((HOST, port), timeout=1) as connection:
                # Another server may have the port: ours then ends, but this one would answer.
                connection.sendall(b"INFO server\r\n")
                if b"\r\nprocess_id:%d\r\n" % process.pid in connection.recv(65536):
                    return
        except OSError:
            pass
        time.sleep(0.01)
    raise LabError(f"{path} did not answer on port {port} within {START_TIMEOUT_S:.0f} s; read {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
