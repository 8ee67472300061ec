"""What the tests of the listener's probes share: listeners in namespaces of their own, and who watches them.

Two sets of programs watch at once, one on the best rungs of this kernel and one on kprobes alone: whatever a
test does is seen by both, and held against the kernel's own counters.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from tracing import require_tracing, until

from stallscope.tracer.capture.backlog import ListenerState, SockDiag
from stallscope.tracer.capture.listener import EVENTS, FIELDS, ListenerPlan, plan_listener
from stallscope.tracer.capture.listener_program import COUNTED, LISTENER_PROBES, ListenerProgram
from stallscope.tracer.capture.namespace import COUNTER_NAMES, KernelCounters, call_inside, namespace_inode
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.layout import EVENT
from stallscope.tracer.manifest import ListenerInfo, ProbeCounters

TCP_SYNCNT = 7
"""Linux include/uapi/linux/tcp.h: how often an unanswered SYN is sent again."""

TAKEN = "SYN taken"
ACCEPT_QUEUE_FULL = "SYN refused: accept queue full"
SYN_QUEUE_FULL = "SYN refused: SYN queue full"
COOKIE_SENT = "SYN cookie sent"
ACK_SILENTLY = "third ACK refused silently: accept queue full"
ACK_WITH_RST = "third ACK refused with RST: accept queue full"
COOKIE_ACK = "cookie ACK refused: accept queue full"
ENQUEUED = "connection enqueued"
ACCEPTED = "connection accepted"

OVERFLOWS = (ACCEPT_QUEUE_FULL, ACK_SILENTLY, ACK_WITH_RST, COOKIE_ACK)
"""What the kernel counts as ListenOverflows."""

REFUSALS = (*OVERFLOWS, SYN_QUEUE_FULL, "SYN refused otherwise", "third ACK refused otherwise")
"""What the kernel counts as ListenDrops."""

_T = TypeVar("_T")


def require_kernel_probes() -> ListenerPlan:
    """Return how listeners are hooked here; skips the test where they cannot be."""
    require_tracing()
    try:
        return plan_listener()
    except SurroundingsError as error:
        pytest.skip(f"requires kernel probes ({error}): make test-vm")


class Namespace:
    """A network namespace with counters and sysctls of its own; it lives as long as a sleeping process."""

    def __init__(self, **sysctls: int) -> None:
        self._process = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        self.pid = self._process.pid
        until(lambda: namespace_inode(self.pid) != namespace_inode("self"), "the namespace is there")
        self.inode = namespace_inode(self.pid)
        self._counters = KernelCounters(self.pid)
        self.run("ip", "link", "set", "lo", "up")
        if Path("/proc/sys/net/ipv4/tcp_syn_linear_timeouts").exists():  # v6.5: that many tries more
            self.set("tcp_syn_linear_timeouts", 0)
        for name, value in sysctls.items():
            self.set(name, value)

    def run(self, *words: str) -> None:
        subprocess.run(["nsenter", f"--net=/proc/{self.pid}/ns/net", *words], check=True)

    def inside(self, function: Callable[[], _T]) -> _T:
        return call_inside(self.pid, function)

    def set(self, name: str, value: int) -> None:
        folder = "core" if name == "somaxconn" else "ipv4"
        self.inside(lambda: Path(f"/proc/sys/net/{folder}/{name}").write_text(str(value)))

    def delay(self) -> None:
        """Let every packet take a fifth of a second: a burst's SYNs all arrive before its first ACK."""
        self.run("tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "200ms", "limit", "10000")

    def counters(self) -> dict[str, int]:
        return dict(zip(COUNTER_NAMES, self._counters.read(), strict=True))

    def listen(self, backlog: int, address: str = "127.0.0.1", *, port: int = 0, shared: bool = False) -> socket.socket:
        (server,) = self.sockets(1, _family(address))
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind((address, port))
        server.listen(backlog)
        return server

    def connect(
        self, server: socket.socket, count: int, address: str = "", *, tries: int = 3, cpu: int = 0
    ) -> list[socket.socket]:
        """Return clients that have begun to connect; each sends no more than that many SYNs.

        All from one CPU, on which loopback then handles their packets too, one after the other: a queue that two
        CPUs fill at once has the same length for both.
        """
        host, port = server.getsockname()[:2]
        clients = self.sockets(count, _family(address or host))
        with on_cpu(cpu):
            for client in clients:
                client.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, tries - 1)
                client.setblocking(False)
                client.connect_ex((address or host, port))
        return clients

    def connect_to_full(
        self, server: socket.socket, count: int, holds: int, address: str = "", *, tries: int = 3
    ) -> list[socket.socket]:
        """Return clients of which the first fill the accept queue before the others begin.

        All at once, a slow machine would have the SYN queue fill before the first handshake is done.
        """
        clients = self.connect(server, holds, address, tries=tries)
        until(lambda: self.state(server).queue_length == holds, "the accept queue is full")
        return clients + self.connect(server, count - holds, address, tries=tries)

    def sockets(self, count: int, family: int = socket.AF_INET) -> list[socket.socket]:
        return self.inside(lambda: [socket.socket(family) for _ in range(count)])

    def state(self, server: socket.socket) -> ListenerState:
        diag = SockDiag(self.pid)
        inode = os.fstat(server.fileno()).st_ino
        try:
            return next(state for state in diag.listeners() if state.inode == inode)
        finally:
            diag.close()

    def close(self) -> None:
        self._counters.close()
        self._process.kill()
        self._process.wait()


@contextmanager
def on_cpu(cpu: int) -> Iterator[None]:
    """Keep this thread on one CPU, or leave it alone where that is not there."""
    before = os.sched_getaffinity(0)
    if cpu in before:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def namespace(**sysctls: int) -> Iterator[Namespace]:
    made = Namespace(**sysctls)
    try:
        yield made
    finally:
        made.close()


@dataclass(frozen=True)
class Seen:
    """One event, decoded."""

    kind: str
    listener: int
    peer: tuple[str, int]
    length: int
    limit: int
    syn_queue: int
    start_ns: int
    duration_ns: int


@dataclass
class Watcher:
    """One set of programs and what it has seen since ``begin``."""

    name: str
    program: ListenerProgram
    seen: list[Seen] = field(default_factory=list)
    counters: dict[str, ProbeCounters] = field(default_factory=dict)
    watched: dict[int, Counter[str]] = field(default_factory=dict)
    elsewhere: dict[int, Counter[str]] = field(default_factory=dict)

    def begin(self) -> None:
        self.program.ring.read()
        self.seen = []
        self._before = self._totals()
        self._counted_before = [self.program.counted_requests(watched=watched) for watched in (True, False)]

    def look(self) -> None:
        """Take what is new."""
        after = self._totals()
        self.counters = {
            kind: ProbeCounters(
                **{name: getattr(total, name) - getattr(self._before[kind], name) for name in vars(total)}
            )
            for kind, total in after.items()
        }
        self.watched, self.elsewhere = (
            {
                inode: Counter(counts) - Counter(before.get(inode, {}))
                for inode, counts in self.program.counted_requests(watched=watched).items()
                if counts != before.get(inode)
            }
            for watched, before in zip((True, False), self._counted_before, strict=True)
        )
        self.seen += map(_decoded, self.program.ring.read())

    @property
    def hits(self) -> Counter[str]:
        """How often each kind of event happened, those that did."""
        return Counter({kind: counter.hits for kind, counter in self.counters.items() if counter.hits})

    def of(self, *kinds: str, server: Server | None = None) -> list[Seen]:
        """Return the events of these kinds (and of this listener), by time."""
        found = [one for one in self.seen if one.kind in kinds and (server is None or one.listener == server.index)]
        return sorted(found, key=lambda one: one.start_ns)

    def _totals(self) -> dict[str, ProbeCounters]:
        return {EVENTS[probe - LISTENER_PROBES.start]: c for probe, c in self.program.counters(LISTENER_PROBES).items()}


@dataclass(frozen=True)
class Server:
    """A listener that is watched, and its index in the events."""

    socket: socket.socket
    index: int


class Watchers:
    """Both sets of programs."""

    def __init__(self, plans: dict[str, ListenerPlan]) -> None:
        self.all = [Watcher(name, ListenerProgram(plan, ring_bytes=1 << 23)) for name, plan in plans.items()]
        self._next = 0
        self._namespaces: list[tuple[Namespace, dict[str, int]]] = []

    @property
    def best(self) -> Watcher:
        return self.all[0]

    def begin(self, *namespaces: Namespace) -> None:
        self._namespaces = [(place, place.counters()) for place in namespaces]
        for watcher in self.all:
            watcher.begin()

    def watch(self, place: Namespace, server: socket.socket) -> Server:
        state = place.state(server)
        info = ListenerInfo(
            self._next, state.name, state.port, os.getpid(), state.inode, 0, state.queue_limit, state.cookie
        )
        self._next += 1
        for watcher in self.all:
            watcher.program.watch(info)
        return Server(server, info.index)

    def wait_for(self, count: int, counter: str = "ListenOverflows") -> None:
        """Wait until the first namespace's kernel has counted that many.

        It is the kernel that is asked: kprobes do not run on a CPU that is reading a BPF map.
        """
        place, start = self._namespaces[0]
        try:
            until(lambda: place.counters()[counter] - start[counter] >= count, f"{counter} +{count}")
        except AssertionError as error:
            self.best.look()
            raise AssertionError(f"{error}: {_gained(start, place.counters())}, seen {self.best.hits}") from None

    def finish(self) -> dict[str, int]:
        """Take the final counts and hold them against the kernel's; returns what the first namespace counted.

        The moment is one at which the kernel counted nothing while we looked.
        """

        def look() -> bool:
            before = self._counted()
            for watcher in self.all:
                watcher.look()
            return self._counted() == before

        until(look, "the traffic rests")
        counted = [_gained(start, now) for (_, start), now in zip(self._namespaces, self._counted(), strict=True)]
        for watcher in self.all:
            self._compare(watcher, counted)
        return counted[0]

    def close(self) -> None:
        for watcher in self.all:
            watcher.program.close()

    def _counted(self) -> list[dict[str, int]]:
        return [place.counters() for place, _ in self._namespaces]

    def _compare(self, watcher: Watcher, counted: list[dict[str, int]]) -> None:
        hits = watcher.hits
        ours = {place.inode for place, _ in self._namespaces}
        others = sum(watcher.elsewhere[inode]["ListenOverflows"] for inode in ours & watcher.elsewhere.keys())
        seen = Counter(one.kind for one in watcher.seen)
        probes = {
            "ListenOverflows": sum(hits[kind] for kind in OVERFLOWS) + others,
            "TCPReqQFullDrop": hits[SYN_QUEUE_FULL],
            "SyncookiesSent": hits[COOKIE_SENT],
            "ListenDrops": sum(hits[kind] for kind in REFUSALS) + others,
        }
        kernel = {name: sum(one[name] for one in counted) for name in probes}
        if others:  # the kernel counts the drops of all listeners, we only the overflows
            del probes["TCPReqQFullDrop"], kernel["TCPReqQFullDrop"], probes["ListenDrops"], kernel["ListenDrops"]
        assert probes == kernel, f"{watcher.name}: {probes} of {kernel}: {hits}"
        for (place, _), expected in zip(self._namespaces, counted, strict=True):
            added = watcher.watched.get(place.inode, Counter()) + watcher.elsewhere.get(place.inode, Counter())
            assert {name: added[name] for name in COUNTED} == {name: expected[name] for name in COUNTED}, watcher.name
        for kind, counter in watcher.counters.items():
            assert counter.hits == counter.sent + counter.thinned + counter.lost, f"{watcher.name}: {kind}"
            assert seen[kind] == counter.sent, f"{watcher.name}: {kind}"


def names_of(clients: Sequence[socket.socket]) -> set[tuple[str, int]]:
    """Return the clients' addresses and ports, as they know them."""
    return {client.getsockname()[:2] for client in clients}


def close_all(sockets: Sequence[socket.socket]) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.close()


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _gained(start: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return {name: now[name] - count for name, count in start.items()}


def _decoded(event: np.void) -> Seen:
    assert event.dtype == EVENT
    values = {one.name: int(event["value"][one.slot]) >> one.shift & ((1 << one.bits) - 1) for one in FIELDS}
    address = ipaddress.IPv6Address(values["peer_high"] << 64 | values["peer_low"])
    return Seen(
        EVENTS[event["probe"] - LISTENER_PROBES.start],
        int(event["tid"]),
        (str(address.ipv4_mapped or address), values["peer_port"]),
        values["queue_length"],
        values["queue_limit"],
        int(event["stack"]),
        int(event["start_ns"]),
        int(event["duration_ns"]),
    )
