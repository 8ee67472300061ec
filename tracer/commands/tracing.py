"""What ``record`` and ``top`` share: which servers and functions are traced, how closely, and what must not be lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stallscope.tracer.commands.parameters import DURATION, SIZE
from stallscope.tracer.errors import EXIT_DATA_LOST, UsageError
from stallscope.tracer.option_checks import require_ring_size, require_sample_interval

if TYPE_CHECKING:
    from stallscope.tracer.capture.session import Progress, SessionOptions
    from stallscope.tracer.capture.stack_sampler import StackOptions

_MAX_LOST_SHARE = 0.01
"""More lost events than this share and a command ends with exit code 5."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def server_options(command: _Command) -> _Command:
    """Add the options that name servers: ``pids`` and ``ports``."""
    return _with(
        command,
        click.option(
            "-p", "--pid", "pids", type=click.IntRange(min=1), multiple=True, help="Process to trace; may be repeated."
        ),
        click.option(
            "--port", "ports", type=click.IntRange(1, 65535), multiple=True,
            help="Trace the server on this TCP port, and its successor when it restarts; may be repeated.",
        ),
    )  # fmt: skip


def trace_options(*, min_duration: str, stall: str) -> Callable[[_Command], _Command]:
    """Add the options of what is traced: those that ``session_options`` takes, besides the servers.

    Args:
        min_duration, stall: what these two options mean to the command.
    """
    return lambda command: _with(
        command,
        click.option(
            "--probe", "probes", multiple=True, metavar="[LIB:]FUNC", help="Trace this function too; may be repeated."
        ),
        click.option(
            "--no-default-probes", is_flag=True, help="Trace only the functions given with --probe, in any program."
        ),
        click.option("--min-duration", type=DURATION, default="0", show_default=True, help=min_duration),
        click.option("--stall", type=DURATION, default="10ms", show_default=True, help=stall),
        click.option(
            "--sample", type=DURATION, default="10ms", show_default=True, help="Interval of the accept queue samples."
        ),
        click.option(
            "--ring-size", type=SIZE, default="8M", show_default=True, help="Ring buffer between kernel and recorder."
        ),
    )


def session_options(
    verb: str, *, pids: Sequence[int], ports: Sequence[int], probes: Sequence[str], no_default_probes: bool,
    min_duration: int, stall: int, sample: int, ring_size: int, stacks: StackOptions | None = None,
) -> SessionOptions:  # fmt: skip
    """Return what to trace, from the values of the options.

    Args:
        verb: what the command does with servers, as "record".

    Raises:
        UsageError: there is nothing to trace, or a value is out of bounds.
    """
    from stallscope.tracer.capture.session import SessionOptions
    from stallscope.tracer.capture.trace_options import TraceOptions, requested_functions

    if not pids and not ports:
        raise UsageError(f"nothing to {verb}; name a server with --port PORT or -p PID")
    if no_default_probes and not probes:
        raise UsageError("--no-default-probes leaves nothing to trace; add --probe FUNC")
    require_sample_interval(sample)
    require_ring_size(ring_size)
    trace = TraceOptions(
        requested_functions(probes, defaults=not no_default_probes), min_duration, stall, sample, ring_size,
        stacks=stacks,
    )  # fmt: skip
    password = os.environ.get("REDISCLI_AUTH", "")
    return SessionOptions(tuple(pids), tuple(ports), trace, no_default_probes, password, tuple(sys.argv))


def exit_if_lost(progress: Progress) -> None:
    """Say so, and end with exit code 5, if more than 1% of the events were lost."""
    if progress.lost <= _MAX_LOST_SHARE * max(progress.hits, 1):
        return
    click.echo(
        f"stallscope: {progress.lost:,} events were lost; use a larger --ring-size or a --min-duration", err=True
    )
    sys.exit(EXIT_DATA_LOST)


def _with(command: _Command, *options: Callable[[_Command], _Command]) -> _Command:
    """Return the command with options, shown in this order."""
    for option in reversed(options):
        command = option(command)
    return command
