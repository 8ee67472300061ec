"""The reader: CPU per event from the ring buffer to the file, beside bcc's own callback that only counts.

A producer turns each getppid of a C program into one record of the wire format. Both readers look at the
ring as often as ``stallscope record`` does; only their CPU time is counted, not the producer's.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import workload
from figures import BenchError, Figure, Findings

from stallscope.tracer.capture.bpf import BpfMap, attach_raw_tracepoint
from stallscope.tracer.capture.loader import RAW_TRACEPOINT, Loader
from stallscope.tracer.capture.recorder import FLUSH_ROWS, READ_NS
from stallscope.tracer.capture.ring import RingReader
from stallscope.tracer.manifest import Manifest
from stallscope.tracer.recording import RecordingWriter

EVENTS = 2_000_000
FAST = 500_000
SLOW = 200_000
GOAL_NS = 150
RING_BYTES = 8 << 20
POLL_S = READ_NS / 1e9
SOURCE = Path(__file__).with_name("producer.bpf.c")
PEER = Path(__file__).with_name("bcc_reader.py")
_SYS_GETPPID = 110  # Linux arch/x86/entry/syscalls/syscall_64.tbl


@dataclass(frozen=True)
class Read:
    """What one reader did: records it got, records that the full ring refused, and its CPU time in ns."""

    events: int
    lost: int
    cpu_ns: int

    @property
    def ns_per_event(self) -> float:
        """Return the CPU time of one record."""
        return self.cpu_ns / max(self.events, 1)


def flags(pid: int) -> list[str]:
    """Return the compiler flags of the producer."""
    pages = RING_BYTES // mmap.PAGESIZE
    return [f"-DRING_PAGES={pages}", f"-DSYS_getppid={_SYS_GETPPID}", f"-DPRODUCER={pid}"]


class OurReader:
    """Our reader on a producer of its own: RingReader, concatenation, RecordingWriter."""

    def __init__(self, pid: int, folder: Path) -> None:
        """Compile, load and attach the producer."""
        self._file = folder / "reader.stall"
        text = SOURCE.read_text(encoding="utf-8")
        loaded = Loader().load(text, flags(pid), {"produce": RAW_TRACEPOINT}, ["events", "lost"])
        if loaded.refused:
            raise BenchError(f"the kernel refuses the producer: {loaded.refused['produce']}")
        self._ring = RingReader(loaded.maps["events"], RING_BYTES)
        self._lost = BpfMap(loaded.maps["lost"], np.dtype("<u4"), np.dtype("<u8"))
        self._program = loaded.programs["produce"]
        self._fds = list(loaded.maps.values())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the producer send for as long as this lasts."""
        handle = attach_raw_tracepoint(self._program, "sys_enter")
        try:
            yield
        finally:
            os.close(handle)

    def read(self, count: int, produce: Callable[[], None]) -> Read:
        """Start the producer and write ``count`` events into a recording."""
        lost_before = self._lost_so_far()
        events = 0
        pending = []
        with self.attached(), RecordingWriter(self._file, _manifest()) as writer:
            produce()
            began_ns = time.process_time_ns()
            while events + self._lost_so_far() - lost_before < count:
                time.sleep(POLL_S)
                pending.append(self._ring.read())
                events += len(pending[-1])
                if sum(map(len, pending)) >= FLUSH_ROWS:
                    writer.write(np.concatenate(pending))
                    pending.clear()
            writer.write(np.concatenate([np.zeros(0, pending[0].dtype) if pending else self._ring.read(), *pending]))
            cpu_ns = time.process_time_ns() - began_ns
        self._file.unlink()
        return Read(events, self._lost_so_far() - lost_before, cpu_ns)

    def close(self) -> None:
        """Free the producer and its ring."""
        self._ring.close()
        for fd in (*self._fds, self._program):
            os.close(fd)

    def _lost_so_far(self) -> int:
        found = self._lost.lookup(0)
        return 0 if found is None else int(found[0])


class BccReader:
    """bcc's reader, in a process of its own (``bcc_reader.py``) that loads the same producer."""

    def __init__(self, pid: int) -> None:
        """Start it and wait until it has compiled.

        Raises:
            BenchError: it cannot; carries its last words.
        """
        self._process = subprocess.Popen(
            [sys.executable, PEER, SOURCE, str(POLL_S), *flags(pid)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._expect("ready")

    def read(self, count: int, produce: Callable[[], None]) -> Read:
        """Start the producer and count ``count`` events."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        self._expect("attached")
        produce()
        return Read(**json.loads(self._line()))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _expect(self, word: str) -> None:
        if self._line() != word:
            self._process.kill()
            lines = self._process.communicate()[1].strip().splitlines()
            raise BenchError(f"bcc's reader: {lines[-1] if lines else 'it said nothing'}")


def bench(*, quick: bool) -> Findings:
    """Return CPU per event at full size, and what was lost at the steady rate."""
    found = Findings(
        f"reader: {EVENTS:,} events of 56 bytes, ring of {RING_BYTES >> 20} MB, looked at every {POLL_S * 1000:.0f} ms"
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stallscope-bench-")))
        program = stack.enter_context(workload.running(workload.build(folder)))
        ours = OurReader(program.pid, folder)
        stack.callback(ours.close)
        theirs: BccReader | None = None
        try:
            theirs = BccReader(program.pid)
            stack.callback(theirs.close)
        except BenchError as error:
            found.notes.append(str(error))
        fast = _take_turns(program, ours, theirs, EVENTS, FAST, 2 if quick else 5)
        steady = _take_turns(program, ours, theirs, SLOW * (2 if quick else 10), SLOW, 1)
    for rate, (mine, bccs) in ((FAST, fast), (SLOW, steady)):
        cpu = [read.ns_per_event for read in mine]
        name = f"CPU per event at {rate:,}/s, ns"
        peer_cpu = [read.ns_per_event for read in bccs]
        found.figures.append(
            Figure(name, cpu, "bcc callback that counts", peer_cpu, f"under {GOAL_NS} ns", median(cpu) < GOAL_NS)
        )
        lost = [float(read.lost) for read in mine]
        peer_lost = [float(read.lost) for read in bccs]
        goal = "0" if rate == SLOW else ""
        found.figures.append(Figure("  events lost", lost, "bcc callback that counts", peer_lost, goal, not any(lost)))
    found.notes.append("ours ends in a recording on disk; bcc's callback counts and keeps nothing")
    return found


def _take_turns(
    program: workload.Workload, ours: OurReader, theirs: BccReader | None, count: int, rate: int, rounds: int
) -> tuple[Sequence[Read], Sequence[Read]]:
    mine: list[Read] = []
    bccs: list[Read] = []
    for _ in range(rounds):
        for reader, reads in ((ours, mine), (theirs, bccs)):
            if reader is not None:
                reads.append(reader.read(count, lambda: program.start(workload.GETPPID, count, rate)))
                program.result()
    return mine, bccs


def _manifest() -> Manifest:
    return Manifest(time.monotonic_ns(), 0, (), (), (), (), 0, 0, 0, {}, ())
