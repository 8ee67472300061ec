"""Where recordings may begin and end: what was counted at one moment, and from one moment to another.

Two counts of one thing are taken at one moment: the kernel's counters, and what the hooked functions added to them.
``record`` begins and ends with its session; ``watch`` cuts captures out of the past, at boundaries that were taken
twice a second; ``top`` takes one when a key is pressed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

from stallscope.tracer.manifest import Manifest, NamespaceInfo, ProbeCounters

_TRIES = 20
"""Under a storm the kernel counts on while it is read; after so many tries the last values stand."""

ByNamespace = Mapping[int, Mapping[str, int]]
"""Counts by the kernel's name of the counter, by inode of the network namespace."""


@dataclass(frozen=True)
class Moment:
    """What was counted of refused connections at one moment.

    Attributes:
        kernel: the kernel's counters, of the namespaces of interest.
        watched, elsewhere: what the hooked functions added, for the listeners that are watched and for all
            others; namespaces where nothing was refused are left out.
        names: the counters that the hooked functions add to; none where the kernel is not hooked.
    """

    kernel: ByNamespace = field(default_factory=dict)
    watched: ByNamespace = field(default_factory=dict)
    elsewhere: ByNamespace = field(default_factory=dict)
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Boundary:
    """What had been counted at one moment, where a recording may begin or end.

    Attributes:
        time_ns: CLOCK_MONOTONIC.
        counters: the in-kernel counters of the probes, by id.
        moment: refused connections.
    """

    time_ns: int
    counters: Mapping[int, ProbeCounters]
    moment: Moment


def take_moment(
    kernel: Callable[[], ByNamespace], hooked: Callable[[bool], ByNamespace], names: tuple[str, ...]
) -> Moment:
    """Return both counts, read while the kernel counted nothing, if there is such a moment.

    Args:
        kernel: reads the kernel's counters.
        hooked: reads what the hooked functions added: True for watched listeners, False for all others.
        names: as in ``Moment``.
    """
    after = kernel()
    for _ in range(_TRIES):
        before, watched, elsewhere, after = after, hooked(True), hooked(False), kernel()
        if before == after:
            break
    return Moment(after, watched, elsewhere, names)


def gained(start: Mapping[int, ProbeCounters], end: Mapping[int, ProbeCounters]) -> dict[int, ProbeCounters]:
    """Return what was counted between two readings; a probe that was not there at first began at 0."""
    return {probe: _gained(start.get(probe, ProbeCounters()), counters) for probe, counters in end.items()}


def begun_at(manifest: Manifest, start_ns: int, starts: Mapping[int, Moment]) -> Manifest:
    """Return the manifest of a session as that of a recording which begins in its midst.

    Args:
        start_ns: CLOCK_MONOTONIC; servers that had ended before are left out.
        starts: what its namespaces' counters begin with, by inode; a namespace that is not here keeps its own.
    """
    return replace(
        manifest,
        started_ns=start_ns,
        targets=tuple(info for info in manifest.targets if not 0 < info.end_ns < start_ns),
        namespaces=tuple(
            replace(info, counters_start=dict(starts[info.inode].kernel[info.inode])) if info.inode in starts else info
            for info in manifest.namespaces
        ),
    )


def with_end(info: NamespaceInfo, start: Moment, end: Moment) -> NamespaceInfo:
    """Return a namespace with the counters at the end, and what the hooked functions added since the start."""

    def added(first: ByNamespace, last: ByNamespace) -> dict[str, int]:
        before, after = first.get(info.inode, {}), last.get(info.inode, {})
        return {name: after.get(name, 0) - before.get(name, 0) for name in end.names}

    return replace(
        info,
        counters_end=dict(end.kernel.get(info.inode, {})),
        seen=added(start.watched, end.watched),
        seen_elsewhere=added(start.elsewhere, end.elsewhere),
    )


def _gained(start: ProbeCounters, end: ProbeCounters) -> ProbeCounters:
    return ProbeCounters(
        **{item.name: max(getattr(end, item.name) - getattr(start, item.name), 0) for item in fields(ProbeCounters)}
    )
