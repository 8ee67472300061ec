"""The command line: the commands of ``tracer/commands/`` under one name, and one line for every error."""

from __future__ import annotations

import os
import signal
import sys

import click

from stallscope.tracer.commands import (
    diff,
    doctor,
    export,
    imports,
    plan,
    probes,
    record,
    report,
    summary,
    top,
    verify,
    watch,
)
from stallscope.tracer.errors import EXIT_FAILED, StallscopeError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stallscope")
def cli() -> None:
    """Find the call that blocked Redis while the kernel refused connections.

    \b
    Examples:
      stallscope doctor                           what can be observed on this machine
      stallscope record --port 6379 -d 1m         record the server on port 6379
      stallscope top --port 6379                  watch it live
      stallscope watch --port 6379 --trigger 'stall>50ms'    keep what happened around each stall
      stallscope summary FILE.stall               what blocked it, and what was refused
      stallscope report FILE.stall                the same as one page with a timeline
      stallscope diff BEFORE.stall AFTER.stall    what changed, and what may be chance
      stallscope verify AFTER.stall --baseline BEFORE.stall    whether a fix did what it should
      stallscope export FILE.stall -f perfetto    the same for another tool
    """


for _command in (
    record.record,
    watch.watch,
    top.top,
    summary.summary,
    report.report,
    diff.diff,
    verify.verify,
    plan.plan,
    export.export,
    imports.import_,
    probes.probes,
    doctor.doctor,
):
    cli.add_command(_command)


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
