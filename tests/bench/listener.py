"""What watching a listener costs each connection: ours beside tcpsynbl and the same watch in bpftrace."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import workload
from bpf_statistics import KERNEL_FUNCTION_PROGRAMS, kernel_statistics, run_statistics
from figures import BenchError, Figure, Findings

from stallscope.tracer.capture.backlog import SockDiag
from stallscope.tracer.capture.listener import plan_listener
from stallscope.tracer.capture.listener_program import ListenerProgram
from stallscope.tracer.capture.recorder import READ_NS
from stallscope.tracer.manifest import ListenerInfo

CONNECTIONS = 3000
_TIMEOUT_S = 120.0
_LOOK_INTERVAL_S = 0.05
_SETTLE_S = 1.0

BPFTRACE = """
{entry}:tcp_conn_request {{ $sk = (struct sock *){sk}; @length = lhist($sk->sk_ack_backlog, 0, 2048, 64);
  if ($sk->sk_ack_backlog > $sk->sk_max_ack_backlog) {{ @full = count(); }} }}
{entry}:tcp_check_req {{ @acks = count(); }}
{entry}:inet_csk_complete_hashdance {{ @enqueued[{child}] = nsecs; }}
{leave}:inet_csk_accept /@enqueued[retval]/ {{ @wait = hist(nsecs - @enqueued[retval]); delete(@enqueued[retval]); }}
"""
"""Histograms of the queue's length and of the waits, and a count of refusals: less than ours, which keeps every one."""

_PROBES = 4
_KPROBE = BPFTRACE.format(entry="kprobe", leave="kretprobe", sk="arg2", child="arg1")

OURS, TCPSYNBL, SCRIPT = "ours", "tcpsynbl (libbpf-tools)", "bpftrace, kprobes"


@dataclass
class Samples:
    """Of one tracer: connections per second beside those without it, and what its programs did for each connection."""

    traced: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)
    run_ns: list[float] = field(default_factory=list)

    @property
    def slower(self) -> list[float]:
        """Return how much slower connections were in each pair, in percent."""
        return [100 * (1 - with_it / without) for with_it, without in zip(self.traced, self.plain, strict=True)]


def bench(*, quick: bool) -> Findings:
    """Return connections per second with and without each tracer, in turns, and its BPF run time.

    Raises:
        SurroundingsError: this kernel has neither kprobes nor fentry.
    """
    rounds = 3 if quick else 9
    plan = plan_listener()
    found = Findings(f"listener: one connection, of {CONNECTIONS:,} on loopback")
    found.notes.append(", ".join(f"{name} by {rung}" for name, rung in plan.rungs.items()))
    with (
        tempfile.TemporaryDirectory(prefix="stallscope-bench-") as folder,
        workload.running(workload.build(Path(folder))) as program,
    ):
        program.run(workload.CONNECT, CONNECTIONS)
        tracers: dict[str, Callable[[], AbstractContextManager[int]]] = {OURS: lambda: _ours(program)}
        for name, command, probes in _peers():
            if shutil.which(command[0]) is None:
                found.notes.append(f"{name} is not installed")
            else:
                tracers[name] = lambda command=command, probes=probes: _peer(command, probes)  # type: ignore[misc]
        samples = {name: Samples() for name in tracers}
        for _ in range(rounds):
            for name, tracer in tracers.items():
                try:
                    _measure(program, tracer, samples[name])
                except BenchError as error:
                    found.notes.append(str(error))
    ours = samples[OURS]
    found.figures.append(
        Figure("connections/s with ours", ours.traced, "without any tracer", ours.plain, "less than 3% fewer",
               _median(ours.slower) < 3)
    )  # fmt: skip
    for name, theirs in samples.items():
        if name != OURS and theirs.traced:
            least = "never above a peer"
            found.figures += [
                Figure("connections/s lost, %", ours.slower, name, theirs.slower, least,
                       _median(ours.slower) <= _median(theirs.slower)),
                Figure("  BPF run time a connection, ns", ours.run_ns, name, theirs.run_ns),
                Figure("  BPF programs run a connection", ours.runs, name, theirs.runs),
            ]  # fmt: skip
    found.notes.append("ours keeps every request with its peer, queue and fate, the peers a histogram")
    return found


def _measure(program: workload.Workload, tracer: Callable[[], AbstractContextManager[int]], into: Samples) -> None:
    with tracer() as pid:
        traced = _rate(program)
        with kernel_statistics():
            before = run_statistics(pid, KERNEL_FUNCTION_PROGRAMS)
            program.run(workload.CONNECT, CONNECTIONS)
            after = run_statistics(pid, KERNEL_FUNCTION_PROGRAMS)
    into.plain.append(_rate(program))
    into.traced.append(traced)
    into.runs.append((after.runs - before.runs) / CONNECTIONS)
    into.run_ns.append((after.run_ns - before.run_ns) / CONNECTIONS)


def _rate(program: workload.Workload) -> float:
    return CONNECTIONS / (program.run(workload.CONNECT, CONNECTIONS).wall_ns / 1e9)


@contextmanager
def _ours(program: workload.Workload) -> Iterator[int]:
    """Watch the program's listener and read as the recorder does; yields our process."""
    diag = SockDiag(program.pid)
    state = next(state for state in diag.listeners() if state.port == program.port)
    diag.close()
    listener = ListenerProgram(plan_listener(), ring_bytes=8 << 20)
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(READ_NS / 1e9):
            listener.ring.read()

    reader = threading.Thread(target=read)
    try:
        listener.watch(
            ListenerInfo(0, state.name, state.port, program.pid, state.inode, 0, state.queue_limit, state.cookie)
        )
        reader.start()
        yield os.getpid()
    finally:
        ended.set()
        reader.join()
        listener.close()


@contextmanager
def _peer(command: list[str], probes: int) -> Iterator[int]:
    """Run a peer; yields its process once it holds as many attachments as it has probes."""
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages)
        try:
            deadline = time.monotonic() + _TIMEOUT_S
            while _attachments(process.pid) < probes:
                if process.poll() is not None or time.monotonic() > deadline:
                    messages.seek(0)
                    words = messages.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
                    raise BenchError(f"{command[0]} did not attach: {words[-1]}")
                time.sleep(_LOOK_INTERVAL_S)
            time.sleep(_SETTLE_S)
            yield process.pid
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()


def _attachments(pid: int) -> int:
    """Return how many links and probe events a process holds."""
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += os.readlink(path) in ("anon_inode:bpf_link", "anon_inode:[perf_event]")
        except OSError:
            continue
    return count


def _peers() -> list[tuple[str, list[str], int]]:
    return [(TCPSYNBL, ["tcpsynbl"], 2), (SCRIPT, ["bpftrace", "-e", _KPROBE], _PROBES)]


def _median(samples: list[float]) -> float:
    ordered = sorted(samples)
    return ordered[len(ordered) // 2]
