"""``stallscope record`` with kernel probes: a stall, the queue that fills, what is refused, and the drain."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
from lab import LabError, incident
from lab.recipes import RECIPES
from lab.server import find_server, running_server
from listeners import (
    ACCEPT_QUEUE_FULL,
    ACCEPTED,
    ENQUEUED,
    OVERFLOWS,
    TCP_SYNCNT,
    close_all,
    names_of,
    on_cpu,
    require_kernel_probes,
)
from tracing import Rows, inside, recording, until

from stallscope.tracer.capture.listener import KPROBE_RUNG
from stallscope.tracer.capture.listener_program import COUNTED
from stallscope.tracer.capture.redis_target import pids_listening_on

HOST = "127.0.0.1"
BACKLOG = 5
HOLDS = BACKLOG + 1
CONNECTS = 50
CALM = replace(RECIPES["little"], name="calm", announced_bytes=16_000_000, rate_per_s=100, backlog=30)
"""Long trims and few connections: an emulated server keeps up with them, but for the trims."""

NANOSLEEPS = {"35", "230"}
"""Linux arch/x86/entry/syscalls/syscall_64.tbl: nanosleep, clock_nanosleep."""


@pytest.fixture(scope="module", autouse=True)
def hooked() -> None:
    require_kernel_probes()


@contextmanager
def distribution_server() -> Iterator[tuple[int, int]]:
    """Run the distribution's Redis with a short backlog; yields its process and port."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("requires redis-server: apt-get install redis-server")
    with socket.socket() as spare:
        spare.bind((HOST, 0))
        port = spare.getsockname()[1]
    words = ["--port", str(port), "--tcp-backlog", str(BACKLOG), "--save", "", "--enable-debug-command", "yes"]
    with subprocess.Popen([binary, *words], stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: pids_listening_on(port) == [process.pid], "the server listens")
            yield process.pid, port
        finally:
            process.kill()


@dataclass(frozen=True)
class Stalled:
    rows: Rows
    port: int
    established: set[tuple[str, int]]
    refused: set[tuple[str, int]]


@pytest.fixture(scope="module")
def stalled(tmp_path_factory: pytest.TempPathFactory) -> Stalled:
    """One client's command blocks the server for 5 s; meanwhile 50 clients connect, each with two SYNs or more."""
    with ExitStack() as stack:
        pid, port = stack.enter_context(distribution_server())
        blocker = stack.enter_context(socket.create_connection((HOST, port)))
        recorder = stack.enter_context(
            recording(tmp_path_factory.mktemp("stalled") / "stalled.stall", "-p", str(pid), "--stall", "100ms")
        )
        blocker.sendall(b"DEBUG SLEEP 5\r\n")
        until(lambda: Path(f"/proc/{pid}/syscall").read_text().split()[0] in NANOSLEEPS, "the server sleeps")
        clients = [stack.enter_context(socket.socket()) for _ in range(CONNECTS)]
        with on_cpu(0):
            for client in clients:
                client.setsockopt(socket.IPPROTO_TCP, TCP_SYNCNT, 1)
                client.setblocking(False)
                client.connect_ex((HOST, port))
        assert blocker.recv(16) == b"+OK\r\n"
        recorder.wait_until_it_has(HOLDS, ACCEPTED)
        peers = names_of(clients)
        established = {client.getsockname() for client in clients if is_answered(client)}
        assert recorder.stop() == 0, recorder.said
        close_all(clients)
        return Stalled(Rows(recorder.recording()), port, established, peers - established)


def is_answered(client: socket.socket) -> bool:
    client.settimeout(5)
    try:
        client.sendall(b"PING\r\n")
        return client.recv(16) == b"+PONG\r\n"
    except OSError:
        return False


def peers_of(rows: pd.DataFrame) -> set[tuple[str, int]]:
    assert set(rows["peer_low"]) <= {0xFFFF_7F00_0001}, "all from 127.0.0.1"
    return {(HOST, port) for port in rows["peer_port"]}


def hits(rows: Rows, *names: str) -> int:
    return sum(rows.counters(name).hits for name in names)


def assert_reconciled(rows: Rows) -> int:
    """Hold the recording's overflows against the kernel's; returns how many there were."""
    (namespace,) = rows.manifest.namespaces
    counted = namespace.counters_end["ListenOverflows"] - namespace.counters_start["ListenOverflows"]
    assert hits(rows, *OVERFLOWS) == namespace.seen["ListenOverflows"]
    for name in COUNTED:
        gained = namespace.counters_end[name] - namespace.counters_start[name]
        assert namespace.seen[name] + namespace.seen_elsewhere[name] == gained, name
    for probe in rows.manifest.probes:
        if probe.name in OVERFLOWS:
            counters = rows.counters(probe.name)
            assert counters.hits == counters.sent + counters.thinned + counters.lost
            assert counters.sent == len(rows.of(probe.name))
    return counted


class TestStall:
    def test_the_kernels_side_is_probed(self, stalled: Stalled) -> None:
        rung = stalled.rows.manifest.rungs["overflows"]
        assert set(rung.split(" and ")) <= {"fentry", KPROBE_RUNG}
        assert {probe.rung for probe in stalled.rows.probes(ACCEPT_QUEUE_FULL)} == {rung}

    def test_every_overflow_is_a_row_and_the_kernel_counted_as_many(self, stalled: Stalled) -> None:
        refused = stalled.rows.of(ACCEPT_QUEUE_FULL)
        assert assert_reconciled(stalled.rows) == len(refused)
        assert peers_of(refused) == stalled.refused
        assert (refused["peer_port"].value_counts() >= 2).all()
        assert set(refused["queue_length"]) == {HOLDS}
        assert set(refused["queue_limit"]) == {BACKLOG}

    def test_stall_filling_overflow_and_drain_follow_each_other(self, stalled: Stalled) -> None:
        rows = stalled.rows
        (stall,) = rows.of("event loop iteration").nlargest(1, "duration_ns").to_dict("records")
        enqueued = rows.of(ENQUEUED)
        enqueued = enqueued[enqueued["start_ns"].between(stall["start_ns"], stall["end_ns"])]
        refused = rows.of(ACCEPT_QUEUE_FULL)
        accepted = rows.of(ACCEPTED)
        accepted = accepted[accepted["peer_port"].isin(enqueued["peer_port"])]
        assert stall["end_ns"] - stall["start_ns"] >= 5_000_000_000
        assert enqueued["queue_length"].tolist() == list(range(1, HOLDS + 1))
        assert peers_of(enqueued) == stalled.established
        assert enqueued["start_ns"].max() < refused["start_ns"].min()
        assert refused["start_ns"].max() < stall["end_ns"] < accepted["end_ns"].min()
        assert accepted["peer_port"].tolist() == enqueued["peer_port"].tolist()
        assert accepted["start_ns"].tolist() == enqueued["start_ns"].tolist()

    def test_the_listener_is_the_one_that_was_sampled(self, stalled: Stalled) -> None:
        rows = stalled.rows
        indexes = {listener.index for listener in rows.manifest.listeners if listener.port == stalled.port}
        refused = rows.of(ACCEPT_QUEUE_FULL)
        assert set(refused["tid"]) <= indexes
        assert set(refused["pid"]) == {rows.manifest.targets[0].pid}
        sampled = rows.of("accept queue")
        sampled = sampled[sampled["listener"].isin(set(refused["tid"]))]
        assert sampled["queue_length"].max() == HOLDS
        assert sampled["queue_length"].iloc[-1] == 0

    def test_what_the_kernel_handed_over_is_what_the_server_accepted(self, stalled: Stalled) -> None:
        accepts = stalled.rows.of("accept")
        assert (accepts["fd"] >= 0).sum() == hits(stalled.rows, ACCEPTED)


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The lab's small incident on Redis 2.8.17."""
    try:
        find_server("2.8.17")
    except LabError as error:
        pytest.skip(str(error))
    with ExitStack() as stack:
        server = stack.enter_context(running_server("2.8.17", backlog=CALM.backlog))
        load = stack.enter_context(incident.prepared_load(server, CALM))
        # the test machine hands this folder back
        folder = Path(os.environ.get("STALLSCOPE_OUT") or tmp_path_factory.mktemp("incident"))
        recorder = stack.enter_context(recording(folder / "incident.stall", "-p", str(server.pid)))
        load.start()
        load.outcome()
        assert recorder.stop() == 0, recorder.said
        return Rows(recorder.recording())


class TestIncident:
    def test_observes_every_overflow(self, met: Rows) -> None:
        assert assert_reconciled(met) > 0

    def test_trims_filling_overflow_and_drain_follow_each_other(self, met: Rows) -> None:
        stalls, trims = met.of("event loop iteration"), met.of("sdsRemoveFreeSpace")
        trimmed_ns = trims.groupby(inside(trims, stalls))["duration_ns"].sum().drop(-1, errors="ignore").astype("int64")
        lengths_ns = (stalls["end_ns"] - stalls["start_ns"]).astype("int64")
        storms = stalls.loc[trimmed_ns[trimmed_ns > lengths_ns[trimmed_ns.index] / 2].index]
        chains = [chain_of_events(met, stall) for _, stall in storms.iterrows()]
        # the one that met an empty queue; the others may find it as a storm before them left it
        assert CALM.backlog + 1 in [len(filled) for filled in chains], chains


def chain_of_events(rows: Rows, stall: pd.Series) -> list[int]:
    """Return the queue's lengths as a stall filled it; none unless trims, filling, overflow and drain came in order."""
    begin_ns, end_ns = stall["start_ns"], stall["end_ns"]
    trims, refused, enqueued, accepted = (
        found[found["start_ns"].between(begin_ns, end_ns)]
        for found in map(rows.of, ("sdsRemoveFreeSpace", ACCEPT_QUEUE_FULL, ENQUEUED, ACCEPTED))
    )
    first_trim_ns, first_refused_ns = trims["start_ns"].min(), refused["start_ns"].min()
    # the same iteration accepts before it trims: what came then is gone
    filled = enqueued[enqueued["start_ns"] > first_trim_ns]
    drained = accepted[accepted["start_ns"] > first_trim_ns]
    if (
        filled.empty
        or refused.empty
        or not begin_ns < first_trim_ns < filled["start_ns"].iloc[0]
        or not filled["start_ns"].iloc[-1] < first_refused_ns < end_ns < drained["end_ns"].min()
    ):
        return []
    assert drained["start_ns"].tolist() == filled["start_ns"].tolist(), "accepted in the order in which they came"
    assert filled["queue_length"].is_monotonic_increasing
    return [int(length) for length in filled["queue_length"]]
