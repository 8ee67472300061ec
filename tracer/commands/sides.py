"""What the commands that compare share: recordings by names and patterns, and options that read shares and rates."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stallscope.tracer.commands.parameters import Parsed
from stallscope.tracer.errors import RecordingError

if TYPE_CHECKING:
    from stallscope.tracer.analysis.compare.sides import Side


def _confidence(text: str) -> float:
    from stallscope.tracer.analysis.compare.limits import parse_confidence

    return parse_confidence(text)


def _share(text: str) -> float:
    from stallscope.tracer.analysis.compare.limits import parse_share

    return parse_share(text)


def _rate(text: str) -> float:
    from stallscope.tracer.analysis.compare.limits import parse_rate

    return parse_rate(text)


CONFIDENCE = Parsed("confidence", _confidence)
SHARE = Parsed("share", _share)
RATE = Parsed("rate", _rate)


def read_side(patterns: Sequence[str]) -> Side:
    """Return the recordings of these names and patterns, each file once, as one side of a comparison.

    Raises:
        RecordingError: a pattern fits nothing, or a file is not a recording.
    """
    from stallscope.tracer.analysis.analysis import analyse
    from stallscope.tracer.analysis.compare.sides import make_side
    from stallscope.tracer.recording import read_recording

    return make_side([analyse(read_recording(path)) for path in _files(patterns)])


def _files(patterns: Sequence[str]) -> list[Path]:
    files: dict[Path, Path] = {}
    for pattern in patterns:
        found = [pattern] if Path(pattern).exists() or not glob.has_magic(pattern) else sorted(glob.glob(pattern))  # noqa: PTH207
        if not found:
            raise RecordingError(f'no file fits "{pattern}"; give recordings made by stallscope record')
        for name in found:
            files.setdefault(Path(name).resolve(), Path(name))
    return list(files.values())
