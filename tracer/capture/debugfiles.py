"""The symbols a stripped binary left elsewhere: separate debug files and MiniDebugInfo.

The same places gdb looks in: ``/usr/lib/debug/.build-id/ab/cdef.debug``, then the name in
``.gnu_debuglink`` beside the binary, in ``.debug`` below it and under ``/usr/lib/debug``, accepted only if
its build-id or the link's CRC agrees. For a process in a container the container's own files come first.
"""

from __future__ import annotations

import lzma
import zlib
from pathlib import Path

from stallscope.tracer.capture.elf import ElfFile, reading
from stallscope.tracer.errors import SymbolError

DEBUG_FOLDER = "/usr/lib/debug"
_MAX_UNPACKED_BYTES = 1 << 28


def separate_debug_file(elf: ElfFile, folder: str, roots: list[str]) -> ElfFile | None:
    """Return the separate debug file that belongs to a binary, None when there is none.

    Args:
        elf: the binary.
        folder: the folder the binary lies in, as its own root sees it.
        roots: prefixes to look below, ``""`` for this machine, ``/proc/PID/root`` for a container.
    """
    build_id = elf.build_id
    name, crc = elf.debug_link
    for root in roots:
        if len(build_id) > 2:
            path = Path(f"{root}{DEBUG_FOLDER}/.build-id/{build_id[:2]}/{build_id[2:]}.debug")
            found = _matching(path, build_id, None)
            if found is not None:
                return found
        for place in (folder, f"{folder}/.debug", f"{DEBUG_FOLDER}{folder}") if name else ():
            path = Path(f"{root}{place}/{name}")
            found = _matching(path, build_id, crc)
            if found is not None and not _is_same_file(path, elf.path):
                return found
    return None


def mini_debug_info(elf: ElfFile) -> ElfFile | None:
    """Return the ELF file packed in ``.gnu_debugdata``, None when there is none.

    Raises:
        SymbolError: it is there and cannot be unpacked.
    """
    packed = elf.named(".gnu_debugdata")
    if not packed:
        return None
    with reading(elf.shown):
        unpacker = lzma.LZMADecompressor(memlimit=_MAX_UNPACKED_BYTES)
        return ElfFile(elf.path, shown=f"{elf.shown} (.gnu_debugdata)", content=_unpack(unpacker, packed))


def _unpack(unpacker: lzma.LZMADecompressor, packed: bytes) -> bytes:
    content = unpacker.decompress(packed, _MAX_UNPACKED_BYTES)
    if not unpacker.eof:
        raise ValueError(".gnu_debugdata ends early or is too large")
    return content


def _matching(path: Path, build_id: str, crc: int | None) -> ElfFile | None:
    """Return the file if it is an ELF file of the same build; anything else is as good as absent."""
    try:
        if not path.is_file():
            return None
        elf = ElfFile(str(path))
        if elf.build_id and build_id:
            return elf if elf.build_id == build_id else None
        return elf if crc is not None and _crc_of(path) == crc else None
    except (SymbolError, OSError):
        return None


def _crc_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _is_same_file(path: Path, other: str) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False
