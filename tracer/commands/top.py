"""``stallscope top``."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from stallscope.tracer.commands.parameters import DURATION
from stallscope.tracer.commands.tracing import exit_if_lost, server_options, session_options, trace_options
from stallscope.tracer.errors import UsageError
from stallscope.tracer.units import format_duration_ns

if TYPE_CHECKING:
    from stallscope.reports.live import Controls
    from stallscope.tracer.capture.observer import Observer
    from stallscope.tracer.commands.terminal import Terminal
    from stallscope.tracer.live.view import LiveView

SORT_KEYS = ("rate", "p99", "max", "total")


@click.command()
@server_options
@click.option("-d", "--duration", type=DURATION, default="0", help="How long, as 30s or 5m; until q if not given.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a second instead (docs/top.md).")
@click.option(
    "--sort", type=click.Choice(SORT_KEYS), default=SORT_KEYS[0], show_default=True, help="Order of the functions."
)
@click.option("--capture", type=DURATION, default="10s", show_default=True, help="How long a capture (key c) is.")
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=".", help="Folder for captures."
)
@trace_options(min_duration="Count shorter calls without timing them.", stall="What makes an iteration a stall.")
def top(duration: int, as_json: bool, sort: str, capture: int, output: Path, **traced: Any) -> None:
    """Watch live Redis servers: rates, lengths, accept queues, and what each stall was spent in.

    Needs root. Keys: p pauses the view (tracing goes on), s sorts by another column, c starts or ends a capture,
    which is a recording like one of stallscope record, q quits. Ends with exit code 5 when more than 1% of the
    events were lost.

    \b
    Examples:
      stallscope top --port 6379
      stallscope top -p 4711 -p 4712 --probe call --stall 5ms
      stallscope top --port 6379 --json -d 1m
    """
    from stallscope.tracer.capture.observer import Observer
    from stallscope.tracer.commands.terminal import require_terminal

    options = session_options("watch", **traced)
    if capture < 1_000_000_000:
        raise UsageError("--capture is below 1s; there would be little in it")
    if not as_json:
        require_terminal("use --json for one record a second")
    observer = Observer(options, output, capture)
    try:
        loop = _Loop(observer, duration)
        if as_json:
            loop.run(_JsonLines())
        else:
            _watch(loop, sort, capture)
    finally:
        observer.close()
    for path in observer.captures:
        click.echo(f"captured {path}; see: stallscope summary {path}", err=True)
    exit_if_lost(observer.progress)


class _Display(Protocol):
    """Where views go, and where the loop waits."""

    def show(self, view: LiveView, observer: Observer) -> None:
        """Show a new view."""

    def wait(self, until_ns: int, observer: Observer) -> str:
        """Wait until that time (CLOCK_MONOTONIC) or a little less; returns why to end, "" for not."""


class _Loop:
    """Polls the session and shows a view a second until there is a reason to end."""

    def __init__(self, observer: Observer, duration_ns: int) -> None:
        self.observer = observer
        self._duration_ns = duration_ns
        self._ended_by = ""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def run(self, display: _Display) -> str:
        """Return why it ended; the last state was shown."""
        observer = self.observer
        next_view_ns = time.monotonic_ns()
        while not self._ended_by:
            next_view_ns = max(next_view_ns + 1_000_000_000, time.monotonic_ns())
            while not self._ended_by and (now_ns := time.monotonic_ns()) < next_view_ns:
                observer.poll(now_ns)
                self._end(display.wait(min(observer.due_ns, next_view_ns), observer))
                self._look_around()
            if not self._ended_by:
                display.show(observer.view(time.monotonic_ns()), observer)
        display.show(observer.finish(self._ended_by), observer)
        return self._ended_by

    def _look_around(self) -> None:
        if self._duration_ns and time.monotonic_ns() - self.observer.started_ns >= self._duration_ns:
            self._end("the duration was over")
        if not self.observer.has_servers:
            self._end("the traced process ended")

    def _end(self, reason: str) -> None:
        self._ended_by = self._ended_by or reason

    def _on_signal(self, number: int, _frame: object) -> None:
        self._ended_by = self._ended_by or signal.Signals(number).name


class _JsonLines:
    """One JSON object a line on stdout, for as long as somebody reads it."""

    def __init__(self) -> None:
        self._is_closed = False

    def show(self, view: LiveView, observer: Observer) -> None:
        """Print a view."""
        if self._is_closed:
            return
        try:
            sys.stdout.write(json.dumps(view.to_json(), separators=(",", ":")) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            self._is_closed = True
            # or the interpreter complains when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def wait(self, until_ns: int, observer: Observer) -> str:
        """Sleep."""
        time.sleep(max(until_ns - time.monotonic_ns(), 0) / 1e9)
        return "nobody reads any more" if self._is_closed else ""


def _watch(loop: _Loop, sort: str, capture_ns: int) -> None:
    """Show the views on the terminal, and say afterwards why they ended."""
    from stallscope.tracer.commands.terminal import Terminal, TerminalGoneError

    with Terminal() as terminal:
        screen = _Screen(terminal, sort, capture_ns)
        try:
            ended_by = loop.run(screen)
        except TerminalGoneError:
            loop.observer.finish("the terminal was closed")
            return
    watched = format_duration_ns(loop.observer.progress.elapsed_ns)
    click.echo(f"watched for {watched} ({ended_by}), {loop.observer.progress.calls:,} calls", err=True)


class _Screen:
    """The view on a terminal, and its keys."""

    def __init__(self, terminal: Terminal, sort: str, capture_ns: int) -> None:
        from stallscope.reports.live import Controls

        self._terminal = terminal
        self._capture = f"capture {capture_ns / 1e9:g} s"
        self._controls: Controls = Controls(sort=sort)
        self._shown: LiveView | None = None

    def show(self, view: LiveView, observer: Observer) -> None:
        """Draw a view, or the one that stands still again with what is new around it."""
        if self._shown is None or not self._controls.paused:
            self._shown = view
        self._draw(observer)

    def wait(self, until_ns: int, observer: Observer) -> str:
        """Wait for keys, and do what they say."""
        keys = self._terminal.keys(until_ns)
        for key in keys.lower():
            if key == "q":
                return "q was pressed"
            if key in "p ":
                self._controls = replace(self._controls, paused=not self._controls.paused)
            elif key == "s":
                following = SORT_KEYS[(SORT_KEYS.index(self._controls.sort) + 1) % len(SORT_KEYS)]
                self._controls = replace(self._controls, sort=following)
            elif key == "c":
                observer.toggle_capture()
        if keys or self._terminal.was_resized:
            self._draw(observer)
        return ""

    def _draw(self, observer: Observer) -> None:
        from stallscope.reports.live import render

        if self._shown is None:
            return
        capture = observer.capture_state(time.monotonic_ns())
        controls = self._controls
        keys = (
            ("p", "resume" if controls.paused else "pause"),
            ("s", f"sort: {controls.sort}"),
            ("c", "end capture" if capture else self._capture),
            ("q", "quit"),
        )
        controls = replace(controls, capture=capture, message=observer.message, keys=keys)
        width, height = self._terminal.size()
        self._terminal.draw(render(self._shown, controls, width, height, ascii_only=self._terminal.ascii_only))
