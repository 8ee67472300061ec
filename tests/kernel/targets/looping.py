"""A program whose every wait and accept is known: it does what the lines on stdin say, then prints its truth.

``waits CALL COUNT``: COUNT rounds of a wait by that system call, on an epoll with one readable descriptor.
``accepts CALL COUNT``: COUNT connections of its own, a wait, then that many accepts and one that finds none.
``other COUNT``: system calls that nobody asked for. ``block COUNT``: threads that stay in epoll_wait.
The answer is one line a wait, "wait BEFORE AFTER READY" in CLOCK_MONOTONIC ns, one an accept,
"accept LISTENER_FD FD", then "done". Standard library only; the calls are made by number, so that none is another.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import sys
import threading
import time

NUMBERS = {"epoll_wait": 232, "epoll_pwait": 281, "epoll_pwait2": 441, "accept": 43, "accept4": 288}
GETPPID = 110

libc = ctypes.CDLL(None, use_errno=True)
events = ctypes.create_string_buffer(12 * 8)


def system_call(number: int, *arguments: object) -> int:
    words = [word if word is None or isinstance(word, ctypes.Array) else ctypes.c_long(word) for word in arguments]
    return libc.syscall(ctypes.c_long(number), *words)


def wait(call: str, epoll: int) -> None:
    before = time.monotonic_ns()
    # a mask of NULL is none; epoll_pwait2's time-out of NULL is for ever, and something is readable
    last = [] if call == "epoll_wait" else [None, 8]
    timeout = None if call == "epoll_pwait2" else 1000
    ready = system_call(NUMBERS[call], epoll, events, 8, timeout, *last)
    print("wait", before, time.monotonic_ns(), ready)


def waits(call: str, count: int) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"x")
    epoll = select.epoll()
    epoll.register(reading, select.EPOLLIN)
    for _ in range(count):
        wait(call, epoll.fileno())
    for fd in (reading, writing):
        os.close(fd)


def accepts(call: str, count: int) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=count) as listener, select.epoll() as epoll:
        listener.setblocking(False)
        epoll.register(listener, select.EPOLLIN)
        clients = [socket.create_connection(listener.getsockname()) for _ in range(count)]
        wait("epoll_wait", epoll.fileno())
        for _ in range(count + 1):
            fd = system_call(NUMBERS[call], listener.fileno(), None, None, *([0] if call == "accept4" else []))
            print("accept", listener.fileno(), fd)
            if fd >= 0:
                os.close(fd)
        wait("epoll_wait", epoll.fileno())
        for client in clients:
            client.close()


def other(count: int) -> None:
    for _ in range(count):
        system_call(GETPPID)


def block(count: int) -> None:
    started = threading.Barrier(count + 1)

    def stay() -> None:
        epoll = select.epoll()
        started.wait()
        system_call(NUMBERS["epoll_wait"], epoll.fileno(), ctypes.create_string_buffer(12), 1, -1)

    for _ in range(count):
        threading.Thread(target=stay, daemon=True).start()
    started.wait()


if __name__ == "__main__":
    for line in sys.stdin:
        command, *words = line.split()
        globals()[command](*(int(word) if word.isdigit() else word for word in words))
        print("done", flush=True)
    os._exit(0)
