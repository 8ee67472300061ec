"""The kernel's functions by address, from /proc/kallsyms."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np

_KALLSYMS = Path("/proc/kallsyms")
_FUNCTION = re.compile(rb"^([0-9a-f]{16}) [tTwW] (\S+)(?:\t\[(\w+)\])?$", re.MULTILINE)
_CLONE = re.compile(r"\.(?:isra|constprop|part|cold|llvm)\.?\d*$")


class KernelSymbols:
    """Where the kernel's functions begin, BPF programs and modules among them."""

    def __init__(self, path: Path = _KALLSYMS) -> None:
        """Read the list; it is empty where the kernel does not show it (kptr_restrict)."""
        try:
            text = path.read_bytes()
        except OSError:
            text = b""
        found = [(int(match[1], 16), match[2]) for match in _FUNCTION.finditer(text)]
        found.sort()
        self._addresses = np.array([address for address, _ in found], np.uint64)
        self._names = [name for _, name in found]

    def at(self, address: int) -> str:
        """Return the function that contains an address, "" when none is known."""
        place = int(np.searchsorted(self._addresses, np.uint64(address), side="right")) - 1
        if place < 0 or not self._addresses[place]:
            return ""
        return _CLONE.sub("", self._names[place].decode(errors="replace"))


@cache
def kernel_symbols() -> KernelSymbols:
    """Return the running kernel's functions, read once, which takes some tenths of a second."""
    return KernelSymbols()
