"""The clients of a load, one process for each role: held connections, short connections, the PING, the watch.

Every role is a function of a ``Stage`` that returns plain data: it prepares, says that it is ready, waits for
the start, works until the stop, and reports.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.synchronize import Event

from lab import LabError
from lab.listener import ListenerQueue, read_listen_counters
from lab.outcome import Connections, Held, Listener
from lab.recipes import Recipe

PING = b"*1\r\n$4\r\nPING\r\n"
PONG = b"+PONG\r\n"
IP_BIND_ADDRESS_NO_PORT = 24
"""linux/in.h, since Linux 4.2: the port is chosen at connect(), once per source and destination."""

SOURCES = tuple(f"127.0.0.{number}" for number in range(1, 201))
"""Each has its own 28,000 ephemeral ports; one alone is used up by TIME_WAIT within 12 s at 2,500/s."""

CONNECT_TIMEOUT_S = 30.0
SAMPLE_INTERVAL_S = 0.005
TOUCH_INTERVAL_S = 0.5
UPLOADS_AT_ONCE = 4
MEMORY_INTERVAL_S = 0.2
MAX_IN_FLIGHT = 4_000
MAX_NEW_AT_ONCE = 256
PACED_BY = 100


@dataclass(frozen=True)
class Stage:
    """What a role is given: the load, where it goes, and the events all roles share."""

    recipe: Recipe
    host: str
    port: int
    ready: Event
    start: Event
    trimmed: Event
    stop: Event

    def wait_for_start(self) -> float:
        """Say that this role is ready, wait for the start and return its ``time.monotonic()``."""
        self.ready.set()
        self.start.wait()
        return time.monotonic()


def hold_connections(stage: Stage) -> Held:
    """Open the held clients and fill their buffers; during the window keep them as the recipe says."""
    recipe = stage.recipe
    began_s = time.monotonic()
    held: list[socket.socket] = []
    try:
        # Idle ones first, so that the uploaders are neighbours in the server's list: one tick meets many.
        for count, source in zip(range(recipe.held), _endless_sources(), strict=False):
            pace = count % PACED_BY == PACED_BY - 1
            held.append(_open_held(stage, source, greet=count < recipe.idle, pace=pace))
        opened_s = time.monotonic()
        uploaders = _Uploaders(stage, held[recipe.idle : recipe.idle + recipe.uploaders])
        uploaders.fill()
        small = _SmallBuffers(recipe, held[recipe.idle + recipe.uploaders :])
        filled_s = time.monotonic()
        stage.ready.set()
        while not stage.start.wait(TOUCH_INTERVAL_S / 5):
            uploaders.touch()
        started_s = time.monotonic()
        released_s, trimmed_s = None, None
        if recipe.uploaders:
            released_s = recipe.release_s(opened_s, started_s, uploaders.redis_major()) - started_s
            trimmed_s = uploaders.let_idle(started_s, released_s)
        while not stage.stop.wait(0.01):
            small.send_due(time.monotonic() - started_s)
        return Held(
            count=len(held),
            open_s=round(opened_s - began_s, 3),
            fill_s=round(filled_s - opened_s, 3),
            filled_bytes=recipe.uploaders * recipe.sent_bytes,
            released_s=released_s and round(released_s, 3),
            trimmed_s=trimmed_s and round(trimmed_s, 3),
        )
    finally:
        for connection in held:
            connection.close()


class _Uploaders:
    """Clients stuck in the middle of a value, and the byte now and then that keeps them from idling.

    Redis trims a buffer whose client idled for over 2 s, or whose peak since the last visit is below half of
    it: a byte every half second holds off both.
    """

    def __init__(self, stage: Stage, connections: list[socket.socket]) -> None:
        recipe = stage.recipe
        self._stage = stage
        announced = recipe.announced_bytes
        self._spare_bytes = recipe.uploaders * (announced - recipe.sent_bytes)
        header = b"*3\r\n$3\r\nSET\r\n$6\r\nupload\r\n$%d\r\n" % announced
        self._message = memoryview(header + b"x" * recipe.sent_bytes) if connections else memoryview(b"")
        self._waiting = deque(connections)
        self._stuck: list[socket.socket] = []
        self._touched_s = time.monotonic()

    def fill(self) -> None:
        """Send every client's part, a few clients at a time."""
        sending: dict[int, tuple[socket.socket, memoryview]] = {}
        with select.epoll() as poll:
            while self._waiting or sending:
                while self._waiting and len(sending) < UPLOADS_AT_ONCE:
                    connection = self._waiting.popleft()
                    sending[connection.fileno()] = (connection, self._message)
                    poll.register(connection, select.EPOLLOUT)
                for descriptor, _ in poll.poll(TOUCH_INTERVAL_S):
                    connection, rest = sending[descriptor]
                    rest = rest[connection.send(rest) :]
                    sending[descriptor] = (connection, rest)
                    if not rest:
                        poll.unregister(descriptor)
                        del sending[descriptor]
                        self._stuck.append(connection)
                self.touch()

    def touch(self) -> None:
        """Send one byte from every stuck client, unless that was done a moment ago."""
        now_s = time.monotonic()
        if now_s - self._touched_s < TOUCH_INTERVAL_S:
            return
        self._touched_s = now_s
        for connection in self._stuck:
            connection.send(b"x")

    def let_idle(self, started_s: float, released_s: float) -> float | None:
        """Keep them awake until ``released_s`` after the start; then wait until the server has trimmed them.

        Returns:
            The seconds from the start until the server's memory showed it, or None if the stop came first.
        """
        while time.monotonic() - started_s < released_s:
            self.touch()
            if self._stage.stop.wait(TOUCH_INTERVAL_S / 5):
                return None
        with self._connect() as connection:
            full_bytes = int(_ask_info(connection, "used_memory"))
            while not self._stage.stop.wait(MEMORY_INTERVAL_S):
                if full_bytes - int(_ask_info(connection, "used_memory")) > 0.9 * self._spare_bytes:
                    self._stage.trimmed.set()
                    return time.monotonic() - started_s
        return None

    def redis_major(self) -> int:
        """Return the server's major version, as it reports it."""
        with self._connect() as connection:
            return int(_ask_info(connection, "redis_version").partition(".")[0])

    def _connect(self) -> socket.socket:
        return socket.create_connection((self._stage.host, self._stage.port), timeout=CONNECT_TIMEOUT_S)


class _SmallBuffers:
    """Clients that each send one short command per period, evenly spread over it."""

    def __init__(self, recipe: Recipe, connections: list[socket.socket]) -> None:
        value = b"x" * recipe.small_bytes
        self._command = b"*3\r\n$3\r\nSET\r\n$5\r\nsmall\r\n$%d\r\n%s\r\n" % (len(value), value)
        self._connections = connections
        self._per_s = len(connections) / recipe.small_period_s
        self._sent = 0
        for count, connection in enumerate(connections, 1):
            self._send(connection)
            # Wait for an answer now and then: the window must not begin with the server behind.
            if count % PACED_BY == 0 or count == len(connections):
                connection.settimeout(CONNECT_TIMEOUT_S)
                connection.recv(4096)
                connection.setblocking(False)

    def send_due(self, elapsed_s: float) -> None:
        """Send what is due by now, and read the answers of the round before."""
        while self._sent < int(elapsed_s * self._per_s):
            self._send(self._connections[self._sent % len(self._connections)])
            self._sent += 1

    def _send(self, connection: socket.socket) -> None:
        with suppress(BlockingIOError):
            connection.recv(4096)
        with suppress(BlockingIOError):
            connection.send(self._command)


def make_short_connections(stage: Stage) -> Connections:
    """Connect, PING, read and close at the recipe's rate until the stop; return what became of them."""
    with select.epoll() as poll:
        churn = _Churn(stage, poll)
        started_s = stage.wait_for_start()
        while not stage.stop.is_set():
            churn.begin_due(time.monotonic() - started_s)
            churn.advance()
            churn.give_up_late(time.monotonic())
        return churn.finish()


@dataclass
class _Attempt:
    connection: socket.socket
    started_s: float
    asked: bool


class _Churn:
    def __init__(self, stage: Stage, poll: select.epoll) -> None:
        self._target = (stage.host, stage.port)
        self._rate_per_s = stage.recipe.rate_per_s
        self._timeout_s = stage.recipe.timeout_s
        self._poll = poll
        self._live: dict[int, _Attempt] = {}
        self._by_age: deque[_Attempt] = deque()
        self._sources = _endless_sources()
        self._due = self._attempted = self._completed = self._skipped = 0
        self._connect_timeouts = self._reply_timeouts = 0
        self._errors: dict[str, int] = {}

    def begin_due(self, elapsed_s: float) -> None:
        """Begin the connections that the rate asks for by now."""
        due = min(int(elapsed_s * self._rate_per_s) - self._due, MAX_NEW_AT_ONCE)
        self._due += max(due, 0)
        for _ in range(due):
            if len(self._live) >= MAX_IN_FLIGHT:
                self._skipped += 1
            else:
                self._begin()

    def advance(self) -> None:
        """Carry on with every connection on which something has happened, waiting 1 ms for it at most."""
        for descriptor, _ in self._poll.poll(0.001, 1024):
            attempt = self._live[descriptor]
            try:
                if not attempt.asked:
                    attempt.connection.send(PING)
                    attempt.asked = True
                    self._poll.modify(descriptor, select.EPOLLIN)
                    continue
                answer = attempt.connection.recv(64)
                if answer == PONG:
                    self._completed += 1
                else:
                    self._count("closed" if not answer else answer.split()[0].decode(errors="replace"))
            except OSError as error:
                self._count(errno.errorcode.get(error.errno or 0, "unknown"))
            self._end(attempt)

    def give_up_late(self, now_s: float) -> None:
        """Close the connections whose client has lost patience; the oldest come first."""
        while self._by_age:
            oldest = self._by_age[0]
            if oldest.connection.fileno() >= 0:
                if now_s - oldest.started_s < self._timeout_s:
                    return
                if oldest.asked:
                    self._reply_timeouts += 1
                else:
                    self._connect_timeouts += 1
                self._end(oldest)
            self._by_age.popleft()

    def finish(self) -> Connections:
        """Close what is under way and return the counts."""
        unfinished = len(self._live)
        for attempt in list(self._live.values()):
            self._end(attempt)
        return Connections(
            attempted=self._attempted,
            completed=self._completed,
            connect_timeouts=self._connect_timeouts,
            reply_timeouts=self._reply_timeouts,
            unfinished=unfinished,
            skipped=self._skipped,
            other_errors=self._errors,
        )

    def _begin(self) -> None:
        self._attempted += 1
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        attempt = _Attempt(connection, time.monotonic(), asked=False)
        try:
            connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            connection.bind((next(self._sources), 0))
            status = connection.connect_ex(self._target)
            if status not in (0, errno.EINPROGRESS):
                raise OSError(status, "connect")
            # On loopback the handshake is over when connect() returns, unless the SYN was refused.
            with suppress(BlockingIOError):
                connection.send(PING)
                attempt.asked = True
        except OSError as error:
            self._count(errno.errorcode.get(error.errno or 0, "unknown"))
            connection.close()
            return
        self._live[connection.fileno()] = attempt
        self._by_age.append(attempt)
        self._poll.register(connection, select.EPOLLIN if attempt.asked else select.EPOLLOUT)

    def _end(self, attempt: _Attempt) -> None:
        descriptor = attempt.connection.fileno()
        self._poll.unregister(descriptor)
        del self._live[descriptor]
        attempt.connection.close()

    def _count(self, kind: str) -> None:
        self._errors[kind] = self._errors.get(kind, 0) + 1


def probe_with_pings(stage: Stage) -> list[tuple[int, int]]:
    """PING on one connection until the stop; return (CLOCK_MONOTONIC ns of sending, ns it took) each."""
    pings: list[tuple[int, int]] = []
    with socket.create_connection((stage.host, stage.port), timeout=CONNECT_TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stage.wait_for_start()
        while not stage.stop.wait(stage.recipe.ping_interval_s):
            sent_ns = time.monotonic_ns()
            connection.sendall(PING)
            if not connection.recv(64):
                raise LabError(f"the server on port {stage.port} closed the standing connection; read its log")
            pings.append((sent_ns, time.monotonic_ns() - sent_ns))
    return pings


def watch_listener(stage: Stage) -> Listener:
    """Sample the accept queue until the stop; return its longest and what the kernel counted meanwhile."""
    longest = backlog = samples = 0
    with ListenerQueue(stage.port) as queue:
        stage.wait_for_start()
        overflows, drops = read_listen_counters()
        while not stage.stop.wait(SAMPLE_INTERVAL_S):
            sample = queue.read()
            if sample is None:
                raise LabError(f"nothing listens on port {stage.port} any more; read the server's log")
            longest, backlog = max(longest, sample[0]), sample[1]
            samples += 1
        overflows_after, drops_after = read_listen_counters()
    return Listener(overflows_after - overflows, drops_after - drops, longest, backlog, samples)


def _open_held(stage: Stage, source: str, *, greet: bool, pace: bool) -> socket.socket:
    """Return a new connection, not blocking; ``pace`` waits for an answer, so that no queue fills."""
    connection = socket.socket()
    try:
        connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        connection.bind((source, 0))
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect((stage.host, stage.port))
        if greet or pace:
            connection.sendall(PING)
        if pace and connection.recv(64) != PONG:
            raise OSError("the server did not answer PING with PONG; is its maxclients high enough?")
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    return connection


def _ask_info(connection: socket.socket, field: str) -> str:
    """Return one field of INFO."""
    connection.sendall(b"INFO\r\n")
    with connection.makefile("rb") as answer:
        length = answer.readline()
        text = answer.read(int(length[1:]) + 2).decode() if length.startswith(b"$") else ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value
    raise LabError(f"the server's INFO has no {field}; it must answer INFO without a password")


def _endless_sources() -> Iterator[str]:
    while True:
        yield from SOURCES
