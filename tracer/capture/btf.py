"""Reads the kernel's own type information: which functions there are and how many arguments they take.

Linux Documentation/bpf/btf.rst describes the format.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stallscope.tracer.errors import SurroundingsError

KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")

_FUNC, _FUNC_PROTO = 12, 13
_FIXED_TAIL_BYTES = {1: 4, 3: 12, 14: 4, 17: 4}
_TAIL_BYTES_PER_ITEM = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
"""Bytes that follow a type of each kind: once (INT, ARRAY, VAR, DECL_TAG), or for each of its members."""


@dataclass(frozen=True)
class KernelFunction:
    """A function the kernel describes: its BTF type id and how many arguments it takes."""

    type_id: int
    arguments: int


@cache
def kernel_functions(path: Path = KERNEL_BTF) -> dict[str, KernelFunction]:
    """Return every function in the kernel's BTF by name.

    Raises:
        SurroundingsError: this kernel has no BTF, or it is of another form.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SurroundingsError(
            f"this kernel has no BTF: {path} is not readable; use a kernel with CONFIG_DEBUG_INFO_BTF"
        ) from error
    try:
        return _functions(data)
    except (struct.error, IndexError, ValueError, KeyError) as error:
        raise SurroundingsError(f"{path} is not the BTF this version knows") from error


def _functions(data: bytes) -> dict[str, KernelFunction]:
    magic, _, _, header_bytes, type_offset, type_bytes, string_offset, string_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError(magic)
    strings = data[header_bytes + string_offset : header_bytes + string_offset + string_bytes]
    place = header_bytes + type_offset
    end = place + type_bytes
    functions: list[tuple[int, int, int]] = []
    arguments: dict[int, int] = {}
    type_id = 1
    while place < end:
        name, info, reference = _TYPE.unpack_from(data, place)
        kind, items = info >> 24 & 0x1F, info & 0xFFFF
        place += _TYPE.size + _FIXED_TAIL_BYTES.get(kind, 0) + items * _TAIL_BYTES_PER_ITEM.get(kind, 0)
        if kind == _FUNC:
            functions.append((type_id, name, reference))
        elif kind == _FUNC_PROTO:
            arguments[type_id] = items
        type_id += 1
    return {
        strings[name : strings.index(b"\0", name)].decode(): KernelFunction(identity, arguments[prototype])
        for identity, name, prototype in functions
    }
