"""``stallscope watch`` where the kernel can be hooked: exact iterations always, every overflow as a row of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
from lab.server import Server, running_server
from listeners import ACCEPT_QUEUE_FULL, OVERFLOWS, require_kernel_probes
from tracing import Rows, built, until
from watch_process import Watch, connecting, iterations, watching_closely

from stallscope.tracer.capture.event_loop import TRACEPOINT_RUNG, plan_loop

MS = 1_000_000
HOUR_NS = 3_600_000 * MS
BACKLOG = 5
CONNECTS = 23
SLEEP_S = "2"


@pytest.fixture(scope="module", autouse=True)
def hooked() -> None:
    require_kernel_probes()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server(built("2.8.17"), backlog=BACKLOG) as running:
        yield running


@pytest.fixture(scope="module")
def watch(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    with watching_closely(tmp_path_factory.mktemp("watch"), server, "stall>500ms", "overflow>0") as running:
        yield running


def captured_stall(server: Server, watch: Watch) -> Rows:
    """Return the capture of a stall in which more connect than the accept queue holds."""
    seen, triggered = len(watch.captured()), len(watch.triggered())
    sleep = threading.Thread(target=server.command, args=("DEBUG", "SLEEP", SLEEP_S))
    sleep.start()
    until(lambda: len(watch.triggered()) > triggered, "the stall triggers")
    with connecting(server, CONNECTS):
        sleep.join()
        return watch.capture(seen)


@pytest.fixture(scope="module")
def rows(server: Server, watch: Watch) -> Rows:
    return captured_stall(server, watch)


def test_nothing_is_sampled_that_can_be_hooked(rows: Rows, watch: Watch) -> None:
    assert rows.manifest.rungs["event loop"] == plan_loop().rung != TRACEPOINT_RUNG
    assert "not per event" not in rows.manifest.rungs["overflows"]
    assert "refused connections are sampled" not in watch.said


def test_a_stall_in_progress_and_what_it_had_refused_are_one_capture(rows: Rows) -> None:
    assert rows.recording.complete
    stall_text, *others = [trigger.text for trigger in rows.manifest.triggers]
    assert stall_text == "stall>500ms"
    assert set(others) == {"overflow>0"}, "once, or again when the refused try again"
    assert rows.manifest.triggers[0].under_way
    (stall,) = iterations(rows, 1900 * MS)
    (detail,) = rows.manifest.details
    assert stall[0] < detail.trigger_ns <= detail.attached_ns < stall[1]


def test_every_refusal_is_a_row_and_the_kernel_counted_as_many(rows: Rows) -> None:
    refused = rows.of(ACCEPT_QUEUE_FULL)
    assert len(set(refused["peer_port"])) == CONNECTS - (BACKLOG + 1)
    (stall,) = iterations(rows, 1900 * MS)
    assert refused["start_ns"].between(*stall).all()
    (namespace,) = rows.manifest.namespaces
    gained = namespace.counters_end["ListenOverflows"] - namespace.counters_start["ListenOverflows"]
    assert gained == namespace.seen["ListenOverflows"] == sum(len(rows.of(name)) for name in OVERFLOWS)


def test_short_iterations_are_counted_and_those_with_the_calls_are_rows(rows: Rows) -> None:
    counters = rows.counters("event loop iteration")
    assert counters.lost == counters.lost_starts == 0
    assert counters.hits > len(rows.of("event loop iteration")) > 0


@pytest.mark.skipif("STALLSCOPE_OUT" not in os.environ, reason="sets the clock: only in the test machine")
def test_a_clock_that_is_set_changes_the_time_of_day_and_nothing_else(server: Server, watch: Watch, rows: Rows) -> None:
    time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + HOUR_NS)
    try:
        later = captured_stall(server, watch)
        assert later.recording.complete
        (stall,) = iterations(later, 1900 * MS)
        assert later.manifest.started_ns >= rows.manifest.ended_ns
        assert later.manifest.triggers[0].time_ns - later.manifest.started_ns >= 1900 * MS
        moved_ns = later.manifest.wall_offset_ns - rows.manifest.wall_offset_ns
        assert abs(moved_ns - HOUR_NS) < 60_000 * MS
        assert abs(later.manifest.wall_offset_end_ns - later.manifest.wall_offset_ns) < 1000 * MS
        assert abs(stall[1] + later.manifest.wall_offset_ns - time.time_ns()) < 60_000 * MS
    finally:
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() - HOUR_NS)
