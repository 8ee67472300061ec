"""The detail probes of a watch: when they are wanted, when they were attached, and how fast that was."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

from stallscope.tracer.capture.watched import WatchedSession
from stallscope.tracer.manifest import DetailInfo
from stallscope.tracer.units import format_duration_ns
from stallscope.tracer.watch.evaluation import Firing

_MAX_TIMES = 1000


class DetailTier:
    """Attaches and detaches what is on demand.

    Attributes:
        is_allowed: by the overhead guard.
        attach_ns: from the moment a trigger was noticed to all probes attached, the last ones.
        late_ns: the same from the moment its bound was passed.
    """

    def __init__(self, session: WatchedSession, *, always: bool, keep_ns: int) -> None:
        """Attach nothing yet.

        Args:
            session: whose probes. always: they are wanted without a trigger too.
            keep_ns: for how long a recording may need to know of what was detached.
        """
        self.is_allowed = True
        self.attach_ns: deque[int] = deque(maxlen=_MAX_TIMES)
        self.late_ns: deque[int] = deque(maxlen=_MAX_TIMES)
        self._session = session
        self._always = always
        self._keep_ns = keep_ns
        self._is_wanted = always
        self._for: tuple[Firing, int] | None = None
        self._details: list[DetailInfo] = []
        self._untold: list[int] = []

    @property
    def is_attached(self) -> bool:
        """Return whether the probes are attached."""
        return bool(self._details) and not self._details[-1].detached_ns

    @property
    def details(self) -> tuple[DetailInfo, ...]:
        """Return when they were attached, oldest first, as far as a recording may need it."""
        return tuple(self._details)

    def take_times(self) -> list[int]:
        """Return ``late_ns`` of what was attached since the last call."""
        times, self._untold = self._untold, []
        return times[-_MAX_TIMES:]

    def want(self, firing: Firing, noticed_ns: int) -> None:
        """Attach them for a trigger, at once if that is possible."""
        if self._is_wanted:
            return
        self._is_wanted = True
        self._for = (firing, noticed_ns)
        self.settle()

    def release(self) -> None:
        """Begin to detach them, unless they are wanted always."""
        self._is_wanted = self._always
        self.settle()

    def settle(self) -> None:
        """Bring about what is wanted and allowed; while probes are being detached that has to wait."""
        wanted = self._is_wanted and self.is_allowed
        if self.is_attached and not wanted:
            self._session.detach_detail()
            now_ns = time.monotonic_ns()
            self._details[-1] = replace(self._details[-1], detached_ns=now_ns)
            self._details = [item for item in self._details if item.detached_ns > now_ns - self._keep_ns]
        elif not self.is_attached and wanted and not self._session.is_detaching:
            self._attach()

    def _attach(self) -> None:
        asked_ns = time.monotonic_ns()
        attached_ns = self._session.attach_detail()
        why, self._for = self._for, None
        probes = self._session.detail_probes
        if why is None:
            self._details.append(DetailInfo(asked_ns, attached_ns, probes=probes, text="without a trigger"))
            return
        firing, noticed_ns = why
        self._details.append(DetailInfo(firing.time_ns, attached_ns, probes=probes, text=firing.trigger))
        self.attach_ns.append(attached_ns - noticed_ns)
        self.late_ns.append(attached_ns - firing.time_ns)
        self._untold = [*self._untold[-_MAX_TIMES:], attached_ns - firing.time_ns]
        self._session.note(
            f"detail probes attached {format_duration_ns(attached_ns - noticed_ns)} after the trigger was noticed, "
            f"{format_duration_ns(attached_ns - firing.time_ns)} after its bound was passed"
        )
