"""Event loops on every rung that this kernel has, of a program that knows each of its waits and accepts.

Every count is prime. Raw tracepoints run beside the rung that is tested: both must have seen the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tracing import require_tracing, until

from stallscope.tracer.capture.event_loop import (
    SYSTEM_CALLS,
    TRACEPOINT_RUNG,
    LoopPlan,
    plan_loop,
)
from stallscope.tracer.capture.listener import FENTRY_RUNG, KPROBE_RUNG, KPROBES
from stallscope.tracer.capture.probe_ids import ACCEPT_PROBE, ITERATION_PROBE
from stallscope.tracer.capture.program import Program
from stallscope.tracer.manifest import ProbeCounters

TARGET = Path(__file__).with_name("targets") / "looping.py"
STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
WAITS = {"epoll_wait": 211, "epoll_pwait": 103, "epoll_pwait2": 53}
ACCEPTS = {"accept": 23, "accept4": 29}
OTHERS = 10_007
BLOCKED = 67
PROBES = (ITERATION_PROBE, ACCEPT_PROBE)


class Looping:
    """The program of ``targets/looping.py``, running."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(TARGET)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self.run("other 1")

    def run(self, line: str) -> list[list[int | str]]:
        """Have it do something; returns the words of its answer, numbers as such."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        answer = []
        for said in self._process.stdout:
            if said == "done\n":
                return answer
            answer.append([int(word) if word.lstrip("-").isdigit() else word for word in said.split()])
        raise AssertionError(f"it ended in {line!r}")

    def run_all(self) -> list[list[int | str]]:
        """Have it do every wait and accept there is, and return the truth about them in order."""
        truth: list[list[int | str]] = []
        for call, count in WAITS.items():
            truth += self.run(f"waits {call} {count}")
        for call, count in ACCEPTS.items():
            truth += self.run(f"accepts {call} {count}")
        return truth

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def looping() -> Iterator[Looping]:
    program = Looping()
    yield program
    program.close()


def plan_of(rung: str) -> LoopPlan:
    """Return the plan of this rung, on a kernel that has it."""
    best = plan_loop()
    if rung == TRACEPOINT_RUNG:
        return LoopPlan()
    if rung == FENTRY_RUNG and best.rung == FENTRY_RUNG:
        return best
    if rung == KPROBE_RUNG and KPROBES.is_dir():
        return LoopPlan(KPROBE_RUNG, best.calls or tuple(SYSTEM_CALLS))
    pytest.skip(f"requires {rung} ({best.reason}): make test-vm")


@contextmanager
def seen_by(rung: str) -> Iterator[Program]:
    require_tracing()
    program = Program([], ring_bytes=1 << 20, min_duration_ns=0, iteration_min_ns=0, loop_plan=plan_of(rung))
    try:
        program.attach_loop()
        assert program.loop_failure == ""
        assert program.loop_rung == rung
        yield program
    finally:
        program.close()


@pytest.fixture(scope="module")
def tracepoints() -> Iterator[Program]:
    with seen_by(TRACEPOINT_RUNG) as program:
        yield program


@pytest.fixture(scope="module", params=[FENTRY_RUNG, KPROBE_RUNG, TRACEPOINT_RUNG])
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    with seen_by(request.param) as program:
        yield program


def counted(program: Program) -> list[ProbeCounters]:
    return list(program.counters(PROBES).values())


def gained(program: Program, before: Sequence[ProbeCounters]) -> list[int]:
    return [now.hits - then.hits for now, then in zip(counted(program), before, strict=True)]


def rows(program: Program, probe: int) -> np.ndarray:
    events = program.ring.read()
    return events[events["probe"] == probe]


def test_every_wait_and_accept_is_seen(program: Program, tracepoints: Program, looping: Looping) -> None:
    both = (program, tracepoints)
    before = [counted(one) for one in both]
    for one in both:
        one.ring.read()
        one.watch_loop(looping.pid)
    truth = looping.run_all()
    for one in both:
        one.unwatch_loop(looping.pid)
    waits = [line[1:] for line in truth if line[0] == "wait"]
    accepts = [line[1:] for line in truth if line[0] == "accept"]
    assert len(waits) == sum(WAITS.values()) + 2 * len(ACCEPTS)
    assert len(accepts) == sum(ACCEPTS.values()) + len(ACCEPTS)
    for one, then in zip(both, before, strict=True):
        # an iteration lies between two waits; the accept that finds nothing is counted, not sent
        assert gained(one, then) == [len(waits) - 1, len(accepts)]
        assert [now.missing - was.missing for now, was in zip(counted(one), then, strict=True)] == [0, 0]
        events = one.ring.read()
        iterations = events[events["probe"] == ITERATION_PROBE]
        assert len(iterations) == len(waits) - 1
        for row, (before_ns, after_ns, ready), (next_ns, _, _) in zip(iterations, waits, waits[1:], strict=False):
            assert before_ns <= row["start_ns"] <= after_ns
            assert next_ns <= row["start_ns"] + row["duration_ns"]
            assert row["value"][0] == ready
            assert row["tid"] == row["pid"] == looping.pid
        assert sorted(iterations["value"][:, 1])[-3:] == [0, *sorted(ACCEPTS.values())]
        accepted = events[events["probe"] == ACCEPT_PROBE]
        assert [list(row["value"][:2]) for row in accepted] == [[fd, new] for fd, new in accepts if new >= 0]


def test_detached_it_sees_nothing_and_then_again(program: Program, looping: Looping) -> None:
    program.watch_loop(looping.pid)
    before = counted(program)
    looping.run("waits epoll_wait 13")
    assert gained(program, before) == [12, 0]
    rung = program.loop_rung
    program.detach_loop()
    assert program.loop_rung == ""
    looping.run("waits epoll_wait 17")
    assert gained(program, before) == [12, 0]
    program.attach_loop()
    assert program.loop_rung == rung
    looping.run("waits epoll_wait 19")
    # what happened meanwhile is no iteration, however long it seems
    assert gained(program, before) == [12 + 18, 0]
    program.unwatch_loop(looping.pid)
    program.ring.read()


def test_an_iteration_under_way_gets_the_start_it_is_given(program: Program, looping: Looping) -> None:
    program.ring.read()
    program.watch_loop(looping.pid, since_ns=123_456_789)
    (first, *_) = looping.run("waits epoll_wait 2")
    program.unwatch_loop(looping.pid)
    seeded, _ = rows(program, ITERATION_PROBE)
    assert seeded["start_ns"] == 123_456_789
    assert first[1] <= seeded["start_ns"] + seeded["duration_ns"] <= first[2]


def test_only_raw_tracepoints_run_on_other_system_calls(program: Program, looping: Looping) -> None:
    names = {f"loop_{name}" for name in ("sys_enter", "sys_exit")}
    was = STATS.read_text()
    STATS.write_text("1\n")
    try:
        before = runs_of(program)
        looping.run(f"other {OTHERS}")
        ran = {name: count - before[name] for name, count in runs_of(program).items()}
    finally:
        STATS.write_text(was)
    if program.loop_rung == TRACEPOINT_RUNG:
        assert min(ran[name] for name in names) >= OTHERS
    else:
        assert sum(count for name, count in ran.items()) < OTHERS // 10  # what else this host waits for and accepts


def runs_of(program: Program) -> dict[str, int]:
    """Return how often each of its programs ran while the kernel counted, by its name."""
    found = {}
    for name, fd in program._loaded.programs.items():
        text = Path(f"/proc/{os.getpid()}/fdinfo/{fd}").read_text()
        found[name] = int(next(line for line in text.splitlines() if line.startswith("run_cnt")).split()[1])
    return found


def test_kprobes_that_miss_give_way_to_raw_tracepoints(looping: Looping) -> None:
    others = Looping()
    try:
        with seen_by(KPROBE_RUNG) as program:
            program.watch_loop(looping.pid)
            assert not program.keep_loop_whole()
            others.run(f"block {BLOCKED}")  # a kretprobe follows ten calls at a time, or two for each CPU
            until(lambda: is_blocked(others.pid) == BLOCKED, "threads in epoll_wait")
            looping.run("waits epoll_wait 31")
            assert counted(program)[0].lost_starts > 0
            assert counted(program)[0].hits + counted(program)[0].missing >= 30
            assert program.keep_loop_whole()
            assert program.loop_rung == TRACEPOINT_RUNG
            before = counted(program)
            looping.run("waits epoll_wait 37")
            assert gained(program, before) == [36, 0]
            assert counted(program)[0].missing == before[0].missing
    finally:
        others.close()


def is_blocked(pid: int) -> int:
    """Return how many threads of a process are in epoll_wait."""
    number = str(SYSTEM_CALLS["epoll_wait"])
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(task.joinpath("syscall").read_text().split()[0] == number for task in tasks)
