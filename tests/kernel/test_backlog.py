"""The backlog sampler on real listeners, held against pyroute2 and against what the test itself did."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from pyroute2 import DiagSocket

from stallscope.tracer.capture.backlog import BacklogSampler, ListenerState, SockDiag
from stallscope.tracer.capture.namespace import namespace_inode
from stallscope.tracer.capture.probe_ids import COUNTER_PROBE, QUEUE_PROBE
from stallscope.tracer.manifest import NamespaceInfo

TCP_LISTEN = 10
SKMEMINFO = 1 << 6


@contextmanager
def listener(
    backlog: int, family: int = socket.AF_INET, *, port: int = 0, shared: bool = False
) -> Iterator[socket.socket]:
    with socket.socket(family) as server:
        if shared:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", port))
        server.listen(backlog)
        yield server


@contextmanager
def connections(server: socket.socket, count: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.socket(server.family))
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        time.sleep(0.05)
        yield


@contextmanager
def sampler(*pids: int) -> Iterator[BacklogSampler]:
    made = BacklogSampler()
    try:
        for pid in pids:
            made.add_target(pid)
        yield made
    finally:
        made.close()


def by_port(states: list[ListenerState], server: socket.socket) -> ListenerState:
    return next(state for state in states if state.port == server.getsockname()[1])


def queue_rows(events: np.ndarray) -> list[tuple[int, int, int]]:
    rows = events[events["probe"] == QUEUE_PROBE]
    return [(int(value[0]) & 0xFFFFFFFF, int(value[0]) >> 32, int(value[2])) for value in rows["value"]]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_listener_is_read_as_pyroute2_reads_it(family: int) -> None:
    with listener(7, family) as server, connections(server, 5):
        diag = SockDiag(os.getpid())
        ours = by_port(diag.listeners(), server)
        one = diag.listener(ours)
        diag.close()
        with DiagSocket() as peer:
            peer.bind()
            theirs = next(
                message
                for message in peer.get_sock_stats(family=family, states=1 << TCP_LISTEN, extensions=SKMEMINFO)
                if message["idiag_sport"] == ours.port
            )
    assert ours == one
    assert (ours.inode, ours.queue_length, ours.queue_limit) == (
        theirs["idiag_inode"], theirs["idiag_rqueue"], theirs["idiag_wqueue"],
    )  # fmt: skip
    assert ours.address == theirs["idiag_src"]
    assert (ours.queue_length, ours.queue_limit) == (5, 7)


def test_the_queue_holds_one_more_than_its_limit_and_drops_the_rest() -> None:
    with listener(3) as server:
        diag = SockDiag(os.getpid())
        before = by_port(diag.listeners(), server)
        with connections(server, 9):
            full = by_port(diag.listeners(), server)
        diag.close()
    assert (before.queue_length, before.drops) == (0, 0)
    assert full.queue_length == full.queue_limit + 1 == 4
    assert full.drops >= 9 - 4


def test_rows_come_only_when_something_changed_or_a_second_passed() -> None:
    with listener(7) as server, sampler(os.getpid()) as made:
        index = next(info.index for info in made.listeners if info.port == server.getsockname()[1])
        start_ns = time.monotonic_ns()
        first = made.sample(start_ns)
        again = made.sample(start_ns + 1)
        with connections(server, 2):
            changed = made.sample(start_ns + 2)
        later = made.sample(start_ns + 2_000_000_000)
    assert (0, 7, index) in queue_rows(first)
    assert (first["probe"] == COUNTER_PROBE).any()
    assert (0, 7, index) not in queue_rows(again)
    assert (2, 7, index) in queue_rows(changed)
    assert any(row[1:] == (7, index) for row in queue_rows(later))


def test_listeners_that_share_an_address_are_told_apart() -> None:
    with (
        listener(4, shared=True) as first,
        listener(5, port=first.getsockname()[1], shared=True),
        sampler(os.getpid()) as made,
    ):
        port = first.getsockname()[1]
        assert sorted(info.limit for info in made.listeners if info.port == port) == [4, 5]
        now_ns = time.monotonic_ns()
        made.sample(now_ns)
        with connections(first, 6):
            rows = queue_rows(made.sample(now_ns + 1))
        indexes = {info.index for info in made.listeners if info.port == port}
    assert sum(length for length, _, index in rows if index in indexes) == 6


def test_a_listener_that_opens_later_is_found_and_one_that_closes_is_forgotten() -> None:
    with sampler(os.getpid()) as made:
        now_ns = time.monotonic_ns()
        made.sample(now_ns)
        with listener(6) as server:
            port = server.getsockname()[1]
            made.sample(now_ns + 1_100_000_000)
            assert [info.limit for info in made.listeners if info.port == port] == [6]
        assert not [
            row for row in queue_rows(made.sample(now_ns + 3_000_000_000)) if made.listeners[row[2]].port == port
        ]


def test_another_process_in_another_namespace_is_sampled_there() -> None:
    """The listener is seen, and the overflows counted, in the namespace of the process and not in ours."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a network namespace")
    program = (
        "import socket, subprocess, sys\n"
        "subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)\n"
        "server = socket.socket(); server.bind(('127.0.0.1', 0)); server.listen(1)\n"
        "print(server.getsockname()[1], flush=True)\n"
        "sys.stdin.readline()\n"
        "clients = [socket.socket() for _ in range(6)]\n"
        "[(c.setblocking(False), c.connect_ex(server.getsockname())) for c in clients]\n"
        "print('connected', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        port = int(process.stdout.readline())
        with sampler(process.pid) as made:
            namespace = made.namespaces[0]
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "connected\n"
            time.sleep(0.05)
            rows = queue_rows(made.sample(time.monotonic_ns()))
            overflows = made.overflows()
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait(10)
    assert isinstance(namespace, NamespaceInfo)
    assert namespace.inode != namespace_inode("self")
    assert [info.port for info in made.listeners] == [port]
    assert (2, 1, 0) in rows
    assert overflows == 4
