"""Finds Redis and Valkey servers, knows when one is gone, and asks one about itself."""

from __future__ import annotations

import os
import re
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stallscope.tracer.capture.backlog import SockDiag, socket_inodes
from stallscope.tracer.capture.binary import ProcessImage, open_process
from stallscope.tracer.capture.namespace import call_inside
from stallscope.tracer.errors import StallscopeError, SurroundingsError, TargetError

_LOOKS_LIKE_REDIS = re.compile(r"redis|valkey|keydb", re.IGNORECASE)

_INFO_FIELDS = (
    "redis_version",
    "valkey_version",
    "server_name",
    "redis_mode",
    "role",
    "uptime_in_seconds",
    "hz",
    "mem_allocator",
    "used_memory",
    "used_memory_rss",
    "connected_clients",
    "client_biggest_input_buf",
    "total_connections_received",
    "total_commands_processed",
    "rejected_connections",
)
_CONFIG_FIELDS = (
    "tcp-backlog",
    "maxclients",
    "hz",
    "timeout",
    "client-query-buffer-limit",
    "activerehashing",
    "max-new-connections-per-cycle",
    "jemalloc-bg-thread",
)


@dataclass(frozen=True)
class Target:
    """One process to trace, opened.

    Attributes:
        pid: process id; pidfd: becomes readable when it ends.
        image: its binary and libraries.
        exe: path of the binary as the process sees it.
        exe_id: device and inode of the binary: changes when the process executes another one.
        product: ``redis``, ``valkey`` or ``""`` for another program.
        version: as ``2.8.17``, ``""`` when the binary does not tell; allocator: as ``jemalloc-3.6.0``.
    """

    pid: int
    pidfd: int
    image: ProcessImage
    exe: str
    exe_id: tuple[int, int]
    product: str
    version: str
    allocator: str

    def is_running(self) -> bool:
        """Return whether the process lives and still executes the same binary."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0) and _exe_id(self.pid) == self.exe_id

    def close(self) -> None:
        """Close the pidfd."""
        os.close(self.pidfd)


def open_target(pid: int, *, any_program: bool = False) -> Target:
    """Return the process opened for tracing.

    Args:
        pid: its process id.
        any_program: accept what is not a Redis or Valkey server too.

    Raises:
        TargetError: no such process, a thread's id, a kernel thread, or not a Redis.
        SymbolError: its binary cannot be read.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise TargetError(_no_process(pid)) from error
    try:
        exe_id = _exe_id(pid)
        if exe_id is None and _is_hidden(pid):
            raise TargetError(
                f"process {pid} ({_name(pid)}) may not be looked into: CAP_SYS_PTRACE is missing; run as root"
            )
        if exe_id is None:
            raise TargetError(
                f"process {pid} ({_name(pid)}) has no program file that can be read; is it a kernel thread?"
            )
        image = open_process(pid)
        product = image.exe.server
        if not product and not any_program:
            raise TargetError(
                f"process {pid} ({_name(pid)}) is not a Redis or Valkey server; "
                "give a server's pid, or trace your own functions with --no-default-probes --probe FUNC"
            )
        return Target(
            pid,
            pidfd,
            image,
            os.readlink(f"/proc/{pid}/exe"),
            exe_id,
            product,
            image.exe.version,
            _allocator(image),
        )
    except OSError as error:
        os.close(pidfd)
        raise TargetError(_no_process(pid)) from error
    except StallscopeError:
        os.close(pidfd)
        raise


def pids_listening_on(port: int) -> list[int]:
    """Return the Redis-like processes that listen on a TCP port, in any network namespace, lowest pid first."""
    found = []
    for pid in _redis_like_pids():
        if port in listening_ports(pid):
            found.append(pid)
    return found


def find_by_port(port: int) -> list[int]:
    """Return the processes that listen on a port.

    Raises:
        TargetError: none does; names the servers that were found.
    """
    pids = pids_listening_on(port)
    if not pids:
        others = ", ".join(
            f"{pid} on {' '.join(map(str, sorted(listening_ports(pid)))) or 'no port'}" for pid in _redis_like_pids()
        )
        found = f"found pid {others}" if others else "none is running here"
        raise TargetError(f"no Redis or Valkey server listens on port {port}; {why_hidden(port) or found}")
    return pids


def why_hidden(port: int) -> str:
    """Return why nobody seems to listen on a port of our network namespace although a socket does, "" if none does."""
    try:
        diag = SockDiag(os.getpid())
    except SurroundingsError:
        return ""
    try:
        listens = any(state.port == port for state in diag.listeners())
    finally:
        diag.close()
    if not listens or pids_listening_on(port):
        return ""
    return (
        "a socket listens there, but its process may not be looked into, or is no such server; run as root, or with "
        "CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH"
    )


def listening_ports(pid: int, below: int = 0) -> set[int]:
    """Return the TCP ports a process listens on; empty when it is gone or may not be looked at.

    Args:
        pid: the process. below: look only at descriptors with smaller numbers than this, 0: at all.
    """
    owned = socket_inodes(pid, below)
    try:
        diag = SockDiag(pid)
    except SurroundingsError:
        return set()
    try:
        return {state.port for state in diag.listeners() if state.inode in owned}
    finally:
        diag.close()


def server_information(pid: int, port: int, password: str = "", timeout_s: float = 0.5) -> dict[str, str]:
    """Return selected INFO and CONFIG values of a server, asked over one connection inside its namespace.

    Empty when it does not answer in time, or asks for a password that was not given: a stalled server
    must not hold up its tracer.
    """

    def ask() -> dict[str, str]:
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
            if password:
                _command(connection, "AUTH", password)
            lines = _command(connection, "INFO").splitlines()
            found = dict(line.split(":", 1) for line in lines if ":" in line)
            information = {name: found[name] for name in _INFO_FIELDS if name in found}
            for name in _CONFIG_FIELDS if information else ():
                answer = _command(connection, "CONFIG", "GET", name).split("\r\n")
                if len(answer) >= 5 and answer[0] == "*2":
                    information[f"config:{name}"] = answer[4]
            return information

    try:
        return call_inside(pid, ask)
    except (OSError, StallscopeError, ValueError):
        return {}


def _command(connection: socket.socket, *words: str) -> str:
    """Return the reply to one command, with its protocol marks; an error reply is returned as text too."""
    request = f"*{len(words)}\r\n" + "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
    connection.sendall(request.encode())
    reply = b""
    while not _is_whole(reply):
        part = connection.recv(65536)
        if not part:
            break
        reply += part
    return reply.decode(errors="replace")


def _is_whole(reply: bytes) -> bool:
    """Return whether a reply of one line, one bulk string or one flat array has arrived."""
    head, separator, rest = reply.partition(b"\r\n")
    if not separator:
        return False
    if head[:1] == b"$":
        return head == b"$-1" or len(rest) >= int(head[1:]) + 2
    if head[:1] == b"*":
        return rest.count(b"\r\n") >= 2 * max(int(head[1:]), 0)
    return True


def looks_like_redis(name: str) -> bool:
    """Return whether a process or file of this name may be a server; its binary decides."""
    return _LOOKS_LIKE_REDIS.search(name) is not None


def _redis_like_pids() -> Iterator[int]:
    import psutil  # only a search by port needs it

    for process in psutil.process_iter(["pid", "name", "exe"]):
        names = (process.info["name"] or "", Path(process.info["exe"] or "").name)
        if any(map(looks_like_redis, names)):
            yield process.info["pid"]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _exe_id(pid: int) -> tuple[int, int] | None:
    try:
        status = os.stat(f"/proc/{pid}/exe")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_hidden(pid: int) -> bool:
    """Return whether the kernel does not let us look into a process (Linux proc(5), PTRACE_MODE_READ)."""
    try:
        os.stat(f"/proc/{pid}/exe")
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _allocator(image: ProcessImage) -> str:
    for library in image.libraries:
        name = Path(library).name
        if name.startswith("libjemalloc"):
            return name
    version = image.exe.jemalloc_version
    return f"jemalloc-{version}" if version else ""


def _no_process(pid: int) -> str:
    thread_of = ""
    for line in _status_lines(pid):
        if line.startswith("Tgid:") and int(line.split()[1]) != pid:
            thread_of = line.split()[1]
    if thread_of:
        return f"{pid} is a thread of process {thread_of}; give -p {thread_of}"
    return f"there is no process {pid}; find the server with: pgrep -a redis-server"


def _status_lines(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
