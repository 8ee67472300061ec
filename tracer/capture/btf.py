"""Reads the kernel's own type information: where struct members lie, which functions there are.

Linux Documentation/bpf/btf.rst describes the format. Only what is asked for is decoded; one pass over the
100,000 types of a kernel costs a tenth of a second.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stallscope.tracer.errors import SurroundingsError

KERNEL_BTF = Path("/sys/kernel/btf/vmlinux")

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_ENUMERATOR = struct.Struct("<Ii")

_ENUM, _STRUCT, _UNION, _TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _FUNC, _FUNC_PROTO = 6, 4, 5, 8, 9, 10, 11, 12, 13
_TYPE_TAG = 18
_WRAPPERS = (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG)
_FIXED_TAIL_BYTES = {1: 4, 3: 12, 14: 4, 17: 4}
_TAIL_BYTES_PER_ITEM = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}
"""Bytes that follow a type of each kind: once (INT, ARRAY, VAR, DECL_TAG), or for each of its members."""

_MAX_DEPTH = 8


@dataclass(frozen=True)
class KernelFunction:
    """A function the kernel describes: its BTF type id and how many arguments it takes."""

    type_id: int
    arguments: int


class KernelTypes:
    """The types of the running kernel, or of another BTF file."""

    def __init__(self, path: Path = KERNEL_BTF) -> None:
        """Read the file and find where each type begins.

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
            magic, _, _, header_bytes, type_offset, type_bytes, string_offset, string_bytes = _HEADER.unpack_from(data)
            if magic != _MAGIC:
                raise ValueError(magic)
            start = header_bytes + string_offset
            self._strings = data[start : start + string_bytes]
            self._types = data[header_bytes + type_offset : header_bytes + type_offset + type_bytes]
            self._places = _places(self._types)
        except (struct.error, IndexError, ValueError) as error:
            raise SurroundingsError(f"{path} is not the BTF this version knows") from error

    @property
    def count(self) -> int:
        """Return how many types there are."""
        return len(self._places)

    def functions(self, names: Iterable[str]) -> dict[str, KernelFunction]:
        """Return those of the named functions that the kernel describes."""
        wanted = self._name_offsets(names)
        found = {}
        for type_id, place in enumerate(self._places, 1):
            name, info, prototype = _TYPE.unpack_from(self._types, place)
            if name in wanted and info >> 24 & 0x1F == _FUNC:
                found[wanted[name]] = KernelFunction(type_id, self._info(prototype)[1] & 0xFFFF)
        return found

    def offsets(self, paths: Iterable[str]) -> dict[str, int]:
        """Return the byte offset of each member path, as ``inet_connection_sock.icsk_accept_queue.qlen``.

        Members of anonymous structs and unions are found as C finds them.

        Raises:
            SurroundingsError: a struct or member is missing; names it.
        """
        wanted = list(paths)
        structs = self._name_offsets({path.partition(".")[0] for path in wanted})
        roots: dict[str, int] = {}
        for type_id, place in enumerate(self._places, 1):
            name, info, _ = _TYPE.unpack_from(self._types, place)
            if name in structs and info >> 24 & 0x1F == _STRUCT and info & 0xFFFF:
                roots.setdefault(structs[name], type_id)
        found = {}
        for path in wanted:
            root, _, members = path.partition(".")
            offset_bits = 0
            type_id = roots.get(root, 0)
            for member in members.split("."):
                inner = self._member(type_id, member.encode()) if type_id else None
                if inner is None:
                    raise SurroundingsError(f"this kernel's types have no {path}; please report the kernel's version")
                offset_bits += inner[0]
                type_id = inner[1]
            found[path] = offset_bits // 8
        return found

    def enumerators(self, names: Iterable[str]) -> dict[str, int]:
        """Return the value of each named enumerator, in whichever enum of 32 bits it is.

        Raises:
            SurroundingsError: one is missing; names it.
        """
        wanted = list(names)
        places = self._name_offsets(wanted)
        found = {}
        for place in self._places:
            _, info, _ = _TYPE.unpack_from(self._types, place)
            if info >> 24 & 0x1F != _ENUM:
                continue
            values = self._types[place + _TYPE.size : place + _TYPE.size + (info & 0xFFFF) * _ENUMERATOR.size]
            for name, value in _ENUMERATOR.iter_unpack(values):
                if name in places:
                    found[places[name]] = value
        for name in wanted:
            if name not in found:
                raise SurroundingsError(f"this kernel's types have no {name}; please report the kernel's version")
        return found

    def _member(self, type_id: int, name: bytes, depth: int = 0) -> tuple[int, int] | None:
        """Return (offset in bits, type id) of a member, looking into anonymous members too."""
        type_id = self._resolved(type_id)
        if depth > _MAX_DEPTH or not type_id:
            return None
        for member, member_type, offset in self._members(type_id):
            text = self._strings[member : self._strings.index(b"\0", member)]
            if text == name:
                return offset, member_type
            if not text:
                inner = self._member(member_type, name, depth + 1)
                if inner is not None:
                    return offset + inner[0], inner[1]
        return None

    def _members(self, type_id: int) -> Iterator[tuple[int, int, int]]:
        """Yield (name, type id, offset in bits) of each member of a struct or union."""
        _, info, _ = self._info(type_id)
        if info >> 24 & 0x1F not in (_STRUCT, _UNION):
            return
        has_bitfields = info >> 31
        for index in range(info & 0xFFFF):
            place = self._places[type_id - 1] + _TYPE.size + index * _MEMBER.size
            name, member_type, offset = _MEMBER.unpack_from(self._types, place)
            yield name, member_type, offset & 0xFFFFFF if has_bitfields else offset

    def _resolved(self, type_id: int) -> int:
        """Return the type behind typedefs and qualifiers."""
        for _ in range(_MAX_DEPTH):
            _, info, reference = self._info(type_id)
            if info >> 24 & 0x1F not in _WRAPPERS:
                break
            type_id = reference
        return type_id

    def _info(self, type_id: int) -> tuple[int, int, int]:
        if not 0 < type_id <= len(self._places):
            return 0, 0, 0
        name, info, reference = _TYPE.unpack_from(self._types, self._places[type_id - 1])
        return name, info, reference

    def _name_offsets(self, names: Iterable[str]) -> dict[int, str]:
        """Return where each name stands in the string table (the kernel stores every string once)."""
        found = {}
        for name in names:
            place = self._strings.find(b"\0" + name.encode() + b"\0")
            if place >= 0:
                found[place + 1] = name
        return found


@cache
def kernel_types() -> KernelTypes:
    """Return the running kernel's types, read once; raises as ``KernelTypes``."""
    return KernelTypes()


def _places(types: bytes) -> list[int]:
    places = []
    place = 0
    unpack = struct.Struct("<I").unpack_from
    while place < len(types):
        places.append(place)
        (info,) = unpack(types, place + 4)
        kind = info >> 24 & 0x1F
        place += 12 + _FIXED_TAIL_BYTES.get(kind, 0) + (info & 0xFFFF) * _TAIL_BYTES_PER_ITEM.get(kind, 0)
    if place != len(types):
        raise ValueError(place)
    return places
