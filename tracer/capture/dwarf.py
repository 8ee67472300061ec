"""What DWARF knows that symbols do not: where struct members lie and where a function was inlined.

A debug build of Redis holds some 200,000 entries; walking them takes seconds. Here nothing is walked: a
name is looked for in ``.debug_str`` and its reference in ``.debug_info``, both over the raw bytes, and
only what stands there is decoded and checked (right tag, and the very attribute that was found). It costs
milliseconds, so a recording can afford it. DWARF 2 to 5 as gcc writes it; entries that need ``.debug_addr``
or a supplementary file (clang's ``addrx``, dwz's alternate strings) are passed over, which loses an answer
and never makes up one.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from stallscope.tracer.capture.elf import ElfFile, reading

_TAG_MEMBER, _TAG_STRUCTURE, _TAG_INLINED, _TAG_SUBPROGRAM = 0x0D, 0x13, 0x1D, 0x2E
_AT_SIBLING, _AT_NAME, _AT_BYTE_SIZE, _AT_LOW_PC, _AT_ORIGIN = 0x01, 0x03, 0x0B, 0x11, 0x31
_AT_MEMBER_LOCATION, _AT_SPECIFICATION, _AT_ENTRY_PC, _AT_RANGES = 0x38, 0x47, 0x52, 0x55
_FORM_ADDR, _FORM_STRP, _FORM_STRING, _FORM_REF4, _FORM_REF_ADDR = 0x01, 0x0E, 0x08, 0x13, 0x10
_FORM_FLAG, _FORM_SEC_OFFSET, _FORM_INDIRECT, _FORM_IMPLICIT_CONST = 0x0C, 0x17, 0x16, 0x21

# Size of each fixed form; "o" marks a section offset (4 bytes in 32-bit DWARF), "a" an address.
_FIXED = {
    0x05: 2, 0x06: 4, 0x07: 8, 0x0B: 1, 0x0C: 1, 0x11: 1, 0x12: 2, 0x13: 4, 0x14: 8, 0x19: 0, 0x1C: 4,
    0x1E: 16, 0x20: 8, 0x24: 8, 0x25: 1, 0x26: 2, 0x27: 3, 0x28: 4, 0x29: 1, 0x2A: 2, 0x2B: 3, 0x2C: 4,
}  # fmt: skip
_OFFSET_SIZED = {0x0E, 0x17, 0x1D, 0x1F, 0x1F20, 0x1F21}
_ULEB = {0x0F, 0x15, 0x1A, 0x1B, 0x22, 0x23, 0x1F01, 0x1F02}
_SLEB = {0x0D}
_BLOCK_LENGTH = {0x0A: 1, 0x03: 2, 0x04: 4}
_BLOCK_ULEB = {0x09, 0x18}

_MAX_MEMBERS = 4096
_MAX_HITS = 100_000


@dataclass(frozen=True)
class _Unit:
    start: int
    dies: int
    end: int
    version: int
    address_bytes: int
    offset_bytes: int
    abbreviations: int


@dataclass(frozen=True)
class _Entry:
    """One decoded entry: for every attribute its form, its value and where in .debug_info it stands."""

    tag: int
    has_children: bool
    attributes: dict[int, tuple[int, int, int]]
    end: int


_Abbreviation = tuple[int, bool, list[tuple[int, int, int]]]


def _uleb(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number in the debug information has no end")


def _sleb(data: bytes, at: int) -> tuple[int, int]:
    start = at
    value, at = _uleb(data, at)
    bits = 7 * (at - start)
    return (value - (1 << bits) if value >> (bits - 1) & 1 else value), at


class Dwarf:
    """The debug information of one ELF file, decoded only where a question leads.

    Every method raises SymbolError on damaged debug information.
    """

    def __init__(self, elf: ElfFile) -> None:
        self._elf = elf
        self._shown = elf.shown
        self._info = elf.named(".debug_info")
        self._strings = elf.named(".debug_str")
        self._abbrev = elf.named(".debug_abbrev")
        self._tables: dict[int, dict[int, _Abbreviation]] = {}
        with reading(self._shown):
            self._units = list(self._read_units())
        self._unit_starts = [unit.start for unit in self._units]

    @property
    def is_empty(self) -> bool:
        """Return whether the file has no debug information at all."""
        return not self._units

    def members(self, struct_name: str, required: str) -> dict[str, int]:
        """Return the byte offset of every member of a struct.

        Args:
            struct_name: name of the struct.
            required: a member it must have; another struct of the same name is passed over.

        Returns:
            Offsets by member name, empty when no such struct is described.
        """
        with reading(self._shown):
            for at, unit in self._entries_with_name(struct_name, _TAG_STRUCTURE):
                entry = self._decode(at, unit)
                if entry.has_children and _AT_BYTE_SIZE in entry.attributes:
                    members = self._members_of(entry, unit)
                    if required in members:
                        return members
            return {}

    def inlined_at(self, function: str) -> list[int]:
        """Return the first address of every inlined copy of a function, ascending."""
        with reading(self._shown):
            origins = {at for at, _ in self._entries_with_name(function, _TAG_SUBPROGRAM)}
            # Link-time optimisation repeats an entry in its own units and refers to the first.
            addresses = set()
            waiting = list(origins)
            while waiting:
                for at, unit, entry in self._referring(waiting.pop()):
                    if entry.tag == _TAG_INLINED:
                        addresses.add(self._entry_address(entry, unit))
                    elif entry.tag == _TAG_SUBPROGRAM and at not in origins:
                        origins.add(at)
                        waiting.append(at)
            return sorted(addresses - {0})

    def _read_units(self) -> Iterator[_Unit]:
        data, at = self._info, 0
        while at + 11 < len(data):
            start = at
            (length,) = struct.unpack_from("<I", data, at)
            offset_bytes, body = 4, at + 4
            if length == 0xFFFFFFFF:
                (length,) = struct.unpack_from("<Q", data, at + 4)
                offset_bytes, body = 8, at + 12
            end = body + length
            if length < 7 or end > len(data):
                raise ValueError("a unit of the debug information is longer than its section")
            (version,) = struct.unpack_from("<H", data, body)
            at = end
            if not 2 <= version <= 5:
                continue
            shape = "<I" if offset_bytes == 4 else "<Q"
            if version < 5:
                (abbreviations,) = struct.unpack_from(shape, data, body + 2)
                address_bytes, dies = data[body + 2 + offset_bytes], body + 3 + offset_bytes
            else:
                kind, address_bytes = data[body + 2], data[body + 3]
                (abbreviations,) = struct.unpack_from(shape, data, body + 4)
                dies = body + 4 + offset_bytes + {2: 8 + offset_bytes, 6: 8 + offset_bytes, 4: 8, 5: 8}.get(kind, 0)
            if address_bytes == 8:
                yield _Unit(start, dies, end, version, address_bytes, offset_bytes, abbreviations)

    def _unit_of(self, at: int) -> _Unit | None:
        index = bisect_right(self._unit_starts, at) - 1
        if index < 0:
            return None
        unit = self._units[index]
        return unit if unit.dies <= at < unit.end else None

    def _abbreviations(self, offset: int) -> dict[int, _Abbreviation]:
        known = self._tables.get(offset)
        if known is not None:
            return known
        table: dict[int, _Abbreviation] = {}
        data, at = self._abbrev, offset
        while True:
            code, at = _uleb(data, at)
            if code == 0:
                break
            tag, at = _uleb(data, at)
            has_children = data[at] != 0
            at += 1
            attributes: list[tuple[int, int, int]] = []
            while True:
                attribute, at = _uleb(data, at)
                form, at = _uleb(data, at)
                constant = 0
                if form == _FORM_IMPLICIT_CONST:
                    constant, at = _sleb(data, at)
                if attribute == 0 and form == 0:
                    break
                attributes.append((attribute, form, constant))
            table[code] = (tag, has_children, attributes)
        self._tables[offset] = table
        return table

    def _decode(self, at: int, unit: _Unit) -> _Entry:
        code, at = _uleb(self._info, at)
        tag, has_children, shape = self._abbreviations(unit.abbreviations)[code]
        attributes = {}
        for attribute, form, constant in shape:
            value, end = self._value(form, constant, at, unit)
            attributes[attribute] = (form, value, at)
            at = end
        if at > unit.end:
            raise ValueError("an entry of the debug information is longer than its unit")
        return _Entry(tag, has_children, attributes, at)

    def _value(self, form: int, constant: int, at: int, unit: _Unit) -> tuple[int, int]:
        data = self._info
        size = _FIXED.get(form)
        if size is None:
            if form == _FORM_ADDR:
                size = unit.address_bytes
            elif form in _OFFSET_SIZED or (form == _FORM_REF_ADDR and unit.version > 2):
                size = unit.offset_bytes
            elif form == _FORM_REF_ADDR:
                size = unit.address_bytes
        if size is not None:
            return int.from_bytes(data[at : at + size], "little"), at + size
        if form in _ULEB:
            return _uleb(data, at)
        if form in _SLEB:
            return _sleb(data, at)
        if form == _FORM_IMPLICIT_CONST:
            return constant, at
        if form == _FORM_STRING:
            end = data.index(b"\0", at)
            return at, end + 1
        if form == _FORM_INDIRECT:
            inner, at = _uleb(data, at)
            if inner == _FORM_INDIRECT:
                raise ValueError("a form in the debug information is indirect twice")
            return self._value(inner, 0, at, unit)
        if form in _BLOCK_LENGTH:
            width = _BLOCK_LENGTH[form]
            length, at = int.from_bytes(data[at : at + width], "little"), at + width
        elif form in _BLOCK_ULEB:
            length, at = _uleb(data, at)
        else:
            raise ValueError(f"form {form:#x} of the debug information is unknown")
        # DWARF 2 writes a member's offset as the expression DW_OP_plus_uconst.
        plain = _uleb(data, at + 1)[0] if length > 1 and data[at] == 0x23 else 0
        return plain, at + length

    def _name(self, entry: _Entry) -> str:
        form, value, _ = entry.attributes.get(_AT_NAME, (0, 0, 0))
        data = {_FORM_STRP: self._strings, _FORM_STRING: self._info}.get(form, b"")
        end = data.find(b"\0", value)
        return data[value:end].decode("utf-8", "replace") if end >= 0 else ""

    def _members_of(self, entry: _Entry, unit: _Unit) -> dict[str, int]:
        members: dict[str, int] = {}
        at, depth = entry.end, 1
        for _ in range(_MAX_MEMBERS):
            if depth == 0 or at >= unit.end:
                break
            if self._info[at] == 0:
                at, depth = at + 1, depth - 1
                continue
            child = self._decode(at, unit)
            if depth == 1 and child.tag == _TAG_MEMBER:
                members[self._name(child)] = child.attributes.get(_AT_MEMBER_LOCATION, (0, 0, 0))[1]
            at = child.end
            depth += child.has_children
        return members

    def _entries_with_name(self, name: str, tag: int) -> Iterator[tuple[int, _Unit]]:
        text = name.encode() + b"\0"
        offsets = list(_occurrences(self._strings, text))
        whole = [at for at in offsets if at == 0 or self._strings[at - 1] == 0]
        # Linkers share tails, so a name may be the end of a longer one; but only if it stands nowhere alone.
        for choice in (whole, sorted(set(offsets) - set(whole))):
            is_known = False
            references = (self._words_equal(offset) for offset in choice)
            for places in chain(references, [_occurrences(self._info, text)]):
                for at in places:
                    found = self._entry_around(at, (_AT_NAME,))
                    if found is not None and found[2].tag == tag:
                        is_known = True
                        yield found[:2]
            if is_known:
                return

    def _referring(self, origin: int) -> Iterator[tuple[int, _Unit, _Entry]]:
        """Yield the entries that are copies of an entry, in its own unit and in others."""
        unit = self._unit_of(origin)
        if unit is None:
            return
        near = self._words_equal(origin - unit.start, unit.dies, unit.end)
        far = self._words_equal(origin)
        for places, form in ((near, _FORM_REF4), (far, _FORM_REF_ADDR)):
            for at in places:
                found = self._entry_around(at, (_AT_ORIGIN, _AT_SPECIFICATION))
                if found is not None and any(one[::2] == (form, at) for one in found[2].attributes.values()):
                    yield found

    def _words_equal(self, value: int, start: int = 0, end: int | None = None) -> list[int]:
        """Return where four bytes hold a number, at any alignment.

        ``bytes.find`` takes ten times as long: it skips by the last byte, which is 0 in most places.
        """
        stop = len(self._info) if end is None else end
        places: list[int] = []
        for shift in range(4):
            count = (stop - start - shift) // 4
            if count > 0 and value <= 0xFFFFFFFF:
                words = np.frombuffer(self._info, "<u4", count, start + shift)
                hits = np.flatnonzero(words == np.uint32(value))[:_MAX_HITS]
                places += (hits * 4 + (start + shift)).tolist()
        return sorted(places)

    def _entry_around(self, position: int, wanted: tuple[int, ...]) -> tuple[int, _Unit, _Entry] | None:
        """Return the entry that has one of the wanted attributes exactly at a position, if there is one."""
        unit = self._unit_of(position)
        if unit is None:
            return None
        table = self._abbreviations(unit.abbreviations)
        best = None
        for start in range(position - 1, max(position - 24, unit.dies - 1), -1):
            try:
                code, _ = _uleb(self._info, start)
                if code not in table or not any(one in wanted for one, _, _ in table[code][2]):
                    continue
                entry = self._decode(start, unit)
            except (ValueError, LookupError):
                continue
            # The second byte of a two-byte code may itself be a code: the longest is the entry.
            stands = any(entry.attributes.get(one, (0, 0, -1))[2] == position for one in wanted)
            if stands and self._is_plausible(entry, unit):
                best = start, unit, entry
        return best

    def _is_plausible(self, entry: _Entry, unit: _Unit) -> bool:
        for attribute, (form, value, _) in entry.attributes.items():
            if form == _FORM_REF4 and not unit.dies <= unit.start + value <= unit.end:
                return False
            if attribute == _AT_SIBLING and unit.start + value < entry.end:
                return False
            if (form == _FORM_STRP and value >= len(self._strings)) or (form == _FORM_FLAG and value > 1):
                return False
        return True

    def _entry_address(self, entry: _Entry, unit: _Unit) -> int:
        low = entry.attributes.get(_AT_LOW_PC)
        if low is not None and low[0] == _FORM_ADDR:
            return low[1]
        first = entry.attributes.get(_AT_ENTRY_PC)
        if first is not None and first[0] == _FORM_ADDR:
            return first[1]
        ranges = entry.attributes.get(_AT_RANGES)
        if ranges is None or ranges[0] not in (_FORM_SEC_OFFSET, 0x06):
            return 0
        base = self._decode(unit.dies, unit).attributes.get(_AT_LOW_PC, (0, 0, 0))
        base_address = base[1] if base[0] == _FORM_ADDR else 0
        if unit.version < 5:
            return self._first_of_ranges(ranges[1], base_address)
        return self._first_of_rnglist(ranges[1], base_address)

    def _first_of_ranges(self, at: int, base: int) -> int:
        data = self._elf.named(".debug_ranges")
        while True:
            begin, end = struct.unpack_from("<QQ", data, at)
            if begin == 0 and end == 0:
                return 0
            if begin != 0xFFFFFFFFFFFFFFFF:
                return int(base + begin)
            base, at = end, at + 16

    def _first_of_rnglist(self, at: int, base: int) -> int:
        data = self._elf.named(".debug_rnglists")
        while True:
            kind, at = data[at], at + 1
            if kind == 4:  # DW_RLE_offset_pair
                return base + _uleb(data, at)[0]
            if kind in (6, 7):  # DW_RLE_start_end, DW_RLE_start_length
                return int(struct.unpack_from("<Q", data, at)[0])
            if kind != 5:  # the end, or an index into .debug_addr
                return 0
            base, at = struct.unpack_from("<Q", data, at)[0], at + 8


def _occurrences(data: bytes, pattern: bytes, start: int = 0, end: int | None = None) -> Iterator[int]:
    stop = len(data) if end is None else end
    at = data.find(pattern, start, stop)
    for _ in range(_MAX_HITS):
        if at < 0:
            return
        yield at
        at = data.find(pattern, at + 1, stop)
