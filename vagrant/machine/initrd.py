"""The initrd: busybox, the modules of a virtio disk with ext4, and a shell script. About 2 MB.

Debian's own initrd is 15 MB and takes seconds to unpack on an emulated CPU. Written here as a "newc"
archive (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst), so that neither
cpio nor a mount is needed.
"""

from __future__ import annotations

import gzip
import lzma
import stat
from pathlib import Path

from .errors import MachineError

ROOT_DISK_MODULES = ("virtio_pci", "virtio_blk", "ext4")


def module_files(modules: Path, wanted: tuple[str, ...] = ROOT_DISK_MODULES) -> list[Path]:
    """Return the files to load for the wanted modules, each after everything it depends on.

    Args:
        modules: The folder lib/modules/VERSION of a tree, with depmod's modules.dep.
        wanted: Module names; one that is built into the kernel needs no file and gives none.

    Raises:
        MachineError: A module is neither there nor built in.
    """
    needs: dict[str, tuple[Path, list[Path]]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        own, _, others = line.partition(":")
        needs[_module_name(own)] = (modules / own, [modules / other for other in others.split()])
    builtin = {_module_name(line) for line in (modules / "modules.builtin").read_text().splitlines()}
    ordered: dict[Path, None] = {}
    for name in wanted:
        if name in needs:
            own_file, dependencies = needs[name]
            # modules.dep lists what must be loaded first last
            ordered.update(dict.fromkeys([*reversed(dependencies), own_file]))
        elif name not in builtin:
            raise MachineError(
                f"kernel {modules.name} has no module {name} for its root disk; choose a stock Debian kernel"
            )
    return list(ordered)


def build_initrd(busybox: Path, init: Path, modules: Path) -> bytes:
    """Return the gzip-compressed initrd for the kernel whose lib/modules/VERSION folder is given."""
    files = module_files(modules)
    archive = _Newc()
    for folder in ("bin", "dev", "proc", "lib", "mnt"):
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    archive.add("init", stat.S_IFREG | 0o755, init.read_bytes())
    for file in files:
        archive.add(f"lib/{_module_name(file.name)}.ko", stat.S_IFREG | 0o644, _uncompressed(file))
    order = "".join(f"{_module_name(file.name)}.ko\n" for file in files)
    archive.add("lib/order", stat.S_IFREG | 0o644, order.encode())
    return gzip.compress(archive.finish(), compresslevel=6, mtime=0)


def _module_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].split(".ko")[0].replace("-", "_")


def _uncompressed(module: Path) -> bytes:
    content = module.read_bytes()
    if module.suffix == ".ko":
        return content
    if module.suffix == ".xz":
        return lzma.decompress(content)
    raise MachineError(f"cannot unpack {module}: only .ko and .ko.xz are known; choose a stock Debian 12 kernel")


class _Newc:
    """A cpio archive in the "newc" format: 13 hexadecimal fields, name, content, padded to 4 bytes."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._entries = 0

    def add(self, name: str, mode: int, content: bytes = b"") -> None:
        """Append one entry, owned by root, with no times."""
        self._entries += 1
        encoded = name.encode() + b"\0"
        fields = (self._entries, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        self._bytes += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._bytes += content
        self._pad()

    def finish(self) -> bytes:
        """Return the whole archive, with its trailer."""
        self.add("TRAILER!!!", 0)
        return bytes(self._bytes)

    def _pad(self) -> None:
        self._bytes += b"\0" * (-len(self._bytes) % 4)
