"""Plays a recording's events to the parts of ``watch`` as its loop would, with a clock of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from recordings import COUNTER_ID, COUNTER_NAMES, MS, WALL_OFFSET_NS, at, manifest

from stallscope.tracer.boundary import Boundary, Moment
from stallscope.tracer.layout import UNFINISHED_NS
from stallscope.tracer.manifest import ITERATION, Manifest, ProbeCounters
from stallscope.tracer.recording import empty_events
from stallscope.tracer.watch.captures import CaptureOptions, Captures, Finished
from stallscope.tracer.watch.evaluation import TriggerState, UnderWay
from stallscope.tracer.watch.folder import CaptureFolder
from stallscope.tracer.watch.preroll import Preroll
from stallscope.tracer.watch.triggers import parse_triggers

SAMPLED = {2, 3}
DISK_S = 60.0


@dataclass
class Watch:
    """The loop of ``watch`` over events whose times are known.

    Attributes:
        outcomes: what each trigger led to, with the time in ms.
        hooked: names of the kernel's counters whose functions are hooked.
    """

    folder: CaptureFolder
    triggers: Sequence[str] = ("stall>50ms",)
    options: CaptureOptions = field(default_factory=CaptureOptions)
    manifest: Manifest = field(default_factory=manifest)
    memory_bytes: int = 64 * 2**20
    step_ms: int = 50
    chunk_ms: int = 500
    outcomes: list[tuple[float, str]] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    hooked: tuple[str, ...] = ()
    sent: dict[int, int] = field(default_factory=dict)
    kernel: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = TriggerState(parse_triggers(self.triggers))
        self.preroll = Preroll(self.options.before_ns, self.memory_bytes, self.boundary(0))
        self.captures = Captures(self.options, self.folder, self.preroll)
        self.state.follow(self.manifest)
        self.preroll.follow(self.manifest)

    def boundary(self, now_ms: float) -> Boundary:
        kernel = {info.inode: {**info.counters_start, **self.kernel} for info in self.manifest.namespaces}
        counters = {
            probe.id: ProbeCounters(hits=self.sent.get(probe.id, 0) + 2, sent=self.sent.get(probe.id, 0), short_calls=2)
            for probe in self.manifest.probes
            if probe.id not in SAMPLED
        }
        return Boundary(at(now_ms), counters, Moment(kernel, names=self.hooked))

    def play(self, events: npt.NDArray[np.void], until_ms: float, *, from_ms: float = 0) -> Watch:
        """Read each event at the first step after its end; iterations are seen while they last."""
        ends = events["start_ns"] + events["duration_ns"]
        loop = [probe.id for probe in self.manifest.probes if probe.kind == ITERATION]
        iterations = np.isin(events["probe"], loop)
        now_ms, last_ns = from_ms, 0 if from_ms == 0 else at(from_ms)
        while now_ms < until_ms:
            now_ms += self.step_ms
            now_ns = at(now_ms)
            batch = events[(ends > last_ns) & (ends <= now_ns)]
            last_ns = now_ns
            for probe, count in zip(*np.unique(batch["probe"], return_counts=True), strict=True):
                self.sent[int(probe)] = self.sent.get(int(probe), 0) + int(count)
            for row in batch[batch["probe"] == COUNTER_ID]:
                self.kernel[COUNTER_NAMES[int(row["value"][0])]] = int(row["value"][1])
            self.captures.add(batch)
            running = events[iterations & (events["start_ns"] < now_ns) & (ends > now_ns)]
            under_way = [UnderWay(int(row["tid"]), int(row["start_ns"]), int(row["pid"])) for row in running]
            firings = self.state.observe(batch, now_ns, under_way)
            if now_ms % self.chunk_ms == 0:
                self.captures.close_chunk(self.boundary(now_ms), self.manifest)
            wall_ns = now_ns + WALL_OFFSET_NS
            outcome = self.captures.fire(firings, self.state.held_ns, now_ns, wall_ns, self.manifest)
            if outcome:
                self.outcomes.append((now_ms, outcome))
            if self.captures.is_due(now_ns):
                unfinished = running.copy()
                unfinished["duration_ns"] = UNFINISHED_NS
                self.captures.finish(self.boundary(now_ms), unfinished, self.manifest)
                for writer in self.captures._finishing:  # the disk knows nothing of this clock
                    writer.join(DISK_S)
                self.finished += self.captures.take_finished()
                self.outcomes.append((now_ms, "finished"))
        return self

    def end(self) -> list[Finished]:
        """Wait for the writers."""
        self.captures.close()
        self.finished += self.captures.take_finished()
        return self.finished


def watch(path: Path, *triggers: str, max_captures: int = 20, max_bytes: int = 2**30, **options: float) -> Watch:
    """Return a watch that captures into a folder; options are those of ``CaptureOptions``, in ms."""
    times = {f"{name}_ns": round(value * MS) for name, value in options.items()}
    folder = CaptureFolder(path, max_captures, max_bytes)
    return Watch(folder, triggers or ("stall>50ms",), CaptureOptions(**times))


def nothing() -> npt.NDArray[np.void]:
    """Return no events."""
    return empty_events()
