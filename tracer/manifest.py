"""What a recording says about itself: the JSON beside its rows.

Frozen dataclasses with ``to_json``/``from_json``; unknown keys are ignored, so a newer recording with
additions stays readable.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stallscope.probes.catalogue import Field
from stallscope.tracer.errors import RecordingError

FORMAT_VERSION = 1

_MAX_INTEGER = 2**62
"""No clock, counter or inode reaches this; sums of two such numbers still fit 64 bits."""

CALL = "call"
ITERATION = "iteration"
ACCEPT = "accept"
QUEUE = "queue"
COUNTER = "counter"
LISTENER = "listener"
PACKET = "packet"
IMPORTED_SPAN = "imported span"
IMPORTED_SAMPLE = "imported sample"
STACK = "stack sample"
KINDS = (CALL, ITERATION, ACCEPT, QUEUE, COUNTER, LISTENER, PACKET, IMPORTED_SPAN, IMPORTED_SAMPLE, STACK)
"""Only ever added to, at the end; rows of a kind that is not known are left out and counted."""


@dataclass(frozen=True)
class ProbeInfo:
    """One entry of the probe list; a row's ``probe`` column is its ``id``.

    Attributes:
        id: the number in the ``probe`` column.
        name: the catalogue's or the user's name of the function, or ``event loop iteration``,
            ``accept``, ``accept queue``, ``kernel counter``.
        kind: one of ``KINDS``.
        rung: how it was measured, for the reader: ``uprobe``, ``raw tracepoint``, ``sampled every 10 ms``.
        fields: what the three values mean.
        symbol: the real symbol attached to (``clientsCron.part.0``), "" if it is no function.
        path: the file that holds it.
        build_id: GNU build id of that file, hexadecimal, "" if it has none.
        note: what the reader of the report must know ("inlined into clientsCron, measured there").
        pids: the processes it was attached to.
    """

    id: int
    name: str
    kind: str
    rung: str
    fields: tuple[Field, ...] = ()
    symbol: str = ""
    path: str = ""
    build_id: str = ""
    note: str = ""
    pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class TargetInfo:
    """One traced process.

    Attributes:
        pid: process id in the initial pid namespace.
        start_ns, end_ns: CLOCK_MONOTONIC when it was attached and when it was found gone (0: still there).
        exe: the server binary; build_id: its GNU build id.
        version: ``2.8.17``; allocator: ``jemalloc-3.6.0``; "" when not known.
        namespace: index into the manifest's namespaces.
        info: selected INFO and CONFIG values, as the server gave them.
    """

    pid: int
    start_ns: int
    exe: str
    build_id: str = ""
    product: str = "redis"
    version: str = ""
    allocator: str = ""
    namespace: int = 0
    end_ns: int = 0
    info: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ListenerInfo:
    """One listening socket of a target.

    Attributes:
        index: the number in a queue sample's ``listener`` field.
        address: ``127.0.0.1:6379`` or ``[::1]:6379``; pid: its owner; inode: of the socket.
        limit: accept queue limit in connections (the backlog after the somaxconn clamp).
        cookie: the kernel's number of the socket, never used again.
    """

    index: int
    address: str
    port: int
    pid: int
    inode: int
    namespace: int
    limit: int
    cookie: int = 0


@dataclass(frozen=True)
class NamespaceInfo:
    """One network namespace, its kernel counters at both ends, and the sysctls that decide.

    Attributes:
        inode: the namespace's inode number; index: the number in a counter sample's ``namespace`` field.
        counters_start, counters_end: TcpExt counters by name (``ListenOverflows``); end is empty until the footer.
        sysctls: ``net.core.somaxconn`` and others that decide what happens on overflow.
        seen, seen_elsewhere: what the hooked functions were seen to add to the counters of these names, for
            the listeners that were watched and for all others; empty where the kernel was not hooked.
    """

    index: int
    inode: int
    counters_start: dict[str, int]
    sysctls: dict[str, str] = field(default_factory=dict)
    counters_end: dict[str, int] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    seen_elsewhere: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """Something that happened to the recording itself, for the reader: a restart, a probe that could not be set."""

    time_ns: int
    text: str


@dataclass(frozen=True)
class TriggerInfo:
    """A trigger that came true and made, or extended, this capture of ``stallscope watch``.

    Attributes:
        time_ns: the moment its bound was passed, CLOCK_MONOTONIC; text: the trigger, as ``stall>50ms``.
        value: what was seen then, in ``unit`` (``ns``, ``%``, ``connections``, ``events``).
        subject: a listener's address, a function, or ``event loop``; pid: whose, 0 where not known.
        under_way: the span had not ended yet; count: spans, connections or events beyond the bound.
    """

    time_ns: int
    text: str
    value: float
    unit: str
    subject: str = ""
    pid: int = 0
    under_way: bool = False
    count: int = 1


@dataclass(frozen=True)
class DetailInfo:
    """A time in which detail probes were attached.

    Attributes:
        trigger_ns: what it was done for; attached_ns: when all were in place; detached_ns: 0 while they still are.
            All CLOCK_MONOTONIC.
        probes: ids of the probes that saw only this.
        text: what else is to be said of it.
    """

    trigger_ns: int
    attached_ns: int
    detached_ns: int = 0
    probes: tuple[int, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class ImportInfo:
    """One input of ``stallscope import``; rows of other tools name it by its place in the manifest's list.

    Attributes:
        file: its name as given; several names, joined with ", ", where one capture was written in parts.
        format: ``pcap``, ``pcapng``, ``SLOWLOG``, ``LATENCY`` or ``INFO``, "" of a file that held nothing.
        rows: how many of the recording's rows came from it.
        outside: how many rows were left out, because they lie before or after the recording.
        first_wall_ns, last_wall_ns: time of its first and last row, before any was left out, ``offset_ns`` added;
            ns since 1970, 0 where it had no row.
        offset_ns: what was added to its clock.
        counts: what was counted while it was read, by what it is ("packets": 1204).
        notes: what makes it incomplete, one line each.
    """

    file: str
    format: str
    rows: int
    outside: int = 0
    first_wall_ns: int = 0
    last_wall_ns: int = 0
    offset_ns: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything that is known before or between the rows.

    Attributes:
        started_ns: CLOCK_MONOTONIC at the start; all rows are on this clock.
        wall_offset_ns: add to a row's time for wall-clock nanoseconds since 1970 (CLOCK_REALTIME).
        ended_ns: CLOCK_MONOTONIC at the end, 0 until the footer.
        min_duration_ns: calls shorter than this were counted in the kernel and not recorded.
        stall_ns: iterations at least this long are recorded, and are stalls.
        sample_ns: interval of the backlog sampler.
        rungs: what each part was measured on: {"functions": "uprobe", "event loop": "raw tracepoint", ...}.
        counter_names: what a counter sample's ``counter`` field indexes.
        cost: what tracing cost (see recorder), filled by the footer.
        imports: where the rows of other tools came from; texts: what their ``stack`` column indexes.
        triggers: what made this capture, by time; further_triggers: how many more came true, and are not listed.
        details: when detail probes were attached; empty where all probes were, all the time.
    """

    started_ns: int
    wall_offset_ns: int
    probes: tuple[ProbeInfo, ...]
    targets: tuple[TargetInfo, ...]
    listeners: tuple[ListenerInfo, ...]
    namespaces: tuple[NamespaceInfo, ...]
    min_duration_ns: int
    stall_ns: int
    sample_ns: int
    rungs: dict[str, str]
    counter_names: tuple[str, ...]
    command: tuple[str, ...] = ()
    host: dict[str, str] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
    ended_ns: int = 0
    wall_offset_end_ns: int = 0
    ended_by: str = ""
    cost: dict[str, float] = field(default_factory=dict)
    imports: tuple[ImportInfo, ...] = ()
    texts: tuple[str, ...] = ()
    triggers: tuple[TriggerInfo, ...] = ()
    further_triggers: int = 0
    details: tuple[DetailInfo, ...] = ()
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(document: object) -> Manifest:
        """Return the manifest that ``to_json`` wrote.

        Raises:
            RecordingError: the document has another version or another form.
        """
        if isinstance(document, dict) and document.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise RecordingError(
                f"recording format {document.get('format_version')} is not known here (this is {FORMAT_VERSION}); "
                "read it with the stallscope that wrote it or a newer one"
            )
        return _build(Manifest, document, "manifest")

    def probe(self, probe_id: int) -> ProbeInfo | None:
        """Return the probe with this id, or None."""
        return next((probe for probe in self.probes if probe.id == probe_id), None)


@dataclass(frozen=True)
class ProbeCounters:
    """What the kernel counted for one probe (``struct probe_counters`` in event.h), summed over CPUs."""

    hits: int = 0
    sent: int = 0
    short_calls: int = 0
    short_ns: int = 0
    lost: int = 0
    lost_starts: int = 0
    unpaired: int = 0
    abandoned: int = 0
    thinned: int = 0

    @property
    def missing(self) -> int:
        """Return how many calls were seen and could not be kept."""
        return self.lost + self.lost_starts


@dataclass(frozen=True)
class Counters:
    """A snapshot of all in-kernel counters, written beside the rows once a second and in the footer."""

    time_ns: int
    by_probe: dict[int, ProbeCounters]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data (probe ids become strings)."""
        return {
            "time_ns": self.time_ns,
            "by_probe": {str(probe): dataclasses.asdict(counters) for probe, counters in self.by_probe.items()},
        }

    @staticmethod
    def from_json(document: object) -> Counters:
        """Return what ``to_json`` wrote; raises RecordingError on another form."""
        if not isinstance(document, dict) or not isinstance(document.get("by_probe"), dict):
            raise RecordingError("the recording's counters are not readable; the file is damaged")
        try:
            by_probe = {
                int(probe): _build(ProbeCounters, counters, "counters")
                for probe, counters in document["by_probe"].items()
            }
            return Counters(int(document["time_ns"]), by_probe)
        except (KeyError, TypeError, ValueError) as error:
            raise RecordingError("the recording's counters are not readable; the file is damaged") from error


_T = TypeVar("_T")


def _build(cls: type[_T], document: object, where: str) -> _T:
    """Build a dataclass from JSON data, checking every type; unknown keys are ignored."""
    if not isinstance(document, dict):
        raise RecordingError(f"the recording's {where} is not an object; the file is damaged")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for member in dataclasses.fields(cls):  # type: ignore[arg-type]
        place = f"{where}.{member.name}"
        if member.name in document:
            values[member.name] = _convert(hints[member.name], document[member.name], place)
        elif member.default is dataclasses.MISSING and member.default_factory is dataclasses.MISSING:
            raise RecordingError(f"the recording's {place} is missing; the file is damaged")
    return cls(**values)


def _convert(hint: Any, value: object, place: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast("type[Any]", hint), value, place)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if origin is types.UnionType or origin is typing.Union:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not -_MAX_INTEGER < value < _MAX_INTEGER:
            raise RecordingError(f"the recording's {place} is beyond any clock or counter; the file is damaged")
        if hint is float:
            return float(value)
        if hint is int and isinstance(value, int):
            return value
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise RecordingError(f"the recording's {place} has the wrong form; the file is damaged")
