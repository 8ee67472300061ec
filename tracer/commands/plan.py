"""``stallscope plan``."""

from __future__ import annotations

import json

import click

from stallscope.tracer.commands.parameters import console
from stallscope.tracer.commands.sides import CONFIDENCE, RATE, read_side


@click.command()
@click.option("--baseline", "baselines", multiple=True, required=True, metavar="BEFORE",
              help="Recording before the change, or a pattern in quotes; may be given more than once.")  # fmt: skip
@click.option("--rate", type=RATE, metavar="1/h",
              help="The rate that is to be claimed; without it, half the baseline's.")  # fmt: skip
@click.option("--event", metavar="'stall>50ms'",
              help="What is counted: stalls, a function's calls, or overflow; all stalls without it.")  # fmt: skip
@click.option("--confidence", type=CONFIDENCE, default="95%", show_default=True, help="Of the claim.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plan(baselines: tuple[str, ...], rate: float | None, event: str | None, confidence: float, as_json: bool) -> None:
    """Say how long to record after a change until verify can claim a rate. Needs no root.

    \b
    Examples:
      stallscope plan --baseline before.stall --rate 1/h
      stallscope plan --baseline 'before-*.stall' --rate 1/h --event 'serverCron>50ms'
    """
    from stallscope.reports import verification_text
    from stallscope.tracer.analysis.compare.limits import parse_event
    from stallscope.tracer.analysis.compare.plan import plan as planned

    result = planned(read_side(baselines), parse_event(event) if event else None, rate, confidence)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        verification_text.render_plan(result, console())
