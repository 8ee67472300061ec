"""What one stack sample costs the server, ours beside ``perf record --call-graph dwarf`` with as many bytes of stack.

A server runs one script of fixed length, and its main thread's CPU time is compared with and without sampling, at a
rate far above any that ``record`` allows, so that the difference stands out. Both copy 24 KB a sample; perf unwinds
afterwards as we do, and its reader writes to a file, while ours only counts.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from bpf_statistics import kernel_statistics
from figures import BenchError, Figure, Findings
from lab.server import Server, running_server

from stallscope.tracer.capture.program import Program
from stallscope.tracer.capture.stack_sampler import StackOptions, StackSampler, stack_sources

RATE_HZ = 5_000
PERIOD_NS = 1_000_000_000 // RATE_HZ
STACK_BYTES = 16_384
STALL_NS = 10_000_000
LOOPS, QUICK_LOOPS = 30_000_000, 10_000_000
READY_S = 30


def bench(*, quick: bool) -> Findings:
    """Return the CPU time that a sample adds to the sampled thread."""
    rounds, loops = (3, QUICK_LOOPS) if quick else (7, LOOPS)
    found = Findings(f"stacks: one sample of registers and {STACK_BYTES // 1024} KB of stack, at {RATE_HZ:,} Hz")
    ours: list[float] = []
    theirs: list[float] = []
    kept: list[float] = []
    perf = shutil.which("perf")
    with running_server("2.8.17") as server, kernel_statistics(), tempfile.TemporaryDirectory() as folder:
        program = Program([], ring_bytes=1 << 16, min_duration_ns=0, iteration_min_ns=STALL_NS, more=stack_sources())
        try:
            sampler = StackSampler(program)
            for _ in range(rounds):
                plain_ns = _work_ns(server, loops)
                added_ns, taken, sent = _by_us(server, sampler, loops)
                ours.append((added_ns - plain_ns) / max(taken, 1))
                kept.append(100 * sent / max(taken, 1))
                if perf:
                    added_ns, taken = _by_perf(server, perf, Path(folder), loops)
                    theirs.append((added_ns - plain_ns) / max(taken, 1))
            sampler.close()
        finally:
            program.close()
    if not perf:
        found.notes.append("perf is not installed: apt-get install linux-perf")
    found.figures = [
        Figure("CPU added a sample, ns", ours, "perf record --call-graph dwarf,24576", theirs),
        Figure("samples kept, %", kept),
        Figure("of a CPU at 199 Hz, the default, %", [199 * cost / 1e7 for cost in ours]),
    ]
    return found


def _work_ns(server: Server, loops: int) -> int:
    """Return the CPU time that the script takes of the server's main thread."""
    before = _cpu_ns(server)
    server.command("EVAL", f"for i = 1, {loops} do end return 1", "0")
    return _cpu_ns(server) - before


def _cpu_ns(server: Server) -> int:
    return int(Path(f"/proc/{server.pid}/task/{server.pid}/schedstat").read_text(encoding="ascii").split()[0])


def _by_us(server: Server, sampler: StackSampler, loops: int) -> tuple[int, int, int]:
    """Return the work's CPU time while it is sampled, and how many samples were taken and kept."""
    before = sampler.counters()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            sampler.ring.read(10_000)
            time.sleep(0.01)

    reader = threading.Thread(target=read)
    reader.start()
    sampler.add(server.pid, StackOptions(PERIOD_NS, always=True), STALL_NS)
    try:
        used_ns = _work_ns(server, loops)
    finally:
        sampler.remove(server.pid)
        done.set()
        reader.join()
    after = sampler.counters()
    return used_ns, after.hits - before.hits, after.sent - before.sent


def _by_perf(server: Server, perf: str, folder: Path, loops: int) -> tuple[int, int]:
    """Return the work's CPU time under perf, and how many samples it kept."""
    control, answer = folder / "control", folder / "answer"
    for fifo in (control, answer):
        if not fifo.exists():
            os.mkfifo(fifo)
    words = ["record", "-e", "cpu-clock", "-c", str(PERIOD_NS), "--call-graph", f"dwarf,{STACK_BYTES}", "-D", "-1"]
    words += ["--control", f"fifo:{control},{answer}", "-o", str(folder / "perf.data"), "-t", str(server.pid)]
    # opened for both directions, so that neither side waits for the other
    with open(control, "r+b", buffering=0) as asks, open(answer, "r+b", buffering=0) as answers:  # noqa: PTH123
        recorder = subprocess.Popen([perf, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            asks.write(b"enable\n")
            if not select.select([answers], [], [], READY_S)[0]:
                raise BenchError("perf record did not begin")
            used_ns = _work_ns(server, loops)
        finally:
            recorder.send_signal(signal.SIGINT)
            _, told = recorder.communicate()
        if select.select([answers], [], [], 0)[0]:
            os.read(answers.fileno(), 64)
    samples = re.search(rb"\((\d+) samples\)", told)
    if not samples:
        raise BenchError(f"perf record kept nothing: {told.decode(errors='replace').strip().splitlines()[-1:]}")
    return used_ns, int(samples[1])
