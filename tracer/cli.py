"""The command line: reads arguments, calls one function, prints what it returns. No logic lives here."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stallscope.tracer.errors import EXIT_DATA_LOST, EXIT_FAILED, EXIT_UNABLE, StallscopeError, UsageError
from stallscope.tracer.units import format_duration_ns, parse_bytes, parse_duration_ns

if TYPE_CHECKING:
    from rich.console import Console

    from stallscope.tracer.capture.recorder import Progress

_MAX_LOST_SHARE = 0.01
"""More lost events than this share and ``record`` ends with exit code 5."""


class _Parsed(click.ParamType):  # type: ignore[type-arg]  # generic only from click 8.2 on
    """An option whose text one of our functions reads."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed value; a text that cannot be read ends with exit code 2."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)


DURATION = _Parsed("duration", parse_duration_ns)
SIZE = _Parsed("size", parse_bytes)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stallscope")
def cli() -> None:
    """Find the call that blocked Redis while the kernel refused connections.

    \b
    Examples:
      stallscope doctor                           what can be observed on this machine
      stallscope record --port 6379 -d 1m         record the server on port 6379
      stallscope summary FILE.stall               what blocked it, and what was refused
    """


@cli.command()
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
@click.option("-q", "--quiet", is_flag=True, help="No progress line.")
def record(
    pids: tuple[int, ...], ports: tuple[int, ...], duration: int, output: Path | None, force: bool,
    probes: tuple[str, ...], no_default_probes: bool, min_duration: int, stall: int, sample: int,
    ring_size: int, quiet: bool,
) -> None:  # fmt: skip
    """Record the slow calls of live Redis servers, with their accept queues beside them.

    Needs root. A password for INFO is taken from REDISCLI_AUTH. Ends with exit code 5 when more than 1% of
    the events were lost.

    \b
    Examples:
      stallscope record --port 6379 -d 30s
      stallscope record -p 4711 -p 4712 --min-duration 1ms -o night.stall
      stallscope record -p 4711 --probe dictRehashMilliseconds --probe libc:madvise
    """
    from stallscope.tracer.capture.recorder import Recorder, RecordOptions
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
    trace = TraceOptions(
        requested_functions(probes, defaults=not no_default_probes), min_duration, stall, sample, ring_size
    )
    options = RecordOptions(
        pids, ports, new_recording_path(output, force=force), trace, duration, no_default_probes,
        os.environ.get("REDISCLI_AUTH", ""), tuple(sys.argv),
    )  # fmt: skip
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


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def summary(file: Path, as_json: bool) -> None:
    """Say what blocked the server, how many connections were refused, and what everything cost.

    Needs no root, and no bcc.

    \b
    Examples:
      stallscope summary night.stall
      stallscope summary night.stall --json | jq .stalls
    """
    from stallscope.reports import terminal
    from stallscope.tracer.analysis.analysis import analyse
    from stallscope.tracer.analysis.summary import summarise
    from stallscope.tracer.recording import read_recording

    result = summarise(analyse(read_recording(file)))
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        terminal.render(result, _console())


@cli.command()
@click.option("-p", "--pid", type=click.IntRange(min=1), help="A running server.")
@click.option("--binary", type=click.Path(path_type=Path), help="A server's binary.")
@click.option(
    "--probe",
    "probes",
    multiple=True,
    metavar="[LIB:]FUNC",
    help="Look for this function too; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def probes(pid: int | None, binary: Path | None, probes: tuple[str, ...], as_json: bool) -> None:
    """Show what can be traced in a server: where each function is, or why not and what is used instead.

    \b
    Examples:
      stallscope probes -p 4711
      stallscope probes --binary /usr/bin/redis-server --json
    """
    from stallscope.probes.catalogue import functions
    from stallscope.reports import probes as report
    from stallscope.tracer.capture.binary import open_binary
    from stallscope.tracer.capture.redis_target import open_target
    from stallscope.tracer.capture.symbols import resolve

    if (pid is None) == (binary is None):
        raise UsageError("give either -p PID or --binary FILE")
    image = open_target(pid, any_program=bool(probes)).image if pid is not None else open_binary(str(binary))
    resolutions = resolve(image, [*functions(), *probes], full=True)
    if as_json:
        click.echo(json.dumps(report.describe(resolutions), indent=2))
    else:
        report.render(resolutions, _console())


@cli.command()
@click.option("-p", "--pid", type=click.IntRange(min=1), help="Look at this server too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(pid: int | None, as_json: bool) -> None:
    """Say what is and is not observable on this machine, and the remedy for each. Changes nothing.

    Ends with exit code 4 when nothing can be traced here.

    \b
    Examples:
      sudo stallscope doctor
      sudo stallscope doctor -p 4711 --json
    """
    from stallscope.reports import doctor as report
    from stallscope.tracer.capture.preflight import FAILED, check_machine, check_server

    checks = [*check_machine(), *(check_server(pid) if pid is not None else ())]
    if as_json:
        click.echo(json.dumps(report.describe(checks), indent=2))
    else:
        report.render(checks, _console())
    if any(check.needed and check.state == FAILED for check in checks):
        sys.exit(EXIT_UNABLE)


def _console() -> Console:
    """Return where tables go: stdout, in colour only on a terminal and without NO_COLOR, 80 columns in a pipe."""
    from rich.console import Console

    return Console(highlight=False)


def main() -> None:
    """Run the command line; every error we know ends in one line and its exit code."""
    try:
        status = cli.main(standalone_mode=False)
    except StallscopeError as error:
        click.echo(f"stallscope: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stallscope: interrupted", err=True)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    sys.exit(status if isinstance(status, int) else 0)
