"""Servers that appear while others are watched: a look through /proc that asks only about processes that are new."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from stallscope.tracer.capture.redis_target import listening_ports, looks_like_redis

YOUNG_NS = 10_000_000_000
"""A process may still execute another program, or not listen yet, for so long after it was first seen."""

AGAIN_NS = 60_000_000_000
"""After so long everything is looked at again: a number may have gone to another process meanwhile."""


@dataclass(frozen=True)
class Candidate:
    """A process that looks like a server, and listens."""

    pid: int
    ports: frozenset[int]


class Discovery:
    """Remembers which processes are no servers."""

    def __init__(self) -> None:
        self._first_seen_ns: dict[int, int] = {}
        self._dismissed: set[int] = set()
        self._again_ns = 0

    def look(self, now_ns: int, known: frozenset[int]) -> list[Candidate]:
        """Return the servers that are not among the known ones; lowest pid first.

        Args:
            now_ns: CLOCK_MONOTONIC.
            known: processes that are traced, or were found before, and their children with them: a server that
                saves itself has the sockets of its parent for a moment.
        """
        if now_ns >= self._again_ns:
            self._again_ns = now_ns + AGAIN_NS
            self._dismissed.clear()
        pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        self._dismissed &= pids
        for pid in self._first_seen_ns.keys() - pids:
            del self._first_seen_ns[pid]
        found = []
        for pid in sorted(pids - self._dismissed - known):
            candidate = _candidate(pid, known)
            if candidate is not None:
                found.append(candidate)
            elif now_ns - self._first_seen_ns.setdefault(pid, now_ns) >= YOUNG_NS:
                self._dismissed.add(pid)
        return found


def _candidate(pid: int, known: frozenset[int]) -> Candidate | None:
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace")
        exe = os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return None
    if not (looks_like_redis(name) or looks_like_redis(Path(exe).name)) or _parent(pid) in known:
        return None
    ports = listening_ports(pid)
    return Candidate(pid, frozenset(ports)) if ports else None


def _parent(pid: int) -> int:
    try:
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
        )
    except (OSError, ValueError, IndexError):
        return 0
