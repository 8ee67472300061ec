"""A small load under which a Redis server trims large query buffers again and again, a storm every few seconds.

Uploaders are stuck in a value and send a byte every few seconds; idle clients make the round of clientsCron() long
enough for the uploaders to have idled when it comes to them, all in a few ticks. One byte makes the buffer grow by a
megabyte, so that there is something to trim again. What was sent ends just below two of jemalloc's chunks of 4 MB
(jemalloc 3.6, opt.lg_chunk), so that each trim crosses their border and copies all of it. 0.8 GB at the server with 60
uploaders.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

ANNOUNCED_BYTES = 20_000_000
SENT_BYTES = 8_380_000
ROUND_S = 5.0
"""How often each uploader sends a byte."""

_SOURCES = 100


@contextmanager
def storms(port: int, *, uploaders: int, idle: int, connections_per_s: float) -> Iterator[None]:
    """Hold a load on a server on 127.0.0.1: stuck uploaders, idle clients, and short connections."""
    with ExitStack() as stack:
        held = [stack.enter_context(_connection(port, number)) for number in range(idle + uploaders)]
        for client in held[:idle]:
            client.sendall(b"PING\r\n")
            client.recv(64)
        head = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$%d\r\n" % ANNOUNCED_BYTES
        for client in held[idle:]:
            client.sendall(head + bytes(SENT_BYTES))
        over = threading.Event()
        threads = [threading.Thread(target=_short_connections, args=(port, connections_per_s, over))]
        if uploaders:
            threads.append(threading.Thread(target=_nudge, args=(held[idle:], over)))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


def _connection(port: int, number: int) -> socket.socket:
    source = f"127.0.0.{2 + number % _SOURCES}"
    return socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0))


def _nudge(uploaders: list[socket.socket], over: threading.Event) -> None:
    while not over.is_set():
        for client in uploaders:
            client.sendall(b"x")
            if over.wait(ROUND_S / len(uploaders)):
                return


def _short_connections(port: int, per_s: float, over: threading.Event) -> None:
    # at fixed times: what a stall held up comes after it, so that the load is the same whatever the server does
    due = time.monotonic() + 1 / per_s
    while not over.wait(max(due - time.monotonic(), 0)):
        due += 1 / per_s
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(b"PING\r\n")
            client.recv(64)
