"""Bad surroundings: one line on stderr that names the remedy, the right exit code, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from lab import LabError
from lab.server import HOST, find_server, running_server
from tracing import STALLSCOPE, Nesting, build_nesting, recording, require_tracing, running_nesting

from stallscope.tracer.recording import read_recording

NO_PID = 2**22 + 1
"""Above the highest PID_MAX_LIMIT: Linux include/linux/threads.h."""

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def stallscope(*words: object, prefix: Sequence[str] = (), **options: object) -> subprocess.CompletedProcess[str]:
    command = [*prefix, STALLSCOPE, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]


def assert_one_line(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("stallscope: ")
    for part in parts:
        assert part in line


@pytest.fixture(scope="module", autouse=True)
def _commands() -> None:
    if shutil.which("setpriv") is None or shutil.which("unshare") is None:
        pytest.skip("requires setpriv and unshare: apt-get install util-linux")


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_tracing()
    return build_nesting(tmp_path_factory.mktemp("nesting"))


@pytest.fixture(scope="module")
def program(binary: Path) -> Iterator[Nesting]:
    with running_nesting(binary) as running:
        yield running


@pytest.fixture
def words(program: Nesting, tmp_path: Path) -> list[str]:
    """What records the program well; a test adds what is wrong with it."""
    probe = ["--no-default-probes", "--probe", "leaf", "-d", "1s"]
    return ["record", "-p", str(program.pid), *probe, "-o", str(tmp_path / "one.stall")]


@pytest.fixture(scope="module")
def redis() -> Path:
    try:
        return find_server("2.8.17")
    except LabError as error:
        pytest.skip(str(error))


class TestMachine:
    def test_not_root(self, words: list[str]) -> None:
        done = stallscope(*words[:-1], "/dev/null", "--force", prefix=NOBODY)
        assert_one_line(done, 4, "uid 65534 without CAP_BPF, CAP_PERFMON", "run it with sudo")

    def test_no_bcc(self, words: list[str], tmp_path: Path) -> None:
        """The distribution's bcc is covered by an empty folder, in a mount namespace of this command alone."""
        places = [
            *Path("/usr/lib").glob("python3*/dist-packages/bcc"),
            *Path("/usr").glob("l*/python3*/site-packages/bcc"),
        ]
        script = "".join(f"mount -t tmpfs none {place} && " for place in places)
        prefix = ["unshare", "--mount", "sh", "-c", f'{script}exec "$@"', "sh"]
        assert_one_line(stallscope(*words, prefix=prefix), 4, "bcc is not installed", "apt-get install python3-bpfcc")
        assert not (tmp_path / "one.stall").exists()

    def test_a_disk_without_room(self, words: list[str]) -> None:
        words = [*words[:-1], "/dev/full", "--force", "-q"]
        assert_one_line(stallscope(*words), 1, "cannot write /dev/full: No space left on device")

    def test_a_disk_that_fills_up_leaves_what_was_recorded(self, program: Nesting, tmp_path: Path) -> None:
        """The recorder's output is a file system of 4 MB that nobody else sees."""
        folder = tmp_path / "small"
        folder.mkdir()
        script = f'mount -t tmpfs -o size=4m none {folder} && exec "$@"'
        prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
        options = ("-p", str(program.pid), "--no-default-probes", "--probe", "flooded", "-q")
        with subprocess.Popen(
            [*prefix, STALLSCOPE, "record", *options, "-o", str(folder / "full.stall")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as recorder:  # fmt: skip
            # record is silent: its file, seen through its own root, tells that it began
            inside = Path(f"/proc/{recorder.pid}/root{folder}/full.stall")
            while recorder.poll() is None and not inside.exists():
                pass
            kept = os.open(inside, os.O_RDONLY)
            while recorder.poll() is None:
                program.run("flood 5003")
            assert recorder.stderr is not None
            said = recorder.stderr.read()
        copy = tmp_path / "copy.stall"
        with os.fdopen(kept, "rb") as file:
            copy.write_bytes(file.read())
        assert recorder.returncode == 1
        assert said.startswith(f"stallscope: cannot write {folder}/full.stall: No space left on device; ")
        assert len(said.splitlines()) == 1
        found = read_recording(copy)
        assert found.table.num_rows > 0
        assert not found.complete


class TestTarget:
    def test_nothing_named(self) -> None:
        assert_one_line(stallscope("record"), 2, "nothing to record", "--port PORT or -p PID")

    @pytest.mark.parametrize("command", ["record", "probes", "doctor"])
    def test_no_such_process(self, command: str, tmp_path: Path) -> None:
        require_tracing()
        output = ["-o", tmp_path / "one.stall"] if command == "record" else []
        done = stallscope(command, "-p", NO_PID, *output)
        assert_one_line(done, 4, f"there is no process {NO_PID}", "pgrep -a redis-server")

    def test_a_thread(self, redis: Path, tmp_path: Path) -> None:
        with running_server("2.8.17") as server:
            thread = max(int(name) for name in os.listdir(f"/proc/{server.pid}/task"))
            assert thread != server.pid
            done = stallscope("record", "-p", thread, "-o", tmp_path / "one.stall")
        assert_one_line(done, 4, f"{thread} is a thread of process {server.pid}; give -p {server.pid}")

    def test_no_redis(self, program: Nesting, tmp_path: Path) -> None:
        done = stallscope("record", "-p", program.pid, "-o", tmp_path / "one.stall")
        assert_one_line(done, 4, f"process {program.pid} (nesting) is not a Redis", "--no-default-probes --probe FUNC")

    def test_a_kernel_thread(self, tmp_path: Path) -> None:
        require_tracing()
        if Path("/proc/2/comm").read_text() != "kthreadd\n":
            pytest.skip("requires the initial pid namespace: run on the host")
        done = stallscope("record", "-p", 2, "-o", tmp_path / "one.stall")
        assert_one_line(done, 4, "process 2 (kthreadd)", "kernel thread")

    def test_a_port_nobody_listens_on(self, tmp_path: Path) -> None:
        require_tracing()
        with socket.socket() as bound:
            bound.bind((HOST, 0))
            port = bound.getsockname()[1]
            done = stallscope("record", "--port", port, "-o", tmp_path / "one.stall")
        assert_one_line(done, 4, f"no Redis or Valkey server listens on port {port}; ")

    def test_a_function_that_is_not_there(self, words: list[str]) -> None:
        words[words.index("leaf")] = "no_such_function"
        assert_one_line(stallscope(*words), 4, 'no symbol "no_such_function"')

    def test_a_library_that_is_not_there(self, words: list[str]) -> None:
        words[words.index("leaf")] = "libnone:leaf"
        assert_one_line(stallscope(*words), 4, 'no library "libnone"', "libc.so.6")

    def test_stripped_with_nothing_to_probe(self, binary: Path, words: list[str], tmp_path: Path) -> None:
        if shutil.which("strip") is None:
            pytest.skip("requires strip: apt-get install binutils")
        stripped = tmp_path / "stripped"
        subprocess.run(["strip", "--strip-all", "-o", str(stripped), str(binary)], check=True)
        with running_nesting(stripped) as program:
            words[words.index("-p") + 1] = str(program.pid)
            assert_one_line(stallscope(*words), 4, 'no symbol "leaf"', "(stripped); install its debug symbols")

    def test_gone_meanwhile(self, binary: Path, words: list[str]) -> None:
        with running_nesting(binary) as short_lived:
            words[words.index("-p") + 1] = str(short_lived.pid)
        assert_one_line(stallscope(*words), 4, f"there is no process {short_lived.pid}")


class TestOutput:
    def test_exists(self, words: list[str], tmp_path: Path) -> None:
        (tmp_path / "one.stall").write_text("precious")
        assert_one_line(stallscope(*words), 2, "one.stall exists", "--force")
        assert (tmp_path / "one.stall").read_text() == "precious"

    def test_is_overwritten_by_force(self, words: list[str], tmp_path: Path) -> None:
        (tmp_path / "one.stall").write_text("not so precious")
        words[words.index("1s")] = "100ms"
        done = stallscope(*words, "--force")
        assert (done.returncode, done.stdout) == (0, "")
        assert json.loads(stallscope("summary", tmp_path / "one.stall", "--json").stdout)

    def test_has_no_folder(self, words: list[str], tmp_path: Path) -> None:
        words[-1] = str(tmp_path / "none" / "one.stall")
        assert_one_line(stallscope(*words), 2, f"there is no folder {tmp_path / 'none'}")

    @pytest.mark.parametrize("command", ["record", "summary", "probes"])
    def test_is_in_a_folder_that_may_not_be_entered(self, program: Nesting, tmp_path: Path, command: str) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o700)
        path = closed / "one.stall"
        words = {"record": ("-p", program.pid, "-o", path), "summary": (path,), "probes": ("--binary", path)}
        done = stallscope(command, *words[command], prefix=NOBODY)
        assert_one_line(done, 4 if command == "probes" else 2, str(path))

    def test_is_not_made_when_nothing_can_be_traced(self, tmp_path: Path) -> None:
        stallscope("record", "-p", NO_PID, "-o", tmp_path / "one.stall")
        assert list(tmp_path.iterdir()) == []


class TestInterrupted:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_before_everything_is_attached_leaves_no_child(self, words: list[str], number: signal.Signals) -> None:
        with subprocess.Popen([STALLSCOPE, *words], stderr=subprocess.PIPE, text=True) as process:
            family = psutil.Process(process.pid)
            children: list[psutil.Process] = []
            while not children:
                assert process.poll() is None
                children = family.children()
            process.send_signal(number)
            assert process.stderr is not None
            said = process.stderr.read()
        assert "Traceback" not in said
        if number == signal.SIGINT:
            assert (process.returncode, said.strip()) == (130, "stallscope: interrupted")
        _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []

    def test_by_a_pipe_that_nobody_reads(self, binary: Path) -> None:
        done = subprocess.run(
            ["sh", "-c", f"'{STALLSCOPE}' doctor --json | true; '{STALLSCOPE}' probes --binary {binary} | head -1"],
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""


class TestJson:
    def test_probes(self, binary: Path) -> None:
        assert json.loads(stallscope("probes", "--binary", binary, "--probe", "leaf", "--json").stdout)

    def test_doctor(self, program: Nesting) -> None:
        done = stallscope("doctor", "--json")
        assert json.loads(done.stdout)
        assert (done.returncode, done.stderr) == (0, "")

    def test_summary_of_a_recording_cut_short(self, program: Nesting, tmp_path: Path) -> None:
        path = tmp_path / "cut.stall"
        with recording(path, "-p", str(program.pid), "--no-default-probes", "--probe", "leaf") as recorder:
            program.run("leaf 61")
            recorder.wait_until_it_has(61, "leaf")
            recorder.stop(signal.SIGKILL)
        done = stallscope("summary", path, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)
        assert "cut short" in stallscope("summary", path).stdout
