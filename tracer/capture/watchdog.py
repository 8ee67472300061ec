"""Watches event loops without any probe on the path of a request, for a tracer that stays for weeks.

Every few milliseconds it looks into ``/proc/PID/task/TID``: ``syscall`` tells whether the thread waits for events,
``io`` counts its reads and writes (``syscr``, ``syscw``: every command that a client sends makes one of each), ``stat``
tells a stopped process from one that waits, ``schedstat`` how long it wanted a CPU in vain. Of one that seems to stand
still ``status`` is read too: if it has not gone to sleep since the look before (``voluntary_ctxt_switches``), it has
not waited for events either, however late a look came on a busy machine. What all that says about stalls is judged in
``standstill``. The server pays nothing; a look costs this process 15 us, some 60 on a busy machine, and less at a
server that has not run since the last one.

A second witness is serverCron, probed at its entry and return (``hz`` times a second): it shows the iteration that
reads and writes all the time and yet takes too long, because serverCron then comes too late, and it tells a loop that
turns without reading and writing from one that stands still.

What it cannot see: an iteration that waits for events in its midst (a script beyond its time limit, loading) counts as
several, as it does for the probes. Unlike them it counts as a stall what happens before epoll_wait has returned: a
server that should run and gets no CPU, or is stopped. With I/O threads reads and writes of all threads count as the
loop's progress, since those threads do them for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallscope.probes.catalogue import Field
from stallscope.tracer.capture.event_loop import WAITS
from stallscope.tracer.capture.probe_ids import ITERATION_PROBE
from stallscope.tracer.capture.standstill import Span, Standstill, late_iteration, longest_iteration, merged
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.layout import EVENT, NO_STACK
from stallscope.tracer.manifest import ITERATION, ProbeInfo
from stallscope.tracer.units import format_duration_ns

SAMPLED_FIELDS = (Field("run_delay_ns", "ns it was ready to run and got no CPU", 2),)
"""What the values of a sampled iteration mean; how many clients were ready nobody knows."""

_LOOKS_PER_STALL = 10
_MIN_INTERVAL_NS, _MAX_INTERVAL_NS = 2_000_000, 10_000_000
_SUSPECT_INTERVAL_NS = 1_000_000
_MAX_SHARE = 0.01
"""Of one CPU, for all servers together; beyond it, looks become fewer."""

_NICENESS = -20
_FEWEST_LOOKS_PER_STALL = 3
_CRONS_KEPT = 64
_DELAYS_KEPT = 1024
_CRON_PATIENCE_NS = 2_000_000_000
"""A stall is handed over once serverCron has been called after it, or after this time at the latest."""

_MAX_CRON_PERIOD_MS = 1000
"""Redis's smallest hz is 1; what claims more is not serverCron's result."""

_WAITING = tuple(b"%d " % number for number in WAITS.values())
_STOPPED = b"Tt"
_STATUS_BYTES = 1 << 16
"""More than ``status`` has, although it lists the groups of a user, who may be in thousands."""


@dataclass(frozen=True)
class StallInProgress:
    """An event loop that stands still now: its process, its thread, and when that began (CLOCK_MONOTONIC ns)."""

    pid: int
    tid: int
    start_ns: int


@dataclass
class _Loop:
    """One watched event loop: its open files, and what was last read from them."""

    pid: int
    tid: int
    files: dict[str, int]
    standstill: Standstill
    io: bytes = b""
    ran: bytes = b""
    waited: bool = False
    sleeps: bytes = b""
    crons: deque[Span] = field(default_factory=lambda: deque(maxlen=_CRONS_KEPT))
    period_ns: int = 0
    ended: list[Span] = field(default_factory=list)
    looked_ns: int = 0
    delay_ns: int = 0
    delays: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=_DELAYS_KEPT))

    def look(self) -> tuple[bool, bool]:
        """Return whether it waits for events, and whether it has read or written since the last look."""
        ran, self.ran = self.ran, os.pread(self.files["schedstat"], 96, 0)
        waits = os.pread(self.files["syscall"], 8, 0).startswith(_WAITING)
        if waits and self.waited and self.ran == ran:
            return True, False  # it has not run since the last look, not even to be stopped
        counts = os.pread(self.files["io"], 256, 0)
        counts = counts[counts.index(b"syscr") : counts.index(b"read_bytes")]
        moved, self.io = counts != self.io, counts
        waits = waits and (moved or not self._is_stopped())
        self.waited = waits and not moved
        return waits, moved

    def has_stayed(self, *, is_still: bool) -> bool:
        """Return whether it stood still at the last look, does now, and has not gone to sleep in between."""
        before, self.sleeps = self.sleeps, b""
        if is_still:
            status = os.pread(self.files["status"], _STATUS_BYTES, 0)
            self.sleeps = status[status.rindex(b"\nvoluntary_ctxt_switches:") : status.rindex(b"\nnonvoluntary")]
        return is_still and self.sleeps == before

    def look_at_run_delay(self, now_ns: int) -> None:
        """Keep how long it was ready to run and without a CPU since the last look."""
        delay_ns = int(self.ran.split()[1])
        if self.looked_ns and delay_ns != self.delay_ns:
            self.delays.append((self.looked_ns, now_ns, delay_ns - self.delay_ns))
        self.looked_ns, self.delay_ns = now_ns, delay_ns

    def run_delay_ns(self, span: Span) -> int:
        """Return how long of a span that was: the delays that ended in it or at the first look after it."""
        within = [delay for since, until, delay in self.delays if until > span.start_ns and since < span.end_ns]
        return min(sum(within), span.duration_ns)

    def _is_stopped(self) -> bool:
        text = os.pread(self.files["stat"], 64, 0)
        return text[text.rindex(b")") + 2] in _STOPPED

    def close(self) -> None:
        for fd in self.files.values():
            os.close(fd)


class Watchdog:
    """Finds the stalls of event loops by looking at their threads."""

    def __init__(self, threshold_ns: int) -> None:
        """Watch nothing yet; ``threshold_ns`` is how long a stall is at least."""
        self.threshold_ns = threshold_ns
        self._loops: dict[int, _Loop] = {}
        self._look_cpu_ns = 0.0
        self._is_suspect = False

    @property
    def interval_ns(self) -> int:
        """Return how long to wait between samples: less while a stall is suspected, more with many servers."""
        usual_ns = self._usual_interval_ns()
        return min(_SUSPECT_INTERVAL_NS, usual_ns) if self._is_suspect else usual_ns

    @staticmethod
    def run_first() -> None:
        """Have the calling thread run before others on a busy machine, which is when stalls are of interest.

        Looks that come late tell little. It asks for a share of one CPU that is bounded by ``interval_ns``; where it
        is not permitted (no CAP_SYS_NICE), nothing changes.
        """
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)

    def probe(self) -> ProbeInfo:
        """Return the probe list's entry of the iterations found."""
        rung = f"sampled every {format_duration_ns(self._usual_interval_ns())} from /proc"
        return ProbeInfo(ITERATION_PROBE, "event loop iteration", ITERATION, rung, SAMPLED_FIELDS)

    def add(self, pid: int, tid: int) -> None:
        """Watch the event loop that a thread runs.

        Raises:
            SurroundingsError: its files cannot be read; says which.
        """
        self.remove(pid)
        task = Path(f"/proc/{pid}/task/{tid}")
        # with I/O threads they read and write for the loop
        io = task.parents[1] / "io" if _has_io_threads(task.parent) else task / "io"
        paths = {"io": io} | {name: task / name for name in ("syscall", "stat", "status", "schedstat")}
        loop = _Loop(pid, tid, {}, Standstill(self.threshold_ns, self._usual_interval_ns()))
        try:
            for name, path in paths.items():
                loop.files[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                os.pread(loop.files[name], 8, 0)
            loop.look()
            loop.has_stayed(is_still=True)
        except (OSError, ValueError) as error:
            loop.close()
            reason = error.strerror if isinstance(error, OSError) else "it is of an unknown form"
            raise SurroundingsError(
                f"process {pid} cannot be watched without probes: {path}: {reason}; run as root, on a kernel with "
                "CONFIG_TASK_IO_ACCOUNTING and CONFIG_SCHED_INFO"
            ) from error
        self._loops[pid] = loop
        self._set_intervals()

    def remove(self, pid: int) -> None:
        """Let go of a process; one that is not watched is fine."""
        loop = self._loops.pop(pid, None)
        if loop is not None:
            loop.close()
            self._set_intervals()

    def close(self) -> None:
        """Let go of all."""
        for pid in list(self._loops):
            self.remove(pid)

    def sample(self, now_ns: int) -> tuple[npt.NDArray[np.void], list[StallInProgress]]:
        """Look at every loop.

        Args:
            now_ns: CLOCK_MONOTONIC.

        Returns:
            The stalls that have ended and are known whole (dtype ``EVENT``): where serverCron is probed, once it was
            called after them. And those in progress, at once. A process that has ended is left out; ``remove`` is
            still to be called for it.
        """
        began_ns = time.thread_time_ns()
        ended: list[npt.NDArray[np.void]] = []
        in_progress: list[StallInProgress] = []
        self._is_suspect = False
        for loop in self._loops.values():
            try:
                ended += self._look(loop, now_ns)
            except (OSError, ValueError):
                continue  # it is gone
            self._is_suspect |= loop.standstill.is_suspect
            since_ns = loop.standstill.since_ns
            if since_ns:
                span = self._longest_iteration(loop, Span(since_ns, now_ns))
                if span.end_ns == now_ns and span.duration_ns >= self.threshold_ns:
                    in_progress.append(StallInProgress(loop.pid, loop.tid, span.start_ns))
        if self._loops:
            look_ns = (time.thread_time_ns() - began_ns) / len(self._loops)
            self._look_cpu_ns += (look_ns - self._look_cpu_ns) / 64 if self._look_cpu_ns else look_ns
        return np.concatenate(ended) if ended else np.zeros(0, EVENT), in_progress

    def is_still(self, pid: int) -> bool:
        """Look at one loop now; returns whether the stall that was in progress goes on.

        Between attaching probes in the midst of a stall and trusting that they see its end.
        """
        loop = self._loops.get(pid)
        if loop is None or not loop.standstill.since_ns:
            return False
        io = loop.io
        try:
            waits, moved = loop.look()
        except (OSError, ValueError):
            return False
        loop.io = io  # the next sample is to see it too
        return not waits and not moved

    def take_crons(self, calls: npt.NDArray[np.void]) -> None:
        """Take in finished calls of serverCron (dtype ``EVENT``, its result in ``value[2]``), in order of time."""
        for row in calls:
            loop = self._loops.get(int(row["pid"]))
            if loop is None or int(row["tid"]) != loop.tid:
                continue
            start_ns = int(row["start_ns"])
            cron = Span(start_ns, start_ns + int(row["duration_ns"]))
            if loop.crons and loop.period_ns:
                late = late_iteration(loop.crons[-1], cron, loop.period_ns)
                if late.duration_ns >= self.threshold_ns:
                    loop.ended.append(late)
            period_ms = int(row["value"][2]) & 0xFFFFFFFF
            loop.period_ns = period_ms * 1_000_000 if 0 < period_ms <= _MAX_CRON_PERIOD_MS else 0
            loop.crons.append(cron)

    def forget_crons(self) -> None:
        """Forget when serverCron was called: from here on some of its calls were not seen, and none came late."""
        for loop in self._loops.values():
            loop.crons.clear()
            loop.period_ns = 0

    def _look(self, loop: _Loop, now_ns: int) -> list[npt.NDArray[np.void]]:
        waits, moved = loop.look()
        stayed = loop.has_stayed(is_still=not waits and not moved)
        span = loop.standstill.look(now_ns, waits=waits, moved=moved, stayed=stayed)
        if span is not None:
            span = self._longest_iteration(loop, span)
            if span.duration_ns >= self.threshold_ns:
                loop.ended.append(span)
        loop.look_at_run_delay(now_ns)
        return self._ready_rows(loop, now_ns) if loop.ended else []

    def _ready_rows(self, loop: _Loop, now_ns: int) -> list[npt.NDArray[np.void]]:
        """Return the stalls that nothing can be added to any more: serverCron was called after them, or never is."""
        since_ns = loop.standstill.since_ns or now_ns
        called_ns = loop.crons[-1].start_ns if loop.crons else now_ns
        rows = []
        waiting = []
        for span in merged(loop.ended, 2 * loop.standstill.interval_ns):
            is_over = span.end_ns <= max(called_ns, now_ns - _CRON_PATIENCE_NS) and span.end_ns <= since_ns
            if not is_over:
                waiting.append(span)
                continue
            row = np.zeros(1, EVENT)
            row["start_ns"], row["duration_ns"] = span.start_ns, span.duration_ns
            row["pid"], row["tid"], row["probe"], row["stack"] = loop.pid, loop.tid, ITERATION_PROBE, NO_STACK
            row["value"][0, 2] = loop.run_delay_ns(span)
            rows.append(row)
        loop.ended = waiting
        return rows

    def _longest_iteration(self, loop: _Loop, standstill: Span) -> Span:
        return longest_iteration(standstill, [cron.start_ns for cron in loop.crons])

    def _usual_interval_ns(self) -> int:
        wanted_ns = min(max(self.threshold_ns // _LOOKS_PER_STALL, _MIN_INTERVAL_NS), _MAX_INTERVAL_NS)
        affordable_ns = round(len(self._loops) * self._look_cpu_ns / _MAX_SHARE)
        return max(wanted_ns, min(affordable_ns, self.threshold_ns // _FEWEST_LOOKS_PER_STALL))

    def _set_intervals(self) -> None:
        for loop in self._loops.values():
            loop.standstill.interval_ns = self._usual_interval_ns()


def _has_io_threads(tasks: Path) -> bool:
    """Return whether a server has threads that read and write for its event loop (Redis 6, Valkey: io_thd_1...)."""
    with contextlib.suppress(OSError):
        for task in tasks.iterdir():
            if (task / "comm").read_text(encoding="utf-8", errors="replace").startswith("io_thd"):
                return True
    return False
