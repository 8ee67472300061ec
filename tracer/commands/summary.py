"""``stallscope summary``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stallscope.tracer.commands.parameters import SIZE, console


@click.command()
@click.argument("file", type=click.Path(readable=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option(
    "--what-if-trim-above",
    "thresholds",
    metavar="SIZE",
    type=SIZE,
    multiple=True,
    default=("32K",),
    show_default=True,
    help="What if only query buffers with more than this unused were trimmed; may be given more than once.",
)
def summary(file: Path, as_json: bool, thresholds: tuple[int, ...]) -> None:
    """Say what blocked the server, how many connections were refused, why, and what to do.

    Needs no root, and no bcc.

    \b
    Examples:
      stallscope summary night.stall
      stallscope summary night.stall --what-if-trim-above 32K --what-if-trim-above 1M
      stallscope summary night.stall --json | jq .findings
    """
    from stallscope.reports import terminal
    from stallscope.tracer.analysis.analysis import analyse
    from stallscope.tracer.analysis.summary import summarise
    from stallscope.tracer.recording import read_recording

    result = summarise(analyse(read_recording(file)), sorted(set(thresholds)))
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        terminal.render(result, console())
