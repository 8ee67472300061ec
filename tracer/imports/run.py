"""The whole of ``stallscope import``: read the inputs, place their rows, write the recording."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stallscope.tracer.errors import UsageError
from stallscope.tracer.imports.formats import read_inputs
from stallscope.tracer.imports.timeline import place_in, recording_of
from stallscope.tracer.manifest import Counters, ImportInfo
from stallscope.tracer.recording import (
    SUFFIX,
    RecordingWriter,
    extend_recording,
    new_recording_path,
    read_recording,
)


@dataclass(frozen=True)
class ImportDone:
    """What was written, and a line for each input that says what became of it."""

    path: Path
    lines: tuple[str, ...]


def run_import(
    inputs: Sequence[Path],
    into: Path | None,
    output: Path | None,
    ports: Sequence[int] = (),
    offset_ns: int = 0,
    *,
    force: bool = False,
    command: tuple[str, ...] = (),
) -> ImportDone:
    """Write a recording with the rows of these files, in a copy of ``into`` where it is given.

    Args:
        ports: the server's ports in captures; by default those of the listeners of ``into``.
        offset_ns: added to the inputs' clocks.

    Raises:
        UsageError: a file is nothing that can be imported, or nothing of it fits.
        StallscopeError: the recording cannot be written.
    """
    if into is None:
        path = new_recording_path(output, force=force)
        placed = recording_of(read_inputs(inputs, ports), offset_ns, command)
        with RecordingWriter(path, placed.manifest) as writer:
            writer.finish(placed.events, Counters(placed.manifest.ended_ns, {}), placed.manifest)
        return ImportDone(path, _lines(placed.imports))
    path = new_recording_path(output or Path(f"{into.stem}-imported{SUFFIX}"), force=force)
    recording = read_recording(into)
    if path.exists() and path.samefile(into):
        raise UsageError(f"{path} is the recording itself, which is not changed; choose another name with -o")
    known = sorted({listener.port for listener in recording.manifest.listeners})
    placed = place_in(recording, read_inputs(inputs, ports or known), offset_ns)
    extend_recording(recording, path, placed.events, placed.manifest)
    return ImportDone(path, _lines(placed.imports))


def _lines(imports: Sequence[ImportInfo]) -> tuple[str, ...]:
    lines = []
    for item in imports:
        counted = ", ".join(f"{count:,} {what}" for what, count in item.counts.items())
        told = ", ".join(part for part in (item.format, counted) if part) or "nothing in it"
        outside = f", {item.outside:,} outside the recording left out" if item.outside else ""
        rows = "1 row" if item.rows == 1 else f"{item.rows:,} rows"
        lines.append(f"{item.file}: {told}: {rows}{outside}")
        lines += [f"{item.file}: {note}" for note in item.notes]
    return tuple(lines)
