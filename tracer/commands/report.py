"""``stallscope report``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from stallscope.tracer.errors import StallscopeError, UsageError

PAGE_SUFFIX = ".html"


@click.command()
@click.argument("file", type=click.Path(readable=False, path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path),
    help="Page to write; FILE with .html if not given, overwritten if it exists.",
)  # fmt: skip
@click.option("--open", "opened", is_flag=True, help="Open the page in a browser.")
@click.option("--from", "first", metavar="TIME", help="Start of the window: 12.5s after the start, or 13:44:15 UTC.")
@click.option("--to", "last", metavar="TIME", help="End of the window.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), help="Write the chart as this picture too.")
@click.option("--svg", type=click.Path(dir_okay=False, path_type=Path), help="Write the chart as this drawing too.")
def report(
    file: Path, output: Path | None, opened: bool, first: str | None, last: str | None, png: Path | None,
    svg: Path | None,
) -> None:  # fmt: skip
    """Write one HTML page with the timeline of a recording: what blocked the server, and what was refused.

    The page needs no network and no server: attach it to the ticket. Needs no root. With --png or --svg and
    without -o only the picture is written; it takes a Chromium or Chrome.

    \b
    Examples:
      stallscope report night.stall
      stallscope report night.stall -o incident.html --open
      stallscope report night.stall --from 13:44:10 --to 13:44:20 -o window.html
      stallscope report night.stall --from 5s --to 6.5s --png stall.png
    """
    from stallscope.reports.timeline.compute import build_timeline
    from stallscope.reports.timeline.page import render
    from stallscope.tracer.analysis.analysis import analyse
    from stallscope.tracer.analysis.window import cut, parse_moment
    from stallscope.tracer.recording import read_recording

    recording = read_recording(file)
    started_ns = recording.manifest.started_ns
    if first is not None or last is not None:
        ends = [parse_moment(text, recording.manifest) if text is not None else None for text in (first, last)]
        recording = cut(recording, *ends)
    timeline = build_timeline(analyse(recording), offset_ns=recording.manifest.started_ns - started_ns)
    page = render(timeline)
    written = []
    pictures = [(kind, path) for kind, path in (("png", png), ("svg", svg)) if path is not None]
    if output is not None or opened or not pictures:
        target = output or Path(file.name).with_suffix(PAGE_SUFFIX)
        if target.exists() and file.exists() and target.samefile(file):
            raise UsageError(f"{target} is the recording itself; choose another name with -o")
        _write(target, page.encode())
        written.append(target)
    if pictures:
        from stallscope.reports.timeline.picture import draw_picture

        for kind, path in pictures:
            _write(path, draw_picture(page, kind, path))
            written.append(path)
    for path in written:
        click.echo(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", err=True)
    if opened:
        _open(written[0])


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StallscopeError(f"cannot write {path}: {error.strerror}; choose another file") from error


def _open(path: Path) -> None:
    """Open the page where there is a screen, otherwise say why not."""
    import webbrowser

    shown = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not shown:
        click.echo(f"not opened: there is no display here; copy {path} to where there is one", err=True)
    elif not webbrowser.open(path.absolute().as_uri()):
        click.echo(f"not opened: no browser was found; open {path} yourself", err=True)
