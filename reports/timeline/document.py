"""The timeline as the page's scripts read it: one JSON document, and the packed columns beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from stallscope.probes.catalogue import default_functions
from stallscope.reports.timeline.columns import Columns
from stallscope.reports.timeline.compute import Timeline
from stallscope.reports.timeline.imported import TROUBLE
from stallscope.reports.triggers import describe as describe_trigger
from stallscope.tracer.analysis.blame import CAUSES

_NS_PER_S = 1_000_000_000


def describe(timeline: Timeline) -> tuple[dict[str, Any], str]:
    """Return the document and the columns it points into, in base64."""
    columns = Columns()
    document = {
        "offset_ns": timeline.offset_ns,
        "elapsed_ns": timeline.elapsed_ns,
        # a double holds no wall-clock nanoseconds
        "wall_s": timeline.wall_ns // _NS_PER_S,
        "wall_rest_ns": timeline.wall_ns % _NS_PER_S,
        "slow_ns": timeline.slow_ns,
        "stall_ns": timeline.summary.stall_ns,
        "sample_ns": timeline.summary.sample_ns,
        "servers": [{"pid": server.pid, "name": server.name} for server in timeline.servers],
        "threads": [
            {"tid": thread.tid, "pid": thread.pid, "name": thread.name, "depth": thread.depth}
            for thread in timeline.threads
        ],
        "listeners": [
            {"index": listener.index, "address": listener.address, "pid": listener.pid}
            for listener in timeline.listeners
        ],
        "paths": timeline.paths,
        "functions": _functions(timeline, columns),
        "calls": _calls(timeline, columns),
        "density": _density(timeline, columns),
        "heat": _heat(timeline, columns),
        "refusals": _refusals(timeline, columns),
        "queues": _queues(timeline, columns),
        "rates": _rates(timeline, columns),
        "stalls": _stalls(timeline, columns),
        "sampled": _sampled(timeline, columns),
        "imported": _imported(timeline, columns),
        "triggers": [
            {"time_ns": item.time_ns, "text": item.text, "seen": describe_trigger(item)}
            for item in timeline.summary.triggers
        ],
        "bands": [
            {"kind": band.kind, "start_ns": band.start_ns, "end_ns": band.end_ns, "text": band.text, "pid": band.pid}
            for band in timeline.bands
        ],
    }
    document["columns"], packed = columns.packed()
    return document, packed


def script_json(document: object) -> str:
    """Return JSON that cannot end the script element it is put into."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _functions(timeline: Timeline, columns: Columns) -> list[dict[str, Any]]:
    functions = []
    colours = _colours([function.name for function in timeline.functions])
    for index, function in enumerate(timeline.functions):
        arguments = []
        for field in function.fields:
            values = timeline.calls.arguments.get((index, field.name))
            if values is not None:
                name = f"arguments.{index}.{field.name}"
                columns.add(name, values)
                arguments.append({"name": field.name, "unit": field.unit, "column": name})
        functions.append(
            {
                "name": function.name,
                "calls": function.calls,
                "colour": colours[function.name],
                "arguments": arguments,
            }
        )
    return functions


def _colours(names: Sequence[str]) -> dict[str, int]:
    """Return each function's place in the palette: the default ones keep theirs, the others come behind in order."""
    usual = default_functions()
    return {name: place for place, name in enumerate(dict.fromkeys([*usual, *names]))}


def _calls(timeline: Timeline, columns: Columns) -> dict[str, int]:
    calls = timeline.calls
    columns.add("calls.start_ns", calls.start_ns, ascending=True)
    columns.add("calls.duration_ns", calls.duration_ns)
    # what is spent in recorded calls inside is 0 for most, unlike the time of their own
    columns.add("calls.inside_ns", calls.duration_ns - calls.self_ns)
    columns.add("calls.thread", calls.thread, ascending=True)
    columns.add("calls.function", calls.function)
    columns.add("calls.depth", calls.depth)
    # how far back the caller is, 0: none
    columns.add("calls.caller", np.where(calls.parent < 0, 0, np.arange(len(calls.parent)) - calls.parent))
    columns.add("calls.unfinished", calls.unfinished)
    return {
        "total": calls.total,
        "slow": calls.slow,
        "thinned": calls.thinned,
        "short": timeline.short_calls,
    }


def _density(timeline: Timeline, columns: Columns) -> dict[str, Any]:
    density = timeline.density
    columns.add("density.group", density.group, ascending=True)
    columns.add("density.bin", density.bin, ascending=True)
    columns.add("density.calls", density.calls)
    columns.add("density.busy_ns", density.busy_ns)
    columns.add("density.longest_ns", density.longest_ns)
    return {"bin_ns": density.bin_ns, "groups": density.groups.tolist()}


def _heat(timeline: Timeline, columns: Columns) -> dict[str, int]:
    columns.add("heat.cell", timeline.heat.cell, ascending=True)
    columns.add("heat.calls", timeline.heat.calls)
    return {"column_ns": timeline.heat.column_ns, "columns": timeline.heat.columns}


def _refusals(timeline: Timeline, columns: Columns) -> dict[str, Any]:
    refusals = timeline.refusals
    columns.add("refusals.after_ns", refusals.after_ns, ascending=True)
    columns.add("refusals.seen_ns", refusals.seen_ns, ascending=True)
    for name in ("count", "path", "listener", "cause", "address", "port"):
        columns.add(f"refusals.{name}", getattr(refusals, name))
    return {
        "one_by_one": refusals.one_by_one,
        "causes": CAUSES,
        "paths": [{"name": path.name, "rst": path.rst, "overflow": path.overflow} for path in refusals.paths],
        "addresses": refusals.addresses,
    }


def _queues(timeline: Timeline, columns: Columns) -> list[dict[str, Any]]:
    lanes = []
    for index, lane in enumerate(timeline.queues):
        columns.add(f"queue.{index}.time_ns", lane.time_ns, ascending=True)
        columns.add(f"queue.{index}.length", lane.length)
        columns.add(f"queue.{index}.limit", lane.limit)
        lanes.append({"address": lane.listener.address, "pid": lane.listener.pid})
    return lanes


def _rates(timeline: Timeline, columns: Columns) -> list[dict[str, Any]]:
    lanes = []
    for index, lane in enumerate(timeline.rates):
        columns.add(f"rate.{index}.bin", lane.bin, ascending=True)
        columns.add(f"rate.{index}.count", lane.count)
        lanes.append({"name": lane.name, "pid": lane.pid, "bin_ns": lane.bin_ns})
    return lanes


def _stalls(timeline: Timeline, columns: Columns) -> dict[str, int]:
    lane = timeline.stalls
    for name in lane.frame.columns:
        columns.add(f"stalls.{name}", lane.frame[name].to_numpy(), ascending=name == "start_ns")
    for name in lane.trees.columns:
        columns.add(f"trees.{name}", lane.trees[name].to_numpy(), ascending=name == "stall")
    return {"total": lane.total, "total_ns": lane.total_ns}


def _sampled(timeline: Timeline, columns: Columns) -> list[dict[str, str]]:
    """Return the functions that sampled stacks name."""
    trees = timeline.stalls.sampled
    for name in ("stall", "function", "samples", "weight_ns", "self_ns", "off_ns"):
        columns.add(f"sampled.{name}", trees.nodes[name].to_numpy(), ascending=name == "stall")
    # how far back the caller is, 0: none
    parent = trees.nodes["parent"].to_numpy()
    columns.add("sampled.caller", np.where(parent < 0, 0, np.arange(len(parent)) - parent))
    return [{"name": name, "file": file} for name, file in trees.functions]


def _imported(timeline: Timeline, columns: Columns) -> dict[str, Any]:
    imported = timeline.imported
    packets, spans, samples = [], [], []
    for index, lane in enumerate(imported.packets):
        columns.add(f"packets.{index}.bin", lane.bin, ascending=True)
        columns.add(f"packets.{index}.count", lane.count)
        packets.append({"name": lane.name, "trouble": lane.name in TROUBLE, "bin_ns": lane.bin_ns})
    for index, source in enumerate(imported.spans):
        columns.add(f"spans.{index}.start_ns", source.start_ns, ascending=True)
        for name in ("duration_ns", "uncertain_ns", "text"):
            columns.add(f"spans.{index}.{name}", getattr(source, name))
        spans.append({"source": source.source, "texts": source.texts, "left_out": source.left_out})
    for series in imported.samples:
        # few, and not whole numbers: they are in the document itself
        times, values = series.time_ns.tolist(), series.value.tolist()
        samples.append({"name": series.name, "unit": series.unit, "time_ns": times, "value": values})
    return {"packets": packets, "spans": spans, "samples": samples}
