"""What ``stallscope probes`` shows: where each function would be probed, and whether that would fire."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from stallscope.probes import catalogue
from stallscope.tracer.capture.symbols import Resolution

_STYLES = {"found": "green", "alias": "green", "inlined": "yellow", "bypassed": "yellow", "missing": "red"}


def describe(resolutions: Sequence[Resolution]) -> list[dict[str, Any]]:
    """Return one plain dictionary for each function, ready for ``json.dumps``.

    Keys: function, summary, status, reason, instead, found_in, library, address, attachments (path, offset
    in the file, symbol, build_id), arguments (name, unit), callers, inlined_into, thread, tier, default,
    source. Offsets and addresses are numbers of bytes. A function the catalogue does not list has an empty
    summary, thread, tier and source.
    """
    return [_describe(resolution) for resolution in resolutions]


def render(resolutions: Sequence[Resolution], console: Console) -> None:
    """Print a line for each function (name, status, what is probed where), and below it what there is to say.

    Lines are as wide as the console; words are never broken, so names and paths can be copied.
    """
    entries = describe(resolutions)
    name_width = max((len(entry["function"]) for entry in entries), default=0)
    status_width = max((len(entry["status"]) for entry in entries), default=0)
    column = name_width + status_width + 4
    for entry in entries:
        place, *rest = _wrapped(_place(entry), console.width, column, column)
        line = Text.assemble(
            (f"{entry['function']:<{name_width}}  ", "bold"),
            (f"{entry['status']:<{status_width}}  ", _STYLES.get(entry["status"], "")),
            place.lstrip(),
        )
        console.print(line, soft_wrap=True)
        below = [(text, "") for text in rest]
        for remark, style in _remarks(entry):
            below += [(text, style) for text in _wrapped(remark, console.width, 4, 6)]
        for text, style in below:
            console.print(Text(text, style=style), soft_wrap=True)


def _describe(resolution: Resolution) -> dict[str, Any]:
    listed = catalogue.lookup(resolution.function.rpartition(":")[2])
    return {
        "function": resolution.function,
        "summary": listed.summary if listed else "",
        "status": resolution.status,
        "reason": resolution.reason,
        "instead": list(resolution.instead),
        "found_in": resolution.found_in,
        "library": resolution.library,
        "address": resolution.address,
        "attachments": [
            {"path": one.path, "offset": one.offset, "symbol": one.symbol, "build_id": one.build_id}
            for one in resolution.attachments
        ],
        "arguments": [{"name": field.name, "unit": field.unit} for field in resolution.decoder.fields],
        "callers": list(resolution.callers),
        "inlined_into": list(resolution.inlined_into),
        "thread": listed.thread if listed else "",
        "tier": listed.tier if listed else "",
        "default": listed.default if listed else False,
        "source": listed.source if listed else "",
    }


def _place(entry: dict[str, Any]) -> str:
    """Return what is probed: the symbol where it is another than the function, its address, its table."""
    if not entry["attachments"]:
        return "-"
    symbol = entry["attachments"][0]["symbol"]
    if entry["library"]:
        symbol = f"{entry['library']}:{symbol}"
    name = f"{symbol} " if symbol != entry["function"] else ""
    table = "debug file" if _debug_file(entry) else entry["found_in"]
    return f"{name}{entry['address']:#x} ({table})"


def _remarks(entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines below a function, each with its style."""
    symbols = [place["symbol"] for place in entry["attachments"]]
    if len(symbols) > 1:
        yield f"and: {', '.join(symbols[1:])}", ""
    if entry["arguments"]:
        yield f"arguments: {', '.join(field['name'] for field in entry['arguments'])}", ""
    if entry["reason"]:
        yield f"why: {entry['reason']}", ""
    elif entry["summary"]:
        yield entry["summary"], "dim"
    others = [name for name in entry["instead"] if name not in symbols]
    if others:
        yield f"{'see also' if symbols else 'instead'}: {', '.join(others)}", ""
    copies = entry["inlined_into"] if entry["status"] in ("found", "alias") else []
    if copies:
        yield f"not seen: the copies inlined into {', '.join(copies)}", "yellow"
    if _debug_file(entry):
        yield f"debug file: {_debug_file(entry)}", "dim"


def _debug_file(entry: dict[str, Any]) -> str:
    """Return the path of the separate debug file a symbol is from, empty when it is from the file itself."""
    kind, _, path = str(entry["found_in"]).partition("debug file ")
    return "" if kind else path


def _wrapped(text: str, width: int, indent: int, further: int) -> list[str]:
    """Return a text in lines, the first and the further ones indented; a word that is too long stands out."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * further,
        break_long_words=False,
        break_on_hyphens=False,
    )
