"""A server's binary, or a live process with its libraries, as far as placing probes needs it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from stallscope.probes.catalogue import parse_version
from stallscope.tracer.capture.bypass import Callers, Site
from stallscope.tracer.capture.debugfiles import mini_debug_info, separate_debug_file
from stallscope.tracer.capture.dwarf import Dwarf
from stallscope.tracer.capture.elf import ElfFile, reading
from stallscope.tracer.capture.symbol_table import Found, SymbolTable
from stallscope.tracer.errors import SymbolError, TargetError

_LIBRARY_FOLDERS = (
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/lib",
    "/lib",
)
_VERSION = re.compile(rb"(?:\0|ersion )(\d{1,3}\.\d{1,3}\.\d{1,3})(?=\0)")
_JEMALLOC = re.compile(rb"\0(?:jemalloc-)?(\d{1,2}\.\d{1,2}\.\d{1,2})(?:-\d+-g[0-9a-f]+)?(?=\0)")
_SIMILAR = 0.8
"""How alike two names are at least of which one is taken for the other mistyped: one letter in five may differ."""


@dataclass(frozen=True)
class Attachment:
    """One place a uprobe goes.

    Attributes:
        path: the file to open; for a live process through ``/proc/PID``, which survives its replacement.
        offset: offset in the FILE, in bytes, as perf_event_open and uprobe_events want it.
        symbol: the real symbol, as ``freeClient.part.0``.
        build_id: GNU build-id of the file as hexadecimal digits, or empty.
    """

    path: str
    offset: int
    symbol: str
    build_id: str


class Binary:
    """One opened ELF file with every symbol it can be given.

    Attributes:
        path: what to open to read or to probe it.
        name: its file name, as ``redis-server`` or ``libjemalloc.so.2``.
        build_id: GNU build-id as hexadecimal digits, or empty.
        is_library: its exported functions may be called from other files.
    """

    def __init__(self, path: str, *, seen_as: str = "", root: str = "") -> None:
        """Open a file.

        Args:
            path: what to open.
            seen_as: its path inside ``root``, where that differs.
            root: ``/proc/PID/root`` of the process that has it mapped, or empty.

        Raises:
            SymbolError: it cannot be read or is no ELF file of x86-64.
        """
        self.path = path
        self._seen_as = seen_as or os.path.realpath(path)
        self._root = root
        self.name = Path(self._seen_as).name
        self.shown = self._seen_as
        self.elf = ElfFile(path, shown=self.shown)
        self.build_id = self.elf.build_id
        self.is_library = ".so" in self.name or ".interp" not in self.elf.by_name

    @property
    def is_stripped(self) -> bool:
        """Return whether the file itself has no .symtab."""
        return not any(section.type == "SHT_SYMTAB" for section in self.elf.sections)

    @property
    def has_debug_info(self) -> bool:
        """Return whether DWARF was found, in the file or in its separate debug file."""
        return not self.dwarf.is_empty

    @cached_property
    def debug_file(self) -> ElfFile | None:
        """The separate debug file, if there is one."""
        roots = ["", self._root] if not self._root else [self._root, ""]
        return separate_debug_file(self.elf, str(Path(self._seen_as).parent), list(dict.fromkeys(roots)))

    @cached_property
    def tables(self) -> list[SymbolTable]:
        """Every symbol table, the fullest first."""
        own = self.elf.symbol_table("SHT_SYMTAB", ".symtab")
        tables = [own]
        if own is None:
            if self.debug_file is not None:
                place = self.debug_file.shown.removeprefix(self._root)
                tables.append(self.debug_file.symbol_table("SHT_SYMTAB", f"debug file {place}"))
            packed = mini_debug_info(self.elf)
            if packed is not None:
                tables.append(packed.symbol_table("SHT_SYMTAB", ".gnu_debugdata"))
        tables.append(self.elf.symbol_table("SHT_DYNSYM", ".dynsym"))
        return [table for table in tables if table is not None]

    @cached_property
    def dwarf(self) -> Dwarf:
        """The debug information, empty when there is none."""
        if ".debug_info" in self.elf.by_name or self.debug_file is None:
            return Dwarf(self.elf)
        return Dwarf(self.debug_file)

    @cached_property
    def _callers(self) -> Callers:
        return Callers(self.elf, self.tables)

    @cached_property
    def _known(self) -> dict[str, list[Found]]:
        return {}

    def forget(self) -> None:
        """Let go of everything that was read, which is large; it is read again when it is asked for."""
        for name in ("debug_file", "tables", "dwarf", "_callers", "_known", "_constants"):
            self.__dict__.pop(name, None)

    def find(self, name: str) -> list[Found]:
        """Return the function with exactly this name and its clones, each address once."""
        if name not in self._known:
            with reading(self.shown):
                found: dict[int, Found] = {}
                for table in self.tables:
                    for one in table.find(name):
                        found.setdefault(one.address, one)
            self._known[name] = list(found.values())
        return self._known[name]

    def similar(self, name: str) -> str:
        """Return the function whose name is the most similar to one that is not there, empty when none is."""
        with reading(self.shown):
            names = {known for table in self.tables for known in table.names()}
        return next(iter(get_close_matches(name, sorted(names), 1, _SIMILAR)), "")

    def function_at(self, address: int) -> str:
        """Return the name of the function whose code contains an address, empty when none is known."""
        with reading(self.shown):
            for table in self.tables:
                found = table.at(address)
                if found is not None:
                    return found.symbol
        return ""

    def callers(self, found: Found, *, confirm: bool = False) -> list[Site]:
        """Return every place that calls a function or takes its address; see :class:`bypass.Callers`."""
        with reading(self.shown):
            sites = self._callers.of(found.address, found.symbol)
            return self._callers.confirm(sites) if confirm and sites else sites

    def near_callers(self, found: Found) -> list[Site]:
        """Return the neighbours that reach a function with a short jump; see :meth:`bypass.Callers.near`."""
        with reading(self.shown):
            return self._callers.near(found.address)

    def exports(self, name: str) -> bool:
        """Return whether other files can call a function by this name."""
        dynamic = self.elf.symbol_table("SHT_DYNSYM", ".dynsym")
        return self.is_library and dynamic is not None and bool(dynamic.find(name))

    def attachment(self, found: Found) -> Attachment:
        """Return where the uprobe of a function goes."""
        return Attachment(self.path, self.elf.file_offset(found.address), found.symbol, self.build_id)

    @cached_property
    def server(self) -> str:
        """``redis``, ``valkey``, or empty when the file names neither."""
        if b"Valkey version=" in self._constants or b"valkey_version:" in self._constants:
            return "valkey"
        return "redis" if b"redis_version:" in self._constants else ""

    @cached_property
    def version(self) -> str:
        """The server's release as its constants give it, as ``7.0.15``; empty when they do not.

        Redis 7.0 holds a release for every command as well. The server's own is the one that starts its
        build id, and else the highest.
        """
        if not self.server:
            return ""
        candidates = sorted(
            {match[1].decode() for match in _VERSION.finditer(self._constants)},
            key=parse_version,
            reverse=True,
        )
        for candidate in candidates:
            build_id = rb"\x00" + re.escape(candidate.encode()) + rb"[\w.-]*\d{10}[0-9a-f]{9,}\x00"
            if re.search(build_id, self._constants):
                return candidate
        return candidates[0] if candidates else ""

    @cached_property
    def jemalloc_version(self) -> str:
        """The release of the jemalloc inside this file, as ``5.1.0``; empty when there is none."""
        found = b""
        if b"jemalloc" in self._constants:
            matches = [match for match in _JEMALLOC.finditer(self._constants) if b"-" in match[0]]
            found = matches[0][1] if matches else b""
        return found.decode()

    @cached_property
    def _constants(self) -> bytes:
        return b"\0" + self.elf.named(".rodata")


@dataclass(frozen=True)
class _Mapping:
    path: str
    span: str
    inode: int


class ProcessImage:
    """The binary of a live process and the libraries it has mapped.

    Attributes:
        pid: the process.
        exe: its binary, through ``/proc/PID/exe``.
    """

    def __init__(self, pid: int) -> None:
        """Open a process.

        Raises:
            TargetError: there is no such process.
            SymbolError: its files cannot be read.
        """
        self.pid = pid
        self._root = f"/proc/{pid}/root"
        try:
            exe = str(Path(f"/proc/{pid}/exe").readlink())
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TargetError(f"cannot look into process {pid}: it is not there; check the pid") from error
        except OSError as error:
            raise SymbolError(f"cannot look into process {pid}: {error.strerror}; run as root") from error
        self.exe = Binary(f"/proc/{pid}/exe", seen_as=exe.removesuffix(" (deleted)"), root=self._root)
        self._mapped = _executable_files(maps)
        self._opened: dict[str, Binary] = {}

    @property
    def libraries(self) -> list[str]:
        """The paths of the mapped executable files other than the binary, as the process sees them."""
        return [path for path in self._mapped if path != self.exe.shown]

    def library(self, name: str) -> Binary | None:
        """Return the mapped library with this name, as ``libc`` for ``libc.so.6``, or None."""
        for path in self.libraries:
            if _is_called(path, name):
                if path not in self._opened:
                    self._opened[path] = self._open(path)
                return self._opened[path]
        return None

    def forget(self) -> None:
        """Let go of everything that was read, which is large; it is read again when it is asked for."""
        self.exe.forget()
        self._opened.clear()

    def _open(self, path: str) -> Binary:
        mapping = self._mapped[path]
        through_root = f"{self._root}{path}"
        try:
            is_there = Path(through_root).stat().st_ino == mapping.inode
        except OSError:
            is_there = False
        # A library that was replaced or deleted is still reachable through its mapping.
        place = through_root if is_there else f"/proc/{self.pid}/map_files/{mapping.span}"
        return Binary(place, seen_as=path, root=self._root)


class FileImage:
    """A binary that is not running, with the libraries it would most likely be given.

    Attributes:
        exe: the binary.
    """

    def __init__(self, exe: Binary) -> None:
        self.exe = exe
        self._opened: dict[str, Binary] = {}

    @property
    def libraries(self) -> list[str]:
        """The paths of the libraries the binary names, as far as they are where libraries usually are."""
        found = []
        for name in self.exe.elf.needed:
            places = (f"{folder}/{name}" for folder in _LIBRARY_FOLDERS if "/" not in name)
            path = next((place for place in places if Path(place).is_file()), "")
            found += [path] if path else []
        return found

    def library(self, name: str) -> Binary | None:
        """Return the library with this name, or the file when it is a path; None when there is none."""
        path = name if "/" in name else next((p for p in self.libraries if _is_called(p, name)), "")
        if not path:
            return None
        if path not in self._opened:
            self._opened[path] = Binary(path)
        return self._opened[path]


Image = ProcessImage | FileImage


def open_process(pid: int) -> ProcessImage:
    """Return the binary and the libraries of a live process, of a container too.

    Raises:
        TargetError: there is no such process.
        SymbolError: its files cannot be read.
    """
    return ProcessImage(pid)


def open_binary(path: str | os.PathLike[str]) -> Binary:
    """Return one ELF file opened for placing probes.

    Raises:
        SymbolError: it cannot be read or is no ELF file of x86-64.
    """
    return Binary(os.fspath(path))


def _executable_files(maps: str) -> dict[str, _Mapping]:
    files: dict[str, _Mapping] = {}
    for line in maps.splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and "x" in parts[1] and parts[5].startswith("/"):
            path = parts[5].removesuffix(" (deleted)")
            start, _, end = parts[0].partition("-")
            files.setdefault(path, _Mapping(path, f"{start.lstrip('0')}-{end.lstrip('0')}", int(parts[4])))
    return files


def _is_called(path: str, name: str) -> bool:
    file_name = Path(path).name
    if "/" in name:
        return path == name
    return file_name == name or re.match(rf"{re.escape(name)}(?:[.-][\d.-]*)?\.so(?:\.|$)", file_name) is not None
