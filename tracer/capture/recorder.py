"""One recording from start to end: a session of traced servers, written to a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallscope.tracer.capture.session import Progress, Session, SessionOptions
from stallscope.tracer.manifest import Counters, Manifest
from stallscope.tracer.recording import RecordingWriter, empty_events, joined_events

FLUSH_NS = 500_000_000
"""Rows and counters are written at least this often, so a file that is cut short lacks less than a second."""

FLUSH_ROWS = 32_768


@dataclass(frozen=True)
class RecordOptions:
    """What to record, where to, and for how long.

    Attributes:
        duration_ns: 0 records until it is stopped.
    """

    session: SessionOptions
    output: Path
    duration_ns: int = 0


class Recorder:
    """Records the given servers into one file."""

    def __init__(self, options: RecordOptions) -> None:
        """Find the servers, compile, and attach; recording begins with ``run``.

        Raises:
            SurroundingsError: this machine, process or binary cannot be traced; nothing stays attached.
        """
        self.options = options
        self._is_stopped = False
        self._ended_by = ""
        self._session = Session(options.session)

    @property
    def attached_ns(self) -> int:
        """When all probes were attached, CLOCK_MONOTONIC."""
        return self._session.attached_ns

    @property
    def progress(self) -> Progress:
        """What a progress line shows."""
        return self._session.progress

    def stop(self, reason: str) -> None:
        """Ask ``run`` to finish; safe from a signal handler.

        A flag, not an event: a handler that sets an event while this thread is about to wait for it waits for the
        event's lock for ever.
        """
        self._ended_by = reason
        self._is_stopped = True

    def run(self, on_progress: Callable[[Progress], None] = lambda progress: None) -> Manifest:
        """Record until the duration is over, ``stop`` is called, or the last server has ended.

        Args:
            on_progress: called once a second, and at the end.

        Returns:
            The manifest of the finished recording.

        Raises:
            StallscopeError: the file cannot be written; what was written before stays readable.
        """
        with RecordingWriter(self.options.output, self._session.manifest(), self._session.stacks) as writer:
            try:
                return self._record(writer, on_progress)
            finally:
                self.close()

    def close(self) -> None:
        """Detach and free everything; may be called more than once."""
        self._session.close()

    def _record(self, writer: RecordingWriter, on_progress: Callable[[Progress], None]) -> Manifest:
        session = self._session
        pending: list[npt.NDArray[np.void]] = []
        next_flush = session.started_ns + FLUSH_NS
        shown = 0
        last = session.manifest()
        writer.write(empty_events())  # the manifest is in the file before anything can end us
        while not self._is_over(time.monotonic_ns()):
            time.sleep(max(session.due_ns - time.monotonic_ns(), 0) / 1e9)
            now_ns = time.monotonic_ns()
            pending += session.poll(now_ns)
            if now_ns >= next_flush or sum(map(len, pending)) >= FLUSH_ROWS:
                next_flush = now_ns + FLUSH_NS
                manifest = session.manifest()
                writer.write(
                    joined_events(pending),
                    Counters(now_ns, session.counters(now_ns)),
                    None if manifest == last else manifest,
                )
                pending.clear()
                last = manifest
                if (now_ns - session.started_ns) // 1_000_000_000 > shown:
                    shown = (now_ns - session.started_ns) // 1_000_000_000
                    on_progress(session.progress)
        rows, counters, manifest = session.finish(self._ended_by)
        writer.finish(joined_events([*pending, rows]), Counters(manifest.ended_ns, counters), manifest)
        on_progress(session.progress)
        return manifest

    def _is_over(self, now_ns: int) -> bool:
        if self._is_stopped:
            return True
        if self.options.duration_ns and now_ns - self._session.started_ns >= self.options.duration_ns:
            self._ended_by = "the duration was over"
            return True
        if not self._session.has_servers:
            self._ended_by = "the traced process ended"
            return True
        return False
