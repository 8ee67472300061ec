"""The lab's Redis servers recorded for real: the incident, restarts, several servers at once."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import incident
from lab.outcome import Outcome
from lab.recipes import RECIPES
from lab.server import HOST, Server, running_server
from tracing import Rows, built, inside, recording, until

CLONE_NEWNET = 0x40000000
PURGES = {"2.8.17": ["je_pages_purge"], "5.0.6": ["je_pages_purge_lazy", "je_pages_purge_forced"]}
ANNOUNCED_BYTES = 1_000_003
SENT_BYTES = 600_011


@contextmanager
def own_network() -> Iterator[str]:
    """Enter a network namespace of our own, with loopback; yields the path of the one we came from."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(CLONE_NEWNET):
            pytest.skip(f"requires unshare(CLONE_NEWNET): {os.strerror(ctypes.get_errno())}; run as root")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield f"/proc/{os.getpid()}/fd/{home}"
        finally:
            assert libc.setns(home, CLONE_NEWNET) == 0
    finally:
        os.close(home)


@dataclass(frozen=True)
class Incident:
    rows: Rows
    outcome: Outcome
    server: Server
    backlog: int
    attached_ns: int


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Incident:
    """The small incident on a server in a network namespace of its own, recorded from the one outside."""
    build, recipe = built("2.8.17"), RECIPES["little"]
    path = tmp_path_factory.mktemp("incident") / "incident.stall"
    with ExitStack() as stack:
        home = stack.enter_context(own_network())
        server = stack.enter_context(running_server(build, backlog=recipe.backlog))
        load = stack.enter_context(incident.prepared_load(server, recipe))
        words = ("-p", str(server.pid), "--probe", "libc:madvise")
        recorder = stack.enter_context(recording(path, *words, prefix=["nsenter", f"--net={home}"]))
        load.start()
        outcome = load.outcome()
        assert recorder.stop() == 0
        return Incident(Rows(recorder.recording()), outcome, server, recipe.backlog, recorder.attached_ns)


class TestIncident:
    def test_is_recorded_whole(self, met: Incident) -> None:
        (target,) = met.rows.manifest.targets
        assert met.rows.recording.complete
        assert (target.pid, target.product, target.version) == (met.server.pid, "redis", "2.8.17")
        assert target.allocator == "jemalloc-3.6.0"
        assert target.info["redis_version"] == "2.8.17"
        assert target.info["config:tcp-backlog"] == str(met.backlog)
        for probe, counters in met.rows.recording.counters.by_probe.items():  # type: ignore[union-attr]
            rows = met.rows.all[met.rows.all["probe"] == probe]
            assert rows["is_finished"].sum() == counters.sent
            assert counters.lost == counters.lost_starts == counters.abandoned == 0
            under_way = (~rows["is_finished"]).sum()
            assert counters.hits == counters.sent + counters.short_calls + under_way

    def test_every_trim_is_in_a_resize_in_the_clients_cron_in_the_cron(self, met: Incident) -> None:
        cron, clients, resize, trim = (
            met.rows.of(name)
            for name in ("serverCron", "clientsCron", "clientsCronResizeQueryBuffer", "sdsRemoveFreeSpace")
        )
        uploaders = RECIPES["little"].uploaders
        assert len(trim) >= uploaders
        assert (inside(clients, cron) >= 0).all()
        assert len(clients) == len(cron)
        holder = inside(trim, resize)
        assert (holder >= 0).all()
        assert holder.is_unique
        trimming = resize.loc[holder]
        assert (inside(trimming, clients) >= 0).all()

    def test_the_bytes_of_a_trim_are_those_of_its_client(self, met: Incident) -> None:
        resize, trim = met.rows.of("clientsCronResizeQueryBuffer"), met.rows.of("sdsRemoveFreeSpace")
        client = resize.loc[inside(trim, resize)].reset_index(drop=True)
        assert (trim["length_bytes"] + trim["free_bytes"]).tolist() == client["allocated_bytes"].tolist()
        assert trim["free_bytes"].tolist() == client["free_bytes"].tolist()
        large = trim[trim["length_bytes"] >= RECIPES["little"].sent_bytes]
        assert len(large) == RECIPES["little"].uploaders
        assert (large["free_bytes"] > 0).all()

    def test_the_uploaders_had_idled_and_each_has_its_own_descriptor(self, met: Incident) -> None:
        resize, trim = met.rows.of("clientsCronResizeQueryBuffer"), met.rows.of("sdsRemoveFreeSpace")
        large = inside(trim[trim["length_bytes"] >= RECIPES["little"].sent_bytes], resize)
        client = resize.loc[large]
        wall_s = (client["start_ns"] + met.rows.manifest.wall_offset_ns) // 1_000_000_000
        # The server trims after 2 s, or, of a buffer twice as large as its recent peak, at the second visit in
        # which nothing was read: at least one second, on a clock of whole seconds.
        assert (wall_s - client["last_interaction_s"] >= 1).all()
        assert client["fd"].is_unique
        assert (client["fd"] > 2).all()

    def test_purges_lie_in_trims_and_are_the_madvise_calls(self, met: Incident) -> None:
        purge, madvise = met.rows.of("je_pages_purge"), met.rows.of("libc:madvise")
        assert (purge["purged_bytes"] > 0).all()
        # from when both were attached
        purge = purge[(purge["start_ns"] > met.attached_ns) & (purge["tid"] == met.server.pid)]
        madvise = madvise[(madvise["start_ns"] > met.attached_ns) & (madvise["tid"] == met.server.pid)]
        assert len(purge) == len(madvise) > 0
        assert inside(madvise, purge).tolist() == purge.index.tolist()
        assert (inside(purge, met.rows.of("sdsRemoveFreeSpace")) >= 0).any()

    def test_stalls_are_iterations_that_hold_the_cron(self, met: Incident) -> None:
        stalls, cron = met.rows.of("event loop iteration"), met.rows.of("serverCron")
        assert (stalls["duration_ns"] >= met.rows.manifest.stall_ns).all()
        longest = cron.loc[[cron["duration_ns"].astype("float").idxmax()]]
        (holder,) = inside(longest, stalls)
        assert stalls.loc[holder, "duration_ns"] >= longest["duration_ns"].item() > 0

    def test_the_accept_queue_is_seen_full(self, met: Incident) -> None:
        queue = met.rows.of("accept queue")
        (listener,) = met.rows.manifest.listeners
        assert (listener.address, listener.pid) == (f"{HOST}:{met.server.port}", met.server.pid)
        assert set(queue["queue_limit"]) == {listener.limit} == {met.backlog}
        assert queue["queue_length"].max() == met.backlog + 1 == met.outcome.listener.max_queue

    def test_overflows_are_those_that_the_kernel_and_the_load_counted(self, met: Incident) -> None:
        (namespace,) = met.rows.manifest.namespaces
        overflows = namespace.counters_end["ListenOverflows"] - namespace.counters_start["ListenOverflows"]
        assert namespace.inode != os.stat("/proc/self/ns/net").st_ino, "the server had its own"
        assert overflows == met.outcome.listener.overflows > 0
        samples = met.rows.of("kernel counter")
        counter = met.rows.manifest.counter_names.index("ListenOverflows")
        counts = samples[samples["counter"] == counter]["count"]
        assert counts.is_monotonic_increasing
        assert counts.max() - counts.min() == overflows

    def test_every_accepted_connection_is_a_row(self, met: Incident) -> None:
        accepts = met.rows.of("accept")
        assert (accepts["fd"] > 0).all()
        answered = met.outcome.connections
        assert len(accepts) >= answered.completed
        assert accepts["listener_fd"].nunique() == 1


@contextmanager
def stuck_uploader(server: Server) -> Iterator[int]:
    """A client that stops in the middle of a value; yields the server's descriptor of it."""
    with socket.create_connection((HOST, server.port)) as client:
        client.sendall(b"*3\r\n$3\r\nSET\r\n$6\r\nupload\r\n$%d\r\n%s" % (ANNOUNCED_BYTES, b"x" * SENT_BYTES))
        address = ":".join(map(str, client.getsockname()))
        found: list[str] = []

        def is_known() -> bool:
            found[:] = re.findall(rf"addr={address} fd=(\d+)", server.command("CLIENT", "LIST"))
            return bool(found)

        until(is_known, "the server knows the client")
        yield int(found[0])


class TestSeveralServers:
    def test_each_is_decoded_in_its_own_way(self, tmp_path: Path) -> None:
        with ExitStack() as stack:
            servers = [stack.enter_context(running_server(built(name))) for name in PURGES]
            old, new = servers
            words = ("-p", str(old.pid), "--port", str(new.port))
            recorder = stack.enter_context(recording(tmp_path / "two.stall", *words))
            descriptors = [stack.enter_context(stuck_uploader(server)) for server in servers]
            for server in servers:
                recorder.wait_until_it_has(1, "sdsRemoveFreeSpace", pid=server.pid)
            assert recorder.stop() == 0
            rows = Rows(recorder.recording())
        assert {target.pid: target.version for target in rows.manifest.targets} == {
            old.pid: "2.8.17",
            new.pid: "5.0.6",
        }
        assert {listener.port for listener in rows.manifest.listeners} == {old.port, new.port}
        for server, descriptor, symbols in zip(servers, descriptors, PURGES.values(), strict=True):
            resize = rows.of("clientsCronResizeQueryBuffer", pid=server.pid)
            trim = rows.of("sdsRemoveFreeSpace", pid=server.pid)
            trim = trim[trim["length_bytes"] == SENT_BYTES].reset_index(drop=True)
            assert len(trim) == 1, "the bytes that were sent are the bytes that were kept"
            client = resize.loc[inside(trim, resize)].iloc[0]
            assert client["fd"] == descriptor
            assert client["allocated_bytes"] == SENT_BYTES + trim["free_bytes"][0]
            purges = [probe for probe in rows.probes("je_pages_purge") if server.pid in probe.pids]
            assert [probe.symbol for probe in purges] == symbols


class TestServerThatEnds:
    def test_by_pid_ends_the_recording(self, tmp_path: Path) -> None:
        with (
            running_server(built("2.8.17")) as server,
            recording(tmp_path / "died.stall", "-p", str(server.pid)) as recorder,
        ):
            os.kill(server.pid, signal.SIGKILL)
            assert recorder.process.wait(60) == 0
            rows = Rows(recorder.recording())
        assert (rows.recording.complete, rows.manifest.ended_by) == (True, "the traced process ended")
        assert f"process {server.pid} ({server.path.resolve()}) ended or was replaced" in recorder.said
        assert rows.manifest.targets[0].end_ns > rows.manifest.targets[0].start_ns

    @pytest.mark.parametrize("successor", ["2.8.17", "5.0.6"])
    def test_by_port_goes_on_with_its_successor(self, tmp_path: Path, successor: str) -> None:
        with ExitStack() as stack:
            with running_server(built("2.8.17")) as first:
                words = ("--port", str(first.port))
                recorder = stack.enter_context(recording(tmp_path / "restarted.stall", *words))
                recorder.wait_until_it_has(2, "serverCron")
            second = stack.enter_context(running_server(built(successor), port=first.port))
            recorder.wait_until_it_says(f"process {second.pid} ({second.path.resolve()}) took over port {first.port}")
            descriptor = stack.enter_context(stuck_uploader(second))
            recorder.wait_until_it_has(1, "sdsRemoveFreeSpace", pid=second.pid)
            recorder.wait_until_it_has(
                1, "accept queue", pid=second.pid
            )  # samples that say nothing new come once a second
            assert recorder.stop() == 0
            rows = Rows(recorder.recording())
        before, after = rows.manifest.targets
        assert (before.pid, before.version, after.pid, after.version) == (
            first.pid, "2.8.17", second.pid, successor,
        )  # fmt: skip
        assert before.start_ns < before.end_ns <= after.start_ns
        assert after.end_ns == 0
        assert f"process {first.pid} ({first.path.resolve()}) ended or was replaced" in recorder.said
        assert (rows.of("serverCron", pid=first.pid)["start_ns"] < before.end_ns).all()
        assert (rows.of("serverCron", pid=second.pid)["start_ns"] >= after.start_ns).all()
        assert {listener.pid for listener in rows.manifest.listeners} == {first.pid, second.pid}
        assert len(rows.of("accept queue", pid=second.pid)) > 0
        trim = rows.of("sdsRemoveFreeSpace", pid=second.pid)
        resize = rows.of("clientsCronResizeQueryBuffer", pid=second.pid)
        trim = trim[trim["length_bytes"] == SENT_BYTES].reset_index(drop=True)
        assert resize.loc[inside(trim, resize)]["fd"].tolist() == [descriptor]
        ids = {pid: {one.id for one in rows.manifest.probes if pid in one.pids} for pid in (first.pid, second.pid)}
        if successor == "2.8.17":
            assert ids[first.pid] == ids[second.pid], "the same binary needs no new probes"
        else:
            assert not ids[first.pid] & ids[second.pid]
            symbols = [one.symbol for one in rows.probes("je_pages_purge") if second.pid in one.pids]
            assert symbols == PURGES["5.0.6"]
        for probe, counters in rows.recording.counters.by_probe.items():  # type: ignore[union-attr]
            assert (rows.all["probe"] == probe).sum() >= counters.sent
            assert counters.lost == counters.lost_starts == 0
