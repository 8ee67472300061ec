"""Inputs of an import, recognised by their content."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from stallscope.tracer.errors import UsageError
from stallscope.tracer.imports import info, latency, slowlog
from stallscope.tracer.imports.packets import GZIP_MAGIC, read_captures
from stallscope.tracer.imports.pcap import is_capture
from stallscope.tracer.imports.replies import Section, error_of, parse, sections
from stallscope.tracer.imports.rows import Input, renamed
from stallscope.tracer.layout import EVENT

MAX_TEXT_BYTES = 512 << 20

_ACCEPTED = (
    "a capture (pcap, pcapng), or what redis-cli prints for SLOWLOG GET, LATENCY HISTORY, LATENCY LATEST or INFO"
)


def read_inputs(paths: Sequence[Path], ports: Iterable[int]) -> list[Input]:
    """Return everything in these files, each on its own clock; captures first.

    Args:
        ports: the server's ports, which of a capture's packets are wanted.

    Raises:
        UsageError: a file cannot be read, is nothing that can be imported, or holds nothing of these ports.
    """
    captures: list[Path] = []
    texts: list[Input] = []
    for path in paths:
        try:
            head = _start(path)
            if is_capture(head):
                captures.append(path)
            else:
                texts += renamed(read_text(_text(path, head), path.stem), str(path))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error) or "the compressed file is torn"
            raise UsageError(f"{path} cannot be read: {reason}; give a file you may read") from error
    return [*(read_captures(captures, ports) if captures else ()), *texts]


def _start(path: Path) -> bytes:
    """Return the first bytes of a file, as they are without compression.

    Raises:
        UsageError: it is a folder or a pipe, which cannot be read twice.
    """
    if path.exists() and not path.is_file():
        raise UsageError("it is not a file; write what it gives to one first")
    with path.open("rb") as file:
        head = file.read(24)
    if head[:2] == GZIP_MAGIC:
        with gzip.open(path) as file:
            head = file.read(24)
    return head


def _text(path: Path, head: bytes) -> str:
    with path.open("rb") as file:
        packed = file.read(2) == GZIP_MAGIC
    with gzip.open(path) if packed else path.open("rb") as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES or b"\0" in head:
        raise UsageError(f"it is not {_ACCEPTED}")
    return content.decode("utf-8", errors="replace")


def read_text(text: str, name: str) -> list[Input]:
    """Return what redis-cli printed, one input for each of SLOWLOG, LATENCY and INFO that is in it.

    Args:
        name: the event of a LATENCY HISTORY whose command is not in the text.

    Raises:
        UsageError: it is nothing that redis-cli prints for these, or an error it printed.
    """
    found = _Found()
    for section in sections(text):
        error = error_of(section.lines)
        if error and found.wants(section):
            raise UsageError(f'redis-cli printed an error instead of a reply: "{error[:200]}"; ask again without it')
        found.take(section, name)
    inputs = found.inputs()
    return inputs or [Input("", "", np.zeros(0, EVENT), notes=("it is empty: no entry, no sample",))]


class _Found:
    """What the sections of one text hold."""

    def __init__(self) -> None:
        self._entries: list[slowlog.Entry] | None = None
        self._samples: list[latency.Sample] | None = None
        self._dumps: list[info.Dump] | None = None

    def wants(self, section: Section) -> bool:
        """Return whether the section is of a command whose reply is imported, or of one that is not told."""
        return not section.command or self._kind(section) != ""

    def take(self, section: Section, name: str) -> None:
        """Take in one section.

        Raises:
            UsageError: it is not what its command prints, or nothing that is known.
        """
        kind = self._kind(section)
        if kind == info.FORMAT or (not section.command and info.looks_like_info(section.lines)):
            self._dumps = [*(self._dumps or ()), *info.dumps(section.lines)]
            return
        if section.command and not kind:
            return
        replies = parse(section.lines)
        if not section.command and not replies:
            return
        event = section.command[2] if len(section.command) > 2 else name
        if kind in (slowlog.FORMAT, ""):
            entries = slowlog.entries(replies)
            if entries is not None:
                self._entries = [*(self._entries or ()), *entries]
                return
        if kind in (latency.FORMAT, ""):
            samples = latency.latest(replies)
            if samples is None:
                samples = latency.history(replies, event)
            if samples is not None:
                self._samples = [*(self._samples or ()), *samples]
                return
        if section.command:
            raise UsageError(f'what follows "{" ".join(section.command)[:80]}" is not what redis-cli prints for it')
        raise UsageError(f"it is not {_ACCEPTED}")

    def inputs(self) -> list[Input]:
        """Return what was found."""
        inputs = []
        if self._entries is not None:
            different = {(entry.id, entry.ended_s, entry.duration_us): entry for entry in self._entries}
            inputs.append(slowlog.slowlog_input(list(different.values())))
        if self._samples is not None:
            inputs.append(latency.latency_input(self._samples))
        if self._dumps is not None:
            made = info.info_input(self._dumps)
            if self._dumps and not len(made.rows):
                raise UsageError(
                    "its INFO dumps have no time; print one before each, as: "
                    "while sleep 1; do date +%s.%N; redis-cli info; done > info.txt"
                )
            inputs.append(made)
        return inputs

    @staticmethod
    def _kind(section: Section) -> str:
        """Return the format of the reply to the section's command, "" for any other command or none."""
        words = [word.lower() for word in section.command[:2]]
        if words == ["slowlog", "get"]:
            return slowlog.FORMAT
        if words in (["latency", "history"], ["latency", "latest"]):
            return latency.FORMAT
        return info.FORMAT if words[:1] == ["info"] else ""
