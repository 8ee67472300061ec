"""speedscope itself, in a headless browser, opens its own format and the folded stacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stallscope.tracer.analysis.analysis import Analysis

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")

NS_PER_US = 1000

Imported = Callable[[Path], dict[str, Any]]
Of = Callable[[str], Analysis]
Export = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def imported(speedscope_page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Imported]:
    """Return what speedscope imported from a file, in the words of its own export."""
    folder = tmp_path_factory.mktemp("speedscope")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--use-gl=swiftshader", "--ignore-gpu-blocklist"]
        )

        def load(file: Path) -> dict[str, Any]:
            page = browser.new_page(accept_downloads=True)
            page.goto(speedscope_page.as_uri())
            page.locator("input[type=file]").set_input_files(file)
            page.get_by_text("Export").wait_for()
            with page.expect_download() as download:
                page.get_by_text("Export").click()
            saved = folder / download.value.suggested_filename
            download.value.save_as(saved)
            page.close()
            document: dict[str, Any] = json.loads(saved.read_text())
            return document

        yield load
        browser.close()


def self_times(document: dict[str, Any], profile: dict[str, Any]) -> dict[tuple[str, ...], int]:
    """Return the self time of each path of a profile, from its entries and returns."""
    names = [frame["name"] for frame in document["shared"]["frames"]]
    times: dict[tuple[str, ...], int] = {}
    stack: list[str] = []
    since = 0
    for event in profile["events"]:
        if stack:
            times[tuple(stack)] = times.get(tuple(stack), 0) + event["at"] - since
        since = event["at"]
        if event["type"] == "O":
            stack.append(names[event["frame"]])
        else:
            assert stack.pop() == names[event["frame"]]
    assert stack == []
    return {path: time for path, time in times.items() if time}


def recorded_self_times(analysis: Analysis, tid: int) -> dict[tuple[str, ...], int]:
    calls = analysis.nested.calls
    names = {probe.id: probe.name for probe in analysis.manifest.probes}
    times: dict[tuple[str, ...], int] = {}
    for row in calls.loc[calls["tid"] == tid].itertuples():
        path = tuple(names[probe] for probe in analysis.nested.path(row.path))
        times[path] = times.get(path, 0) + row.self_ns
    return {path: time for path, time in times.items() if time}


@pytest.mark.parametrize("name", ["known-call", "two-stalls", "cut-short", "mixed"])
def test_speedscope_has_the_self_time_of_every_path(
    name: str, imported: Imported, export: Export, analysis_of: Of
) -> None:
    analysis = analysis_of(name)
    document = imported(export(name, "speedscope"))
    threads = [profile for profile in document["profiles"] if not profile["name"].startswith("stalls of")]
    calls = analysis.nested.calls
    by_time = calls.groupby("tid")["self_ns"].sum().sort_values(ascending=False)
    assert len(threads) == len(by_time)
    for profile, tid in zip(threads, by_time.index, strict=True):
        assert (profile["type"], profile["unit"]) == ("evented", "nanoseconds")
        assert self_times(document, profile) == recorded_self_times(analysis, tid)
        first_ns = min(0, int(calls.loc[calls["tid"] == tid, "start_ns"].min()) - analysis.manifest.started_ns)
        last_ns = analysis.tables.end_ns - analysis.manifest.started_ns
        # speedscope counts from the first value on
        assert (profile["startValue"], profile["endValue"]) == (0, last_ns - first_ns)


def test_speedscope_has_the_stalls(imported: Imported, export: Export) -> None:
    document = imported(export("two-stalls", "speedscope"))
    (profile,) = [profile for profile in document["profiles"] if profile["name"].startswith("stalls of")]
    assert [event["at"] for event in profile["events"]] == [1_000_000_000, 1_620_000_000, 1_690_000_000, 2_310_000_000]


def test_speedscope_opens_a_recording_without_calls(imported: Imported, export: Export) -> None:
    (profile,) = imported(export("empty", "speedscope"))["profiles"]
    assert (profile["name"], profile["events"], profile["endValue"]) == ("no calls", [], 2_000_000_000)


@pytest.mark.parametrize("name", ["known-call", "mixed"])
def test_speedscope_reads_the_folded_stacks(name: str, imported: Imported, export: Export, analysis_of: Of) -> None:
    """The same self times in whole microseconds, below a frame for the thread."""
    document = imported(export(name, "folded"))
    (profile,) = document["profiles"]
    analysis = analysis_of(name)
    expected: dict[tuple[str, ...], int] = {}
    processes = {4711: "redis-server 2.8.17", 4712: "valkey-server 8.1"}
    for pid, tid in analysis.nested.calls[["pid", "tid"]].drop_duplicates().to_numpy().tolist():
        root = f"{processes[pid]} ({pid})" + ("" if pid == tid else f" thread {tid}")
        for path, time_ns in recorded_self_times(analysis, tid).items():
            expected[(root, *path)] = round(time_ns / NS_PER_US)
    assert self_times(document, profile) == {path: time for path, time in expected.items() if time}
    assert profile["endValue"] == sum(expected.values())
