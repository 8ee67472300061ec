"""What the prose of CASE-STUDY.md says without a number, held against the run.

The study is not written when the run does not bear it out.

Every claim has a sentence as one would read it, and a function of the document of ``examine`` that says whether it
holds. A claim about variants that were not run is left out, as the template leaves out their paragraphs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """One thing the prose says: of which variants, and whether it is so."""

    says: str
    variants: tuple[str, ...]
    holds: Callable[[Document], bool]


def failing(document: Document) -> list[str]:
    """Return the sentences that this run does not bear out."""
    there = set(document["variants"])
    return [claim.says for claim in CLAIMS if there.issuperset(claim.variants) and not claim.holds(document)]


def _all(document: Document, variant: str, metric: str) -> list[float]:
    return [run[metric] or 0.0 for run in document["variants"][variant]["runs"]]


def _median(document: Document, variant: str, metric: str) -> float:
    return _middle(_all(document, variant, metric))


def _middle(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def _kept(document: Document, build_patched: bool, size: int, what: str) -> float:
    return _middle(
        run["settled"][what]
        for run in document["memory"]
        if run["build"].endswith("-patched") == build_patched and run["value_bytes"] == size
    )


def _memory_rounding(document: Document) -> bool:
    sizes = {run["value_bytes"] for run in document["memory"]}
    return all(
        _kept(document, True, size, "used_bytes") - _kept(document, False, size, "used_bytes")
        > document["article"]["kept_bytes"]
        for size in sizes
    )


def _memory_residence(document: Document) -> bool:
    small, large = min, max
    kept = {
        pick: _kept(document, True, size, "resident_bytes") - _kept(document, False, size, "resident_bytes")
        for pick in (small, large)
        for size in (pick(run["value_bytes"] for run in document["memory"]),)
    }
    predicted: float = document["article"]["kept_bytes"]
    return kept[small] < predicted / 2 < kept[large]


def _requests(document: Document, variant: str) -> dict[str, int]:
    """Return how often each kind of event happened at the traced listener, in the typical run."""
    (listener,) = document["variants"][variant]["typical"]["requests"]["listeners"]
    return {event["name"]: event["count"] for event in listener["events"]}


def _seen_one_by_one(document: Document, variant: str) -> bool:
    return all(
        match["observed"] + match["unwatched"] == match["counted"] > 0 or match["name"] not in _LISTEN_COUNTERS
        for namespace in document["variants"][variant]["typical"]["reconciliation"]
        for match in namespace["matches"]
    )


AT_SYN, AT_ACK = "SYN refused: accept queue full", "third ACK refused silently: accept queue full"
_LISTEN_COUNTERS = ("ListenOverflows", "ListenDrops")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "no recording lost an event or was cut short",
        (),
        lambda document: document["conditions"]["lost"] == document["conditions"]["incomplete"] == 0,
    ),
    Claim(
        "in every run of the old server connections are refused, the worst stall refuses some of them, and its trims "
        "take most of it",
        ("baseline",),
        lambda document: (
            min(_all(document, "baseline", "refused")) > 0
            and min(_all(document, "baseline", "worst_refused")) > 0
            and min(_all(document, "baseline", "worst_trim_share")) > 0.5
        ),
    ),
    Claim(
        "every refused connection of the old server falls into a stall",
        ("baseline",),
        lambda document: _all(document, "baseline", "refused") == _all(document, "baseline", "refused_by_stall"),
    ),
    Claim(
        "the kernel counted the refusals that were observed, and as many clients gave up connecting",
        ("baseline",),
        lambda document: all(
            run["refused"] <= run["counted"] and abs(run["connect_timeouts"] - run["refused"]) <= 0.01 * run["refused"]
            for run in document["variants"]["baseline"]["runs"]
        ),
    ),
    Claim(
        "the tick of the typical run trims as many clients as the article's",
        ("baseline",),
        lambda document: document["variants"]["baseline"]["typical"]["worst"]["clients"] == 50,
    ),
    Claim(
        "with the larger backlog the server stalls as long, clients still give up, and the queue fills in most runs",
        ("baseline", "backlog"),
        lambda document: (
            _median(document, "backlog", "worst_ns") > _median(document, "baseline", "worst_ns") / 2
            and min(_all(document, "backlog", "reply_timeouts")) > 0
            and _median(document, "backlog", "queue_max") > _median(document, "backlog", "queue_limit")
        ),
    ),
    Claim(
        "the larger backlog makes more clients give up waiting for an answer",
        ("baseline", "backlog"),
        lambda document: (
            _median(document, "backlog", "reply_timeouts") > max(_all(document, "baseline", "reply_timeouts"))
        ),
    ),
    Claim(
        "the larger backlog holds a shorter storm: nobody is refused, and clients give up all the same",
        ("shorter", "shorter-backlog"),
        lambda document: (
            min(_all(document, "shorter", "refused")) > 0
            and max(_all(document, "shorter-backlog", "refused")) == 0
            and min(_all(document, "shorter-backlog", "reply_timeouts")) > 0
        ),
    ),
    Claim(
        "with the patch the longest PING is not shorter",
        ("small", "small-patched"),
        lambda document: _median(document, "small-patched", "ping_max_ms") >= _median(document, "small", "ping_max_ms"),
    ),
    Claim(
        "in no recording of the newest server there was an overflow or a stall of 100 ms",
        ("upgrade-5",),
        lambda document: (
            max(_all(document, "upgrade-5", "refused")) == 0 and max(_all(document, "upgrade-5", "worst_ns")) < 100e6
        ),
    ),
    Claim(
        "the patched server refuses connections in every run of the storm of large buffers, and stalls as long",
        ("baseline", "patched"),
        lambda document: (
            min(_all(document, "patched", "refused")) > 0
            and _median(document, "patched", "worst_ns") > _median(document, "baseline", "worst_ns") / 2
        ),
    ),
    Claim(
        "the patched server never trims a small buffer",
        ("small-patched", "article-patched"),
        lambda document: not any(_all(document, "small-patched", "trims") + _all(document, "article-patched", "trims")),
    ),
    Claim(
        "small buffers alone refuse nobody, with or without the patch",
        ("small", "small-patched", "article", "article-patched"),
        lambda document: (
            not any(
                refused
                for name in ("small", "small-patched", "article", "article-patched")
                for refused in _all(document, name, "refused")
            )
        ),
    ),
    Claim(
        "with small buffers alone the longest clientsCron is far below the article's stall",
        ("article",),
        lambda document: max(_all(document, "article", "tick_max_ns")) < 100e6,
    ),
    Claim(
        "je_pages_purge still runs in the patched server under the storm, and not without trims",
        ("patched", "small-patched"),
        lambda document: (
            min(_all(document, "patched", "purges")) > 0 and max(_all(document, "small-patched", "purges")) == 0
        ),
    ),
    Claim(
        "the newer servers visit more clients in a tick, and what the old one visits is the article's number",
        ("baseline", "upgrade-3", "upgrade-5"),
        lambda document: (
            max(_all(document, "baseline", "visits_per_tick")) == 50
            and min(min(_all(document, name, "visits_per_tick")) for name in ("upgrade-3", "upgrade-5")) > 50
        ),
    ),
    Claim(
        "the newer servers refuse nobody and still trim",
        ("upgrade-3", "upgrade-5"),
        lambda document: all(
            max(_all(document, name, "refused")) == 0 and min(_all(document, name, "trims")) > 0
            for name in ("upgrade-3", "upgrade-5")
        ),
    ),
    Claim(
        "the newer servers still trim small buffers, and one such trim is cheaper",
        ("small", "small-3", "small-5"),
        lambda document: all(
            min(_all(document, name, "trims")) > 0
            and max(_all(document, name, "trim_p50_ns")) < min(_all(document, "small", "trim_p50_ns"))
            for name in ("small-3", "small-5")
        ),
    ),
    Claim(
        "the patch keeps more allocated than the article predicted",
        (),
        lambda document: not document["memory"] or _memory_rounding(document),
    ),
    Claim(
        "what it keeps resident is far less after short commands, and near the prediction after full buffers",
        (),
        lambda document: not document["memory"] or _memory_residence(document),
    ),
    Claim(
        "in the machine every refusal was seen, as many as the kernel counted",
        ("kernel",),
        lambda document: _seen_one_by_one(document, "kernel"),
    ),
    Claim(
        "on loopback every refusal was decided at the SYN",
        ("kernel",),
        lambda document: {name for name in _requests(document, "kernel") if "refused" in name} == {AT_SYN},
    ),
    Claim(
        "with a network's delay every refusal was seen, and some at the third ACK",
        ("kernel-delay",),
        lambda document: (
            _seen_one_by_one(document, "kernel-delay")
            and min(_requests(document, "kernel-delay").get(name, 0) for name in (AT_SYN, AT_ACK)) > 0
        ),
    ),
)
