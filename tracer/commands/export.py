"""``stallscope export``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from stallscope.reports.export.formats import FORMATS
from stallscope.tracer.commands.parameters import DURATION
from stallscope.tracer.errors import UsageError
from stallscope.tracer.units import format_bytes, format_count, format_duration_ns

STDOUT = Path("-")


def _print_schema(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from stallscope.reports.export.ndjson import schema_text

        click.echo(schema_text(), nl=False)
        context.exit()


@click.command(
    epilog="\b\nFormats:\n" + "\n".join(f"  {item.name:<11} {item.description}" for item in FORMATS.values())
)
@click.argument("file", type=click.Path(readable=False, path_type=Path))
@click.option(
    "-f", "--format", "format_name", type=click.Choice(list(FORMATS)), required=True, help="What to write; see below."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write, - for stdout; beside FILE if not given."
)
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
@click.option(
    "--min-duration", type=DURATION, default="0", show_default=True,
    help="Leave out shorter calls; their time becomes their callers'.",
)  # fmt: skip
@click.option(
    "--samples", is_flag=True,
    help="Write the stack samples of record --stacks instead of the traced calls; folded and speedscope.",
)  # fmt: skip
@click.option(
    "--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema,
    help="Print the JSON Schema of an NDJSON line, which documents all columns, and end.",
)  # fmt: skip
def export(
    file: Path, format_name: str, output: Path | None, force: bool, min_duration: int, samples: bool
) -> None:  # fmt: skip
    """Write a recording in the format of another tool. Needs no root.

    \b
    Examples:
      stallscope export night.stall -f perfetto
      stallscope export night.stall -f folded -o - | flamegraph.pl --countname us > night.svg
      stallscope export night.stall -f speedscope --samples
      stallscope export night.stall -f csv --min-duration 1ms -o slow.csv
    """
    from stallscope.reports.export.destination import new_export_path, open_export
    from stallscope.reports.export.rows import count_rows
    from stallscope.tracer.analysis.analysis import analyse
    from stallscope.tracer.analysis.short_calls import without_short_calls
    from stallscope.tracer.recording import read_recording

    chosen = FORMATS[format_name]
    if output == STDOUT and not chosen.is_text:
        raise UsageError(f"{chosen.name} is a binary format; name a file with -o")
    if samples and chosen.load_samples is None:
        able = " or ".join(item.name for item in FORMATS.values() if item.load_samples)
        raise UsageError(f"{chosen.name} has no form for stack samples alone; use --samples with -f {able}")
    recording = read_recording(file)
    path = None if output == STDOUT else new_export_path(output or chosen.beside(file), file, force=force)
    analysis, left_out = without_short_calls(analyse(recording), min_duration)
    if left_out:
        click.echo(f"{left_out:,} calls shorter than {format_duration_ns(min_duration)} were left out", err=True)
    if samples and analysis.samples.frame.empty:
        raise UsageError(f"{file} has no stack samples; record with --stacks")
    tables = analysis.tables
    imported = sum(len(frame) for frame in (tables.packets, tables.imported_spans, tables.imported_samples))
    if imported and not chosen.has_imported and not samples:
        able = ", ".join(item.name for item in FORMATS.values() if item.has_imported)
        click.echo(
            f"{format_count(imported, 'imported row')} left out, {chosen.name} has no form for them; {able} have",
            err=True,
        )
    rows = len(analysis.samples.frame) if samples else count_rows(analysis)
    if chosen.many_rows is not None and rows > chosen.many_rows:
        click.echo(f"{rows:,} events: {chosen.why}; leave out short calls with --min-duration", err=True)
    write = chosen.load_samples() if samples and chosen.load_samples else chosen.load()
    if path is None:
        write(analysis, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    with open_export(path) as out:
        write(analysis, out)
    click.echo(f"wrote {path} ({format_bytes(path.stat().st_size)})", err=True)
