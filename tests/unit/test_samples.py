"""Stack samples: which stall they tell, the tree they make, and the culprit nobody named."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from recordings import (
    ASLEEP_STATE,
    BLOCKED_STATE,
    DATA,
    ITERATION_ID,
    MS,
    PID,
    PROBES,
    RUNNABLE_STATE,
    STACK_ID,
    STACK_PROBE,
    Builder,
    ProbeCounters,
    at,
    manifest,
)

from stallscope.reports.export.samples import write_folded, write_speedscope
from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.analysis.findings import CONTRIBUTES, Finding, find_findings
from stallscope.tracer.analysis.sample_rows import STATES
from stallscope.tracer.analysis.samples import NO_STALL, ROOT, plain_name
from stallscope.tracer.analysis.summary import summarise
from stallscope.tracer.analysis.window import cut
from stallscope.tracer.manifest import CALL, Manifest, ProbeInfo
from stallscope.tracer.recording import read_recording

SERVE = "readQueryFromClient processInputBuffer processCommand call"


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(read_recording(DATA / "sampled.stall"))


def with_stacks(**changes: object) -> Manifest:
    return manifest(probes=(*PROBES, STACK_PROBE), **changes)


def analysed(builder: Builder, tmp_path: Path, counters: dict[int, ProbeCounters] | None = None) -> Analysis:
    return analyse(read_recording(builder.write(tmp_path / "a.stall", 5000, counters)))


def findings(analysis: Analysis, rule: str) -> list[Finding]:
    return [finding for finding in find_findings(analysis) if finding.rule == rule]


class TestRows:
    def test_know_their_stall_and_state(self, analysis: Analysis) -> None:
        frame = analysis.samples.frame
        assert frame.groupby("stall").size().to_dict() == {NO_STALL: 1, 0: 35, 1: 1, 2: 2}
        assert frame.groupby("state", observed=True).size().to_dict() == {"running": 37, "runnable": 1, "asleep": 1}
        assert frame.loc[frame["state"] == "asleep", ["duration_ns", "weight_ns"]].to_numpy().tolist() == [
            [190 * MS] * 2
        ]
        assert (frame.loc[frame["state"] == "running", "duration_ns"] == 0).all()

    def test_are_cut_with_the_recording(self, analysis: Analysis) -> None:
        part = analyse(cut(analysis.recording, at(1900), at(2500)))
        assert part.samples.frame["weight_ns"].tolist() == [190 * MS]
        (culprit,) = part.samples.culprits
        assert culprit.function == "debugCommand"

    def test_of_another_thread_belong_to_no_stall(self, tmp_path: Path) -> None:
        builder = Builder(with_stacks()).span(ITERATION_ID, 1000, 100, 1, 0).sample(1010, "call")
        builder.tid = PID + 1
        samples = analysed(builder.sample(1020, "call"), tmp_path).samples.frame
        assert samples.set_index("tid")["stall"].to_dict() == {PID: 0, PID + 1: NO_STALL}

    def test_without_a_stack_that_is_listed_say_so(self, tmp_path: Path) -> None:
        builder = Builder(with_stacks()).span(ITERATION_ID, 1000, 100, 1, 0)
        builder.span(STACK_ID, 1010, 0, 10 * MS, 0x8000_0000, stack=99).span(STACK_ID, 1020, 0, 10 * MS, 0x8000_0000)
        samples = analysed(builder, tmp_path).samples
        assert samples.frame["stack"].tolist() == [-1, -1]
        assert samples.paths(samples.weights)["name"].tolist() == ["[stack not kept]"]


class TestPaths:
    def test_make_a_tree_that_adds_up(self, analysis: Analysis) -> None:
        for _, tree in analysis.samples.by_stall(range(3)):
            below = tree.loc[tree["parent"] != ROOT].groupby("parent")["weight_ns"].sum()
            assert (tree["weight_ns"] == tree["self_ns"] + below.reindex(tree.index, fill_value=0)).all()
            assert (tree["parent"] < tree.index).all()

    def test_of_a_stall_hold_its_functions(self, analysis: Analysis) -> None:
        ((_, tree),) = analysis.samples.by_stall([0])
        by_name = tree.set_index("name")
        assert by_name.at["aeMain", "weight_ns"] == 400 * MS
        assert by_name.loc["keysCommand", ["weight_ns", "self_ns", "off_ns"]].tolist() == [360 * MS, 160 * MS, 60 * MS]
        assert by_name.at["dictNext", "self_ns"] == 140 * MS
        assert by_name.at["schedule", "file"] == "[kernel]"

    def test_of_a_stall_without_samples_are_not_there(self, tmp_path: Path) -> None:
        builder = Builder(with_stacks()).span(ITERATION_ID, 1000, 100, 1, 0)
        assert list(analysed(builder, tmp_path).samples.by_stall([0, 1, 2])) == []


class TestCulprits:
    def test_are_the_functions_to_trace_next(self, analysis: Analysis) -> None:
        told = [
            (item.stall, item.function, item.weight_ns // MS, item.total_ns // MS) for item in analysis.samples.culprits
        ]
        assert told == [(0, "keysCommand", 360, 400), (1, "debugCommand", 190, 190), (2, "setCommand", 62, 100)]
        assert analysis.samples.culprits[0].path == ("keysCommand",)

    @pytest.mark.parametrize(
        ("functions", "culprit"),
        [
            (
                "serverCron databasesCron incrementallyRehash dictRehashMilliseconds dictRehash",
                "dictRehashMilliseconds",
            ),
            ("serverCron databasesCron activeExpireCycle.part.0 dbGenericDelete", "activeExpireCycle"),
            (f"{SERVE} evalGenericCommand lua_pcall luaD_call luaV_execute", "evalGenericCommand"),
            (f"{SERVE} evalGenericCommand lua_pcall luaRedisGenericCommand call keysCommand", "keysCommand"),
            (f"{SERVE} sortCommand pqsort sortCompare", "sortCommand"),
            ("serverCron someNewCron.constprop.0 sdsnewlen je_malloc", "someNewCron"),
            ("beforeSleep flushAppendOnlyFile", "flushAppendOnlyFile"),
        ],
    )
    def test_have_the_name_that_a_probe_can_be_put_on(self, functions: str, culprit: str, tmp_path: Path) -> None:
        builder = Builder(with_stacks()).span(ITERATION_ID, 1000, 100, 1, 0).sample(1010, functions, 90)
        (found,) = analysed(builder, tmp_path).samples.culprits
        assert found.function == culprit

    def test_are_not_named_where_a_probe_tells(self, tmp_path: Path) -> None:
        probe = ProbeInfo(16, "keysCommand", CALL, "uprobe", symbol="keysCommand")
        builder = Builder(manifest(probes=(*PROBES, STACK_PROBE, probe))).span(ITERATION_ID, 1000, 100, 1, 0)
        builder.sample(1010, f"{SERVE} keysCommand dictNext", 90)
        assert analysed(builder, tmp_path).samples.culprits == ()

    def test_are_not_what_only_passes_on(self, tmp_path: Path) -> None:
        builder = Builder(with_stacks()).span(ITERATION_ID, 1000, 100, 1, 0).sample(1010, SERVE, 90)
        assert analysed(builder, tmp_path).samples.culprits == ()

    def test_need_a_fifth_of_the_stall(self, tmp_path: Path) -> None:
        builder = Builder(with_stacks()).span(ITERATION_ID, 1000, 200, 1, 0)
        for index in range(11):
            builder.sample(1000 + index * 10, f"serverCron small{index}")
        assert analysed(builder, tmp_path).samples.culprits == ()

    @pytest.mark.parametrize("name", ["f", "f.part.0", "f.constprop.0.isra.1", "f.cold", "f.lto_priv.0"])
    def test_lose_what_the_compiler_added(self, name: str) -> None:
        assert plain_name(name) == "f"


class TestFindings:
    def test_name_each_culprit_with_its_probe(self, analysis: Analysis) -> None:
        found = findings(analysis, "untraced-culprits")
        assert [(item.title, item.remedy) for item in found] == [
            ("90% of the stall in keysCommand, not probed", "add --probe keysCommand"),
            ("100% of the stall in debugCommand, not probed", "add --probe debugCommand"),
            ("62% of the stall in setCommand, not probed", "add --probe setCommand"),
        ]
        assert {item.weight for item in found} == {CONTRIBUTES}
        assert found[0].evidence[0].text == "a stall of 400 ms, 90% of its samples in keysCommand"
        assert (found[0].evidence[0].start_ns, found[0].evidence[0].duration_ns) == (1000 * MS, 400 * MS)

    def test_add_up_the_stalls_of_one_culprit(self, tmp_path: Path) -> None:
        builder = Builder(with_stacks())
        for start in (1000, 2000):
            builder.span(ITERATION_ID, start, 100, 1, 0)
            builder.sample(start, "serverCron databasesCron dictRehashMilliseconds", 38).sample(start + 40, "a", 31)
            builder.sample(start + 80, "b", 31)
        (found,) = findings(analysed(builder, tmp_path), "untraced-culprits")
        assert found.title == "38% of 2 stalls in dictRehashMilliseconds, not probed"
        assert found.remedy == "add --probe dictRehashMilliseconds"
        assert len(found.evidence) == 2

    def test_do_not_call_a_sampled_stall_unexplained(self, analysis: Analysis) -> None:
        assert findings(analysis, "unexplained-stalls") == []

    def test_tell_time_asleep_and_what_for(self, analysis: Analysis) -> None:
        (found,) = findings(analysis, "stalls-asleep")
        assert found.title.startswith(
            "28% of the stalls' time asleep (190 ms), most of it waiting for nothing but time"
        )
        assert found.evidence[0].text == "190 ms waiting for nothing but time (sleep): debugCommand"

    @pytest.mark.parametrize(
        ("kernel", "reason"),
        [
            ("asm_exc_page_fault handle_mm_fault do_swap_page io_schedule schedule", "swap"),
            ("entry_SYSCALL_64_after_hwframe __x64_sys_fdatasync ext4_sync_file schedule", "writing to disk"),
            ("entry_SYSCALL_64_after_hwframe __x64_sys_read ext4_file_read_iter io_schedule", "disk"),
            ("entry_SYSCALL_64_after_hwframe __x64_sys_futex futex_wait schedule", "a lock"),
            ("entry_SYSCALL_64_after_hwframe __x64_sys_wait4 do_wait schedule", "a child process"),
            ("a_new_function schedule", "a_new_function"),
        ],
    )
    def test_tell_sleeps_apart(self, kernel: str, reason: str, tmp_path: Path) -> None:
        builder = Builder(with_stacks()).span(ITERATION_ID, 1000, 100, 1, 0)
        builder.sample(1001, "serverCron rdbSave", 90, BLOCKED_STATE, kernel)
        (found,) = findings(analysed(builder, tmp_path), "stalls-asleep")
        assert found.title == f"100% of the stalls' time asleep (90.0 ms), most of it waiting for {reason}"
        assert found.evidence[0].text == f"90.0 ms waiting for {reason}: rdbSave"

    def test_tell_time_without_a_cpu(self, tmp_path: Path) -> None:
        builder = Builder(with_stacks()).span(ITERATION_ID, 1000, 100, 1, 0)
        builder.sample(1000, "call", 40).sample(1040, "call", 60, RUNNABLE_STATE)
        (found,) = findings(analysed(builder, tmp_path), "stalls-want-cpu")
        assert found.title == "60% of the stalls' time (60.0 ms) Redis could run, but had no CPU"
        assert found.evidence[0].text == "a stall of 100 ms, 60.0 ms of it waiting for a CPU"

    def test_blame_no_function_for_the_time_without_a_cpu(self, tmp_path: Path) -> None:
        builder = Builder(with_stacks()).span(ITERATION_ID, 1000, 100, 1, 0)
        builder.sample(1000, "sendReplyToClient", 10).sample(1010, "sendReplyToClient", 90, RUNNABLE_STATE)
        analysis = analysed(builder, tmp_path)
        assert analysis.samples.culprits == ()
        assert findings(analysis, "untraced-culprits") == findings(analysis, "unexplained-stalls") == []
        assert [stall.sampled_in for stall in summarise(analysis).stalls] == ["no CPU"]
        assert "was blocked for 100 ms, mostly for want of a CPU (by sampled stacks)" in summarise(analysis).verdict

    def test_are_silent_without_samples(self) -> None:
        analysis = analyse(read_recording(DATA / "known-call.stall"))
        for rule in ("untraced-culprits", "stalls-asleep", "stalls-want-cpu"):
            assert findings(analysis, rule) == []


class TestSummary:
    def test_tells_how_the_time_was_spent(self, analysis: Analysis) -> None:
        sampled = summarise(analysis).sampled
        assert sampled is not None
        assert (sampled.samples, sampled.samples_in_scope, sampled.scope) == (39, 38, "stalls")
        times = (sampled.total_ns, sampled.running_ns, sampled.runnable_ns, sampled.asleep_ns, sampled.blocked_ns)
        assert [time // MS for time in times] == [690, 440, 60, 190, 0]
        told = {function.name: function for function in sampled.functions}
        assert (told["keysCommand"].total_ns, told["keysCommand"].self_ns) == (360 * MS, 160 * MS)
        assert told["dictRehashMilliseconds"].total_ns == 78 * MS
        assert "aeMain" not in told

    def test_says_where_each_stall_was(self, analysis: Analysis) -> None:
        summary = summarise(analysis)
        assert [stall.sampled_in for stall in summary.stalls] == ["keysCommand", "debugCommand", "setCommand"]
        assert "keysCommand (by sampled stacks, not traced)" in summary.verdict

    def test_is_of_the_recording_without_a_stall(self, tmp_path: Path) -> None:
        sampled = summarise(analysed(Builder(with_stacks()).sample(100, "serverCron"), tmp_path)).sampled
        assert sampled is not None
        assert (sampled.scope, sampled.samples_in_scope) == ("recording", 1)

    def test_counts_what_was_lost(self, tmp_path: Path) -> None:
        builder = Builder(with_stacks()).sample(100, "serverCron")
        analysis = analysed(builder, tmp_path, {STACK_ID: ProbeCounters(hits=4, sent=1, lost=3)})
        summary = summarise(analysis)
        assert summary.sampled is not None
        assert summary.sampled.lost == 3
        assert any(line.startswith("stack samples: 3 of 4 were lost") for line in summary.warnings)
        assert summary.losses == ()
        assert findings(analysis, "losses") == []

    def test_is_not_there_where_none_were_to_be_taken(self) -> None:
        assert summarise(analyse(read_recording(DATA / "known-call.stall"))).sampled is None


class TestExports:
    def test_folded_adds_up_to_what_was_sampled(self, analysis: Analysis) -> None:
        out = io.BytesIO()
        write_folded(analysis, out)
        lines = dict(line.rsplit(" ", 1) for line in out.getvalue().decode().splitlines())
        assert sum(map(int, lines.values())) == 700_000
        head = "redis-server 2.8.17 (4711);in stalls;_start;main;aeMain;aeProcessEvents.part.0;"
        serve = SERVE.replace(" ", ";")
        assert lines[f"{head}{serve};keysCommand"] == "160000"
        assert lines[f"{head}{serve};keysCommand;dictNext"] == "140000"
        assert [line for line in lines if line.endswith(";schedule;[asleep]")]
        assert [line for line in lines if ";between stalls;" in line and line.endswith(";getCommand")]

    def test_speedscope_has_a_profile_for_each_stall(self, analysis: Analysis) -> None:
        out = io.BytesIO()
        write_speedscope(analysis, out)
        document = json.loads(out.getvalue())
        profiles = document["profiles"]
        server = "redis-server 2.8.17 (4711)"
        assert [profile["name"] for profile in profiles] == [
            f"{server}, stalls",
            f"{server}, stall of 400 ms at 1.000 s",
            f"{server}, stall of 200 ms at 2.000 s",
            f"{server}, stall of 100 ms at 3.000 s",
            f"{server}, everything sampled",
        ]
        assert [profile["endValue"] // MS for profile in profiles] == [690, 400, 190, 100, 700]
        for profile in profiles:
            assert profile["endValue"] == sum(profile["weights"])
            assert len(profile["samples"]) == len(profile["weights"])
        frames = document["shared"]["frames"]
        names = [frames[frame]["name"] for frame in profiles[2]["samples"][0]]
        assert names[-3:] == ["do_nanosleep", "schedule", "[asleep]"]
        assert {"name": "keysCommand", "file": "redis-server"} in frames


def test_states_are_those_of_a_task(tmp_path: Path) -> None:
    builder = Builder(with_stacks())
    for index, state in enumerate((0x8000_0000, RUNNABLE_STATE, ASLEEP_STATE, BLOCKED_STATE, 0x2001, 0x402)):
        builder.sample(100 + index, "call", 1, state)
    frame = analysed(builder, tmp_path).samples.frame
    assert frame["state"].tolist() == [*STATES, "asleep", "blocked"]


class TestCommand:
    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("stallscope")), "export", *words], capture_output=True, text=True
        )

    def test_writes_samples(self, tmp_path: Path) -> None:
        done = self.run(str(DATA / "sampled.stall"), "-f", "folded", "--samples", "-o", "-")
        assert done.returncode == 0, done.stderr
        assert "keysCommand;dictNext 140000\n" in done.stdout
        profiles = tmp_path / "a.json"
        assert (
            self.run(str(DATA / "sampled.stall"), "-f", "speedscope", "--samples", "-o", str(profiles)).returncode == 0
        )
        assert json.loads(profiles.read_text())["profiles"]

    @pytest.mark.parametrize(
        ("name", "format_name", "why"),
        [
            ("sampled", "perfetto", "use --samples with -f speedscope or folded"),
            ("known-call", "folded", "has no stack samples; record with --stacks"),
        ],
    )
    def test_refuses_what_has_none(self, name: str, format_name: str, why: str, tmp_path: Path) -> None:
        done = self.run(str(DATA / f"{name}.stall"), "-f", format_name, "--samples", "-o", str(tmp_path / "x"))
        assert done.returncode == 2
        assert why in done.stderr
        assert len(done.stderr.splitlines()) == 1
