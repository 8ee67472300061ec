"""``stallscope top`` on real servers: the screen, its keys, its captures, and its lines of JSON."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab.server import HOST, Server, running_server
from screen import Screen, on_screen
from tracing import STALLSCOPE, Nesting, Rows, build_nesting, built, require_tracing, running_nesting, until

from stallscope.tracer.recording import read_recording

DEBUG_S = 0.6
NO_PID = 2**22 + 1
ALTERNATE_SCREEN_ON, ALTERNATE_SCREEN_OFF = b"\x1b[?1049h", b"\x1b[?1049l"
CURSOR_OFF, CURSOR_ON = b"\x1b[?25l", b"\x1b[?25h"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    built("2.8.17")
    with running_server("2.8.17") as running:
        yield running


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nesting]:
    require_tracing()
    with running_nesting(build_nesting(tmp_path_factory.mktemp("nesting"))) as running:
        yield running


@contextmanager
def top(server: Server, *words: object, **options: Any) -> Iterator[Screen]:
    """Run it on a terminal and yield once it has drawn."""
    probes = ("--probe", "debugCommand", "--probe", "keysCommand")
    with on_screen([STALLSCOPE, "top", "-p", str(server.pid), *probes, *map(str, words)], **options) as screen:
        screen.wait_for("iterations/s")
        yield screen


@contextmanager
def asked(server: Server, *words: str) -> Iterator[None]:
    """Have a client wait for the answer to a command meanwhile."""
    thread = threading.Thread(target=server.command, args=words)
    thread.start()
    try:
        yield
    finally:
        thread.join()


class TestScreen:
    def test_a_stall_is_seen_while_it_lasts_and_named_afterwards(self, server: Server) -> None:
        with top(server) as screen:
            assert f"pid {server.pid}" in screen.line("stallscope top", "redis 2.8.17")
            assert "0/511" in screen.line("queue", f"{HOST}:{server.port}")
            with asked(server, "DEBUG", "SLEEP", "3"):
                assert "in debugCommand" in screen.wait_for("BLOCKED for")
            line = screen.wait_for("debugCommand", "x1", "self")
            assert "3.0" in line
            screen.wait_for("not blocked")
            screen.press("q")
            assert screen.ended() == 0
            assert "q was pressed" in screen.line("watched for")

    def test_keys_over_many_keys_is_named(self, server: Server) -> None:
        with socket.create_connection((HOST, server.port)) as client:
            client.sendall(b"".join(b"SET key:%d value\r\n" % number for number in range(50_021)))
            until(lambda: server.command("DBSIZE") == "50021", "every key is set")
        with top(server, "--stall", "1ms") as screen:
            with socket.create_connection((HOST, server.port)) as client:
                client.sendall(b"KEYS *\r\n")
                assert client.recv(16).startswith(b"*50021\r\n")
                assert "x1" in screen.wait_for("keysCommand", "self")
            screen.press("q")
            assert screen.ended() == 0

    def test_keys_sort_and_pause(self, server: Server) -> None:
        with top(server) as screen:
            for order in ("p99", "max", "total", "rate"):
                screen.press("s")
                screen.wait_for(f"sort: {order}")
            screen.press("p")
            standing = screen.wait_for("PAUSED")
            screen.wait_for("resume")
            # what is pressed draws anew, and the view stands still
            with asked(server, "DEBUG", "SLEEP", str(DEBUG_S)):
                pass
            screen.press("s")
            screen.wait_for("sort: p99")
            assert screen.line("PAUSED") == standing
            assert not screen.line("debugCommand", "self")
            screen.press("\x1b[A")  # an arrow is none of our keys
            screen.press(" ")
            screen.wait_for("debugCommand", "self")
            assert not screen.line("PAUSED")
            screen.press("q")
            assert screen.ended() == 0

    def test_a_resized_terminal_is_filled(self, server: Server) -> None:
        with top(server, width=120, height=40) as screen:
            screen.wait_for("p50")
            for width, height in ((60, 15), (80, 24)):
                screen.resize(width, height)
                os.kill(screen.process.pid, signal.SIGWINCH)

                def is_filled(height: int = height) -> bool:
                    lines = screen.lines()
                    return lines[0].startswith("stallscope top") and "quit" in lines[height - 1]

                until(is_filled, "the first line and the keys are where they belong")
            screen.press("q")
            assert screen.ended() == 0

    @pytest.mark.parametrize("end", ["q", signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_the_terminal_is_as_it_was(self, server: Server, end: str | signal.Signals) -> None:
        with on_screen([STALLSCOPE, "top", "-p", str(server.pid)]) as screen:
            before = screen.modes()
            screen.wait_for("iterations/s")
            assert screen.modes() != before
            if isinstance(end, str):
                screen.press(end)
            else:
                screen.process.send_signal(end)
            assert screen.ended() == 0
            assert screen.modes() == before
        for on, off in ((ALTERNATE_SCREEN_ON, ALTERNATE_SCREEN_OFF), (CURSOR_OFF, CURSOR_ON)):
            assert screen.written.count(on) == screen.written.count(off) == 1
            assert screen.written.index(on) < screen.written.index(off)
        assert "Traceback" not in screen.written.decode()

    def test_ctrl_z_gives_the_terminal_back_and_fg_goes_on(self, server: Server) -> None:
        line = f"'{STALLSCOPE}' top -p {server.pid}; echo STOPPED; read -r; fg; echo BACK $?"
        with on_screen(["bash", "-m", "-c", line]) as screen:
            before = screen.modes()
            screen.wait_for("iterations/s")
            taken = screen.modes()
            assert taken != before
            screen.press("\x1a")
            screen.wait_for("STOPPED")
            assert screen.modes() == before
            screen.press("\n")
            until(lambda: screen.modes() == taken, "it reads keys again")
            screen.press("s")
            screen.wait_for("sort: p99")
            screen.press("q")
            screen.wait_for("BACK 0")
            assert screen.ended() == 0
            assert screen.modes() == before

    def test_without_colour_and_without_utf_8(self, server: Server) -> None:
        environment = {"NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}
        with top(server, environment=environment) as screen:
            screen.press("q")
            assert screen.ended() == 0
        assert screen.written.isascii()
        assert b"\x1b[3" not in screen.written.replace(b"\x1b[3;1H", b"")

    def test_a_server_that_ends_ends_it(self) -> None:
        with running_server("2.8.17") as short_lived, top(short_lived) as screen:
            os.kill(short_lived.pid, signal.SIGKILL)
            assert screen.ended() == 0
            assert "the traced process ended" in screen.line("watched for")


class TestCapture:
    def test_is_a_recording_whose_rows_and_counters_agree(self, server: Server, tmp_path: Path) -> None:
        with top(server, "-o", tmp_path, "--capture", "1h") as screen:
            screen.press("c")
            screen.wait_for("capturing: 0 of 3600 s")
            assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
            with asked(server, "DEBUG", "SLEEP", str(DEBUG_S)):
                pass
            with socket.create_connection((HOST, server.port)) as client:
                for _ in range(13):
                    client.sendall(b"KEYS none\r\n")
                    assert client.recv(16) == b"*0\r\n"
            screen.wait_for("debugCommand", "self")
            screen.press("c")
            screen.wait_for("captured")
            screen.press("q")
            assert screen.ended() == 0
        (path,) = tmp_path.iterdir()
        rows = Rows(read_recording(path))
        assert rows.recording.complete
        assert rows.manifest.ended_by == "it was ended by key"
        assert len(rows.of("debugCommand")) == 1
        assert len(rows.of("keysCommand")) == rows.counters("keysCommand").hits == 13
        (stall,) = [row for row in rows.of("event loop iteration").itertuples() if row.duration_ns >= DEBUG_S * 1e9]
        assert stall.start_ns >= rows.manifest.started_ns
        assert_agrees(rows)
        (listener,) = rows.manifest.listeners
        assert rows.of("accept queue")["start_ns"].min() == rows.manifest.started_ns
        assert listener.port == server.port
        done = subprocess.run([STALLSCOPE, "summary", path, "--json"], capture_output=True, text=True, check=True)
        summary = json.loads(done.stdout)
        assert summary["complete"]
        assert {item["name"]: item["calls"] for item in summary["functions"]}["keysCommand"] == 13
        assert summary["stalls"][0]["blamed"][-1] == "debugCommand"

    def test_that_begins_within_a_call_counts_what_began_in_it(self, server: Server, tmp_path: Path) -> None:
        with top(server, "-o", tmp_path, "--capture", "1s") as screen:
            with asked(server, "DEBUG", "SLEEP", "3"):
                screen.wait_for("BLOCKED for", "debugCommand")
                screen.press("c")
                screen.wait_for("capturing")
            screen.wait_for("captured")
            with asked(server, "DEBUG", "SLEEP", "3"):
                screen.press("c")
                screen.wait_for("capturing")
                screen.press("q")
                assert screen.ended() == 0
        within, ended = (Rows(read_recording(path)) for path in sorted(tmp_path.iterdir()))
        assert (within.manifest.ended_by, ended.manifest.ended_by) == ("the duration was over", "q was pressed")
        for rows in (within, ended):
            assert rows.recording.complete
            assert (rows.all["start_ns"] >= rows.manifest.started_ns).all()
            assert_agrees(rows)
        assert within.counters("debugCommand").hits == 0

    def test_ends_with_the_terminal(self, server: Server, tmp_path: Path) -> None:
        with top(server, "-o", tmp_path) as screen:
            screen.press("c")
            screen.wait_for("capturing")
            screen.process.send_signal(signal.SIGHUP)
            assert screen.ended() == 0
        (path,) = tmp_path.iterdir()
        recording = read_recording(path)
        assert (recording.complete, recording.manifest.ended_by) == (True, "SIGHUP")

    def test_where_nothing_can_be_written_is_told_and_tracing_goes_on(self, server: Server, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        with top(server, "-o", folder) as screen:
            folder.rmdir()
            screen.press("c")
            screen.wait_for("cannot write")
            screen.press("s")
            screen.wait_for("sort: p99")
            screen.press("q")
            assert screen.ended() == 0


def assert_agrees(rows: Rows) -> None:
    """The sums that hold in every recording: what was counted is what is in it."""
    assert rows.recording.counters is not None
    for probe, counter in rows.recording.counters.by_probe.items():
        mine = rows.all[rows.all["probe"] == probe]
        assert mine["is_finished"].sum() == counter.sent
        assert counter.lost == counter.lost_starts == counter.abandoned == 0
        under_way = (~mine["is_finished"]).sum()
        if rows.manifest.probe(probe).kind == "call":  # type: ignore[union-attr]
            assert counter.hits == counter.sent + counter.short_calls + under_way
        else:
            assert counter.hits == counter.sent + counter.short_calls


class TestJson:
    def test_counts_are_the_calls_that_were_made(self, program: Nesting) -> None:
        """A prime number of calls, the first while it attaches nothing yet: intervals and totals agree with it."""
        words = ["-p", program.pid, "--no-default-probes", "--probe", "leaf"]
        with started(*words) as process:
            first = json.loads(next(process.stdout))  # type: ignore[call-overload]
            program.run("leaf 5003")
            process.send_signal(signal.SIGTERM)
            records = [first, *map(json.loads, process.stdout or ())]
            assert process.wait() == 0
        leaf = [record["functions"][0] for record in records]
        assert (leaf[-1]["name"], leaf[-1]["calls"], leaf[-1]["lost"]) == ("leaf", 5003, 0)
        assert sum(item["calls_in_interval"] for item in leaf) == 5003
        assert [record["interval_ns"] > 0 for record in records] == [True] * len(records)
        assert sum(record["interval_ns"] for record in records) == records[-1]["elapsed_ns"]

    def test_calls_that_were_only_counted_count(self, program: Nesting) -> None:
        words = ["-p", program.pid, "--no-default-probes", "--probe", "leaf", "--min-duration", "10s"]
        with started(*words) as process:
            next(process.stdout)  # type: ignore[call-overload]
            program.run("leaf 61")
            process.send_signal(signal.SIGINT)
            last = list(process.stdout or ())[-1]
            assert process.wait() == 0
        (leaf,) = json.loads(last)["functions"]
        assert (leaf["calls"], leaf["p50_ns"], leaf["max_ns"]) == (61, None, None)
        assert leaf["total_ns"] > 0

    def test_a_stall_is_in_exactly_one_record(self, server: Server) -> None:
        words = ["-p", server.pid, "--probe", "debugCommand"]
        with started(*words) as process:
            lines = [next(process.stdout)]  # type: ignore[call-overload]
            server.command("DEBUG", "SLEEP", str(DEBUG_S))
            while 'debugCommand","path' not in lines[-1]:
                lines.append(next(process.stdout))  # type: ignore[call-overload]
            process.send_signal(signal.SIGTERM)
            lines += process.stdout or ()
            assert process.wait() == 0
        stalls = [stall for line in lines for stall in json.loads(line)["stalls"] if stall["cause"] == "debugCommand"]
        assert [(stall["path"], stall["cause_calls"]) for stall in stalls] == [(["debugCommand"], 1)]
        assert stalls[0]["duration_ns"] >= DEBUG_S * 1e9
        assert json.loads(lines[-1])["loop"]["stalls"] >= 1

    def test_the_duration_ends_it(self, server: Server) -> None:
        done = subprocess.run(
            [STALLSCOPE, "top", "-p", str(server.pid), "--json", "-d", "100ms"], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert len(list(map(json.loads, done.stdout.splitlines()))) == 1

    def test_nobody_who_reads_ends_it(self, server: Server) -> None:
        line = f"'{STALLSCOPE}' top -p {server.pid} --json; echo $? >&2"
        done = subprocess.run(["bash", "-c", f"({line}) | head -1"], capture_output=True, text=True)
        assert json.loads(done.stdout)["version"] == 1
        assert done.stderr == "0\n"


@contextmanager
def started(*words: object) -> Iterator[subprocess.Popen[str]]:
    """Run ``top --json`` and yield its process; its first line says that everything is attached."""
    with subprocess.Popen(
        [STALLSCOPE, "top", "--json", *map(str, words)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


class TestErrors:
    @pytest.mark.parametrize("words", [["-p", str(NO_PID)], ["-p", "1", "--sort", "p99"]])
    def test_no_terminal_names_json(self, words: list[str]) -> None:
        done = subprocess.run([STALLSCOPE, "top", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "stallscope: stdin is not a terminal; use --json for one record a second\n"

    def test_no_such_process(self) -> None:
        require_tracing()
        with on_screen([STALLSCOPE, "top", "-p", str(NO_PID)]) as screen:
            before = screen.modes()
            assert screen.ended() == 4
            assert screen.line(f"stallscope: there is no process {NO_PID}")
            assert screen.modes() == before
            assert ALTERNATE_SCREEN_ON not in screen.written

    def test_no_such_folder(self, server: Server, tmp_path: Path) -> None:
        words = [STALLSCOPE, "top", "-p", str(server.pid), "--json", "-o", str(tmp_path / "none")]
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert "none is no folder; make it or choose another" in done.stderr

    def test_not_root(self, server: Server) -> None:
        words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        done = subprocess.run(
            [*words, STALLSCOPE, "top", "--json", "-p", str(server.pid)], capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (4, "")
        assert done.stderr.startswith("stallscope: permission: uid 65534 without CAP_")
