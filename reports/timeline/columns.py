"""Arrays of whole numbers, packed small enough to travel inside a page.

Each column is reduced to its differences where that helps, then to what exceeds its smallest value, and written
byte plane by byte plane: the upper bytes of most columns are nearly constant and compress to nothing. All columns
together are one gzip stream in base64. ``assets/columns.js`` undoes it.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

_GZIP_WINDOW = 31
_LEVEL = 6
_MOST_EXACT = 2**53


class Columns:
    """Collects columns; a column is known by its name, as ``calls.start_ns``."""

    def __init__(self) -> None:
        self._index: dict[str, dict[str, Any]] = {}
        self._planes: list[bytes] = []
        self._size = 0

    def add(self, name: str, values: npt.NDArray[Any], *, ascending: bool = False) -> None:
        """Add a column of integers; shape (n,).

        Args:
            ascending: (mostly) sorted, so that differences are small.
        """
        numbers = values if values.dtype == np.uint64 else values.astype(np.int64)
        # differences of unsigned numbers wrap around and come back right, but only modulo 2**64
        steps = ascending and numbers.dtype != np.uint64 and len(numbers) > 0
        first = int(numbers[0]) if steps else 0
        if steps:
            numbers = np.diff(numbers, prepend=numbers[:1])
        base = int(numbers.min()) if len(numbers) else 0
        above = (numbers - numbers.dtype.type(base)).view(np.uint64)
        width = max((int(above.max()).bit_length() + 7) // 8, 1) if len(above) else 0
        octets = above.astype("<u8").view(np.uint8).reshape(-1, 8)
        data = np.ascontiguousarray(octets[:, :width].T).tobytes()
        self._index[name] = {"offset": self._size, "count": len(numbers), "width": width, "base": str(base)}
        if steps:
            self._index[name]["first"] = first
        if len(above) and max(base + int(above.max()), -base) > _MOST_EXACT:
            self._index[name]["wide"] = True
        self._planes.append(data)
        self._size += len(data)

    def packed(self) -> tuple[dict[str, dict[str, Any]], str]:
        """Return where each column is in the stream, and the stream in base64."""
        packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
        parts = [packer.compress(plane) for plane in self._planes]
        return self._index, base64.b64encode(b"".join([*parts, packer.flush()])).decode("ascii")


def gzip_text(text: str) -> str:
    """Return a text as gzip in base64."""
    packer = zlib.compressobj(9, zlib.DEFLATED, _GZIP_WINDOW)
    return base64.b64encode(packer.compress(text.encode()) + packer.flush()).decode("ascii")
