"""The tables of the page: text for people beside numbers to sort by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stallscope.probes.catalogue import Field
from stallscope.reports.lines import percent
from stallscope.reports.timeline.compute import Timeline
from stallscope.tracer.analysis.tables import Ints
from stallscope.tracer.units import format_bytes, format_duration_ns

SHOWN_STALLS = 200


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and what it is sorted by; numbers go to the right."""

    text: str
    key: float | str

    @property
    def number(self) -> bool:
        """Return whether it is a number."""
        return not isinstance(self.key, str)


@dataclass(frozen=True)
class Row:
    """One row, and where the page goes when it is chosen.

    Attributes:
        stall, call: index of a stall or a call, -1: none; window: start and length in ns, "": none.
    """

    cells: tuple[Cell, ...]
    stall: int = -1
    call: int = -1
    window: str = ""


@dataclass(frozen=True)
class Table:
    """A table; ``columns`` as (title, whether it holds numbers), ``note`` says what is not in it."""

    columns: tuple[tuple[str, bool], ...]
    rows: tuple[Row, ...]
    note: str = ""


def stalls_table(timeline: Timeline) -> Table:
    """Return the worst stalls, by time."""
    frame = timeline.stalls.frame
    refused = frame["overflows"] + frame["overflows_drain"]
    worst = frame.assign(refused=refused).nlargest(SHOWN_STALLS, ["refused", "duration_ns"]).index.sort_values()
    mostly = _mostly(timeline)
    sampled = {item.start_ns: f"{item.sampled_in} (sampled)" for item in timeline.summary.stalls if item.sampled_in}
    servers = {server.pid: server.name for server in timeline.servers}
    rows = []
    for index in worst:
        stall = frame.loc[index]
        queue = int(stall["queue_max"])
        accepted = int(stall["accepted"])
        known = accepted >= 0
        accepted += max(int(stall["accepted_drain"]), 0)
        cells = [
            _time(timeline, int(stall["start_ns"])),
            _duration(int(stall["duration_ns"]), more=bool(stall["unfinished"])),
            Cell("?" if queue < 0 else f"{queue:,} of {int(stall['queue_limit']):,}", queue),
            _count(int(refused.loc[index])),
            _duration(int(stall["drain_ns"]), more=not stall["drained"]) if stall["drain_ns"] else Cell("-", 0),
            _count(accepted) if known else Cell("?", -1),
            Cell(*[mostly.get(index) or sampled.get(int(stall["start_ns"]), "unexplained")] * 2),
        ]
        if len(servers) > 1:
            name = servers.get(int(stall["pid"]), f"process {int(stall['pid'])}")
            cells.insert(1, Cell(name, name))
        rows.append(Row(tuple(cells), stall=int(index)))
    columns = [("at", True), ("blocked", True), ("queue", True), ("refused", True), ("drain", True)]
    columns += [("accepted", True), ("mostly in", False)]
    if len(servers) > 1:
        columns.insert(1, ("server", False))
    left = timeline.stalls.total - len(rows)
    return Table(tuple(columns), tuple(rows), f"{left:,} lesser stalls are not in this table" if left else "")


def slowest_table(timeline: Timeline) -> Table:
    """Return the longest calls and those with the most self time."""
    calls = timeline.calls
    several = len(timeline.threads) > 1
    place = _place_in_function(calls.function)
    rows = []
    for index in timeline.slowest:
        function = timeline.functions[int(calls.function[index])]
        arguments = [
            argument_text(field, int(calls.arguments[int(calls.function[index]), field.name][place[index]]))
            for field in function.fields
            if (int(calls.function[index]), field.name) in calls.arguments
        ]
        cells = [
            _time(timeline, int(calls.start_ns[index])),
            Cell(function.name, function.name),
            _duration(int(calls.duration_ns[index]), more=bool(calls.unfinished[index])),
            _duration(int(calls.self_ns[index])),
            Cell(*[_caller(timeline, int(index))] * 2),
            Cell(*[", ".join(arguments)] * 2),
        ]
        if several:
            name = timeline.threads[int(calls.thread[index])].name
            cells.insert(1, Cell(name, name))
        rows.append(Row(tuple(cells), call=int(index)))
    columns = [("at", True), ("function", False), ("latency", True), ("self", True), ("called by", False)]
    columns.append(("arguments", False))
    if several:
        columns.insert(1, ("thread", False))
    return Table(tuple(columns), tuple(rows))


def trees_table(timeline: Timeline) -> Table:
    """Return the longest call trees, such as one tick of serverCron: whom it visited and where its time went."""
    summary = timeline.summary
    rows = []
    for tree in sorted(summary.trees, key=lambda item: -item.duration_ns):
        most = tree.functions[0]
        cells = (
            _time(timeline, tree.start_ns),
            Cell(tree.root, tree.root),
            _duration(tree.duration_ns, more=tree.unfinished),
            _count(tree.clients),
            _count(tree.calls),
            Cell(most.name, most.name),
            _duration(most.self_ns),
        )
        rows.append(Row(cells, window=f"{tree.start_ns} {tree.duration_ns}"))
    columns = (("at", True), ("root", False), ("took", True), ("clients", True), ("calls", True),
               ("mostly in", False), ("of it", True))  # fmt: skip
    left = summary.tree_count - len(rows)
    return Table(columns, tuple(rows), f"{left:,} shorter ones are not in this table" if left else "")


def functions_table(timeline: Timeline) -> Table:
    """Return every function over the whole timeline."""
    below = f"<{format_duration_ns(timeline.summary.min_duration_ns)}"
    rows = []
    for item in timeline.summary.functions:
        lengths = (item.p50_ns, item.p99_ns, item.p999_ns, item.max_ns)
        none = below if item.calls else "-"
        cells = [
            Cell(item.name, item.name),
            _count(item.calls),
            _duration(item.total_ns),
            _duration(item.self_ns),
            Cell("?", -1.0) if item.busy_share is None else Cell(f"{item.busy_share:.1%}", item.busy_share),
            *(Cell(none, -1) if length is None else _duration(length) for length in lengths),
            Cell(*[", ".join(part for part in (item.rung, item.note) if part)] * 2),
        ]
        rows.append(Row(tuple(cells)))
    numbers = ("calls", "total", "self", "of loop", "p50", "p99", "p99.9", "longest")
    return Table((("function", False), *((name, True) for name in numbers), ("measured by", False)), tuple(rows))


def sampled_table(timeline: Timeline) -> Table:
    """Return the functions on sampled stacks, most time first."""
    sampled = timeline.summary.sampled
    rows = []
    for item in sampled.functions if sampled else ():
        share = percent(item.total_ns, sampled.total_ns if sampled else 0)
        rows.append(
            Row(
                (
                    Cell(item.name, item.name),
                    Cell(item.file, item.file),
                    _duration(item.total_ns),
                    Cell(share, item.total_ns),
                    _duration(item.self_ns),
                    Cell(*["yes" if item.traced else "no"] * 2),
                )
            )
        )
    columns = (("function", False), ("file", False), ("with callees", True), ("share", True), ("self", True))
    return Table((*columns, ("probed", False)), tuple(rows))


def listeners_table(timeline: Timeline) -> Table:
    """Return every listener: its queue and what was refused there."""
    rows = []
    for item in timeline.summary.listeners:
        count = item.overflows
        cells = (
            Cell(item.address, item.address),
            Cell(str(item.pid), item.pid),
            Cell("?", -1) if item.queue_max is None else _count(item.queue_max),
            *(_count(number) for number in (item.queue_limit, count.total, count.inside, count.drain, count.outside)),
        )
        rows.append(Row(cells))
    for namespace in timeline.summary.reconciliation:
        count = namespace.not_attributable
        if count.total:
            blank = (Cell("", -1),) * 3
            parts = (count.total, count.inside, count.drain, count.outside)
            rows.append(Row((Cell("not attributable", "not"), *blank, *(_count(number) for number in parts))))
    names = ("process", "longest queue", "limit", "refused", "in stalls", "draining", "at other times")
    return Table((("listener", False), *((name, True) for name in names)), tuple(rows))


def trust(timeline: Timeline) -> tuple[tuple[str, str], ...]:
    """Return how far to trust the page, as (what, in words)."""
    summary, calls = timeline.summary, timeline.calls
    lost = sum(loss.lost for loss in summary.losses)
    lines = [
        ("recording", "complete" if summary.complete else "cut short"),
        ("lost", f"{lost:,} events" if lost else "nothing"),
        *summary.rungs.items(),
    ]
    slow = format_duration_ns(timeline.slow_ns)
    if calls.thinned:
        drawn = f"{len(calls.start_ns):,} calls are drawn one by one, all {calls.slow:,} of at least {slow} among them"
        lines.append(("level of detail", f"{drawn}; {calls.thinned:,} shorter calls are drawn as density"))
    else:
        lines.append(("level of detail", f"every one of {calls.total:,} calls is in this page"))
    if timeline.short_calls:
        least = format_duration_ns(summary.min_duration_ns)
        text = f"{timeline.short_calls:,} calls shorter than {least} were counted and not recorded: they are in no lane"
        lines.append(("short calls", text))
    for item in summary.reconciliation:
        known = "" if item.counted is None else f" of {item.counted:,}"
        lines.append(("overflows", f"observed {item.observed:,}{known} ListenOverflows the kernel counted"))
    lines += [(f"at {(note.time_ns + timeline.offset_ns) / 1e9:.3f} s", note.text) for note in summary.notes]
    lines += [("warning", warning) for warning in summary.warnings]
    return tuple(lines)


def argument_text(field: Field, value: int) -> str:
    """Return one argument with its name and unit, as ``free_bytes 12.0 MB``."""
    if field.name.endswith("_bytes"):
        return f"{field.name} {format_bytes(value)}"
    return f"{field.name} {value:,} {field.unit}" if field.unit == "s" else f"{field.name} {value}"


def _mostly(timeline: Timeline) -> dict[int, str]:
    """Return, by stall, the function with the most self time; none where less than half is explained."""
    trees, frame = timeline.stalls.trees, timeline.stalls.frame
    if trees.empty:
        return {}
    function = np.array([function for _, function in timeline.paths], np.int64)[trees["path"].to_numpy()]
    own = trees.assign(function=function).groupby(["stall", "function"]).agg(self_ns=("self_ns", "sum")).reset_index()
    first = own.sort_values("self_ns", ascending=False).drop_duplicates("stall")
    explained = (2 * frame["explained_ns"] >= frame["duration_ns"]).to_numpy()
    return {
        stall: timeline.functions[index].name
        for stall, index in zip(first["stall"].tolist(), first["function"].tolist(), strict=True)
        if explained[stall]
    }


def _place_in_function(function: Ints) -> Ints:
    """Return which of its function's calls each call is."""
    order = np.argsort(function, kind="stable")
    first = np.searchsorted(function[order], function[order], side="left")
    place = np.empty(len(function), np.int64)
    place[order] = np.arange(len(function)) - first
    return place


def _caller(timeline: Timeline, call: int) -> str:
    parent = int(timeline.calls.parent[call])
    return timeline.functions[int(timeline.calls.function[parent])].name if parent >= 0 else "-"


def _time(timeline: Timeline, start_ns: int) -> Cell:
    return Cell(f"{(start_ns + timeline.offset_ns) / 1e9:.4f} s", start_ns)


def _duration(duration_ns: int, *, more: bool = False) -> Cell:
    return Cell(("> " if more else "") + format_duration_ns(duration_ns), duration_ns)


def _count(number: int) -> Cell:
    return Cell(f"{number:,}", number)
