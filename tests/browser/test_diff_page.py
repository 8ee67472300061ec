"""The comparison's page in a real browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from opened import LAPTOP, Open, Opened
from recordings import DATA, Builder, quiet

from stallscope.reports.comparison.compute import compute_sides
from stallscope.reports.comparison.page import PageText, render
from stallscope.reports.timeline.tables import Cell, Row, Table
from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.recording import read_recording

TEXT = PageText(
    "storm, calm",
    "2 of 3 quantities are <lower>.",
    "calm",
    ("before: storm", "after: calm"),
    ("other load",),
    ("bootstrap",),
)
CHANGES = (("b", "-1%", -1.0), ("a", "~", 0.0), ("c", "+12%", 12.0))
TABLE = Table(
    (("quantity", False), ("change", True)),
    tuple(Row((Cell(name, name), Cell(text, key))) for name, text, key in CHANGES),
)


def golden(name: str) -> Analysis:
    return analyse(read_recording(DATA / f"{name}.stall"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    path = folder / "diff.html"
    sides = compute_sides([golden("known-call"), golden("two-stalls")], [golden("slow-drain")])
    path.write_text(render(TEXT, [("What changed", TABLE)], sides), encoding="utf-8")
    return path


def traces(shown: Opened, chart: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = shown.page.evaluate(
        "id => document.getElementById(id).data.map(({name, meta, x, y, values, labels, hovertext}) => "
        "({name, meta, x, y, values, labels, hovertext}))",
        chart,
    )
    return found


def test_all_charts_are_drawn(opened: Open, page: Path) -> None:
    shown = opened(page)
    lanes = traces(shown, "timelines")
    assert [trace["meta"] for trace in lanes] == [
        f"{kind} {place}" for place in range(3) for kind in ("stalls", "queue", "refused")
    ]
    assert max(lanes[0]["y"]) == 620
    assert "43 refused" in lanes[0]["hovertext"][0]
    assert [trace["name"].split()[0] for trace in traces(shown, "ecdf")] == ["before", "after"][
        : len(traces(shown, "ecdf"))
    ]
    assert shown.page.locator("#verdict").text_content() == TEXT.verdict
    assert shown.page.locator("#loading").count() == 0
    shown.picture("comparison", whole=True)


def test_another_function_is_chosen(opened: Open, page: Path) -> None:
    shown = opened(page, viewport=LAPTOP)
    names = shown.page.locator("#function option").all_text_contents()
    shown.page.select_option("#function", label="je_pages_purge")
    shown.page.wait_for_function("document.getElementById('ecdf').layout.xaxis.title.text.includes('je_pages_purge')")
    assert len(names) == len(set(names))
    before = traces(shown, "ecdf")[0]
    assert before["y"][-1] == 1
    assert before["x"] == sorted(before["x"])


def test_the_graph_has_the_width_of_either_side(opened: Open, page: Path) -> None:
    shown = opened(page)
    (after,) = traces(shown, "graph")
    shown.page.select_option("#width", label="before")
    shown.page.wait_for_function("document.getElementById('graph').data[0].labels[0] === 'all calls before'")
    (before,) = traces(shown, "graph")
    assert after["labels"][0] == "all calls after"
    assert before["values"] != after["values"]
    assert "sdsRemoveFreeSpace" in before["labels"]


def test_a_table_is_sorted_by_its_numbers(opened: Open, page: Path) -> None:
    shown = opened(page)
    column = "main table tbody tr td:first-child"
    shown.page.locator("th button", has_text="change").click()
    assert shown.page.locator(column).all_text_contents() == ["b", "a", "c"]
    shown.page.locator("th button", has_text="change").click()
    assert shown.page.locator(column).all_text_contents() == ["c", "a", "b"]


def test_dark(opened: Open, page: Path) -> None:
    shown = opened(page)
    light = shown.page.evaluate("document.getElementById('timelines').layout.paper_bgcolor")
    shown.page.click("#dark")
    shown.page.wait_for_function(f"document.getElementById('timelines').layout.paper_bgcolor !== '{light}'")
    shown.picture("comparison-dark", whole=True)


def test_nothing_was_recorded(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    empty = analyse(read_recording(quiet(Builder(), 1000).write(tmp_path / "e.stall", 1000)))
    path.write_text(render(TEXT, [], compute_sides([empty], [empty])), encoding="utf-8")
    shown = opened(path)
    assert shown.page.locator(".none").count() == 2
