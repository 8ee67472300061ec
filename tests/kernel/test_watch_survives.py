"""What ``stallscope watch`` outlives: kill -9, a full disk, servers that come and go, a new configuration."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab.server import Server, running_server
from tracing import Rows, built, until
from watch_process import Watch, iterations, watching

from stallscope.tracer.recording import read_recording

MS = 1_000_000
QUICK = ("--before", "1s", "--after", "500ms", "--cooldown", "0", "--max-overhead", "100%")
STALLS = (*QUICK, "--trigger", "stall>50ms")


def stall(server: Server, seconds: str = "0.2") -> None:
    server.command("DEBUG", "SLEEP", seconds)


def stalls_of(rows: Rows, server: Server) -> list[tuple[int, int]]:
    """Return the stalls of one server."""
    rows.all = rows.all[rows.all["pid"] == server.pid]
    return iterations(rows, 190 * MS)


class TestCooldown:
    def test_triggers_are_counted_and_told_of_in_the_next_capture(self, tmp_path: Path) -> None:
        words = ("--trigger", "stall>50ms", "--before", "1s", "--after", "500ms", "--cooldown", "6s")
        with running_server(built("2.8.17")) as server, watching(tmp_path, "-p", str(server.pid), *words) as watch:
            stall(server)
            watch.capture(0)
            stall(server)
            watch.wait_until_it_says("(in the cool-down)")
            until(lambda: _stalls_until_captured(server, watch), "the cool-down is over")
            rows = watch.capture(1)
            suppressed = watch.said.count("(in the cool-down)")
            assert any(
                f"{suppressed} trigger" in note.text and "cool-down" in note.text for note in rows.manifest.notes
            )
            assert watch.stop() == 0
            assert f"({suppressed} in cool-downs), 2 captures" in watch.said


def _stalls_until_captured(server: Server, watch: Watch) -> bool:
    told = len(watch.triggered())
    stall(server)
    watch.wait_until_it_says("trigger: ", times=told + 1)
    return "(in the cool-down)" not in watch.triggered()[-1]


class TestKilled:
    def test_what_was_written_is_kept_by_the_next_watch(self, tmp_path: Path) -> None:
        with running_server(built("2.8.17")) as server:
            words = ("-p", str(server.pid), "--trigger", "stall>50ms", "--before", "1s", "--after", "1m")
            with watching(tmp_path, *words) as watch:
                stall(server)
                watch.wait_until_it_says("trigger: stall>50ms")
                until(lambda: bool(_parts(tmp_path)) and _crons_in(_parts(tmp_path)[0]) >= 10, "it is being written")
                assert watch.stop(signal.SIGKILL) == -signal.SIGKILL
            assert not list(tmp_path.glob("capture-*")), "nothing has a final name"
            assert server.command("PING") == "PONG"
            with watching(tmp_path, "-p", str(server.pid), *STALLS) as watch:
                watch.wait_until_it_says("was cut short and is kept so")
                (left,) = tmp_path.glob("capture-*.cut-short.stall")
                rows = Rows(read_recording(left))
                assert not rows.recording.complete
                assert len(iterations(rows, 150 * MS)) >= 1
                assert {trigger.text for trigger in rows.manifest.triggers} == {"stall>50ms"}
                stall(server)
                assert watch.capture(0).recording.complete


def _parts(folder: Path) -> list[Path]:
    return list(folder.glob(".capture-*.part"))


def _crons_in(path: Path) -> int:
    return len(Rows(read_recording(path)).of("serverCron"))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a disk of 1 MB; yields it."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"requires mount: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class TestFullDisk:
    def test_it_keeps_watching_and_says_so(self, tmp_path: Path) -> None:
        with (
            running_server(built("2.8.17")) as server,
            small_disk(tmp_path / "disk") as disk,
            watching(disk, "-p", str(server.pid), *STALLS) as watch,
        ):
            (disk / "filler").write_bytes(bytes(_free_bytes(disk)))
            stall(server)
            watch.wait_until_it_says("a capture is not complete")
            assert "No space left on device" in watch.said
            (disk / "filler").unlink()
            told = len(watch.triggered())
            stall(server)
            watch.wait_until_it_says("trigger: ", times=told + 1)
            rows = watch.capture(0)
            assert rows.recording.complete
            assert watch.stop() == 0
            assert re.search(r", [1-9]\d* incomplete", watch.said)


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


class TestDiskBound:
    def test_the_oldest_go_first(self, tmp_path: Path) -> None:
        words = (*STALLS, "--max-captures", "2")
        with running_server(built("2.8.17")) as server, watching(tmp_path, "-p", str(server.pid), *words) as watch:
            for number in range(3):
                stall(server)
                watch.capture(number)
            kept = sorted(tmp_path.glob("*.stall"))
            assert kept == watch.captured()[1:]
            assert all(read_recording(path).complete for path in kept)


class TestServers:
    @pytest.mark.parametrize("successor", ["2.8.17", "5.0.6"])
    def test_a_successor_is_watched(self, tmp_path: Path, successor: str) -> None:
        built(successor)
        with running_server(built("2.8.17")) as first:
            watch_context = watching(tmp_path, "-p", str(first.pid), *STALLS)
            watch = watch_context.__enter__()
        try:
            watch.wait_until_it_says(f"process {first.pid} ({first.path.resolve()}) ended or was replaced")
            with running_server(successor, port=first.port) as second:
                watch.wait_until_it_says(f"process {second.pid} ({second.path.resolve()}, port {first.port}) is traced")
                stall(second, "0.5")
                rows = watch.capture(0)
                assert {target.pid: target.version for target in rows.manifest.targets}[second.pid] == successor
                assert len(stalls_of(rows, second)) == 1
        finally:
            watch_context.__exit__(None, None, None)

    def test_a_port_may_be_served_later(self, tmp_path: Path) -> None:
        with running_server(built("2.8.17")) as before:
            port = before.port
        with watching(tmp_path, "--port", str(port), *STALLS) as watch:
            watch.wait_until_it_says(f"no Redis or Valkey server listens on port {port} yet")
            with running_server("2.8.17", port=port) as server:
                watch.wait_until_it_says(f"process {server.pid} ")
                stall(server, "0.5")
                assert len(stalls_of(watch.capture(0), server)) == 1

    def test_all_there_are_and_will_be(self, tmp_path: Path) -> None:
        with running_server(built("2.8.17")) as first, watching(tmp_path, "--all-redis", *STALLS) as watch:
            watch.wait_until_it_says(f"process {first.pid} ")
            with running_server("3.2.6") as second:
                watch.wait_until_it_says(f"process {second.pid} ")
                stall(second, "0.5")
                until(
                    lambda: any(f"process {second.pid}" in line for line in watch.triggered()), "its stall is told of"
                )


class TestReload:
    def test_sighup_reads_the_file_again(self, tmp_path: Path) -> None:
        config = tmp_path / "watch.toml"
        config.write_text('trigger = ["stall>10s"]\nbefore = "1s"\nafter = "500ms"\ncooldown = "0"\n')
        with (
            running_server(built("2.8.17")) as server,
            watching(tmp_path / "captures", "--config", str(config), "-p", str(server.pid)) as watch,
        ):
            config.write_text("nonsense")
            watch.process.send_signal(signal.SIGHUP)
            watch.wait_until_it_says("SIGHUP: nothing was changed")
            config.write_text('trigger = ["stall>10s", "overflow>0"]\nafter = "1s"\nbefore = "1s"\ncooldown = "0"\n')
            watch.process.send_signal(signal.SIGHUP)
            watch.wait_until_it_says("SIGHUP: changed: trigger, after")
            assert watch.stop() == 0


class TestOverheadGuard:
    def test_detail_is_detached_and_the_timeline_says_so(self, tmp_path: Path) -> None:
        words = ("--trigger", "stall>50ms", "--before", "1s", "--after", "3s", "--max-overhead", "0.001%")
        with running_server(built("2.8.17")) as server, watching(tmp_path, "-p", str(server.pid), *words) as watch:
            watch.wait_until_it_says("event in 2 is kept")
            stall(server, "0.5")
            rows = watch.capture(0)
            assert any("--max-overhead" in note.text for note in rows.manifest.notes)
            assert len(iterations(rows, 190 * MS)) >= 1, "stalls are seen without probes"
            assert watch.stop() == 0


class TestMemory:
    def test_is_flat_over_restarts(self, tmp_path: Path) -> None:
        builds = [built("2.8.17"), built("5.0.6")]
        with running_server(builds[0]) as first:
            port = first.port
        with watching(tmp_path, "--port", str(port), *STALLS) as watch:
            seen: list[tuple[int, int]] = []
            for number in range(8):
                with running_server(builds[number % 2], port=port) as server:
                    watch.wait_until_it_says(f"process {server.pid} ")
                watch.wait_until_it_says(f"process {server.pid} ({server.path.resolve()}) ended or was replaced")
                seen.append((watch.resident_kb(), len(os.listdir(f"/proc/{watch.pid}/fd"))))
            settled, last = [max(column) for column in zip(*seen[:4], strict=True)], seen[-1]
            # a program set and the code of a server take 8 MB, and come and go
            assert last[0] - settled[0] < 8192, seen
            assert last[1] <= settled[1] + 4, seen
