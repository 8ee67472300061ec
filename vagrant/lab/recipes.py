"""The loads that are known to reproduce something, and the bounds that every load keeps to."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass
from pathlib import Path

from lab import LabError, LabUsageError

MAX_DURATION_S = 120.0
MAX_HELD = 19_000
MAX_RATE_PER_S = 20_000.0
MAX_HELD_BYTES = 8_000_000_000
SMALL_BUFFER_BYTES = 33_000
"""What one short command leaves allocated in a Redis 2.8 client: it makes room for 16 KB, and doubles it."""

SURELY_IDLE_S = 3.3
"""Redis trims when ``idle > 2`` in whole seconds of a cached clock: from 3 s on in any case."""

TICK_S = 0.1
"""serverCron() runs with the default ``hz`` of 10."""

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Recipe:
    """One load: the clients that are held open, the short connections, and for how long.

    Attributes:
        name: what to call it; a changed recipe keeps the name of the one it was made from.
        about: one line on what it shows.
        idle: clients that sent one PING and then nothing; they lengthen the round of clientsCron().
        uploaders: clients that announced a value, sent part of it and got stuck.
        announced_bytes: the size of that value.
        sent_ratio: the part of it that was sent; from a half on, Redis keeps the buffer until it idles.
        small_buffers: clients that send a command of ``small_bytes`` every ``small_period_s``.
        small_bytes: the value in that command.
        small_period_s: see ``small_buffers``.
        rate_per_s: short connections: connect, PING, close.
        timeout_s: after which such a client gives up, separately on connecting and on the answer.
        ping_interval_s: the pause between the PINGs on the one standing connection.
        attach_s: what a recorder gets to attach: no uploader's buffer is trimmed sooner after the start.
        after_s: the window ends this long after the last of them was trimmed.
        duration_s: the measured window, at most.
        backlog: the tcp-backlog of the server that ``incident.py`` starts for it.
    """

    name: str = "own"
    about: str = ""
    idle: int = 0
    uploaders: int = 0
    announced_bytes: int = 0
    sent_ratio: float = 0.56
    small_buffers: int = 0
    small_bytes: int = 10_000
    small_period_s: float = 10.0
    rate_per_s: float = 0.0
    timeout_s: float = 0.5
    ping_interval_s: float = 0.002
    attach_s: float = 0.0
    after_s: float = 2.0
    duration_s: float = 10.0
    backlog: int = 511

    @property
    def held(self) -> int:
        """The number of connections that stay open."""
        return self.idle + self.uploaders + self.small_buffers

    @property
    def sent_bytes(self) -> int:
        """What one uploader sends of its value before it gets stuck."""
        return int(self.announced_bytes * self.sent_ratio)

    @property
    def held_bytes(self) -> int:
        """The memory that the server needs for the buffers of the clients held open, in bytes."""
        small = (self.idle + self.small_buffers) * SMALL_BUFFER_BYTES
        return self.uploaders * self.sent_bytes + small

    def release_s(self, opened_s: float, started_s: float, redis_major: int) -> float:
        """Return when the uploaders should stop sending, so that they are trimmed soon but not too soon.

        Up to 3.2, clientsCron() visits max(50, clients / (10 * hz)) clients in every tick and takes new ones
        first: it visits the uploaders when they have connected, one round later, and so on. They must have
        idled at the visit that is caught, or they wait for another round. From 4.0 on it visits everybody
        once a second. Where rounds are that short, the uploaders need not wait for a visit in particular.

        Args:
            opened_s: when they connected, on any clock.
            started_s: when the measured window started, on the same clock.
            redis_major: the server's major version.
        """
        attached_s = started_s + self.attach_s
        round_s = math.ceil(self.held / max(50, self.held // 100)) * TICK_S
        if redis_major >= 4 or round_s < SURELY_IDLE_S + 0.5:
            return attached_s
        visit_s = opened_s + math.ceil((attached_s - opened_s) / round_s) * round_s
        return visit_s - SURELY_IDLE_S


_ALL = (
    Recipe(
        name="incident",
        about="the incident in 1.6 GB: uploaders stuck in 25 MB values, trimmed by the dozen in one tick",
        idle=6_000,
        uploaders=100,
        announced_bytes=25_000_000,
        rate_per_s=2_500,
        attach_s=5,
        duration_s=30,
    ),
    Recipe(
        name="full",
        about="the incident as it was met: 50 MB values, one tick of about a second; 3 GB",
        idle=4_000,
        uploaders=100,
        announced_bytes=50_000_000,
        rate_per_s=1_500,
        attach_s=5,
        duration_s=30,
    ),
    Recipe(
        name="little",
        about="the incident in 0.5 GB and 10 s, for a small machine: 8 MB values, a backlog of 128",
        idle=500,
        uploaders=100,
        announced_bytes=8_000_000,
        rate_per_s=2_500,
        attach_s=5,
        duration_s=30,
        backlog=128,
    ),
    Recipe(
        name="small-buffers",
        about="15,000 clients whose short commands left 32 KB each: a few ms in every tick, no overflow",
        small_buffers=15_000,
        rate_per_s=300,
        duration_s=15,
    ),
    Recipe(
        name="quiet",
        about="a light load that never stalls",
        idle=100,
        rate_per_s=200,
        duration_s=5,
    ),
)

RECIPES = {recipe.name: recipe for recipe in _ALL}
"""By name. A recorder gets ``attach_s`` to attach: see ``incident.py``."""


def check(recipe: Recipe, host: str) -> None:
    """Refuse a load that is not on loopback, not bounded, or more than this machine's memory.

    Raises:
        LabUsageError: a bound is broken; the message names it.
        LabError: the machine has not the memory.
    """
    try:
        loopback = ipaddress.IPv4Address(host).is_loopback
    except ipaddress.AddressValueError:
        loopback = False
    if not loopback:
        raise LabUsageError(f"the load goes to loopback only, not to {host}; use an address in 127.0.0.0/8")
    bounds = (
        ("duration", recipe.duration_s, MAX_DURATION_S, "s"),
        ("time to attach", recipe.attach_s, recipe.duration_s, "s, the duration"),
        ("clients held open", recipe.held, MAX_HELD, "clients"),
        ("rate", recipe.rate_per_s, MAX_RATE_PER_S, "connections/s"),
        ("memory", recipe.held_bytes, MAX_HELD_BYTES, "bytes"),
        ("sent ratio", recipe.sent_ratio, 0.99, "of the announced value"),
    )
    for name, value, most, unit in bounds:
        if not (math.isfinite(value) and 0 <= value <= most):
            raise LabUsageError(f"the {name} of this load is {value:g}; choose between 0 and {most:g} {unit}")
    counts = (recipe.idle, recipe.uploaders, recipe.small_buffers, recipe.announced_bytes, recipe.small_bytes)
    pauses = (recipe.timeout_s, recipe.ping_interval_s, recipe.small_period_s, recipe.duration_s)
    if min(counts) < 0 or not all(math.isfinite(pause) and pause > 0 for pause in pauses):
        raise LabUsageError("a count of this load is negative or a time is not above zero; correct it")
    available = _available_bytes()
    if recipe.held_bytes > available:
        needed, there = recipe.held_bytes / 1e9, available / 1e9
        raise LabError(
            f"this load needs {needed:.1f} GB of memory and {there:.1f} GB are free; choose a smaller recipe"
        )


def _available_bytes() -> int:
    for line in MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise LabError(f"{MEMINFO} does not say how much memory is available; Linux 3.14 and later do")
