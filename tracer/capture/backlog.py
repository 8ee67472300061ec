"""Samples the accept queues of the targets' listeners and the kernel counters of their namespaces.

This is the lowest rung of the listener's ladder: no BPF, no kernel probes, only what ``ss -ltm`` and
``nstat`` read. The queue is asked for by sock_diag 100 times a second. A general netlink library needs
0.8 ms of CPU for one such question, and even the kernel 0.5 ms to walk its table of listeners; asking for
one known socket takes 0.01 ms. Hence 40 lines of wire format of our own, and a walk only once a second.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stallscope.probes.catalogue import Field
from stallscope.tracer.capture.namespace import (
    COUNTER_NAMES,
    KernelCounters,
    call_inside,
    namespace_inode,
    read_sysctls,
)
from stallscope.tracer.capture.probe_ids import COUNTER_PROBE, QUEUE_PROBE
from stallscope.tracer.layout import EVENT, NO_STACK
from stallscope.tracer.manifest import ListenerInfo, NamespaceInfo

QUEUE_FIELDS = (
    Field("queue_length", "connections", slot=0, bits=32),
    Field("queue_limit", "connections", slot=0, shift=32, bits=32),
    Field("drops", "connections", slot=1),
    Field("listener", "index", slot=2),
)
"""What the values of an accept-queue sample mean; ``drops`` is the socket's own sk_drops since it was made."""

COUNTER_FIELDS = (
    Field("counter", "index", slot=0),
    Field("count", "events", slot=1),
    Field("namespace", "index", slot=2),
)
"""What the values of a kernel-counter sample mean; ``count`` is the counter's absolute value."""

REPEAT_NS = 1_000_000_000
"""An unchanged value is stored again after this long, so that a gap in the samples can be told from silence."""

_WALK_NS = 100_000_000
"""How often listeners are looked for while a server has none."""

_NOTHING: npt.NDArray[np.void] = np.zeros(0, EVENT)

# Linux include/uapi/linux/sock_diag.h and inet_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_TCP_LISTEN = 10
_INET_DIAG_SKMEMINFO = 7
_SK_MEMINFO_DROPS = 8
_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=BBBB48sIIIII")
_ATTRIBUTE = struct.Struct("=HH")


@dataclass(frozen=True)
class ListenerState:
    """One listening TCP socket as the kernel reports it.

    Attributes:
        queue_length: connections that wait for accept(); queue_limit: the backlog in force.
        drops: connection requests this socket dropped since it was made, for any reason.
        identity: the kernel's ``struct inet_diag_sockid`` of it, with its cookie.
    """

    inode: int
    family: int
    address: str
    port: int
    queue_length: int
    queue_limit: int
    drops: int
    identity: bytes

    @property
    def cookie(self) -> int:
        """Return the kernel's number of this socket, which no other socket ever has."""
        return int.from_bytes(self.identity[40:48], "little")

    @property
    def name(self) -> str:
        """Return ``127.0.0.1:6379`` or ``[::1]:6379``."""
        return f"[{self.address}]:{self.port}" if self.family == socket.AF_INET6 else f"{self.address}:{self.port}"


class SockDiag:
    """A sock_diag socket in one network namespace."""

    def __init__(self, pid: int) -> None:
        """Open it in the namespace of this process; raises SurroundingsError if that is refused."""

        def connect() -> socket.socket:
            return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)

        self._socket = call_inside(pid, connect)
        self._requests = [
            _request(family, _NLM_F_REQUEST | _NLM_F_DUMP, bytes(48)) for family in (socket.AF_INET, socket.AF_INET6)
        ]

    def listeners(self) -> list[ListenerState]:
        """Return every listening TCP socket of the namespace, IPv4 and IPv6: the kernel walks its table."""
        states: list[ListenerState] = []
        for request in self._requests:
            self._socket.send(request)
            while not _parse(self._socket.recv(65536), states):
                pass
        return states

    def listener(self, known: ListenerState) -> ListenerState | None:
        """Return the present state of one socket that ``listeners`` told of, or None when it cannot be found.

        That is so when it was closed, and when it shares its address with others (SO_REUSEPORT).
        """
        self._socket.send(_request(known.family, _NLM_F_REQUEST, known.identity))
        states: list[ListenerState] = []
        _parse(self._socket.recv(65536), states)
        return states[0] if states else None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def socket_inodes(pid: int, below: int = 0) -> set[int]:
    """Return the inodes of the sockets a process holds open; empty when it is gone.

    Args:
        pid: the process. below: only of descriptors with smaller numbers than this, 0: all.
    """
    inodes: set[int] = set()
    try:
        numbers = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return inodes
    names = [f"/proc/{pid}/fd/{number}" for number in numbers if not below or number < below]
    for name in names:
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(name))
        except OSError:
            continue
        if match:
            inodes.add(int(match[1]))
    return inodes


class _Namespace:
    """What is sampled in one network namespace."""

    def __init__(self, info: NamespaceInfo, pid: int) -> None:
        self.info = info
        self.diag = SockDiag(pid)
        self.counters = KernelCounters(pid)
        self.pids: set[int] = set()
        self.watched: dict[int, ListenerInfo] = {}
        self.closed: list[ListenerInfo] = []
        self.foreign: set[int] = set()
        self.known: list[ListenerState] = []
        self.next_walk_ns = 0
        self.last_counts: tuple[int, ...] = ()
        self.next_repeat_ns = 0

    def close(self) -> None:
        """Close its socket and file."""
        self.diag.close()
        self.counters.close()

    def states(self, now_ns: int) -> list[ListenerState]:
        """Return the watched listeners' states; all listeners' when it was time to look for new ones."""
        if now_ns < self.next_walk_ns:
            found = [self.diag.listener(state) for state in self.known]
            if None not in found:
                return [state for state in found if state is not None]
        # a server that does not listen yet is about to
        self.next_walk_ns = now_ns + (REPEAT_NS if self.known or not self.pids else _WALK_NS)
        states = self.diag.listeners()
        there = {state.inode for state in states}
        self.foreign &= there
        for inode in self.watched.keys() - there:
            self.closed.append(self.watched.pop(inode))
        return states


class BacklogSampler:
    """Turns accept queues and kernel counters into rows, when they change or once a second."""

    def __init__(self) -> None:
        self.listeners: list[ListenerInfo] = []
        self.namespaces: list[NamespaceInfo] = []
        self._opened: list[ListenerInfo] = []
        self._next_listener = self._next_namespace = 0
        self._by_inode: dict[int, _Namespace] = {}
        self._last: dict[tuple[int, int], tuple[int, int, int]] = {}

    def add_target(self, pid: int) -> int:
        """Watch the listeners of a process; returns the index of its network namespace.

        Raises:
            TargetError: the process is gone. SurroundingsError: its namespace cannot be entered.
        """
        inode = namespace_inode(pid)
        place = self._by_inode.get(inode)
        if place is None:
            counters = KernelCounters(pid)
            start = dict(zip(COUNTER_NAMES, counters.read(), strict=True))
            counters.close()
            info = NamespaceInfo(self._next_namespace, inode, start, read_sysctls(pid))
            place = self._by_inode[inode] = _Namespace(info, pid)
            self._next_namespace += 1
            self.namespaces.append(info)
        place.pids.add(pid)
        place.foreign.clear()
        self._discover(place, place.diag.listeners())
        return place.info.index

    def remove_target(self, pid: int) -> None:
        """Stop watching a process's listeners; its namespace's counters are sampled on."""
        for place in self._by_inode.values():
            place.pids.discard(pid)
            for inode, info in list(place.watched.items()):
                if info.pid == pid:
                    place.closed.append(place.watched.pop(inode))

    def forget(self, keep_pids: Collection[int], keep_namespaces: Collection[int]) -> None:
        """Forget listeners that were closed, and namespaces that nobody watched lives in any more.

        Args:
            keep_pids: processes whose closed listeners are still told of; keep_namespaces: indexes.
        """
        watched = {info.index for place in self._by_inode.values() for info in place.watched.values()}
        self.listeners = [info for info in self.listeners if info.index in watched or info.pid in keep_pids]
        kept = {info.namespace for info in self.listeners} | set(keep_namespaces)
        for inode, place in list(self._by_inode.items()):
            if not place.pids and place.info.index not in kept:
                place.close()
                del self._by_inode[inode]
        here = {place.info.index for place in self._by_inode.values()}
        self.namespaces = [info for info in self.namespaces if info.index in here]
        listeners = {info.index for info in self.listeners}
        self._last = {
            key: value
            for key, value in self._last.items()
            if (key[1] in listeners if key[0] == QUEUE_PROBE else key[1] >> 8 in here)
        }

    def repeat(self) -> None:
        """Have the next sample hold a row of everything, changed or not."""
        self._last.clear()
        for place in self._by_inode.values():
            place.next_repeat_ns = 0

    def take_opened(self) -> list[ListenerInfo]:
        """Return the listeners that were found since the last call."""
        opened, self._opened = self._opened, []
        return opened

    def take_closed(self) -> list[ListenerInfo]:
        """Return the listeners that are no longer watched, each once."""
        closed = [info for place in self._by_inode.values() for info in place.closed]
        for place in self._by_inode.values():
            place.closed.clear()
        return closed

    def count_from(self, namespace: int, counters: dict[str, int]) -> None:
        """Take these values of a namespace's counters for those at its start."""
        self.namespaces = [
            replace(info, counters_start=counters) if info.index == namespace else info for info in self.namespaces
        ]

    def sample(self, now_ns: int) -> npt.NDArray[np.void]:
        """Return the rows (dtype ``EVENT``) of everything that changed since the last call.

        Args:
            now_ns: CLOCK_MONOTONIC, taken right before the call.
        """
        rows: list[tuple[int, int, int, tuple[int, int, int]]] = []
        for place in self._by_inode.values():
            states = place.states(now_ns)
            if any(state.inode not in place.watched and state.inode not in place.foreign for state in states):
                self._discover(place, states)
            place.known = [state for state in states if state.inode in place.watched]
            for state in place.known:
                info = place.watched[state.inode]
                value = (state.queue_length | state.queue_limit << 32, state.drops, info.index)
                if self._changed(QUEUE_PROBE, info.index, value, now_ns):
                    rows.append((now_ns, info.pid, QUEUE_PROBE, value))
            counts = place.counters.read()
            if counts != place.last_counts or now_ns >= place.next_repeat_ns:
                place.last_counts, place.next_repeat_ns = counts, now_ns + REPEAT_NS
                for counter, count in enumerate(counts):
                    value = (counter, count, place.info.index)
                    if self._changed(COUNTER_PROBE, counter | place.info.index << 8, value, now_ns):
                        rows.append((now_ns, 0, COUNTER_PROBE, value))
        if not rows:
            return _NOTHING
        events = np.zeros(len(rows), EVENT)
        for event, (start_ns, pid, probe, value) in zip(events, rows, strict=True):
            event["start_ns"], event["pid"], event["tid"], event["probe"] = start_ns, pid, pid, probe
            event["value"], event["stack"] = value, NO_STACK
        return events

    def counters_now(self) -> list[dict[str, int]]:
        """Return each namespace's counters by name, in the order of ``namespaces``."""
        return [
            dict(zip(COUNTER_NAMES, place.counters.read(), strict=True))
            for place in sorted(self._by_inode.values(), key=lambda place: place.info.index)
        ]

    def overflows(self) -> int:
        """Return how many ListenOverflows were counted since the namespaces were added, all together."""
        return sum(
            now["ListenOverflows"] - info.counters_start["ListenOverflows"]
            for now, info in zip(self.counters_now(), self.namespaces, strict=True)
        )

    def close(self) -> None:
        """Close all sockets and files."""
        for place in self._by_inode.values():
            place.close()
        self._by_inode.clear()

    def _changed(self, probe: int, key: int, value: tuple[int, int, int], now_ns: int) -> bool:
        last = self._last.get((probe, key))
        if last is not None and last[:2] == value[:2] and now_ns - last[2] < REPEAT_NS:
            return False
        self._last[probe, key] = (value[0], value[1], now_ns)
        return True

    def _discover(self, place: _Namespace, states: Iterable[ListenerState]) -> None:
        """Find out which unknown listeners belong to a target."""
        owners = {inode: pid for pid in place.pids for inode in socket_inodes(pid)}
        for state in states:
            if state.inode in place.watched:
                continue
            owner = owners.get(state.inode)
            if owner is None:
                place.foreign.add(state.inode)
                continue
            info = ListenerInfo(
                self._next_listener, state.name, state.port, owner, state.inode, place.info.index,
                state.queue_limit, state.cookie,
            )  # fmt: skip
            self._next_listener += 1
            self.listeners.append(info)
            self._opened.append(info)
            place.watched[state.inode] = info


def _request(family: int, flags: int, identity: bytes) -> bytes:
    """Return the netlink request for listening TCP sockets of a family, with their memory counters."""
    extensions = 1 << (_INET_DIAG_SKMEMINFO - 1)
    body = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, extensions, 0, 1 << _TCP_LISTEN) + identity
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, flags, 0, 0) + body


def _parse(datagram: bytes, states: list[ListenerState]) -> bool:
    """Append the sockets in one datagram to ``states``; returns whether the dump has ended."""
    offset = 0
    while offset + _HEADER.size <= len(datagram):
        length, kind, _, _, _ = _HEADER.unpack_from(datagram, offset)
        if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < _HEADER.size:
            return True
        if kind == _SOCK_DIAG_BY_FAMILY:
            states.append(_parse_listener(datagram, offset + _HEADER.size, offset + length))
        offset += (length + 3) & ~3
    return False


def _parse_listener(data: bytes, start: int, end: int) -> ListenerState:
    """Return the socket that one ``struct inet_diag_msg`` with its attributes tells of."""
    family, _, _, _, identity, _, queue_length, queue_limit, _, inode = _MESSAGE.unpack_from(data, start)
    port, address = int.from_bytes(identity[:2], "big"), identity[4:20]
    drops = 0
    offset = start + _MESSAGE.size
    while offset + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        if kind == _INET_DIAG_SKMEMINFO and length >= 4 * (_SK_MEMINFO_DROPS + 2):
            (drops,) = struct.unpack_from("=I", data, offset + 4 + 4 * _SK_MEMINFO_DROPS)
        offset += (length + 3) & ~3
    text = socket.inet_ntop(family, address[:4] if family == socket.AF_INET else address)
    return ListenerState(inode, family, text, port, queue_length, queue_limit, drops, identity)
