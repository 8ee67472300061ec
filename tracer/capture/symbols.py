"""Where the probe of each function goes in a given binary, and whether it would ever fire.

A symbol that exists proves little: the compiler may have copied the function into its callers and kept the
original for nobody. So a function counts as found only if something calls it on the path that matters (the
catalogue names its expected callers). Otherwise the answer names what does the work now: an alias of that
release, the function it was inlined into, or the C library's function beneath it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from stallscope.probes import catalogue
from stallscope.probes.catalogue import NO_DECODER, Decoder, Function
from stallscope.tracer.capture.binary import (
    Attachment,
    Binary,
    FileImage,
    Image,
    ProcessImage,
    open_binary,
    open_process,
)
from stallscope.tracer.capture.callpath import CallPaths, Candidate
from stallscope.tracer.capture.elf import reading
from stallscope.tracer.capture.reasons import Reasons, Release, listing, no_symbol
from stallscope.tracer.capture.symbol_table import base_name


@dataclass(frozen=True)
class Resolution:
    """What became of one function that was asked for.

    Attributes:
        function: its name in the catalogue, or what the user wrote.
        status: ``found``; ``alias`` (another name does it here); ``inlined`` (copied into others);
            ``bypassed`` (the symbol exists, the expected path does not call it); ``missing``.
        attachments: what to probe; what is named in ``instead`` where that is possible; may be empty.
        found_in: ``.symtab``, ``.dynsym``, ``debug file PATH``, ``.gnu_debugdata`` or empty.
        address: virtual address of the first attachment's symbol, 0 when there is none.
        reason: one sentence that says why; empty when the function was plainly found.
        instead: the names that do the work now.
        decoder: how the arguments are read at the attachments.
        library: file name of the library the attachments are in, empty for the server's binary.
        callers: functions that call it directly; filled in with ``full=True``.
        inlined_into: functions that hold a copy of it; filled in with ``full=True``, or when it decided.
    """

    function: str
    status: str
    attachments: tuple[Attachment, ...]
    found_in: str
    address: int
    reason: str
    instead: tuple[str, ...]
    decoder: Decoder
    library: str = ""
    callers: tuple[str, ...] = ()
    inlined_into: tuple[str, ...] = ()


def resolve(
    target: Image | Binary | str | os.PathLike[str] | int,
    functions: Sequence[str],
    *,
    redis_version: str | None = None,
    full: bool = False,
) -> list[Resolution]:
    """Return for each function where its probes go in a binary or a live process.

    Args:
        target: what :func:`open_process` or :func:`open_binary` returned, a path, or a pid.
        functions: names of the catalogue, symbols, or ``LIBRARY:SYMBOL`` as ``libc:madvise``.
        redis_version: the server's release where INFO gave it; else it is read from the binary.
        full: confirm every caller by decoding its function, and look for inlined copies of functions that
            are found as well. Costs tenths of a second; without it a function costs milliseconds.

    Returns:
        One resolution for each function, in the order asked for.

    Raises:
        SymbolError: the binary cannot be read.
        TargetError: there is no such process.
    """
    image = _image(target)
    with reading(image.exe.shown):
        resolver = _Resolver(image, redis_version, full)
        return [resolver.resolve(name) for name in functions]


def _image(target: Image | Binary | str | os.PathLike[str] | int) -> Image:
    if isinstance(target, Binary):
        return FileImage(target)
    if isinstance(target, ProcessImage | FileImage):
        return target
    return open_process(target) if isinstance(target, int) else FileImage(open_binary(target))


class _Resolver:
    def __init__(self, image: Image, redis_version: str | None, full: bool) -> None:
        self.image = image
        self.full = full
        self.exe = image.exe
        self.paths = CallPaths(image.exe, full)
        self.release = Release.of(image.exe, redis_version)
        self.reasons = Reasons(image, self.release)

    def resolve(self, asked: str) -> Resolution:
        library, _, name = asked.rpartition(":")
        function = catalogue.lookup(name)
        if library:
            return self._in_library(asked, library, name)
        if function is None:
            return self._unlisted(name)
        return self._listed(function)

    # Functions the catalogue does not list.

    def _unlisted(self, name: str) -> Resolution:
        found = self.exe.find(name)
        if not found:
            containers = self.paths.inlined_into(self.exe, name)
            if containers:
                return self._inlined(name, containers, "has no symbol of its own", NO_DECODER)
            similar = self.exe.similar(name)
            return _missing(name, no_symbol(self.exe, name) + (f'; did you mean "{similar}"?' if similar else ""))
        return self._plain(name, Candidate(name, self.exe, found))

    def _in_library(self, asked: str, library: str, name: str) -> Resolution:
        binary = self.image.library(library)
        if binary is None:
            known = ", ".join(sorted(path.rsplit("/", 1)[-1] for path in self.image.libraries)) or "none"
            return _missing(asked, f'no library "{library}" in {self.exe.shown}; it uses: {known}')
        found = binary.find(name)
        if not found:
            return _missing(asked, no_symbol(binary, name))
        function = catalogue.lookup(name)
        candidate = Candidate(name, binary, found)
        decoder = self._decoder(function) if function is not None else NO_DECODER
        return self._plain(asked, candidate, decoder)

    def _plain(self, asked: str, candidate: Candidate, decoder: Decoder = NO_DECODER) -> Resolution:
        if not self.paths.is_reached(candidate, frozenset()):
            containers = self.paths.inlined_into(candidate.binary, candidate.name)
            if containers and candidate.binary is self.exe:
                return self._inlined(asked, containers, "is called by nothing", NO_DECODER)
            return _missing(asked, f"nothing in {candidate.binary.shown} calls {candidate.name}", "bypassed")
        return self._found(asked, [candidate], "found", "", decoder)

    # Functions of the catalogue.

    def _listed(self, function: Function) -> Resolution:
        candidates = self._candidates(function)
        wanted = self.paths.places_of(function.callers)
        reached = [one for one in candidates if self.paths.is_reached(one, wanted)]
        if not reached:
            return self._unreached(function, candidates, wanted)
        kept = [one for one in reached if not self.paths.is_wrapper(one, reached)]
        names = [one.name for one in kept]
        decoder = self._decoder(function)
        if names == [function.name]:
            resolution = self._found(function.name, kept, "found", "", decoder)
        else:
            reason = self.reasons.of_alias(function, candidates, reached, kept, wanted)
            resolution = self._found(function.name, kept, "alias", reason, decoder, tuple(names))
        return self._with_moved(function, resolution)

    def _candidates(self, function: Function) -> list[Candidate]:
        candidates = []
        for symbol in function.symbols:
            for binary in self._binaries(symbol.library):
                found = binary.find(symbol.name)
                if found:
                    candidates.append(Candidate(symbol.name, binary, found, symbol.wraps))
                    break
        return candidates

    def _binaries(self, library: str) -> Iterable[Binary]:
        if library == "libc":
            return
        yield self.exe
        if library == "jemalloc":
            shared = self.image.library("libjemalloc")
            if shared is not None:
                yield shared

    def _unreached(self, function: Function, candidates: list[Candidate], wanted: frozenset[str]) -> Resolution:
        holders = candidates or [Candidate(s.name, self.exe, []) for s in function.symbols]
        own = [one.name for one in holders if one.binary is self.exe]
        containers = tuple(dict.fromkeys(into for name in own for into in self.paths.inlined_into(self.exe, name)))
        # Copies elsewhere do other work: those on the expected path count, if there are any.
        on_path = tuple(name for name in containers if name in wanted)
        state = f"is called by nothing in {self.exe.name}" if candidates else "has no symbol of its own"
        if candidates and wanted:
            state = f"is not called by {listing(sorted(wanted))}"
        if on_path or containers:
            return self._inlined(function.name, on_path or containers, state, NO_DECODER)
        if candidates and wanted:
            names = tuple(sorted(wanted))
            told = "" if self.exe.has_debug_info else " (no debug information to tell)"
            return replace(
                self._instead(function.name, names, NO_DECODER),
                status="bypassed",
                reason=f"{function.name} {state}, probably because it was inlined there{told}",
            )
        if candidates:
            return _missing(function.name, f"nothing in {candidates[0].binary.shown} calls it", "bypassed")
        return self._stand_in(function) or self._absent(function, wanted)

    def _stand_in(self, function: Function) -> Resolution | None:
        """Return the function of the C library that does the work beneath, where one is listed and mapped."""
        for symbol in function.symbols:
            library = self.image.library("libc") if symbol.library == "libc" else None
            found = library.find(symbol.name) if library is not None else []
            if library is not None and found:
                candidate = Candidate(symbol.name, library, found)
                reason = self.reasons.of_stand_in(function, candidate)
                decoder = self._decoder(function)
                return self._found(function.name, [candidate], "alias", reason, decoder, (symbol.name,))
        return None

    def _absent(self, function: Function, wanted: frozenset[str]) -> Resolution:
        stand_ins = tuple(symbol.name for symbol in function.symbols if symbol.library == "libc")
        instead = stand_ins or (tuple(sorted(wanted)) if self.release.names_of(function) else ())
        return replace(_missing(function.name, self.reasons.of_absence(function)), instead=instead)

    def _with_moved(self, function: Function, resolution: Resolution) -> Resolution:
        for moved in function.moved:
            if self.release.has_reached(moved.since, moved.valkey_since):
                reason = "; ".join(part for part in (resolution.reason, moved.why) if part)
                instead = resolution.instead or tuple(one.symbol for one in resolution.attachments)
                return replace(resolution, reason=reason, instead=(*instead, *moved.instead))
        return resolution

    # Answers.

    def _found(
        self,
        asked: str,
        candidates: list[Candidate],
        status: str,
        reason: str,
        decoder: Decoder,
        instead: tuple[str, ...] = (),
    ) -> Resolution:
        placed = [(one.binary, found) for one in candidates for found in self.paths.working(one)]
        binary, first = placed[0]
        if not _holds_for(decoder, [found.symbol for _, found in placed]):
            decoder = NO_DECODER
        resolution = Resolution(
            asked,
            status,
            tuple(where.attachment(found) for where, found in placed),
            first.found_in,
            first.address,
            reason,
            instead,
            decoder,
            "" if binary is self.exe else binary.name,
        )
        if not self.full:
            return resolution
        callers = sorted({name for one in candidates for name in self.paths.callers(one)})
        copies = sorted({name for one in candidates for name in self.paths.inlined_into(one.binary, one.name)})
        return replace(resolution, callers=tuple(callers), inlined_into=tuple(copies))

    def _inlined(self, asked: str, containers: tuple[str, ...], state: str, decoder: Decoder) -> Resolution:
        resolution = self._instead(asked, containers, decoder)
        reason = f"inlined into {listing(containers)}: {base_name(asked)} {state}"
        return replace(resolution, status="inlined", reason=reason, inlined_into=containers)

    def _instead(self, asked: str, names: tuple[str, ...], decoder: Decoder) -> Resolution:
        candidates = [Candidate(name, self.exe, found) for name in names if (found := self.exe.find(name))]
        if not candidates:
            return replace(_missing(asked, ""), instead=names)
        listed = catalogue.functions().get(names[0]) if len(candidates) == 1 else None
        if listed is not None:
            decoder = self._decoder(listed)
        return self._found(asked, candidates, "inlined", "", decoder, names)

    def _decoder(self, function: Function) -> Decoder:
        needs_layout = any(rule.kind == "client" for rule in function.decoders)
        layout = self._client_layout if needs_layout else None
        return catalogue.decoder_for(function, self.release.version, server=self.release.server, layout=layout)

    @cached_property
    def _client_layout(self) -> catalogue.ClientLayout | None:
        """Where the client's members lie by debug information, None to use the catalogue's table."""
        for name in ("client", "redisClient"):
            members = self.exe.dwarf.members(name, "querybuf")
            if "fd" in members or "id" in members:
                member, width = ("fd", 4) if "fd" in members else ("id", 8)
                clock = members.get("lastinteraction", members.get("last_interaction", -1))
                return catalogue.ClientLayout(members[member], width, members["querybuf"], clock, self.release.server)
        return None


def _holds_for(decoder: Decoder, symbols: Sequence[str]) -> bool:
    """Return whether the clones among some symbols still have their arguments where the source has them.

    gcc removes arguments a clone does not use and moves the others up; ``.isra`` clones may get members
    instead of a pointer. What a decoder of strings and clients reads is used and comes first, so it stays.
    """
    if any(".isra" in symbol for symbol in symbols):
        return False
    is_cloned = any(".part" in symbol or ".constprop" in symbol for symbol in symbols)
    return not is_cloned or decoder.kind != "registers" or decoder.survives_clones


def _missing(asked: str, reason: str, status: str = "missing") -> Resolution:
    return Resolution(asked, status, (), "", 0, reason, (), NO_DECODER)


__all__: Sequence[str] = (
    "Attachment",
    "Binary",
    "FileImage",
    "ProcessImage",
    "Resolution",
    "open_binary",
    "open_process",
    "resolve",
)
