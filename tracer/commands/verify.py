"""``stallscope verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from stallscope.tracer.commands.parameters import console
from stallscope.tracer.commands.sides import CONFIDENCE, RATE, SHARE, read_side
from stallscope.tracer.errors import EXIT_FAILED, EXIT_INCONCLUSIVE, EXIT_OK, StallscopeError


@click.command()
@click.argument("after", nargs=-1, required=True)
@click.option("--baseline", "baselines", multiple=True, metavar="BEFORE",
              help="Recording before the change, or a pattern in quotes; may be given more than once.")  # fmt: skip
@click.option("--max", "maxima", multiple=True, metavar="'FUNC<5ms'",
              help="No call, or with 'stall<50ms' no stall, may be this long; may be repeated.")  # fmt: skip
@click.option("--max-rate", "max_rates", multiple=True, metavar="'stall>50ms: 1/h'",
              help="So many may come, of stalls, of a function's calls or of overflows; may be repeated.")  # fmt: skip
@click.option("--no-overflow", is_flag=True, help="No connection may be refused for a full accept queue.")
@click.option("--rate", type=RATE, metavar="1/h",
              help="What --max and --no-overflow forbid must be shown to come less often than this.")  # fmt: skip
@click.option("--confidence", type=CONFIDENCE, default="95%", show_default=True, help="Of the verdict.")
@click.option("--load-band", type=SHARE, default="25%", show_default=True,
              help="By how much clients, connections/s and commands/s may differ from the baseline's.")  # fmt: skip
@click.option("--despite", multiple=True, metavar="KIND",
              help="Compare although this differs: thresholds, probes, rungs, load, silent or host.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), help="Write JUnit XML to this file.")
def verify(
    after: tuple[str, ...], baselines: tuple[str, ...], maxima: tuple[str, ...], max_rates: tuple[str, ...],
    no_overflow: bool, rate: float | None, confidence: float, load_band: float, despite: tuple[str, ...],
    as_json: bool, junit: Path | None,
) -> None:  # fmt: skip
    """Say whether recordings after a change show that it did what it should.

    Exit codes: 0 verified, 1 not verified, 3 inconclusive: recorded for too short, or not comparable. Without a limit,
    the baseline's stalls and overflows must come at most half as often. Needs no root.

    \b
    Examples:
      stallscope verify after.stall --baseline before.stall
      stallscope verify after.stall --baseline before.stall --max 'clientsCronResizeQueryBuffer<5ms'
      stallscope verify after.stall --max-rate 'stall>50ms: 1/h' --junit verify.xml
      stallscope verify after.stall --no-overflow --rate 1/h --confidence 99%
    """
    from stallscope.reports import verification_text
    from stallscope.reports.junit import junit as junit_text
    from stallscope.tracer.analysis.compare import verify as verification
    from stallscope.tracer.analysis.compare.checks import NOT_VERIFIED, VERIFIED
    from stallscope.tracer.analysis.compare.limits import parse_max, parse_max_rate

    limits = [*map(parse_max, maxima), *map(parse_max_rate, max_rates)]
    if no_overflow:
        limits.append(verification.NO_OVERFLOW)
    result = verification.verify(
        read_side(after), read_side(baselines) if baselines else None, limits,
        confidence=confidence, load_band=load_band, claim_per_s=rate, despite=despite,
    )  # fmt: skip
    if junit is not None:
        try:
            junit.write_text(junit_text(result), encoding="utf-8")
        except OSError as error:
            raise StallscopeError(f"cannot write {junit}: {error.strerror}; choose another file") from error
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        verification_text.render(result, console())
    status = {VERIFIED: EXIT_OK, NOT_VERIFIED: EXIT_FAILED}.get(result.verdict, EXIT_INCONCLUSIVE)
    if status:
        sys.exit(status)
