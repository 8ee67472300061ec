"""Lines and tables for a terminal, a pipe or a mail."""

from __future__ import annotations

from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

INDENT = (0, 0, 0, 2)

Line = Text | Padding | Table


def stripped(line: list[Segment]) -> list[Segment]:
    """Return a line without its trailing blanks."""
    kept = list(line)
    while kept and not kept[-1].text.strip():
        kept.pop()
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].style)
    return kept


def table_of(*columns: str, first_left: bool = False) -> Table:
    """Return an empty table: numbers to the right, names (the first column, and ``mostly in``) to the left."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_edge=False)
    for index, column in enumerate(columns):
        left = (first_left and index == 0) or column == "mostly in"
        table.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    return table


def percent(part: float, whole: float) -> str:
    """Return a share as ``12.3%``, or ``?`` of nothing."""
    return f"{part / whole:.1%}" if whole else "?"


def heading(text: str) -> Text:
    """Return the line above a section."""
    return Text(plain(text), style="bold cyan")


def faint(text: str) -> Text:
    """Return a line that matters less."""
    return Text(plain(text), style="dim")


def plain(text: str) -> str:
    """Return text from a file without what a terminal would obey: control characters become "?"."""
    return "".join(character if character.isprintable() else "?" for character in text)
