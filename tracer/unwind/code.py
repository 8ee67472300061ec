"""The code of a process: which files are mapped where, and each file's unwind rules and function names.

The only module here that knows files. Rules are made once for each build-id.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stallscope.tracer.capture.binary import Binary
from stallscope.tracer.capture.elf import ElfFile, Section, reading
from stallscope.tracer.capture.symbol_table import SymbolTable
from stallscope.tracer.unwind import cfi
from stallscope.tracer.unwind.cache import RuleCache
from stallscope.tracer.unwind.rules import RuleTable
from stallscope.tracer.unwind.stubs import stub_names, stub_sections

_rules_by_build_id: dict[str, RuleTable] = {}


@dataclass(frozen=True)
class CodeMapping:
    """One executable mapping of a process, as a line of /proc/PID/maps gives it.

    Attributes:
        start: its first address.
        end: the address behind its last one.
        file_offset: where in the file it starts, in bytes.
        path: the file as the process sees it, or ``[vdso]``.
        build_id: GNU build-id of the file as hexadecimal digits, or empty when it is not known.
    """

    start: int
    end: int
    file_offset: int
    path: str
    build_id: str


@dataclass(frozen=True)
class Function:
    """A function: its name, and where it starts as a virtual address of its file."""

    name: str
    start: int


class CodeImage:
    """One file's unwind rules and function names.

    Attributes:
        name: its file name, as ``redis-server`` or ``[vdso]``.
        build_id: GNU build-id as hexadecimal digits, or empty.
    """

    def __init__(self, name: str, elf: ElfFile, tables: Sequence[SymbolTable], cache: RuleCache | None = None) -> None:
        self.name = name
        self.build_id = elf.build_id
        self._elf = elf
        self._tables = tables
        self._cache = cache
        self._functions: dict[int, Function] = {}

    @classmethod
    def from_file(cls, path: str, *, seen_as: str = "", root: str = "", cache: RuleCache | None = None) -> CodeImage:
        """Return the image of a file, named also by its separate debug file.

        Args:
            path: what to open.
            seen_as: its path inside ``root``, where that differs.
            root: ``/proc/PID/root`` of the process that has it mapped, or empty.
            cache: where its unwind rules are kept, None to decode them anew in each process.

        Raises:
            SymbolError: it cannot be read or is no ELF file of x86-64.
        """
        binary = Binary(path, seen_as=seen_as, root=root)
        return cls(binary.name, binary.elf, binary.tables, cache)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> CodeImage:
        """Return the image of a file that was read from memory, as the vdso is.

        Raises:
            SymbolError: the bytes are no ELF file of x86-64.
        """
        elf = ElfFile(name, content=data)
        tables = [elf.symbol_table("SHT_SYMTAB", ".symtab"), elf.symbol_table("SHT_DYNSYM", ".dynsym")]
        return cls(Path(name).name, elf, [table for table in tables if table is not None])

    @cached_property
    def rules(self) -> RuleTable:
        """The unwind rules, empty when the file has none.

        Decoded at the first use, about a second for a file of the size of libc, unless a file with this build-id
        was before.

        Raises:
            SymbolError: .eh_frame is damaged.
        """
        known = _rules_by_build_id.get(self.build_id)
        if known is None and self._cache is not None:
            known = self._cache.load(self.build_id)
        if known is None:
            known = self.decode()
            if self._cache is not None:
                self._cache.save(self.build_id, known)
        if self.build_id:
            _rules_by_build_id[self.build_id] = known
        return known

    def decode(self) -> RuleTable:
        """Return the unwind rules, read from the file itself; see :attr:`rules`.

        Raises:
            SymbolError: .eh_frame is damaged.
        """
        section = self._elf.by_name.get(".eh_frame")
        stubs = [(stub.address, stub.address + stub.size) for stub in self._stub_sections]
        with reading(self._elf.shown):
            content = self._elf.data(section) if section is not None else b""
            return cfi.decode(content, section.address if section is not None else 0, stubs)

    def code_address(self, file_offset: int) -> int:
        """Return the virtual address, in this file, of the code at an offset of the file.

        Raises:
            SymbolError: there is no code at the offset.
        """
        return self._elf.code_address(file_offset)

    def function_at(self, address: int) -> Function | None:
        """Return the function that contains a virtual address of this file, None when none is known."""
        with reading(self._elf.shown):
            for section in self._stub_sections:
                if section.address <= address < section.address + section.size:
                    start = max((start for start in self._stubs if start <= address), default=-1)
                    return Function(self._stubs[start], start) if section.address <= start else None
            for table in self._tables:
                found = table.at(address)
                if found is not None:
                    if found.address not in self._functions:
                        name = min(table.aliases(found.address), key=_plainness)
                        # A debug file's names carry versions, as clock_gettime@@GLIBC_2.17.
                        self._functions[found.address] = Function(name.partition("@")[0] or name, found.address)
                    return self._functions[found.address]
        return None

    @cached_property
    def _stub_sections(self) -> list[Section]:
        return stub_sections(self._elf)

    @cached_property
    def _stubs(self) -> dict[int, str]:
        return stub_names(self._elf, self._name_at)

    def _name_at(self, address: int) -> str:
        function = self.function_at(address)
        return function.name if function is not None else ""


def _plainness(name: str) -> tuple[int, int, str]:
    """Order a function's names: ``write`` before ``__write`` before ``__GI___libc_write``."""
    underscores = len(name) - len(name.lstrip("_"))
    return underscores + 10 * bool(re.match(r"__GI_|_IO_new_", name)), len(name), name
