"""The code of a live process, held so that its stacks can be unwound also when it has ended."""

from __future__ import annotations

import os
from pathlib import Path

from stallscope.tracer.errors import StallscopeError, SymbolError, TargetError
from stallscope.tracer.unwind.code import CodeImage, CodeMapping
from stallscope.tracer.unwind.unwinder import Unwinder

VDSO = "[vdso]"


def open_unwinder(pid: int, known: dict[tuple[str, str], CodeImage] | None = None) -> tuple[Unwinder, list[str]]:
    """Return the unwinder of a process and, a line each, which of its files cannot be read.

    Args:
        pid: the process.
        known: images made before, by path and device:inode; what is made here is added.

    Raises:
        TargetError: there is no such process.
    """
    images = known if known is not None else {}
    mappings: list[CodeMapping] = []
    by_path: dict[str, CodeImage] = {}
    failures: list[str] = []
    for start, end, offset, identity, path in _executable_mappings(pid):
        if path not in by_path and path not in failures:
            try:
                key = (path, identity)
                image = None if path == VDSO else images.get(key)
                if image is None:
                    image = images[key] = _image(pid, path, start, end)
                by_path[path] = image
                _ = image.rules  # read now, decoded as stacks ask for them
            except StallscopeError as error:
                failures.append(str(error))
        build_id = by_path[path].build_id if path in by_path else ""
        mappings.append(CodeMapping(start, end, 0 if path == VDSO else offset, path, build_id))
    return Unwinder(mappings, by_path), failures


def _executable_mappings(pid: int) -> list[tuple[int, int, int, str, str]]:
    """Return (start, end, offset, device:inode, path) of each mapping with code of a file, and of the vdso."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError as error:
        raise TargetError(f"cannot look into process {pid}: {error.strerror}; check the pid") from error
    found = []
    for line in maps.splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and "x" in parts[1] and (parts[5].startswith("/") or parts[5] == VDSO):
            start, _, end = parts[0].partition("-")
            path = parts[5].removesuffix(" (deleted)")
            found.append((int(start, 16), int(end, 16), int(parts[2], 16), f"{parts[3]}:{parts[4]}", path))
    return found


def _image(pid: int, path: str, start: int, end: int) -> CodeImage:
    if path == VDSO:
        return CodeImage.from_bytes(_memory(pid, start, end), VDSO)
    root = f"/proc/{pid}/root"
    # through its mapping, which also reaches a file that was replaced or deleted
    mapped = f"/proc/{pid}/map_files/{start:x}-{end:x}"
    place = mapped if os.access(mapped, os.R_OK, effective_ids=True) else f"{root}{path}"
    return CodeImage.from_file(place, seen_as=path, root=root)


def _memory(pid: int, start: int, end: int) -> bytes:
    try:
        with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(start)
            return memory.read(end - start)
    except OSError as error:
        raise SymbolError(f"cannot read {VDSO} of process {pid}: {error.strerror}; run as root") from error
