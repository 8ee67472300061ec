"""Linkage stubs: the few instructions a call of another file's function goes through.

They lie in sections of their own (.plt, .plt.got, .plt.sec, .iplt), have no symbols, and in static programs
no unwind rules either.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stallscope.tracer.capture.elf import ElfFile, Section

# Elf64_Rela, and the relocations of a slot that a stub jumps through (System V ABI, AMD64 supplement, 4.4.1).
_RELA = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<i8")])
_GLOB_DAT, _JUMP_SLOT, _IRELATIVE = 6, 7, 37
_JUMP_THROUGH = b"\xff\x25"  # jmp *distance(%rip)


def stub_sections(elf: ElfFile) -> list[Section]:
    """Return the sections that hold nothing but stubs."""
    return [
        section
        for section in elf.sections
        if section.is_code and (section.name == ".iplt" or section.name == ".plt" or section.name.startswith(".plt."))
    ]


def stub_names(elf: ElfFile, name_at: Callable[[int], str]) -> dict[int, str]:
    """Return ``memcpy@plt`` and the like by the address where the stub starts.

    Args:
        elf: the file.
        name_at: the name of the function at an address, for slots that a function of the file itself fills.
    """
    slots = _slots(elf, name_at)
    names = {}
    for section in stub_sections(elf):
        content = elf.data(section)
        # Linkers leave the size out where they mix kinds.
        width = section.entsize if section.entsize in (8, 16) else 16
        at = content.find(_JUMP_THROUGH)
        while 0 <= at <= len(content) - 6:
            distance = int.from_bytes(content[at + 2 : at + 6], "little", signed=True)
            name = slots.get(section.address + at + 6 + distance)
            if name:
                names[section.address + at - at % width] = f"{name}@plt"
            at = content.find(_JUMP_THROUGH, at + 2)
    return names


def _slots(elf: ElfFile, name_at: Callable[[int], str]) -> dict[int, str]:
    """Return the functions that the dynamic linker puts into the global offset table, by the slot's address."""
    dynamic = elf.symbol_table("SHT_DYNSYM", ".dynsym")
    slots = {}
    for section in elf.sections:
        if section.type != "SHT_RELA" or not section.is_loaded:
            continue
        content = elf.data(section)
        relocations = np.frombuffer(content[: len(content) // _RELA.itemsize * _RELA.itemsize], _RELA)
        kinds = relocations["info"] & np.uint64(0xFFFFFFFF)
        # A server has thousands of relocations, and some hundred of these.
        relocations = relocations[np.isin(kinds, (_GLOB_DAT, _JUMP_SLOT, _IRELATIVE))]
        for offset, info, addend in relocations.tolist():
            kind = info & 0xFFFFFFFF
            if kind in (_GLOB_DAT, _JUMP_SLOT) and dynamic is not None:
                slots[offset] = dynamic.name_of(info >> 32)
            elif kind == _IRELATIVE:
                slots[offset] = name_at(addend)
    return slots
