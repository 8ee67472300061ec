"""``stallscope watch`` on real servers: what it captures, what is in a capture, and what it outlives."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from lab.server import Server, running_server
from tracing import Rows, built, until
from watch_process import Watch, connecting, iterations, stopped, watching_closely

from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.manifest import Manifest

MS = 1_000_000
BACKLOG = 5
FLUSHED = 7
"""Commands, one call of flushallCommand each."""


def triggers(manifest: Manifest) -> list[str]:
    return [trigger.text for trigger in manifest.triggers]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server(built("2.8.17"), backlog=BACKLOG) as running:
        yield running


@pytest.fixture(scope="module")
def watch(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    wanted = ("stall>50ms", "overflow>0", "backlog>80% for 100ms", "call:flushallCommand>1us")
    with watching_closely(tmp_path_factory.mktemp("watch"), server, *wanted) as running:
        since_ns = time.monotonic_ns()
        until(lambda: time.monotonic_ns() - since_ns > 3000 * MS, "there is a whole pre-roll")
        yield running


@pytest.fixture(scope="module")
def rows(server: Server, watch: Watch) -> Rows:
    """The capture of one stall of 0.4 s."""
    seen = len(watch.captured())
    server.command("DEBUG", "SLEEP", "0.4")
    return watch.capture(seen)


class TestStall:
    def test_it_is_captured_whole(self, rows: Rows) -> None:
        assert rows.recording.complete
        (span,) = iterations(rows, 390 * MS)
        assert triggers(rows.manifest)[0] == "stall>50ms"
        assert span[0] <= rows.manifest.triggers[0].time_ns <= span[1]

    def test_while_it_lasted(self, rows: Rows) -> None:
        assert rows.manifest.triggers[0].under_way
        (span,) = iterations(rows, 390 * MS)
        (detail,) = rows.manifest.details
        assert detail.trigger_ns <= detail.attached_ns <= span[1], "detail is attached while the stall lasts"

    def test_with_what_was_before_and_after(self, rows: Rows) -> None:
        manifest = rows.manifest
        first, last = manifest.triggers[0].time_ns, manifest.triggers[-1].time_ns
        assert manifest.started_ns <= first - 1900 * MS
        assert manifest.ended_ns >= last + 1000 * MS
        crons = rows.of("serverCron")
        assert (crons["start_ns"] < first).sum() >= 10
        assert (crons["start_ns"] > last).sum() >= 5

    def test_counters_agree_with_the_rows(self, rows: Rows) -> None:
        assert rows.recording.counters is not None
        for probe, counters in rows.recording.counters.by_probe.items():
            mine = rows.all[(rows.all["probe"] == probe) & rows.all["is_finished"]]
            assert len(mine) == counters.sent
            assert counters.lost == counters.lost_starts == 0
        assert rows.counters("serverCron").sent > 0

    def test_detail_is_there_from_the_trigger_on(self, rows: Rows) -> None:
        (detail,) = rows.manifest.details
        resize = rows.of("clientsCronResizeQueryBuffer")
        assert {rows.probes("clientsCronResizeQueryBuffer")[0].id} <= set(detail.probes)
        assert rows.probes("serverCron")[0].id not in detail.probes
        assert (resize["start_ns"] >= detail.trigger_ns).all()

    def test_what_it_slept_in_was_seen_although_it_slept_already(self, rows: Rows) -> None:
        analysis = analyse(rows.recording)
        asleep = analysis.samples.in_stalls()
        asleep = asleep[asleep["state"] != "running"]
        longest = asleep.loc[asleep["weight_ns"].idxmax()]
        names = [frame.name for frame in analysis.samples.functions_of(int(longest["stack"]))]
        assert "debugCommand" in names
        (detail,) = rows.manifest.details
        (span,) = iterations(rows, 390 * MS)
        assert 0 < longest["weight_ns"] <= span[1] - detail.trigger_ns


def test_a_busy_stall_has_its_stacks(server: Server, watch: Watch) -> None:
    """They are taken while it lasts; a server that sleeps since before the trigger is not sampled."""
    seen = len(watch.captured())
    server.command("EVAL", "local n = 0 for i = 1, 30000000 do n = n + i % 7 end return n", "0")
    rows = watch.capture(seen)
    (span,) = [span for span in iterations(rows, 200 * MS) if span[1] >= rows.manifest.triggers[0].time_ns]
    samples = rows.of("stack sample")
    inside = samples[(samples["start_ns"] >= span[0]) & (samples["start_ns"] <= span[1]) & (samples["stack"] >= 0)]
    functions = {frame.function for stack in inside["stack"] for frame in rows.recording.stacks.stack(int(stack))}
    assert "luaV_execute" in functions, functions


class TestOtherTriggers:
    def test_a_culprit_nobody_named(self, server: Server, watch: Watch) -> None:
        seen = len(watch.captured())
        server.command("EVAL", "local n = 0; while n < 30000000 do n = n + 1 end; return n", "0")
        analysis = analyse(watch.capture(seen).recording)
        assert "evalGenericCommand" in {culprit.function for culprit in analysis.samples.culprits}
        assert (analysis.samples.frame["stack"] >= 0).all()

    def test_a_call(self, server: Server, watch: Watch) -> None:
        seen = len(watch.captured())
        for _ in range(FLUSHED):
            server.command("FLUSHALL")
        rows = watch.capture(seen)
        assert set(triggers(rows.manifest)) == {"call:flushallCommand>1us"}
        assert len(rows.of("flushallCommand")) == FLUSHED
        assert rows.probes("flushallCommand")[0].id not in rows.manifest.details[0].probes, (
            "it is attached all the time"
        )

    def test_overflow_and_backlog(self, server: Server, watch: Watch) -> None:
        seen = len(watch.captured())
        with stopped(server), connecting(server, 4 * BACKLOG):
            until(lambda: any("overflow>0" in line for line in watch.triggered()), "the overflow is told of")
            until(lambda: any("backlog>80%" in line for line in watch.triggered()), "the backlog is told of")
        rows = watch.capture(seen)
        assert {"overflow>0", "backlog>80% for 100ms"} <= set(triggers(rows.manifest))
        overflow = next(item for item in rows.manifest.triggers if item.text == "overflow>0")
        assert (overflow.unit, overflow.pid, overflow.subject) == (
            "connections", server.pid, f"127.0.0.1:{server.port}",
        )  # fmt: skip
        (namespace,) = rows.manifest.namespaces
        refused = namespace.counters_end["ListenOverflows"] - namespace.counters_start["ListenOverflows"]
        assert refused >= overflow.value >= 1
        assert rows.of("accept queue")["queue_length"].max() == BACKLOG + 1
        queue = rows.of("accept queue")
        assert (queue["start_ns"] <= overflow.time_ns).any()

    def test_triggers_that_overlap_extend_one_capture(self, server: Server, watch: Watch) -> None:
        seen = len(watch.captured())
        told = watch.said.count("trigger: stall>50ms")
        for number in range(1, 4):
            server.command("DEBUG", "SLEEP", "0.1")
            watch.wait_until_it_says("trigger: stall>50ms", times=told + number)
        rows = watch.capture(seen)
        first_ns = rows.manifest.triggers[0].time_ns
        assert len([end_ns for _, end_ns in iterations(rows, 95 * MS) if end_ns >= first_ns]) == 3
        assert triggers(rows.manifest).count("stall>50ms") == 3
        assert rows.manifest.ended_ns >= rows.manifest.triggers[-1].time_ns + 1000 * MS
