"""The process that compiles: bcc in, file descriptors out, gone.

bcc and the compiler in it need 130 MB. They live in a short child process, which hands the loaded
programs and the maps over as file descriptors; the recorder keeps only those. A crash inside bcc is then an
error message too. Run as ``python -m stallscope.tracer.capture.loader FD``; the standard library and bcc
are all it imports.
"""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stallscope.tracer.errors import StallscopeError, SurroundingsError

_FDS_PER_MESSAGE = 128
_LENGTH_BYTES = 8

KPROBE = "kprobe"
UPROBE = "uprobe"
RAW_TRACEPOINT = "raw_tracepoint"
TRACING = "tracing"
PERF_EVENT = "perf_event"
_BCC_TYPES = {
    KPROBE: "KPROBE",
    UPROBE: "KPROBE",
    RAW_TRACEPOINT: "RAW_TRACEPOINT",
    TRACING: "TRACING",
    PERF_EVENT: "PERF_EVENT",
}
"""Our program kinds and bcc's constants; uprobes run kprobe programs, fentry and fexit tracing programs."""

_ATTACH_TYPES = {UPROBE: 48}
"""What programs of a kind are loaded for; BPF_TRACE_UPROBE_MULTI (``bpf.UPROBE_MULTI``)."""


@dataclass(frozen=True)
class Loaded:
    """What the child hands over; the caller owns (and closes) every file descriptor.

    Attributes:
        programs: file descriptor by function name.
        maps: file descriptor by map name.
        leaf_types: bcc's description of each map's value, JSON, by map name.
        refused: functions the kernel did not load, with its reason.
    """

    programs: dict[str, int]
    maps: dict[str, int]
    leaf_types: dict[str, str]
    refused: dict[str, str]


class Loader:
    """A child process that has bcc imported, or is about to, and waits for one source to compile."""

    def __init__(self) -> None:
        """Start it; importing bcc goes on while the caller does other things."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stallscope.tracer.capture.loader", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the recorder, which ends this process itself
        )
        theirs.close()

    def load(self, text: str, flags: Sequence[str], programs: dict[str, str], maps: Sequence[str]) -> Loaded:
        """Compile ``text`` and load the named programs; the child ends.

        Args:
            text: BPF C. flags: compiler flags. programs: kind by function name. maps: names to hand over.

        Raises:
            SurroundingsError: bcc is missing or cannot compile here.
        """
        request = {"text": text, "flags": list(flags), "programs": programs, "maps": list(maps)}
        try:
            _send(self._socket, request)
            reply = _receive(self._socket)
            if "error" in reply:
                raise SurroundingsError(reply["error"])
            names = reply["fds"]
            fds: list[int] = []
            while len(fds) < len(names):
                fds += _receive_fds(self._socket)
        except (OSError, EOFError, ValueError) as error:
            raise SurroundingsError(f"the compiler process died: {self._last_words()}") from error
        finally:
            self.close()
        owned = dict(zip(names, fds, strict=True))
        return Loaded(
            {name: owned[name] for name in programs if name in owned},
            {name: owned[name] for name in maps},
            reply["leaf_types"],
            reply["refused"],
        )

    def close(self) -> None:
        """End the child."""
        self._socket.close()
        self._process.kill()
        self._process.wait()
        if self._process.stderr:
            self._process.stderr.close()

    def _last_words(self) -> str:
        try:
            _, errors = self._process.communicate(timeout=5)
        except (subprocess.TimeoutExpired, ValueError):
            return "no reason given"
        lines = errors.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"


def _send(connection: socket.socket, document: dict[str, Any]) -> None:
    data = json.dumps(document).encode()
    connection.sendall(len(data).to_bytes(_LENGTH_BYTES, "little") + data)


def _receive(connection: socket.socket) -> dict[str, Any]:
    length = int.from_bytes(_receive_exactly(connection, _LENGTH_BYTES), "little")
    document: dict[str, Any] = json.loads(_receive_exactly(connection, length))
    return document


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _send_fds(connection: socket.socket, fds: Sequence[int]) -> None:
    for start in range(0, len(fds), _FDS_PER_MESSAGE):
        socket.send_fds(connection, [b"f"], list(fds[start : start + _FDS_PER_MESSAGE]))


def _receive_fds(connection: socket.socket) -> list[int]:
    message, ancillary, _, _ = connection.recvmsg(
        1, socket.CMSG_LEN(_FDS_PER_MESSAGE * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
    )
    if not message:
        raise EOFError
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return list(fds)


def _serve(connection: socket.socket) -> None:
    """Answer one request."""
    from stallscope.tracer.capture.bcc_library import compile_program, load_bcc

    try:
        bcc = load_bcc()
        request = _receive(connection)
        bpf = compile_program(request["text"], request["flags"])
    except StallscopeError as error:
        _send(connection, {"error": str(error)})
        return
    fds: dict[str, int] = {}
    refused: dict[str, str] = {}
    for name, kind in request["programs"].items():
        try:
            attach_type = {"attach_type": _ATTACH_TYPES[kind]} if kind in _ATTACH_TYPES else {}
            fds[name] = bpf.load_func(name.encode(), getattr(bcc.BPF, _BCC_TYPES[kind]), **attach_type).fd
        except Exception as error:  # bcc knows no other
            refused[name] = str(error)
    leaf_types = {}
    for name in request["maps"]:
        fds[name] = bcc.lib.bpf_table_fd(bpf.module, name.encode())
        leaf_types[name] = (bcc.lib.bpf_table_leaf_desc(bpf.module, name.encode()) or b"").decode()
    _send(connection, {"fds": list(fds), "leaf_types": leaf_types, "refused": refused})
    _send_fds(connection, list(fds.values()))


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        try:
            _serve(parent)
            parent.recv(1)  # until the other side has everything
        except (OSError, EOFError):
            pass
    os._exit(0)  # nothing to tidy: the kernel closes what is ours, the recorder keeps its own
