"""A process's network namespace: sockets opened inside it, its kernel counters, its sysctls."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stallscope.tracer.errors import SurroundingsError, TargetError

CLONE_NEWNET = 0x40000000
"""Linux include/uapi/linux/sched.h."""

COUNTER_NAMES = (
    "ListenOverflows",
    "ListenDrops",
    "TCPReqQFullDoCookies",
    "TCPReqQFullDrop",
    "SyncookiesSent",
    "SyncookiesRecv",
    "SyncookiesFailed",
    "EmbryonicRsts",
)
"""TcpExt counters that tell what happened to a connection the listener did not take; index = counter sample's id."""

SYSCTLS = (
    "net.core.somaxconn",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_abort_on_overflow",
    "net.ipv4.tcp_synack_retries",
)

_T = TypeVar("_T")


def namespace_inode(pid: int | str) -> int:
    """Return the inode number that identifies the network namespace of a process ("self" for ours).

    Raises:
        TargetError: the process is gone or may not be looked at.
    """
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError as error:
        raise TargetError(f"cannot read the network namespace of process {pid}: {error.strerror}") from error


def call_inside(pid: int, function: Callable[[], _T]) -> _T:
    """Return what ``function`` returns when called inside the network namespace of a process.

    Runs in a thread of its own, since a thread that entered a namespace should not go on with other work.

    Raises:
        SurroundingsError: entering is refused (CAP_SYS_ADMIN).
    """
    if namespace_inode(pid) == namespace_inode("self"):
        return function()
    results: list[_T] = []
    failures: list[Exception] = []

    def enter() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            with Path(f"/proc/{pid}/ns/net").open("rb") as handle:
                if libc.setns(handle.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            results.append(function())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=enter, name="namespace")
    thread.start()
    thread.join()
    if failures:
        failure = failures[0]
        if isinstance(failure, OSError):
            raise SurroundingsError(
                f"cannot enter the network namespace of process {pid}: {failure.strerror}; "
                "that takes CAP_SYS_ADMIN: run as root"
            ) from failure
        raise failure
    return results[0]


class KernelCounters:
    """The TcpExt counters of one network namespace, read through one open file."""

    def __init__(self, pid: int) -> None:
        """Open ``/proc/PID/net/netstat``; the open file stays with that namespace when the process ends.

        Raises:
            TargetError: the process is gone.
        """
        try:
            self._fd = os.open(f"/proc/{pid}/net/netstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TargetError(f"cannot read the network counters of process {pid}: {error.strerror}") from error
        names, _ = self._lines()
        self._columns = [names.index(name.encode()) if name.encode() in names else -1 for name in COUNTER_NAMES]

    def read(self) -> tuple[int, ...]:
        """Return the counters in the order of ``COUNTER_NAMES``; one this kernel does not have is 0."""
        values = os.pread(self._fd, 16384, 0).split(b"\n", 2)[1].split()
        return tuple(int(values[column]) if column >= 0 else 0 for column in self._columns)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _lines(self) -> tuple[list[bytes], list[bytes]]:
        names, values = os.pread(self._fd, 16384, 0).split(b"\n", 2)[:2]
        return names.split(), values.split()


def read_sysctls(pid: int) -> dict[str, str]:
    """Return the sysctls of a process's network namespace that decide about overflows; absent ones are left out."""

    def read() -> dict[str, str]:
        found = {}
        for name in SYSCTLS:
            path = Path("/proc/sys") / name.replace(".", "/")
            if path.is_file():
                found[name] = path.read_text(encoding="ascii").strip()
        return found

    return call_inside(pid, read)
