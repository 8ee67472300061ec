"""What a recording takes after it was made: seconds and peak memory of load, analysis and report, and of the page.

Each size is worked through in a process of its own (``stages.py``), on a recording of that many rows
(``synthetic.py``); the page is then opened in a headless Chromium. Needs no root.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import synthetic
from figures import BenchError, Figure, Findings

HERE = Path(__file__).resolve().parent
SIZES = (1_000_000, 3_000_000, 10_000_000)
GOAL_S, GOAL_MB = 20.0, 3 * 1024
GOAL_PAGE_MB, GOAL_OPEN_S = 12.0, 3.0
MOST_GROWTH = 1.3
"""Time per event at the largest size, against the smallest, that still counts as linear."""

_OPENED = 5


def bench(*, quick: bool) -> Findings:
    """Return seconds, peak memory, page size and opening time for 1, 3 and 10 million events (quick: 1 and 3)."""
    found = Findings("analysis: a recording of so many events, from the file to the page")
    sizes = SIZES[:2] if quick else SIZES
    per_event = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="stallscope-bench-") as name:
            recording, page = Path(name) / "bench.stall", Path(name) / "bench.html"
            rows = synthetic.write(recording, size)
            stages = _stages(recording, page)
            total_s = sum(stage["seconds"] for stage in stages)
            per_event.append(total_s / rows)
            largest = size == SIZES[-1]
            _add_stages(found, f"{size // 1_000_000} million", stages, total_s, goals=largest)
            page_mb = page.stat().st_size / 1e6
            found.figures.append(
                Figure("  page, MB", [page_mb], goal=f"under {GOAL_PAGE_MB:.0f} MB" if largest else "",
                       met=page_mb < GOAL_PAGE_MB)
            )  # fmt: skip
            try:
                opened = _opening_s(page)
            except BenchError as error:
                found.notes.append(f"not opened: {error}")
                continue
            goal, met = f"under {GOAL_OPEN_S:.0f} s", statistics.median(opened) < GOAL_OPEN_S
            found.figures.append(
                Figure("  page opened and drawn in Chromium, s", opened, goal=goal if largest else "", met=met)
            )
    growth = per_event[-1] / per_event[0]
    found.figures.append(
        Figure("time per event at the largest size, against the smallest", [growth],
               goal=f"linear: at most {MOST_GROWTH}", met=growth <= MOST_GROWTH)
    )  # fmt: skip
    return found


def _stages(recording: Path, page: Path) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "stages.py"), str(recording), str(page)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"stages.py failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    stages: list[dict[str, Any]] = json.loads(done.stdout)
    return stages


def _add_stages(found: Findings, size: str, stages: list[dict[str, Any]], total_s: float, *, goals: bool) -> None:
    peak_mb = max(stage["peak_mb"] for stage in stages)
    found.figures += [
        Figure(f"{size}: all stages, s", [total_s],
               goal=f"under {GOAL_S:.0f} s" if goals else "", met=total_s < GOAL_S),
        Figure("  peak memory, MB", [peak_mb],
               goal=f"under {GOAL_MB} MB" if goals else "", met=peak_mb < GOAL_MB),
    ]  # fmt: skip
    for stage in stages:
        found.figures += [
            Figure(f"  {stage['name']}, s", [stage["seconds"]]),
            Figure(f"  {stage['name']}, peak MB", [stage["peak_mb"]]),
        ]


def _opening_s(page: Path) -> list[float]:
    """Return how long a browser took from the start of the navigation until everything was drawn, several times."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise BenchError("playwright is not installed") from error
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise BenchError("there is no Chromium; apt-get install chromium")
    seconds = []
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(_OPENED):
            tab = running.new_page(viewport={"width": 1366, "height": 768})
            tab.goto(page.as_uri(), wait_until="commit")
            tab.wait_for_selector("html[data-ready=true]", state="attached")
            seconds.append(tab.evaluate("performance.getEntriesByName('drawn')[0].startTime") / 1000)
            tab.close()
        running.close()
    return seconds
