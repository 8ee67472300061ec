#!/usr/bin/env python3
"""Draws docs/top.svg: what ``stallscope top`` shows of the lab's incident, as a terminal shows it.

The command runs on a pseudo-terminal beside the lab's server and load; pyte interprets what it writes, and
rich draws the screen as it stands once the worst stall is one of trims, in which connections were refused.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "kernel"), str(ROOT / "vagrant")]

import pyte  # noqa: E402
from lab import incident  # noqa: E402
from lab.recipes import RECIPES  # noqa: E402
from lab.server import running_server  # noqa: E402
from screen import on_screen  # noqa: E402
from tracing import STALLSCOPE, until  # noqa: E402

STALL = re.compile(r"^[\d:]+ max +\d+ ms +\S+ +[1-9][\d,]* +sdsRemoveFreeSpace x")


def main() -> None:
    """Run the incident and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "top.svg")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="incident")
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--height", type=int, default=30)
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]
    with running_server("2.8.17", backlog=recipe.backlog) as server, incident.prepared_load(server, recipe) as load:
        words = [STALLSCOPE, "top", "-p", str(server.pid), "--sort", "max"]
        with on_screen(words, width=options.width, height=options.height) as screen:
            screen.wait_for("iterations/s")
            load.start()
            until(lambda: any(map(STALL.match, screen.lines())) or not load.running, "the trims have refused somebody")
            if not load.running:
                sys.exit("top_picture.py: no stall of this run was the incident's; is the machine busy? run it again")
            shown = drawn(screen.pyte_screen)
            screen.press("q")
            screen.ended()
            load.outcome()
    console = Console(file=io.StringIO(), record=True, width=options.width, height=options.height, force_terminal=True)
    console.print(shown)
    # the time is the run's own; the identifier would be another each time
    options.output.write_text(console.export_svg(title="sudo stallscope top -p PID --sort max", unique_id="top"))


def drawn(screen: pyte.Screen) -> Text:
    """Return a terminal's screen with its colours."""
    text = Text()
    for row in range(screen.lines):
        for column in range(screen.columns):
            cell = screen.buffer[row][column]
            style = Style(
                color=_colour(cell.fg),
                bgcolor=_colour(cell.bg),
                bold=cell.bold,
                italic=cell.italics,
                reverse=cell.reverse,
            )
            text.append(cell.data, style=style)
        text.append("\n")
    text.rstrip()
    return text


def _colour(name: str) -> Color | None:
    if name == "default":
        return None
    # the names are those of the VT100; rich calls brown yellow
    return Color.parse(f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else {"brown": "yellow"}.get(name, name))


if __name__ == "__main__":
    main()
