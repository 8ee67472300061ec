"""Text for many rows at once: pieces joined by Arrow, without a Python string for each row."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


def joined(*pieces: pa.Array | str) -> pa.Array:
    """Return the pieces of each row joined; a row with a null piece is null.

    Args:
        pieces: arrays of one length (text or integers), and texts that are the same in every row.
    """
    texts = [piece if isinstance(piece, str) else piece.cast(pa.string()) for piece in pieces]
    return pc.binary_join_element_wise(*texts, "")


def members(pieces: Iterable[pa.Array]) -> pa.Array:
    """Return the pieces of each row with commas between them, null ones left out."""
    return pc.binary_join_element_wise(*pieces, ",", null_handling="skip")


def quoted(texts: pa.Array) -> pa.Array:
    """Return texts as JSON strings, null ones as null; those that repeat are quoted once."""
    encoded = texts.dictionary_encode()
    different = [json.dumps(text) for text in encoded.dictionary.to_pylist()]
    return pa.array(different, pa.string()).take(encoded.indices)


def json_values(column: pa.Array) -> pa.Array:
    """Return a column of text, times, numbers or booleans as JSON."""
    if pa.types.is_timestamp(column.type):
        # ISO 8601 as RFC 3339 has it, with nine digits of a second
        return joined('"', pc.binary_replace_slice(column.cast(pa.string()), start=10, stop=11, replacement="T"), '"')
    return quoted(column) if pa.types.is_string(column.type) else column


def thousandths(values: npt.NDArray[np.int64]) -> pa.Array:
    """Return integers divided by 1000 as exact decimals: nanoseconds as microseconds."""
    wide = np.stack([values, values >> 63], axis=1)  # a 128-bit number is its low and its high half
    return pa.Array.from_buffers(pa.decimal128(38, 3), len(values), [None, pa.py_buffer(wide)])


def run_of_text(rows: pa.Array) -> Any:
    """Return the text of all rows, one after the other, as bytes; without copying it. No row is null."""
    offsets = np.frombuffer(rows.buffers()[1], np.int32)[rows.offset : rows.offset + len(rows) + 1]
    return memoryview(rows.buffers()[2])[offsets[0] : offsets[-1]] if len(rows) else b""
