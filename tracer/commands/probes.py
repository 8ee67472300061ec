"""``stallscope probes``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stallscope.tracer.commands.parameters import console
from stallscope.tracer.errors import UsageError


@click.command()
@click.option("-p", "--pid", type=click.IntRange(min=1), help="A running server.")
@click.option("--binary", type=click.Path(readable=False, path_type=Path), help="A server's binary.")
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
        report.render(resolutions, console())
