"""``stallscope watch``."""

from __future__ import annotations

import os
import signal
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stallscope.tracer.commands.parameters import DURATION, SIZE
from stallscope.tracer.errors import UsageError
from stallscope.tracer.units import format_count, format_duration_ns

if TYPE_CHECKING:
    from stallscope.tracer.capture.watcher import WatchTotals


@click.command()
@click.option("-p", "--pid", "pids", type=click.IntRange(min=1), multiple=True, help="Server to watch; and its port's.")
@click.option("--port", "ports", type=click.IntRange(1, 65535), multiple=True, help="Watch the server on this port.")
@click.option("--all-redis", is_flag=True, help="Watch every server of this machine, also those that come later.")
@click.option("--trigger", "triggers", multiple=True, metavar="CONDITION", help="What is worth a capture; see below.")
@click.option("--before", type=DURATION, default="5s", show_default=True, help="Keep what happened so long before.")
@click.option("--after", type=DURATION, default="10s", show_default=True, help="Go on for so long after.")
@click.option("--cooldown", type=DURATION, default="1m", show_default=True, help="Only count triggers so long after.")
@click.option("--longest", type=DURATION, default="5m", show_default=True, help="End a capture after so long.")
@click.option("--max-captures", type=click.IntRange(min=1), default=20, show_default=True, help="Captures to keep.")
@click.option("--max-disk", type=SIZE, default="1G", show_default=True, help="How large they may be all together.")
@click.option("--memory", type=SIZE, default="64M", show_default=True, help="Bound of what is kept in memory.")
@click.option("-o", "--output", type=click.Path(file_okay=False, path_type=Path), default=Path("captures"),
              show_default=True, help="Folder of the captures.")  # fmt: skip
@click.option("--probe", "probes", multiple=True, metavar="[LIB:]FUNC", help="Trace this function too, on a trigger.")
@click.option("--detail", type=click.Choice(["on-trigger", "always", "never"]), default="on-trigger",
              show_default=True, help="When the detail probes are attached.")  # fmt: skip
@click.option("--stall", type=DURATION, default="10ms", show_default=True, help="Record iterations at least this long.")
@click.option("--sample", type=DURATION, default="20ms", show_default=True, help="Interval of the queue samples.")
@click.option("--ring-size", type=SIZE, default="8M", show_default=True, help="Ring buffer between kernel and us.")
def watch(
    pids: tuple[int, ...], ports: tuple[int, ...], all_redis: bool, triggers: tuple[str, ...], before: int, after: int,
    cooldown: int, longest: int, max_captures: int, max_disk: int, memory: int, output: Path,
    probes: tuple[str, ...], detail: str, stall: int, sample: int, ring_size: int,
) -> None:  # fmt: skip
    """Wait for an incident, and keep a recording of the time around it.

    \b
    Examples:
      stallscope watch --port 6379
    """
    from stallscope.probes import catalogue
    from stallscope.tracer.capture.session import SessionOptions
    from stallscope.tracer.capture.traced import TraceOptions, requested_functions
    from stallscope.tracer.capture.watcher import Watcher, WatchOptions
    from stallscope.tracer.watch.captures import CaptureOptions
    from stallscope.tracer.watch.triggers import STALL, functions_of, parse_triggers, shortest_ns

    if not pids and not ports and not all_redis:
        raise UsageError("nothing to watch; name a server with --port PORT or -p PID, or all with --all-redis")
    parsed = parse_triggers(triggers or ("stall>50ms", "overflow>0"))
    standing = functions_of(parsed)
    functions = requested_functions([*standing, *probes], defaults=True)
    on_demand = frozenset(name for name in functions if name not in standing and not catalogue.is_standing(name))
    trace = TraceOptions(
        functions, 0, min(stall, shortest_ns(parsed, STALL, stall)), sample, ring_size, on_demand, True
    )
    session = SessionOptions(pids, ports, trace, False, os.environ.get("REDISCLI_AUTH", ""), tuple(sys.argv))
    options = WatchOptions(
        session, parsed, output, CaptureOptions(before, after, cooldown, longest, memory), max_captures, max_disk,
        memory, all_redis, detail,
    )  # fmt: skip
    watcher = Watcher(options, lambda text: click.echo(text, err=True))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: watcher.stop(signal.Signals(received).name))
    servers = format_count(len(watcher.pids), "server")
    click.echo(f"watching {servers} for {', '.join(trigger.text for trigger in parsed)}; Ctrl-C ends it", err=True)
    totals = watcher.run()
    click.echo(summary_line(totals), err=True)


def summary_line(totals: WatchTotals) -> str:
    """Return what a watch did in one line."""
    line = (
        f"watched {format_duration_ns(totals.elapsed_ns)}: {format_count(totals.triggers, 'trigger')}, "
        f"{format_count(totals.captures, 'capture')}, own CPU {totals.own_cpu_ns / max(totals.elapsed_ns, 1):.1%}"
    )
    if totals.incomplete:
        line += f", {totals.incomplete} incomplete"
    if totals.attach_ns:
        line += (
            f"; detail attached {format_duration_ns(statistics.median(totals.attach_ns))} after a trigger was noticed"
        )
    return line
