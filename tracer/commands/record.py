"""``stallscope record``."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stallscope.tracer.commands.parameters import DURATION
from stallscope.tracer.commands.tracing import exit_if_lost, server_options, session_options, trace_options
from stallscope.tracer.errors import UsageError
from stallscope.tracer.units import format_duration_ns

if TYPE_CHECKING:
    from stallscope.tracer.capture.session import Progress

_DEFAULT_STACK_RATE_HZ = 199


@click.command()
@server_options
@click.option("-d", "--duration", type=DURATION, default="0", help="How long, as 30s or 5m; until Ctrl-C if not given.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Recording to write.")
@click.option("--force", is_flag=True, help="Overwrite the recording if it exists.")
@trace_options(
    min_duration="Count shorter calls without recording them.",
    stall="Record event loop iterations at least this long.",
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
    duration: int,
    output: Path | None,
    force: bool,
    stacks: str | None,
    stack_rate: int | None,
    quiet: bool,
    **traced: Any,
) -> None:
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
    from stallscope.tracer.capture.stack_sampler import StackOptions
    from stallscope.tracer.recording import new_recording_path

    if stack_rate and not stacks:
        raise UsageError("--stack-rate samples nothing by itself; add --stacks, or --stacks=stalls")
    interval_ns = 1_000_000_000 // (stack_rate or _DEFAULT_STACK_RATE_HZ)
    sampled = StackOptions(interval_ns, stacks == "always") if stacks else None
    session = session_options("record", **traced, stacks=sampled)
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
    exit_if_lost(progress)


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
