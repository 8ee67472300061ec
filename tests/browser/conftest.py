"""A headless Chromium and pages opened in it; what a page may never do is checked when it is closed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent / "unit")]

ARTEFACTS = Path(os.environ.get("STALLSCOPE_ARTEFACTS", ROOT / "build" / "browser"))
"""Where screenshots go; git ignores build/."""

LAPTOP, DESKTOP = {"width": 1366, "height": 768}, {"width": 1280, "height": 800}
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


# by module: while it runs, its event loop counts as running in this thread, and nobody else may start one
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium here; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=_ARGUMENTS)
        yield running
        running.close()


class Opened:
    """A page with a recording's timeline, and what a test wants to know of it."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def ranges(self) -> list[list[float]]:
        """Return the range of every time axis, in seconds."""
        found: list[list[float]] = self.page.evaluate(
            "Object.entries(document.getElementById('chart')._fullLayout)"
            ".filter(([name]) => /^xaxis\\d*$/.test(name)).map(([, axis]) => axis.range.map(Number))"
        )
        return found

    def window(self) -> tuple[float, float]:
        """Return the one range that all lanes show."""
        ranges = self.ranges()
        assert len(ranges) >= 6
        assert all(item == ranges[0] for item in ranges), ranges
        return ranges[0][0], ranges[0][1]

    def traces(self, lane: str) -> list[dict[str, Any]]:
        """Return what is drawn in one lane."""
        found: list[dict[str, Any]] = self.page.evaluate(
            "lane => document.getElementById('chart').data.filter(trace => trace.meta === lane)"
            ".map(({type, name, x, y, base, hovertext}) => ({type, name, x, y, base, hovertext}))",
            lane,
        )
        return found

    def place_of(self, lane: str, name: str, point: int = 0) -> tuple[float, float]:
        """Return the middle of one bar of a lane on the screen."""
        box = self.page.evaluate(
            """([lane, name, point]) => {
              for (const element of document.querySelectorAll("#chart .barlayer .trace")) {
                const trace = element.__data__?.[0]?.trace;
                if (trace?.meta !== lane || trace.name !== name) continue;
                const path = element.querySelectorAll("g.point path")[point];
                path.scrollIntoView({ block: "center" });
                const { x, y, width, height } = path.getBoundingClientRect();
                return [x + width / 2, y + height / 2];
              }
              return null;
            }""",
            [lane, name, point],
        )
        assert box is not None, f"no bar of {name} in {lane}"
        return box[0], box[1]

    def hover(self, lane: str, name: str, point: int = 0) -> str:
        """Move the mouse to a bar; return what is shown there."""
        x, y = self.place_of(lane, name, point)
        self.page.mouse.move(x - 3, y)
        self.page.mouse.move(x, y)
        self.page.wait_for_selector("#chart .hoverlayer .hovertext")
        return str(self.page.locator("#chart .hoverlayer .hovertext").first.text_content())

    def until_zoomed(self, before: tuple[float, float]) -> tuple[float, float]:
        """Wait until the window is another one; return it."""
        self.page.wait_for_function(
            "before => { const [from, to] = document.getElementById('chart')._fullLayout.xaxis.range.map(Number);"
            " return from !== before[0] || to !== before[1]; }",
            arg=list(before),
        )
        return self.window()

    def picture(self, name: str, *, whole: bool = False) -> Path:
        """Keep a screenshot as an artefact."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        path = ARTEFACTS / f"{name}.png"
        self.page.screenshot(path=path, full_page=whole)
        return path


Open = Callable[..., Opened]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Open a page; it may ask for nothing but itself, and may not complain."""
    complaints: list[str] = []
    requests: list[str] = []
    contexts = []

    def open_page(path: Path, viewport: dict[str, int] | None = None, **options: Any) -> Opened:
        context = browser.new_context(viewport=viewport or DESKTOP, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]")
            assert page.get_attribute("html", "data-ready") == "true"
        return Opened(page)

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    # the icon is a data: address, and so are the pictures that plotly makes of heat maps
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == []
