"""SLOWLOG GET as redis-cli prints it, in any of its forms.

An entry has the second in which the command ended, its microseconds, the command and, from Redis 4.0 on, the
client's address and name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stallscope.tracer.imports.replies import NESTED, Reply, number
from stallscope.tracer.imports.rows import Input, Span, is_wall_s, shortened, spans_input

FORMAT = "SLOWLOG"
MAX_DURATION_US = 10**13
_CLIENT = re.compile(r"(?:\[?[0-9a-fA-F:.]+\]?:\d{1,5}|/\S*:0)")


@dataclass(frozen=True)
class Entry:
    """One entry, as the server numbered it; the client is "" before Redis 4.0."""

    id: int
    ended_s: int
    duration_us: int
    arguments: tuple[str, ...]
    client: str = ""
    client_name: str = ""

    @property
    def text(self) -> str:
        """Return the command and who sent it, for the reader."""
        name = f" ({self.client_name})" if self.client_name else ""
        return shortened(" ".join(" ".join(self.arguments).split())) + (
            f" from {self.client}{name}" if self.client else ""
        )


def entries(replies: Iterable[Reply]) -> list[Entry] | None:
    """Return the entries of one or more replies, each once, by time; None if a reply is none of SLOWLOG GET."""
    found: dict[tuple[int, int, int], Entry] = {}
    for reply in replies:
        these = _nested(reply.value) if reply.form == NESTED else _flat(reply.value)
        if these is None:
            return None
        found.update({(entry.id, entry.ended_s, entry.duration_us): entry for entry in these})
    return sorted(found.values(), key=lambda entry: (entry.ended_s, entry.id))


def slowlog_input(found: Sequence[Entry]) -> Input:
    """Return the entries as the rows of an input."""
    spans = [Span(FORMAT, entry.ended_s, entry.duration_us * 1000, entry.text) for entry in found]
    return spans_input("", FORMAT, "redis-cli SLOWLOG GET", spans, {"entries": len(spans)})


def _nested(value: list[Any]) -> list[Entry] | None:
    made = []
    for item in value:
        if not isinstance(item, list) or len(item) < 4 or not isinstance(item[3], list):
            return None
        entry = _entry(item[:3], item[3], item[4:6])
        if entry is None:
            return None
        made.append(entry)
    return made


def _flat(value: list[Any]) -> list[Entry] | None:
    """Return the entries of a reply that was printed flat; an entry begins with three numbers and a command.

    In raw form an argument may look like a number: there the server's numbering decides, which goes down by
    one from entry to entry.
    """
    starts: list[int] = []
    for place in range(len(value) - 3):
        numbers = [number(item) for item in value[place : place + 3]]
        if not is_wall_s(numbers[1]) or numbers[0] is None or numbers[2] is None:
            continue
        if number(value[place + 3]) is not None:
            continue
        if starts and (place < starts[-1] + 4 or not _follows(value, starts, numbers[0], numbers[1])):
            continue
        starts.append(place)
    if not starts or any(str(item).strip() for item in value[: starts[0]]):
        return None
    made = []
    for place, end in zip(starts, [*starts[1:], len(value)], strict=True):
        entry = _entry(value[place : place + 3], *_arguments(value[place + 3 : end], last=end == len(value)))
        if entry is None:
            return None
        made.append(entry)
    return made


def _follows(value: list[Any], starts: list[int], entry_id: int, ended_s: int | None) -> bool:
    """Return whether an entry of this number may follow: the next older one, or the newest of a later reply."""
    before, first = number(value[starts[-1]]), number(value[starts[0]])
    newest_s = number(value[starts[0] + 1])
    older = before is not None and entry_id == before - 1
    later = first is not None and newest_s is not None and entry_id >= first and (ended_s or 0) >= newest_s
    return older or later


def _arguments(items: list[Any], *, last: bool) -> tuple[list[Any], list[Any]]:
    """Return the arguments and the client of an entry that was printed flat."""
    # the printed text ends with an empty line of its own
    while last and len(items) > 2 and items[-1] == "" and not (_is_client(items[-2])):
        items = items[:-1]
    if len(items) >= 3 and _is_client(items[-2]):
        return items[:-2], items[-2:]
    if len(items) >= 2 and last and _is_client(items[-1]):
        return items[:-1], [items[-1], ""]
    return items, []


def _is_client(item: object) -> bool:
    return isinstance(item, str) and _CLIENT.fullmatch(item) is not None


def _entry(numbers: list[Any], arguments: list[Any], client: list[Any]) -> Entry | None:
    entry_id, ended_s, duration_us = (number(item) for item in numbers)
    if entry_id is None or ended_s is None or duration_us is None or not is_wall_s(ended_s):
        return None
    if not 0 <= duration_us < MAX_DURATION_US:
        return None
    address, name = (*(str(item) for item in client), "", "")[:2]
    return Entry(entry_id, ended_s, duration_us, tuple(str(item) for item in arguments), address, name)
