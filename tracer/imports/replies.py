"""What redis-cli printed, as values: its forms for a terminal, ``--csv``, ``--json`` and for a pipe (raw).

redis-cli numbers the items of a reply on a terminal and with ``--no-raw``; in a pipe it prints one item a line and
nothing tells where a nested reply ends; ``--csv`` flattens too, but quotes strings, so numbers are told from
them (redis-cli.c: cliFormatReplyTTY, cliFormatReplyRaw, cliFormatReplyCSV, cliFormatReplyJson).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NESTED, TYPED, LINES = "nested", "typed", "lines"

_PROMPT = re.compile(r"(?:(?:redis )?[\w.:\[\]-]+:\d+(?:\[\d+\])?|(?:redis )?/\S+|not connected)?> +(\S.*)")
_MARKER = re.compile(r"\s*\d+[)#~] ")
_ITEM = re.compile(r"\s*\d+\) (?:\s*\d+\) )*")
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"|([^,"]*)')
_NUMBER = re.compile(r"-?\d{1,18}")
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}
_EMPTY = ("(empty array)", "(empty list or set)", "(empty hash)", "(empty set)", "(nil)")
_ERRORS = (
    "(error) ",
    "ERR ",
    "NOAUTH ",
    "NOPERM ",
    "WRONGPASS ",
    "ERROR,",
    "Could not connect to Redis",
    "AUTH failed",
)


@dataclass(frozen=True)
class Reply:
    """One reply.

    Attributes:
        form: ``NESTED``: ``value`` is a list of ints, strings and such lists; ``TYPED``: a flat list of ints and
            strings; ``LINES``: a flat list of strings, of which some are numbers.
    """

    form: str
    value: list[Any]


@dataclass(frozen=True)
class Section:
    """A command and what it printed; the command is "" where the text does not say it."""

    command: tuple[str, ...]
    lines: tuple[str, ...]


def sections(text: str) -> list[Section]:
    """Return a text cut at the lines that begin with redis-cli's prompt, as ``127.0.0.1:6379> slowlog get``.

    What comes before the first of them is left out; without any the text is one section.
    """
    found: list[tuple[tuple[str, ...], list[str]]] = [((), [])]
    for line in text.splitlines():
        match = _PROMPT.fullmatch(line.rstrip()) if "> " in line else None
        if match:
            found.append((tuple(match[1].split()), []))
        else:
            found[-1][1].append(line)
    return [Section(command, tuple(lines)) for command, lines in found[1:] or found]


def error_of(lines: tuple[str, ...]) -> str:
    """Return the error that redis-cli printed instead of a reply, or ""."""
    first = next((line.strip() for line in lines if line.strip()), "")
    return first if first.startswith(_ERRORS) else ""


def parse(lines: tuple[str, ...]) -> list[Reply]:
    """Return the replies in what was printed; a text that has none of the other forms is one of lines."""
    told = [line for line in lines if line.strip()]
    if not told or all(line.strip() in _EMPTY for line in told):
        return []
    for form in (_json, _terminal, _csv):
        replies = form(told)
        if replies is not None:
            return replies
    return [Reply(LINES, [line.rstrip("\r") for line in lines])]


def number(value: object) -> int | None:
    """Return the integer this is or, as a line, spells; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if abs(value) < 10**18 else None
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return int(value)
    return None


def _json(lines: list[str]) -> list[Reply] | None:
    if not all(line.lstrip().startswith("[") for line in lines):
        return None
    try:
        values = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return None
    return [Reply(NESTED, value) for value in values if value]


def _csv(lines: list[str]) -> list[Reply] | None:
    if not all("," in line for line in lines):
        return None
    replies = []
    for line in lines:
        values = list(_csv_values(line.strip()))
        if any(value is None for value in values):
            return None
        replies.append(Reply(TYPED, values))
    return replies


def _csv_values(line: str) -> Iterator[int | str | None]:
    """Yield the values of a line of ``--csv``; None for what is neither a number nor quoted."""
    position = 0
    while True:
        match = _TOKEN.match(line, position)
        if match is None:
            yield None
            return
        position = match.end()
        if match[1] is not None:
            yield unescaped(match[1])
        else:
            yield "" if match[2] in ("NULL", "NIL") else number(match[2])
        if position == len(line):
            return
        if line[position] != ",":
            yield None
            return
        position += 1


def _terminal(lines: list[str]) -> list[Reply] | None:
    """Return the numbered form: what is numbered behind a number is nested in it.

    Numbers are aligned to the right, so a level is known by the column its marker ends at.
    """
    if _ITEM.match(lines[0]) is None:
        return None
    replies: list[Reply] = []
    levels: list[tuple[int, list[Any]]] = []
    for line in lines:
        position = 0
        while (match := _MARKER.match(line, position)) is not None and (position or match.start() == 0):
            place = match.end()
            while levels and levels[-1][0] > place:
                levels.pop()
            first = line[position:place].strip(" )#~") == "1"
            if not levels:
                replies.append(Reply(NESTED, []))
                levels.append((place, replies[-1].value))
            elif place > levels[-1][0]:
                nested: list[Any] = []
                levels[-1][1].append(nested)
                levels.append((place, nested))
            elif first and len(levels) == 1:
                replies.append(Reply(NESTED, []))
                levels = [(place, replies[-1].value)]
            position = place
        if not position:
            return None
        levels[-1][1].append(_scalar(line[position:].strip()))
    return replies


def _scalar(text: str) -> Any:
    if text.startswith("(integer) "):
        value = number(text[10:])
        return text if value is None else value
    if len(text) >= 2 and text[0] == text[-1] == '"':
        return unescaped(text[1:-1])
    return [] if text in _EMPTY[:2] else text


def unescaped(text: str) -> str:
    """Return a string as it was before redis-cli quoted it (sds.c: sdscatrepr)."""
    if "\\" not in text:
        return text

    def plain(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes.fromhex(code[1:].decode()) if len(code) == 3 else _ESCAPED.get(code, code)

    return _ESCAPE.sub(plain, text.encode(errors="replace")).decode(errors="replace")
