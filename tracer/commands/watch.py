"""``stallscope watch``."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from stallscope.tracer.units import format_count, format_duration_ns

if TYPE_CHECKING:
    from stallscope.tracer.capture.watcher import WatchTotals
    from stallscope.tracer.watch.options import WatchOptions


_Command = TypeVar("_Command", bound=Callable[..., Any])


def _option(
    name: str, metavar: str, text: str, *, multiple: bool = False, short: str = ""
) -> Callable[[_Command], _Command]:
    """Return an option whose text the reader of the configuration file reads too."""
    declarations = [*([short] if short else []), f"--{name}"]
    return click.option(*declarations, name.replace("-", "_"), metavar=metavar, multiple=multiple, help=text)


def _flag(name: str, text: str) -> Callable[[_Command], _Command]:
    return click.option(f"--{name}", name.replace("-", "_"), is_flag=True, default=None, help=text)


@click.command()
@_option("pid", "PID", "Server to watch, and whatever takes over its port; may be repeated.", multiple=True, short="-p")
@_option("port", "PORT", "Watch the server on this TCP port, now or later; may be repeated.", multiple=True)
@_flag("all-redis", "Watch every server of this machine, also those that are started later.")
@_option("trigger", "CONDITION", "What is worth a capture; may be repeated. stall>50ms and overflow>0 if not given.",
         multiple=True)  # fmt: skip
@_option("before", "TIME", "How much a capture holds from before its trigger; 5s if not given.")
@_option("after", "TIME", "And from after the last one; 10s if not given.")
@_option("cooldown", "TIME", "After a capture, triggers are only counted for so long; 1m if not given.")
@_option("max-length", "TIME", "A capture ends after so long, whatever holds; 5m if not given.")
@_option("max-captures", "N", "Captures to keep; the oldest go first; 20 if not given.")
@_option("max-disk", "SIZE", "How large they may be all together; 1G if not given.")
@_option("memory", "SIZE", "Bound of what is kept in memory from before; 64M if not given.")
@_option("output", "DIR", "Folder of the captures; captures if not given.", short="-o")
@_option("detail", "WHEN", "Attach detail probes on-trigger or always; on-trigger if not given.")
@_option("probe", "[LIB:]FUNC", "Trace this function too, as detail; may be repeated.", multiple=True)
@click.option("--stacks/--no-stacks", default=None, help="Sample the stacks of a stall while it lasts, as detail.")
@_option("exec", "CMD", "Run this after a capture; it gets path and findings as JSON on stdin.")
@_option("exec-timeout", "TIME", "And kill it after so long; 1m if not given.")
@_flag("report", "Draw the page of each capture beside it.")
@_option("max-overhead", "SHARE", "Most that probes may take of a server's time; 1% if not given.")
@_option("metrics", "[ADDR:]PORT", "Answer Prometheus there.")
@_option("sample", "TIME", "Interval of the accept queue samples; 20ms if not given.")
@_option("ring-size", "SIZE", "Ring buffer between kernel and watch; 2M if not given.")
@click.option("--config", type=click.Path(dir_okay=False, readable=False, path_type=Path),
              help="TOML file with the same names; SIGHUP reads it again.")  # fmt: skip
def watch(config: Path | None, **given: Any) -> None:
    """Wait for an incident, and keep a recording of the time around it.

    Runs for weeks: standing probes cost next to nothing; when a trigger comes true, detail probes are attached within
    milliseconds, also in the midst of a stall. Each capture is a complete recording with what was before. Needs root.
    A password for INFO is taken from REDISCLI_AUTH.

    \b
    Conditions:
      stall>50ms               an event loop iteration takes longer, also while it still does
      overflow>0               connections were refused (overflow>100 in 10s)
      drop>0                   a listener dropped requests, for whatever reason
      'backlog>80% for 100ms'  an accept queue is that full; or a number of connections
      call:FUNC>5ms            a call of this function takes longer
      wait>100ms               a connection waited longer for accept(), where the kernel can be hooked
      lost>0                   events were lost

    \b
    Examples:
      stallscope watch --port 6379
      stallscope watch --all-redis --trigger 'stall>50ms' -o /var/lib/stallscope
      stallscope watch -p 4711 --trigger call:je_pages_purge'>5ms' --before 10s --max-disk 5G
      stallscope watch --config /etc/stallscope/watch.toml --exec 'jq -r .verdict | mail -s Redis dba'
    """
    from stallscope.tracer.capture.watcher import Watcher

    given = {name.replace("_", "-"): value for name, value in given.items() if value not in (None, ())}
    options = _read(config, given)
    watcher = Watcher(
        options,
        lambda text: click.echo(text, err=True),
        command=tuple(sys.argv),
        password=os.environ.get("REDISCLI_AUTH", ""),
        read_options=(lambda: _read(config, given)) if config is not None else None,
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: watcher.stop(signal.Signals(received).name))
    signal.signal(signal.SIGHUP, lambda *_: watcher.reload())
    servers = format_count(len(watcher.pids), "server")
    click.echo(
        f"watching {servers} for {', '.join(trigger.text for trigger in options.triggers)}; "
        f"captures go to {options.output}",
        err=True,
    )
    _notify("READY=1")
    totals = watcher.run()
    _notify("STOPPING=1")
    click.echo(summary_line(totals), err=True)


def _read(config: Path | None, given: dict[str, Any]) -> WatchOptions:
    from stallscope.tracer.watch.options import read_options

    return read_options(config, given)


def summary_line(totals: WatchTotals) -> str:
    """Return what a watch did in one line."""
    parts = [
        f"{format_count(totals.triggers, 'trigger')} ({totals.suppressed:,} in cool-downs)",
        format_count(totals.captures, "capture"),
    ]
    if totals.incomplete:
        parts.append(f"{totals.incomplete:,} incomplete")
    if totals.arrivals:
        parts.append(f"{format_count(totals.arrivals, 'server')} taken up later")
    if totals.attach_ns:
        parts.append(
            f"detail attached {format_duration_ns(statistics.median(totals.attach_ns))} after a trigger was noticed, "
            f"{format_duration_ns(statistics.median(totals.late_ns))} after its bound was passed (medians)"
        )
    parts.append(f"own CPU since the start {totals.own_cpu_ns / max(totals.elapsed_ns, 1):.1%}")
    return f"watched {format_duration_ns(totals.elapsed_ns)}: {', '.join(parts)}"


def _notify(state: str) -> None:
    """Tell systemd, where it asked for that (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
