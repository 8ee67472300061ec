"""Import against the real tools: tcpdump of a full backlog, counted by the kernel and by tshark; redis-cli itself."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from lab import LabError
from lab.server import HOST, Server, find_server, running_server
from test_record_redis import own_network
from tracing import recording, until, why_not_traceable

from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.packets import CaptureSummary, unanswered_syns
from stallscope.tracer.analysis.summary import summarise
from stallscope.tracer.analysis.tables import Tables, build_tables
from stallscope.tracer.errors import UsageError
from stallscope.tracer.imports.formats import read_text
from stallscope.tracer.imports.packets import read_part
from stallscope.tracer.imports.rows import Input
from stallscope.tracer.imports.run import run_import
from stallscope.tracer.recording import read_recording

BACKLOG = 5
CLIENTS = 41
SYN = "tcp.flags.syn == 1 && tcp.flags.ack == 0"


def need(*tools: str) -> None:
    packages = {"editcap": "tshark", "redis-cli": "redis-tools"}
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"requires {tool}: apt-get install {packages.get(tool, tool)}")


def counters() -> dict[str, int]:
    """Return the TcpExt counters of this thread's network namespace."""
    lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    named = dict(zip(lines[::2], lines[1::2], strict=True))
    (names,) = (line for line in named if line.startswith("TcpExt:"))
    return {name: int(count) for name, count in zip(names.split()[1:], named[names].split()[1:], strict=True)}


def tshark(capture: Path, display_filter: str) -> int:
    """Return how many packets another decoder finds."""
    words = ["tshark", "-r", str(capture), "-Y", display_filter, "-T", "fields", "-e", "frame.number"]
    return len(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines())


def installed_server(folder: Path) -> Path:
    """Return a copy of the distribution's redis-server: its own file has another name, and does what that says."""
    need("redis-server")
    return Path(shutil.copy(str(shutil.which("redis-server")), folder / "redis-server"))


@contextmanager
def captures(port: int, words: dict[Path, tuple[str, ...]]) -> Iterator[None]:
    """Run a tcpdump for each file, with these words, until everything that was sent to the port is in all of them."""
    dumps = []
    try:
        for path, more in words.items():
            command = ["tcpdump", "-U", *more, "-w", str(path), f"tcp port {port}"]
            dumps.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            assert dumps[-1].stderr is not None
            assert any("listening on" in line for line in iter(dumps[-1].stderr.readline, ""))
        yield
        # tcpdump reads in blocks: a last connection has arrived when its own port is in the file
        with socket.create_connection((HOST, port)) as last:
            own = last.getsockname()[1]
        for path in words:
            until(lambda path=path: own in read_part(path, (port,)).segments.peer_port, "the last connection is in it")
    finally:
        said = []
        for dump in dumps:
            dump.send_signal(signal.SIGINT)
            said.append(dump.communicate(timeout=30)[1])
    if any("0 packets dropped by kernel" not in text for text in said):
        pytest.skip(f"tcpdump lost packets itself: {said}")


def connect_all(port: int, count: int) -> list[socket.socket]:
    clients = []
    for _ in range(count):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex((HOST, port))
        clients.append(client)
    return clients


def are(clients: list[socket.socket], *, answered: bool) -> Callable[[], bool]:
    """Return whether all are connected, as they believe, or have really got an answer."""

    def all_of_them() -> bool:
        readable, writable, _ = select.select(clients, clients, [], 0)
        return len(readable if answered else writable) == len(clients)

    return all_of_them


@dataclass(frozen=True)
class Met:
    """A server that stood still while clients connected, and what the kernel counted."""

    folder: Path
    port: int
    overflows_stopped: int
    overflows: int
    syns_again: int
    continued_wall_ns: int
    recorded: bool

    def tables(self, name: str) -> Tables:
        path = self.folder / f"{name}.stall"
        if not path.exists():
            run_import([self.folder / name], None, path, (self.port,))
        return build_tables(read_recording(path))

    def events(self, name: str) -> dict[str, int]:
        counts = self.tables(name).packets["event"].value_counts()
        return {str(event): int(count) for event, count in counts.items() if count}


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Met:
    need("tcpdump")
    folder = tmp_path_factory.mktemp("capture")
    recorded = not why_not_traceable()
    with ExitStack() as stack:
        home = stack.enter_context(own_network())
        server = stack.enter_context(running_server(installed_server(folder), backlog=BACKLOG))
        if recorded:
            words = ("-p", str(server.pid))
            recorder = stack.enter_context(recording(folder / "recorded", *words, prefix=["nsenter", f"--net={home}"]))
        lo, anywhere = ("-i", "lo", "--time-stamp-precision=nano"), ("-i", "any", "-s", "96")
        with captures(server.port, {folder / "lo": lo, folder / "any": anywhere}):
            before = counters()

            def gained(name: str) -> int:
                return counters()[name] - before[name]

            os.kill(server.pid, signal.SIGSTOP)
            try:
                clients = connect_all(server.port, CLIENTS)
                refused = CLIENTS - BACKLOG - 1
                until(lambda: gained("TCPSynRetrans") >= 2 * refused, "every refused client has tried three times")
                overflows_stopped = gained("ListenOverflows")
                continued_wall_ns = time.time_ns()
            finally:
                os.kill(server.pid, signal.SIGCONT)
            until(are(clients, answered=False), "every client is connected")
            # the queue was full again when their third ACKs came: what some of them send reaches nobody at first
            for client in clients:
                client.send(b"PING\r\n")
            until(are(clients, answered=True), "every client was answered")
            for client in clients:
                client.close()
        overflows, syns_again = gained("ListenOverflows"), gained("TCPSynRetrans")
        if recorded:
            assert recorder.stop() == 0
    return Met(folder, server.port, overflows_stopped, overflows, syns_again, continued_wall_ns, recorded)


@pytest.mark.parametrize("name", ["lo", "any"])
class TestCapture:
    def test_has_every_syn_that_the_kernel_sent_again(self, met: Met, name: str) -> None:
        events = met.events(name)
        # and one that ended the captures
        assert events["SYN"] == CLIENTS + 1
        assert events["SYN retransmitted"] == met.syns_again

    def test_has_every_refusal_as_a_syn_without_an_answer(self, met: Met, name: str) -> None:
        tables = met.tables(name)
        wall_ns = unanswered_syns(tables.packets)["time_ns"] + tables.manifest.wall_offset_ns
        assert int((wall_ns <= met.continued_wall_ns).sum()) == met.overflows_stopped > 0
        assert len(wall_ns) <= met.overflows

    def test_agrees_with_tshark(self, met: Met, name: str) -> None:
        need("tshark")
        path, events = met.folder / name, met.events(name)
        assert events["SYN"] + events["SYN retransmitted"] == tshark(path, SYN)
        assert events["SYN retransmitted"] == tshark(path, f"{SYN} && tcp.analysis.retransmission")
        answers = events["SYN-ACK"] + events.get("SYN-ACK retransmitted", 0)
        assert answers == tshark(path, "tcp.flags.syn == 1 && tcp.flags.ack == 1")
        resets = events.get("RST from server", 0) + events.get("RST from client", 0)
        assert resets == tshark(path, "tcp.flags.reset == 1")
        # on a quick machine there is none: the server had room again before the first client sent something
        again = sum(events.get(f"data or FIN retransmitted by {end}", 0) for end in ("client", "server"))
        kinds = ("retransmission", "fast_retransmission", "spurious_retransmission")
        told = " || ".join(f"tcp.analysis.{kind}" for kind in kinds)
        assert again == tshark(path, f"tcp.flags.syn == 0 && ({told})")

    def test_is_the_same_as_pcapng_and_cut_in_parts(self, met: Met, name: str) -> None:
        need("editcap")
        path = met.folder / name
        folder = met.folder / f"{name}-parts"
        folder.mkdir()
        subprocess.run(["editcap", "-F", "pcapng", path, folder / "whole.pcapng"], check=True)
        subprocess.run(["editcap", "-F", "pcapng", "-c", "50", path, folder / "part.pcapng"], check=True)
        parts = sorted(folder.glob("part*"))
        assert len(parts) > 2
        for number, inputs in enumerate(([folder / "whole.pcapng"], parts)):
            run_import(inputs, None, folder / f"{number}.stall", (met.port,))
            packets = build_tables(read_recording(folder / f"{number}.stall")).packets
            assert packets.drop(columns="file").equals(met.tables(name).packets.drop(columns="file"))


@pytest.fixture(scope="module")
def beside(met: Met) -> CaptureSummary:
    """What the summary of the recording says of the capture that was put into it."""
    if not met.recorded:
        pytest.skip(why_not_traceable())
    done = run_import([met.folder / "lo"], met.folder / "recorded", met.folder / "all.stall")
    imported = summarise(analyse(read_recording(done.path))).imported
    assert imported is not None
    (capture,) = imported.captures
    return capture


class TestBesideARecording:
    def test_the_refusals_are_those_the_recording_counted(self, met: Met, beside: CaptureSummary) -> None:
        assert beside.refusals is not None
        assert beside.refusals.times == met.overflows
        assert beside.syns == CLIENTS + 1 + met.syns_again

    def test_the_packets_lie_where_the_recording_has_the_refusals(self, met: Met, beside: CaptureSummary) -> None:
        analysis = analyse(read_recording(met.folder / "all.stall"))
        overflows = analysis.stalls.overflows
        unanswered = unanswered_syns(analysis.tables.packets)["time_ns"].to_numpy()
        # every SYN without an answer lies in an interval in which a refusal was seen, give or take the sampling
        margin_ns = 2 * analysis.manifest.sample_ns
        for time_ns in unanswered:
            near = (overflows["after_ns"] - margin_ns <= time_ns) & (time_ns <= overflows["seen_ns"] + margin_ns)
            assert near.any()


def terminal(*words: str) -> str:
    """Return what a command prints on a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(words, stdout=slave, stdin=subprocess.DEVNULL)
    os.close(slave)
    parts = []
    with os.fdopen(master, "rb", buffering=0) as file:
        while True:
            try:
                part = file.read(65536)
            except OSError:  # EIO: the other end is closed
                break
            if not part:
                break
            parts.append(part)
    assert process.wait(30) == 0
    return b"".join(parts).decode()


@pytest.fixture(scope="module", params=["2.8.17", "installed"])
def slow_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    need("redis-cli")
    installed = request.param == "installed"
    build = installed_server(tmp_path_factory.mktemp("server")) if installed else request.param
    try:
        find_server(build)
    except LabError as error:
        pytest.skip(str(error))
    options = ("--slowlog-log-slower-than", "3000", "--latency-monitor-threshold", "3")
    with running_server(build, options=options) as server:
        script = "local n = 0; for i = 1, 2000000 do n = n + i end; return redis.call('set', KEYS[1], ARGV[1])"
        for number in range(3):
            server.command("EVAL", script, "1", f"key {number}", 'two words, "quoted"')
        yield server


class TestRedisCli:
    FORMS = ("--raw", "--no-raw", "--csv", "--json", "terminal")

    def ask(self, server: Server, form: str, *words: str) -> Input:
        command = ["redis-cli", "-p", str(server.port)]
        if form == "terminal":
            text = terminal(*command, *words)
        else:
            text = subprocess.run([*command, form, *words], capture_output=True, text=True, check=True).stdout
        (found,) = read_text(text, words[-1])
        return found

    @pytest.mark.parametrize("form", FORMS)
    def test_slowlog_is_what_the_client_library_reads(self, slow_server: Server, form: str) -> None:
        with redis.Redis(port=slow_server.port, protocol=2) as client:
            told = sorted((item["start_time"], item["duration"]) for item in client.slowlog_get(128))
        found = self.ask(slow_server, form, "slowlog", "get", "128").rows
        durations_us = (found["duration_ns"] // 1000).tolist()
        ended_s = ((found["start_ns"] + found["duration_ns"]) // 10**9).tolist()
        assert sorted(zip(ended_s, durations_us, strict=True)) == told
        assert len(told) >= 3

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("command", [("latency", "history", "command"), ("latency", "latest")])
    def test_latency_is_what_the_client_library_reads(
        self, slow_server: Server, form: str, command: tuple[str, ...]
    ) -> None:
        with redis.Redis(port=slow_server.port, protocol=2) as client:
            if command[-1] == "latest":
                told = [(int(ended), int(ms)) for _, ended, ms, *_ in client.latency_latest()]
            else:
                told = [(int(ended), int(ms)) for ended, ms in client.latency_history("command")]
        item = self.ask(slow_server, form, *command)
        found = item.rows
        milliseconds = (found["duration_ns"] // 1_000_000).tolist()
        ended_s = ((found["start_ns"] + found["duration_ns"]) // 10**9).tolist()
        assert list(zip(ended_s, milliseconds, strict=True)) == told
        assert {probe.name for probe in item.probes} == {"LATENCY command"}

    def test_info_in_the_documented_loop(self, slow_server: Server) -> None:
        loop = f"for i in 1 2 3; do date +%s.%N; redis-cli -p {slow_server.port} info; done"
        before_ns = time.time_ns()
        text = subprocess.run(["sh", "-c", loop], capture_output=True, text=True, check=True).stdout
        after_ns = time.time_ns()
        (item,) = read_text(text, "x")
        names = {probe.name: probe.id for probe in item.probes}
        rows = item.rows[item.rows["probe"] == names["total_connections_received"]]
        assert len(rows) == item.counts["dumps"] == 3
        values = rows["value"][:, 0].copy().view("<f8")
        assert (values[1:] - values[:-1]).tolist() == [1.0, 1.0]
        assert before_ns <= int(rows["start_ns"][0]) < int(rows["start_ns"][-1]) <= after_ns

    def test_an_error_is_repeated(self, slow_server: Server) -> None:
        with pytest.raises(UsageError, match="redis-cli printed an error instead of a reply"):
            self.ask(slow_server, "--raw", "slowlog", "get", "none")
