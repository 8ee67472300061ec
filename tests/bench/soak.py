"""A soak of ``stallscope watch``: stalls at random times that are known, and everything that may happen meanwhile.

Every stall has to be captured, with its pre-roll, and none invented; memory has to stay flat. In the middle the watch
is killed, the disk runs full, and the server is killed, and upgraded. ``make soak`` runs it for an hour.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "vagrant"))

from lab import LabError  # noqa: E402
from lab.server import HOST, Server, find_server, running_server  # noqa: E402

from stallscope.tracer.layout import MAX_SPAN_NS  # noqa: E402
from stallscope.tracer.manifest import ITERATION  # noqa: E402
from stallscope.tracer.recording import read_recording  # noqa: E402

STALLSCOPE = str(Path(sys.executable).with_name("stallscope"))
MS = 1_000_000
THRESHOLD_NS = 50 * MS
CLEAR_NS = 80 * MS
"""A command that took a server at least this long is a stall that has to be captured."""

BEFORE_NS = 2_000 * MS
_CHUNK_NS = 600 * MS
_DYING_NS = 1_000 * MS
"""A server that is killed stands still while the kernel takes its memory apart: that is a stall, of no iteration."""

_KEYS = 200_000
OLD, NEW = "2.8.17", "5.0.6"
_SLOWLOG = re.compile(rb":\d+\r\n:\d+\r\n:(\d+)\r\n")
_ATTACHED = re.compile(r"attached ([\d.]+) (us|ms|s) after the trigger was noticed, ([\d.]+) (us|ms|s) after")
_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


@dataclass(frozen=True)
class Stall:
    """A stall that was made: how, in which server, when (CLOCK_MONOTONIC ns, as the client saw it), and how long.

    Attributes:
        took_ns: the command's time by the server's own SLOWLOG.
    """

    kind: str
    pid: int
    start_ns: int
    end_ns: int
    took_ns: int


@dataclass
class Result:
    """What a soak found.

    Attributes:
        stalls: that were made; missed: those that no capture holds; without_preroll: their captures lack it.
        invented: captures without a stall; starved: stalls that nobody made, in which the server got no CPU.
        incomplete: captures the watch itself told of as incomplete; left_over: kept after kill -9.
        memory_kb: resident memory of the watch, once a few seconds; restarted at a new watch.
        attach_ms, late_ms: from trigger noticed, and from bound passed, to all detail probes attached.
    """

    stalls: list[Stall] = field(default_factory=list)
    missed: list[Stall] = field(default_factory=list)
    without_preroll: list[str] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)
    starved: int = 0
    captures: int = 0
    incomplete: int = 0
    left_over: int = 0
    memory_kb: list[list[int]] = field(default_factory=list)
    attach_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    own_cpu: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return it for people."""
        grown = [series[-1] - series[len(series) // 4] for series in self.memory_kb if len(series) > 7]
        lines = [
            f"stalls made {len(self.stalls)}, captured {len(self.stalls) - len(self.missed)}, "
            f"in {self.captures} captures; invented {len(self.invented)}; "
            f"{self.starved} more in which the server got no CPU",
            f"captures without their whole pre-roll: {len(self.without_preroll)}",
            f"left over by kill -9 and kept: {self.left_over}; incomplete, on a full disk: {self.incomplete}",
            "memory of each watch, kB, first quarter to end: "
            + ", ".join(f"{series[len(series) // 4]} -> {series[-1]}" for series in self.memory_kb if series)
            + f"; grown by {max(grown, default=0)}",
        ]
        if self.attach_ms:
            attach, late = sorted(self.attach_ms), sorted(self.late_ms)
            for what, times in (("the trigger was noticed", attach), ("its bound was passed", late)):
                lines.append(
                    f"detail attached after {what}: median {statistics.median(times):.1f} ms "
                    f"({times[0]:.1f}-{times[-1]:.1f})"
                )
        lines += [f"watch ended: {line}" for line in self.own_cpu]
        lines += [f"MISSED: {stall}" for stall in self.missed]
        lines += [f"INVENTED: {text}" for text in self.invented]
        lines += [f"WITHOUT PRE-ROLL: {text}" for text in self.without_preroll]
        return lines

    @property
    def is_good(self) -> bool:
        """Return whether everything was captured and nothing invented."""
        return not (self.missed or self.invented or self.without_preroll)


class Watch:
    """A watch whose messages go to a file."""

    def __init__(self, folder: Path, log: Path, port: int) -> None:
        self.log = log
        self._output = log.open("wb")
        words = ["--port", str(port), "--trigger", "stall>50ms", "--before", "2s", "--after", "1s"]
        words += ["--cooldown", "0", "--max-captures", "100000", "--max-disk", "8G", "--max-overhead", "100%"]
        self.process = subprocess.Popen(
            [STALLSCOPE, "watch", "-o", str(folder), *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._output, start_new_session=True,
        )  # fmt: skip
        self.memory_kb: list[int] = []
        wait(lambda: "watching " in self.said, "the watch begins")
        time.sleep(BEFORE_NS / 1e9 + 1)  # a pre-roll needs its time

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def take_memory(self) -> None:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        self.memory_kb.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))  # type: ignore[index]

    def end(self, number: int, result: Result) -> None:
        self.process.send_signal(number)
        self.process.wait(120)
        self._output.close()
        result.memory_kb.append(self.memory_kb)
        result.said.append(self.said)
        for near, unit, far, other in _ATTACHED.findall(self.said):
            result.attach_ms.append(float(near) * _UNITS[unit])
            result.late_ms.append(float(far) * _UNITS[other])
        last = self.said.rstrip().rpartition("\n")[2]
        if last.startswith("watched "):
            result.own_cpu.append(last)
        result.incomplete += self.said.count("a capture is not complete")


def wait(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


def make_stall(server: Server, chance: random.Random) -> Stall:
    """Block a server, and return what its client saw."""
    kind = chance.choice(["DEBUG SLEEP", "DEBUG SLEEP", "Lua", "KEYS", "short"])
    if kind == "DEBUG SLEEP":
        words: tuple[str, ...] = ("DEBUG", "SLEEP", f"{chance.uniform(0.09, 0.6):.3f}")
    elif kind == "Lua":
        script = "local n = 0 for i = 1, tonumber(ARGV[1]) do n = n + i % 7 end return n"
        words = ("EVAL", script, "0", str(chance.randrange(4_000_000, 20_000_000)))
    elif kind == "KEYS":
        words = ("KEYS", "nothing*")
    else:
        words = ("DEBUG", "SLEEP", "0.02")
    request = b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w.encode()) for w in words)
    with socket.create_connection((HOST, server.port), timeout=60) as connection:
        start_ns = time.monotonic_ns()
        connection.sendall(request)
        connection.recv(65536)
        end_ns = time.monotonic_ns()
        # what the client waited for is not all the server's time: on a busy machine it waits itself
        connection.sendall(b"*3\r\n$7\r\nSLOWLOG\r\n$3\r\nGET\r\n$1\r\n1\r\n")
        slowest = _SLOWLOG.search(connection.recv(65536))
        took_ns = int(slowest[1]) * 1000 if slowest else 0
        return Stall(kind, server.pid, start_ns, end_ns, took_ns)


def fill(server: Server) -> None:
    """Give a server enough keys for KEYS to take its time."""
    server.command("DEBUG", "POPULATE", str(_KEYS))


@contextmanager
def disk() -> Iterator[Path]:
    """Mount a disk of 256 MB of memory."""
    with tempfile.TemporaryDirectory(prefix="stallscope-soak-") as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "-l", name], check=True)


class Soak:
    """A soak that is under way: the disk, the server, the watch."""

    def __init__(self, seed: int, folder: Path, logs: Path, servers: ExitStack) -> None:
        self.chance = random.Random(seed)
        self.result = Result()
        self.folder = folder
        self._logs = logs
        self._servers = servers
        self.server = servers.enter_context(running_server(OLD))
        fill(self.server)
        self.watch = Watch(folder, logs / "0", self.server.port)

    def stall(self) -> None:
        """Wait for a random time, and block the server in a random way."""
        time.sleep(self.chance.uniform(0.5, 6.0))
        stall = make_stall(self.server, self.chance)
        if stall.took_ns >= CLEAR_NS:
            self.result.stalls.append(stall)
        self.watch.take_memory()

    def kill_the_watch(self) -> None:
        """Kill the watch while it captures, and start another."""
        self._settle()
        self.server.command("DEBUG", "SLEEP", "0.2")
        time.sleep(0.5)
        self.watch.end(signal.SIGKILL, self.result)
        self.watch = Watch(self.folder, self._logs / "1", self.server.port)
        self.result.left_over = self.watch.said.count("was cut short and is kept so")

    def fill_the_disk(self) -> None:
        """Have the disk full for one stall."""
        self._settle()
        status = os.statvfs(self.folder)
        with suppress(OSError):  # it is full when it says so
            (self.folder / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize))
        told = self.watch.said.count("a capture is not complete")
        self.server.command("DEBUG", "SLEEP", "0.2")
        wait(lambda: self.watch.said.count("a capture is not complete") > told, "the watch tells of the full disk")
        (self.folder / "filler").unlink()

    def restart_the_server(self, build: str) -> None:
        """Kill the server, and start another on its port."""
        self._settle()
        port = self.server.port
        os.kill(self.server.pid, signal.SIGKILL)
        self._servers.close()
        self.server = self._servers.enter_context(running_server(build, port=port))
        wait(lambda: f"process {self.server.pid} (" in self.watch.said, "the new server is watched")
        fill(self.server)
        self._settle()

    def end(self) -> Result:
        """End the watch, and compare its captures with what was made."""
        self._settle()
        self.watch.end(signal.SIGINT, self.result)
        compare(self.folder, self.result)
        return self.result

    def _settle(self) -> None:
        time.sleep(4)  # what was made before is captured before, and its post-roll is over


def soak(seconds: float, seed: int) -> Result:
    """Run it, and return what was found."""
    with ExitStack() as stack:
        folder = stack.enter_context(disk())
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stallscope-soak-logs-")))
        run = Soak(seed, folder, logs, stack.enter_context(ExitStack()))
        began = time.monotonic()
        upsets = [
            ("the watch is killed", run.kill_the_watch),
            ("the disk is full", run.fill_the_disk),
            ("the server is killed", lambda: run.restart_the_server(OLD)),
            ("the server is upgraded", lambda: run.restart_the_server(NEW)),
        ]
        for number, (what, upset) in enumerate(upsets, 1):
            while time.monotonic() < began + seconds * number / 5:
                run.stall()
            print(f"{time.monotonic() - began:.0f} s: {what}", flush=True)
            upset()
        while time.monotonic() < began + seconds:
            run.stall()
        return run.end()


def compare(folder: Path, result: Result) -> None:
    """Compare the captures with the stalls that were made."""
    open_stalls = list(result.stalls)
    for path in sorted(folder.glob("capture-*.stall")):
        recording = read_recording(path)
        manifest = recording.manifest
        result.captures += 1
        (probe,) = [probe.id for probe in manifest.probes if probe.kind == ITERATION]
        rows = recording.frame()
        rows = rows[(rows["probe"] == probe) & (rows["duration_ns"] <= MAX_SPAN_NS)]
        spans = [
            (int(row.pid), int(row.start_ns), int(row.start_ns + row.duration_ns), int(row.value2))
            for row in rows.itertuples()
            if row.duration_ns >= THRESHOLD_NS
        ]
        for stall in list(open_stalls):
            if any(pid == stall.pid and start < stall.end_ns and end > stall.start_ns for pid, start, end, _ in spans):
                open_stalls.remove(stall)
        first_ns = min((trigger.time_ns for trigger in manifest.triggers), default=manifest.started_ns)
        is_missing = any("pre-roll" in note.text for note in manifest.notes)
        if is_missing or first_ns - manifest.started_ns < BEFORE_NS - _CHUNK_NS:
            why = [note.text for note in manifest.notes if "pre-roll" in note.text]
            result.without_preroll.append(f"{path.name}: {(first_ns - manifest.started_ns) / 1e9:.2f} s; {why}")
        ended = [target.end_ns for target in manifest.targets if target.end_ns]
        is_death = any(abs(trigger.time_ns - end_ns) < _DYING_NS for trigger in manifest.triggers for end_ns in ended)
        if recording.complete and not is_death and not _is_explained(spans, result):
            result.invented.append(f"{path.name}: {manifest.triggers} {[note.text for note in manifest.notes]}")
    result.missed = open_stalls


def _is_explained(spans: list[tuple[int, int, int, int]], result: Result) -> bool:
    """Return whether each capture holds an iteration that took so long, whoever made it."""
    made = [(stall.start_ns, stall.end_ns) for stall in result.stalls]
    others = [span for span in spans if not any(span[1] < end and span[2] > start for start, end in made)]
    result.starved += len(others)
    return bool(spans)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    arguments = parser.parse_args()
    try:
        for build in (OLD, NEW):
            find_server(build)
    except LabError as error:
        raise SystemExit(str(error)) from error
    seed = arguments.seed or random.SystemRandom().randrange(1, 10_000)
    print(f"soak for {arguments.seconds:.0f} s, seed {seed}", flush=True)
    result = soak(arguments.seconds, seed)
    print("\n".join(result.lines()))
    sys.exit(0 if result.is_good else 1)


if __name__ == "__main__":
    main()
