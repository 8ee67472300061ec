"""Two counts of one thing at one moment: the kernel's counters, and what the hooked functions added to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from stallscope.tracer.manifest import NamespaceInfo

_TRIES = 20
"""Under a storm the kernel counts on while it is read; after so many tries the last values stand."""

ByNamespace = Mapping[int, Mapping[str, int]]
"""Counts by the kernel's name of the counter, by inode of the network namespace."""


@dataclass(frozen=True)
class Moment:
    """What was counted at one moment.

    Attributes:
        kernel: the kernel's counters, of the namespaces of interest.
        watched, elsewhere: what the hooked functions added, for the listeners that are watched and for all
            others; namespaces where nothing was refused are left out.
    """

    kernel: ByNamespace
    watched: ByNamespace
    elsewhere: ByNamespace


def take_moment(kernel: Callable[[], ByNamespace], hooked: Callable[[bool], ByNamespace]) -> Moment:
    """Return both counts, read while the kernel counted nothing, if there is such a moment.

    Args:
        kernel: reads the kernel's counters.
        hooked: reads what the hooked functions added: True for watched listeners, False for all others.
    """
    after = kernel()
    for _ in range(_TRIES):
        before, watched, elsewhere, after = after, hooked(True), hooked(False), kernel()
        if before == after:
            break
    return Moment(after, watched, elsewhere)


def with_end(info: NamespaceInfo, start: Moment, end: Moment, names: tuple[str, ...]) -> NamespaceInfo:
    """Return a namespace with the counters at the end, and what the hooked functions added since the start.

    Args:
        names: the counters the hooked functions are compared with; none where the kernel is not hooked.
    """

    def gained(of: Callable[[Moment], ByNamespace]) -> dict[str, int]:
        first, last = of(start).get(info.inode, {}), of(end).get(info.inode, {})
        return {name: last.get(name, 0) - first.get(name, 0) for name in names}

    return replace(
        info,
        counters_end=dict(end.kernel[info.inode]),
        seen=gained(lambda moment: moment.watched),
        seen_elsewhere=gained(lambda moment: moment.elsewhere),
    )
