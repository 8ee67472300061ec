"""The summary as text for a terminal, a pipe or a mail: 80 columns are enough, colour is never needed."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone

from rich.console import Console
from rich.padding import Padding
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from stallscope.reports import findings_text
from stallscope.reports.imported import imported_lines
from stallscope.reports.lines import INDENT, Line, faint, heading, percent, plain, stripped, table_of
from stallscope.reports.samples_text import sampled_stacks
from stallscope.reports.triggers import trigger_lines
from stallscope.tracer.analysis.functions import FieldSummary, FunctionSummary
from stallscope.tracer.analysis.listener_summary import ListenerSummary, Reconciliation
from stallscope.tracer.analysis.overflows import LISTEN_OVERFLOWS
from stallscope.tracer.analysis.requests import RefusedConnections, RequestSummary
from stallscope.tracer.analysis.stall_summary import StallSummary
from stallscope.tracer.analysis.stalls import ITERATIONS
from stallscope.tracer.analysis.summary import Summary
from stallscope.tracer.units import format_bytes, format_count, format_duration_ns

SHOWN_STALLS = 8
SHOWN_FUNCTIONS_IN_STALL = 6
_WIDE = 116


def render(summary: Summary, console: Console) -> None:
    """Print a summary: the verdict, stalls, functions, accept queues, and how far to trust it.

    Lines end where their text ends, so that a pipe or a mail gets no trailing blanks.
    """
    options = console.options
    for number, part in enumerate(_parts(summary, options.max_width)):
        if number:
            console.print()
        for renderable in part:
            for line in console.render_lines(renderable, options, pad=False):
                console.print(Segments([*stripped(line), Segment.line()]), end="")


def _parts(summary: Summary, width: int) -> Iterable[list[Line]]:
    yield [Text(plain(summary.verdict), style="bold")]
    yield _about(summary)
    if summary.triggers:
        yield trigger_lines(summary)
    shown = findings_text.findings(summary)
    if shown:
        yield shown
    if summary.stalls:
        yield _stalls(summary)
        yield _inside(summary)
    if summary.sampled and summary.sampled.samples:
        yield sampled_stacks(summary.sampled)
    if summary.trees:
        yield findings_text.trees(summary)
    called = [function for function in summary.functions if function.calls]
    if called:
        yield from _functions(called, summary, width)
        amounts = _amounts(called)
        if amounts:
            yield amounts
    if summary.listeners or summary.reconciliation:
        yield _queues(summary)
    if summary.requests:
        yield _requests(summary.requests)
    if summary.imported:
        lines = imported_lines(summary.imported)
        yield [heading("Imported"), *(Padding(Text(plain(line)), INDENT) for line in lines)]
    if summary.what_if:
        yield findings_text.what_if(summary)
    yield _trust(summary)


def _about(summary: Summary) -> list[Line]:
    lines: list[Line] = []
    for target in summary.targets:
        words = [
            f"{target.product} {target.version}".strip(),
            f"process {target.pid}",
            target.exe,
            target.allocator,
        ]
        lines.append(faint(", ".join(word for word in words if word)))
    when = _wall_time(summary.started_wall_ns, "%Y-%m-%d %H:%M:%S UTC")
    words = [f"{format_duration_ns(summary.elapsed_ns)} recorded", f"from {when}" if when else ""]
    words += [f"Linux {summary.host[key]}" for key in ("kernel",) if key in summary.host]
    lines.append(faint(", ".join(word for word in words if word)))
    if summary.loop:
        loop = summary.loop
        share = f" ({percent(loop.busy_ns, summary.elapsed_ns)} of the time)" if len(summary.targets) == 1 else ""
        iterations = format_count(loop.iterations, "event loop iteration")
        if loop.seen_ns is not None:
            iterations += f" in the {format_duration_ns(loop.seen_ns)} in which detail was attached"
            share = ""
        lines.append(faint(f"{iterations}, busy for {format_duration_ns(loop.busy_ns)}{share}"))
    return lines


def _stalls(summary: Summary) -> list[Line]:
    what = f"Stalls: {summary.stall_basis}" if summary.stall_basis == ITERATIONS else "Stalls: calls"
    title = f"{what} of at least {format_duration_ns(summary.stall_ns)}"
    shown = sorted(summary.stalls, key=_badness)[-SHOWN_STALLS:]
    if summary.stall_count > len(shown):
        title += f" (the worst {len(shown)} of {summary.stall_count:,})"
    table = table_of("at", "blocked", "queue", "refused", "drain", "accepted", "mostly in")
    for stall in sorted(shown, key=lambda item: item.start_ns):
        queue = "?" if stall.queue_max is None else f"{stall.queue_max:,}/{stall.queue_limit:,}"
        drain = format_duration_ns(stall.drain_ns) if stall.drain_ns else "-"
        accepted = "?" if stall.accepted is None else f"{stall.accepted + (stall.accepted_drain or 0):,}"
        table.add_row(
            f"{stall.start_ns / 1e9:.3f} s",
            ("> " if stall.unfinished else "") + format_duration_ns(stall.duration_ns),
            queue,
            f"{stall.overflows + stall.overflows_drain:,}",
            drain if stall.drained else f"> {format_duration_ns(stall.drain_ns)}",
            accepted,
            Text(plain(_mostly(stall))),
        )
    return [heading(title), Padding(table, INDENT)]


def _inside(summary: Summary) -> list[Line]:
    worst = max(summary.stalls, key=_badness)
    lines: list[Line] = [heading(f"Inside the worst: {format_duration_ns(worst.duration_ns)} at {_clock(worst)}")]
    if len(worst.blamed) > 1:
        lines.append(Padding(Text(" > ".join(plain(name) for name in worst.blamed)), INDENT))
    table = table_of("function", "calls", "self time", "share", "longest call", first_left=True)
    for function in worst.functions[:SHOWN_FUNCTIONS_IN_STALL]:
        table.add_row(
            Text(plain(function.name)),
            f"{function.calls:,}",
            format_duration_ns(function.self_ns),
            percent(function.self_ns, worst.duration_ns),
            format_duration_ns(function.longest_ns),
        )
    table.add_row(
        Text("unexplained", style="italic"),
        "",
        format_duration_ns(worst.unexplained_ns),
        percent(worst.unexplained_ns, worst.duration_ns),
        "",
    )
    lines.append(Padding(table, INDENT))
    lines += findings_text.around_a_stall(worst, waits_exact=summary.waits_exact)
    return lines


def _functions(functions: list[FunctionSummary], summary: Summary, width: int) -> Iterable[list[Line]]:
    """Yield one table where it fits, otherwise one for the time in all calls and one for single calls."""
    below = f"<{format_duration_ns(summary.min_duration_ns)}"

    def of_all(function: FunctionSummary) -> list[str]:
        share = "?" if function.busy_share is None else f"{function.busy_share:.1%}"
        return [format_duration_ns(function.total_ns), format_duration_ns(function.self_ns), share]

    def of_one(function: FunctionSummary) -> list[str]:
        lengths = (function.p50_ns, function.p99_ns, function.p999_ns, function.max_ns)
        return [below if length is None else format_duration_ns(length) for length in lengths]

    all_columns, one_columns = ("total", "self", "of loop"), ("p50", "p99", "p99.9", "max")
    together = table_of("function", "calls", *all_columns, *one_columns, first_left=True)
    first = table_of("function", "calls", *all_columns, first_left=True)
    second = table_of("function", *one_columns, first_left=True)
    for function in functions:
        name, calls = Text(plain(function.name)), f"{function.calls:,}"
        together.add_row(name, calls, *of_all(function), *of_one(function))
        first.add_row(name, calls, *of_all(function))
        second.add_row(name, *of_one(function))
    title = "One call"
    if any(function.short_calls for function in functions):
        title += f" (shorter than {below[1:]}: counted, not timed one by one)"
    if width >= _WIDE:
        yield [heading("Functions"), Padding(together, INDENT)]
    else:
        yield [heading("Functions"), Padding(first, INDENT)]
        yield [heading(title), Padding(second, INDENT)]


def _amounts(functions: list[FunctionSummary]) -> list[Line]:
    table = table_of("argument", "total", "smallest", "median", "largest", first_left=True)
    for function in functions:
        shown = [item for item in function.fields if item.total is not None or item.name == "idle_s"]
        if shown:
            table.add_row(Text(plain(function.name)))
        for item in shown:
            total = "" if item.total is None else _amount(item, item.total)
            numbers = (item.minimum, item.median, item.maximum)
            table.add_row(Text(f"  {plain(item.name)}"), total, *(_amount(item, number) for number in numbers))
    return [heading("Arguments of recorded calls"), Padding(table, INDENT)] if table.row_count else []


def _queues(summary: Summary) -> list[Line]:
    table = table_of("listener", "longest", "limit", "refused", "in stalls", "draining", "other", first_left=True)
    for listener in sorted(summary.listeners, key=_listener_order):
        count = listener.overflows
        table.add_row(
            Text(plain(listener.address)),
            "?" if listener.queue_max is None else f"{listener.queue_max:,}",
            f"{listener.queue_limit:,}",
            *(f"{number:,}" for number in (count.total, count.inside, count.drain, count.outside)),
        )
    for item in summary.reconciliation:
        count = item.not_attributable
        if count.total:
            numbers = (count.total, count.inside, count.drain, count.outside)
            table.add_row(Text("not attributable", style="italic"), "", "", *(f"{number:,}" for number in numbers))
    lines: list[Line] = [heading("Accept queues"), Padding(table, INDENT)]
    for item in summary.reconciliation:
        lines += [Padding(faint(text), INDENT) for text in _reconciled(item)]
    return [*lines, *findings_text.blame(summary.blame)]


def _reconciled(item: Reconciliation) -> Iterable[str]:
    known = "" if item.counted is None else f" of {item.counted:,}"
    end = "; the kernel's count at the end is not known" if item.counted is None else " the kernel counted"
    yield f"observed {item.observed:,}{known} ListenOverflows{end}{_rest(item.unwatched, item.unexplained or 0)}"
    for match in item.matches:
        if match.name != LISTEN_OVERFLOWS and (match.counted or match.observed):
            rest = _rest(match.unwatched, match.unexplained)
            yield f"observed {match.observed:,} of {match.counted:,} {match.name}{rest}"


def _rest(unwatched: int, unexplained: int) -> str:
    text = f", {unwatched:,} of them at listeners not watched" if unwatched else ""
    return text + (f"; {unexplained:,} unexplained" if unexplained else "")


def _requests(requests: RequestSummary) -> list[Line]:
    lines: list[Line] = [heading("Connection requests")]
    if not requests.listeners:
        lines.append(Padding(faint("none"), INDENT))
    for listener in requests.listeners:
        table = table_of(plain(listener.address), "", first_left=True)
        for event in listener.events:
            table.add_row(Text(plain(event.name)), f"{'' if listener.exact else 'at least '}{event.count:,}")
        lines.append(Padding(table, INDENT))
        at_least = "" if requests.complete else "at least "
        if listener.refused:
            lines.append(Padding(Text(at_least + _linked(listener.refused)), INDENT))
        if listener.wait:
            wait = listener.wait
            lengths = (("p50", wait.p50_ns), ("p99", wait.p99_ns), ("longest", wait.max_ns))
            text = ", ".join(f"{name} {format_duration_ns(length)}" for name, length in lengths)
            lines.append(Padding(Text(f"wait in the accept queue: {text}"), INDENT))
    missing = [
        f"{number:,} {why}"
        for number, why in ((requests.thinned, "beyond the rate limit"), (requests.lost, "lost"))
        if number
    ]
    if missing:
        lines.append(Padding(faint(f"counted, but not recorded one by one: {', '.join(missing)}"), INDENT))
    return lines


def _linked(refused: RefusedConnections) -> str:
    """Return what happened to the connections that were refused, in one sentence."""
    were = "connection was" if refused.connections == 1 else "connections were"
    text = f"{refused.connections:,} {were} refused {format_count(refused.times, 'time')}"
    if refused.wait_max_ns:
        first, last = format_duration_ns(refused.wait_min_ns), format_duration_ns(refused.wait_max_ns)
        median = format_duration_ns(refused.wait_median_ns)
        text += f", waited {first}" if first == last else f", waited {first} to {last} (median {median})"
    return f"{text}; {f'{refused.taken:,}' if refused.taken else 'none'} got in"


def _trust(summary: Summary) -> list[Line]:
    lines: list[Line] = [heading("How far to trust this")]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    lost = sum(loss.lost for loss in summary.losses)
    table.add_row("recording", "complete" if summary.complete else "cut short")
    table.add_row("lost", f"{lost:,} events" if lost else "nothing")
    for part, rung in summary.rungs.items():
        table.add_row(Text(plain(part)), Text(plain(rung)))
    if summary.cost:
        table.add_row("cost", Text(", ".join(_cost(name, value) for name, value in summary.cost.items())))
    for function in summary.functions:
        if function.note:
            table.add_row(Text(plain(function.name)), Text(plain(function.note)))
    for note in summary.notes:
        table.add_row(f"at {note.time_ns / 1e9:.3f} s", Text(plain(note.text)))
    for warning in summary.warnings:
        table.add_row(Text("warning", style="yellow"), Text(plain(warning)))
    lines.append(Padding(table, INDENT))
    return lines


def _mostly(stall: StallSummary) -> str:
    if not stall.blamed:
        return f"{stall.sampled_in} (sampled)" if stall.sampled_in else "unexplained"
    return stall.blamed[-1]


def _badness(stall: StallSummary) -> tuple[int, int]:
    return (stall.overflows + stall.overflows_drain, stall.duration_ns)


def _listener_order(listener: ListenerSummary) -> tuple[int, str]:
    return (-listener.overflows.total, listener.address)


def _amount(item: FieldSummary, number: int) -> str:
    return format_bytes(number) if item.name.endswith("_bytes") else f"{number:,} {item.unit}"


def _cost(name: str, value: float) -> str:
    """Return one measured cost in words: the name carries the unit."""
    stem, _, unit = plain(name).rpartition("_")
    words = stem.replace("_", " ")
    if unit == "ns":
        return f"{words} {format_duration_ns(value)}"
    if unit == "s":
        return f"{words} {format_duration_ns(value * 1e9)}"
    if unit == "bytes":
        return f"{words} {format_bytes(value)}"
    if unit in ("ratio", "share"):
        return f"{words} {value:.2%}"
    return f"{plain(name).replace('_', ' ')} {value:,.6g}"


def _clock(stall: StallSummary) -> str:
    """Return when a stall began, since the start and by the wall clock, to find it in other logs."""
    wall = _wall_time(stall.wall_ns, "%H:%M:%S.%f")[:-3]
    return f"{stall.start_ns / 1e9:.3f} s" + (f" ({wall} UTC)" if wall else "")


def _wall_time(wall_ns: int, form: str) -> str:
    try:
        return datetime.fromtimestamp(wall_ns / 1e9, timezone.utc).strftime(form)
    except (OverflowError, ValueError, OSError):
        return ""
