"""What a live view shows at one moment, as plain data; ``--json`` prints it field by field."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

RECORD_VERSION = 1


@dataclass(frozen=True)
class ServerView:
    """One traced server.

    Attributes:
        product, version: ``redis``, ``2.8.17``; "" when not known.
        ended: it is gone, and looked for on its port if it was named by port.
    """

    pid: int
    product: str
    version: str
    exe: str
    ended: bool


@dataclass(frozen=True)
class FunctionView:
    """One function, in all traced servers together.

    Attributes:
        calls: entries since the start; calls_in_interval: since the record before. Both are counted in the kernel,
            also when the event itself was lost or too short to be sent.
        rate_per_s: ``calls_in_interval`` by the interval.
        p50_ns, p99_ns: of the calls that returned in the window, at most 3.2% too high; None when no call did, or
            when it is below ``min_duration_ns``.
        window_max_ns: the longest of them; max_ns: the longest since the start; None as for ``p99_ns``.
        window_total_ns: time in them; total_ns: since the start, short calls included. A recursive function's
            time counts once a level.
        lost: calls that were seen and could not be kept.
    """

    name: str
    calls: int
    calls_in_interval: int
    rate_per_s: float
    p50_ns: int | None
    p99_ns: int | None
    window_max_ns: int | None
    max_ns: int | None
    window_total_ns: int
    total_ns: int
    lost: int


@dataclass(frozen=True)
class LoopView:
    """The event loops of all traced servers together.

    Attributes:
        iterations: since the start; iterations_in_interval, rate_per_s: as of a function's calls.
        busy_share: time outside epoll_wait by the window's length; of several servers up to their number.
        stalls: iterations of at least the threshold since the start; longest_ns: 0 while there was none.
        histogram: iterations that ended in the window by length: pairs of the lower bound (ns, the first is 0) and
            the count. Those below the stall threshold are one bucket.
    """

    iterations: int
    iterations_in_interval: int
    rate_per_s: float
    busy_share: float
    stalls: int
    longest_ns: int
    histogram: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ListenerView:
    """One accept queue.

    Attributes:
        queue_length: as last sampled; queue_limit: the backlog in force (the queue holds one more).
        window_max: the longest seen in the window.
        history: the longest by second, oldest first.
    """

    address: str
    pid: int
    queue_length: int
    queue_limit: int
    window_max: int
    history: tuple[int, ...]


@dataclass(frozen=True)
class StallView:
    """One event loop iteration of at least the threshold.

    Attributes:
        wall_ns: when it began, ns since 1970.
        cause: the function in which most of the time was spent itself, not in traced functions that it called;
            "" when that was outside every traced function.
        path: the functions from the outermost to ``cause``, in its longest call.
        cause_calls, cause_self_ns: its calls in the stall, and their own time; 0 and the time outside where there
            is no cause.
        covered_ns: the part of the stall, up to its end, from which the calls were still known: less than
            ``duration_ns`` where more calls were made than are kept.
        queue_max, queue_limit: of the fullest accept queue of the process, None where none was sampled.
        overflows: ListenOverflows seen from its start until one sampling interval after its end, in all namespaces
            watched; what may belong to the stall before it as well counts there.
    """

    wall_ns: int
    duration_ns: int
    pid: int
    cause: str
    path: tuple[str, ...]
    cause_calls: int
    cause_self_ns: int
    covered_ns: int
    queue_max: int | None
    queue_limit: int | None
    overflows: int


@dataclass(frozen=True)
class BlockedView:
    """A stall under way.

    Attributes:
        calls: the traced functions that are being executed, the outermost first.
    """

    pid: int
    duration_ns: int
    calls: tuple[str, ...]


@dataclass(frozen=True)
class LiveView:
    """Everything at one moment.

    Attributes:
        wall_ns: ns since 1970; elapsed_ns: since tracing began; interval_ns: since the record before.
        window_s: the window is the second under way and so many whole ones before it.
        functions: in the order of the probe list; listeners, servers: those that were there at any time.
        loop: None where the event loop cannot be followed.
        overflows: ListenOverflows since the start in all namespaces watched; overflows_in_interval: since the record
            before; overflow_history: by second, oldest first.
        blocked: stalls under way; recent_stalls: the last ones that ended, the newest first;
            worst_stall: the longest since the start.
        stalls: those not told before, oldest first; one that ended a moment ago is told next time, when the accept
            queue after it is known.
        lost: events that were seen and could not be kept.
        traced_share: estimated share of time that the probes took from the traced processes; own_share: CPU share of
            this process.
        notes: what makes this incomplete, and what happened.
    """

    version: int
    wall_ns: int
    elapsed_ns: int
    interval_ns: int
    window_s: int
    stall_ns: int
    min_duration_ns: int
    servers: tuple[ServerView, ...]
    loop: LoopView | None
    functions: tuple[FunctionView, ...]
    listeners: tuple[ListenerView, ...]
    overflows: int
    overflows_in_interval: int
    overflow_history: tuple[int, ...]
    blocked: tuple[BlockedView, ...]
    recent_stalls: tuple[StallView, ...]
    worst_stall: StallView | None
    stalls: tuple[StallView, ...]
    lost: int
    traced_share: float
    own_share: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data: the fields above, without what earlier records told (histories, earlier stalls)."""
        document = dataclasses.asdict(self)
        for name in ("overflow_history", "recent_stalls", "worst_stall"):
            del document[name]
        for listener in document["listeners"]:
            del listener["history"]
        return document
