"""Protobuf's wire format, written for many messages of one shape at once.

Encoding one message after the other in Python takes microseconds a message; here each field is one numpy
column of all messages. It works because a varint may be longer than it need be
(https://protobuf.dev/programming-guides/encoding/: continuation bits with zeros): where all rows of a column
get the width of its greatest value, all messages of a shape are equally long, so the lengths of nested
messages are constants. Perfetto's own writer pads its lengths in the same way.

A *matrix* here is a uint8 array of shape (messages, bytes). Field numbers stay below 2048.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.uint8]

_VARINT, _FIXED64, _BYTES = 0, 1, 2
_GROUP_BITS = 7


def varint(value: int) -> bytes:
    """Return one number as a varint of the least length; negative numbers as 64-bit two's complement."""
    rest = value & (2**64 - 1)
    encoded = bytearray()
    while rest > 0x7F:
        encoded.append(rest & 0x7F | 0x80)
        rest >>= _GROUP_BITS
    encoded.append(rest)
    return bytes(encoded)


def number_field(number: int, value: int) -> bytes:
    """Return one field that holds a varint."""
    return varint(number << 3 | _VARINT) + varint(value)


def bytes_field(number: int, payload: bytes | str) -> bytes:
    """Return one field that holds a string, bytes or a message."""
    content = payload.encode() if isinstance(payload, str) else payload
    return varint(number << 3 | _BYTES) + varint(len(content)) + content


def number_column(number: int, values: npt.NDArray[np.integer]) -> Matrix:
    """Return one varint field of every message, as wide as the greatest value needs.

    Args:
        values: any integers; negative ones take ten bytes.
    """
    rest = values.astype(np.uint64)
    greatest = int(rest.max(initial=0))
    width = len(varint(greatest))
    tag = varint(number << 3 | _VARINT)
    matrix = np.empty((len(rest), len(tag) + width), np.uint8)
    matrix[:, : len(tag)] = np.frombuffer(tag, np.uint8)
    for place in range(width):
        group = (rest >> np.uint64(_GROUP_BITS * place)) & np.uint64(0x7F)
        matrix[:, len(tag) + place] = group | np.uint64(0x80 if place < width - 1 else 0)
    return matrix


def fixed64_column(number: int, values: npt.NDArray[np.integer]) -> Matrix:
    """Return one fixed64 field of every message."""
    tag = varint(number << 3 | _FIXED64)
    matrix = np.empty((len(values), len(tag) + 8), np.uint8)
    matrix[:, : len(tag)] = np.frombuffer(tag, np.uint8)
    matrix[:, len(tag) :] = values.astype("<u8").view(np.uint8).reshape(-1, 8)
    return matrix


def constant_columns(payload: bytes, count: int) -> Matrix:
    """Return the same fields in every message."""
    return np.broadcast_to(np.frombuffer(payload, np.uint8), (count, len(payload)))


def message_column(number: int, parts: Sequence[Matrix]) -> Matrix:
    """Return one field of every message that is itself a message of these parts, in their order."""
    width = sum(part.shape[1] for part in parts)
    header = varint(number << 3 | _BYTES) + varint(width)
    return np.concatenate([constant_columns(header, len(parts[0])), *parts], axis=1)


def interleaved(shapes: Sequence[tuple[npt.NDArray[np.int64], Matrix]]) -> memoryview:
    """Return messages of several shapes as one run of bytes.

    Args:
        shapes: for each shape the place of each of its messages in the run, and the messages. Together
            the places are the numbers from 0 on.
    """
    lengths = np.empty(sum(len(places) for places, _ in shapes), np.int64)
    for places, matrix in shapes:
        lengths[places] = matrix.shape[1]
    begins = np.cumsum(lengths) - lengths
    run = np.empty(int(lengths.sum()), np.uint8)
    for places, matrix in shapes:
        run[begins[places][:, None] + np.arange(matrix.shape[1])] = matrix
    return run.data
