"""``stallscope record``."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stallscope.tracer.commands.parameters import DURATION, SIZE
from stallscope.tracer.errors import EXIT_DATA_LOST, UsageError
from stallscope.tracer.units import format_duration_ns

if TYPE_CHECKING:
    from stallscope.tracer.capture.session import Progress

_MAX_LOST_SHARE = 0.01
_DEFAULT_STACK_RATE_HZ = 199
"""More lost events than this share and ``record`` ends with exit code 5."""


@click.command()
@click.option(
    "-p",
    "--pid",
    "pids",
    type=click.IntRange(min=1),
    multiple=True,
    help="Process to trace; may be repeated.",
)
@click.option(
    "--port", "ports", type=click.IntRange(1, 65535), multiple=True,
    help="Trace the server on this TCP port, and its successor when it restarts; may be repeated.",
)  # fmt: skip
@click.option("-d", "--duration", type=DURATION, default="0", help="How long, as 30s or 5m; until Ctrl-C if not given.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Recording to write.")
@click.option("--force", is_flag=True, help="Overwrite the recording if it exists.")
@click.option(
    "--probe", "probes", multiple=True, metavar="[LIB:]FUNC", help="Trace this function too; may be repeated."
)
@click.option("--no-default-probes", is_flag=True, help="Trace only the functions given with --probe, in any program.")
@click.option(
    "--min-duration",
    type=DURATION,
    default="0",
    show_default=True,
    help="Count shorter calls without recording them.",
)
@click.option(
    "--stall",
    type=DURATION,
    default="10ms",
    show_default=True,
    help="Record event loop iterations at least this long.",
)
@click.option(
    "--sample", type=DURATION, default="10ms", show_default=True, help="Interval of the accept queue samples."
)
@click.option(
    "--ring-size", type=SIZE, default="8M", show_default=True, help="Ring buffer between kernel and recorder."
)
@click.option(
    "--stacks", is_flag=False, flag_value="always", type=click.Choice(["always", "stalls"]),
    help="Sample the stacks of the servers' main threads: always (the default of --stacks), or in stalls only.",
)  # fmt: skip
@click.option(
    "--stack-rate", type=click.IntRange(99, 999), metavar="HZ",
    help="Stack samples a second of CPU time, from 99 to 999; 199 if not given.",
)  # fmt: skip
@click.option("-q", "--quiet", is_flag=True, help="No progress line.")
def record(
    pids: tuple[int, ...], ports: tuple[int, ...], duration: int, output: Path | None, force: bool,
    probes: tuple[str, ...], no_default_probes: bool, min_duration: int, stall: int, sample: int,
    ring_size: int, stacks: str | None, stack_rate: int | None, quiet: bool,
) -> None:  # fmt: skip
    """Record the slow calls of live Redis servers, with their accept queues beside them.

    Needs root. A password for INFO is taken from REDISCLI_AUTH. Ends with exit code 5 when more than 1% of
    the events were lost.

    \b
    Examples:
      stallscope record --port 6379 -d 30s
      stallscope record -p 4711 -p 4712 --min-duration 1ms -o night.stall
      stallscope record -p 4711 --probe dictRehashMilliseconds --probe libc:madvise
      stallscope record --port 6379 --stacks=stalls --stack-rate 499
    """
    from stallscope.tracer.capture.recorder import Recorder, RecordOptions
    from stallscope.tracer.capture.session import SessionOptions
    from stallscope.tracer.capture.stack_sampler import StackOptions
    from stallscope.tracer.capture.traced import TraceOptions, requested_functions
    from stallscope.tracer.recording import new_recording_path

    if not pids and not ports:
        raise UsageError("nothing to record; name a server with --port PORT or -p PID")
    if no_default_probes and not probes:
        raise UsageError("--no-default-probes leaves nothing to trace; add --probe FUNC")
    if sample < 1_000_000:
        raise UsageError("--sample is below 1ms; the sampler would cost more than it shows")
    if ring_size < 65536 or ring_size & (ring_size - 1):
        raise UsageError("--ring-size must be a power of two and at least 64K, as 8M")
    if stack_rate and not stacks:
        raise UsageError("--stack-rate samples nothing by itself; add --stacks, or --stacks=stalls")
    interval_ns = 1_000_000_000 // (stack_rate or _DEFAULT_STACK_RATE_HZ)
    trace = TraceOptions(
        requested_functions(probes, defaults=not no_default_probes), min_duration, stall, sample, ring_size,
        stacks=StackOptions(interval_ns, stacks == "always") if stacks else None,
    )  # fmt: skip
    password = os.environ.get("REDISCLI_AUTH", "")
    session = SessionOptions(pids, ports, trace, no_default_probes, password, tuple(sys.argv))
    options = RecordOptions(session, new_recording_path(output, force=force), duration)
    started_ns = time.monotonic_ns()
    recorder = Recorder(options)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: recorder.stop(signal.Signals(received).name))
    if not quiet:
        took = format_duration_ns(recorder.attached_ns - started_ns)
        click.echo(f"recording to {options.output} (all probes attached after {took}); Ctrl-C ends it", err=True)
    printer = _ProgressPrinter(quiet=quiet)
    manifest = recorder.run(printer.show)
    printer.end()
    progress = recorder.progress
    click.echo(
        f"recorded {format_duration_ns(progress.elapsed_ns)} ({manifest.ended_by}), {progress.calls:,} calls; "
        f"see: stallscope summary {shlex.quote(str(options.output))}",
        err=True,
    )
    if progress.lost > _MAX_LOST_SHARE * max(progress.hits, 1):
        click.echo(
            f"stallscope: {progress.lost:,} events were lost; use a larger --ring-size or a --min-duration",
            err=True,
        )
        sys.exit(EXIT_DATA_LOST)


class _ProgressPrinter:
    """One line on stderr, rewritten each second on a terminal, a new one every ten seconds elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._rewrites = sys.stderr.isatty()
        self._notes = 0
        self._calls = 0

    def show(self, progress: Progress) -> None:
        """Print what is new."""
        if self._quiet:
            return
        for note in progress.notes[self._notes :]:
            click.echo(("\r\x1b[K" if self._rewrites else "") + note, err=True)
        self._notes = len(progress.notes)
        self._calls += 1
        line = progress_line(progress)
        if self._rewrites:
            click.echo(f"\r\x1b[K{line}", nl=False, err=True)
        elif self._calls % 10 == 0:
            click.echo(line, err=True)

    def end(self) -> None:
        """Leave the cursor on a line of its own."""
        if self._rewrites and not self._quiet:
            click.echo(err=True)


def progress_line(progress: Progress) -> str:
    """Return the progress as one line under 100 characters."""
    stall = format_duration_ns(progress.longest_stall_ns) if progress.longest_stall_ns else "none"
    return (
        f"{progress.elapsed_ns / 1e9:.0f} s: {progress.calls:,} calls, longest stall {stall}, "
        f"{progress.overflows:,} overflows, {progress.lost:,} lost, "
        f"cost: server {progress.traced_share:.1%}, own {progress.own_share:.1%}"
    )
