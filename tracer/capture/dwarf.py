"""What DWARF knows that symbols do not: where struct members lie and where a function was inlined.

A debug build of Redis holds some 200,000 entries; pyelftools decodes each in 10 us or more, so a walk takes
seconds. Here nothing is walked: a name is looked for in ``.debug_str`` and its reference in ``.debug_info``,
both over the raw bytes, and pyelftools decodes only what stands there. The answer is held to the question
(right tag, and the very attribute that was found). It costs some ten milliseconds, so a recording can afford
it. DWARF 2 to 5; entries whose name is given by an index or lies in a supplementary file (clang's ``strx``,
dwz's alternate strings) are passed over, which loses an answer and never makes up one.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from elftools.common.utils import struct_parse
from elftools.dwarf.compileunit import CompileUnit
from elftools.dwarf.die import DIE, AttributeValue
from elftools.dwarf.dwarf_expr import DWARFExprParser
from elftools.dwarf.dwarfinfo import DebugSectionDescriptor, DwarfConfig, DWARFInfo
from elftools.dwarf.ranges import BaseAddressEntry

from stallscope.tracer.capture.elf import DAMAGE, ElfFile, reading

_SECTIONS = (
    "debug_info",
    "debug_abbrev",
    "debug_str",
    "debug_line_str",
    "debug_str_offsets",
    "debug_addr",
    "debug_ranges",
    "debug_rnglists",
)
_NAME = ("DW_AT_name",)
_REFERENCE = ("DW_AT_abstract_origin", "DW_AT_specification")

_MAX_MEMBERS = 4096
_MAX_HITS = 100_000
_MAX_BYTES_BEFORE = 24


class Dwarf:
    """The debug information of one ELF file, decoded only where a question leads.

    Every method raises SymbolError on damaged debug information.
    """

    def __init__(self, elf: ElfFile) -> None:
        self._shown = elf.shown
        self._info = elf.named(".debug_info")
        self._strings = elf.named(".debug_str")
        with reading(self._shown):
            self._dwarf = _open(elf)

    @property
    def is_empty(self) -> bool:
        """Return whether the file has no debug information at all."""
        return not self._info

    def members(self, struct_name: str, required: str) -> dict[str, int]:
        """Return the byte offset of every member of a struct.

        Args:
            struct_name: name of the struct.
            required: a member it must have; another struct of the same name is passed over.

        Returns:
            Offsets by member name, empty when no such struct is described.
        """
        with reading(self._shown):
            for entry in self._entries_with_name(struct_name, "DW_TAG_structure_type"):
                if entry.has_children and "DW_AT_byte_size" in entry.attributes:
                    members = _members_of(entry)
                    if required in members:
                        return members
            return {}

    def inlined_at(self, function: str) -> list[int]:
        """Return the first address of every inlined copy of a function, ascending."""
        with reading(self._shown):
            waiting = list(self._entries_with_name(function, "DW_TAG_subprogram"))
            origins = {entry.offset for entry in waiting}
            addresses = set()
            # Link-time optimisation repeats an entry in its own units and refers to the first.
            while waiting:
                for entry in self._referring(waiting.pop()):
                    if entry.tag == "DW_TAG_inlined_subroutine":
                        addresses.add(self._first_address(entry))
                    elif entry.tag == "DW_TAG_subprogram" and entry.offset not in origins:
                        origins.add(entry.offset)
                        waiting.append(entry)
            return sorted(addresses - {0})

    def _entries_with_name(self, name: str, tag: str) -> Iterator[DIE]:
        text = name.encode() + b"\0"
        offsets = list(_occurrences(self._strings, text))
        whole = [at for at in offsets if at == 0 or self._strings[at - 1] == 0]
        # Linkers share tails, so a name may be the end of a longer one; but only if it stands nowhere alone.
        for choice in (whole, sorted(set(offsets) - set(whole))):
            is_known = False
            references = (self._words_equal(offset) for offset in choice)
            for places in chain(references, [_occurrences(self._info, text)]):
                for at in places:
                    entry = self._entry_around(at, _NAME)
                    if entry is not None and entry.tag == tag:
                        is_known = True
                        yield entry
            if is_known:
                return

    def _referring(self, origin: DIE) -> Iterator[DIE]:
        """Yield the entries that are copies of an entry, in its own unit and in others."""
        unit = origin.cu
        near = self._words_equal(origin.offset - unit.cu_offset, unit.cu_die_offset, unit.cu_offset + unit.size)
        far = self._words_equal(origin.offset)
        for places, form in ((near, "DW_FORM_ref4"), (far, "DW_FORM_ref_addr")):
            for at in places:
                entry = self._entry_around(at, _REFERENCE)
                if entry is not None and any(one.form == form and one.offset == at for one in _attributes(entry)):
                    yield entry

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

    def _entry_around(self, position: int, wanted: tuple[str, ...]) -> DIE | None:
        """Return the entry that has one of the wanted attributes exactly at a position, if there is one."""
        unit = self._dwarf.get_CU_containing(position)
        found = None
        for start in range(position - 1, max(position - _MAX_BYTES_BEFORE, unit.cu_die_offset) - 1, -1):
            try:
                if not self._may_have(unit, start, wanted):
                    continue
                entry = unit.get_DIE_from_refaddr(start)
            except DAMAGE:
                continue
            # The second byte of a two-byte code may itself be a code: the longest is the entry.
            stands = any(one.name in wanted and one.offset == position for one in _attributes(entry))
            if stands and _is_plausible(entry):
                found = entry
        return found

    def _may_have(self, unit: CompileUnit, start: int, wanted: tuple[str, ...]) -> bool:
        """Return whether what may be an entry would have one of the attributes by its abbreviation."""
        code = struct_parse(unit.structs.Dwarf_uleb128(""), self._dwarf.debug_info_sec.stream, start)
        return code != 0 and any(
            name in wanted for name, _ in unit.get_abbrev_table().get_abbrev(code).iter_attr_specs()
        )

    def _first_address(self, entry: DIE) -> int:
        for name in ("DW_AT_low_pc", "DW_AT_entry_pc"):
            first = entry.attributes.get(name)
            if first is not None and first.form.startswith("DW_FORM_addr"):
                return int(first.value)
        ranges, lists = entry.attributes.get("DW_AT_ranges"), self._dwarf.range_lists()
        if ranges is None or lists is None:
            return 0
        base = entry.cu.get_top_DIE().attributes.get("DW_AT_low_pc")
        base_address = int(base.value) if base is not None else 0
        for one in lists.get_range_list_at_offset(ranges.value, entry.cu):
            if isinstance(one, BaseAddressEntry):
                base_address = one.base_address
            else:
                return int(one.begin_offset + (0 if one.is_absolute else base_address))
        return 0


def _open(elf: ElfFile) -> DWARFInfo:
    """Return pyelftools' view of the sections this module needs, each read within its limits.

    ``ELFFile.get_dwarf_info`` would read and decompress line numbers and location lists too: 11 ms instead
    of 3 ms for Redis 5.0.
    """
    asked = [name for name in inspect.signature(DWARFInfo).parameters if name.endswith("_sec")]
    sections: dict[str, Any] = dict.fromkeys(asked)  # each release of pyelftools asks for one more
    for name in _SECTIONS:
        content = elf.named(f".{name}")
        if content:
            sections[f"{name}_sec"] = DebugSectionDescriptor(io.BytesIO(content), f".{name}", 0, len(content), 0)
    return DWARFInfo(config=DwarfConfig(little_endian=True, machine_arch="x64", default_address_size=8), **sections)


def _members_of(entry: DIE) -> dict[str, int]:
    """Return the members of a struct; walked by size, as a damaged DW_AT_sibling may lead round in a circle."""
    members: dict[str, int] = {}
    unit = entry.cu
    at, depth = entry.offset + entry.size, 1
    for _ in range(_MAX_MEMBERS):
        if depth == 0 or at >= unit.cu_offset + unit.size:
            break
        child = unit.get_DIE_from_refaddr(at)
        if depth == 1 and child.tag == "DW_TAG_member":
            name = child.attributes.get("DW_AT_name")
            if name is not None and isinstance(name.value, bytes):
                members[name.value.decode("utf-8", "replace")] = _member_offset(child)
        at += child.size
        depth += -1 if child.is_null() else bool(child.has_children)
    return members


def _member_offset(member: DIE) -> int:
    location = member.attributes.get("DW_AT_data_member_location")
    if location is None:
        return 0
    if isinstance(location.value, int):
        return location.value
    # DWARF 2 writes the offset as an expression.
    operations = DWARFExprParser(member.cu.structs).parse_expr(location.value)
    return int(operations[0].args[0]) if operations and operations[0].op_name == "DW_OP_plus_uconst" else 0


def _is_plausible(entry: DIE) -> bool:
    unit = entry.cu
    end = unit.cu_offset + unit.size
    for one in _attributes(entry):
        if one.form == "DW_FORM_ref4" and not unit.cu_die_offset <= unit.cu_offset + one.raw_value <= end:
            return False
        if one.name == "DW_AT_sibling" and unit.cu_offset + one.raw_value < entry.offset + entry.size:
            return False
        if (one.form == "DW_FORM_strp" and one.value is None) or (one.form == "DW_FORM_flag" and one.raw_value > 1):
            return False
    return bool(entry.offset + entry.size <= end)


def _attributes(entry: DIE) -> list[AttributeValue]:
    return list(entry.attributes.values())


def _occurrences(data: bytes, pattern: bytes) -> Iterator[int]:
    at = data.find(pattern)
    for _ in range(_MAX_HITS):
        if at < 0:
            return
        yield at
        at = data.find(pattern, at + 1)
