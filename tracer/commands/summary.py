"""``stallscope summary``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from stallscope.tracer.commands.parameters import console


@click.command()
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
        terminal.render(result, console())
