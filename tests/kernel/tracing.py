"""What the tests of the capture layer share: a traced program, ``stallscope record`` around it, its rows."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from lab import LabError
from lab.server import find_server

from stallscope.tracer.capture.preflight import FAILED, check_machine
from stallscope.tracer.errors import RecordingError
from stallscope.tracer.layout import UNFINISHED_NS
from stallscope.tracer.manifest import ProbeCounters, ProbeInfo
from stallscope.tracer.recording import Recording, read_recording

STALLSCOPE = str(Path(sys.executable).with_name("stallscope"))
SOURCE = Path(__file__).with_name("targets") / "nesting.c"
DEADLINE_S = 180.0
"""An emulated machine on a busy host takes a minute for what takes a second."""


@cache
def why_not_traceable() -> str:
    """Return why nothing can be traced here, with the remedy; "" when it can."""
    for check in check_machine():
        if check.needed and check.state == FAILED:
            return f"requires {check.name} ({check.detail}): {check.remedy}"
    return ""


def require_tracing() -> None:
    if why_not_traceable():
        pytest.skip(why_not_traceable())


def built(name: str) -> str:
    """Return the name of a server's build; skips the test where nothing can be traced or it is not built."""
    require_tracing()
    try:
        find_server(name)
    except LabError as error:
        pytest.skip(str(error))
    return name


def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.05)


@dataclass(frozen=True)
class Call:
    """One call as the program itself measured it; see ``targets/nesting.c``."""

    function: str
    tid: int
    before: int
    begin: int
    end: int
    after: int


def build_nesting(folder: Path) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("requires gcc: apt-get install gcc libc6-dev")
    binary = folder / "nesting"
    words = ["gcc", "-O2", "-g", "-fno-builtin", "-pthread", "-Wno-infinite-recursion"]
    subprocess.run([*words, "-o", str(binary), str(SOURCE)], check=True)
    return binary


class Nesting:
    """The program of ``targets/nesting.c``, running."""

    def __init__(self, binary: Path) -> None:
        self._process = subprocess.Popen(
            [str(binary)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.binary = binary
        self.pid = self._process.pid

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")

    def told(self, last: str = "done") -> list[Call]:
        """Return the calls that it tells of up to the line ``last``."""
        assert self._process.stdout is not None
        calls = []
        for line in iter(lambda: self._process.stdout.readline().split(), []):  # type: ignore[union-attr]
            if line == [last]:
                return calls
            calls.append(Call(line[1], *map(int, line[2:])))
        raise AssertionError("the program ended")

    def run(self, command: str) -> list[Call]:
        self.send(command)
        return self.told()

    def byte_at(self, path: str, offset: int) -> int:
        """Return the byte of its memory where it has mapped this place of a file."""
        inode = Path(path).stat().st_ino
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in fields[0].split("-"))
            first = int(fields[2], 16)
            if int(fields[4]) == inode and first <= offset < first + end - start:
                memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY)
                try:
                    return os.pread(memory, 1, start + offset - first)[0]
                finally:
                    os.close(memory)
        raise AssertionError(f"{path} is not mapped at {offset:#x}")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()


@contextmanager
def running_nesting(binary: Path) -> Iterator[Nesting]:
    program = Nesting(binary)
    try:
        yield program
    finally:
        program.close()


class Command:
    """A ``stallscope`` command that is under way, and what it says on stderr."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._said = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        """Everything it has said on stderr so far."""
        assert self.process.stderr is not None
        while not self.process.stderr.closed and select.select([self.process.stderr], [], [], 0)[0]:
            part = os.read(self.process.stderr.fileno(), 65536)
            if not part:
                break
            self._said += part
        return self._said.decode()

    def wait_until_it_says(self, text: str, *, times: int = 1) -> None:
        until(lambda: self.said.count(text) >= times or self.process.poll() is not None, f"it says {text!r}")
        assert self.said.count(text) >= times, self.said

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send it a signal and return its exit status, -N when signal N killed it."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        """End it, keep what it said and let go of its stderr."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self._said = self.said.encode()
        self.process.stderr.close()


def started(command: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, to be read from stderr."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | (environment or {}),
    )


class Recorder(Command):
    """A ``stallscope record`` whose probes are attached."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        super().__init__(process)
        self.path = path
        self.attached_ns = 0

    def recording(self) -> Recording:
        return read_recording(self.path)

    def wait_until_it_has(self, count: int, name: str, *, pid: int | None = None) -> None:
        """Wait until the file, which is still being written, holds that many rows of a probe."""

        def has_them() -> bool:
            assert self.process.poll() is None, self.said
            try:
                return len(Rows(self.recording()).of(name, pid=pid)) >= count
            except RecordingError:
                return False  # not a byte is written yet

        until(has_them, f"{count} rows of {name} are in the file")


@contextmanager
def recording(path: Path, *words: str, prefix: Sequence[str] = ()) -> Iterator[Recorder]:
    """Run ``stallscope record`` with these words, and yield it once all probes are attached."""
    recorder = Recorder(started([*prefix, STALLSCOPE, "record", "-o", str(path), *words]), path)
    try:
        recorder.wait_until_it_says("all probes attached")
        recorder.attached_ns = time.monotonic_ns()
        yield recorder
    finally:
        recorder.close()


class Rows:
    """The rows of a recording by the name of their probe, their times as signed integers."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.manifest = recording.manifest
        self.all = recording.frame()
        self.all["is_finished"] = self.all["duration_ns"] != UNFINISHED_NS
        duration_ns = self.all["duration_ns"].where(self.all["is_finished"], 0)
        self.all["start_ns"] = self.all["start_ns"].astype("int64")
        self.all["end_ns"] = self.all["start_ns"] + duration_ns.astype("int64")

    def probes(self, name: str) -> list[ProbeInfo]:
        return [probe for probe in self.manifest.probes if probe.name == name]

    def of(self, name: str, *, pid: int | None = None) -> pd.DataFrame:
        """Return the rows of a probe in the order of their starts, with its decoded fields as columns."""
        parts = []
        for probe in self.probes(name):
            rows = self.all[self.all["probe"] == probe.id].copy()
            for one in probe.fields:
                raw = rows[f"value{one.slot}"].to_numpy(np.uint64) >> np.uint64(one.shift)
                rows[one.name] = (raw & np.uint64((1 << one.bits) - 1)).astype(np.int64)
            parts.append(rows)
        assert parts, f"no probe {name}"
        found = pd.concat(parts)
        if pid is not None:
            found = found[found["pid"] == pid]
        return found.sort_values("start_ns", kind="stable").reset_index(drop=True)

    def counters(self, name: str) -> ProbeCounters:
        assert self.recording.counters is not None
        (probe,) = self.probes(name)
        return self.recording.counters.by_probe[probe.id]


def inside(inner: pd.DataFrame, outer: pd.DataFrame) -> pd.Series:
    """Return for each inner span the index of the outer span of its thread that contains it, -1 for none."""

    holds = (
        (outer["tid"].to_numpy() == inner["tid"].to_numpy()[:, None])
        & (outer["start_ns"].to_numpy() <= inner["start_ns"].to_numpy()[:, None])
        & (outer["end_ns"].to_numpy() >= inner["end_ns"].to_numpy()[:, None])
    )
    holders = [int(outer.index[np.flatnonzero(row)[-1]]) if row.any() else -1 for row in holds]
    return pd.Series(holders, index=inner.index, dtype="int64")
