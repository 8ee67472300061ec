"""Makes recordings whose truth is known, because it was written by hand.

``python tests/unit/recordings.py`` writes the golden files into tests/data/; every test may also build
its own. Times are given in milliseconds after the start of the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stallscope.probes.catalogue import Field
from stallscope.tracer.capture.listener import EVENTS, FIELDS
from stallscope.tracer.layout import NO_STACK, STATE_ON_CPU, UNFINISHED_NS
from stallscope.tracer.manifest import (
    ACCEPT,
    CALL,
    COUNTER,
    ITERATION,
    LISTENER,
    QUEUE,
    STACK,
    Counters,
    ListenerInfo,
    Manifest,
    NamespaceInfo,
    Note,
    ProbeCounters,
    ProbeInfo,
    TargetInfo,
)
from stallscope.tracer.recording import RecordingWriter, empty_events
from stallscope.tracer.stack_table import KERNEL, StackFrame, StackTable

DATA = Path(__file__).parent.parent / "data"

STARTED_NS = 7_000_000_000_000
WALL_OFFSET_NS = 1_750_000_000_000_000_000 - STARTED_NS
MS = 1_000_000
PID = 4711
LISTENER_FD = 5
LIMIT = 511

ITERATION_ID, ACCEPT_ID, QUEUE_ID, COUNTER_ID = 0, 1, 2, 3
CRON, CLIENTS, RESIZE, TRIM, PURGE, FREE = 4, 5, 6, 7, 8, 9
STACK_ID = 15
STACK_PROBE = ProbeInfo(
    STACK_ID, "stack sample", STACK, "CPU clock at 100 Hz and sched_switch, always",
    (Field("weight_ns", "ns", 0), Field("state", "", 1, bits=32)),
)  # fmt: skip
ON_CPU, RUNNABLE_STATE, ASLEEP_STATE, BLOCKED_STATE = STATE_ON_CPU, 0, 1, 2
LOOP_FRAMES = "_start main aeMain aeProcessEvents.part.0"

PROBES = (
    ProbeInfo(
        ITERATION_ID,
        "event loop iteration",
        ITERATION,
        "raw tracepoint",
        (Field("ready", "file descriptors", 0), Field("accepted", "connections", 1)),
        pids=(PID,),
    ),
    ProbeInfo(
        ACCEPT_ID,
        "accept",
        ACCEPT,
        "raw tracepoint",
        (Field("listener_fd", "file descriptor", 0), Field("fd", "file descriptor", 1, signed=True)),
        pids=(PID,),
    ),
    ProbeInfo(
        QUEUE_ID,
        "accept queue",
        QUEUE,
        "sampled every 10 ms",
        (
            Field("queue_length", "connections", 0, bits=32),
            Field("queue_limit", "connections", 0, shift=32, bits=32),
            Field("drops", "connections", 1),
            Field("listener", "index", 2),
        ),
    ),
    ProbeInfo(
        COUNTER_ID,
        "kernel counter",
        COUNTER,
        "sampled every 10 ms",
        (Field("counter", "index", 0), Field("count", "events", 1), Field("namespace", "index", 2)),
    ),
    ProbeInfo(CRON, "serverCron", CALL, "uprobe", symbol="serverCron", pids=(PID,)),
    ProbeInfo(CLIENTS, "clientsCron", CALL, "uprobe", symbol="clientsCron", pids=(PID,)),
    ProbeInfo(
        RESIZE,
        "clientsCronResizeQueryBuffer",
        CALL,
        "uprobe",
        (
            Field("fd", "file descriptor", 0, bits=32, signed=True),
            Field("last_interaction_s", "s since 1970", 0, shift=32, bits=32),
            Field("allocated_bytes", "bytes", 1),
            Field("free_bytes", "bytes", 2),
        ),
        symbol="clientsCronResizeQueryBuffer",
        pids=(PID,),
    ),
    ProbeInfo(
        TRIM,
        "sdsRemoveFreeSpace",
        CALL,
        "uprobe",
        (Field("length_bytes", "bytes", 0), Field("free_bytes", "bytes", 1)),
        symbol="sdsRemoveFreeSpace",
        pids=(PID,),
    ),
    ProbeInfo(
        PURGE,
        "je_pages_purge",
        CALL,
        "uprobe",
        (Field("purged_bytes", "bytes", 0),),
        symbol="je_pages_purge",
        pids=(PID,),
    ),
    ProbeInfo(FREE, "freeClient", CALL, "uprobe", symbol="freeClient", pids=(PID,)),
)

FIRST_REQUEST_ID = 10
REQUEST_PROBES = tuple(
    ProbeInfo(FIRST_REQUEST_ID + index, name, LISTENER, "fentry and kprobe", FIELDS)
    for index, name in enumerate(EVENTS)
)
REQUEST_ID = {probe.name: probe.id for probe in REQUEST_PROBES}

COUNTER_NAMES = ("ListenOverflows", "ListenDrops")


def manifest(**changes: object) -> Manifest:
    """Return the manifest of one Redis 2.8.17 with one listener, as it is at the start."""
    made = Manifest(
        started_ns=STARTED_NS,
        wall_offset_ns=WALL_OFFSET_NS,
        probes=PROBES,
        targets=(
            TargetInfo(
                PID,
                STARTED_NS,
                "/opt/redis/redis-server",
                "ab12",
                version="2.8.17",
                allocator="jemalloc-3.6.0",
            ),
        ),
        listeners=(ListenerInfo(0, "127.0.0.1:6379", 6379, PID, 1001, 0, LIMIT),),
        namespaces=(
            NamespaceInfo(0, 4026531840, {"ListenOverflows": 900, "ListenDrops": 950}, {"net.core.somaxconn": "4096"}),
        ),
        min_duration_ns=1 * MS,
        stall_ns=10 * MS,
        sample_ns=10 * MS,
        rungs={"functions": "uprobe", "event loop": "raw tracepoint", "listener": "sampled every 10 ms"},
        counter_names=COUNTER_NAMES,
        command=("stallscope", "record", "-p", str(PID)),
        host={"kernel": "6.1.0-18-cloud-amd64"},
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def hooked_manifest(
    *, seen: dict[str, int] | None = None, seen_elsewhere: dict[str, int] | None = None, **changes: object
) -> Manifest:
    """Return the manifest of a recording for which the kernel's functions were hooked.

    Args:
        seen, seen_elsewhere: what they added to the kernel's counters, as the footer tells; by default not known.
    """
    made = manifest(probes=(*PROBES, *REQUEST_PROBES))
    return replace(
        made,
        rungs={**made.rungs, "overflows": "fentry and kprobe"},
        namespaces=(replace(made.namespaces[0], seen=seen or {}, seen_elsewhere=seen_elsewhere or {}),),
        **changes,  # type: ignore[arg-type]
    )


def at(time_ms: float) -> int:
    """Return a time in milliseconds after the start as CLOCK_MONOTONIC ns."""
    return STARTED_NS + round(time_ms * MS)


_Row = tuple[int, int, int, int, tuple[int, int, int], int]


@dataclass
class Builder:
    """Collects rows and writes them in the order in which they would have been recorded: by their end."""

    manifest: Manifest = field(default_factory=manifest)
    tid: int = PID
    stacks: StackTable = field(default_factory=StackTable)
    _rows: list[_Row] = field(default_factory=list)
    _unfinished: list[_Row] = field(default_factory=list)

    def span(
        self,
        probe: int,
        start_ms: float,
        duration_ms: float | None,
        *value: int,
        tid: int | None = None,
        stack: int = NO_STACK,
    ) -> Builder:
        """Add a span; without a duration it had not ended."""
        values = (*value, 0, 0, 0)[:3]
        thread = self.tid if tid is None else tid
        if duration_ms is None:
            self._unfinished.append((at(start_ms), UNFINISHED_NS, probe, thread, values, stack))
        else:
            duration_ns = round(duration_ms * MS)
            self._rows.append((at(start_ms), duration_ns, probe, thread, values, stack))
        return self

    def resize(self, start_ms: float, duration_ms: float | None, *, idle_s: int, allocated: int, free: int) -> Builder:
        """Add a call of clientsCronResizeQueryBuffer on the client with fd 77."""
        wall_s = (at(start_ms) + WALL_OFFSET_NS) // 1_000_000_000
        return self.span(RESIZE, start_ms, duration_ms, 77 | (wall_s - idle_s) << 32, allocated, free)

    def accepts(self, first_ms: float, count: int, every_ms: float = 0.02) -> Builder:
        """Add accepted connections."""
        for index in range(count):
            self.span(ACCEPT_ID, first_ms + index * every_ms, 0.005, LISTENER_FD, 100 + index)
        return self

    def queue(self, time_ms: float, length: int, drops: int, *, listener: int = 0, limit: int = LIMIT) -> Builder:
        """Add a sample of the accept queue."""
        return self.span(QUEUE_ID, time_ms, 0, length | limit << 32, drops, listener)

    def counter(self, time_ms: float, count: int, *, counter: int = 0, namespace: int = 0) -> Builder:
        """Add a sample of a kernel counter."""
        return self.span(COUNTER_ID, time_ms, 0, counter, count, namespace)

    def request(
        self,
        time_ms: float,
        event: str,
        port: int,
        *,
        queue_length: int = 0,
        wait_ms: float = 0,
        listener: int = 0,
        peer: tuple[int, int] = (0, 0xFFFF_7F00_0001),
    ) -> Builder:
        """Add an event of a listener, by 127.0.0.1 unless ``peer`` says otherwise; the SYN queue holds 3."""
        queue = queue_length | LIMIT << 24 | port << 48
        return self.span(REQUEST_ID[event], time_ms, wait_ms, queue, *peer, tid=listener, stack=3)

    def enters(self, time_ms: float, port: int, wait_ms: float) -> Builder:
        """Add a connection that reaches the accept queue and is accepted."""
        self.request(time_ms, "connection enqueued", port, queue_length=1)
        return self.request(time_ms, "connection accepted", port, wait_ms=wait_ms)

    def sample(
        self, time_ms: float, functions: str, weight_ms: float = 10, state: int = ON_CPU, kernel: str = ""
    ) -> Builder:
        """Add a stack sample, of redis-server's functions below the event loop and of the kernel's."""
        frames = [StackFrame(name, "redis-server") for name in f"{LOOP_FRAMES} {functions}".split()]
        stack = self.stacks.add([*frames, *(StackFrame(name, KERNEL) for name in kernel.split())])
        away_ms = 0 if state == ON_CPU else weight_ms
        return self.span(STACK_ID, time_ms, away_ms, round(weight_ms * MS), state, stack=stack)

    def events(self) -> npt.NDArray[np.void]:
        """Return all rows as records."""
        rows = sorted(self._rows, key=lambda row: row[0] + row[1]) + self._unfinished
        events = empty_events(len(rows))
        for event, (start, duration, probe, tid, values, stack) in zip(events, rows, strict=True):
            event["start_ns"], event["duration_ns"], event["probe"] = start, duration, probe
            event["pid"], event["tid"], event["stack"] = PID, tid, stack
            event["value"] = np.array(values, np.uint64)
        return events

    def write(
        self,
        path: Path,
        end_ms: float,
        counters: dict[int, ProbeCounters] | None = None,
        *,
        overflows_end: int | None = None,
        complete: bool = True,
        batches: int = 3,
    ) -> Path:
        """Write the recording; what the kernel counted follows from the rows unless it is given.

        Args:
            overflows_end: ListenOverflows at the end, of namespace 0.
            complete: with a footer; otherwise it looks as after kill -9.
        """
        events = self.events()
        counted = {**hits_of(events, (*PROBES, *self.manifest.probes)), **(counters or {})}
        snapshot = Counters(at(end_ms), counted)
        names = self.manifest.namespaces[0]
        ends = {"ListenOverflows": overflows_end or 900, "ListenDrops": (overflows_end or 900) + 50}
        final = replace(
            self.manifest,
            ended_ns=at(end_ms),
            wall_offset_end_ns=self.manifest.wall_offset_ns,
            ended_by="duration",
            namespaces=(replace(names, counters_end=ends), *self.manifest.namespaces[1:]),
        )
        writer = RecordingWriter(path, self.manifest, self.stacks)
        parts = np.array_split(np.arange(len(events)), batches)
        for part in parts[:-1]:
            writer.write(events[part], snapshot)
        if complete:
            writer.finish(events[parts[-1]], snapshot, final)
        else:
            writer.write(events[parts[-1]])
            writer.abandon()
        return path


def hits_of(events: npt.NDArray[np.void], probes: Iterable[ProbeInfo]) -> dict[int, ProbeCounters]:
    """Return the counters that fit these records: nothing short, nothing lost."""
    ids = {probe.id for probe in probes if probe.id not in (QUEUE_ID, COUNTER_ID)}
    counts = {probe: int(np.count_nonzero(events["probe"] == probe)) for probe in ids}
    return {probe: ProbeCounters(hits=count, sent=count) for probe, count in counts.items()}


def add_storm(builder: Builder, start_ms: float, first_overflow: int = 900, first_drops: int = 40) -> Builder:
    """Add one blocked cron tick of 620 ms and what the accept queue did meanwhile.

    The truth: serverCron 618 ms > clientsCron 616 ms > 5 resizes of 120 ms > 5 trims of 118 ms > 5 purges of
    20 ms and 4 MB; so the trims' own time is 490 ms. The queue fills from 3 to 512 of 511 within 500 ms; then
    41 connections are refused inside the stall and 2 more until the queue is empty, 30 ms after it. 512
    connections are accepted after the stall, none inside.
    """
    builder.span(ITERATION_ID, start_ms, 620, 4, 0)
    builder.span(CRON, start_ms + 1, 618).span(CLIENTS, start_ms + 2, 616)
    for index in range(5):
        begin = start_ms + 3 + index * 122
        builder.resize(begin, 120, idle_s=3 + index, allocated=56_000_000, free=28_000_000)
        builder.span(TRIM, begin + 1, 118, 28_000_000, 28_000_000)
        builder.span(PURGE, begin + 90, 20, 4_000_000)
    builder.queue(start_ms - 5, 3, first_drops).counter(start_ms - 5, first_overflow)
    for step in range(1, 50):
        builder.queue(start_ms - 5 + step * 10, 3 + step * 10, first_drops)
    builder.queue(start_ms + 495, 512, first_drops)
    builder.queue(start_ms + 505, 512, first_drops + 11).counter(start_ms + 505, first_overflow + 11)
    builder.queue(start_ms + 515, 512, first_drops + 30).counter(start_ms + 515, first_overflow + 31)
    builder.queue(start_ms + 525, 512, first_drops + 41).counter(start_ms + 525, first_overflow + 41)
    builder.accepts(start_ms + 621, 512)
    builder.queue(start_ms + 622, 460, first_drops + 41)
    builder.queue(start_ms + 630, 300, first_drops + 43).counter(start_ms + 630, first_overflow + 43)
    builder.queue(start_ms + 640, 90, first_drops + 43)
    builder.queue(start_ms + 650, 2, first_drops + 43)
    return builder


def quiet(builder: Builder, end_ms: float, *, overflow: int = 900, drops: int = 40, after_ms: float = 0) -> Builder:
    """Add the samples of once a second, of a queue that holds two connections at most."""
    time_ms = after_ms
    while time_ms <= end_ms:
        builder.queue(time_ms, int(time_ms / 1000) % 3, drops).counter(time_ms, overflow)
        builder.counter(time_ms, overflow + 50, counter=1)
        time_ms += 1000
    return builder


def known_call(path: Path) -> Path:
    """Write 4 s with one storm at 1 s, 3 short crons before it, and 7 iterations that were only counted."""
    builder = Builder()
    quiet(builder, 900)
    for start_ms, duration_ms in ((100, 1.5), (200, 2.0), (300, 2.5)):
        builder.span(CRON, start_ms, duration_ms)
    add_storm(builder, 1000)
    quiet(builder, 4000, overflow=943, drops=83, after_ms=2000)
    counters = {
        ITERATION_ID: ProbeCounters(hits=8, sent=1, short_calls=7, short_ns=30 * MS),
        CRON: ProbeCounters(hits=16, sent=4, short_calls=12, short_ns=6 * MS),
    }
    return builder.write(path, 4000, counters, overflows_end=943)


def cut_short(path: Path) -> Path:
    """Write the beginning of the same storm, killed 505 ms into the stall: no footer, no end of the stall."""
    builder = Builder()
    builder.span(PURGE, 1093, 20, 4_000_000)
    builder.queue(995, 3, 40).counter(995, 900)
    builder.queue(1495, 512, 40)
    builder.queue(1505, 512, 51).counter(1505, 911)
    counters = {ITERATION_ID: ProbeCounters(hits=20, short_calls=20, short_ns=5 * MS)}
    return builder.write(path, 1505, counters, complete=False)


def with_losses(path: Path) -> Path:
    """Write the storm with 3 purges and 2 entries lost to a full ring, and a restart noted."""
    builder = Builder(manifest(notes=(Note(at(3000), "process 4711 was restarted as 4811"),)))
    add_storm(builder, 1000)
    counters = {
        PURGE: ProbeCounters(hits=8, sent=5, lost=3),
        TRIM: ProbeCounters(hits=7, sent=5, lost_starts=2, unpaired=2),
    }
    return builder.write(path, 4000, counters, overflows_end=943)


def empty(path: Path) -> Path:
    """Write a recording of 2 s in which no row was written at all."""
    return Builder().write(path, 2000)


def two_stalls(path: Path) -> Path:
    """Write two storms, the second 40 ms after the first has drained, and an overflow in neither."""
    builder = Builder()
    add_storm(builder, 1000)
    add_storm(builder, 1690, 943, 83)
    builder.queue(3000, 512, 126).queue(3010, 512, 133).counter(3010, 993).queue(3020, 0, 133)
    return builder.write(path, 4000, overflows_end=993)


def refused(path: Path) -> Path:
    """Write the storm as the hooked kernel functions see it.

    The truth: 20 clients (ports 40000 to 40019) are refused at the SYN twice inside the stall, 14 ms apart, and
    40000 once more in the drain. 40020's third ACK is refused inside the stall and in the drain. 40001, 40002 and
    40020 get in afterwards and wait 4, 6 and 1 ms for accept(). Five more get in at the first attempt
    and wait 615 ms for the end of the stall. Five overflows are of a listener that is not watched.
    """
    seen, elsewhere = ({"ListenOverflows": count, "ListenDrops": count} for count in (43, 5))
    builder = add_storm(Builder(hooked_manifest(seen=seen, seen_elsewhere=elsewhere)), 1000)
    for index in range(5):
        builder.request(1005 + index, "SYN taken", 50000 + index).enters(1006 + index, 50000 + index, 615)
    builder.request(1450, "SYN taken", 40020, queue_length=500)
    for index in range(20):
        for first_ms in (1501, 1515):
            time_ms = first_ms + index / 10
            builder.request(time_ms, "SYN refused: accept queue full", 40000 + index, queue_length=512)
    for time_ms in (1518, 1626):
        builder.request(time_ms, "third ACK refused silently: accept queue full", 40020, queue_length=512)
    builder.request(1625, "SYN refused: accept queue full", 40000, queue_length=512)
    for port, wait_ms in ((40001, 4), (40002, 6)):
        builder.request(1630, "SYN taken", port).enters(1631, port, wait_ms)
    builder.enters(1640, 40020, 1)
    builder.counter(3000, 948)
    return builder.write(path, 4000, overflows_end=948)


def slow_drain(path: Path) -> Path:
    """Write a Redis 7.4 that takes 10 connections every 5 ms while 3,000 a second come, from 1 s to 2 s.

    The truth: no iteration reaches the threshold. The queue is normal until 1050 ms, grows by 10 every 10 ms to
    512 of 511 at 1520 ms, and 488 connections are refused from then on until 2000 ms. In these 950 ms 1,900 are
    accepted, the queue grows by 462 from 50, so 2,850 come. It is empty again 260 ms later.
    """
    server = replace(
        manifest().targets[0],
        version="7.4.0",
        allocator="jemalloc-5.3.0",
        info={"config:max-new-connections-per-cycle": "10", "config:tcp-backlog": "511"},
    )
    builder = Builder(manifest(targets=(server,)))
    quiet(builder, 990)
    refused = 0
    for step in range(101):
        refused += 8 if step == 52 else 10 if step > 52 else 0
        builder.queue(1000 + step * 10, min(step * 10, 512), 40 + refused).counter(1000 + step * 10, 900 + refused)
    for step in range(26):
        builder.queue(2010 + step * 10, max(512 - 20 * (step + 1), 0), 40 + refused)
    for step in range(252):
        builder.accepts(1002 + step * 5, 10)
    quiet(builder, 4000, overflow=900 + refused, drops=40 + refused, after_ms=3000)
    counters = {ITERATION_ID: ProbeCounters(hits=800, short_calls=800, short_ns=400 * MS)}
    return builder.write(path, 4000, counters, overflows_end=900 + refused)


def sampled(path: Path) -> Path:
    """Write three stalls whose stacks were sampled, and a sample outside of them.

    The truth: at 1 s 400 ms: 300 ms in keysCommand (140 of them in dictNext), 60 ms ready to run in it, 40 ms in
    serverCron > databasesCron > dictRehashMilliseconds > dictRehash. At 2 s 200 ms: 190 ms asleep in debugCommand, in
    nanosleep of the kernel. At 3 s 100 ms: 38 ms in dictRehashMilliseconds, 62 ms in call > setCommand.
    At 4 s, in no stall, 10 ms in getCommand. serverCron is traced, nothing below it.
    """
    builder = Builder(manifest(probes=(*PROBES, STACK_PROBE)))
    quiet(builder, 4900)
    for start_ms, length_ms in ((1000, 400), (2000, 200), (3000, 100)):
        builder.span(ITERATION_ID, start_ms, length_ms, 1, 0)
    builder.span(CRON, 1360, 39)
    keys = "readQueryFromClient processInputBuffer processCommand call keysCommand"
    for step in range(30):
        builder.sample(1000 + step * 10, f"{keys} dictNext" if step < 14 else keys)
    builder.sample(1300, keys, 60, RUNNABLE_STATE, "asm_sysvec_apic_timer_interrupt irqentry_exit schedule")
    for step in range(4):
        builder.sample(1360 + step * 10, "serverCron databasesCron dictRehashMilliseconds dictRehash")
    sleep = "entry_SYSCALL_64_after_hwframe do_syscall_64 __x64_sys_clock_nanosleep do_nanosleep schedule"
    builder.sample(2001, f"{keys.rpartition(' ')[0]} debugCommand", 190, ASLEEP_STATE, sleep)
    builder.sample(3000, "serverCron databasesCron dictRehashMilliseconds", 38)
    builder.sample(3040, f"{keys.rpartition(' ')[0]} setCommand", 62)
    builder.sample(4000, f"{keys.rpartition(' ')[0]} getCommand")
    return builder.write(path, 5000)


GOLDEN: dict[str, Callable[[Path], Path]] = {
    "known-call": known_call,
    "cut-short": cut_short,
    "with-losses": with_losses,
    "empty": empty,
    "two-stalls": two_stalls,
    "refused": refused,
    "slow-drain": slow_drain,
    "sampled": sampled,
}


def main() -> None:
    """Write the golden files."""
    DATA.mkdir(exist_ok=True)
    for name, write in GOLDEN.items():
        write(DATA / f"{name}.stall")


if __name__ == "__main__":
    main()
