"""What ``stallscope probes`` shows: where each function would be probed, and whether that would fire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

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
    """Print one table: function, status, what is probed and where it was found, arguments, and why."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("function", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column("probed", overflow="fold")
    table.add_column("symbols from", overflow="fold")
    table.add_column("arguments", overflow="fold")
    table.add_column("why", overflow="fold", ratio=1)
    for entry in describe(resolutions):
        style = _STYLES.get(entry["status"], "")
        table.add_row(
            escape(entry["function"]),
            f"[{style}]{entry['status']}[/]" if style else escape(entry["status"]),
            escape("\n".join(_place(entry, place) for place in entry["attachments"]) or "-"),
            escape(entry["found_in"] or "-"),
            escape("\n".join(one["name"] for one in entry["arguments"]) or "-"),
            escape(_why(entry)),
        )
    console.print(table)


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


def _place(entry: dict[str, Any], place: dict[str, Any]) -> str:
    library = f"{entry['library']}:" if entry["library"] else ""
    return f"{library}{place['symbol']}+{place['offset']:#x}"


def _why(entry: dict[str, Any]) -> str:
    reason = str(entry["reason"])
    copies = [name for name in entry["inlined_into"] if entry["status"] in ("found", "alias")]
    if copies:
        also = f"copies inlined into {', '.join(copies)} are not seen"
        reason = f"{reason}; {also}" if reason else also
    return reason or str(entry["summary"])
