"""Stacks of real servers, sampled and unwound: what nobody traced is named, on the CPU and off it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from lab.server import Server, running_server
from tracing import Recorder, Rows, built, recording, until

from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.analysis.findings import find_findings
from stallscope.tracer.analysis.samples import plain_name
from stallscope.tracer.analysis.summary import summarise
from stallscope.tracer.capture.program import Program
from stallscope.tracer.capture.stack_capture import StackCapture
from stallscope.tracer.capture.stack_sampler import StackOptions, stack_sources
from stallscope.tracer.stack_table import NOT_UNWOUND

KEYS = 300_000
LOOPS = 4_000_000
SLEEP_NS = 300_000_000
STALL_NS = 10_000_000
PERIOD_NS = 1_000_000_000 // 499
COMMANDS = (
    ("EVAL", "return #redis.call('KEYS', 'nothing*')", "0"),
    ("EVAL", f"for i = 1, {LOOPS} do end return 1", "0"),
    ("DEBUG", "SLEEP", str(SLEEP_NS / 1e9)),
)
CULPRITS = ("keysCommand", "evalGenericCommand", "debugCommand")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    built("2.8.17")
    with running_server("2.8.17", backlog=64) as running:
        running.command("DEBUG", "POPULATE", str(KEYS))
        yield running


def stall(server: Server, recorder: Recorder) -> None:
    """Make one stall after the other, each once the one before is in the file."""
    for number, words in enumerate(COMMANDS, 1):
        server.command(*words)
        recorder.wait_until_it_has(number, "event loop iteration")
        recorder.wait_until_it_has(number, "stack sample")


@pytest.fixture(scope="module")
def met(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    path = tmp_path_factory.mktemp("stacks") / "a.stall"
    # a uretprobe on `call` puts its trampoline into every one of these stacks
    words = ("-p", str(server.pid), "--stacks=stalls", "--stack-rate", "499", "--probe", "call")
    with recording(path, *words) as recorder:
        stall(server, recorder)
        assert recorder.stop() == 0, recorder.said
        return analyse(recorder.recording())


def longest_of(analysis: Analysis, culprit: str) -> int:
    """Return the stall of a culprit that was sampled the longest."""
    mine = [item for item in analysis.samples.culprits if item.function == culprit]
    assert mine, analysis.samples.culprits
    return max(mine, key=lambda item: item.total_ns).stall


def names_in(analysis: Analysis, samples: pd.DataFrame) -> set[str]:
    stacks = [analysis.samples.functions_of(int(stack)) for stack in samples["stack"].unique()]
    return {plain_name(frame.name) for stack in stacks for frame in stack}


class TestStalls:
    def test_are_named_after_functions_that_nobody_traced(self, met: Analysis) -> None:
        assert set(CULPRITS) <= {culprit.function for culprit in met.samples.culprits}
        traced = {probe.name for probe in met.manifest.probes}
        assert not traced & set(CULPRITS)
        remedies = {finding.remedy for finding in find_findings(met) if finding.rule == "untraced-culprits"}
        assert {f"add --probe {name}" for name in CULPRITS} <= remedies
        assert set(CULPRITS) <= {item.sampled_in for item in summarise(met).stalls}

    def test_are_unwound_to_the_first_function(self, met: Analysis) -> None:
        weights = met.samples.in_stalls()
        stacks = [met.samples.functions_of(int(stack)) for stack in weights["stack"]]
        assert not [stack for stack in stacks if stack[0].name == NOT_UNWOUND]
        for stack in stacks:
            names = [plain_name(frame.name) for frame in stack]
            assert names[0] == "_start"
            assert names.index("main") < names.index("aeMain") < names.index("aeProcessEvents")

    def test_of_a_script_go_through_lua_and_back(self, met: Analysis) -> None:
        mine = met.samples.in_stalls()
        mine = mine[mine["stall"] == longest_of(met, "keysCommand")]
        chains = [[frame.name for frame in met.samples.functions_of(int(stack))] for stack in mine["stack"]]
        deep = [names for names in chains if "keysCommand" in names]
        assert deep
        for names in deep:
            assert names.index("evalGenericCommand") < names.index("luaD_precall") < names.index("keysCommand")

    def test_samples_are_counted_and_in_their_stall(self, met: Analysis) -> None:
        assert met.recording.counters is not None
        (probe,) = [probe for probe in met.manifest.probes if probe.kind == "stack sample"]
        counters = met.recording.counters.by_probe[probe.id]
        assert counters.lost == 0
        assert counters.hits == counters.sent == len(met.samples.frame)
        running = met.samples.frame[met.samples.frame["state"] == "running"]
        assert (running["stall"] >= 0).all()
        assert set(running["weight_ns"]) == {PERIOD_NS}
        starts = met.stalls.frame["start_ns"].to_numpy()[running["stall"]]
        assert (running["time_ns"].to_numpy() - starts >= STALL_NS).all()

    def test_a_sleep_is_off_the_cpu_with_the_kernels_functions(self, met: Analysis) -> None:
        mine = met.samples.frame[met.samples.frame["stall"] == longest_of(met, "debugCommand")]
        asleep = mine[mine["state"] == "asleep"]
        sleeping = asleep.loc[asleep["duration_ns"].idxmax()]
        assert sleeping["duration_ns"] >= SLEEP_NS
        functions = met.samples.functions_of(int(sleeping["stack"]))
        names = [frame.name for frame in functions]
        assert names.index("debugCommand") < names.index("hrtimer_nanosleep")
        assert functions[-1].is_kernel
        (found,) = [finding for finding in find_findings(met) if finding.rule == "stalls-asleep"]
        assert "sleep" in found.title
        assert any("debugCommand" in fact.text for fact in found.evidence)


def test_a_recording_that_was_killed_names_its_stacks(server: Server, tmp_path: Path) -> None:
    with recording(tmp_path / "a.stall", "-p", str(server.pid), "--stacks", "--stack-rate", "999") as recorder:
        stall(server, recorder)
        recorder.stop(signal.SIGKILL)
        analysis = analyse(recorder.recording())
    assert not analysis.recording.complete
    assert (analysis.samples.frame["stack"] >= 0).all()
    assert "keysCommand" in {culprit.function for culprit in analysis.samples.culprits}


def test_always_samples_outside_of_stalls_too(server: Server, tmp_path: Path) -> None:
    words = ("-p", str(server.pid), "--stacks", "--stack-rate", "999", "--stall", "100s")
    with recording(tmp_path / "a.stall", *words) as recorder:
        server.command(*COMMANDS[0])
        recorder.wait_until_it_has(1, "stack sample")
        assert recorder.stop() == 0
        analysis = analyse(recorder.recording())
    assert len(analysis.stalls.frame) == 0
    assert "keysCommand" in names_in(analysis, analysis.samples.frame)
    # waiting for events is no time of the event loop
    away = analysis.samples.frame[analysis.samples.frame["state"] != "running"]
    assert not names_in(analysis, away) & {"epoll_wait", "ep_poll", "do_epoll_wait"}
    sampled = summarise(analysis).sampled
    assert sampled is not None
    assert sampled.scope == "recording"


def test_nothing_is_sampled_below_the_threshold(server: Server, tmp_path: Path) -> None:
    words = ("-p", str(server.pid), "--stacks=stalls", "--stack-rate", "999", "--stall", "100s")
    with recording(tmp_path / "a.stall", *words) as recorder:
        for _ in range(3):
            server.command(*COMMANDS[0])
        assert recorder.stop() == 0
        rows = Rows(recorder.recording())
    on_cpu = rows.of("stack sample")
    assert not (on_cpu["state"] == 0x8000_0000).any()


def test_sampling_is_switched_on_and_off_without_loading_again(server: Server) -> None:
    """What ``watch`` does: loaded beforehand, attached by a few system calls when it is wanted."""
    program = Program([], ring_bytes=1 << 16, min_duration_ns=0, iteration_min_ns=STALL_NS, more=stack_sources())
    try:
        program.attach_loop()
        program.watch_loop(server.pid)
        stacks = StackCapture(program, StackOptions(1_000_000, always=True, on_demand=True), STALL_NS)
        stacks.take_up(server.pid)
        server.command(*COMMANDS[0])
        assert stacks.counters().hits == 0
        rows, open_files = 0, []

        def all_are_rows() -> bool:
            nonlocal rows
            rows += len(stacks.take()[0])
            return rows == stacks.counters().sent

        for turn in range(1, 4):
            assert stacks.attach([server.pid]) == []
            server.command(*COMMANDS[0])
            stacks.detach()
            hits = stacks.counters().hits
            server.command(*COMMANDS[0])
            assert stacks.counters().hits == hits >= turn
            until(all_are_rows, "every sample is a row, so the server's code has been read")
            open_files.append(len(os.listdir("/proc/self/fd")))
        assert len(set(open_files)) == 1
        stacks.close()
    finally:
        program.close()
