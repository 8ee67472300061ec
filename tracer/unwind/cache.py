"""Unwind rules kept on disk by build-id, so that a file is decoded once and not once a recording.

One .npz file of numpy a build-id: plain arrays, never pickled objects. What cannot be read, is of another
format or contradicts itself counts as absent; what cannot be written is not kept.
"""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from stallscope.tracer.unwind.registers import REGISTER_COUNT
from stallscope.tracer.unwind.rules import Kind, RuleTable

FORMAT = 1
"""Counted up whenever the arrays or their meaning change."""

_ARRAYS = {
    "starts": ("<u8", 1),
    "index": ("<i4", 1),
    "cfa_register": ("|i1", 1),
    "cfa_value": ("<i8", 1),
    "kind": ("|u1", 2),
    "value": ("<i8", 2),
    "is_signal_frame": ("|b1", 1),
}


class RuleCache:
    """A folder of unwind rules."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def of_user(cls) -> RuleCache:
        """Return the cache in the user's own cache folder (XDG Base Directory Specification)."""
        base = os.environ.get("XDG_CACHE_HOME", "")
        return cls((Path(base) if base.startswith("/") else Path.home() / ".cache") / "stallscope" / "unwind")

    def load(self, build_id: str) -> RuleTable | None:
        """Return the rules of a build-id, None when they are not there."""
        path = self._path(build_id)
        if path is None or not self._is_ours():
            return None
        try:
            # Read whole: numpy leaves a damaged file open.
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                return _table({name: arrays[name] for name in (*_ARRAYS, "expressions")})
        except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, build_id: str, table: RuleTable) -> None:
        """Keep the rules of a build-id."""
        path = self._path(build_id)
        if path is None:
            return
        arrays = {name: getattr(table, name) for name in _ARRAYS}
        arrays["expressions"] = np.frombuffer(json.dumps(table.expressions).encode(), np.uint8)
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self._is_ours():
                return
            with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".tmp", delete=False) as file:
                try:
                    np.savez(file, **arrays)
                    file.close()
                    Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise

    def _path(self, build_id: str) -> Path | None:
        # It becomes a file's name and comes from the file that is unwound.
        return self._folder / f"{build_id}-{FORMAT}.npz" if re.fullmatch(r"[0-9a-f]{8,128}", build_id) else None

    def _is_ours(self) -> bool:
        """Return whether nobody else can have put rules there: the recorder is root."""
        try:
            status = self._folder.stat()
        except OSError:
            return False
        return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _table(arrays: dict[str, np.ndarray]) -> RuleTable:
    """Return the table that some arrays make, or raise a ValueError if they make none."""
    for name, (dtype, dimensions) in _ARRAYS.items():
        if arrays[name].dtype != np.dtype(dtype) or arrays[name].ndim != dimensions:
            raise ValueError(f"{name} is {arrays[name].dtype}, {arrays[name].shape}")
    content = json.loads(arrays.pop("expressions").tobytes())
    expressions = tuple(tuple((str(name), tuple(map(int, values))) for name, values in one) for one in content)
    table = RuleTable(**arrays, expressions=expressions)
    sets = len(table.cfa_register)
    by_expression = (table.kind == Kind.EXPRESSION) | (table.kind == Kind.VAL_EXPRESSION)
    numbers = np.concatenate([table.value[by_expression], table.cfa_value[table.cfa_register < 0]])
    others = table.value[table.kind == Kind.REGISTER]
    is_whole = (
        len(table.starts) == len(table.index)
        and table.kind.shape == table.value.shape == (sets, REGISTER_COUNT)
        and len(table.cfa_value) == len(table.is_signal_frame) == sets
        and bool(np.all(table.starts[1:] >= table.starts[:-1]))
        and bool(np.all((table.index >= -1) & (table.index < sets)))
        and bool(np.all((table.cfa_register >= -1) & (table.cfa_register < REGISTER_COUNT)))
        and bool(np.all((numbers >= 0) & (numbers < len(expressions))))
        and bool(np.all((others >= 0) & (others < REGISTER_COUNT)))
    )
    if not is_whole:
        raise ValueError("the arrays contradict each other")
    return table
