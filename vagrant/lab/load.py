#!/usr/bin/env python3
"""Puts a bounded load on a Redis server on loopback and prints what its clients met, as one JSON document.

Examples:
    load.py --port 6379 --recipe incident
    load.py --port 6379 --recipe quiet --rate 500 --duration 3
    load.py --recipes

With --handshake it prints "prepared" when every held client is in place, and starts on a line on stdin; at its
end it prints "over" and lets no client go before another line, or the end of stdin.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab import LabError, LabUsageError
from lab.clients import Stage, hold_connections, make_short_connections, probe_with_pings, watch_listener
from lab.launch import allow_files, die_with
from lab.outcome import Connections, Held, Outcome, Pings
from lab.recipes import RECIPES, Recipe, check

PREPARE_TIMEOUT_S = 120.0
REPORT_TIMEOUT_S = 60.0
SPARE_FILES = 64

RECIPE_OPTIONS: tuple[tuple[str, str, type, str], ...] = (
    ("--name", "name", str, "what the document calls it"),
    ("--idle", "idle", int, "idle clients"),
    ("--uploaders", "uploaders", int, "clients stuck in a value"),
    ("--announced-bytes", "announced_bytes", int, "the size of that value"),
    ("--sent-ratio", "sent_ratio", float, "the part of it that was sent, 0 to 1"),
    ("--small-buffers", "small_buffers", int, "clients with a short command now and then"),
    ("--small-bytes", "small_bytes", int, "the value in it"),
    ("--small-period", "small_period_s", float, "seconds between two of one client"),
    ("--rate", "rate_per_s", float, "short connections per second"),
    ("--timeout", "timeout_s", float, "seconds until such a client gives up"),
    ("--ping-interval", "ping_interval_s", float, "seconds between PINGs"),
    ("--attach", "attach_s", float, "seconds after the start in which no uploader can be trimmed"),
    ("--after", "after_s", float, "seconds of load after they were trimmed"),
    ("--duration", "duration_s", float, "seconds of load at most"),
    ("--backlog", "backlog", int, "the tcp-backlog of the server that incident.py starts"),
)
"""Option, field of the recipe, type and help."""

_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class _Role:
    name: str
    process: BaseProcess
    reports: Connection
    stage: Stage


def _nothing() -> None:
    pass


def put_load(
    recipe: Recipe,
    port: int,
    host: str = "127.0.0.1",
    at_prepared: Callable[[], None] = _nothing,
    at_end: Callable[[], None] = _nothing,
) -> Outcome:
    """Prepare the held clients, call ``at_prepared``, put the load on, call ``at_end``, return what happened.

    The load goes on until ``at_end`` returns. It forks, so call it from a process with one thread.

    Raises:
        LabError: a bound is broken, the server cannot be reached, or a role failed.
    """
    check(recipe, host)
    needed = recipe.held + SPARE_FILES
    if allow_files(needed) < needed:
        raise LabError(f"this load opens {needed} descriptors, more than the limit; ulimit -n {needed}, or run as root")
    start, trimmed, stop = _FORK.Event(), _FORK.Event(), _FORK.Event()
    work: dict[str, Callable[[Stage], Any]] = {"watch": watch_listener, "ping": probe_with_pings}
    if recipe.held:
        work["held"] = hold_connections
    if recipe.rate_per_s:
        work["short"] = make_short_connections
    roles: list[_Role] = []
    try:
        for name, function in work.items():
            roles.append(_begin(name, function, Stage(recipe, host, port, _FORK.Event(), start, trimmed, stop)))
        _wait_until_ready(roles)
        at_prepared()
        started_ns = time.monotonic_ns()
        start.set()
        end_s = time.monotonic() + recipe.duration_s
        while time.monotonic() < end_s and not trimmed.is_set():
            _fail_if_one_ends(roles, min(0.05, end_s - time.monotonic()))
        _fail_if_one_ends(roles, max(0.0, min(recipe.after_s, end_s - time.monotonic())))
        at_end()
        stop.set()
        elapsed_s = (time.monotonic_ns() - started_ns) / 1e9
        reports = {role.name: _report(role) for role in roles}
    finally:
        for role in roles:
            role.process.kill()
            role.process.join()
            role.process.close()
            role.reports.close()
    return Outcome(
        recipe={name: value for name, value in asdict(recipe).items() if name != "about"},
        port=port,
        started_ns=started_ns,
        duration_s=round(elapsed_s, 3),
        connections=reports.get("short", Connections()),
        ping=Pings.of(reports["ping"]),
        listener=reports["watch"],
        held=reports.get("held", Held()),
    )


def _begin(name: str, function: Callable[[Stage], Any], stage: Stage) -> _Role:
    ours, theirs = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run, args=(function, stage, theirs, os.getpid()), name=name)
    process.start()
    theirs.close()
    return _Role(name, process, ours, stage)


def _run(function: Callable[[Stage], Any], stage: Stage, reports: Connection, parent: int) -> None:
    die_with(parent)
    try:
        reports.send(function(stage))
    except (OSError, LabError) as error:
        reports.send(error if isinstance(error, LabError) else LabError(f"{error} (port {stage.port})"))
    finally:
        reports.close()


def _wait_until_ready(roles: Sequence[_Role]) -> None:
    deadline_s = time.monotonic() + PREPARE_TIMEOUT_S
    while not all(role.stage.ready.is_set() for role in roles):
        _fail_if_one_ends(roles, 0.02)
        if time.monotonic() > deadline_s:
            raise LabError(f"the clients were not in place within {PREPARE_TIMEOUT_S:.0f} s; choose a smaller recipe")


def _fail_if_one_ends(roles: Sequence[_Role], for_s: float) -> None:
    """Wait that long; a role that reports before it was told to stop has failed."""
    for early in wait([role.reports for role in roles], for_s):
        _report(next(role for role in roles if role.reports is early))
        raise LabError("a part of the load ended before its time; look for messages above")


def _report(role: _Role) -> Any:
    if not role.reports.poll(REPORT_TIMEOUT_S):
        raise LabError(f'the part "{role.name}" of the load does not report; is the server blocked?')
    try:
        report = role.reports.recv()
    except EOFError:
        raise LabError(f'the part "{role.name}" of the load died; look for messages above') from None
    if isinstance(report, LabError):
        raise report
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    if options.recipes:
        for name, recipe in RECIPES.items():
            print(f"{name:14} {recipe.about}")
        return 0
    try:
        if options.port is None:
            raise LabUsageError("no --port is given; name the port of a Redis server on loopback")
        handshakes = (_wait_for_the_start, _wait_for_leave_to_end) if options.handshake else ()
        outcome = put_load(chosen_recipe(options), options.port, options.host, *handshakes)
        print(outcome.to_json(), flush=True)
    except LabError as error:
        print(f"load.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _wait_for_the_start() -> None:
    print("prepared", flush=True)
    if not sys.stdin.readline():
        raise LabError("nobody asked for the start; the command that prepared this load is gone")


def _wait_for_leave_to_end() -> None:
    print("over", flush=True)
    sys.stdin.readline()


def add_recipe_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that choose a recipe and change it; ``chosen_recipe`` reads them."""
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        default=default,
        help="see load.py --recipes (default: %(default)s)",
    )
    changes = parser.add_argument_group("changes to the recipe")
    for flag, name, kind, text in RECIPE_OPTIONS:
        changes.add_argument(flag, dest=name, type=kind, metavar="N", help=text)


def chosen_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe that the options of ``add_recipe_options`` describe."""
    given = {name: getattr(options, name) for _, name, _, _ in RECIPE_OPTIONS}
    return replace(RECIPES[options.recipe], **{name: value for name, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", action="store_true", help="list the recipes")
    parser.add_argument("--host", default="127.0.0.1", help="an address in 127.0.0.0/8 (default: %(default)s)")
    parser.add_argument("--port", type=int, help="the server's port")
    parser.add_argument("--handshake", action="store_true", help="wait for a line on stdin before starting")
    add_recipe_options(parser, "quiet")
    return parser


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
