"""The watchdog beside raw tracepoints, on Redis servers that are made to stall in every way.

Whether the two agree is counted in looks: an end that is known to one interval has no look between the two.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from lab.build import is_built, load_builds
from lab.server import HOST, Server, running_server
from tracing import require_tracing, until
from watchdog_thread import Watched, iterations, traced, watched

from stallscope.tracer.capture.program import Program
from stallscope.tracer.capture.standstill import LATE, Span
from stallscope.tracer.capture.watchdog import Watchdog
from stallscope.tracer.errors import SurroundingsError

THRESHOLD_NS = 50_000_000
LONG_NS = THRESHOLD_NS * 3 // 2
SLEEPS_S = ("0.1", "0.3", "1")
CLIENTS = 43
EACH_NS = 10_000_000
"""All together keep serverCron waiting for longer than the threshold, even if it was called just before."""

TOLERATED_LOOKS = 2
"""On a busy machine, where a look or a stamp comes late, the nearest look may not be the one next to the stall."""


@dataclass
class Both:
    """A server, what the watchdog saw of it, and what raw tracepoints saw."""

    server: Server
    seen: Watched
    reference: Program

    def true_stalls(self, count: int) -> list[Span]:
        """Return the next long stalls that raw tracepoints saw, at least so many."""
        true: list[Span] = []

        def have_come() -> bool:
            true.extend(one for one in iterations(self.reference) if one.duration_ns >= LONG_NS)
            return len(true) >= count

        until(have_come, f"{count} stalls in the ring")
        return true

    def stalls(self, count: int) -> list[tuple[Span, Span]]:
        """Return (raw tracepoints' stall, the watchdog's of the same time) for the next ``count`` long stalls."""
        true = self.true_stalls(count)
        until(lambda: all(self._found(one) for one in true), f"the watchdog to find {true} in {self.seen.stalls}")
        # on a busy machine another may be among them, for want of a CPU
        true = sorted(true, key=lambda one: one.duration_ns)[-count:]
        return [(one, self._found(one)[0]) for one in true]

    def _found(self, true: Span) -> list[Span]:
        middle_ns = (true.start_ns + true.end_ns) // 2
        return [one for one in self.seen.stalls if one.start_ns < middle_ns < one.end_ns]

    def assert_agree(self, count: int) -> None:
        for true, found in self.stalls(count):
            assert self.seen.looks_between(true.start_ns, found.start_ns) <= TOLERATED_LOOKS
            assert self.seen.looks_between(true.end_ns, found.end_ns) <= TOLERATED_LOOKS


def turns_in(server: Server, duration_ns: int) -> int:
    """Return how often a Lua loop turns in so long on this machine."""
    turns = 2_000_000
    took_ns = []
    for _ in range(3):
        began_ns = time.monotonic_ns()
        server.command("EVAL", f"local t = 0 for i = 1, {turns} do t = t + i end return t", "0")
        took_ns.append(time.monotonic_ns() - began_ns)
    return turns * duration_ns // min(took_ns)


def _debian() -> Path | None:
    found = shutil.which("redis-server")
    return Path(found) if found else None


@pytest.fixture(params=["2.8.17", "5.0.6", "debian"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Both]:
    require_tracing()
    build, options = request.param, ()
    if build == "debian":
        installed = _debian()
        if installed is None:
            pytest.skip("requires redis-server: apt-get install redis-server")
        # by its own name: the package's is a link, and what the link names is another program
        build = shutil.copy(installed, tmp_path / "redis-server")
        options = ("--enable-debug-command", "yes")
    elif not is_built(load_builds()[build]):
        pytest.skip(f"requires the lab's Redis {build}: vagrant/lab/build.py {build}")
    with ExitStack() as stack:
        server = stack.enter_context(running_server(build, options=options))
        reference = stack.enter_context(traced(server.pid, THRESHOLD_NS))
        seen = stack.enter_context(watched(server.pid, THRESHOLD_NS))
        until(lambda: len(seen.looks) > 100, "looks")
        if np.percentile(np.diff(seen.looks), 95) > LATE * seen.watchdog.interval_ns:
            pytest.skip("requires a machine that is not so busy: looks at the server come late")
        yield Both(server, seen, reference)


def test_a_server_that_sleeps_computes_or_is_stopped(both: Both) -> None:
    for duration_s in SLEEPS_S:
        both.server.command("DEBUG", "SLEEP", duration_s)
    both.assert_agree(len(SLEEPS_S))
    # a twentieth of a second on the fastest machine
    both.server.command("EVAL", "local t = 0 for i = 1, 20000000 do t = t + i end return t", "0")
    both.assert_agree(1)
    os.kill(both.server.pid, signal.SIGSTOP)
    until(lambda: both.seen.still_ns() > 2 * LONG_NS, "a stall in progress")
    assert both.seen.watchdog.is_still(both.server.pid)
    os.kill(both.server.pid, signal.SIGCONT)
    both.assert_agree(1)
    assert not both.seen.watchdog.is_still(both.server.pid)
    # while it lasted each was said to be in progress, with the start that its row has
    said = {stall.start_ns for look in both.seen.in_progress for stall in look}
    assert len(said & {one.start_ns for one in both.seen.stalls}) >= 3


def test_a_busy_server_is_not_stalled_but_for_want_of_a_cpu(both: Both) -> None:
    benchmark = shutil.which("redis-benchmark")
    if benchmark is None:
        pytest.skip("requires redis-benchmark: apt-get install redis-tools")
    words = ["-p", str(both.server.port), "-t", "get,set", "-n", "20011", "-c", "50", "-q"]
    subprocess.run([benchmark, *words], check=True, stdout=subprocess.DEVNULL)
    looks = len(both.seen.looks)
    until(lambda: len(both.seen.looks) > looks + 100, "what was left to be looked at")
    true = iterations(both.reference)
    for row in list(both.seen.rows):
        found = Span(int(row["start_ns"]), int(row["start_ns"] + row["duration_ns"]))
        is_true = any(one.start_ns < found.end_ns and found.start_ns < one.end_ns for one in true)
        # what raw tracepoints do not count to an iteration: it was to be woken and got no CPU
        assert is_true or row["duration_ns"] - row["value"][2] < THRESHOLD_NS


def test_many_ready_clients_are_one_stall_although_each_is_read_and_answered(both: Both) -> None:
    script = f"local t = 0 for i = 1, {turns_in(both.server, EACH_NS)} do t = t + i end return t"
    request = b"*3\r\n$4\r\nEVAL\r\n$%d\r\n%s\r\n$1\r\n0\r\n" % (len(script), script.encode())
    until(lambda: len(both.seen.crons) > 3, "calls of serverCron")
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection((HOST, both.server.port))) for _ in range(CLIENTS)]
        os.kill(both.server.pid, signal.SIGSTOP)
        for client in clients:
            client.sendall(request)
        os.kill(both.server.pid, signal.SIGCONT)
        for client in clients:
            assert client.recv(100).startswith(b":")
    true = max(both.true_stalls(1), key=lambda one: one.duration_ns)
    # reading and writing hides how it began, until serverCron was due
    due_ns = max(ended_ns + period_ms * 1_000_000 for ended_ns, period_ms in both.seen.crons if ended_ns < true.end_ns)
    until(lambda: any(one.end_ns > true.end_ns - THRESHOLD_NS for one in both.seen.stalls), "the watchdog to find it")
    found = next(one for one in both.seen.stalls if one.end_ns > true.end_ns - THRESHOLD_NS)
    assert found.start_ns <= due_ns or both.seen.looks_between(due_ns, found.start_ns) <= TOLERATED_LOOKS
    assert both.seen.looks_between(true.end_ns, found.end_ns) <= TOLERATED_LOOKS


def test_a_process_that_is_not_there_cannot_be_watched() -> None:
    watchdog = Watchdog(THRESHOLD_NS)
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(SurroundingsError, match=f"process {gone.pid} cannot be watched without probes"):
        watchdog.add(gone.pid, gone.pid)
    assert watchdog.sample(1)[1] == []
    watchdog.close()


def test_a_server_that_ends_is_left_out_and_its_files_are_closed() -> None:
    program = subprocess.Popen(["sleep", "1000"])
    files = len(os.listdir("/proc/self/fd"))
    watchdog = Watchdog(THRESHOLD_NS)
    watchdog.add(program.pid, program.pid)
    program.kill()
    program.wait()
    rows, in_progress = watchdog.sample(1)
    assert len(rows) == len(in_progress) == 0
    watchdog.remove(program.pid)
    watchdog.remove(program.pid)
    assert len(os.listdir("/proc/self/fd")) == files
