"""A live view as lines for a terminal: a pure function of the view, what the user chose, and the screen's size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from rich.console import Group
from rich.text import Text

from stallscope.reports.lines import percent, plain
from stallscope.tracer.live.view import FunctionView, ListenerView, LiveView, StallView
from stallscope.tracer.units import format_count, format_duration_ns

SORTS = ("rate", "p99", "max", "total")
MIN_WIDTH, MIN_HEIGHT = 40, 10
_LABEL = 9
_NARROW = 72
_TALL = 20
_MANY_LISTENERS = 3


@dataclass(frozen=True)
class Controls:
    """What the user chose, and what there is to tell him.

    Attributes:
        sort: one of ``SORTS``; capture: what a capture under way has so far, "" for none.
        message: the last thing that happened.
        keys: shown at the bottom; empty where nobody can press them.
    """

    paused: bool = False
    sort: str = SORTS[0]
    capture: str = ""
    message: str = ""
    keys: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Glyphs:
    full: str
    empty: str
    levels: str
    cut: str


_UNICODE = _Glyphs("█", "░", " ▁▂▃▄▅▆▇█", "…")
_ASCII = _Glyphs("#", ".", " .:-=+*%#", "~")


def render(view: LiveView, controls: Controls, width: int, height: int, *, ascii_only: bool = False) -> Group:
    """Return at most ``height`` lines of at most ``width`` columns; colour never carries meaning alone.

    Args:
        ascii_only: draw bars from ASCII, for a terminal that is not UTF-8.
    """
    glyphs = _ASCII if ascii_only else _UNICODE
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        text = f"the terminal is smaller than {MIN_WIDTH}x{MIN_HEIGHT}"
        return Group(*[_fit(Text(text), width, glyphs)][:height])
    top = [
        _title(view, controls, width),
        _now(view),
        _loop(view),
        *_queues(view, width, height, glyphs),
        _refused(view, width, glyphs),
    ]
    bottom = [_message(view, controls), _keys(controls)]
    middle = _middle(view, controls, width, height - len(top) - len(bottom), glyphs)
    lines = [*top, *middle, *[Text()] * (height - len(top) - len(bottom) - len(middle)), *bottom]
    return Group(*(_fit(line, width, glyphs) for line in lines))


def _middle(view: LiveView, controls: Controls, width: int, room: int, glyphs: _Glyphs) -> list[Text]:
    """Return the tables and the histogram, as much of them as the room allows."""
    space = 1 if room >= _TALL - 6 else 0
    histogram: list[Text] = []
    if room >= 12 and view.loop is not None:
        bars = 1 if room < 24 else min(6, (room - 18) // 2)
        histogram = [*[Text()] * space, *_histogram(view, width, bars, glyphs)]
    left = room - len(histogram) - 2 - 2 * space
    stalls = min(len(view.recent_stalls), max(left // 2, left - len(view.functions), 1))
    functions = max(left - max(stalls, 1), 1)
    lines = [*[Text()] * space, *_functions(view, controls, width, functions, glyphs)]
    lines += histogram
    lines += [*[Text()] * space, *_stalls(view, stalls)]
    return lines[:room]


def _title(view: LiveView, controls: Controls, width: int) -> Text:
    clock = datetime.fromtimestamp(view.wall_ns / 1e9, timezone.utc).strftime("%H:%M:%S UTC")
    minutes, seconds = divmod(int(view.elapsed_ns / 1e9), 60)
    right = f"{'PAUSED  ' if controls.paused else ''}{clock}  +{minutes}:{seconds:02d}"
    alive = [server for server in view.servers if not server.ended] or list(view.servers)
    names = [
        " ".join(word for word in (server.product, server.version, f"pid {server.pid}") if word) for server in alive
    ]
    shown = ", ".join(map(plain, names))
    room = width - len("stallscope top  ") - len(right) - 2
    if len(shown) > room:
        shown = format_count(len(alive), "server") if len(alive) > 1 else shown[: max(room, 0)]
    line = Text("stallscope top", style="bold")
    line.append(f"  {shown}", style="not bold")
    line.append(" " * max(width - len(line) - len(right), 1))
    line.append(right, style="bold yellow" if controls.paused else "not bold dim")
    return line


def _now(view: LiveView) -> Text:
    if view.loop is None:
        return _labelled("now", Text("event loop not measured"))
    if not view.blocked:
        return _labelled("now", Text("not blocked", style="green"))
    worst = max(view.blocked, key=lambda stall: stall.duration_ns)
    whose = f" (pid {worst.pid})" if len(view.servers) > 1 else ""
    text = Text()
    text.append(f"BLOCKED for {format_duration_ns(worst.duration_ns)}{whose}", style="bold red")
    where = " > ".join(map(plain, worst.calls))
    text.append(f" in {where}" if where else " outside the traced functions")
    return _labelled("now", text)


def _loop(view: LiveView) -> Text:
    loop = view.loop
    if loop is None:
        return Text()
    text = Text(f"busy {loop.busy_share:.1%}, {loop.rate_per_s:,.0f} iterations/s, ")
    text.append(format_count(loop.stalls, "stall"), style="bold" if loop.stalls else "")
    if loop.longest_ns:
        text.append(f", longest {format_duration_ns(loop.longest_ns)}")
    return _labelled("loop", text)


def _queues(view: LiveView, width: int, height: int, glyphs: _Glyphs) -> list[Text]:
    most = _MANY_LISTENERS if height >= _TALL else 1
    shown = sorted(view.listeners, key=lambda item: (-_fullness(item), item.address))
    if not shown:
        return [_labelled("queue", Text("no listener is watched", style="dim"))]
    address_width = min(max(len(item.address) for item in shown[:most]), max(width // 3, 15))
    more = f"  +{len(shown) - most} more" if len(shown) > most else ""
    return [
        _queue(item, view.window_s, width, address_width, glyphs, more if item is shown[:most][-1] else "")
        for item in shown[:most]
    ]


def _fullness(item: ListenerView) -> float:
    return max(item.window_max, item.queue_length) / max(item.queue_limit, 1)


def _queue(item: ListenerView, window_s: int, width: int, address_width: int, glyphs: _Glyphs, more: str) -> Text:
    share = item.queue_length / max(item.queue_limit, 1)
    numbers = f" {item.queue_length:,}/{item.queue_limit:,}"
    before, longest = f", {window_s} s max ", f"{item.window_max:,}"
    room = width - _LABEL - address_width - 1 - len(numbers + before + longest + more)
    bar_width = max(min(room // 3, 40), 4)
    full = min(math.ceil(share * bar_width), bar_width)
    style = "red" if share >= 1 else "yellow" if share >= 0.5 else "green"
    text = Text(f"{_cut(plain(item.address), address_width, glyphs).ljust(address_width)} ")
    text.append(glyphs.full * full, style=style)
    text.append(glyphs.empty * (bar_width - full), style="dim")
    text.append(numbers, style="bold red" if share >= 1 else "")
    text.append(before)
    text.append(longest, style="bold red" if item.window_max > item.queue_limit else "")
    room -= bar_width + 2
    if room >= 8:
        text.append("  ")
        text.append(_spark(item.history, item.queue_limit, min(room, 60), glyphs), style="cyan")
    text.append(more, style="dim")
    return _labelled("queue", text)


def _refused(view: LiveView, width: int, glyphs: _Glyphs) -> Text:
    rate = view.overflows_in_interval * 1e9 / view.interval_ns
    text = Text()
    text.append(f"{view.overflows:,}", style="bold red" if view.overflows else "")
    text.append(" since start, ")
    text.append(f"{rate:,.0f}/s", style="bold red" if rate else "")
    cost = f"cost: server {view.traced_share:.1%}, own {view.own_share:.1%}; lost {view.lost:,}"
    room = width - _LABEL - len(text) - len(cost) - 4
    text.append("  ")
    if room >= 8:
        peak = max(*view.overflow_history, 1)
        text.append(_spark(view.overflow_history, peak, min(room, 60), glyphs), style="red")
        text.append("  ")
    text.append(cost, style="bold red" if view.lost else "dim")
    return _labelled("refused", text)


def _functions(view: LiveView, controls: Controls, width: int, rows: int, glyphs: _Glyphs) -> list[Text]:
    below = f"<{format_duration_ns(view.min_duration_ns)}"
    window_ns = max(min(view.window_s * 10**9, view.elapsed_ns), 1)

    def length(value: int | None, calls: int) -> str:
        return format_duration_ns(value) if value is not None else below if calls and view.min_duration_ns else "-"

    names: dict[str, tuple[str, Callable[[FunctionView], str]]] = {
        "rate": ("calls/s", lambda item: f"{item.rate_per_s:,.0f}"),
        "p50": ("p50", lambda item: length(item.p50_ns, item.calls)),
        "p99": ("p99", lambda item: length(item.p99_ns, item.calls)),
        "window": (f"max {view.window_s}s", lambda item: length(item.window_max_ns, item.calls)),
        "max": ("max", lambda item: length(item.max_ns, item.calls)),
        "share": ("share", lambda item: percent(item.window_total_ns, window_ns)),
        "calls": ("calls", lambda item: f"{item.calls:,}"),
        "total": ("total", lambda item: format_duration_ns(item.total_ns)),
    }
    chosen = ["rate", "p99", "max"] if width < _NARROW else ["rate", "p99", "window", "max", "share", "total"]
    if width >= 100:
        chosen = list(names)
    widths = {key: 10 if key in ("rate", "calls") and width >= 100 else 8 for key in chosen}
    name_width = width - sum(widths.values()) - len(chosen)
    shown = sorted(view.functions, key=lambda item: -_sort_key(item, controls.sort))[:rows]
    header = Text(_cut("function", name_width, glyphs).ljust(name_width), style="bold")
    for key in chosen:
        style = "bold reverse" if key == controls.sort else "bold"
        header.append(" ")
        header.append(names[key][0].rjust(widths[key]), style=style)
    lines = [header]
    for item in shown:
        line = Text(_cut(plain(item.name), name_width, glyphs).ljust(name_width), style="" if item.calls else "dim")
        for key in chosen:
            line.append(" " + names[key][1](item).rjust(widths[key]))
        lines.append(line)
    return lines


def _sort_key(item: FunctionView, sort: str) -> float:
    keys = {"rate": item.rate_per_s, "p99": item.p99_ns or 0, "max": item.max_ns or 0, "total": item.total_ns}
    return keys[sort]


def _histogram(view: LiveView, width: int, bars: int, glyphs: _Glyphs) -> list[Text]:
    """Return the lengths of the iterations: labels, counts, and bars whose height is the logarithm of the count."""
    assert view.loop is not None
    column = max(min((width - 1) // len(view.loop.histogram), 10), 5)
    labels = ["<" + _short(view.stall_ns), *(_short(lower) for lower, _ in view.loop.histogram[1:])]
    counts = [count for _, count in view.loop.histogram]
    peak = math.log1p(max(*counts, 1))
    header = Text(f"event loop iterations by length, last {view.window_s} s", style="bold")
    lines = [Text(), Text(), *(Text() for _ in range(bars))]
    steps = len(glyphs.levels) - 1
    for label, count in zip(labels, counts, strict=True):
        level = math.ceil(math.log1p(count) / peak * bars * steps) if count else 0
        for row in range(bars):
            part = min(max(level - (bars - 1 - row) * steps, 0), steps)
            lines[row].append((glyphs.levels[part] * (column - 2)).rjust(column), style="cyan")
        lines[bars].append(_compact(count).rjust(column), style="" if count else "dim")
        lines[bars + 1].append(label.rjust(column), style="dim")
    return [header, *lines]


def _stalls(view: LiveView, rows: int) -> list[Text]:
    header = Text("last stalls    blocked      queue  refused  mostly in", style="bold")
    if not view.recent_stalls:
        return [header, Text(f"none of {format_duration_ns(view.stall_ns)} or longer", style="dim")]
    shown = [*view.recent_stalls[:rows]]
    if view.worst_stall is not None and view.worst_stall not in shown and rows > 1:
        shown[-1] = view.worst_stall  # however many short ones came after it
    return [header, *(_stall(stall, view) for stall in shown)]


def _stall(stall: StallView, view: LiveView) -> Text:
    when = datetime.fromtimestamp(stall.wall_ns / 1e9, timezone.utc).strftime("%H:%M:%S.%f")[:-3]
    queue = "?" if stall.queue_max is None else f"{stall.queue_max:,}/{stall.queue_limit:,}"
    is_worst = stall == view.worst_stall
    line = Text()
    line.append(f"{when[:8]} max" if is_worst else when, style="bold" if is_worst else "")
    line.append(f" {format_duration_ns(stall.duration_ns):>9}", style="bold" if is_worst else "")
    line.append(f" {queue:>10} ")
    line.append(f"{stall.overflows:>8,}", style="bold red" if stall.overflows else "")
    line.append("  ")
    share = percent(stall.cause_self_ns, stall.covered_ns)
    if stall.cause:
        line.append(plain(stall.cause), style="bold")
        line.append(f" x{stall.cause_calls:,}, {share} self")
    else:
        line.append("not traced", style="italic")
        line.append(f", {share}")
    if stall.covered_ns < stall.duration_ns:
        line.append(f" of the last {format_duration_ns(stall.covered_ns)}")
    if len(view.servers) > 1:
        line.append(f" (pid {stall.pid})", style="dim")
    return line


def _message(view: LiveView, controls: Controls) -> Text:
    if controls.capture:
        return Text(controls.capture, style="bold magenta")
    if controls.message:
        return Text(plain(controls.message), style="magenta")
    if view.notes:
        return Text(f"note: {plain(view.notes[-1])}", style="dim")
    return Text()


def _keys(controls: Controls) -> Text:
    line = Text()
    for key, what in controls.keys:
        line.append(f" {key} ", style="reverse")
        line.append(f" {what}  ")
    return line


def _labelled(label: str, text: Text) -> Text:
    line = Text(label.ljust(_LABEL), style="bold cyan")
    line.append_text(Text("", style="not bold default").append_text(text))
    return line


def _spark(values: Sequence[int], limit: int, width: int, glyphs: _Glyphs) -> str:
    """Return the last values as one character each, the newest at the right; anything but 0 is visible."""
    steps = len(glyphs.levels) - 1
    return "".join(
        glyphs.levels[min(max(math.ceil(value / max(limit, 1) * steps), 0), steps)] for value in values[-width:]
    )


def _short(duration_ns: int) -> str:
    return format_duration_ns(duration_ns).replace(".00", "").replace(".0", "").replace(" ", "")


def _compact(count: int) -> str:
    return f"{count:,}" if count < 100_000 else f"{count / 1e3:,.0f}k" if count < 10_000_000 else f"{count / 1e6:,.0f}M"


def _cut(text: str, width: int, glyphs: _Glyphs) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + glyphs.cut


def _fit(line: Text, width: int, glyphs: _Glyphs) -> Text:
    """Return the line cut to the width."""
    if line.cell_len <= width:
        return line
    line = line[: width - 1]
    line.append(glyphs.cut)
    return line
