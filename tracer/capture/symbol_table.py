"""Symbol tables as arrays: functions by name, with their clones, and the function at an address.

Written by hand for speed: a server has some 4,000 symbols and pyelftools makes an object of each, which
takes 80 ms; here the table is one numpy array over the section's bytes and a name is found with
``bytes.find``, in under a millisecond.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Elf64_Sym of the System V ABI.
SYMBOL = np.dtype(
    [
        ("name", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("shndx", "<u2"),
        ("value", "<u8"),
        ("size", "<u8"),
    ]
)

# What gcc and clang append to a function they cloned, split or renamed; ".cold" is not a function.
_CLONE = re.compile(r"(?:\.(?:isra|constprop|part|lto_priv|llvm)(?:\.\d+)?)+")


def base_name(symbol: str) -> str:
    """Return the function a symbol belongs to: ``freeClient`` for ``freeClient.part.0.cold``."""
    return symbol.split(".", 1)[0] or symbol


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

    def names(self) -> set[str]:
        """Return the names of all functions, without what compilers append."""
        return {base_name(self.name_at(int(offset))) for offset in self._entries["name"]}

    def aliases(self, address: int) -> list[str]:
        """Return every name of the function that starts at an address, in the order of the table."""
        entries = self._entries[self._entries["value"] == np.uint64(address)]
        return [self.name_at(int(offset)) for offset in entries["name"]]
