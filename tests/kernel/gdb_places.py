"""A live server's stacks at random places, as a sampler would copy them, beside gdb's own backtraces."""

from __future__ import annotations

import base64
import json
import os
import random
import socket
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lab.server import HOST, Server, running_server
from mapped_code import mapped_code
from numpy.typing import NDArray

from stallscope.tracer.unwind.code import CodeImage, CodeMapping
from stallscope.tracer.unwind.registers import RED_ZONE_BYTES
from stallscope.tracer.unwind.unwinder import Ended, Unwinder, UnwoundStacks

IN_GDB = Path(__file__).with_name("targets") / "places_in_gdb.py"
# More than a sampler copies, so that one visit answers how much is enough.
STACK_BYTES = 64 * 1024


@dataclass(frozen=True)
class GdbFrame:
    address: int
    name: str
    start: int  # of its function, 0 when gdb knows none


@dataclass(frozen=True)
class Places:
    """Stacks of one process: the sampler's view, and gdb's frames of each."""

    mappings: list[CodeMapping]
    images: dict[str, CodeImage]
    registers: NDArray[np.uint64]
    stacks: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    frames: list[list[GdbFrame]]
    stopped: list[str]


@dataclass
class Agreement:
    """How many stacks are the same in both, and in what the others differ."""

    places: int = 0
    equal: int = 0
    to_main: int = 0
    names_compared: int = 0
    frames: int = 0
    differences: list[str] = field(default_factory=list)
    wrong_names: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)


def request(*words: str | bytes) -> bytes:
    encoded = [word.encode() if isinstance(word, str) else word for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)


def commands(version: tuple[int, int, int]) -> list[bytes]:
    """Return commands that between them reach much of the server: its types, Lua, sorting, the allocator."""
    some = [
        request("KEYS", "*1*"),
        request("SORT", "list", "BY", "weight:*", "LIMIT", "0", "5"),
        request("SORT", "list", "DESC", "ALPHA"),
        request("SUNIONSTORE", "union", "set", "other"),
        request("SINTER", "set", "other"),
        request("ZUNIONSTORE", "scores", "2", "sorted", "set"),
        request("ZRANGEBYSCORE", "sorted", "(10", "+inf", "LIMIT", "2", "50"),
        request("LRANGE", "list", "0", "-1"),
        request("LINSERT", "list", "BEFORE", "77", "x"),
        request("HGETALL", "hash"),
        request("HINCRBYFLOAT", "hash", "f", "1.25"),
        request("SET", "large", b"x" * 200_000),
        request("APPEND", "large", b"y" * 5_000),
        request("BITCOUNT", "large"),
        request("DEL", "large", "union"),
        request("INFO"),
        request("CONFIG", "GET", "*"),
        request("CLIENT", "LIST"),
        request("SCAN", "0", "COUNT", "100"),
        request("RANDOMKEY"),
        request("EVAL", "local t={} for i=1,200 do t[i]=redis.call('INCR',KEYS[1]) end return #t", "1", "n"),
        request("EVAL", "return cjson.encode({1,2,{a=string.rep('x',50)}})", "0"),
        request("EVAL", "table.sort({5,3,8,1}, function(a,b) return a<b end) return 1", "0"),
        request("NOSUCH", "command"),
    ]
    if version >= (3, 0, 0):
        some += [request("PFADD", "hll", *map(str, range(50))), request("PFCOUNT", "hll")]
    if version >= (5, 0, 0):
        some += [request("XADD", "stream", "*", "a", "b"), request("XRANGE", "stream", "-", "+", "COUNT", "20")]
        some += [request("GEOADD", "geo", "13.3", "38.1", "p"), request("GEORADIUS", "geo", "15", "37", "200", "km")]
    return some


@contextmanager
def busy_server(build: str, seed: int) -> Iterator[Server]:
    """Run a server under a mixed load until the block is left."""
    with running_server(build, options=("--hz", "100")) as server:
        fill = [
            request("SADD", name, *map(str, range(start, start + 800))) for name, start in (("set", 0), ("other", 400))
        ]
        fill += [request("RPUSH", "list", *map(str, range(500)))]
        fill += [request("ZADD", "sorted", *(word for n in range(300) for word in (str(n), f"m{n}")))]
        fill += [request("HSET", "hash", f"f{n}", str(n)) for n in range(200)]
        fill += [request("SET", f"weight:{n}", str(-n)) for n in range(500)]
        stop = threading.Event()
        load = threading.Thread(target=_load, args=(server, b"".join(fill), seed, stop))
        load.start()
        try:
            yield server
        finally:
            stop.set()
            load.join()


def _load(server: Server, fill: bytes, seed: int, stop: threading.Event) -> None:
    """Send commands ahead of their answers, so that the server never idles, and throw the answers away."""
    chance = random.Random(seed)
    some = commands(server.version)
    # It takes as long as all the others together.
    digest = request("DEBUG", "DIGEST")
    with socket.create_connection((HOST, server.port)) as connection:
        connection.sendall(fill)
        answers = threading.Thread(target=_discard, args=(connection,))
        answers.start()
        while not stop.is_set():
            connection.sendall(b"".join(chance.choices(some, k=32)) + (digest if chance.random() < 0.05 else b""))
        connection.shutdown(socket.SHUT_WR)
        answers.join()


def _discard(connection: socket.socket) -> None:
    while connection.recv(1 << 20):
        pass


def visit(server: Server, count: int, seed: int) -> Places:
    """Stop a server at random places with gdb; return what was found at each."""
    mappings, images = mapped_code(server.pid)
    with tempfile.NamedTemporaryFile("r", suffix=".json") as output:
        environment = {
            **os.environ,
            "PLACES_PID": str(server.pid),
            "PLACES_COUNT": str(count),
            "PLACES_SEED": str(seed),
            "PLACES_OUTPUT": output.name,
            "PLACES_BELOW": str(RED_ZONE_BYTES),
            "PLACES_SIZE": str(STACK_BYTES),
        }
        done = subprocess.run(
            ["gdb", "-q", "-nx", "-batch", "-x", IN_GDB], env=environment, capture_output=True, text=True, check=False
        )
        lines = output.read().splitlines()
    assert len(lines) == count, done.stderr[-2000:]
    visited = [json.loads(line) for line in lines]
    copies = [base64.b64decode(place["stack"]) for place in visited]
    stacks = np.zeros((count, RED_ZONE_BYTES + STACK_BYTES), np.uint8)
    for row, copy in enumerate(copies):
        stacks[row, : len(copy)] = np.frombuffer(copy, np.uint8)
    return Places(
        mappings,
        images,
        np.array([place["registers"] for place in visited], np.uint64),
        stacks,
        np.array([len(copy) for copy in copies], np.int64),
        [[GdbFrame(*frame) for frame in place["frames"]] for place in visited],
        [place["stopped"] for place in visited],
    )


def compare(places: Places, *, copied_bytes: int = STACK_BYTES, below: int = 0) -> Agreement:
    """Unwind every stack and hold each frame's address and name against gdb's.

    Args:
        copied_bytes: how much of each stack the sampler would have copied, from the stack pointer upwards.
        below: how much more below it.
    """
    unwinder = Unwinder(places.mappings, places.images)
    from_byte = RED_ZONE_BYTES - below
    stacks = np.ascontiguousarray(places.stacks[:, from_byte : RED_ZONE_BYTES + copied_bytes])
    found = unwinder.unwind(places.registers, stacks, places.lengths - from_byte, below=below)
    agreement = Agreement()
    for row, theirs in enumerate(places.frames):
        _compare_one(unwinder, found, row, theirs, places.stopped[row], agreement)
    return agreement


def _compare_one(
    unwinder: Unwinder, found: UnwoundStacks, row: int, theirs: list[GdbFrame], stopped: str, agreement: Agreement
) -> None:
    depth = int(found.depth[row])
    addresses = found.addresses[row, :depth]
    ours = unwinder.frames(addresses, found.is_exact[row, :depth])
    names = [frame.function for frame in ours]
    agreement.places += 1
    agreement.frames += depth
    agreement.ended[Ended(found.ended[row]).name] += 1
    agreement.to_main += "main" in names
    if addresses.tolist() == [frame.address for frame in theirs]:
        agreement.equal += 1
    else:
        shown = " < ".join(f"{frame}@{address:#x}" for frame, address in zip(ours, addresses.tolist(), strict=True))
        expected = " < ".join(f"{frame.name}@{frame.address:#x}" for frame in theirs)
        agreement.differences.append(f"{Ended(found.ended[row]).name}: {shown}\n gdb ({stopped}): {expected}")
    for frame, other in zip(ours, theirs, strict=False):
        # Functions have several names, as write and __GI___libc_write: the same is what starts at the same place.
        # gdb puts an unknown function down to the nearest known one before it; ours has no name then.
        if frame.function and other.start:
            agreement.names_compared += 1
            if frame.start != other.start:
                agreement.wrong_names[f"{frame.function} / gdb {other.name}"] += 1
