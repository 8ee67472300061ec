"""Where the probe of each function goes in a given binary, and whether it would ever fire.

A symbol that exists proves little: the compiler may have copied the function into its callers and kept the
original for nobody. So a function counts as found only if something calls it on the path that matters (the
catalogue names its expected callers). Otherwise the answer names what does the work now: an alias of that
release, the function it was inlined into, or the C library's function beneath it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

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
from stallscope.tracer.capture.bypass import Site
from stallscope.tracer.capture.elf import Found, base_name, reading

STATUSES = ("found", "alias", "inlined", "bypassed", "missing")


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


@dataclass(frozen=True)
class _Candidate:
    """A symbol of a function that exists, with its clones and the names it works through."""

    name: str
    binary: Binary
    found: list[Found]
    wraps: tuple[str, ...] = ()


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


@dataclass
class _Resolver:
    image: Image
    redis_version: str | None
    full: bool
    _places: dict[tuple[str, ...], frozenset[str]] = field(default_factory=dict)
    _containers: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exe = self.image.exe
        self.server = self.exe.server or "redis"
        # Valkey's INFO says redis_version:7.2.4 for ever; its own release is in the binary.
        told = self.redis_version if self.server == "redis" or not self.exe.version else None
        self.version_text = told or self.exe.version
        self.version = catalogue.parse_version(self.version_text)
        self._layout: catalogue.ClientLayout | None = None
        self._layout_is_known = False

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
            containers = self._inlined_into(self.exe, name)
            if containers:
                return self._inlined(name, containers, "has no symbol of its own", NO_DECODER)
            return _missing(name, _no_symbol_in(self.exe, [name]))
        return self._plain(name, _Candidate(name, self.exe, found))

    def _in_library(self, asked: str, library: str, name: str) -> Resolution:
        binary = self.image.library(library)
        if binary is None:
            known = ", ".join(sorted(path.rsplit("/", 1)[-1] for path in self.image.libraries)) or "none"
            return _missing(asked, f'no library "{library}" in {self.exe.shown}; it uses: {known}')
        found = binary.find(name)
        if not found:
            return _missing(asked, _no_symbol_in(binary, [name]))
        function = catalogue.lookup(name)
        candidate = _Candidate(name, binary, found)
        decoder = self._decoder(function, [candidate]) if function is not None else NO_DECODER
        return self._plain(asked, candidate, decoder)

    def _plain(self, asked: str, candidate: _Candidate, decoder: Decoder = NO_DECODER) -> Resolution:
        if not self._is_reached(candidate, frozenset()):
            containers = self._inlined_into(candidate.binary, candidate.name)
            if containers and candidate.binary is self.exe:
                return self._inlined(asked, containers, "is called by nothing", NO_DECODER)
            return _missing(asked, f"nothing in {candidate.binary.shown} calls {candidate.name}", "bypassed")
        return self._found(asked, [candidate], "found", "", decoder)

    # Functions of the catalogue.

    def _listed(self, function: Function) -> Resolution:
        candidates = self._candidates(function)
        wanted = self._places_of(function.callers)
        reached = [one for one in candidates if self._is_reached(one, wanted)]
        if not reached:
            return self._unreached(function, candidates, wanted)
        kept = [one for one in reached if not self._is_wrapper(one, reached)]
        names = [one.name for one in kept]
        decoder = self._decoder(function, kept)
        if names == [function.name]:
            resolution = self._found(function.name, kept, "found", "", decoder)
        else:
            reason = self._why_alias(function, candidates, reached, kept)
            resolution = self._found(function.name, kept, "alias", reason, decoder, tuple(names))
        return self._with_moved(function, resolution)

    def _candidates(self, function: Function) -> list[_Candidate]:
        candidates = []
        for symbol in function.symbols:
            for binary in self._binaries(symbol.library):
                found = binary.find(symbol.name)
                if found:
                    candidates.append(_Candidate(symbol.name, binary, found, symbol.wraps))
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

    def _unreached(self, function: Function, candidates: list[_Candidate], wanted: frozenset[str]) -> Resolution:
        holders = candidates or [_Candidate(s.name, self.exe, []) for s in function.symbols]
        containers = tuple(
            dict.fromkeys(
                name for one in holders if one.binary is self.exe for name in self._inlined_into(self.exe, one.name)
            )
        )
        # Copies elsewhere do other work: those on the expected path count, if there are any.
        on_path = tuple(name for name in containers if name in wanted)
        state = f"is called by nothing in {self.exe.name}" if candidates else "has no symbol of its own"
        if candidates and wanted:
            state = f"is not called by {_listing(sorted(wanted))}"
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
                reason = f"{self._why_stand_in(function)}; {symbol.name} of {library.name} is probed instead"
                candidate = _Candidate(symbol.name, library, found)
                decoder = self._decoder(function, [candidate])
                return self._found(function.name, [candidate], "alias", reason, decoder, (symbol.name,))
        return None

    def _why_stand_in(self, function: Function) -> str:
        if any(symbol.library == "jemalloc" for symbol in function.symbols):
            shared = self.image.library("libjemalloc")
            if shared is not None:
                return _no_symbol_in(shared, [function.name])
            if not self.exe.jemalloc_version:
                return f"{self.exe.name} does not use jemalloc"
        return self._why_absent(function)

    def _why_absent(self, function: Function) -> str:
        names = self._server_names(function)
        if not names:
            return f"{self.server.capitalize()} {self.version_text} has no {function.name}"
        return _no_symbol_in(self.exe, names)

    def _absent(self, function: Function, wanted: frozenset[str]) -> Resolution:
        stand_ins = tuple(symbol.name for symbol in function.symbols if symbol.library == "libc")
        instead = stand_ins or (tuple(sorted(wanted)) if self._server_names(function) else ())
        return replace(_missing(function.name, self._why_absent(function)), instead=instead)

    def _server_names(self, function: Function) -> list[str]:
        names = catalogue.names_in(function, self.version, server=self.server)
        beneath = {symbol.name for symbol in function.symbols if symbol.library == "libc"}
        return [name for name in names if name not in beneath][:1]

    def _why_alias(
        self,
        function: Function,
        candidates: list[_Candidate],
        reached: list[_Candidate],
        kept: list[_Candidate],
    ) -> str:
        names = _listing([one.name for one in kept])
        if any(one.name == function.name for one in reached):
            if any(one.name == function.name for one in kept):
                return f"{names} share the work here"
            return f"{function.name} works through {names} here"
        if any(one.name == function.name for one in candidates):
            callers = _listing(sorted(self._places_of(function.callers)))
            return f"{callers} calls {names} here, not {function.name}"
        release = f"{self.server.capitalize()} {self.version_text}" if self.version_text else "this server"
        if any(symbol.library == "jemalloc" for symbol in function.symbols):
            release = f"jemalloc {kept[0].binary.jemalloc_version}".strip()
        return f"in {release} it is {names}"

    def _with_moved(self, function: Function, resolution: Resolution) -> Resolution:
        for moved in function.moved:
            since = (moved.valkey_since or moved.since) if self.server == "valkey" else moved.since
            if self.version and self.version >= catalogue.parse_version(since):
                reason = "; ".join(part for part in (resolution.reason, moved.why) if part)
                instead = resolution.instead or tuple(one.symbol for one in resolution.attachments)
                return replace(resolution, reason=reason, instead=(*instead, *moved.instead))
        return resolution

    # What the code says.

    def _is_reached(self, candidate: _Candidate, wanted: frozenset[str]) -> bool:
        """Return whether one of the wanted functions, or anything if none is known, calls a candidate."""
        if candidate.binary is not self.exe:
            wanted = frozenset()
        if not wanted and candidate.binary.exports(candidate.name):
            return True
        return self._counts(self._sites(candidate), wanted) or self._counts(self._near_sites(candidate), wanted)

    def _counts(self, sites: list[Site], wanted: frozenset[str]) -> bool:
        return any(base_name(site.function) in wanted for site in sites) if wanted else bool(sites)

    def _sites(self, candidate: _Candidate) -> list[Site]:
        """Return who refers to a candidate from outside: neither itself nor one of its clones."""
        return [
            site
            for one in candidate.found
            for site in candidate.binary.callers(one, confirm=self.full)
            if base_name(site.function) != candidate.name
        ]

    def _near_sites(self, candidate: _Candidate) -> list[Site]:
        """Return the short jumps to a candidate; they cost decoding, so they are asked for last."""
        return [
            site
            for one in candidate.found
            for site in candidate.binary.near_callers(one)
            if base_name(site.function) != candidate.name
        ]

    def _places_of(self, callers: tuple[str, ...]) -> frozenset[str]:
        """Return the functions whose code holds the expected callers and is itself reached."""
        if callers not in self._places:
            self._places[callers] = frozenset()  # a loop in the catalogue ends here
            places: set[str] = set()
            for name in callers:
                listed = catalogue.functions().get(name)
                above = self._places_of(listed.callers) if listed else frozenset()
                found = self.exe.find(name)
                if found and self._is_reached(_Candidate(name, self.exe, found), above):
                    places.add(name)
                    continue
                copies = self._inlined_into(self.exe, name)
                on_path = {copy for copy in copies if copy in above}
                places |= on_path or set(copies) or above
            self._places[callers] = frozenset(places)
        return self._places[callers]

    def _inlined_into(self, binary: Binary, name: str) -> tuple[str, ...]:
        """Return the reached functions that hold a copy of a function, by debug information."""
        key = (binary.path, name)
        if key not in self._containers:
            self._containers[key] = ()
            holders = {base_name(binary.function_at(at)) for at in binary.dwarf.inlined_at(name)} - {"", name}
            reached = []
            for holder in sorted(holders):
                listed = catalogue.functions().get(holder)
                above = self._places_of(listed.callers) if listed and binary is self.exe else frozenset()
                if self._is_reached(_Candidate(holder, binary, binary.find(holder)), above):
                    reached.append(holder)
            self._containers[key] = tuple(reached)
        return self._containers[key]

    def _is_wrapper(self, candidate: _Candidate, reached: list[_Candidate]) -> bool:
        own = frozenset([candidate.name])
        inner = [one for one in reached if one.name in candidate.wraps and one.binary is candidate.binary]
        return any(self._counts(self._sites(one), own) or self._counts(self._near_sites(one), own) for one in inner)

    # Answers.

    def _found(
        self,
        asked: str,
        candidates: list[_Candidate],
        status: str,
        reason: str,
        decoder: Decoder,
        instead: tuple[str, ...] = (),
    ) -> Resolution:
        placed = [(one.binary, found) for one in candidates for found in self._working(one)]
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
        callers = sorted({base_name(s.function) for one in candidates for s in self._sites(one) if s.function})
        copies = sorted({name for one in candidates for name in self._inlined_into(one.binary, one.name)})
        return replace(resolution, callers=tuple(callers), inlined_into=tuple(copies))

    def _working(self, candidate: _Candidate) -> list[Found]:
        """Return the candidate's symbols, without a head that only jumps on to its own ``.part``.

        With both probed every call would be two spans; other functions that hold a copy of the head call
        the part directly, so the part alone sees every call that does some work.
        """
        parts = [one for one in candidate.found if ".part" in one.symbol]
        binary = candidate.binary
        heads = {site.function for part in parts for site in (*binary.callers(part), *binary.near_callers(part))}
        return [one for one in candidate.found if ".part" in one.symbol or one.symbol not in heads]

    def _inlined(self, asked: str, containers: tuple[str, ...], state: str, decoder: Decoder) -> Resolution:
        resolution = self._instead(asked, containers, decoder)
        reason = f"inlined into {_listing(containers)}: {base_name(asked)} {state}"
        return replace(resolution, status="inlined", reason=reason, inlined_into=containers)

    def _instead(self, asked: str, names: tuple[str, ...], decoder: Decoder) -> Resolution:
        candidates = [_Candidate(name, self.exe, found) for name in names if (found := self.exe.find(name))]
        if not candidates:
            return replace(_missing(asked, ""), instead=names)
        listed = catalogue.functions().get(names[0]) if len(candidates) == 1 else None
        if listed is not None:
            decoder = self._decoder(listed, candidates)
        return self._found(asked, candidates, "inlined", "", decoder, names)

    def _decoder(self, function: Function, candidates: list[_Candidate]) -> Decoder:
        needs_layout = any(rule.kind == "client" for rule in function.decoders)
        layout = self._client_layout() if needs_layout else None
        return catalogue.decoder_for(function, self.version, server=self.server, layout=layout)

    def _client_layout(self) -> catalogue.ClientLayout | None:
        """Return where the client's members lie by debug information, None to use the catalogue's table."""
        if not self._layout_is_known:
            self._layout_is_known = True
            for name in ("client", "redisClient"):
                members = self.exe.dwarf.members(name, "querybuf")
                if members and ("fd" in members or "id" in members):
                    member, width = ("fd", 4) if "fd" in members else ("id", 8)
                    clock = members.get("lastinteraction", members.get("last_interaction", -1))
                    self._layout = catalogue.ClientLayout(
                        members[member], width, members["querybuf"], clock, self.server
                    )
                    break
        return self._layout


def _holds_for(decoder: Decoder, symbols: Sequence[str]) -> bool:
    """Return whether the clones among some symbols still have their arguments where the source has them.

    gcc removes arguments a clone does not use and moves the others up; ``.isra`` clones may get members
    instead of a pointer. What a decoder of strings and clients reads is used and comes first, so it stays.
    """
    if any(".isra" in symbol for symbol in symbols):
        return False
    is_cloned = any(".part" in symbol or ".constprop" in symbol for symbol in symbols)
    return not is_cloned or decoder.kind != "registers" or decoder.survives_clones


def _no_symbol_in(binary: Binary, names: Sequence[str]) -> str:
    stripped = " (stripped: install its debug symbols)" if binary.is_stripped else ""
    return f'no symbol "{_listing(names)}" in {binary.shown}{stripped}'


def _missing(asked: str, reason: str, status: str = "missing") -> Resolution:
    return Resolution(asked, status, (), "", 0, reason, (), NO_DECODER)


def _listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else " and ".join([", ".join(names[:-1]), names[-1]] if names else [])


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
