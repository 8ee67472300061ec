"""The overhead guard of a watch, on live servers: counts hits, asks for a decision, and carries it out."""

from __future__ import annotations

from stallscope.tracer.boundary import Boundary
from stallscope.tracer.capture.detail import DetailTier
from stallscope.tracer.capture.probe_ids import FIRST_CALL_PROBE
from stallscope.tracer.capture.watched import WatchedSession
from stallscope.tracer.watch.overhead import Load, OverheadState, decide

_PERIOD_NS = 1_000_000_000


class OverheadGuard:
    """Looks once a second at what tracing takes from the servers."""

    def __init__(self, session: WatchedSession, detail: DetailTier, begin: Boundary) -> None:
        """Begin to count."""
        self.state = OverheadState()
        self.share = 0.0
        self._session = session
        self._detail = detail
        self._last = begin
        self._turn = 0

    def look(self, boundary: Boundary, limit: float) -> None:
        """Take up the counters of this moment; ``limit`` is the greatest share of the servers' time."""
        elapsed_ns = boundary.time_ns - self._last.time_ns
        if elapsed_ns < _PERIOD_NS:
            return
        on_demand = set(self._session.detail_probes)
        standing = detail = 0
        for probe, counters in boundary.counters.items():
            before = self._last.counters.get(probe)
            if probe >= FIRST_CALL_PROBE and before is not None:
                gained = max(counters.hits - before.hits, 0)
                detail += gained if probe in on_demand else 0
                standing += gained if probe not in on_demand else 0
        self._last = boundary
        load = Load(elapsed_ns, standing, detail, self._session.call_cost_ns, servers=max(len(self._session.pids), 1))
        self.share = load.share
        decision = decide(self.state, load, limit, boundary.time_ns, detail_attached=self._detail.is_attached)
        self.state = decision.state
        self._detail.is_allowed = self.state.detail_allowed
        if decision.text:
            self._session.note(decision.text)
        self._detail.settle()
        self._turn = (self._turn + 1) % self.state.keep_one_in
        # what is to be spared is the hit, not the record of it: so the probes are there in one second of so many
        self._session.attach_standing(wanted=self._turn == 0)
