"""``stallscope diff``."""

from __future__ import annotations

import json
import sys

import click

from stallscope.tracer.commands.parameters import console
from stallscope.tracer.commands.sides import CONFIDENCE, SHARE, read_side
from stallscope.tracer.errors import EXIT_INCONCLUSIVE


@click.command()
@click.argument("before")
@click.argument("after")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--confidence", type=CONFIDENCE, default="95%", show_default=True,
              help="Of every interval, and of all tests together.")  # fmt: skip
@click.option("--run-variation", "variation", type=SHARE, default="10%", show_default=True,
              help="By how much recordings of one server differ, where there are too few to measure it.")  # fmt: skip
@click.option("--load-band", type=SHARE, default="25%", show_default=True,
              help="By how much clients, connections/s and commands/s may differ.")  # fmt: skip
def diff(before: str, after: str, as_json: bool, confidence: float, variation: float, load_band: float) -> None:
    """Say what changed from one recording to another, by how much, and what may be chance.

    Either side may be a pattern, in quotes: its recordings are pooled. Ends with exit code 3 when the two sides are
    not comparable at all. Needs no root.

    \b
    Examples:
      stallscope diff before.stall after.stall
      stallscope diff 'before-*.stall' 'after-*.stall'
      stallscope diff before.stall after.stall --json | jq '.changes[] | select(.significant)'
    """
    from stallscope.reports import comparison_text
    from stallscope.tracer.analysis.compare.comparison import compare

    result = compare(
        read_side([before]), read_side([after]), confidence=confidence, variation=variation, load_band=load_band
    )
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        comparison_text.render(result, console())
    if any(not one.subjects for one in result.obstacles):
        sys.exit(EXIT_INCONCLUSIVE)
