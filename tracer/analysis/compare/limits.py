"""What ``verify`` is asked to show: limits as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stallscope.tracer.errors import UsageError
from stallscope.tracer.units import format_duration_ns, parse_duration_ns

STALL, OVERFLOW = "stall", "overflow"

_NAME = r"[A-Za-z_][\w.:@]*"
_BELOW = re.compile(rf"\s*({_NAME})\s*(<=?)\s*(\S+)\s*")
_EVENT = re.compile(rf"\s*({_NAME})\s*(?:(>=?)\s*([^:\s]+))?\s*")
_RATE = re.compile(r"\s*([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*(?:/|per)\s*([a-z]+)\s*")
_PER_S = {
    **dict.fromkeys(("s", "sec", "second"), 1.0),
    **dict.fromkeys(("m", "min", "minute"), 1 / 60),
    **dict.fromkeys(("h", "hour"), 1 / 3600),
    **dict.fromkeys(("d", "day"), 1 / 86_400),
}


@dataclass(frozen=True)
class Event:
    """What is counted: stalls, overflows, or event loop iterations with a call of a function, from a length on.

    Attributes:
        subject: ``stall``, ``overflow`` or a function's name.
        at_least_ns: shorter ones do not count; 0: all do.
        text: as it was written.
    """

    subject: str
    at_least_ns: int
    text: str

    @property
    def plural(self) -> str:
        """Return what to call several of them."""
        if self.subject == OVERFLOW:
            return "overflows"
        if self.subject == STALL:
            return f"stalls of {self.length}" if self.at_least_ns else "stalls"
        return f"slow calls ({self.subject}, {self.length})" if self.at_least_ns else f"calls of {self.subject}"

    @property
    def length(self) -> str:
        """Return from which length on they count, as ``over 50 ms``."""
        # above 50 ms is from 50 ms and one nanosecond on
        above = self.at_least_ns % 1000 == 1
        number, unit = format_duration_ns(self.at_least_ns - above).split()
        return f"{'over' if above else 'at least'} {_trimmed(float(number.replace(',', '')), 2)} {unit}"


@dataclass(frozen=True)
class Limit:
    """One limit: how often an event may come, in events per second; None: never."""

    event: Event
    per_s: float | None
    text: str


def parse_max(text: str) -> Limit:
    """Return the limit written as ``clientsCronResizeQueryBuffer<5ms`` or ``stall<50ms``: none may be longer.

    Raises:
        UsageError: it is not of this form.
    """
    match = _BELOW.fullmatch(text)
    if match is None or match[1] == OVERFLOW:
        raise UsageError(f'cannot read "{text}" as a limit; write FUNCTION<5ms or stall<50ms')
    at_least = parse_duration_ns(match[3]) + (match[2] == "<=")
    return Limit(Event(match[1], at_least, text.strip()), None, text.strip())


def parse_event(text: str) -> Event:
    """Return the event written as ``stall>50ms``, ``serverCron>=5ms`` or ``overflow``.

    Raises:
        UsageError: it is not of this form.
    """
    match = _EVENT.fullmatch(text)
    if match is None or (match[1] == OVERFLOW and match[3]):
        raise UsageError(f'cannot read "{text}" as an event; write stall>50ms, FUNCTION>5ms or overflow')
    at_least = parse_duration_ns(match[3]) + (match[2] == ">") if match[3] else 0
    return Event(match[1], at_least, text.strip())


def parse_max_rate(text: str) -> Limit:
    """Return the limit written as ``stall>50ms: 1/h``, ``FUNCTION>5ms: 2/min`` or ``overflow: 10/h``.

    Raises:
        UsageError: it is not of this form.
    """
    event, separator, rate = text.rpartition(":")
    if not separator:
        raise UsageError(f'cannot read "{text}" as a rate limit; write stall>50ms: 1/h')
    return Limit(parse_event(event), parse_rate(rate), text.strip())


def parse_rate(text: str) -> float:
    """Return the rate written as ``1/h``, ``0.5/min`` or ``2/s``, in events per second.

    Raises:
        UsageError: it is not of this form, or zero: no recording can show that nothing ever happens.
    """
    match = _RATE.fullmatch(text)
    if match is None or match[2] not in _PER_S:
        raise UsageError(f'cannot read "{text}" as a rate; write 1/h, 0.5/min or 2/s')
    rate = float(match[1]) * _PER_S[match[2]]
    if not rate:
        raise UsageError(f'"{text}" cannot be shown by any recording; give a rate above zero')
    return rate


def parse_confidence(text: str) -> float:
    """Return the confidence written as ``95%`` or ``0.95``.

    Raises:
        UsageError: it is not of this form, or outside 50% to 99.99%.
    """
    stripped = text.strip()
    share = _share(stripped)
    if share is None or not 0.5 <= share <= 0.9999:
        raise UsageError(f'cannot read "{text}" as a confidence; write 95% or 0.95, from 50% to 99.99%')
    return share


def parse_share(text: str) -> float:
    """Return the share written as ``25%`` or ``0.25``.

    Raises:
        UsageError: it is not of this form.
    """
    share = _share(text.strip())
    if share is None:
        raise UsageError(f'cannot read "{text}" as a share; write 25% or 0.25')
    return share


def _share(text: str) -> float | None:
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,9})?)(%?)", text)
    return float(match[1]) / (100 if match[2] else 1) if match else None


def rate_text(per_s: float, alike_per_s: float | None = None) -> str:
    """Return a rate as ``4.5 per hour``, in minutes or seconds where that is over a thousand.

    Args:
        alike_per_s: take the unit that suits this rate.
    """
    for unit, scale in (("hour", 3600.0), ("minute", 60.0), ("second", 1.0)):
        value = per_s * scale
        if (per_s if alike_per_s is None else alike_per_s) * scale < 1000 or unit == "second":
            digits = 0 if value >= 100 else 1 if value >= 10 else 2
            return f"{_trimmed(value, digits)} per {unit}"
    raise AssertionError("the last unit is taken always")


def exposure_text(seconds: float) -> str:
    """Return a length of watching as ``60 s``, ``40 min`` or ``3.1 h``."""
    if seconds < 119.5:
        return f"{_trimmed(seconds, 1 if seconds < 10 else 0)} s"
    if seconds < 7170:
        return f"{_trimmed(seconds / 60, 1 if seconds < 600 else 0)} min"
    hours = seconds / 3600
    return f"{_trimmed(hours, 1 if hours < 100 else 0)} h" if hours < 1000 else f"{hours:,.0f} h"


def _trimmed(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
