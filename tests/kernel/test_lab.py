"""The lab itself: builds, load, incident. Nothing here asserts on a duration."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
from lab import LabError, LabUsageError, incident
from lab.build import Source, UnreachableError, fetch, is_built, load_builds, main, make_server
from lab.listener import ListenerQueue, read_listen_counters
from lab.outcome import Outcome
from lab.recipes import RECIPES, Recipe, check
from lab.server import HOST, Server, find_server, running_server

LAB = Path(incident.__file__).parent
QUIET = replace(RECIPES["quiet"], duration_s=1)
DEADLINE_S = 30.0
SMALL_CLIENTS = 20


def built(name: str) -> Path:
    try:
        return find_server(name)
    except LabError as error:
        pytest.skip(str(error))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.05)


def run_file(name: str, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LAB / name), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, **options)  # type: ignore[call-overload]


class TestBuild:
    def test_declares_the_servers_of_the_article(self) -> None:
        assert list(load_builds()) == [
            "2.8.17", "2.8.17-patched", "2.8.17-lto", "3.2.6", "5.0.6", "2.8.19", "4.0.9",
        ]  # fmt: skip

    def test_downloads_an_archive_and_refuses_one_that_is_not_the_pinned(self, tmp_path: Path) -> None:
        archive = tmp_path / "served" / "redis.tar.gz"
        archive.parent.mkdir()
        archive.write_bytes(b"an archive")
        source = Source("redis.tar.gz", "redis", hashlib.sha256(b"an archive").hexdigest(), url=archive.as_uri())
        kept = fetch(source, tmp_path / "sources", tmp_path / "log")
        assert kept.read_bytes() == b"an archive"
        archive.unlink()
        assert fetch(source, tmp_path / "sources", tmp_path / "log") == kept, "what is there is not asked for again"
        with pytest.raises(LabError, match="not the pinned ff; delete it"):
            fetch(replace(source, sha256="ff"), tmp_path / "sources", tmp_path / "log")

    def test_names_what_cannot_be_reached_and_the_remedy(self, tmp_path: Path) -> None:
        with socket.create_server((HOST, 0)) as closed:
            port = closed.getsockname()[1]
        source = Source("redis.tar.gz", "redis", "ff", url=f"http://{HOST}:{port}/redis.tar.gz")
        with pytest.raises(UnreachableError, match=rf"^cannot download {source.url}: .*refused.*; go online, or put"):
            fetch(source, tmp_path / "sources", tmp_path / "log")
        assert not list((tmp_path / "sources").iterdir())

    def test_has_nothing_to_do_when_its_inputs_are_unchanged(self) -> None:
        server = built("2.8.17")
        before = server.stat()
        done = run_file("build.py", "2.8.17")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{server}\n", "")
        assert server.stat().st_ino == before.st_ino

    def test_a_changed_input_is_not_built(self) -> None:
        built("2.8.17")
        build = load_builds()["2.8.17"]
        assert is_built(build)
        assert not is_built(replace(build, make=("MALLOC=libc",)))

    def test_a_patched_build_needs_its_base_built_with_the_same_words(self) -> None:
        builds = load_builds()
        for build in builds.values():
            assert build.base is None or builds[build.base].make == build.make

    def test_refuses_a_source_with_another_digest(self, tmp_path: Path) -> None:
        builds = load_builds()
        archive = tmp_path / "sources" / builds["3.2.6"].source.file
        archive.parent.mkdir()
        archive.write_bytes(b"something else")
        with pytest.raises(LabError, match=r"has SHA-256 .*, not the pinned 120c4e2a.*; delete it"):
            make_server(builds["3.2.6"], builds, tmp_path)

    def test_names_the_missing_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        builds = load_builds()
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(LabError, match="missing gcc make autoconf; apt-get install gcc make autoconf"):
            make_server(builds["3.2.6"], builds, tmp_path)

    def test_an_unknown_name_is_a_usage_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["9.9.9"]) == 2
        assert capsys.readouterr().err == (
            'build.py: there is no build "9.9.9"; choose among 2.8.17, 2.8.17-patched, 2.8.17-lto, 3.2.6, 5.0.6, '
            "2.8.19, 4.0.9\n"
        )

    def test_the_lists_says_what_is_built(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STALLSCOPE_LAB", str(tmp_path))
        assert main(["--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines] == [[name, "-"] for name in load_builds()]


class TestServer:
    def test_serves_with_its_huge_pages_off_and_is_gone_afterwards(self) -> None:
        with running_server(built("2.8.17"), backlog=100) as server:
            assert server.version == (2, 8, 17)
            assert server.command("PING") == "PONG"
            assert "THP_enabled:\t0" in Path(f"/proc/{server.pid}/status").read_text()
            with ListenerQueue(server.port) as queue:
                assert queue.read() == (0, 100)
        assert not psutil.pid_exists(server.pid)
        assert not server.folder.exists()

    def test_a_stopped_server_can_be_stopped_for_good(self) -> None:
        with running_server(built("2.8.17")) as server:
            os.kill(server.pid, signal.SIGSTOP)
        assert not psutil.pid_exists(server.pid)

    def test_a_port_in_use_is_one_line(self) -> None:
        path = built("2.8.17")
        with (
            running_server(path) as server,
            pytest.raises(LabError, match=r"ended with status 1 at its start: .*already in use"),
            running_server(path, port=server.port),
        ):
            pass

    def test_what_is_not_built_names_the_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STALLSCOPE_LAB", str(tmp_path))
        with pytest.raises(LabError, match=r"run vagrant/lab/build.py 5.0.6$"):
            find_server("5.0.6")

    def test_a_backlog_beyond_the_kernels_is_refused(self) -> None:
        with (
            pytest.raises(LabError, match=r"sysctl -w net\.core\.somaxconn=1000000"),
            running_server(built("2.8.17"), backlog=1_000_000),
        ):
            pass


@pytest.fixture(scope="module")
def spare_bytes() -> dict[str, dict[str, int]]:
    """By build, then by client: the free bytes of its query buffer once the large one was trimmed."""
    paths = {name: built(name) for name in ("2.8.17", "2.8.17-patched")}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(running_server(path)) for name, path in paths.items()}
        for server in servers.values():
            for number in range(SMALL_CLIENTS):
                small = stack.enter_context(socket.create_connection((HOST, server.port)))
                small.sendall(b"CLIENT SETNAME small%d\r\n*2\r\n$4\r\nECHO\r\n$10000\r\n" % number)
                small.sendall(b"x" * 10_000 + b"\r\n")
            large = stack.enter_context(socket.create_connection((HOST, server.port)))
            large.sendall(b"CLIENT SETNAME large\r\n")
            assert large.recv(16) == b"+OK\r\n"
            large.sendall(b"*2\r\n$4\r\nECHO\r\n$300000\r\n" + b"x" * 180_000)
        for server in servers.values():
            until(partial(large_is_trimmed, server), "the large buffer is trimmed")
        return {name: read_spare_bytes(server) for name, server in servers.items()}


def large_is_trimmed(server: Server) -> bool:
    return read_spare_bytes(server)["large"] == 0


def read_spare_bytes(server: Server) -> dict[str, int]:
    found = re.findall(r" name=(\w+) .* qbuf-free=(\d+) ", server.command("CLIENT", "LIST"))
    return {name: int(spare) for name, spare in found}


class TestPatch:
    """The article's patch: small buffers stay, large ones are trimmed as ever."""

    def test_unpatched_trims_every_small_buffer(self, spare_bytes: dict[str, dict[str, int]]) -> None:
        assert set(spare_bytes["2.8.17"].values()) == {0}
        assert len(spare_bytes["2.8.17"]) == SMALL_CLIENTS + 1

    def test_patched_leaves_every_small_buffer(self, spare_bytes: dict[str, dict[str, int]]) -> None:
        small = [spare for name, spare in spare_bytes["2.8.17-patched"].items() if name != "large"]
        assert len(small) == SMALL_CLIENTS
        assert all(0 < spare <= 32 * 1024 for spare in small)


class TestListener:
    def test_sees_the_queue_and_counts_its_overflows(self) -> None:
        with ExitStack() as stack:
            listening = stack.enter_context(socket.create_server((HOST, 0), backlog=5))
            port = listening.getsockname()[1]
            overflows, drops = read_listen_counters()
            for _ in range(11):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex((HOST, port))
            with ListenerQueue(port) as queue:
                assert queue.read() == (6, 5)
            # Other tests and programs may count in this namespace, too: at least the five refused here.
            after = read_listen_counters()
            assert after[0] - overflows >= 5
            assert after[1] - drops >= 5

    def test_nothing_listens(self) -> None:
        with socket.socket() as bound:
            bound.bind((HOST, 0))
            with ListenerQueue(bound.getsockname()[1]) as queue:
                assert queue.read() is None


class TestBounds:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"duration_s": 121}, r"the duration of this load is 121; choose between 0 and 120 s"),
            ({"duration_s": float("nan")}, r"the duration of this load is nan"),
            ({"duration_s": 0}, r"a time is not above zero"),
            ({"idle": 20_000}, r"the clients held open of this load is 20000"),
            ({"rate_per_s": 20_001}, r"the rate of this load is 20001"),
            ({"rate_per_s": -1}, r"the rate of this load is -1"),
            ({"uploaders": -1}, r"negative"),
            ({"uploaders": 1_000, "announced_bytes": 500_000_000}, r"the memory of this load"),
            ({"attach_s": 60}, r"the time to attach of this load is 60"),
        ],
    )
    def test_refuses_what_is_out_of_bounds(self, change: dict[str, float], said: str) -> None:
        with pytest.raises(LabUsageError, match=said):
            check(replace(QUIET, **change), HOST)  # type: ignore[arg-type]

    @pytest.mark.parametrize("host", ["10.0.0.1", "0.0.0.0", "128.0.0.1", "localhost", "::1", "example.org"])
    def test_goes_to_loopback_only(self, host: str) -> None:
        done = run_file("load.py", "--port", "6379", "--host", host)
        assert done.returncode == 2
        assert done.stderr.startswith("load.py: the load goes to loopback only")

    def test_a_recipe_beyond_the_memory_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        meminfo = tmp_path / "meminfo"
        meminfo.write_text("MemTotal: 2000000 kB\nMemAvailable: 1000000 kB\n")
        monkeypatch.setattr("lab.recipes.MEMINFO", meminfo)
        check(RECIPES["quiet"], HOST)
        with pytest.raises(LabError, match=r"needs 1.6 GB of memory and 1.0 GB are free"):
            check(RECIPES["incident"], HOST)

    def test_all_recipes_are_within_the_bounds(self) -> None:
        for recipe in RECIPES.values():
            check(replace(recipe, uploaders=min(recipe.uploaders, 1)), HOST)


class TestRelease:
    """When the uploaders stop sending: opened at 100 s, on a server that comes round every 10 s."""

    RECIPE = Recipe(idle=6_000, uploaders=100, announced_bytes=25_000_000, attach_s=5)

    @pytest.mark.parametrize(("started_s", "visit_s"), [(104, 110), (105, 110), (106, 120), (131, 140)])
    def test_the_visit_that_is_caught_leaves_time_to_attach(self, started_s: float, visit_s: float) -> None:
        released_s = self.RECIPE.release_s(100, started_s, redis_major=2)
        assert released_s + 3.3 == pytest.approx(visit_s)

    def test_where_rounds_are_short_they_idle_once_the_recorder_could_attach(self) -> None:
        assert self.RECIPE.release_s(100, 104, redis_major=5) == 109
        assert replace(self.RECIPE, idle=500).release_s(100, 104, redis_major=2) == 109


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    with running_server(built("2.8.17")) as server:
        words = ("--recipe", "quiet", "--small-buffers", "50", "--duration", "2")
        done = run_file("load.py", "--port", str(server.port), *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1
    return Outcome.from_json(done.stdout)


class TestLoad:
    def test_every_attempt_is_accounted_for(self, outcome: Outcome) -> None:
        met = outcome.connections
        ends = (met.completed, met.connect_timeouts, met.reply_timeouts, met.unfinished)
        assert met.attempted == sum(ends) + sum(met.other_errors.values()) > 0
        assert met.completed > 0

    def test_says_what_it_held_and_saw(self, outcome: Outcome) -> None:
        assert outcome.recipe["name"] == "quiet"
        assert outcome.held.count == 150
        assert outcome.listener.backlog == 511
        assert outcome.listener.samples > 0
        assert outcome.ping.count > 0
        assert outcome.ping.p50_ms <= outcome.ping.p99_ms <= outcome.ping.max_ms == outcome.ping.worst[0][1]

    def test_survives_its_own_document(self, outcome: Outcome) -> None:
        assert Outcome.from_json(outcome.to_json()) == outcome

    def test_a_server_that_is_not_there_is_one_line(self) -> None:
        with socket.socket() as bound:
            bound.bind((HOST, 0))
            done = run_file("load.py", "--port", str(bound.getsockname()[1]))
        assert done.returncode == 4
        assert re.fullmatch(r"load.py: .*Connection refused.*\n", done.stderr)


@pytest.fixture(scope="module")
def broken() -> Outcome:
    outcome = incident.run(build=built("2.8.17")).outcome
    assert outcome is not None
    return outcome


@pytest.fixture(scope="module")
def fixed() -> Outcome:
    outcome = incident.run(build=built("5.0.6")).outcome
    assert outcome is not None
    return outcome


class TestIncident:
    def test_2_8_refuses_connections(self, broken: Outcome) -> None:
        assert broken.listener.overflows > 0
        assert broken.connections.connect_timeouts > 0
        assert broken.listener.max_queue == broken.listener.backlog + 1

    def test_5_0_does_the_same_work_without(self, broken: Outcome, fixed: Outcome) -> None:
        assert fixed.held.trimmed_s is not None
        assert fixed.ping.max_ms < broken.ping.max_ms
        assert fixed.listener.max_queue < broken.listener.max_queue
        assert fixed.connections.connect_timeouts < broken.connections.connect_timeouts

    def test_nothing_stalls_before_the_recorder_could_attach(self, broken: Outcome) -> None:
        sent_ns, _ = broken.ping.worst[0]
        trimmed_s = broken.held.trimmed_s
        assert trimmed_s is not None
        assert sent_ns - broken.started_ns >= RECIPES["incident"].attach_s * 1e9


class TestCommand:
    @pytest.fixture
    def left_over(self) -> Iterator[list[psutil.Process]]:
        """Processes that must all be gone at the end of the test."""
        processes: list[psutil.Process] = []
        yield processes
        _, alive = psutil.wait_procs(processes, timeout=DEADLINE_S)
        assert alive == []

    @staticmethod
    def words(*command: str) -> tuple[str, ...]:
        return ("--server", str(built("2.8.17")), "--recipe", "quiet", "--duration", "1", "--", *command)

    def test_gets_pid_and_port_and_gives_its_status(self, tmp_path: Path) -> None:
        document = tmp_path / "load.json"
        script = "readlink /proc/{pid}/exe; echo {port}; sleep 2; exit 3"
        done = run_file("incident.py", "--load-json", str(document), *self.words("sh", "-c", script))
        assert done.returncode == 3
        path, port = done.stdout.split()
        assert path == str(built("2.8.17"))
        assert int(port) == json.loads(document.read_text())["port"]
        assert re.fullmatch(r"clients: [\d,]+ of [\d,]+ connections answered, .* PING \d+ ms\n", done.stderr)

    def test_that_fails_early_ends_the_load(self) -> None:
        done = run_file("incident.py", *self.words("sh", "-c", "echo {pid}; exit 4"))
        assert done.returncode == 4
        assert done.stderr == "incident.py: sh failed early: the load was cut short\n"
        assert not psutil.pid_exists(int(done.stdout))

    def test_begins_the_load_when_the_command_has_said_so(self, tmp_path: Path) -> None:
        document = tmp_path / "load.json"
        script = "import sys, time; time.sleep(1); print(time.monotonic_ns()); print('I am ready', file=sys.stderr)"
        words = self.words(sys.executable, "-c", script)
        done = run_file("incident.py", "--wait-for", "am ready", "--load-json", str(document), *words)
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("I am ready\nclients: ")
        assert Outcome.from_json(document.read_text()).started_ns > int(done.stdout)

    def test_that_fails_before_it_is_ready_ends_the_load(self) -> None:
        done = run_file("incident.py", "--wait-for", "ready", *self.words("sh", "-c", "echo no >&2; exit 4"))
        assert (done.returncode, done.stderr) == (4, "no\nincident.py: sh failed early: the load was cut short\n")

    def test_is_interrupted_before_the_clients_leave(self, tmp_path: Path) -> None:
        document = tmp_path / "load.json"
        script = """
import re, signal, socket
signal.signal(signal.SIGINT, lambda *_: None)
signal.pause()
with socket.create_connection(("127.0.0.1", {port})) as server:
    server.sendall(b"INFO clients\\r\\n")
    print(re.search(rb"connected_clients:(\\d+)", server.recv(65536))[1].decode())
"""
        words = self.words(sys.executable, "-c", script)
        done = run_file("incident.py", "--interrupt", "--load-json", str(document), *words)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) > QUIET.idle
        assert Outcome.from_json(document.read_text()).held.count == QUIET.idle

    def test_that_does_not_exist_is_a_usage_error(self) -> None:
        done = run_file("incident.py", *self.words("/no/such/recorder"))
        assert done.returncode == 2
        assert done.stderr.startswith("incident.py: cannot run /no/such/recorder: No such file or directory; ")

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
    def test_everything_is_stopped_when_the_runner_is(
        self, number: signal.Signals, status: int, left_over: list[psutil.Process], tmp_path: Path
    ) -> None:
        # exec: the command itself must go when asked. After SIGKILL nobody can ask it: it sees its stdin end.
        command = self.words("sh", "-c", "echo started; exec cat")
        with subprocess.Popen(
            [sys.executable, str(LAB / "incident.py"), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            start_new_session=True,
        ) as runner:
            assert runner.stdout is not None
            assert runner.stdout.readline() == b"started\n"
            family = psutil.Process(runner.pid)
            until(lambda: any(one.name() == "cat" for one in family.children()), "sh becomes cat")
            left_over += family.children(recursive=True)
            assert {"redis-server", "cat"} <= {process.name() for process in left_over}
            if number == signal.SIGINT:
                os.killpg(runner.pid, number)
            else:
                runner.send_signal(number)
            assert runner.wait(DEADLINE_S) == status


class TestPrepared:
    def test_waits_until_it_is_started(self) -> None:
        with running_server(built("2.8.17")) as server, incident.prepared_load(server, QUIET) as load:
            assert load.running
            assert int(re.findall(r"connected_clients:(\d+)", server.command("INFO"))[0]) > QUIET.idle
            load.start()
            assert load.outcome().held.count == QUIET.idle

    def test_a_server_that_dies_is_one_line(self) -> None:
        with running_server(built("2.8.17")) as server, incident.prepared_load(server, QUIET) as load:
            os.kill(server.pid, signal.SIGKILL)
            load.start()
            with pytest.raises(LabError, match="the load failed: "):
                load.outcome()
