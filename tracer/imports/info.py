"""INFO, asked again and again: the numbers that tell what the server was doing, each as a series.

A dump is placed at the server's own ``server_time_usec`` (Redis 5.0 and later), else at the line with the time before
it, as ``date +%s.%N`` prints it.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone

import numpy as np

from stallscope.probes.catalogue import Field
from stallscope.tracer.imports.rows import FIRST_WALL_S, LAST_WALL_S, NS_PER_S, Input
from stallscope.tracer.layout import EVENT, NO_STACK
from stallscope.tracer.manifest import IMPORTED_SAMPLE, ProbeInfo

FORMAT = "INFO"
MAX_FIELDS = 1000
"""Different fields kept of one import; INFO ALL of a server has a few hundred."""

UNITS = {
    "connected_clients": "clients",
    "blocked_clients": "clients",
    "total_connections_received": "connections",
    "rejected_connections": "connections",
    "instantaneous_ops_per_sec": "commands/s",
    "total_commands_processed": "commands",
    "used_memory": "B",
    "used_memory_rss": "B",
    "mem_fragmentation_ratio": "",
    "client_biggest_input_buf": "B",
    "client_recent_max_input_buffer": "B",
    "mem_clients_normal": "B",
    "latest_fork_usec": "us",
    "expired_keys": "keys",
    "evicted_keys": "keys",
}
"""The fields that are always kept, first to last in importance, with their units; others only if they change."""

_CLOCKS = ("server_time_usec", "lru_clock", "uptime_in_seconds", "uptime_in_days")
_SUFFIX_UNITS = (
    ("_bytes", "B"), ("_buffer", "B"), ("_buf", "B"), ("_usec", "us"), ("_seconds", "s"), ("_per_sec", "1/s"),
    ("_sec", "s"), ("_kbps", "kB/s"), ("_ms", "ms"), ("_perc", "%"), ("_percentage", "%"),
)  # fmt: skip
_PREFIX_UNITS = (("used_memory", "B"), ("used_cpu", "s"), ("mem_", "B"))

_TITLE = re.compile(r"# [A-Z][A-Za-z ]{2,20}")
_FIELD = re.compile(r"([A-Za-z_][\w.\-:|]{0,80}?):(.*)")
_EPOCH = re.compile(r"(\d{10})(?:[.,](\d{1,9}))?")
_ISO = re.compile(
    r"(\d{4}-\d{2}-\d{2})[T ](\d{2}:\d{2}:\d{2})(?:[.,](\d{1,9}))?\s?(?:(Z)|([+-])(\d{2}):?(\d{2}))", re.ASCII
)


@dataclass
class Dump:
    """One reply of INFO; ``wall_ns`` since 1970, None where nothing tells it."""

    wall_ns: int | None
    fields: dict[str, str] = field(default_factory=dict)


def looks_like_info(lines: Iterable[str]) -> bool:
    """Return whether these lines are INFO's: its section titles, and one of its fields."""
    stripped = [line.strip() for line in lines]
    return any(map(_TITLE.fullmatch, stripped)) and any(
        line.split(":")[0] in UNITS or line.startswith(("redis_version:", "valkey_version:", "role:", "used_cpu_sys:"))
        for line in stripped
    )


def dumps(lines: Iterable[str]) -> list[Dump]:
    """Return the dumps in these lines, in their order; a time, a field that comes again, begins the next."""
    found: list[Dump] = []
    open_dump: Dump | None = None
    told_ns: int | None = None
    for line in lines:
        text = line.strip()
        time_ns = wall_time_ns(text) if text[:1].isdigit() else None
        if time_ns is not None:
            told_ns, open_dump = time_ns, None
            continue
        match = _FIELD.fullmatch(text)
        if match is None:
            continue
        if open_dump is None or match[1] in open_dump.fields:
            # the time before a dump is of that one alone
            open_dump = Dump(told_ns)
            told_ns = None
            found.append(open_dump)
        open_dump.fields[match[1]] = match[2]
    for dump in found:
        own = dump.fields.get("server_time_usec", "")
        if own.isascii() and own.isdigit() and FIRST_WALL_S <= int(own[:20]) // 1_000_000 < LAST_WALL_S:
            dump.wall_ns = int(own) * 1000
    return found


def wall_time_ns(text: str) -> int | None:
    """Return the time that ``date +%s.%N`` or ``date --iso-8601=ns`` printed, ns since 1970; None for other text."""
    match = _EPOCH.fullmatch(text)
    if match:
        seconds = int(match[1])
        return seconds * NS_PER_S + _fraction_ns(match[2]) if FIRST_WALL_S <= seconds < LAST_WALL_S else None
    match = _ISO.fullmatch(text)
    if match is None:
        return None
    try:
        moment = datetime.fromisoformat(f"{match[1]}T{match[2]}").replace(tzinfo=timezone.utc)
    except ValueError:
        return None
    if match[5]:
        ahead = timedelta(hours=int(match[6]), minutes=int(match[7]))
        moment += -ahead if match[5] == "+" else ahead
    seconds = int(moment.timestamp())
    return seconds * NS_PER_S + _fraction_ns(match[3]) if FIRST_WALL_S <= seconds < LAST_WALL_S else None


def _fraction_ns(digits: str | None) -> int:
    return int((digits or "0").ljust(9, "0"))


def info_input(found: Sequence[Dump]) -> Input:
    """Return the numbers of all dumps that have a time as the rows of an input."""
    timed = [(dump.wall_ns, numbers(dump.fields)) for dump in found if dump.wall_ns is not None]
    series: dict[str, list[tuple[int, float]]] = {}
    for wall_ns, values in timed:
        for name, value in values.items():
            series.setdefault(name, []).append((wall_ns, value))
    kept = [name for name in UNITS if name in series]
    kept += [name for name, points in series.items() if name not in UNITS and len({value for _, value in points}) > 1]
    notes = []
    if len(kept) > MAX_FIELDS:
        notes.append(f"{len(kept) - MAX_FIELDS:,} of {len(kept):,} INFO fields that changed were left out")
    kept = kept[:MAX_FIELDS]
    rows = np.zeros(sum(len(series[name]) for name in kept), EVENT)
    rows["stack"] = NO_STACK
    points = [(place, *point) for place, name in enumerate(kept) for point in series[name]]
    if points:
        rows["probe"] = [place for place, _, _ in points]
        rows["start_ns"] = [wall_ns for _, wall_ns, _ in points]
        rows["value"][:, 0] = [struct.unpack("<Q", struct.pack("<d", value))[0] for _, _, value in points]
    probes = tuple(
        ProbeInfo(place, name, IMPORTED_SAMPLE, "redis-cli INFO", (Field("value", unit(name), 0),))
        for place, name in enumerate(kept)
    )
    counts = {"dumps": len(found), "fields": len(kept)}
    if len(timed) < len(found):
        counts["dumps without a time"] = len(found) - len(timed)
        notes.append(f"{len(found) - len(timed):,} of {len(found):,} INFO dumps have no time and were left out")
    return Input("", FORMAT, rows, probes, (), counts, tuple(notes))


def numbers(fields: dict[str, str]) -> dict[str, float]:
    """Return the numbers of a dump by name; ``db0:keys=7,expires=1`` is ``db0.keys`` and ``db0.expires``."""
    found: dict[str, float] = {}
    for name, text in fields.items():
        if name in _CLOCKS:
            continue
        if "=" in text:
            for part in text.split(","):
                key, _, value = part.partition("=")
                _add(found, f"{name}.{key}", value)
        else:
            _add(found, name, text)
    return found


def _add(found: dict[str, float], name: str, text: str) -> None:
    text = text.removesuffix("%")
    # float() takes words, blanks and underscores too
    if not text or not text.isascii() or text[-1] not in "0123456789" or "_" in text:
        return
    try:
        value = float(text)
    except ValueError:
        return
    if math.isfinite(value):
        found[name] = value


def unit(name: str) -> str:
    """Return the unit of a field of INFO, "" for a plain number."""
    if name in UNITS:
        return UNITS[name]
    for suffix, known in _SUFFIX_UNITS:
        if name.endswith(suffix):
            return known
    return next((known for prefix, known in _PREFIX_UNITS if name.startswith(prefix) and "ratio" not in name), "")
