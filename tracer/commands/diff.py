"""``stallscope diff``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from stallscope.tracer.commands.parameters import console
from stallscope.tracer.commands.sides import CONFIDENCE, SHARE, read_side
from stallscope.tracer.errors import EXIT_INCONCLUSIVE


@click.command()
@click.argument("before")
@click.argument("after")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
              help="Write this HTML page too: both timelines, distributions, a differential flame graph.")  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite the page if it exists.")
@click.option("--confidence", type=CONFIDENCE, default="95%", show_default=True,
              help="Of every interval, and of all tests together.")  # fmt: skip
@click.option("--run-variation", "variation", type=SHARE, default="10%", show_default=True,
              help="By how much recordings of one server differ, where there are too few to measure it.")  # fmt: skip
@click.option("--load-band", type=SHARE, default="25%", show_default=True,
              help="By how much clients, connections/s and commands/s may differ.")  # fmt: skip
def diff(
    before: str, after: str, as_json: bool, output: Path | None, force: bool, confidence: float, variation: float,
    load_band: float,
) -> None:  # fmt: skip
    """Say what changed from one recording to another, by how much, and what may be chance.

    Either side may be a pattern, in quotes: its recordings are pooled. Ends with exit code 3 when the two sides are
    not comparable at all. Needs no root.

    \b
    Examples:
      stallscope diff before.stall after.stall
      stallscope diff 'before-*.stall' 'after-*.stall'
      stallscope diff before.stall after.stall -o diff.html
      stallscope diff before.stall after.stall --json | jq '.changes[] | select(.significant)'
    """
    from stallscope.reports import comparison_text
    from stallscope.reports.export.destination import new_export_path, open_export
    from stallscope.tracer.analysis.compare.comparison import compare

    sides = read_side([before]), read_side([after])
    if output is not None:
        for run in (*sides[0].runs, *sides[1].runs):
            new_export_path(output, run.analysis.recording.path, force=force)
    result = compare(*sides, confidence=confidence, variation=variation, load_band=load_band)
    if output is not None:
        from stallscope.reports.comparison.words import page_of

        with open_export(output) as out:
            out.write(page_of(result, *sides).encode())
        click.echo(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)", err=True)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        comparison_text.render(result, console())
    if any(not one.subjects for one in result.obstacles):
        sys.exit(EXIT_INCONCLUSIVE)
