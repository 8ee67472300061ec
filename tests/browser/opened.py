"""A page in a browser, and what a test wants to know of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

ARTEFACTS = Path(os.environ.get("STALLSCOPE_ARTEFACTS", ROOT / "build" / "browser"))
"""Where screenshots go; git ignores build/."""

LAPTOP, DESKTOP = {"width": 1366, "height": 768}, {"width": 1280, "height": 800}


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
