"""``stallscope doctor``."""

from __future__ import annotations

import json
import sys

import click

from stallscope.tracer.commands.parameters import console
from stallscope.tracer.errors import EXIT_UNABLE


@click.command()
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
        report.render(checks, console())
    if any(check.needed and check.state == FAILED for check in checks):
        sys.exit(EXIT_UNABLE)
