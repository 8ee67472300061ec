"""``stallscope import``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from stallscope.tracer.commands.parameters import OFFSET


@click.command(name="import")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True, type=click.Path(readable=False, path_type=Path))
@click.option(
    "--into", type=click.Path(readable=False, path_type=Path), metavar="REC.stall",
    help="Add the rows to a copy of this recording, on its clock; without it they are a recording of their own.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Recording to write.")
@click.option("--force", is_flag=True, help="Overwrite the recording if it exists.")
@click.option(
    "--port", "ports", type=click.IntRange(1, 65535), multiple=True,
    help="The server's TCP port in captures; that of the recording's listeners if not given; may be repeated.",
)  # fmt: skip
@click.option(
    "--offset", type=OFFSET, default="0", metavar="±DURATION",
    help="Added to the inputs' clock, where it is that of another host: -1.5s for one that runs ahead.",
)  # fmt: skip
def import_(
    inputs: tuple[Path, ...], into: Path | None, output: Path | None, force: bool, ports: tuple[int, ...], offset: int
) -> None:
    """Put captures, SLOWLOG, LATENCY and INFO on one timeline, beside a recording or without one.

    Needs no root. Each INPUT is recognised by its content: a capture (pcap, pcapng, also with gzip), or the output
    of redis-cli for SLOWLOG GET, LATENCY HISTORY, LATENCY LATEST or INFO (raw, --no-raw, --csv, --json, or a copied
    terminal session). Rows outside the recording's time are left out and counted.

    \b
    How to make the inputs:
      tcpdump -i any -s 128 -w cap.pcap 'tcp port 6379'
      redis-cli --no-raw slowlog get 128 > slowlog.txt
      redis-cli latency history command > command.txt    (the file's name is the event's)
      while sleep 1; do date +%s.%N; redis-cli info; done > info.txt

    \b
    Examples:
      stallscope import cap.pcap slowlog.txt --into night.stall -o all.stall
      stallscope import cap.pcap info.txt --port 6379 -o untraced.stall
      stallscope import client.pcapng --into night.stall --offset -1.5s
    """
    from stallscope.tracer.imports.run import run_import

    done = run_import(inputs, into, output, ports, offset, force=force, command=tuple(sys.argv))
    for line in done.lines:
        click.echo(line, err=True)
    click.echo(f"wrote {done.path}; see: stallscope summary {shlex.quote(str(done.path))}", err=True)
