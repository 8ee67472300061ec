"""What a load measured: typed, with units, to and from the one JSON document that ``load.py`` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

WORST_PINGS = 10


@dataclass(frozen=True)
class Connections:
    """What became of the short connections; ``attempted`` is the sum of all the others but ``skipped``.

    ``unfinished`` were still under way at the end; ``skipped`` were due but never begun, because too many
    were under way; ``other_errors`` counts by errno name.
    """

    attempted: int = 0
    completed: int = 0
    connect_timeouts: int = 0
    reply_timeouts: int = 0
    unfinished: int = 0
    skipped: int = 0
    other_errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pings:
    """The PINGs on one standing connection; ``worst`` holds (CLOCK_MONOTONIC ns, ms), longest first."""

    count: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    worst: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, sent: Sequence[tuple[int, int]]) -> Pings:
        """Return the summary of PINGs given as (CLOCK_MONOTONIC ns of sending, round trip in ns)."""
        ordered = sorted(duration_ns for _, duration_ns in sent)
        worst = sorted(sent, key=lambda ping: -ping[1])[:WORST_PINGS]

        def at(ratio: float) -> float:
            return round(ordered[min(len(ordered) - 1, int(len(ordered) * ratio))] / 1e6, 3) if ordered else 0.0

        return cls(len(sent), at(0.5), at(0.99), at(1), tuple((ns, round(took / 1e6, 3)) for ns, took in worst))


@dataclass(frozen=True)
class Listener:
    """The listener during the window: the counters of its network namespace, and its sampled queue.

    ``overflows`` and ``drops`` are the increases of ListenOverflows and ListenDrops; ``max_queue`` is the
    longest accept queue of ``samples`` samples, ``backlog`` its limit (the kernel lets in one more).
    """

    overflows: int
    drops: int
    max_queue: int
    backlog: int
    samples: int


@dataclass(frozen=True)
class Held:
    """The clients held open: how many, the seconds it took to open them and to fill the uploaders' buffers.

    ``released_s`` is when the uploaders began to idle and ``trimmed_s`` when the server was seen to have
    trimmed them all, both in seconds after the start; None when there are none, or it did not happen.
    """

    count: int = 0
    open_s: float = 0.0
    fill_s: float = 0.0
    filled_bytes: int = 0
    released_s: float | None = None
    trimmed_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """One measured load; ``started_ns`` is on CLOCK_MONOTONIC, the clock of the recordings."""

    recipe: dict[str, Any]
    port: int
    started_ns: int
    duration_s: float
    connections: Connections
    ping: Pings
    listener: Listener
    held: Held

    def to_json(self) -> str:
        """Return the document, on one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outcome:
        """Return the outcome that ``to_json`` wrote."""
        document = json.loads(text)
        worst = tuple((int(ns), float(ms)) for ns, ms in document["ping"]["worst"])
        return cls(
            **{
                **document,
                "connections": Connections(**document["connections"]),
                "ping": Pings(**{**document["ping"], "worst": worst}),
                "listener": Listener(**document["listener"]),
                "held": Held(**document["held"]),
            }
        )

    def summary(self) -> str:
        """Return what the clients saw, in one line for people."""
        met, listener = self.connections, self.listener
        parts = [
            f"{met.completed:,} of {met.attempted:,} connections answered",
            f"{met.connect_timeouts:,} connect and {met.reply_timeouts:,} reply time-outs",
            f"{sum(met.other_errors.values()):,} other errors" if met.other_errors else "",
            f"{listener.overflows:,} listen overflows",
            f"queue at most {listener.max_queue:,} of {listener.backlog:,}",
            f"longest PING {self.ping.max_ms:,.0f} ms",
            "the uploaders were never trimmed" if self.held.filled_bytes and self.held.trimmed_s is None else "",
        ]
        return ", ".join(part for part in parts if part)
