"""Servers that appear while others are watched: a look through /proc that asks only about processes that are new."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from stallscope.tracer.capture.redis_target import listening_ports, looks_like_redis

SOONEST_NS = 500_000_000
LATEST_NS = 60_000_000_000
"""How long until a process is looked at again: it may still execute another program, or not listen yet. The longer
it has been there, the rarer; and a number may have gone to another process meanwhile."""

_LISTENERS_BELOW = 256
"""A server opens its listeners before it has clients, of which it may have thousands."""


@dataclass(frozen=True)
class Candidate:
    """A process that looks like a server, and listens."""

    pid: int
    ports: frozenset[int]


class Discovery:
    """Remembers when each process is worth the next look."""

    def __init__(self) -> None:
        self._first_ns: dict[int, int] = {}
        self._next_ns: dict[int, int] = {}

    def look(self, now_ns: int, known: frozenset[int]) -> list[Candidate]:
        """Return the servers that are not among the known ones, as far as it was time to look; lowest pid first.

        Args:
            now_ns: CLOCK_MONOTONIC.
            known: processes that are traced, or were found before, and their children with them: a server that
                saves itself has the sockets of its parent for a moment.
        """
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        for pid in self._first_ns.keys() - pids:
            del self._first_ns[pid], self._next_ns[pid]
        found = []
        for pid in sorted(pids - known):
            if now_ns < self._next_ns.get(pid, 0):
                continue
            age_ns = now_ns - self._first_ns.setdefault(pid, now_ns)
            self._next_ns[pid] = now_ns + min(max(age_ns // 2, SOONEST_NS), LATEST_NS)
            candidate = _candidate(pid, known)
            if candidate is not None:
                found.append(candidate)
        return found


def _candidate(pid: int, known: frozenset[int]) -> Candidate | None:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace")
        exe = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None
    if not (looks_like_redis(name) or looks_like_redis(Path(exe).name)) or _parent(pid) in known:
        return None
    ports = listening_ports(pid, _LISTENERS_BELOW)
    return Candidate(pid, frozenset(ports)) if ports else None


def _parent(pid: int) -> int:
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        )
    except (OSError, ValueError, IndexError):
        return 0
