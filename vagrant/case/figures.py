"""From what ``stallscope`` and the load said to numbers, to intervals over runs, and to text; pure.

The interval over n runs is from the smallest to the largest: it holds the median of all runs that could have been
made with probability 1 - 2 ** (1 - n), whatever their distribution (the order statistics of a sample; H. A. David,
Order Statistics, section 7.1). Nothing is assumed, so that five runs a variant are enough to say something.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TRIM = "sdsRemoveFreeSpace"
PURGE = "je_pages_purge"
TICK = "clientsCron"
VISIT = "clientsCronResizeQueryBuffer"

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Spread:
    """A number over several runs: its median, the smallest and the largest; all None where no run has it."""

    median: float | None
    low: float | None
    high: float | None
    n: int


def spread(values: Sequence[float | None]) -> Spread:
    """Return the median and the range of what is known of these values."""
    known = [value for value in values if value is not None]
    if not known:
        return Spread(None, None, None, 0)
    return Spread(statistics.median(known), min(known), max(known), len(known))


def confidence(n: int) -> float:
    """Return with which probability the range of n runs holds the median of all."""
    return 1 - 2.0 ** (1 - n)


def measure(summary: Json, load: Json) -> dict[str, float | None]:
    """Return the numbers of one run, from ``summary --json`` and ``incident.py --load-json``.

    The names say the unit. None where it was not observed: a stall where no iteration reached the threshold, a
    function that was not probed.
    """
    functions = {function["name"]: function for function in summary["functions"]}
    purges = [function for name, function in functions.items() if name.startswith(PURGE)]
    purge_max_ns = max((one["max_ns"] for one in purges if one["max_ns"] is not None), default=None)
    trims, tick, visits = functions.get(TRIM), functions.get(TICK), functions.get(VISIT)
    elapsed_s = summary["elapsed_ns"] / 1e9
    loop = summary["loop"] or {}
    worst = max(summary["stalls"], key=lambda stall: stall["duration_ns"], default=None)
    worst_trims = sum(one["calls"] for one in worst["functions"] if one["name"] == TRIM) if worst else 0
    worst_trim_ns = sum(one["self_ns"] for one in worst["functions"] if one["name"] == TRIM) if worst else 0
    connections = load["connections"]
    return {
        "elapsed_s": elapsed_s,
        "refused": sum(sum(one["overflows"].values()) for one in summary["listeners"]),
        # of the whole network namespace: other servers on the machine count as well
        "counted": sum(one["counted"] for one in summary["reconciliation"]),
        "refused_by_stall": summary["blame"]["causes"].get("stall", 0),
        "attempted": connections["attempted"],
        "connect_timeouts": connections["connect_timeouts"],
        "reply_timeouts": connections["reply_timeouts"],
        "ping_max_ms": load["ping"]["max_ms"],
        "queue_max": max((one["queue_max"] or 0 for one in summary["listeners"]), default=None),
        "queue_limit": max((one["queue_limit"] or 0 for one in summary["listeners"]), default=None),
        "stalls": loop.get("stalls"),
        "worst_ns": loop.get("longest_ns"),
        "worst_queue_full_ns": worst["full_ns"] if worst else None,
        "worst_trims": worst_trims,
        "worst_trim_share": worst_trim_ns / worst["duration_ns"] if worst else None,
        "worst_refused": worst["overflows"] if worst else 0,
        "tick_max_ns": tick["max_ns"] if tick else None,
        "visits_per_tick": visits["calls"] / tick["calls"] if visits and tick and tick["calls"] else None,
        "trims": trims["calls"] if trims else None,
        "trims_per_s": trims["calls"] / elapsed_s if trims else None,
        "trim_total_ns": trims["total_ns"] if trims else None,
        "trim_ns_per_s": trims["total_ns"] / elapsed_s if trims else None,
        "trim_max_ns": trims["max_ns"] if trims else None,
        "trim_p50_ns": trims["p50_ns"] if trims else None,
        "purges": sum(one["calls"] for one in purges) if purges else None,
        "purge_ns_per_s": sum(one["total_ns"] for one in purges) / elapsed_s if purges else None,
        "purge_max_ns": purge_max_ns,
        "purged_bytes": sum(_total(one, "purged_bytes") for one in purges) if purges else None,
        "purge_stall_share": _stall_share(summary, PURGE),
        "trim_stall_share": _stall_share(summary, TRIM),
        "call_cost_ns": summary["cost"]["call_cost_ns"],
        "cost_share": summary["cost"]["traced_process_ns"] / summary["elapsed_ns"],
        "lost": sum(one["lost"] for one in summary["losses"]),
        "incomplete": 0 if summary["complete"] else 1,
    }


def _total(function: Json, field: str) -> float:
    return float(sum(one["total"] for one in function["fields"] if one["name"] == field))


def _stall_share(summary: Json, name: str) -> float | None:
    """Return which share of all listed stalls a function took itself, None without stalls."""
    total_ns = sum(stall["duration_ns"] for stall in summary["stalls"])
    own_ns = sum(
        one["self_ns"] for stall in summary["stalls"] for one in stall["functions"] if one["name"].startswith(name)
    )
    return own_ns / total_ns if total_ns else None


# --- text


def count(value: float) -> str:
    """Return a count, as ``2,857``."""
    return f"{value:,.0f}"


def duration(nanoseconds: float) -> str:
    """Return a duration with its unit, as ``1.43 s``, ``12.0 ms`` or ``850 us``: three digits."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        # what would be rounded up to 1,000 belongs to the unit above
        if nanoseconds >= size * 0.9995:
            return f"{_three(nanoseconds / size)} {unit}"
    return f"{nanoseconds:.0f} ns"


def milliseconds(value: float) -> str:
    """Return a duration given in ms with its unit."""
    return duration(value * 1e6)


def size(value: float) -> str:
    """Return a number of bytes in decimal units, as ``160 MB``."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(value) >= one * 0.9995:
            return f"{_three(value / one)} {unit}"
    return f"{value:.0f} B"


def percent(share: float) -> str:
    """Return a share as ``88%``; below 10% with one decimal."""
    if 0 < share < 0.0005:
        return "< 0.1%"
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"


def _three(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


KINDS: dict[str, Callable[[float], str]] = {
    "count": count,
    "duration": duration,
    "milliseconds": milliseconds,
    "size": size,
    "percent": percent,
    "rate": lambda value: f"{_three(value) if value else 0}/s",
    "number": lambda value: f"{value:,.1f}" if value < 10 else count(value),
    "share of time": lambda value: percent(value / 1e9),
}
"""How a metric is written, by the name that ``steps.toml`` and the template use."""


def interval(found: Spread, kind: str, missing: str = "-", runs: int | None = None) -> str:
    """Return ``median [smallest to largest]``, only the number where all runs agree, or what stands for none.

    Args:
        runs: how many there are; where not all of them know the number, it is said how many do.
    """
    if found.median is None or found.low is None or found.high is None:
        return missing
    write = KINDS[kind]
    median, low, high = write(found.median), write(found.low), write(found.high)
    text = median if low == high else f"{median} [{low} to {high}]"
    return text if runs is None or found.n == runs else f"{text} in {found.n} of {runs} runs"


def change(found: Json | None) -> str:
    """Return a change of ``stallscope diff --json`` with its interval; whether it is shown at all is said first."""
    if found is None or found["ratio"] is None or found["why_not"]:
        return found["why_not"] if found and found["why_not"] else "-"
    low, high = (_ratio(bound) if bound is not None else "any" for bound in (found["low"], found["high"]))
    said = _ratio(found["ratio"]) if found["significant"] else f"not shown, {_ratio(found['ratio'])}"
    return f"{said} [{low} to {high}]"


def _ratio(ratio: float) -> str:
    if ratio >= 3:
        return f"{_three(ratio)} times"
    if ratio == 0:
        return "-100%"
    if ratio == 1:
        return "no change"
    if ratio < 0.001:
        return "< -99.9%"
    return f"{(ratio - 1) * 100:+.{1 if ratio < 0.1 else 0}f}%"
