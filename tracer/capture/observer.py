"""A session watched live: its rows go into the sliding window, and parts of it into recordings on demand."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallscope.tracer.capture.excerpt import Excerpt
from stallscope.tracer.capture.session import Progress, Session, SessionOptions
from stallscope.tracer.errors import StallscopeError, UsageError
from stallscope.tracer.last_samples import LastSamples
from stallscope.tracer.live.view import LiveView
from stallscope.tracer.live.window import Cost, LiveWindow
from stallscope.tracer.recording import SUFFIX, joined_events
from stallscope.tracer.units import format_count

_FULL_ROWS = 32_768
_LAST_POLLS = 100


class Observer:
    """Traced servers, what the last seconds looked like, and at most one capture under way."""

    def __init__(self, options: SessionOptions, folder: Path, capture_ns: int) -> None:
        """Find the servers, compile, and attach.

        Args:
            folder: where captures go; capture_ns: how long one is, unless it is ended before.

        Raises:
            SurroundingsError: this machine, process or binary cannot be traced; nothing stays attached.
            UsageError: there is no such folder.
        """
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder; make it or choose another for captures with -o")
        self.message = ""
        self.captures: list[Path] = []
        self._folder, self._capture_ns = folder, capture_ns
        self._session = Session(options)
        self._window = LiveWindow(self._session.manifest())
        self._pending: list[npt.NDArray[np.void]] = []
        self._samples = LastSamples()
        self._samples.follow(self._session.manifest())
        self._excerpt: Excerpt | None = None
        self._capture_ended_by = ""

    @property
    def started_ns(self) -> int:
        """When tracing began, CLOCK_MONOTONIC."""
        return self._session.started_ns

    @property
    def due_ns(self) -> int:
        """When ``poll`` has something to do again, CLOCK_MONOTONIC."""
        return self._session.due_ns

    @property
    def has_servers(self) -> bool:
        """Whether a server is traced, or looked for on its port."""
        return self._session.has_servers

    @property
    def progress(self) -> Progress:
        """What was counted since the start."""
        return self._session.progress

    def poll(self, now_ns: int) -> None:
        """Do what is due: fetch rows, and go on with the capture."""
        self._take(self._session.poll(now_ns))
        excerpt = self._excerpt
        if excerpt is None or excerpt.end is not None:
            return
        if now_ns - excerpt.started_ns >= self._capture_ns:
            self._stop_capture("the duration was over")
        elif excerpt.is_due(now_ns):
            self._try(lambda: excerpt.write(now_ns, self._session.counters(now_ns)))

    def view(self, now_ns: int) -> LiveView:
        """Return the present view."""
        counters = self._session.counters(now_ns)
        self._fill()
        progress = self._session.progress
        cost = Cost(progress.traced_share, progress.own_share)
        return self._window.view(now_ns, counters, self._session.unfinished(), cost)

    def toggle_capture(self) -> None:
        """Begin a capture, or end the one under way."""
        if self._excerpt is not None:
            if self._excerpt.end is None:
                self._stop_capture("it was ended by key")
            return
        start = self._session.mark()
        self._take([start.sampled])
        try:
            self._excerpt = Excerpt(self._session, _new_path(self._folder), start, self._samples.rows())
        except StallscopeError as error:
            self.message = str(error)

    def capture_state(self, now_ns: int) -> str:
        """Return what the capture under way has so far, "" when there is none."""
        if self._excerpt is None:
            return ""
        passed_s = (now_ns - self._excerpt.started_ns) / 1e9
        rows = format_count(self._excerpt.rows, "row")
        return f"capturing: {passed_s:.0f} of {self._capture_ns / 1e9:.0f} s, {rows} to {self._excerpt.path.name}"

    def finish(self, ended_by: str) -> LiveView:
        """End the capture under way, take the last state of everything, and detach; returns the last view."""
        if self._excerpt is not None and self._excerpt.end is None:
            self._stop_capture(ended_by)
        for _ in range(_LAST_POLLS):
            if self._excerpt is None:
                break
            time.sleep(max(self._session.due_ns - time.monotonic_ns(), 0) / 1e9)
            self._take(self._session.poll(time.monotonic_ns()))
        rows, counters, manifest = self._session.finish(ended_by)
        if self._excerpt is not None:
            self._excerpt.abandon()
        self._pending.append(rows)
        self._fill()
        self._window.know(manifest)
        progress = self._session.progress
        cost = Cost(progress.traced_share, progress.own_share)
        return self._window.view(manifest.ended_ns, counters, cost=cost, is_last=True)

    def close(self) -> None:
        """Detach and free everything; may be called more than once."""
        if self._excerpt is not None:
            self._excerpt.abandon()
        self._session.close()

    def _take(self, parts: list[npt.NDArray[np.void]]) -> None:
        filled = [part for part in parts if len(part)]
        for part in filled:
            self._samples.add(part, time.monotonic_ns())
        self._pending += filled
        if sum(map(len, self._pending)) >= _FULL_ROWS:
            self._fill()
        excerpt = self._excerpt
        if excerpt is not None and excerpt.add(joined_events(filled)):
            self._excerpt = None
            self._try(lambda: self._finished(excerpt))

    def _fill(self) -> None:
        """Put the pending rows into the window; rows of probes that are new need the manifest that has them."""
        self._window.know(self._session.manifest())
        self._window.add(joined_events(self._pending))
        self._pending.clear()

    def _stop_capture(self, ended_by: str) -> None:
        assert self._excerpt is not None
        end = self._session.mark()
        self._capture_ended_by = ended_by
        self._excerpt.stop(end)
        self._take([end.sampled])

    def _finished(self, excerpt: Excerpt) -> None:
        path = excerpt.finish(self._capture_ended_by)
        self.captures.append(path)
        self.message = f"captured {format_count(excerpt.rows, 'row')}; see: stallscope summary {path}"

    def _try(self, write: Callable[[], None]) -> None:
        """Write; a capture that cannot be written ends, and tracing goes on."""
        try:
            write()
        except StallscopeError as error:
            self.message = str(error)
            if self._excerpt is not None:
                self._excerpt.abandon()
                self._excerpt = None


def _new_path(folder: Path) -> Path:
    """Return a name with the time that no file in the folder has."""
    stem = time.strftime("stallscope-%Y%m%d-%H%M%S")
    path, number = folder / f"{stem}{SUFFIX}", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}{SUFFIX}"
    return path
