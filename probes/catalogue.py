"""What can be traced: names by version, aliases, arguments, callers and how the arguments are decoded.

The data is ``catalogue.toml`` beside this file; this module only gives it types. Nothing here opens a
binary: which of the names exists in one, and whether anything calls it, is ``tracer.capture.symbols``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from stallscope.tracer.errors import SymbolError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Version = tuple[int, ...]

THREADS = ("main", "any", "not jemalloc_bg_thd")
STANDING = "standing"
TIERS = (STANDING, "detail")
LIBRARIES = ("server", "jemalloc", "libc")


@dataclass(frozen=True)
class Field:
    """One decoded argument inside the three 64-bit value slots of a wire record.

    Attributes:
        name: column name, with its unit, as ``purged_bytes``.
        unit: unit of the number, as ``bytes``.
        slot: 0, 1 or 2: which of the record's values holds it.
        shift: number of bits to shift the value right by.
        bits: number of bits that belong to it after the shift.
        signed: the remaining bits are two's complement.
    """

    name: str
    unit: str
    slot: int
    shift: int = 0
    bits: int = 64
    signed: bool = False


@dataclass(frozen=True)
class Decoder:
    """How the BPF program fills ``value[0..2]`` when the function is entered.

    ======== ================================= ==============================================================
    kind     params                            slots
    ======== ================================= ==============================================================
    none     ()                                nothing
    result   ()                                2 what the function returned
    registers 1-based argument numbers, 0 none the three arguments
    sdshdr   (argument,)                       0 length_bytes, 1 free_bytes of a string of Redis <= 3.0
    sds      (argument,)                       the same of Redis >= 3.2, header found from the byte at s[-1]
    client   (argument, id offset, id bytes,   0 low half fd or client_id, high half last_interaction_s;
             querybuf offset, lastinteraction  1 allocated_bytes and 2 free_bytes of the query buffer
             offset or -1, 0 sdshdr or 1 sds)  (all 0 without one; the header is not counted)
    ======== ================================= ==============================================================

    ``survives_clones`` says of ``registers`` that a clone of the function (``.part``, ``.constprop``) uses
    all arguments up to those read, so that gcc cannot have moved them.
    """

    kind: str
    params: tuple[int, ...] = ()
    fields: tuple[Field, ...] = ()
    survives_clones: bool = False


NO_DECODER = Decoder("none")

_STRING_FIELDS = (Field("length_bytes", "bytes", 0), Field("free_bytes", "bytes", 1))


@dataclass(frozen=True)
class Argument:
    """One argument as the C source declares it, with the unit of its value."""

    name: str
    type: str
    unit: str


@dataclass(frozen=True)
class Symbol:
    """One name a function has or had.

    Attributes:
        name: the exact name in the symbol table.
        library: ``server``, ``jemalloc`` (in the server or shared) or ``libc`` (a stand-in).
        since: first Redis release that has it, or empty.
        until: last Redis release that has it, or empty; ``7.0`` means every 7.0.x.
        valkey_since: first Valkey release (8.0 and later) that has it, where it differs.
        jemalloc: jemalloc releases that have it, as text.
        wraps: symbols it does its work through when both exist.
    """

    name: str
    library: str = "server"
    since: str = ""
    until: str = ""
    valkey_since: str = ""
    jemalloc: str = ""
    wraps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Moved:
    """From a release on, part of the work is done elsewhere, although the symbol is still called."""

    since: str
    instead: tuple[str, ...]
    why: str
    source: str
    valkey_since: str = ""


@dataclass(frozen=True)
class DecoderRule:
    """A decoder and the Redis releases it is right for (both inclusive, empty: no limit)."""

    kind: str
    params: tuple[int, ...]
    fields: tuple[Field, ...] = ()
    since: str = ""
    until: str = ""
    survives_clones: bool = False


@dataclass(frozen=True)
class ClientLayout:
    """Byte offsets inside the server's client struct, on x86-64.

    ``id_size_bytes`` is 4 where ``id_offset`` is the file descriptor (up to 5.0), 8 for the client id.
    ``last_interaction_offset`` is -1 where the member is not known.
    """

    id_offset: int
    id_size_bytes: int
    querybuf_offset: int
    last_interaction_offset: int
    server: str = "redis"
    since: str = ""
    until: str = ""


@dataclass(frozen=True)
class Function:
    """One traceable function of the catalogue; see ``catalogue.toml`` for what each attribute means."""

    name: str
    summary: str
    thread: str
    tier: str
    default: bool
    callers: tuple[str, ...]
    source: str
    symbols: tuple[Symbol, ...]
    arguments: tuple[Argument, ...] = ()
    decoders: tuple[DecoderRule, ...] = ()
    moved: tuple[Moved, ...] = ()


def parse_version(text: str | None) -> Version:
    """Return ``7.0.15``, ``v=7.0.15`` or ``valkey 8.0.1`` as numbers; empty where there are none."""
    digits = (text or "").split()[-1:] or [""]
    parts: list[int] = []
    for part in digits[0].lstrip("v=").split("-")[0].split("."):
        if not part.isdigit() or len(part) > 9:
            break
        parts.append(int(part))
    return tuple(parts)


def within(version: Version, since: str, until: str) -> bool:
    """Return whether a release lies between two others, both inclusive; ``7.0`` as until means all 7.0.x."""
    last = parse_version(until)
    if since and version < parse_version(since):
        return False
    return not last or version[: len(last)] <= last


def string_kind(version: Version) -> str:
    """Return ``sdshdr`` (up to 3.0), ``sds`` (from 3.2) or nothing where the release is not known."""
    if not version:
        return ""
    return "sds" if version >= (3, 1) else "sdshdr"


def client_decoder(argument: int, layout: ClientLayout, strings: str) -> Decoder:
    """Return the decoder of a function whose given argument is a client of this layout.

    Args:
        argument: 1-based number of the argument.
        layout: where the members lie.
        strings: ``sdshdr`` or ``sds``, see :func:`string_kind`.
    """
    params = (
        argument,
        layout.id_offset,
        layout.id_size_bytes,
        layout.querybuf_offset,
        layout.last_interaction_offset,
        int(strings == "sds"),
    )
    identity = (
        Field("fd", "file descriptor", 0, bits=32, signed=True)
        if layout.id_size_bytes == 4
        else Field("client_id", "low 32 bits of the client id", 0, bits=32)
    )
    clock = (Field("last_interaction_s", "s since 1970", 0, shift=32, bits=32),)
    return Decoder(
        "client",
        params,
        (
            identity,
            *(clock if layout.last_interaction_offset >= 0 else ()),
            Field("allocated_bytes", "bytes, without the string's header", 1),
            Field("free_bytes", "bytes", 2),
        ),
    )


def decoder_for(
    function: Function, version: Version, *, server: str = "redis", layout: ClientLayout | None = None
) -> Decoder:
    """Return how a function's arguments are read in a given release; kind ``none`` where that is not known.

    Args:
        function: the catalogue's function.
        version: release of the server, empty when unknown.
        server: ``redis`` or ``valkey``.
        layout: the client struct's members as read from DWARF; without it the table is used.
    """
    strings = "sds" if server == "valkey" else string_kind(version)
    for rule in function.decoders:
        if (rule.since or rule.until) and not (version and within(version, rule.since, rule.until)):
            continue
        if rule.kind == "client":
            layout = layout or client_layout(version, server=server)
            if layout is None or not strings:
                return NO_DECODER
            return client_decoder(rule.params[0], layout, strings)
        if rule.kind in ("sds", "sdshdr"):
            return Decoder(rule.kind, rule.params, _STRING_FIELDS)
        return Decoder(rule.kind, rule.params, rule.fields, rule.survives_clones)
    return NO_DECODER


def client_layout(version: Version, *, server: str = "redis") -> ClientLayout | None:
    """Return the client struct's offsets of a release, or None for a release not looked up."""
    for layout in _catalogue().layouts:
        if version and layout.server == server and within(version, layout.since, layout.until):
            return layout
    return None


def functions() -> Mapping[str, Function]:
    """Return every function of the catalogue by name, in the order it is listed."""
    return _catalogue().functions


def default_functions() -> list[str]:
    """Return the names of the functions that are traced unless others are asked for."""
    return [function.name for function in functions().values() if function.default]


def is_standing(name: str) -> bool:
    """Return whether a function is called so seldom that its probes may stay attached: the catalogue's word for it."""
    known = lookup(name)
    return known is not None and known.tier == STANDING


def lookup(name: str) -> Function | None:
    """Return the function with this name, or the one with this symbol narrowed to it, or None.

    Asked for an alias (``sdsResize``), exactly that symbol is meant and not the others.
    """
    known = functions()
    if name in known:
        return known[name]
    for function in known.values():
        for symbol in function.symbols:
            if symbol.name == name and symbol.library != "libc":
                return replace(function, name=name, symbols=(replace(symbol, wraps=()),), moved=())
    return None


def names_in(function: Function, version: Version, *, server: str = "redis") -> list[str]:
    """Return the names a function has in a release, its own first; all of them when it is not known."""
    names = []
    for symbol in function.symbols:
        since = symbol.since
        if server == "valkey":
            since = symbol.valkey_since or ("" if since == "99" else since)
        if not version or within(version, since, symbol.until):
            names.append(symbol.name)
    return names


@dataclass(frozen=True)
class _Catalogue:
    functions: Mapping[str, Function]
    layouts: tuple[ClientLayout, ...]


@cache
def _catalogue() -> _Catalogue:
    text = files(__package__ or "stallscope.probes").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return parse(text)


def parse(text: str) -> _Catalogue:
    """Return the catalogue written in a TOML text.

    Raises:
        SymbolError: it is not TOML, or an entry lacks something or has something unknown.
    """
    try:
        data = tomllib.loads(text)
        listed = [_function(entry) for entry in data["function"]]
        layouts = tuple(_layout(entry) for entry in data.get("client_layout", ()))
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise SymbolError(f"cannot read the probe catalogue: {error}; reinstall stallscope") from error
    return _Catalogue({function.name: function for function in listed}, layouts)


def _function(entry: dict[str, Any]) -> Function:
    values = dict(entry)
    values["callers"] = tuple(values["callers"])
    values["symbols"] = tuple(_symbol(item) for item in values["symbols"])
    values["arguments"] = tuple(Argument(**item) for item in values.pop("arguments", ()))
    values["decoders"] = tuple(_rule(item) for item in values.pop("decoders", ()))
    values["moved"] = tuple(_tuples(Moved, item, "instead") for item in values.pop("moved", ()))
    function = Function(**values)
    if function.thread not in THREADS or function.tier not in TIERS:
        raise ValueError(f"{function.name}: unknown thread or tier")
    return function


def _symbol(entry: dict[str, Any]) -> Symbol:
    symbol: Symbol = _tuples(Symbol, entry, "wraps")
    if symbol.library not in LIBRARIES:
        raise ValueError(f"{symbol.name}: unknown library {symbol.library}")
    return symbol


def _rule(entry: dict[str, Any]) -> DecoderRule:
    fields = tuple(Field(**item) for item in entry.get("fields", ()))
    rest = {key: value for key, value in entry.items() if key not in ("fields", "params")}
    return DecoderRule(params=tuple(entry["params"]), fields=fields, **rest)


def _layout(entry: dict[str, Any]) -> ClientLayout:
    id_offset, id_size_bytes = entry["id"]
    return ClientLayout(
        id_offset,
        id_size_bytes,
        entry["querybuf"],
        entry["last_interaction"],
        entry.get("server", "redis"),
        entry["since"],
        entry["until"],
    )


def _tuples(kind: Any, entry: dict[str, Any], *names: str) -> Any:
    return kind(**{key: tuple(value) if key in names else value for key, value in entry.items()})


__all__: Sequence[str] = (
    "NO_DECODER",
    "Argument",
    "ClientLayout",
    "Decoder",
    "DecoderRule",
    "Field",
    "Function",
    "Moved",
    "Symbol",
    "client_decoder",
    "client_layout",
    "decoder_for",
    "default_functions",
    "functions",
    "lookup",
    "names_in",
    "parse",
    "parse_version",
    "string_kind",
    "within",
)
