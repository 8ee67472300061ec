"""Durations, byte counts and numbers of things as people type and read them."""

from __future__ import annotations

import re

from stallscope.tracer.errors import UsageError

_UNIT_NS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_DURATION = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(ns|us|µs|ms|s|m|h)")


def parse_duration_ns(text: str) -> int:
    """Return the duration written as ``500us``, ``10ms``, ``2s``, ``1m`` or ``0``, in nanoseconds.

    Raises:
        UsageError: the text has no unit, an unknown unit or is not a number.
    """
    stripped = text.strip()
    if stripped == "0":
        return 0
    match = _DURATION.fullmatch(stripped)
    if match is None:
        raise UsageError(f'cannot read "{text}" as a duration; write a number and a unit, as 500us, 10ms, 2s or 1m')
    return round(float(match[1]) * _UNIT_NS[match[2]])


def parse_offset_ns(text: str) -> int:
    """Return the duration with or without a sign, as ``-1.5s`` or ``+2m``, in nanoseconds.

    Raises:
        UsageError: what follows the sign is not a duration.
    """
    stripped = text.strip()
    amount_ns = parse_duration_ns(stripped[1:] if stripped[:1] in ("+", "-") else stripped)
    return -amount_ns if stripped.startswith("-") else amount_ns


def format_duration_ns(duration_ns: float) -> str:
    """Return a duration with three significant digits and the unit that suits it, as ``1.43 s``."""
    for unit, size in (("s", 1_000_000_000), ("ms", 1_000_000), ("us", 1_000)):
        if abs(duration_ns) >= size * 0.9995:
            return f"{_three_digits(duration_ns / size)} {unit}"
    return f"{duration_ns:.0f} ns"


def format_bytes(count: float) -> str:
    """Return a byte count in powers of 1000 with three significant digits, as ``2.66 GB``."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(count) >= size * 0.9995:
            return f"{_three_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def format_count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, as ``1 stall`` or ``1,204 stalls``; ``plural`` where an s does not do."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    if magnitude >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.{2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0}f}"


_BYTES = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kKMGT]?)(?:i?B)?")
_UNIT_BYTES = {"": 1, "k": 2**10, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """Return the size written as ``64K``, ``8M`` or ``1G`` (powers of 1024), in bytes.

    Raises:
        UsageError: the text is not a size.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise UsageError(f'cannot read "{text}" as a size; write a number and a unit, as 64K, 8M or 1G')
    return round(float(match[1]) * _UNIT_BYTES[match[2]])


_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*%")


def parse_share(text: str) -> float:
    """Return the share written as ``1%`` or ``0.5%``, as a number from 0 to 1.

    Raises:
        UsageError: the text is not a percentage, or above 100%.
    """
    match = _SHARE.fullmatch(text.strip())
    if match is None or float(match[1]) > 100:
        raise UsageError(f'cannot read "{text}" as a share; write a percentage, as 1% or 0.5%')
    return float(match[1]) / 100
