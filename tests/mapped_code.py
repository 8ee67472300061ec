"""The mapped code of a live process, as the unwinder wants it."""

from __future__ import annotations

from pathlib import Path

from stallscope.tracer.unwind.code import CodeImage, CodeMapping


def mapped_code(pid: int) -> tuple[list[CodeMapping], dict[str, CodeImage]]:
    """Return the executable mappings of a live process, and their images by path."""
    mappings: list[CodeMapping] = []
    images: dict[str, CodeImage] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, permissions, offset, _, _, *path = line.split(maxsplit=5)
        if "x" not in permissions or not path or path[0] == "[vsyscall]":
            continue
        start, end = (int(part, 16) for part in span.split("-"))
        name = path[0]
        if name not in images:
            images[name] = CodeImage.from_file(name) if name != "[vdso]" else vdso(pid, start, end)
        mappings.append(CodeMapping(start, end, int(offset, 16), name, images[name].build_id))
    return mappings, images


def vdso(pid: int, start: int, end: int) -> CodeImage:
    """Return the image of the vdso, which exists in memory only."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(start)
        return CodeImage.from_bytes(memory.read(end - start), "[vdso]")
