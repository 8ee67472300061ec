"""Who calls a function: direct calls and jumps, calls through the PLT, and addresses that are taken.

A call on x86-64 holds the distance to its target in four bytes. For every byte of the code the sum
"here + 4 + those four bytes" is computed once with numpy; a target's callers are where the sum equals its
address. That finds every direct call in a server's megabyte of code in a millisecond, and by chance finds a
wrong one once in some thousand binaries (2**-32 per byte, and the byte before must be a call's as well).
:meth:`Callers.confirm` decodes the containing function with capstone and removes even those. Jumps with a
one-byte distance (a tail call to a neighbour) are found by chance all the time, so :meth:`Callers.near`
returns confirmed ones only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stallscope.tracer.capture.elf import ElfFile, Section, reading
from stallscope.tracer.capture.symbol_table import SymbolTable

MAX_CODE_BYTES = 1 << 28
# Elf64_Rela and the relocation types of the x86-64 ABI.
_RELA = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<i8")])
_R_64, _R_GLOB_DAT, _R_JUMP_SLOT, _R_RELATIVE, _R_IRELATIVE = 1, 6, 7, 8, 37


@dataclass(frozen=True)
class Site:
    """One place that refers to a function.

    Attributes:
        address: virtual address of the instruction, or of the pointer.
        kind: ``call``, ``jump`` (a tail call), ``plt`` (either, through the PLT or the GOT), ``taken``
            (an instruction loads the address) or ``pointer`` (data holds it).
        function: the function the instruction is in, as the symbol table names it; empty when it has none.
    """

    address: int
    kind: str
    function: str


@dataclass(frozen=True)
class _Code:
    address: int
    content: bytes
    targets: tuple[NDArray[np.uint32], ...]


class Callers:
    """The direct callers of functions of one ELF file."""

    def __init__(self, elf: ElfFile, tables: Sequence[SymbolTable]) -> None:
        self._elf = elf
        self._tables = tables

    def of(self, address: int, name: str = "") -> list[Site]:
        """Return every place that calls, jumps to or takes the address of a function.

        Args:
            address: its virtual address.
            name: its name, to find calls through the PLT of a library.

        Raises:
            SymbolError: the file is damaged.
        """
        with reading(self._elf.shown):
            sites = self._direct(address)
            for slot in self._slots(name, address):
                sites += self._through(slot)
            sites += self._pointers(address)
            return sorted(set(sites), key=lambda site: site.address)

    def near(self, address: int) -> list[Site]:
        """Return the short jumps to a function from a neighbour, each confirmed by decoding.

        Raises:
            SymbolError: the file is damaged.
        """
        with reading(self._elf.shown):
            own = self._function_at(address)
            sites = []
            for at in range(max(0, address - 129), address + 127):
                opcode = self._bytes_at(at, 2)
                if len(opcode) < 2 or not (opcode[0] == 0xEB or 0x70 <= opcode[0] <= 0x7F):
                    continue
                if at + 2 + (opcode[1] ^ 0x80) - 0x80 == address:
                    around = self._function_at(at)
                    if around is not None and around != own:
                        sites.append(Site(at, "jump", self._name_at(at)))
            return self.confirm(sites) if sites else []

    def confirm(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites where an instruction really starts, decoding each function from its beginning.

        Pointers in data and sites in code without a symbol cannot be checked and are kept.
        """
        import capstone  # 50 ms to import, and only full answers need it

        engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        starts: dict[int, set[int]] = {}
        kept = []
        for site in sites:
            function = self._function_at(site.address) if site.kind != "pointer" else None
            if function is None:
                kept.append(site)
                continue
            start, size = function
            if start not in starts:
                starts[start] = {entry[0] for entry in engine.disasm_lite(self._bytes_at(start, size), start)}
            # Data between instructions ends the decoding early: what lies behind cannot be refuted.
            decoded = starts[start]
            # A prefix (REX, BND, addr32) may stand before the opcode the site was recognised by.
            is_start = site.address in decoded or site.address - 1 in decoded
            if is_start or site.address > max(decoded, default=0):
                kept.append(site)
        return kept

    @cached_property
    def _code(self) -> list[_Code]:
        code = []
        total = 0
        for address, content in self._elf.code():
            total += len(content)
            if total > MAX_CODE_BYTES:
                raise ValueError("more code than any server has")
            targets = []
            for shift in range(4):
                count = max(0, (len(content) - shift) // 4)
                words = np.frombuffer(content, "<u4", count, shift) if count else np.zeros(0, "<u4")
                after = np.arange(count, dtype=np.uint32) * np.uint32(4)
                after += np.uint32((address + shift + 4) & 0xFFFFFFFF)
                targets.append(words + after)
            code.append(_Code(address, content, tuple(targets)))
        return code

    def _relative_to(self, target: int) -> list[tuple[_Code, int]]:
        """Return every place whose four bytes are the distance to a target, as code and position."""
        found = []
        wanted = np.uint32(target & 0xFFFFFFFF)
        for code in self._code:
            for shift, sums in enumerate(code.targets):
                for index in np.flatnonzero(sums == wanted).tolist():
                    position = 4 * index + shift
                    distance = int.from_bytes(code.content[position : position + 4], "little", signed=True)
                    if code.address + position + 4 + distance == target:
                        found.append((code, position))
        return found

    def _direct(self, target: int) -> list[Site]:
        own = self._name_at(target)
        sites = []
        for code, position in self._relative_to(target):
            before = code.content[max(0, position - 3) : position]
            address = code.address + position
            if before[-1:] == b"\xe8":
                sites.append(Site(address - 1, "call", self._name_at(address - 1)))
            elif before[-1:] == b"\xe9":
                sites.append(Site(address - 1, "jump", self._name_at(address - 1)))
            elif before[-2:-1] == b"\x0f" and 0x80 <= before[-1] <= 0x8F:
                sites.append(Site(address - 2, "jump", self._name_at(address - 2)))
            elif len(before) == 3 and before[1] == 0x8D and before[2] & 0xC7 == 0x05 and 0x48 <= before[0] <= 0x4F:
                sites.append(Site(address - 3, "taken", self._name_at(address - 3)))
        if not self._elf.is_relocated:
            sites += self._immediates(target)
        # A jump back to the first instruction of the same function is a loop.
        return [site for site in sites if not (site.kind == "jump" and site.function == own and own)]

    def _immediates(self, target: int) -> list[Site]:
        """Return the ``mov`` and ``push`` instructions of a non-PIE program that hold an absolute address."""
        if target > 0x7FFFFFFF:
            return []
        wanted = target.to_bytes(4, "little")
        sites = []
        for code in self._code:
            at = code.content.find(wanted)
            while at >= 0:
                before = code.content[max(0, at - 8) : at]
                # b8+r imm32; 68 imm32; c7 /0 with register, [reg], [reg+disp8], [rsp+disp8] or [rip+disp32]
                length = 1 if before[-1:] and (0xB8 <= before[-1] <= 0xBF or before[-1] == 0x68) else 0
                for distance in (2, 3, 4, 6):
                    if before[-distance : len(before) - distance + 1] == b"\xc7" and not length:
                        length = distance
                if length:
                    address = code.address + at - length
                    sites.append(Site(address, "taken", self._name_at(address)))
                at = code.content.find(wanted, at + 1)
        return sites

    @cached_property
    def _relocations(self) -> NDArray[Any]:
        tables = []
        for section in self._elf.sections:
            if section.type == "SHT_RELA" and section.is_loaded:
                content = self._elf.data(section)
                tables.append(np.frombuffer(content[: len(content) // _RELA.itemsize * _RELA.itemsize], _RELA))
        return np.concatenate(tables) if tables else np.zeros(0, _RELA)

    @cached_property
    def _dynamic(self) -> SymbolTable | None:
        return self._elf.symbol_table("SHT_DYNSYM", ".dynsym")

    def _slots(self, name: str, address: int) -> list[int]:
        """Return the GOT slots the dynamic linker fills with a function's address."""
        if self._dynamic is None or not name:
            return []
        kinds = self._relocations["info"] & np.uint64(0xFFFFFFFF)
        wanted = self._relocations[(kinds == _R_JUMP_SLOT) | (kinds == _R_GLOB_DAT)]
        numbers = (wanted["info"] >> np.uint64(32)).astype(np.int64)
        return [
            int(offset)
            for number, offset in zip(numbers.tolist(), wanted["offset"].tolist(), strict=True)
            if self._dynamic.name_of(number) == name
        ]

    def _through(self, slot: int) -> list[Site]:
        """Return the calls through a GOT slot, and the calls of the PLT stub that jumps through it."""
        sites = []
        for code, position in self._relative_to(slot):
            before = code.content[max(0, position - 2) : position]
            address = code.address + position - 2
            if before == b"\xff\x15":
                sites.append(Site(address, "plt", self._name_at(address)))
            elif before == b"\xff\x25":
                stub = self._stub_section(address)
                if stub is None:
                    sites.append(Site(address, "plt", self._name_at(address)))
                    continue
                width = stub.entsize if stub.entsize in (8, 16) else 16
                start = address - (address - stub.address) % width
                sites += [Site(site.address, "plt", site.function) for site in self._direct(start)]
            elif before[-1:] and before[-1] & 0xC7 == 0x05 and before[:1] == b"\x8b":
                sites.append(Site(address - 1, "taken", self._name_at(address - 1)))
        return sites

    def _stub_section(self, address: int) -> Section | None:
        for section in self._elf.sections:
            if section.name.startswith(".plt") and section.address <= address < section.address + section.size:
                return section
        return None

    def _pointers(self, target: int) -> list[Site]:
        sites = []
        kinds = self._relocations["info"] & np.uint64(0xFFFFFFFF)
        plain = (kinds == _R_RELATIVE) | (kinds == _R_IRELATIVE)
        pointing = plain & (self._relocations["addend"] == np.int64(target))
        sites += [Site(int(at), "pointer", "") for at in self._relocations["offset"][pointing].tolist()]
        named = self._relocations[kinds == _R_64]
        if self._dynamic is not None and len(named):
            values = self._dynamic.values_of((named["info"] >> np.uint64(32)).astype(np.int64))
            hits = named["offset"][values + named["addend"].astype(np.uint64) == np.uint64(target)]
            sites += [Site(int(at), "pointer", "") for at in hits.tolist()]
        # Absolute addresses stand in the data itself in non-PIE programs, and with packed relocations.
        for section in self._elf.sections:
            if (
                section.is_loaded
                and not section.is_code
                and section.type not in ("SHT_NOBITS", "SHT_RELA", "SHT_DYNSYM")
                and section.address % 8 == 0
                and section.size <= MAX_CODE_BYTES
            ):
                content = self._data_words(section)
                for index in np.flatnonzero(content == np.uint64(target)).tolist():
                    sites.append(Site(section.address + 8 * index, "pointer", ""))
        return sites

    def _data_words(self, section: Section) -> NDArray[np.uint64]:
        words = self._words.get(section.index)
        if words is None:
            content = self._elf.data(section)
            words = np.frombuffer(content[: len(content) // 8 * 8], "<u8")
            self._words[section.index] = words
        return words

    @cached_property
    def _words(self) -> dict[int, NDArray[np.uint64]]:
        return {}

    def _function_at(self, address: int) -> tuple[int, int] | None:
        for table in self._tables:
            found = table.at(address)
            if found is not None:
                return found.address, found.size
        return None

    def _name_at(self, address: int) -> str:
        for table in self._tables:
            found = table.at(address)
            if found is not None:
                return found.symbol
        return ""

    def _bytes_at(self, address: int, size: int) -> bytes:
        for code in self._code:
            if code.address <= address < code.address + len(code.content):
                return code.content[address - code.address : address - code.address + size]
        return b""
