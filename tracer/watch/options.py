"""The options of ``stallscope watch``, from a TOML file and the command line.

The file has the same names as the options, without the dashes in front; what may be repeated on the command line is
a list there::

    port = [6379]
    trigger = ["stall>50ms", "overflow>0", "backlog>80% for 100ms"]
    before = "5s"
    max-disk = "1G"

The command line wins. SIGHUP reads the file again: what is in ``RELOADABLE`` is changed at once, the rest takes a
restart, and both are said.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from stallscope.tracer.errors import UsageError
from stallscope.tracer.option_checks import require_ring_size, require_sample_interval
from stallscope.tracer.units import parse_bytes, parse_duration_ns, parse_share
from stallscope.tracer.watch.captures import CaptureOptions
from stallscope.tracer.watch.triggers import CALL_TIME, STALL, Trigger, functions_of, parse_trigger, shortest_ns

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DETAIL_ON_TRIGGER, DETAIL_ALWAYS = "on-trigger", "always"
DEFAULT_TRIGGERS = ("stall>50ms", "overflow>0")
LEAST_DISK_BYTES = 2**20
LEAST_MEMORY_BYTES = 2**20
_LOCAL = "127.0.0.1"
_NS_PER_S = 1_000_000_000


def parse_address(text: str) -> tuple[str, int]:
    """Return the address and port to listen on, written as ``9121``, ``:9121``, ``ADDR:9121`` or ``[::1]:9121``.

    Without an address it is 127.0.0.1: others are let in only by name.

    Raises:
        UsageError: there is no port, or it is none.
    """
    address, _, port = text.strip().rpartition(":")
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UsageError(f'cannot read "{text}" as an address; write PORT or ADDR:PORT, as 127.0.0.1:9121')
    return address.removeprefix("[").removesuffix("]") or _LOCAL, int(port)


def _positive(text: object) -> int:
    if isinstance(text, bool) or not isinstance(text, int) or text < 1:
        raise UsageError(f"{text!r} is not a number above 0")
    return text


def _port(value: object) -> int:
    if _positive(value) > 65535:
        raise UsageError(f"{value!r} is not a TCP port")
    return _positive(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{value!r} is neither true nor false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{value!r} is not a text; put it in quotes")
    return value


def _of_text(parse: Callable[[str], Any]) -> Callable[[object], Any]:
    return lambda value: parse(_text(value))


def _detail(value: object) -> str:
    if value not in (DETAIL_ON_TRIGGER, DETAIL_ALWAYS):
        raise UsageError(f'{value!r} is not known; there are "{DETAIL_ON_TRIGGER}" and "{DETAIL_ALWAYS}"')
    return str(value)


@dataclass(frozen=True)
class WatchOptions:
    """Everything ``watch`` can be told; times in ns, sizes in bytes.

    Attributes:
        pids, ports, all_redis: whom to watch.
        triggers: what is worth a capture.
        before_ns, after_ns, cooldown_ns, longest_ns: as in ``CaptureOptions``.
        max_captures, max_disk_bytes: what is kept in ``output``, the folder.
        memory_bytes: bound of the pre-roll, and of what waits to be written.
        detail: ``on-trigger`` or ``always``.
        probes: further functions to trace as detail. stacks: sample stacks as detail too.
        command: run after each capture, "" for none; command_ns: its time limit. report: draw a page.
        max_overhead: share of a server's time that probes may take.
        metrics: address and port, None for none.
        sample_ns, ring_bytes: as of ``record``.
    """

    pids: tuple[int, ...] = ()
    ports: tuple[int, ...] = ()
    all_redis: bool = False
    triggers: tuple[Trigger, ...] = ()
    before_ns: int = 5 * _NS_PER_S
    after_ns: int = 10 * _NS_PER_S
    cooldown_ns: int = 60 * _NS_PER_S
    longest_ns: int = 300 * _NS_PER_S
    max_captures: int = 20
    max_disk_bytes: int = 2**30
    memory_bytes: int = 64 * 2**20
    output: Path = field(default_factory=lambda: Path("captures"))
    detail: str = DETAIL_ON_TRIGGER
    probes: tuple[str, ...] = ()
    stacks: bool = True
    command: str = ""
    command_ns: int = 60 * _NS_PER_S
    report: bool = False
    max_overhead: float = 0.01
    metrics: tuple[str, int] | None = None
    sample_ns: int = 20_000_000
    ring_bytes: int = 2 * 2**20

    @property
    def capture(self) -> CaptureOptions:
        """Return what concerns captures."""
        return CaptureOptions(self.before_ns, self.after_ns, self.cooldown_ns, self.longest_ns, self.memory_bytes)


@dataclass(frozen=True)
class _Option:
    """How one option is written: its member of ``WatchOptions``, how a value is read, whether it may be repeated."""

    member: str
    read: Callable[[object], Any]
    repeated: bool = False
    reloadable: bool = False


OPTIONS: Mapping[str, _Option] = {
    "pid": _Option("pids", _positive, repeated=True),
    "port": _Option("ports", _port, repeated=True),
    "all-redis": _Option("all_redis", _flag),
    "trigger": _Option("triggers", _of_text(parse_trigger), repeated=True, reloadable=True),
    "before": _Option("before_ns", _of_text(parse_duration_ns), reloadable=True),
    "after": _Option("after_ns", _of_text(parse_duration_ns), reloadable=True),
    "cooldown": _Option("cooldown_ns", _of_text(parse_duration_ns), reloadable=True),
    "max-length": _Option("longest_ns", _of_text(parse_duration_ns), reloadable=True),
    "max-captures": _Option("max_captures", _positive, reloadable=True),
    "max-disk": _Option("max_disk_bytes", _of_text(parse_bytes), reloadable=True),
    "memory": _Option("memory_bytes", _of_text(parse_bytes), reloadable=True),
    "output": _Option("output", _of_text(Path)),
    "detail": _Option("detail", _detail),
    "stacks": _Option("stacks", _flag),
    "probe": _Option("probes", _text, repeated=True),
    "exec": _Option("command", _text, reloadable=True),
    "exec-timeout": _Option("command_ns", _of_text(parse_duration_ns), reloadable=True),
    "report": _Option("report", _flag, reloadable=True),
    "max-overhead": _Option("max_overhead", _of_text(parse_share), reloadable=True),
    "metrics": _Option("metrics", _of_text(parse_address)),
    "sample": _Option("sample_ns", _of_text(parse_duration_ns)),
    "ring-size": _Option("ring_bytes", _of_text(parse_bytes)),
}
"""By the name on the command line and in the file."""

RELOADABLE = tuple(name for name, option in OPTIONS.items() if option.reloadable)
"""What SIGHUP changes without a restart."""


def read_config(path: Path) -> dict[str, Any]:
    """Return what a TOML file says, by member of ``WatchOptions``.

    Raises:
        UsageError: it cannot be read, has a key that is not known, or a value that is not right; says where.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; give a file with --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    values: dict[str, Any] = {}
    for name, value in document.items():
        option = OPTIONS.get(name)
        if option is None:
            near = difflib.get_close_matches(name, OPTIONS, 1)
            hint = f'did you mean "{near[0]}"?' if near else f"there are {', '.join(OPTIONS)}"
            raise UsageError(f'{path}: "{name}" is not an option; {hint}')
        if isinstance(value, list) and not option.repeated:
            raise UsageError(f'{path}: "{name}" takes one value, not a list')
        parts = value if isinstance(value, list) else [value]
        try:
            read = [option.read(part) for part in parts]
        except UsageError as error:
            raise UsageError(f'{path}: "{name}": {error}') from error
        values[option.member] = tuple(dict.fromkeys(read)) if option.repeated else read[0]
    return values


def read_options(config: Path | None, given: Mapping[str, Any]) -> WatchOptions:
    """Return the options of a file and of the command line, which wins.

    Args:
        config: the file, None for none.
        given: text by name of the option, a tuple of texts where it may be repeated, True for a flag.

    Raises:
        UsageError: as of ``read_config`` and ``watch_options``.
    """
    from_command_line: dict[str, Any] = {}
    for name, value in given.items():
        option = OPTIONS[name]
        try:
            read = [option.read(_typed(option, part)) for part in (value if isinstance(value, tuple) else (value,))]
        except UsageError as error:
            raise UsageError(f"--{name}: {error}") from error
        from_command_line[option.member] = tuple(dict.fromkeys(read)) if option.repeated else read[0]
    from_file = read_config(config) if config is not None else {}
    if "triggers" not in {*from_file, *from_command_line}:
        from_file = {**from_file, "triggers": tuple(map(parse_trigger, DEFAULT_TRIGGERS))}
    return watch_options(from_file, from_command_line)


def _typed(option: _Option, text: object) -> object:
    """Return a number where one is wanted: on the command line everything is text."""
    is_number = isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 10
    return int(str(text)) if is_number and option.read in (_positive, _port) else text


def watch_options(from_file: Mapping[str, Any], from_command_line: Mapping[str, Any]) -> WatchOptions:
    """Return the options; both are by member of ``WatchOptions``, hold what was given only, and the latter wins.

    Raises:
        UsageError: nothing to watch, nothing to wait for, or values that do not go together.
    """
    options = WatchOptions(**{**from_file, **from_command_line})
    if not (options.pids or options.ports or options.all_redis):
        raise UsageError("nothing to watch; name a server with --port PORT or -p PID, or take --all-redis")
    if not options.triggers:
        raise UsageError("nothing to wait for; give a --trigger, as stall>50ms or overflow>0")
    if options.memory_bytes < LEAST_MEMORY_BYTES:
        raise UsageError("--memory is below 1M; a pre-roll needs more")
    if options.max_disk_bytes < LEAST_DISK_BYTES:
        raise UsageError("--max-disk is below 1M; no capture would have room")
    if options.longest_ns < options.before_ns + options.after_ns:
        raise UsageError("--max-length is shorter than --before and --after together; a capture would never be whole")
    require_sample_interval(options.sample_ns)
    require_ring_size(options.ring_bytes)
    return options


def reloaded(now: WatchOptions, wanted: WatchOptions) -> tuple[WatchOptions, tuple[str, ...], tuple[str, ...]]:
    """Return the options after SIGHUP.

    Triggers are taken up when the probes that are attached can see them: no function that was not asked for before,
    and no shorter bound on iterations or calls.

    Returns:
        The options as they may be now, the names of those that changed, and of those that need a restart.
    """
    changed, restart = [], []
    members: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        before, after = getattr(now, option.member), getattr(wanted, option.member)
        if before == after:
            continue
        if option.reloadable and (name != "trigger" or _is_visible(before, after)):
            members[option.member] = after
            changed.append(name)
        else:
            restart.append(name)
    return replace(now, **members), tuple(changed), tuple(restart)


def _is_visible(before: tuple[Trigger, ...], after: tuple[Trigger, ...]) -> bool:
    new_functions = set(functions_of(after)) - set(functions_of(before))
    never_ns = 2**62
    shorter = any(
        shortest_ns(after, quantity, never_ns) < shortest_ns(before, quantity, never_ns)
        for quantity in (STALL, CALL_TIME)
    )
    return not new_functions and not shorter


assert {option.member for option in OPTIONS.values()} == {item.name for item in fields(WatchOptions)}
