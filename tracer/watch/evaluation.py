"""When triggers come true, over a stream of events.

Evaluation is pure and incremental: batches of events go in, firings come out, and time is an argument. However
the events are cut into batches, a condition comes true at the same moment. One condition on one listener or
thread fires once, when it comes true, and again only after it has been false; as long as it lasts,
``held_ns`` follows it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stallscope.tracer.layout import MAX_SPAN_NS
from stallscope.tracer.manifest import CALL, COUNTER, ITERATION, LISTENER, QUEUE, ListenerInfo, Manifest, ProbeInfo
from stallscope.tracer.units import format_duration_ns
from stallscope.tracer.watch.triggers import BACKLOG, DROP, LOST, OVERFLOW, SPANS, STALL, WAIT, Trigger

_MAX_REMEMBERED = 4096
"""Spans that fired under way and were not seen to end, and subjects of conditions: the oldest are forgotten."""

_PAIRING_NS = 1_000_000_000
"""A drop at a listener and the kernel's count of an overflow belong together when they are seen so close."""

_WINDOW_STEPS = 20
"""Counts are forgotten in steps of a window's twentieth, so that a window holds so many numbers at most."""


@dataclass(frozen=True)
class Firing:
    """A trigger that came true.

    Attributes:
        time_ns: the moment the bound was passed, CLOCK_MONOTONIC; it may lie a little before the evaluation.
        trigger: its text; value: the largest that was seen in this evaluation, in ``unit``.
        subject: a listener's address, a function, or ``event loop``; pid, tid: whose, 0 where not known.
        under_way: the span had not ended yet. count: spans, connections or events beyond the bound.
    """

    time_ns: int
    trigger: str
    value: float
    unit: str
    subject: str
    pid: int = 0
    tid: int = 0
    under_way: bool = False
    count: int = 1

    def describe(self) -> str:
        """Return it in words, as ``stall>50ms: 61.2 ms so far in event loop, process 4711``."""
        if self.unit == "ns":
            amount = format_duration_ns(self.value) + (" so far" if self.under_way else "")
        elif self.unit == "%":
            amount = f"{self.value:.0f}%"
        else:
            amount = f"{self.value:,.0f} {self.unit}"
        where = f" of process {self.pid}" if self.pid else ""
        return f"{self.trigger}: {amount}, {self.subject}{where}"


class UnderWay(NamedTuple):
    """A span that has begun and not ended: an event loop iteration (``probe`` -1), or a call of this probe."""

    tid: int
    start_ns: int
    pid: int = 0
    probe: int = -1


@dataclass
class _Window:
    """A sum over the last so many ns, in constant memory."""

    length_ns: int
    total: int = 0
    _steps: deque[tuple[int, int]] = field(default_factory=deque)

    def add(self, time_ns: int, count: int) -> None:
        step = time_ns * _WINDOW_STEPS // self.length_ns
        if self._steps and self._steps[-1][0] >= step:
            self._steps[-1] = (self._steps[-1][0], self._steps[-1][1] + count)
        else:
            self._steps.append((step, count))
        self.total += count
        self.forget(time_ns)

    def forget(self, now_ns: int) -> None:
        oldest = now_ns * _WINDOW_STEPS // self.length_ns - _WINDOW_STEPS
        while self._steps and self._steps[0][0] <= oldest:
            self.total -= self._steps.popleft()[1]


@dataclass
class QueueState:
    """What is known of one listener's accept queue.

    Attributes:
        length, limit: at the last sample, connections.
        overflows, dropped: how many were refused since the first sample: by the full queue, for any reason.
        drops: the socket's own counter, -1 before the first; unpaired: drops not yet matched with an overflow, the
            last of them at ``dropped_ns``.
    """

    length: int = 0
    limit: int = 0
    overflows: int = 0
    dropped: int = 0
    drops: int = -1
    unpaired: int = 0
    dropped_ns: int = 0


@dataclass
class _Episode:
    """A condition on one listener: since when it holds, and whether it fired."""

    since_ns: int = -1
    fired: bool = False


class TriggerState:
    """Evaluates triggers over a stream of events.

    Attributes:
        held_ns: the last moment at which any condition was seen to hold, CLOCK_MONOTONIC; 0: never.
        queues: what is known of each listener's accept queue, by index; also where no trigger asks for it.
    """

    def __init__(self, triggers: Sequence[Trigger]) -> None:
        """Start with no knowledge; ``follow`` says what the events mean."""
        self.triggers = tuple(triggers)
        self.held_ns = 0
        self._probes: dict[int, ProbeInfo] = {}
        self._listeners: dict[int, ListenerInfo] = {}
        self._counter_names: tuple[str, ...] = ()
        self._ids: dict[str, set[int]] = {}
        # by probe id: a look-up in 64 KB is a tenth of what numpy.isin takes for a small batch
        self._masks: dict[str, npt.NDArray[np.bool_]] = {}
        self._sampled_mask = np.zeros(2**16, bool)
        self._fired: dict[tuple[int, int, int, int], None] = {}
        self.queues: dict[int, QueueState] = {}
        self._overflows: dict[int, int] = {}
        self._overflowed: dict[int, tuple[int, int]] = {}
        self._windows: dict[tuple[int, int], _Window] = {}
        self._episodes: dict[tuple[int, int], _Episode] = {}
        self._lost = -1

    def follow(self, manifest: Manifest) -> None:
        """Learn what the probe ids and listeners mean; to be called again whenever the manifest has changed."""
        self._probes = {probe.id: probe for probe in manifest.probes}
        self._listeners = {listener.index: listener for listener in manifest.listeners}
        self._counter_names = manifest.counter_names
        self._ids = {trigger.text: self._probes_of(trigger) for trigger in self.triggers}
        self._masks = {text: _mask(ids) for text, ids in self._ids.items()}
        self._sampled_mask = _mask(probe.id for probe in manifest.probes if probe.kind in (QUEUE, COUNTER))

    def observe(
        self,
        events: npt.NDArray[np.void],
        now_ns: int,
        under_way: Sequence[UnderWay] = (),
        lost: int | None = None,
    ) -> tuple[Firing, ...]:
        """Return what came true with these events, in the order of time.

        Args:
            events: records (dtype ``EVENT``, shape (n,), n may be 0), sampled ones in the order of time.
            now_ns: CLOCK_MONOTONIC; never smaller than before.
            under_way: the iterations (and calls) that have not ended.
            lost: events lost since the start, by the kernel's counters; None where they were not read.
        """
        firings: list[Firing] = []
        for index, trigger in enumerate(self.triggers):
            if trigger.quantity in SPANS:
                firings += self._running(index, trigger, under_way, now_ns)
                if len(events):
                    firings += self._ended(index, trigger, events)
        if len(events):
            firings += self._sampled(events)
        for index, trigger in enumerate(self.triggers):
            if trigger.quantity == BACKLOG:
                firings += self._lasting(index, trigger, now_ns)
            elif trigger.quantity == LOST and lost is not None and lost > self._lost >= 0:
                firings += self._count(index, trigger, 0, "tracer", 0, now_ns, lost - self._lost)
        if lost is not None:
            self._lost = lost
        for (index, subject), window in self._windows.items():
            window.forget(now_ns)
            if not self.triggers[index].exceeds(window.total):
                self._episode(index, subject).fired = False
        for memory in (self._fired, self.queues, self._windows, self._episodes):
            _bound_size(memory)
        return tuple(sorted(firings, key=lambda firing: firing.time_ns))

    def _running(self, index: int, trigger: Trigger, under_way: Sequence[UnderWay], now_ns: int) -> Iterator[Firing]:
        for span in under_way:
            if trigger.quantity == WAIT or not self._is_about(trigger, span.probe):
                continue
            lasted_ns = now_ns - span.start_ns
            if not trigger.exceeds(lasted_ns):
                continue
            self.held_ns = max(self.held_ns, now_ns)
            key = (index, span.tid, span.probe, span.start_ns)
            if key in self._fired:
                continue
            self._fired[key] = None
            yield Firing(
                span.start_ns + int(trigger.bound), trigger.text, lasted_ns, "ns", self._name(trigger), span.pid,
                span.tid, under_way=True,
            )  # fmt: skip

    def _ended(self, index: int, trigger: Trigger, events: npt.NDArray[np.void]) -> Iterator[Firing]:
        mask = self._masks.get(trigger.text)
        if mask is None:
            return
        mine = np.flatnonzero(mask[events["probe"]])
        if not len(mine):
            return
        duration = events["duration_ns"][mine]
        long = duration >= trigger.bound if trigger.inclusive else duration > trigger.bound
        mine = mine[long & (duration <= np.uint64(MAX_SPAN_NS))]
        if not len(mine):
            return
        found = events[mine]
        ends = found["start_ns"] + found["duration_ns"]
        self.held_ns = max(self.held_ns, int(ends.max()))
        new = np.ones(len(found), bool)
        if self._fired:
            for place, row in enumerate(found):
                probe = -1 if trigger.quantity == STALL else int(row["probe"])
                key = (index, int(row["tid"]), probe, int(row["start_ns"]))
                new[place] = key not in self._fired
                self._fired.pop(key, None)
        found = found[new]
        for pid in np.unique(found["pid"]).tolist():
            spans = found[found["pid"] == pid]
            worst = spans[int(spans["duration_ns"].argmax())]
            listener = self._listeners.get(int(worst["tid"])) if trigger.quantity == WAIT else None
            yield Firing(
                int(spans["start_ns"].min()) + int(trigger.bound), trigger.text, float(worst["duration_ns"]), "ns",
                listener.address if listener else self._name(trigger), int(pid),
                0 if trigger.quantity == WAIT else int(worst["tid"]), count=len(spans),
            )  # fmt: skip

    def _sampled(self, events: npt.NDArray[np.void]) -> Iterator[Firing]:
        """Take up the samples of accept queues and kernel counters one by one, in their order."""
        for row in events[self._sampled_mask[events["probe"]]]:
            probe = self._probes[int(row["probe"])]
            values = {
                item.name: int(row["value"][item.slot]) >> item.shift & (1 << item.bits) - 1 for item in probe.fields
            }
            time_ns = int(row["start_ns"])
            if probe.kind == QUEUE:
                yield from self._queue_sample(time_ns, values)
            else:
                yield from self._counter_sample(time_ns, values)

    def _queue_sample(self, time_ns: int, values: dict[str, int]) -> Iterator[Firing]:
        index = values["listener"]
        for place, trigger in enumerate(self.triggers):
            if trigger.quantity == BACKLOG:
                # what the sample before said was so until this one
                yield from self._lasting(place, trigger, time_ns, only=index)
        queue = self.queues.setdefault(index, QueueState())
        # sk_drops is 32 bits wide
        grown = (values["drops"] - queue.drops) % 2**32 if queue.drops >= 0 else 0
        queue.length, queue.limit, queue.drops = values["queue_length"], values["queue_limit"], values["drops"]
        for place, trigger in enumerate(self.triggers):
            if trigger.quantity == BACKLOG:
                episode = self._episode(place, index)
                if not self._is_above(trigger, queue):
                    episode.since_ns, episode.fired = -1, False
                elif episode.since_ns < 0:
                    episode.since_ns = time_ns
                    yield from self._lasting(place, trigger, time_ns, only=index)
        if not grown:
            return
        if time_ns - queue.dropped_ns > _PAIRING_NS:
            queue.unpaired = 0
        queue.unpaired += grown
        queue.dropped += grown
        queue.dropped_ns = time_ns
        listener = self._listeners.get(index)
        for place, trigger in enumerate(self.triggers):
            if trigger.quantity == DROP and listener:
                yield from self._count(place, trigger, index, listener.address, listener.pid, time_ns, grown)
        if listener:
            yield from self._pair(listener.namespace, time_ns)

    def _counter_sample(self, time_ns: int, values: dict[str, int]) -> Iterator[Firing]:
        counter, namespace = values["counter"], values["namespace"]
        if counter >= len(self._counter_names) or self._counter_names[counter] != "ListenOverflows":
            return
        before = self._overflows.get(namespace)
        self._overflows[namespace] = values["count"]
        if before is None or values["count"] <= before:
            return
        waiting, since_ns = self._overflowed.get(namespace, (0, 0))
        if time_ns - since_ns > _PAIRING_NS:
            waiting = 0
        self._overflowed[namespace] = (waiting + values["count"] - before, time_ns)
        yield from self._pair(namespace, time_ns)

    def _pair(self, namespace: int, time_ns: int) -> Iterator[Firing]:
        """Give a namespace's new overflows to the listeners that dropped or are full; others live there too."""
        waiting, since_ns = self._overflowed.get(namespace, (0, 0))
        if not waiting or time_ns - since_ns > _PAIRING_NS:
            return
        mine = [
            (listener, self.queues[index])
            for index, listener in self._listeners.items()
            if listener.namespace == namespace and index in self.queues
        ]
        # Linux sk_acceptq_is_full: strictly above
        mine.sort(key=lambda pair: pair[1].length <= pair[1].limit)
        shares: list[tuple[ListenerInfo, int]] = []
        for listener, queue in mine:
            dropped = queue.unpaired if time_ns - queue.dropped_ns <= _PAIRING_NS else 0
            share = min(waiting, dropped)
            if share:
                shares.append((listener, share))
            waiting -= share
            queue.unpaired = dropped - share
        if not shares and mine and mine[0][1].length > mine[0][1].limit:
            # a refused cookie is an overflow that the listener does not count as a drop
            shares, waiting = [(mine[0][0], waiting)], 0
        for listener, share in shares:
            self.queues[listener.index].overflows += share
            for place, trigger in enumerate(self.triggers):
                if trigger.quantity == OVERFLOW:
                    name, pid = listener.address, listener.pid
                    yield from self._count(place, trigger, listener.index, name, pid, time_ns, share)
        self._overflowed[namespace] = (waiting, since_ns)

    def _count(
        self, index: int, trigger: Trigger, subject: int, name: str, pid: int, time_ns: int, count: int
    ) -> Iterator[Firing]:
        window = self._windows.setdefault((index, subject), _Window(trigger.time_ns))
        episode = self._episode(index, subject)
        window.forget(time_ns)
        if not trigger.exceeds(window.total):
            episode.fired = False
        window.add(time_ns, count)
        if not trigger.exceeds(window.total):
            return
        self.held_ns = max(self.held_ns, time_ns)
        if not episode.fired:
            episode.fired = True
            yield Firing(time_ns, trigger.text, window.total, trigger.unit, name, pid, count=window.total)

    def _lasting(self, index: int, trigger: Trigger, now_ns: int, only: int | None = None) -> Iterator[Firing]:
        """Look at queues that are above their bound: is it for long enough?"""
        for subject in list(self.queues) if only is None else [only]:
            episode = self._episodes.get((index, subject))
            listener, queue = self._listeners.get(subject), self.queues.get(subject)
            if episode is None or episode.since_ns < 0 or queue is None:
                continue
            if now_ns - episode.since_ns < trigger.time_ns:
                continue
            self.held_ns = max(self.held_ns, now_ns)
            if not episode.fired:
                episode.fired = True
                value = 100 * queue.length / queue.limit if trigger.percent and queue.limit else queue.length
                yield Firing(
                    episode.since_ns + trigger.time_ns, trigger.text, value, trigger.unit,
                    listener.address if listener else f"listener {subject}", listener.pid if listener else 0,
                    count=queue.length,
                )  # fmt: skip

    def _is_above(self, trigger: Trigger, queue: QueueState) -> bool:
        if trigger.percent:
            return queue.limit > 0 and trigger.exceeds(100 * queue.length / queue.limit)
        return trigger.exceeds(queue.length)

    def _episode(self, index: int, subject: int) -> _Episode:
        return self._episodes.setdefault((index, subject), _Episode())

    def _name(self, trigger: Trigger) -> str:
        return {STALL: "event loop", WAIT: "accept queue"}.get(trigger.quantity, trigger.function)

    def _is_about(self, trigger: Trigger, probe: int) -> bool:
        """Return whether a trigger is about this probe's spans; -1 stands for event loop iterations."""
        if probe == -1:
            return trigger.quantity == STALL
        return probe in self._ids.get(trigger.text, ())

    def _probes_of(self, trigger: Trigger) -> set[int]:
        if trigger.quantity == STALL:
            return {probe.id for probe in self._probes.values() if probe.kind == ITERATION}
        kind, names = (
            (LISTENER, {"connection accepted"})
            if trigger.quantity == WAIT
            else (CALL, {trigger.function, trigger.function.rpartition(":")[2]})
        )
        return {
            probe.id for probe in self._probes.values() if probe.kind == kind and names & {probe.name, probe.symbol}
        }


def _mask(ids: Iterable[int]) -> npt.NDArray[np.bool_]:
    mask = np.zeros(2**16, bool)
    mask[list(ids)] = True
    return mask


def _bound_size(memory: dict[Any, Any]) -> None:
    while len(memory) > _MAX_REMEMBERED:
        del memory[next(iter(memory))]
