"""What a fleet's monitoring asks: Prometheus metrics of one ``stallscope watch``.

The loop hands over what it has anyway; everything is kept as sums, so memory does not grow with time. Series of a
server that is gone are kept for a while and forgotten. ``packaging/`` has a dashboard and alert rules.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from stallscope.tracer.errors import UsageError
from stallscope.tracer.layout import MAX_SPAN_NS
from stallscope.tracer.manifest import CALL, ITERATION, LISTENER, Manifest, ProbeCounters, ProbeInfo
from stallscope.tracer.watch.aftercare import AfterResult
from stallscope.tracer.watch.evaluation import Firing, QueueState
from stallscope.tracer.watch.folder import Kept
from stallscope.tracer.watch.triggers import Trigger
from stallscope.tracer.watch.writer import Finished

Ints = npt.NDArray[np.int64]

ITERATION_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CALL_BUCKETS_S = (0.00001, 0.0001, 0.00025, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
ATTACH_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

FORGET_NS = 300_000_000_000
"""Series of a server that is gone stay for so long, so that the last scrape sees its end."""

_MAX_SERIES = 4096
"""Of one metric; a fleet on one host has tens."""

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


@dataclass(frozen=True)
class MetricInfo:
    """One metric: its kind, what it says, its labels."""

    kind: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SERVER = ("server", "pid")
METRICS: Mapping[str, MetricInfo] = {
    "stallscope_iteration_duration_seconds": MetricInfo(
        HISTOGRAM, "Event loop iterations that were long enough to be recorded", _SERVER, ITERATION_BUCKETS_S
    ),
    "stallscope_short_iterations": MetricInfo(COUNTER, "Shorter iterations, of all servers together"),
    "stallscope_short_iteration_seconds": MetricInfo(COUNTER, "What those took"),
    "stallscope_call_duration_seconds": MetricInfo(
        HISTOGRAM, "Calls that were recorded", (*_SERVER, "function"), CALL_BUCKETS_S
    ),
    "stallscope_short_calls": MetricInfo(COUNTER, "Calls below the minimum duration", ("function",)),
    "stallscope_short_call_seconds": MetricInfo(COUNTER, "What those took", ("function",)),
    "stallscope_overflows": MetricInfo(
        COUNTER, "Connection requests refused because the accept queue was full", ("listener", "pid")
    ),
    "stallscope_drops": MetricInfo(COUNTER, "Requests a listener dropped, for any reason", ("listener", "pid")),
    "stallscope_requests": MetricInfo(
        COUNTER, "What became of connection requests, where the kernel is hooked; without thinned and lost events",
        ("listener", "pid", "path"),
    ),
    "stallscope_accept_queue_length": MetricInfo(GAUGE, "Connections that wait for accept()", ("listener", "pid")),
    "stallscope_accept_queue_limit": MetricInfo(GAUGE, "The queue is full above this", ("listener", "pid")),
    "stallscope_servers": MetricInfo(GAUGE, "Servers that are traced"),
    "stallscope_triggers": MetricInfo(COUNTER, "Triggers that came true", ("trigger",)),
    "stallscope_captures": MetricInfo(COUNTER, "Captures that ended", ("result",)),
    "stallscope_capturing": MetricInfo(GAUGE, "A capture is under way"),
    "stallscope_last_capture_timestamp_seconds": MetricInfo(GAUGE, "When the last capture ended, since 1970"),
    "stallscope_suppressed_triggers": MetricInfo(COUNTER, "Triggers that fell into a cool-down"),
    "stallscope_kept_captures": MetricInfo(GAUGE, "Captures in the folder"),
    "stallscope_kept_bytes": MetricInfo(GAUGE, "What they take on the disk"),
    "stallscope_aftercare": MetricInfo(COUNTER, "Reports and commands run for captures", ("step", "result")),
    "stallscope_detail_attached": MetricInfo(GAUGE, "Detail probes are attached"),
    "stallscope_detail_attach_seconds": MetricInfo(
        HISTOGRAM, "From a trigger to all detail probes attached", (), ATTACH_BUCKETS_S
    ),
    "stallscope_lost_events": MetricInfo(COUNTER, "Events the tracer could not keep", ("probe",)),
    "stallscope_thinned_events": MetricInfo(COUNTER, "Events beyond a rate limit, only counted", ("probe",)),
    "stallscope_unwritten_events": MetricInfo(COUNTER, "Events the disk was too slow for"),
    "stallscope_preroll_bytes": MetricInfo(GAUGE, "Memory of the pre-roll"),
    "stallscope_preroll_dropped_events": MetricInfo(COUNTER, "Events the memory bound drove out of the pre-roll"),
    "stallscope_probe_hits": MetricInfo(COUNTER, "Calls, iterations and accepts seen", ("probe",)),
    "stallscope_overhead_ratio": MetricInfo(GAUGE, "Share of the servers' time that tracing takes, as measured here"),
    "stallscope_overhead_limit_ratio": MetricInfo(GAUGE, "What --max-overhead allows"),
    "stallscope_own_cpu_seconds": MetricInfo(COUNTER, "CPU time of the watch itself"),
    "stallscope_own_memory_bytes": MetricInfo(GAUGE, "Resident memory of the watch itself"),
    "stallscope_build_info": MetricInfo(GAUGE, "Always 1", ("version",)),
}  # fmt: skip
"""By name; a counter is exported with ``_total`` behind it."""


@dataclass
class _Histogram:
    counts: Ints
    total_s: float = 0.0


Key = tuple[str, ...]


@dataclass
class _Series:
    """The values of one metric by its labels."""

    values: dict[Key, float] = field(default_factory=dict)
    histograms: dict[Key, _Histogram] = field(default_factory=dict)


class WatchMetrics(Collector):
    """Collects and serves; handing over and being scraped may happen in different threads."""

    def __init__(self, version: str, triggers: Iterable[Trigger] = ()) -> None:
        """Begin with zeros."""
        self._mutex = threading.Lock()
        self._series = {name: _Series() for name in METRICS}
        self._probes: dict[int, ProbeInfo] = {}
        self._listeners: dict[int, tuple[str, str]] = {}
        self._servers: dict[int, tuple[str, str]] = {}
        self._gone: dict[str, int] = {}
        self._masks: dict[str, npt.NDArray[np.bool_]] = {}
        self._closers: list[Callable[[], None]] = []
        for name, info in METRICS.items():
            if not info.labels and info.kind != HISTOGRAM:
                self._series[name].values[()] = 0.0
            elif not info.labels:
                self._histogram(name, ())
        self._set("stallscope_build_info", (version,), 1)
        # what Prometheus sees for the first time at 1 has not increased: everything countable is there from the start
        for result in ("complete", "cut short", "failed"):
            self._set("stallscope_captures", (result,), 0)
        for trigger in triggers:
            self._set("stallscope_triggers", (trigger.text,), 0)
        for step in ("report", "exec"):
            for result in ("done", "failed"):
                self._set("stallscope_aftercare", (step, result), 0)

    def serve(self, address: str, port: int) -> int:
        """Answer ``GET /metrics`` on an address until ``close``; returns the port, which 0 leaves to the kernel.

        Raises:
            UsageError: the address cannot be had.
        """
        registry = CollectorRegistry()
        registry.register(self)
        try:
            server, thread = start_http_server(port, address, registry)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(
                f"cannot serve metrics on {address} port {port}: {reason}; choose another with --metrics"
            ) from error

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        self._closers.append(close)
        return int(server.server_port)

    def close(self) -> None:
        """Stop answering."""
        for close in self._closers:
            close()
        self._closers.clear()

    def follow(self, manifest: Manifest, now_ns: int) -> None:
        """Learn which probes, servers and listeners there are; to be called whenever the manifest has changed.

        Args:
            now_ns: CLOCK_MONOTONIC; servers that ended longer ago than ``FORGET_NS`` are forgotten.
        """
        with self._mutex:
            self._probes = {probe.id: probe for probe in manifest.probes}
            self._masks = {kind: _mask(manifest.probes, kind) for kind in (ITERATION, CALL, LISTENER)}
            addresses: dict[int, str] = {}
            for listener in manifest.listeners:
                addresses.setdefault(listener.pid, listener.address)
                self._listeners[listener.index] = (listener.address, str(listener.pid))
            for target in manifest.targets:
                pid = str(target.pid)
                self._servers[target.pid] = (addresses.get(target.pid, f"process {pid}"), pid)
                if target.end_ns:
                    self._gone.setdefault(pid, target.end_ns)
                else:
                    self._gone.pop(pid, None)
                    self._histogram("stallscope_iteration_duration_seconds", self._servers[target.pid])
            self._set("stallscope_servers", (), sum(not target.end_ns for target in manifest.targets))
            for pid, end_ns in list(self._gone.items()):
                if now_ns - end_ns > FORGET_NS:
                    self._forget(pid)

    def observe(self, events: npt.NDArray[np.void]) -> None:
        """Take up events (dtype ``EVENT``, shape (n,))."""
        if not len(events) or not self._masks:
            return
        with self._mutex:
            self._spans("stallscope_iteration_duration_seconds", events, ITERATION)
            self._spans("stallscope_call_duration_seconds", events, CALL)
            mine = events[self._masks[LISTENER][events["probe"]]]
            if len(mine):
                pairs, counts = np.unique(_pairs(mine["tid"], mine["probe"]), return_counts=True)
                for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
                    labels = self._listeners.get(pair >> 16)
                    if labels is not None:
                        path = self._probes[pair & 0xFFFF].name
                        self._add("stallscope_requests", (*labels, path), count)

    def counters(self, by_probe: Mapping[int, ProbeCounters]) -> None:
        """Take up the in-kernel counters, as absolute values."""
        sums: dict[tuple[str, Key], float] = {}

        def add(name: str, key: Key, value: float) -> None:
            sums[name, key] = sums.get((name, key), 0.0) + value

        with self._mutex:
            for probe, counters in by_probe.items():
                info = self._probes.get(probe)
                if info is None:
                    continue
                add("stallscope_probe_hits", (info.name,), counters.hits)
                add("stallscope_lost_events", (info.name,), counters.missing)
                add("stallscope_thinned_events", (info.name,), counters.thinned)
                if info.kind == ITERATION:
                    add("stallscope_short_iterations", (), counters.short_calls)
                    add("stallscope_short_iteration_seconds", (), counters.short_ns / 1e9)
                elif info.kind == CALL:
                    add("stallscope_short_calls", (info.name,), counters.short_calls)
                    add("stallscope_short_call_seconds", (info.name,), counters.short_ns / 1e9)
            for (name, key), value in sums.items():
                # detached probes may no longer be counted: a counter never goes back
                self._set(name, key, max(value, self._series[name].values.get(key, 0.0)))

    def queues(self, queues: Mapping[int, QueueState]) -> None:
        """Take up what is known of the accept queues (``TriggerState.queues``)."""
        with self._mutex:
            for index, queue in queues.items():
                labels = self._listeners.get(index)
                if labels is None or self._is_forgotten(labels[1]):
                    continue
                self._set("stallscope_accept_queue_length", labels, queue.length)
                self._set("stallscope_accept_queue_limit", labels, queue.limit)
                self._set("stallscope_overflows", labels, queue.overflows)
                self._set("stallscope_drops", labels, queue.dropped)

    def fired(self, firings: Sequence[Firing]) -> None:
        """Take up triggers that came true."""
        with self._mutex:
            for firing in firings:
                self._add("stallscope_triggers", (firing.trigger,), 1)

    def captures(
        self, finished: Iterable[Finished], kept: Sequence[Kept], suppressed: int, wall_ns: int, *, capturing: bool
    ) -> None:
        """Take up captures that ended, what is in the folder, and how many triggers were suppressed so far."""
        with self._mutex:
            for capture in finished:
                result = "complete" if capture.complete else "cut short" if capture.path is not None else "failed"
                self._add("stallscope_captures", (result,), 1)
                self._add("stallscope_unwritten_events", (), capture.unwritten)
                self._set("stallscope_last_capture_timestamp_seconds", (), wall_ns / 1e9)
            self._set("stallscope_kept_captures", (), len(kept))
            self._set("stallscope_kept_bytes", (), sum(item.size_bytes for item in kept))
            self._set("stallscope_suppressed_triggers", (), suppressed)
            self._set("stallscope_capturing", (), capturing)

    def aftercare(self, results: Iterable[AfterResult]) -> None:
        """Take up how reports and commands ended."""
        with self._mutex:
            for result in results:
                self._add("stallscope_aftercare", (result.step, "done" if result.ok else "failed"), 1)

    def detail(self, *, attached: bool, took_ns: int | None = None) -> None:
        """Say whether detail probes are attached, and when they were just attached, how long that took."""
        with self._mutex:
            self._set("stallscope_detail_attached", (), attached)
            if took_ns is not None:
                self._fill("stallscope_detail_attach_seconds", (), np.array([took_ns], np.int64))

    def own(
        self, *, cpu_ns: int, memory_bytes: int, share: float, limit: float, preroll_bytes: int, preroll_dropped: int
    ) -> None:
        """Say what watching costs; ``share`` is of the servers' time, ``limit`` what it may be."""
        with self._mutex:
            self._set("stallscope_own_cpu_seconds", (), cpu_ns / 1e9)
            self._set("stallscope_own_memory_bytes", (), memory_bytes)
            self._set("stallscope_overhead_ratio", (), share)
            self._set("stallscope_overhead_limit_ratio", (), limit)
            self._set("stallscope_preroll_bytes", (), preroll_bytes)
            self._set("stallscope_preroll_dropped_events", (), preroll_dropped)

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, as the registry wants it."""
        with self._mutex:
            families = [self._family(name, info) for name, info in METRICS.items()]
        yield from families

    def _family(self, name: str, info: MetricInfo) -> Metric:
        series = self._series[name]
        if info.kind == HISTOGRAM:
            family = HistogramMetricFamily(name, info.text, labels=info.labels)
            bounds = [*(repr(bound) for bound in info.buckets), "+Inf"]
            for key, histogram in series.histograms.items():
                family.add_metric(
                    key, list(zip(bounds, np.cumsum(histogram.counts).tolist(), strict=True)), histogram.total_s
                )
            return family
        kinds = {COUNTER: CounterMetricFamily, GAUGE: GaugeMetricFamily}
        simple = kinds[info.kind](name, info.text, labels=info.labels)
        for key, value in series.values.items():
            simple.add_metric(key, value)
        return simple

    def _spans(self, name: str, events: npt.NDArray[np.void], kind: str) -> None:
        mine = events[self._masks[kind][events["probe"]]]
        mine = mine[mine["duration_ns"] <= np.uint64(MAX_SPAN_NS)]
        if not len(mine):
            return
        pairs = _pairs(mine["pid"], mine["probe"])
        for pair in np.unique(pairs).tolist():
            pid, probe = pair >> 16, pair & 0xFFFF
            labels = self._servers.get(pid, (f"process {pid}", str(pid)))
            key = labels if kind == ITERATION else (*labels, self._probes[probe].name)
            self._fill(name, key, mine["duration_ns"][pairs == pair].astype(np.int64))

    def _fill(self, name: str, key: Key, durations_ns: Ints) -> None:
        histogram = self._histogram(name, key)
        if histogram is None:
            return
        edges = np.array(METRICS[name].buckets) * 1e9
        place = np.searchsorted(edges, durations_ns, side="left")
        histogram.counts += np.bincount(place, minlength=len(edges) + 1)
        histogram.total_s += float(durations_ns.sum()) / 1e9

    def _histogram(self, name: str, key: Key) -> _Histogram | None:
        known = self._series[name].histograms
        if key not in known:
            if len(known) >= _MAX_SERIES:
                return None
            known[key] = _Histogram(np.zeros(len(METRICS[name].buckets) + 1, np.int64))
        return known[key]

    def _set(self, name: str, key: Key, value: float) -> None:
        known = self._series[name].values
        if key in known or len(known) < _MAX_SERIES:
            known[key] = float(value)

    def _add(self, name: str, key: Key, value: float) -> None:
        self._set(name, key, self._series[name].values.get(key, 0.0) + value)

    def _is_forgotten(self, pid: str) -> bool:
        return not any(pid == labels[1] for labels in self._servers.values())

    def _forget(self, pid: str) -> None:
        del self._gone[pid]
        self._servers.pop(int(pid), None)
        self._listeners = {index: labels for index, labels in self._listeners.items() if labels[1] != pid}
        for name, info in METRICS.items():
            if "pid" in info.labels:
                place = info.labels.index("pid")
                series = self._series[name]
                series.values = {key: value for key, value in series.values.items() if key[place] != pid}
                series.histograms = {key: item for key, item in series.histograms.items() if key[place] != pid}


def _mask(probes: Iterable[ProbeInfo], kind: str) -> npt.NDArray[np.bool_]:
    mask = np.zeros(2**16, bool)
    mask[[probe.id for probe in probes if probe.kind == kind]] = True
    return mask


def _pairs(high: npt.NDArray[np.uint32], low: npt.NDArray[np.uint16]) -> Ints:
    return high.astype(np.int64) << 16 | low.astype(np.int64)
