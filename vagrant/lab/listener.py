"""The listener as the kernel shows it to anyone: its accept queue by sock_diag, its counters in /proc.

On purpose none of Stallscope's own code: what the tracer reports is checked against this.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from types import TracebackType

from lab import LabError

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR, NLMSG_DONE = 2, 3
TCP_LISTEN = 10
NETSTAT = Path("/proc/self/net/netstat")

_NLMSGHDR = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")
_PORTS = struct.Struct("!HH")
_QUEUES = struct.Struct("=II")
_PORT_OFFSET = 4
_QUEUES_OFFSET = 56
"""In struct inet_diag_msg (linux/inet_diag.h): id.idiag_sport; idiag_rqueue followed by idiag_wqueue."""


class ListenerQueue:
    """Reads the accept queue of the IPv4 listener on one port, as ``ss -ltn`` does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG)
        address = _PORTS.pack(port, 0) + bytes(32 + 4) + b"\xff" * 8
        body = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, 1 << TCP_LISTEN) + address
        header = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST_DUMP, 1, 0)
        self._request = header + body

    def __enter__(self) -> ListenerQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def read(self) -> tuple[int, int] | None:
        """Return (connections waiting to be accepted, the backlog), or None when nothing listens there.

        Raises:
            LabError: the kernel refuses sock_diag.
        """
        self._socket.send(self._request)
        found = None
        while True:
            answer = self._socket.recv(65536)
            offset = 0
            while offset < len(answer):
                length, kind = struct.unpack_from("=IH", answer, offset)
                if kind == NLMSG_DONE:
                    return found
                if kind == NLMSG_ERROR:
                    raise LabError("the kernel refuses sock_diag; load the modules tcp_diag and inet_diag")
                message = offset + _NLMSGHDR.size
                if _PORTS.unpack_from(answer, message + _PORT_OFFSET)[0] == self._port:
                    waiting, backlog = _QUEUES.unpack_from(answer, message + _QUEUES_OFFSET)
                    found = (waiting, backlog)
                offset += (length + 3) & ~3


def read_listen_counters() -> tuple[int, int]:
    """Return (ListenOverflows, ListenDrops) of this network namespace since it was made."""
    with NETSTAT.open() as lines:
        names = lines.readline().split()
        counters = dict(zip(names, lines.readline().split(), strict=True))
    return int(counters["ListenOverflows"]), int(counters["ListenDrops"])
