"""Every way in which a listener refuses a connection, forced for real and counted against the kernel's counters.

Each test ends in ``Watchers.finish``, which demands of both sets of programs what the kernel counted:
ListenOverflows, ListenDrops, TCPReqQFullDrop, SyncookiesSent, EmbryonicRsts.
"""

from __future__ import annotations

import itertools
import select
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from listeners import (
    ACCEPT_QUEUE_FULL,
    ACCEPTED,
    ACK_SILENTLY,
    ACK_WITH_RST,
    COOKIE_ACK,
    COOKIE_SENT,
    ENQUEUED,
    REFUSALS,
    SYN_QUEUE_FULL,
    TAKEN,
    Namespace,
    Watchers,
    close_all,
    names_of,
    namespace,
    require_kernel_probes,
)
from tracing import until

from stallscope.tracer.capture.listener import FENTRY_RUNG, KPROBE_RUNG

BACKLOG = 5
HOLDS = BACKLOG + 1
CONNECTS = 50
REFUSED = CONNECTS - HOLDS

SWITCHES = list(itertools.product((0, 1), (0, 1, 2)))
"""tcp_abort_on_overflow and tcp_syncookies."""

WAYS = [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")]
"""Where the server listens, and where the clients connect."""


@pytest.fixture(scope="module")
def loaded() -> Iterator[Watchers]:
    plan = require_kernel_probes()
    kprobes = plan.without_fentry(list(plan.rungs))
    # the second one's limit is so low that a flood reaches it even in an emulated machine
    made = Watchers({"best": plan, "kprobes": replace(kprobes, events_per_second=1000)})
    yield made
    made.close()


@pytest.fixture
def place(loaded: Watchers) -> Iterator[Namespace]:
    with namespace() as made:
        yield made


def attempts(loaded: Watchers, *kinds: str) -> Counter[tuple[str, int]]:
    """Return how often each peer was refused."""
    return Counter(one.peer for one in loaded.best.of(*kinds))


def is_established(client: socket.socket) -> bool:
    """Return whether the client believes that it is connected."""
    ended = select.poll()
    ended.register(client, select.POLLOUT)
    return ended.poll(0) == [(client.fileno(), select.POLLOUT)]


def accept_all(server: socket.socket) -> list[tuple[str, int]]:
    """Accept what waits; returns the peers."""
    server.setblocking(False)
    peers = []
    while True:
        try:
            connection, peer = server.accept()
        except BlockingIOError:
            return peers
        connection.close()
        peers.append(peer[:2])


def test_both_plans_are_in_force(loaded: Watchers) -> None:
    best, kprobes = (watcher.program for watcher in loaded.all)
    assert not best.failures
    assert not kprobes.failures
    assert set(kprobes.plan.rungs.values()) == {KPROBE_RUNG}
    assert best.plan.rungs["tcp_conn_request"] == FENTRY_RUNG


@pytest.mark.parametrize(("abort", "cookies"), SWITCHES)
def test_accept_queue_full_at_the_syn(loaded: Watchers, place: Namespace, abort: int, cookies: int) -> None:
    place.set("tcp_abort_on_overflow", abort)
    place.set("tcp_syncookies", cookies)
    with place.listen(BACKLOG) as listening:
        server = loaded.watch(place, listening)
        loaded.begin(place)
        clients = place.connect_to_full(listening, CONNECTS, HOLDS)
        try:
            loaded.wait_for(3 * REFUSED)
            counted = loaded.finish()
            established = names_of([client for client in clients if is_established(client)])
            peers = names_of(clients)
            refused = loaded.best.of(ACCEPT_QUEUE_FULL)
        finally:
            close_all(clients)
    assert (counted["ListenOverflows"], counted["ListenDrops"]) == (3 * REFUSED, 3 * REFUSED)
    assert loaded.best.hits[ENQUEUED] == len(established) == HOLDS
    assert attempts(loaded, ACCEPT_QUEUE_FULL) == dict.fromkeys(peers - established, 3)
    assert {one.listener for one in loaded.best.seen} == {server.index}
    assert {(one.length, one.limit, one.syn_queue) for one in refused} == {(HOLDS, BACKLOG, 0)}
    assert [one.length for one in loaded.best.of(ENQUEUED)] == list(range(1, HOLDS + 1))


@pytest.mark.parametrize("abort", [0, 1])
def test_syn_queue_full_then_accept_queue_full(loaded: Watchers, place: Namespace, abort: int) -> None:
    place.set("tcp_abort_on_overflow", abort)
    place.set("tcp_syncookies", 0)
    place.delay()
    with place.listen(BACKLOG) as listening:
        loaded.watch(place, listening)
        loaded.begin(place)
        clients = place.connect(listening, CONNECTS)
        loaded.wait_for(3 * REFUSED, "ListenDrops")
        counted = loaded.finish()
        established = names_of([client for client in clients if is_established(client)])
        peers = names_of(clients)
        close_all(clients)
    assert counted["TCPReqQFullDrop"] == REFUSED
    assert counted["ListenOverflows"] == 2 * REFUSED
    assert counted["ListenDrops"] == 3 * REFUSED
    assert attempts(loaded, SYN_QUEUE_FULL) == dict.fromkeys(peers - established, 1)
    assert attempts(loaded, ACCEPT_QUEUE_FULL) == dict.fromkeys(peers - established, 2)
    assert loaded.best.hits[ENQUEUED] == len(established) == HOLDS
    assert {one.syn_queue for one in loaded.best.of(SYN_QUEUE_FULL)} == {HOLDS}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[1]} to {way[0]}")
@pytest.mark.parametrize(("abort", "cookies"), [(0, 1), (1, 1), (0, 2), (1, 2)])
def test_cookie_ack_refused(loaded: Watchers, place: Namespace, abort: int, cookies: int, way: tuple[str, str]) -> None:
    place.set("tcp_abort_on_overflow", abort)
    place.set("tcp_syncookies", cookies)
    place.delay()
    with place.listen(BACKLOG, way[0]) as listening:
        loaded.watch(place, listening)
        loaded.begin(place)
        clients = place.connect(listening, CONNECTS, way[1])
        loaded.wait_for(REFUSED)
        counted = loaded.finish()
        established = [client for client in clients if is_established(client)]
        peers = names_of(clients)
        accepted = set(accept_all(listening)) if way[0] != "::" else set()
        close_all(clients)
    cookies_sent = CONNECTS if cookies == 2 else REFUSED
    assert counted["SyncookiesSent"] == counted["SyncookiesRecv"] == cookies_sent
    assert counted["TCPReqQFullDoCookies"] == cookies_sent
    assert counted["ListenOverflows"] == counted["ListenDrops"] == REFUSED
    assert loaded.best.hits[COOKIE_SENT] == cookies_sent
    assert loaded.best.hits[COOKIE_ACK] == REFUSED
    assert len(established) == CONNECTS  # so they believe
    refused = attempts(loaded, COOKIE_ACK)
    assert set(refused.values()) == {1}
    assert set(refused) < peers
    if accepted:
        assert set(refused) == peers - accepted


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[1]} to {way[0]}")
@pytest.mark.parametrize(("abort", "cookies"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_third_ack_refused(loaded: Watchers, place: Namespace, abort: int, cookies: int, way: tuple[str, str]) -> None:
    place.set("tcp_abort_on_overflow", abort)
    place.set("tcp_syncookies", cookies)
    place.set("tcp_synack_retries", 2)
    with place.listen(BACKLOG, way[0]) as listening:
        first = place.connect(listening, 3, way[1])
        until(lambda: place.state(listening).queue_length == 3, "three slots are taken")
        loaded.watch(place, listening)
        place.delay()
        loaded.begin(place)
        burst = place.connect(listening, 6, way[1])
        # refused silently, each peer answers two more SYN-ACKs
        expected = 3 if abort else 9
        kind = ACK_WITH_RST if abort else ACK_SILENTLY
        loaded.wait_for(expected)
        if abort:
            until(lambda: sum(map(is_established, burst)) == 3, "the clients were told")
        counted = loaded.finish()
        still = sum(map(is_established, burst))
        peers = names_of(burst)
        close_all([*first, *burst])
    assert counted["ListenOverflows"] == counted["ListenDrops"] == expected
    assert counted["EmbryonicRsts"] == (3 if abort else 0)
    assert still == (3 if abort else 6)
    assert loaded.best.hits == {TAKEN: 6, ENQUEUED: 3, kind: expected}
    refused = attempts(loaded, kind)
    assert len(refused) == 3
    assert set(refused.values()) == {expected // 3}
    assert abort or set(refused) <= peers  # one that was reset no longer knows its name


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[1]} to {way[0]}")
def test_peers_are_known_by_address_and_port(loaded: Watchers, place: Namespace, way: tuple[str, str]) -> None:
    with place.listen(BACKLOG, way[0]) as listening:
        loaded.watch(place, listening)
        loaded.begin(place)
        clients = place.connect_to_full(listening, 20, HOLDS, way[1], tries=2)
        loaded.wait_for(2 * (20 - HOLDS))
        loaded.finish()
        established = names_of([client for client in clients if is_established(client)])
        peers = names_of(clients)
        close_all(clients)
    assert {one.peer for one in loaded.best.of(TAKEN)} == established
    assert {one.peer for one in loaded.best.of(ENQUEUED)} == established
    # the same peer at the second try
    assert attempts(loaded, ACCEPT_QUEUE_FULL) == dict.fromkeys(peers - established, 2)


def test_both_sets_of_programs_see_the_same(loaded: Watchers, place: Namespace) -> None:
    with place.listen(BACKLOG) as listening:
        loaded.watch(place, listening)
        loaded.begin(place)
        clients = place.connect_to_full(listening, 20, HOLDS, tries=2)
        loaded.wait_for(2 * (20 - HOLDS))
        accept_all(listening)
        loaded.finish()
        close_all(clients)
    best, kprobes = loaded.all
    assert best.hits == kprobes.hits
    for kind in best.hits:
        assert [(one.peer, one.length, one.limit) for one in best.of(kind)] == [
            (one.peer, one.length, one.limit) for one in kprobes.of(kind)
        ]


def test_two_listeners_at_once(loaded: Watchers, place: Namespace) -> None:
    with place.listen(2) as one, place.listen(7) as other:
        servers = [loaded.watch(place, one), loaded.watch(place, other)]
        loaded.begin(place)
        clients = [place.connect_to_full(one, 10, 3, tries=2), place.connect_to_full(other, 15, 8, tries=2)]
        loaded.wait_for(2 * (7 + 7))
        loaded.finish()
        peers = [names_of(group) for group in clients]
        close_all([*clients[0], *clients[1]])
    for server, group, limit, enqueued in zip(servers, peers, (2, 7), (3, 8), strict=True):
        seen = [event for event in loaded.best.seen if event.listener == server.index]
        assert {event.peer for event in seen} == group
        assert {event.limit for event in seen} == {limit}
        assert len(loaded.best.of(ENQUEUED, server=server)) == enqueued
        assert len(loaded.best.of(ACCEPT_QUEUE_FULL, server=server)) == 2 * (len(group) - enqueued)


def test_namespaces_are_kept_apart(loaded: Watchers, place: Namespace) -> None:
    """Listeners with the same address and port, one watched, in two namespaces."""
    with namespace() as elsewhere, place.listen(2) as one, elsewhere.listen(3, port=one.getsockname()[1]) as other:
        loaded.watch(place, one)
        loaded.begin(place, elsewhere)
        clients = [
            *place.connect_to_full(one, 10, 3, tries=2),
            *elsewhere.connect_to_full(other, 12, 4, tries=2),
        ]
        loaded.wait_for(2 * 7)
        until(lambda: elsewhere.counters()["ListenOverflows"] >= 2 * 8, "the other one overflows")
        loaded.finish()
        close_all(clients)
    for watcher in loaded.all:
        assert watcher.hits == {TAKEN: 3, ENQUEUED: 3, ACCEPT_QUEUE_FULL: 14}
        assert watcher.elsewhere == {elsewhere.inode: {"ListenOverflows": 16, "ListenDrops": 16}}


def test_listeners_that_are_not_watched_are_only_counted(loaded: Watchers, place: Namespace) -> None:
    place.set("tcp_syncookies", 0)
    with place.listen(2) as watched, place.listen(2) as other:
        loaded.watch(place, watched)
        loaded.begin(place)
        clients = [
            *place.connect_to_full(watched, 5, 3, tries=2),
            *place.connect_to_full(other, 10, 3, tries=2),
        ]
        loaded.wait_for(2 * 2)
        until(lambda: place.counters()["ListenOverflows"] >= 2 * (2 + 7), "the other one overflows")
        loaded.finish()
        close_all(clients)
    for watcher in loaded.all:
        assert watcher.hits == {TAKEN: 3, ENQUEUED: 3, ACCEPT_QUEUE_FULL: 4}
        assert watcher.elsewhere == {place.inode: {"ListenOverflows": 14, "ListenDrops": 14}}
        assert watcher.watched == {place.inode: {"ListenOverflows": 4, "ListenDrops": 4}}


def test_a_full_syn_queue_elsewhere_is_no_overflow(loaded: Watchers, place: Namespace) -> None:
    """A listener that is not watched, whose SYN queue and accept queue are both full: the kernel asks the first."""
    place.set("tcp_syncookies", 0)
    with place.listen(BACKLOG) as other:
        first = place.connect(other, 3)
        until(lambda: place.state(other).queue_length == 3, "three slots are taken")
        place.delay()
        loaded.begin(place)
        burst = place.connect(other, 30, tries=2)
        until(lambda: place.counters()["ListenDrops"] >= 3 + 24 + 24, "both queues overflow")
        counted = loaded.finish()
        close_all([*first, *burst])
    assert counted["TCPReqQFullDrop"] >= 24
    for watcher in loaded.all:
        assert not watcher.hits
        assert watcher.elsewhere == {place.inode: {name: counted[name] for name in ("ListenOverflows", "ListenDrops")}}


def test_a_group_that_shares_a_port(loaded: Watchers, place: Namespace) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(place.listen(BACKLOG, shared=True))
        port = first.getsockname()[1]
        group = [first, *(stack.enter_context(place.listen(BACKLOG, port=port, shared=True)) for _ in range(2))]
        servers = [loaded.watch(place, one) for one in group]
        loaded.begin(place)
        clients = place.connect(first, 60, tries=2)
        loaded.wait_for(2 * (60 - 3 * HOLDS))
        loaded.finish()
        waiting = [place.state(one).queue_length for one in group]
        close_all(clients)
    assert waiting == [HOLDS] * 3
    for server in servers:
        assert [one.length for one in loaded.best.of(ENQUEUED, server=server)] == list(range(1, HOLDS + 1))
        assert loaded.best.of(ACCEPT_QUEUE_FULL, server=server)
    # each peer always reaches the same one of the three
    reached = {(one.peer, one.listener) for one in loaded.best.of(ACCEPT_QUEUE_FULL)}
    assert len(reached) == 60 - 3 * HOLDS


def test_a_listener_that_is_opened_again(loaded: Watchers, place: Namespace) -> None:
    with place.listen(2) as listening:
        port = listening.getsockname()[1]
        before = loaded.watch(place, listening)
        loaded.begin(place)
        clients = place.connect_to_full(listening, 10, 3, tries=2)
        loaded.wait_for(14)
    close_all(clients)
    with place.listen(4, port=port) as listening:
        after = loaded.watch(place, listening)
        clients = place.connect_to_full(listening, 10, 5, tries=2)
        loaded.wait_for(14 + 10)
        loaded.finish()
        close_all(clients)
    assert len(loaded.best.of(ACCEPT_QUEUE_FULL, server=before)) == 14
    assert len(loaded.best.of(ACCEPT_QUEUE_FULL, server=after)) == 10
    assert {one.limit for one in loaded.best.of(ACCEPT_QUEUE_FULL, server=after)} == {4}


@pytest.mark.parametrize(("backlog", "somaxconn", "limit"), [(511, 4096, 511), (2048, 4096, 2048), (2048, 128, 128)])
def test_the_backlog_in_force(loaded: Watchers, place: Namespace, backlog: int, somaxconn: int, limit: int) -> None:
    place.set("somaxconn", somaxconn)
    with place.listen(backlog) as listening:
        loaded.watch(place, listening)
        loaded.begin(place)
        clients = place.connect_to_full(listening, limit + 1 + 11, limit + 1, tries=2)
        loaded.wait_for(22)
        loaded.finish()
        close_all(clients)
    assert loaded.best.hits == {TAKEN: limit + 1, ENQUEUED: limit + 1, ACCEPT_QUEUE_FULL: 22}
    assert {one.limit for one in loaded.best.seen} == {limit}
    assert {one.length for one in loaded.best.of(ACCEPT_QUEUE_FULL)} == {limit + 1}
    assert [one.length for one in loaded.best.of(ENQUEUED)] == list(range(1, limit + 2))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way[1]} to {way[0]}")
def test_how_long_a_connection_waited(loaded: Watchers, place: Namespace, way: tuple[str, str]) -> None:
    with place.listen(20, way[0]) as listening:
        server = loaded.watch(place, listening)
        loaded.begin(place)
        clients = place.connect(listening, 8, way[1])
        until(lambda: place.state(listening).queue_length == 8, "all wait")
        held_from_ns = time.monotonic_ns()
        time.sleep(0.1)
        held_until_ns = time.monotonic_ns()
        accepted = [listening.accept() for _ in range(5)]
        loaded.finish()
        close_all([*clients, *(connection for connection, _ in accepted)])
    enqueued, taken = loaded.best.of(ENQUEUED, server=server), loaded.best.of(ACCEPTED, server=server)
    assert [one.length for one in enqueued] == list(range(1, 9))
    assert [one.length for one in taken] == [7, 6, 5, 4, 3]
    assert [(one.peer, one.start_ns) for one in taken] == [(one.peer, one.start_ns) for one in enqueued[:5]]
    assert [one.peer[1] for one in taken] == [peer[1] for _, peer in accepted]
    ends_ns = [one.start_ns + one.duration_ns for one in taken]
    assert ends_ns == sorted(ends_ns)
    assert min(ends_ns) > held_until_ns
    assert all(one.start_ns < held_from_ns for one in enqueued)


def test_a_queue_that_fills_and_drains_all_the_time(loaded: Watchers, place: Namespace) -> None:
    """Requests that arrive while accept() makes room: the kernel decides later than the function is entered."""
    place.set("tcp_syncookies", 0)
    place.set("tcp_abort_on_overflow", 1)  # one that is refused silently would be enqueued a second later
    ended = threading.Event()

    def accept() -> None:
        while not ended.is_set():
            accept_all(listening)

    def connect(cpu: int) -> None:
        for _ in range(40):
            close_all(place.connect(listening, 20, tries=2, cpu=cpu))

    with place.listen(1) as listening:
        loaded.watch(place, listening)
        loaded.begin(place)
        threads = [threading.Thread(target=connect, args=(cpu,)) for cpu in range(2)]
        server = threading.Thread(target=accept)
        for thread in (server, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        ended.set()
        server.join()
        accept_all(listening)
        loaded.finish()
    hits = loaded.best.hits
    assert hits[TAKEN] + sum(hits[kind] for kind in REFUSALS) >= 1600
    assert hits[ENQUEUED] == hits[ACCEPTED] > 0
    assert hits[ACCEPT_QUEUE_FULL] > 0


def test_a_flood_is_counted_exactly_and_sent_in_part(loaded: Watchers, place: Namespace) -> None:
    with namespace() as attacker:
        place.run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", str(attacker.pid))
        for end, address in ((place, "10.0.0.1"), (attacker, "10.0.0.2")):
            end.run("ip", "address", "add", f"{address}/24", "dev", "wire")
            end.run("ip", "link", "set", "wire", "up")
        place.run("ip", "route", "add", "default", "via", "10.0.0.2")
        with place.listen(BACKLOG, "10.0.0.1") as listening:
            loaded.watch(place, listening)
            loaded.begin(place)
            before = sent_packets(attacker)
            flood(attacker, listening.getsockname()[1], 2.0)
            loaded.finish()
            sent = sent_packets(attacker) - before
            best, kprobes = loaded.all
            flooded, seen_by_kprobes, counters = best.hits, kprobes.hits, kprobes.counters[COOKIE_SENT]
            # and the machine does as before
            accept_all(listening)
            (client,) = place.connect(listening, 1)
            until(lambda: is_established(client), "a client is connected")
            client.close()
            loaded.finish()
    requests = flooded[TAKEN] + flooded[COOKIE_SENT] + sum(flooded[kind] for kind in REFUSALS)
    assert 1000 < requests <= sent
    assert flooded == seen_by_kprobes
    assert counters.thinned > 0
    assert counters.sent < counters.hits


def sent_packets(place: Namespace) -> int:
    lines = Path(f"/proc/{place.pid}/net/dev").read_text().splitlines()
    return next(int(line.split()[10]) for line in lines if line.strip().startswith("wire:"))


def flood(attacker: Namespace, port: int, seconds: float) -> None:
    """Send SYNs from addresses of all the world, as fast as it goes."""
    words = ["hping3", "--flood", "--rand-source", "-S", "-p", str(port), "10.0.0.1"]
    process = subprocess.Popen(
        ["timeout", "--signal=INT", str(seconds), "nsenter", f"--net=/proc/{attacker.pid}/ns/net", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    process.wait(60)
