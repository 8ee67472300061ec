"""Where an export goes: a new file, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from stallscope.tracer.errors import StallscopeError, UsageError
from stallscope.tracer.recording import new_recording_path


def new_export_path(path: Path, recording: Path, *, force: bool = False) -> Path:
    """Return where an export goes, checked.

    Raises:
        UsageError: the file exists and ``force`` is not set, its folder does not exist, or it is the recording.
    """
    chosen = new_recording_path(path, force=force)
    if chosen.exists() and chosen.samefile(recording):
        raise UsageError(f"{chosen} is the recording itself; choose another name with -o")
    return chosen


@contextmanager
def open_export(path: Path) -> Iterator[BinaryIO]:
    """Open the file to write; what was written is removed again if the export fails or is interrupted.

    Raises:
        StallscopeError: it cannot be written.
    """
    try:
        with path.open("wb") as out:
            try:
                yield out
            except BaseException:
                if path.is_file():  # not a device or a pipe
                    path.unlink()
                raise
    except OSError as error:
        raise StallscopeError(f"cannot write {path}: {error.strerror or error}; choose another file with -o") from error
