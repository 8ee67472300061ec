"""ELF files of x86-64: sections, segments, symbol tables, build-id, debug links; decoded by pyelftools.

pyelftools decodes the headers with its structures, one by one, and not through its ``iter_sections``: that
looks into every hash and version table too, so a damaged one, which nobody needs, would cost the answer, and
one that claims 4 billion entries would be read to the end of the file. Every size is held against the file's
before anything is read. What goes wrong anywhere below leaves through :func:`reading` as one
:class:`SymbolError`.

Sections are read, never mapped: a file cut short under a mapping kills the process with SIGBUS.
"""

from __future__ import annotations

import io
import lzma
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import numpy as np
from elftools.common.exceptions import DWARFError, ELFError
from elftools.common.utils import struct_parse
from elftools.construct import ConstructError
from elftools.elf import sections as described
from elftools.elf.constants import P_FLAGS, SH_FLAGS
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.enums import ENUM_E_MACHINE
from elftools.elf.notes import iter_notes

from stallscope.tracer.capture.symbol_table import SYMBOL, SymbolTable
from stallscope.tracer.errors import SymbolError

# Larger sections are refused: no server is near it, a damaged header easily is.
MAX_SECTION_BYTES = 1 << 30
_MAX_HEADERS = 4096
_PAGE_BYTES = 4096
_MAX_BUILD_ID_DIGITS = 128

DAMAGE: tuple[type[Exception], ...] = (
    ELFError,
    DWARFError,
    ConstructError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    LookupError,
    ArithmeticError,
    TypeError,
    AssertionError,
    EOFError,
    MemoryError,
    RecursionError,
    NotImplementedError,
)
"""What pyelftools and this package raise over a damaged file."""


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn whatever a damaged, unreadable or foreign file causes into one :class:`SymbolError`."""
    try:
        yield
    except SymbolError:
        raise
    except FileNotFoundError as error:
        raise SymbolError(f"cannot read symbols of {path}: no such file; check the path") from error
    except PermissionError as error:
        raise SymbolError(f"cannot read symbols of {path}: permission denied; run as root") from error
    except OSError as error:
        raise SymbolError(f"cannot read symbols of {path}: {error.strerror or error}; check the file") from error
    except DAMAGE as error:
        words = " ".join(str(error).split())[:120] or type(error).__name__
        if isinstance(error, KeyError):
            words = f"nothing known as {words}"
        raise SymbolError(
            f"cannot read symbols of {path}: damaged ELF file ({words}); reinstall the package"
        ) from error


@dataclass(frozen=True)
class Section:
    """One section header; ``index`` is its position in the table, ``type`` its name, as ``SHT_SYMTAB``."""

    index: int
    name: str
    type: str
    flags: int
    address: int
    offset: int
    size: int
    link: int
    entsize: int

    @property
    def is_loaded(self) -> bool:
        """Return whether the section is in memory while the program runs."""
        return bool(self.flags & SH_FLAGS.SHF_ALLOC)

    @property
    def is_code(self) -> bool:
        """Return whether the section holds instructions."""
        return bool(self.flags & SH_FLAGS.SHF_EXECINSTR)


class ElfFile:
    """One opened ELF file of x86-64.

    Attributes:
        path: what was opened.
        shown: what messages call it.
        is_relocated: it is loaded at an address chosen anew each time (a library, or a PIE).
        sections: all section headers, in the order of the file.
        by_name: the first section of each name.

    Raises:
        SymbolError: the file cannot be read, is no ELF file, is for another machine, or is damaged.
    """

    def __init__(self, path: str, *, shown: str = "", content: bytes | None = None) -> None:
        self.path = path
        self.shown = shown or path
        self._stream: IO[bytes] | None = None
        with reading(self.shown):
            if content is not None:
                self._stream = io.BytesIO(content)
            else:
                self._stream = io.BufferedReader(io.FileIO(path, opener=_without_waiting))
            self._size_bytes = self._stream.seek(0, os.SEEK_END)
            self._elf = self._identify(self._stream)
            self._headers = self._table(
                self._elf.structs.Elf_Shdr, self._elf["e_shoff"], self._elf["e_shentsize"], self._elf.num_sections()
            )
            self.sections = self._named()
            self.by_name = {section.name: section for section in reversed(self.sections)}

    def close(self) -> None:
        """Close the file; reading after that fails with a :class:`SymbolError`."""
        if self._stream is not None:
            self._stream.close()

    def __del__(self) -> None:
        self.close()

    def data(self, section: Section) -> bytes:
        """Return a section's bytes, decompressed; empty for one that occupies no space in the file."""
        with reading(self.shown):
            if section.type == "SHT_NOBITS" or not section.size:
                return b""
            self._require(section.offset, section.size)
            source = described.Section(self._headers[section.index], section.name, self._elf)
            if source.data_size > MAX_SECTION_BYTES:
                raise ValueError(f"section {section.name} of {source.data_size} bytes")
            # zlib takes a limit of 0 bytes as none.
            content: bytes = source.data() if source.data_size else b""
            if len(content) != source.data_size:
                raise ValueError("the file ends early")
            return content

    def named(self, name: str) -> bytes:
        """Return the bytes of the section with this name, empty when there is none."""
        section = self.by_name.get(name)
        return self.data(section) if section is not None else b""

    def symbol_table(self, kind: str, source: str) -> SymbolTable | None:
        """Return the table of type ``SHT_SYMTAB`` or ``SHT_DYNSYM``, None when there is none."""
        for section in self.sections:
            if section.type == kind:
                with reading(self.shown):
                    if not section.link < len(self.sections) or section.entsize != SYMBOL.itemsize:
                        raise ValueError(f"symbol table {section.name} has no names")
                    content = self.data(section)
                    entries = np.frombuffer(content[: len(content) // SYMBOL.itemsize * SYMBOL.itemsize], SYMBOL)
                    return SymbolTable(entries, self.data(self.sections[section.link]) + b"\0", source)
        return None

    def code(self) -> list[tuple[int, bytes]]:
        """Return the address and the bytes of every executable section."""
        return [
            (section.address, self.data(section))
            for section in self.sections
            if section.is_code and section.type != "SHT_NOBITS" and section.size
        ]

    def file_offset(self, address: int) -> int:
        """Return where in the file the code at a virtual address lies.

        Raises:
            SymbolError: no executable segment contains the address.
        """
        for segment in self._segments:
            start = segment["p_vaddr"]
            is_code = segment["p_type"] == "PT_LOAD" and segment["p_flags"] & P_FLAGS.PF_X
            if is_code and start <= address < start + segment["p_filesz"]:
                return int(address - start + segment["p_offset"])
        raise SymbolError(
            f"cannot probe address {address:#x} of {self.shown}: not in an executable segment; reinstall it"
        )

    def code_address(self, file_offset: int) -> int:
        """Return the virtual address of the code at an offset of the file: the inverse of :meth:`file_offset`.

        The kernel maps whole pages: an offset in the first page before the segment's own start counts too.

        Raises:
            SymbolError: no executable segment contains the offset.
        """
        for segment in self._segments:
            start = segment["p_offset"] & -_PAGE_BYTES
            is_code = segment["p_type"] == "PT_LOAD" and segment["p_flags"] & P_FLAGS.PF_X
            if is_code and start <= file_offset < segment["p_offset"] + segment["p_filesz"]:
                return int(segment["p_vaddr"] + file_offset - segment["p_offset"])
        raise SymbolError(
            f"cannot find the code at offset {file_offset:#x} of {self.shown}: not in an executable segment; "
            f"reinstall it"
        )

    @cached_property
    def needed(self) -> list[str]:
        """Return the names of the shared libraries the file asks for."""
        section = self.by_name.get(".dynamic")
        if section is None:
            return []
        with reading(self.shown):
            self._require(section.offset, section.size)
            dynamic = DynamicSection(self._headers[section.index], section.name, self._elf)
            return [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]

    @cached_property
    def build_id(self) -> str:
        """Return the GNU build-id as hexadecimal digits, empty when the file has none."""
        with reading(self.shown):
            areas = [(one.offset, one.size) for one in self.sections if one.type == "SHT_NOTE"]
            areas += [(one["p_offset"], one["p_filesz"]) for one in self._segments if one["p_type"] == "PT_NOTE"]
            for offset, size_bytes in areas:
                self._require(offset, size_bytes)
                for note in iter_notes(self._elf, offset, size_bytes):
                    if note["n_type"] == "NT_GNU_BUILD_ID" and note["n_name"] == "GNU":
                        return str(note["n_desc"])[:_MAX_BUILD_ID_DIGITS]
            return ""

    @cached_property
    def debug_link(self) -> tuple[str, int]:
        """Return the file name and the CRC of ``.gnu_debuglink``, ``("", 0)`` when there is none."""
        content = self.named(".gnu_debuglink")
        if not content:
            return "", 0
        with reading(self.shown):
            link = struct_parse(self._elf.structs.Gnu_debuglink, io.BytesIO(content))
            name = link.filename.decode("utf-8", "replace")
            return ("" if "/" in name else name), int(link.checksum)

    def _identify(self, stream: IO[bytes]) -> ELFFile:
        stream.seek(0)
        if stream.read(4) != b"\x7fELF":
            raise SymbolError(f"cannot read symbols of {self.shown}: not an ELF file; name the server's binary")
        elf = ELFFile(stream)
        machine = elf["e_machine"]
        if elf.elfclass != 64 or not elf.little_endian or machine != "EM_X86_64":
            number = ENUM_E_MACHINE.get(machine, machine)
            raise SymbolError(
                f"cannot read symbols of {self.shown}: for machine {number}, not x86-64; use that machine"
            )
        if elf["e_type"] not in ("ET_EXEC", "ET_DYN"):
            raise SymbolError(f"cannot read symbols of {self.shown}: no program or library; name the server binary")
        self.is_relocated = elf["e_type"] == "ET_DYN"
        return elf

    @cached_property
    def _segments(self) -> list[Any]:
        with reading(self.shown):
            elf = self._elf
            return self._table(elf.structs.Elf_Phdr, elf["e_phoff"], elf["e_phentsize"], elf.num_segments())

    def _table(self, entry: Any, offset: int, entry_bytes: int, count: int) -> list[Any]:
        if count == 0:
            return []
        if entry_bytes != entry.sizeof() or count > _MAX_HEADERS:
            raise ValueError(f"{count} headers of {entry_bytes} bytes")
        self._require(offset, count * entry_bytes)
        return [struct_parse(entry, self._stream, offset + index * entry_bytes) for index in range(count)]

    def _named(self) -> list[Section]:
        names_index = self._elf.get_shstrndx()
        names = None
        if 0 < names_index < len(self._headers):
            names = described.StringTableSection(self._headers[names_index], "", self._elf)
        return [
            Section(
                index,
                names.get_string(header["sh_name"]) if names is not None else "",
                str(header["sh_type"]),
                header["sh_flags"],
                header["sh_addr"],
                header["sh_offset"],
                header["sh_size"],
                header["sh_link"],
                header["sh_entsize"],
            )
            for index, header in enumerate(self._headers)
        ]

    def _require(self, offset: int, size_bytes: int) -> None:
        """Raise a ValueError (for :func:`reading` to translate) unless the file has these bytes."""
        if not 0 <= size_bytes <= MAX_SECTION_BYTES or not 0 <= offset <= self._size_bytes - size_bytes:
            raise ValueError(f"{size_bytes} bytes at offset {offset} lie outside the file")


def _without_waiting(path: str, flags: int) -> int:
    """Open a file that may turn out to be a pipe nobody writes to."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
