"""Why a function is probed under another name, in another place or not at all: one sentence each.

The sentences name the server's release, because most of them are true of some releases only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stallscope.probes import catalogue
from stallscope.probes.catalogue import Function
from stallscope.tracer.capture.binary import Binary, Image
from stallscope.tracer.capture.callpath import Candidate


@dataclass(frozen=True)
class Release:
    """Which server a binary is.

    Attributes:
        server: ``redis`` or ``valkey``.
        text: its release, as ``7.0.15``; empty when it is not known.
        version: the same as numbers.
    """

    server: str
    text: str
    version: catalogue.Version

    @classmethod
    def of(cls, exe: Binary, told: str | None) -> Release:
        """Return the release of a binary, where INFO told one that, unless it is known not to tell it."""
        server = exe.server or "redis"
        # Valkey's INFO says redis_version:7.2.4 for ever; its own release is in the binary.
        text = (told if server == "redis" or not exe.version else None) or exe.version
        return cls(server, text, catalogue.parse_version(text))

    def __str__(self) -> str:
        return f"{self.server.capitalize()} {self.text}" if self.text else "this server"

    def names_of(self, function: Function) -> list[str]:
        """Return the names a function has in this release, without those of the C library beneath it."""
        names = catalogue.names_in(function, self.version, server=self.server)
        beneath = {symbol.name for symbol in function.symbols if symbol.library == "libc"}
        return [name for name in names if name not in beneath]

    def has_reached(self, since: str, valkey_since: str) -> bool:
        """Return whether this release is known and not older than another."""
        first = (valkey_since or since) if self.server == "valkey" else since
        return bool(self.version) and self.version >= catalogue.parse_version(first)


@dataclass(frozen=True)
class Reasons:
    """The sentences about one server.

    Attributes:
        image: its binary and libraries.
        release: which server it is.
    """

    image: Image
    release: Release

    def of_alias(
        self,
        function: Function,
        candidates: Sequence[Candidate],
        reached: Sequence[Candidate],
        kept: Sequence[Candidate],
        callers: frozenset[str],
    ) -> str:
        """Say why other names than the function's own are probed.

        Args:
            candidates: its symbols that exist here.
            reached: those the expected callers call.
            kept: those that are probed.
            callers: the functions whose code holds the expected callers.
        """
        names = listing([one.name for one in kept])
        if any(one.name == function.name for one in kept):
            return f"{names} share the work here"
        if any(one.name == function.name for one in reached):
            return f"{function.name} works through {names} here"
        if any(one.name == function.name for one in candidates):
            return f"{listing(sorted(callers))} calls {names} here, not {function.name}"
        if _is_of_jemalloc(function):
            return f"in {f'jemalloc {kept[0].binary.jemalloc_version}'.strip()} it is {names}"
        return f"in {self.release} it is {names}"

    def of_stand_in(self, function: Function, candidate: Candidate) -> str:
        """Say why a function of the C library is probed for one of the server or of its allocator."""
        return f"{self._of_allocator(function)}; {candidate.name} of {candidate.binary.name} is probed instead"

    def of_absence(self, function: Function) -> str:
        """Say why a function is not there at all."""
        names = self.release.names_of(function)
        return no_symbol(self.image.exe, names[0]) if names else f"{self.release} has no {function.name}"

    def _of_allocator(self, function: Function) -> str:
        if _is_of_jemalloc(function):
            shared = self.image.library("libjemalloc")
            if shared is not None:
                return no_symbol(shared, function.name)
            if not self.image.exe.jemalloc_version:
                return f"{self.image.exe.name} does not use jemalloc"
        return self.of_absence(function)


def no_symbol(binary: Binary, name: str) -> str:
    """Say that a file has no such symbol and, where that may be because it is stripped, the remedy."""
    absent = f'no symbol "{name}" in {binary.shown}'
    if not binary.is_stripped or any(table.source != ".dynsym" for table in binary.tables):
        return absent
    packages = f" ({binary.server}-tools-dbgsym, debuginfo-install {binary.server})" if binary.server else ""
    return f"{absent} (stripped); install its debug symbols{packages}"


def listing(names: Sequence[str]) -> str:
    """Return names as a sentence has them: ``a, b and c``."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def _is_of_jemalloc(function: Function) -> bool:
    return any(symbol.library == "jemalloc" for symbol in function.symbols)
