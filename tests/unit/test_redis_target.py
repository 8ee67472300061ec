"""What a server is asked about itself, by a server of a few lines that speaks its protocol."""

from __future__ import annotations

import os
import socketserver
import threading
from collections.abc import Iterator

import pytest

from stallscope.tracer.capture.redis_target import server_information

SETTINGS = {
    "tcp-backlog": "511",
    "hz": "10",
    "max-new-connections-per-cycle": "10",
    "jemalloc-bg-thread": "yes",
    "requirepass": "secret",
}
INFO = "# Server\r\nredis_version:7.4.0\r\nmem_allocator:jemalloc-5.3.0\r\nconnected_clients:12\r\nos:Linux\r\n"


class _Server(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while header := self.rfile.readline():
            words = []
            for _ in range(int(header[1:])):
                self.rfile.readline()
                words.append(self.rfile.readline().strip().decode())
            if words[0] == "INFO":
                self.wfile.write(f"${len(INFO)}\r\n{INFO}\r\n".encode())
            elif words[-1] in SETTINGS:
                parts = [words[-1], SETTINGS[words[-1]]]
                self.wfile.write(b"*2\r\n" + b"".join(f"${len(part)}\r\n{part}\r\n".encode() for part in parts))
            else:
                self.wfile.write(b"*0\r\n")


@pytest.fixture
def port() -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Server) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_what_the_findings_need_is_asked_for_and_nothing_secret(port: int) -> None:
    assert server_information(os.getpid(), port, timeout_s=10) == {
        "redis_version": "7.4.0",
        "mem_allocator": "jemalloc-5.3.0",
        "connected_clients": "12",
        "config:tcp-backlog": "511",
        "config:hz": "10",
        "config:max-new-connections-per-cycle": "10",
        "config:jemalloc-bg-thread": "yes",
    }
