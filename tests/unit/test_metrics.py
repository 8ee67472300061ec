"""Metrics: what a scrape says is what happened, whoever scrapes; the dashboard and alerts ask for what there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from recordings import CRON, DATA, ITERATION_ID, MS, PID, PURGE, Builder, add_storm, at, hooked_manifest, manifest

from stallscope.tracer.errors import UsageError
from stallscope.tracer.layout import EVENT
from stallscope.tracer.manifest import ProbeCounters
from stallscope.tracer.recording import read_recording
from stallscope.tracer.watch.aftercare import AfterResult
from stallscope.tracer.watch.evaluation import TriggerState
from stallscope.tracer.watch.folder import Kept
from stallscope.tracer.watch.metrics import COUNTER, FORGET_NS, HISTOGRAM, METRICS, WatchMetrics
from stallscope.tracer.watch.triggers import parse_triggers
from stallscope.tracer.watch.writer import Finished

PACKAGING = Path(__file__).parents[2] / "packaging"
SERVER = {"server": "127.0.0.1:6379", "pid": str(PID)}
LISTENER = {"listener": "127.0.0.1:6379", "pid": str(PID)}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")


def scraped(metrics: WatchMetrics) -> str:
    """Return what Prometheus would get."""
    port = metrics.serve("127.0.0.1", 0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())
    finally:
        metrics.close()


def scrape(metrics: WatchMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return every sample by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(scraped(metrics))
        for sample in family.samples
    }


def value(samples: dict[Any, float], name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def filled() -> WatchMetrics:
    """Return metrics after one storm of a hooked kernel."""
    made = WatchMetrics("1.2.3", parse_triggers(["stall>50ms", "overflow>0", "lost>0"]))
    made.follow(hooked_manifest(), at(0))
    builder = add_storm(Builder(hooked_manifest()).queue(900, 1, 40).counter(900, 900), 1000)
    builder.request(1500, "SYN refused: accept queue full", 40_000).enters(1700, 40_000, 5)
    builder.span(ITERATION_ID, 3000, None)
    events = builder.events()
    state = TriggerState(parse_triggers(["stall>50ms", "overflow>0"]))
    state.follow(hooked_manifest())
    made.observe(events)
    made.fired(state.observe(events, at(2000)))
    made.queues(state.queues)
    made.counters(
        {
            ITERATION_ID: ProbeCounters(hits=101, sent=1, short_calls=100, short_ns=30 * MS),
            CRON: ProbeCounters(hits=8, sent=1, short_calls=5, short_ns=2 * MS, lost=2, thinned=1),
        }
    )
    done = Finished(Path("a"), True, (), 0, 1, 5, 100, unwritten=3)
    failed = replace(done, path=None, complete=False)
    kept = [Kept(1, Path("a"), 100)]
    made.captures([done, failed], kept, 4, 1_790_000_000 * 10**9, capturing=True)
    made.aftercare([AfterResult(Path("a"), "exec", False, "ended with exit code 1", 5)])
    made.detail(attached=True, took_ns=80 * MS)
    made.own(cpu_ns=2 * 10**9, memory_bytes=5, share=0.004, limit=0.01, preroll_bytes=7, preroll_dropped=8)
    return made


EXPECTED: list[tuple[str, dict[str, str], float]] = [
    ("iteration_duration_seconds_count", SERVER, 1),
    ("iteration_duration_seconds_sum", SERVER, 0.62),
    ("iteration_duration_seconds_bucket", {**SERVER, "le": "0.5"}, 0),
    ("iteration_duration_seconds_bucket", {**SERVER, "le": "1.0"}, 1),
    ("iteration_duration_seconds_bucket", {**SERVER, "le": "+Inf"}, 1),
    ("short_iterations_total", {}, 100),
    ("short_iteration_seconds_total", {}, 0.03),
    ("call_duration_seconds_count", {**SERVER, "function": "je_pages_purge"}, 5),
    ("call_duration_seconds_sum", {**SERVER, "function": "je_pages_purge"}, 0.1),
    ("short_calls_total", {"function": "serverCron"}, 5),
    ("short_call_seconds_total", {"function": "serverCron"}, 0.002),
    ("overflows_total", LISTENER, 43),
    ("drops_total", LISTENER, 43),
    ("requests_total", {**LISTENER, "path": "SYN refused: accept queue full"}, 1),
    ("requests_total", {**LISTENER, "path": "connection accepted"}, 1),
    ("accept_queue_length", LISTENER, 2),
    ("accept_queue_limit", LISTENER, 511),
    ("servers", {}, 1),
    ("triggers_total", {"trigger": "stall>50ms"}, 1),
    ("triggers_total", {"trigger": "overflow>0"}, 1),
    ("triggers_total", {"trigger": "lost>0"}, 0),
    ("captures_total", {"result": "complete"}, 1),
    ("captures_total", {"result": "cut short"}, 0),
    ("captures_total", {"result": "failed"}, 1),
    ("capturing", {}, 1),
    ("last_capture_timestamp_seconds", {}, 1_790_000_000),
    ("suppressed_triggers_total", {}, 4),
    ("kept_captures", {}, 1),
    ("kept_bytes", {}, 100),
    ("aftercare_total", {"step": "exec", "result": "failed"}, 1),
    ("detail_attached", {}, 1),
    ("detail_attach_seconds_bucket", {"le": "0.05"}, 0),
    ("detail_attach_seconds_bucket", {"le": "0.1"}, 1),
    ("lost_events_total", {"probe": "serverCron"}, 2),
    ("thinned_events_total", {"probe": "serverCron"}, 1),
    ("probe_hits_total", {"probe": "event loop iteration"}, 101),
    ("unwritten_events_total", {}, 6),
    ("preroll_bytes", {}, 7),
    ("preroll_dropped_events_total", {}, 8),
    ("overhead_ratio", {}, 0.004),
    ("overhead_limit_ratio", {}, 0.01),
    ("own_cpu_seconds_total", {}, 2),
    ("own_memory_bytes", {}, 5),
    ("build_info", {"version": "1.2.3"}, 1),
]


def test_a_scrape_says_what_happened() -> None:
    found = scrape(filled())
    for name, labels, expected in EXPECTED:
        assert value(found, f"stallscope_{name}", **labels) == pytest.approx(expected), (name, labels)
    exported = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name, _ in found}
    assert exported == set(METRICS), "each is exported, and nothing else"


def test_before_anything_happened_what_has_no_label_is_zero() -> None:
    found = scrape(WatchMetrics("1"))
    assert value(found, "stallscope_servers") == 0
    assert value(found, "stallscope_detail_attach_seconds_count") == 0
    assert value(found, "stallscope_captures_total", result="failed") == 0
    assert not [name for name, labels in found if dict(labels).keys() & {"pid", "listener"}]


def test_counters_never_go_back_when_a_probe_is_detached() -> None:
    metrics = WatchMetrics("1")
    metrics.follow(manifest(), at(0))
    metrics.counters({CRON: ProbeCounters(hits=8, lost=2)})
    metrics.counters({CRON: ProbeCounters(hits=3, lost=0)})
    metrics.counters({})
    assert value(scrape(metrics), "stallscope_lost_events_total", probe="serverCron") == 2


def test_a_server_that_is_gone_is_forgotten_after_a_while_and_a_restart_is_another() -> None:
    metrics = WatchMetrics("1")
    before = manifest()
    metrics.follow(before, at(0))
    assert value(scrape(metrics), "stallscope_iteration_duration_seconds_count", **SERVER) == 0
    metrics.observe(Builder().span(ITERATION_ID, 1, 60).span(PURGE, 2, 5).events())
    old = replace(before.targets[0], end_ns=at(1000))
    new = replace(before.targets[0], pid=5000, start_ns=at(1500))
    listener = replace(before.listeners[0], index=1, pid=5000)
    after = replace(before, targets=(old, new), listeners=(*before.listeners, listener))
    metrics.follow(after, at(2000))
    found = scrape(metrics)
    assert value(found, "stallscope_iteration_duration_seconds_count", **SERVER) == 1, "for the last scrape"
    assert value(found, "stallscope_servers") == 1
    metrics.follow(after, at(1000) + FORGET_NS + 1)
    events = Builder().span(ITERATION_ID, 9000, 60).events()
    events["pid"] = 5000
    metrics.observe(events)
    found = scrape(metrics)
    assert {labels["pid"] for _, items in found for labels in [dict(items)] if "pid" in labels} == {"5000"}
    assert value(found, "stallscope_iteration_duration_seconds_count", server="127.0.0.1:6379", pid="5000") == 1


def test_series_are_bounded_whatever_comes() -> None:
    metrics = WatchMetrics("1")
    metrics.follow(manifest(), at(0))
    events = np.zeros(5000, EVENT)
    events["probe"], events["pid"], events["duration_ns"] = ITERATION_ID, np.arange(5000), 60 * MS
    metrics.observe(events)
    family = next(family for family in metrics.collect() if family.name == "stallscope_iteration_duration_seconds")
    assert sum(sample.name.endswith("_count") for sample in family.samples) == 4096


def test_an_address_that_is_taken_is_said() -> None:
    one, other = WatchMetrics("1"), WatchMetrics("1")
    port = one.serve("127.0.0.1", 0)
    try:
        with pytest.raises(UsageError, match=rf"cannot serve metrics on 127.0.0.1 port {port}: .*; choose another"):
            other.serve("127.0.0.1", port)
    finally:
        one.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)


def test_golden_recordings_can_be_metrics_too() -> None:
    """Events of every kind, with what was damaged or never ended."""
    for path in sorted(DATA.glob("*.stall")):
        recording = read_recording(path)
        events = np.zeros(recording.table.num_rows, EVENT)
        for name in ("start_ns", "duration_ns", "pid", "tid", "probe", "cpu", "stack"):
            events[name] = recording.table.column(name).to_numpy()
        metrics = WatchMetrics("1")
        metrics.follow(recording.manifest, recording.manifest.started_ns)
        metrics.observe(events)
        assert list(metrics.collect()), path


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\bstallscope_[a-z_]+", expression))


def known_names() -> set[str]:
    """Return every name that Prometheus has after a scrape."""
    names = set()
    for name, info in METRICS.items():
        endings = {COUNTER: ("_total",), HISTOGRAM: ("_bucket", "_sum", "_count")}.get(info.kind, ("",))
        names |= {name + ending for ending in endings}
    return names


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((PACKAGING / "grafana-dashboard.json").read_text())
    return loaded


def asked(board: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return every query of every panel, with the panel's title."""
    return [(panel["title"], target) for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    board = dashboard()
    expressions = [(title, target["expr"]) for title, target in asked(board)]
    expressions += [("annotation", item["expr"]) for item in board["annotations"]["list"]]
    expressions += [
        ("variable", item["query"]["query"]) for item in board["templating"]["list"] if item["type"] == "query"
    ]
    assert len(expressions) > 15
    for title, expression in expressions:
        assert names_in(expression), title
        assert names_in(expression) <= known_names(), (title, expression)


def test_the_dashboard_uses_labels_its_metrics_have() -> None:
    for title, target in asked(dashboard()):
        (name,) = names_in(target["expr"])
        metric = re.sub(r"_(total|bucket|sum|count)$", "", name)
        labels = {*METRICS[metric].labels, "le", "instance", "job"}
        for group in re.findall(r"\bby \(([^)]*)\)", target["expr"]):
            assert {label.strip() for label in group.split(",")} <= labels, (title, target["expr"])
        assert set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", ""))) <= labels, title


def test_the_dashboard_has_every_panel_once_and_in_place() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns, rows = (range(place[at], place[at] + place[size]) for at, size in (("x", "w"), ("y", "h")))
        assert columns.stop <= 24
        cells = {(x, y) for x in columns for y in rows}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_alert_rules_ask_for_metrics_that_there_are() -> None:
    text = (PACKAGING / "prometheus-alerts.yml").read_text()
    expressions = "".join(line for line in text.splitlines(keepends=True) if not line.lstrip().startswith("#"))
    assert names_in(expressions)
    assert names_in(expressions) <= known_names()


def promtool(*arguments: str, text: str | None = None) -> str:
    """Return what promtool says; it must be content."""
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], cwd=PACKAGING, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_promtool
def test_promtool_takes_the_alert_rules_and_they_fire_when_they_should() -> None:
    assert "SUCCESS: 7 rules found" in promtool("check", "rules", "prometheus-alerts.yml")
    assert "SUCCESS" in promtool("test", "rules", str(Path(__file__).with_name("alerts_test.yml")))


@needs_promtool
def test_promtool_finds_nothing_wrong_with_a_scrape() -> None:
    assert promtool("check", "metrics", text=scraped(filled())) == ""


@needs_promtool
def test_promtool_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": target["expr"].replace("$__rate_interval", "1m")}
        for number, (_, target) in enumerate(asked(dashboard()))
    ]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    promtool("check", "rules", str(path))
