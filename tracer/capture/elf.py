"""ELF files of x86-64 as arrays: sections, segments, symbol tables, build-id, debug links.

Written for two things pyelftools is not: speed (a symbol table is one numpy array over the section's
bytes and a name is found with ``bytes.find``, so a server's 4,000 symbols cost under a millisecond) and
broken files (every size is held against the file's before anything is read). What goes wrong anywhere
below leaves through :func:`reading` as one :class:`SymbolError`.

Sections are read, never mapped: a file cut short under a mapping kills the process with SIGBUS.
"""

from __future__ import annotations

import lzma
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stallscope.tracer.errors import SymbolError

# Larger sections are refused: no server is near it, a damaged header easily is.
MAX_SECTION_BYTES = 1 << 30
_MAX_HEADERS = 1 << 16

_EM_X86_64 = 62
_ET_EXEC, _ET_DYN = 2, 3
_PT_LOAD, _PT_NOTE = 1, 4
_PF_X = 1
SHT_SYMTAB, SHT_RELA, SHT_NOTE, SHT_NOBITS, SHT_DYNSYM = 2, 4, 7, 8, 11
SHF_ALLOC, SHF_EXECINSTR, SHF_COMPRESSED = 0x2, 0x4, 0x800
_NT_GNU_BUILD_ID = 3

_SECTION = np.dtype(
    [
        ("name", "<u4"),
        ("type", "<u4"),
        ("flags", "<u8"),
        ("addr", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("link", "<u4"),
        ("info", "<u4"),
        ("addralign", "<u8"),
        ("entsize", "<u8"),
    ]
)
_SEGMENT = np.dtype(
    [
        ("type", "<u4"),
        ("flags", "<u4"),
        ("offset", "<u8"),
        ("vaddr", "<u8"),
        ("paddr", "<u8"),
        ("filesz", "<u8"),
        ("memsz", "<u8"),
        ("align", "<u8"),
    ]
)
_SYMBOL = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("shndx", "<u2"),
        ("value", "<u8"),
        ("size", "<u8"),
    ]
)
RELA = np.dtype([("offset", "<u8"), ("info", "<u8"), ("addend", "<i8")])

# What gcc and clang append to a function they cloned, split or renamed; ".cold" is not a function.
_CLONE = re.compile(r"(?:\.(?:isra|constprop|part|lto_priv|llvm)(?:\.\d+)?)+")


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
    except (ValueError, LookupError, ArithmeticError, TypeError, EOFError, MemoryError) as error:
        raise _damaged(path, error) from error
    except (struct.error, zlib.error, lzma.LZMAError, RecursionError) as error:
        raise _damaged(path, error) from error


def _damaged(path: str, error: BaseException) -> SymbolError:
    words = " ".join(str(error).split())[:120] or type(error).__name__
    return SymbolError(f"cannot read symbols of {path}: damaged ELF file ({words}); reinstall the package")


def base_name(symbol: str) -> str:
    """Return the function a symbol belongs to: ``freeClient`` for ``freeClient.part.0.cold``."""
    return symbol.split(".", 1)[0] or symbol


@dataclass(frozen=True)
class Section:
    """One section header; ``index`` is its position in the table."""

    index: int
    name: str
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    entsize: int


@dataclass(frozen=True)
class Found:
    """One function in a symbol table: its real name, virtual address, size in bytes, and the table."""

    symbol: str
    address: int
    size: int
    found_in: str


class SymbolTable:
    """One symbol table: functions by exact name, and the function at an address."""

    def __init__(self, entries: NDArray[Any], names: bytes, source: str) -> None:
        kind = entries["info"] & 0xF
        # STT_FUNC or STT_GNU_IFUNC, defined here.
        keep = ((kind == 2) | (kind == 10)) & (entries["shndx"] != 0) & (entries["value"] != 0)
        self.source = source
        self._entries = entries[keep]
        self._all = entries
        self._names = names

    def __len__(self) -> int:
        return len(self._entries)

    def name_at(self, offset: int) -> str:
        """Return the string at an offset of the string table, empty when it lies outside."""
        end = self._names.find(b"\0", offset)
        return self._names[offset:end].decode("utf-8", "replace") if 0 <= offset < end else ""

    def name_of(self, index: int) -> str:
        """Return the name of the symbol with this index in the whole table, empty when there is none."""
        return self.name_at(int(self._all["name"][index])) if 0 <= index < len(self._all) else ""

    def values_of(self, indexes: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the values of the symbols with these indexes in the whole table, 0 where there is none."""
        if not len(self._all):
            return np.zeros(len(indexes), np.uint64)
        inside = (indexes >= 0) & (indexes < len(self._all))
        return np.where(inside, self._all["value"][np.where(inside, indexes, 0)], np.uint64(0))

    def find(self, name: str) -> list[Found]:
        """Return the function with exactly this name and its clones, never another that ends the same."""
        wanted = name.encode()
        offsets: dict[int, str] = {}
        at = self._names.find(wanted) if wanted else -1
        while at >= 0:
            after = self._names[at + len(wanted) : at + len(wanted) + 1]
            # Linkers share tails: a name may start anywhere, and counts only if a symbol points there.
            if after == b"\0":
                offsets[at] = name
            elif after == b".":
                full = self.name_at(at)
                if _CLONE.fullmatch(full[len(name) :]):
                    offsets[at] = full
            at = self._names.find(wanted, at + 1)
        if not offsets:
            return []
        hits = self._entries[np.isin(self._entries["name"], np.array(list(offsets), dtype="<u4"))]
        found = [Found(offsets[int(hit["name"])], int(hit["value"]), int(hit["size"]), self.source) for hit in hits]
        return sorted(found, key=lambda one: (one.symbol != name, one.symbol, one.address))

    @cached_property
    def starts(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint32]]:
        """Return the functions' addresses, ends and name offsets, sorted by address, one per address.

        A function without a size (hand-written assembly) ends where the next one starts.
        """
        order = np.argsort(self._entries["value"], kind="stable")
        entries = self._entries[order]
        values, first = np.unique(entries["value"], return_index=True)
        sizes = np.maximum.reduceat(entries["size"], first) if len(first) else entries["size"]
        following = np.append(values[1:], values[-1:] + np.uint64(1))
        ends = np.where(sizes > 0, values + sizes, following)
        return values, ends, entries["name"][first]

    def at(self, address: int) -> Found | None:
        """Return the function whose code contains an address."""
        values, ends, names = self.starts
        index = int(np.searchsorted(values, np.uint64(address), side="right")) - 1
        if index < 0 or address >= int(ends[index]):
            return None
        start = int(values[index])
        return Found(self.name_at(int(names[index])), start, int(ends[index]) - start, self.source)


class ElfFile:
    """One opened ELF file of x86-64.

    Raises:
        SymbolError: the file cannot be read, is no ELF file, is for another machine, or is damaged.
    """

    def __init__(self, path: str, *, shown: str = "", content: bytes | None = None) -> None:
        self.path = path
        self.shown = shown or path
        self._content = content
        self._descriptor = -1
        with reading(self.shown):
            if content is None:
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self._open()

    def close(self) -> None:
        """Close the file; reading after that fails with a :class:`SymbolError`."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return bytes of the file, all of them or a ValueError (for :func:`reading` to translate)."""
        if offset < 0 or not 0 <= size_bytes <= MAX_SECTION_BYTES or offset + size_bytes > self.size_bytes:
            raise ValueError(f"{size_bytes} bytes at offset {offset} lie outside the file")
        if self._content is not None:
            return self._content[offset : offset + size_bytes]
        data = os.pread(self._descriptor, size_bytes, offset)
        if len(data) != size_bytes:
            raise ValueError("the file ends early")
        return data

    def _open(self) -> None:
        self.size_bytes = len(self._content) if self._content is not None else os.fstat(self._descriptor).st_size
        header = self.read(0, min(64, self.size_bytes))
        if header[:4] != b"\x7fELF":
            raise SymbolError(f"cannot read symbols of {self.shown}: not an ELF file; name the server's binary")
        if len(header) < 64:
            raise ValueError("the header is cut short")
        (kind, machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx) = struct.unpack_from(
            "<HHIQQQIHHHHHH", header, 16
        )
        if header[4] != 2 or header[5] != 1 or machine != _EM_X86_64:
            raise SymbolError(
                f"cannot read symbols of {self.shown}: for machine {machine}, not x86-64; use that machine"
            )
        if kind not in (_ET_EXEC, _ET_DYN):
            raise SymbolError(f"cannot read symbols of {self.shown}: no program or library; name the server binary")
        self.is_relocated = kind == _ET_DYN
        self._segments = self._table(phoff, phnum, phentsize, _SEGMENT)
        if shoff and shnum == 0:
            first = self._table(shoff, 1, shentsize, _SECTION)[0]
            shnum, shstrndx = int(first["size"]), int(first["link"]) if shstrndx == 0xFFFF else shstrndx
        self._sections = self._table(shoff, shnum if shoff else 0, shentsize, _SECTION)
        self.sections = self._named(shstrndx)
        self.by_name = {section.name: section for section in reversed(self.sections)}

    def _table(self, offset: int, count: int, entry_bytes: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        if count == 0:
            return np.zeros(0, dtype)
        if entry_bytes != dtype.itemsize or count > _MAX_HEADERS:
            raise ValueError(f"{count} headers of {entry_bytes} bytes")
        return np.frombuffer(self.read(offset, count * entry_bytes), dtype)

    def _named(self, names_index: int) -> list[Section]:
        names = b""
        if 0 < names_index < len(self._sections):
            strings = self._sections[names_index]
            names = self.read(int(strings["offset"]), int(strings["size"]))
        sections = []
        for index, row in enumerate(self._sections.tolist()):
            end = names.find(b"\0", row[0])
            name = names[row[0] : end].decode("utf-8", "replace") if end >= 0 else ""
            sections.append(Section(index, name, *row[1:8], row[9]))
        return sections

    def data(self, section: Section) -> bytes:
        """Return a section's bytes, decompressed; empty for one that occupies no space in the file."""
        with reading(self.shown):
            if section.type == SHT_NOBITS:
                return b""
            raw = self.read(section.offset, section.size)
            if not section.flags & SHF_COMPRESSED:
                return raw
            kind, _, size_bytes, _ = struct.unpack_from("<IIQQ", raw)
            if kind != 1 or size_bytes > MAX_SECTION_BYTES:
                raise ValueError(f"section {section.name} is compressed in an unknown way")
            return zlib.decompressobj().decompress(raw[24:], size_bytes) if size_bytes else b""

    def named(self, name: str) -> bytes:
        """Return the bytes of the section with this name, empty when there is none."""
        section = self.by_name.get(name)
        return self.data(section) if section is not None else b""

    def symbol_table(self, kind: int, source: str) -> SymbolTable | None:
        """Return the table of type ``SHT_SYMTAB`` or ``SHT_DYNSYM``, None when there is none."""
        for section in self.sections:
            if section.type == kind:
                with reading(self.shown):
                    if not section.link < len(self.sections) or section.entsize != _SYMBOL.itemsize:
                        raise ValueError(f"symbol table {section.name} has no names")
                    content = self.data(section)
                    entries = np.frombuffer(content[: len(content) // 24 * 24], _SYMBOL)
                    return SymbolTable(entries, self.data(self.sections[section.link]) + b"\0", source)
        return None

    def code(self) -> list[tuple[int, bytes]]:
        """Return the address and the bytes of every executable section."""
        return [
            (section.address, self.data(section))
            for section in self.sections
            if section.flags & SHF_EXECINSTR and section.type != SHT_NOBITS and section.size
        ]

    def file_offset(self, address: int) -> int:
        """Return where in the file the code at a virtual address lies.

        Raises:
            SymbolError: no executable segment contains the address.
        """
        for segment in self._segments:
            start = int(segment["vaddr"])
            if (
                int(segment["type"]) == _PT_LOAD
                and int(segment["flags"]) & _PF_X
                and start <= address < start + int(segment["filesz"])
            ):
                return address - start + int(segment["offset"])
        raise SymbolError(
            f"cannot probe address {address:#x} of {self.shown}: not in an executable segment; reinstall it"
        )

    @cached_property
    def needed(self) -> list[str]:
        """Return the names of the shared libraries the file asks for."""
        with reading(self.shown):
            section = self.by_name.get(".dynamic")
            if section is None or not section.link < len(self.sections):
                return []
            names = self.data(self.sections[section.link]) + b"\0"
            content = self.data(section)
            pairs = np.frombuffer(content[: len(content) // 16 * 16], "<u8").reshape(-1, 2).tolist()
            # DT_NEEDED is 1
            return [
                names[at : names.index(b"\0", at)].decode("utf-8", "replace")
                for tag, at in pairs
                if tag == 1 and at < len(names)
            ]

    @cached_property
    def build_id(self) -> str:
        """Return the GNU build-id as hexadecimal digits, empty when the file has none."""
        with reading(self.shown):
            areas = [(s.offset, s.size) for s in self.sections if s.type == SHT_NOTE]
            areas += [(int(s["offset"]), int(s["filesz"])) for s in self._segments if int(s["type"]) == _PT_NOTE]
            for offset, size_bytes in areas:
                found = _build_id(self.read(offset, size_bytes))
                if found:
                    return found
            return ""

    @cached_property
    def debug_link(self) -> tuple[str, int]:
        """Return the file name and the CRC of ``.gnu_debuglink``, ``("", 0)`` when there is none."""
        content = self.named(".gnu_debuglink")
        end = content.find(b"\0")
        crc_at = (end + 4) & ~3
        if end <= 0 or crc_at + 4 > len(content):
            return "", 0
        name = content[:end].decode("utf-8", "replace")
        return ("" if "/" in name else name), int(struct.unpack_from("<I", content, crc_at)[0])


def _build_id(notes: bytes) -> str:
    at = 0
    while at + 12 <= len(notes):
        name_bytes, content_bytes, kind = struct.unpack_from("<III", notes, at)
        content_at = at + 12 + (name_bytes + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[at + 12 : at + 16] == b"GNU\0" and name_bytes == 4:
            return notes[content_at : content_at + min(content_bytes, 64)].hex()
        at = content_at + (content_bytes + 3 & ~3)
    return ""
