"""The code of a process: which files are mapped where, and each file's unwind rules and function names.

The only module here that knows files. Rules are decoded once for each build-id.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stallscope.tracer.capture.binary import Binary
from stallscope.tracer.capture.elf import ElfFile, Section, reading
from stallscope.tracer.capture.symbol_table import SymbolTable
from stallscope.tracer.unwind.cfi import FrameRules, read_index
from stallscope.tracer.unwind.stubs import stub_names, stub_sections

_rules_by_build_id: dict[str, FrameRules] = {}
_lock = threading.Lock()


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

    def __init__(self, name: str, elf: ElfFile, tables: Sequence[SymbolTable]) -> None:
        self.name = name
        self.build_id = elf.build_id
        self._elf = elf
        self._tables = tables
        self._functions: dict[int, Function] = {}

    @classmethod
    def from_file(cls, path: str, *, seen_as: str = "", root: str = "") -> CodeImage:
        """Return the image of a file, named also by its separate debug file.

        Args:
            path: what to open.
            seen_as: its path inside ``root``, where that differs.
            root: ``/proc/PID/root`` of the process that has it mapped, or empty.

        Raises:
            SymbolError: it cannot be read or is no ELF file of x86-64.
        """
        binary = Binary(path, seen_as=seen_as, root=root)
        return cls(binary.name, binary.elf, binary.tables)

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
    def rules(self) -> FrameRules:
        """The unwind rules, shared by all images with this build-id.

        Raises:
            SymbolError: the sections that hold them cannot be read.
        """
        with _lock:
            known = _rules_by_build_id.get(self.build_id)
            if known is None:
                known = self.undecoded_rules()
                if self.build_id:
                    _rules_by_build_id[self.build_id] = known
            return known

    def undecoded_rules(self) -> FrameRules:
        """Return the unwind rules as for the first use; see :attr:`rules`."""
        frames, header = self._elf.by_name.get(".eh_frame"), self._elf.by_name.get(".eh_frame_hdr")
        stubs = [(stub.address, stub.address + stub.size) for stub in self._stub_sections]
        content = self._elf.data(frames) if frames is not None else b""
        address = frames.address if frames is not None else 0
        index = read_index(self._elf.data(header), header.address, address) if header is not None else None
        return FrameRules(content, address, index, stubs)

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
