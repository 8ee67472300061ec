"""Stalls: when the only thread that accepts connections was busy for too long, with what, and what it cost.

A stall is a recorded event loop iteration of at least the threshold. Where the event loop was not
observed, calls of the main thread that nothing recorded encloses take its place, and ``basis`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.tracer.analysis.clients import with_clients
from stallscope.tracer.analysis.nesting import Nested
from stallscope.tracer.analysis.overflows import attribute_overflows
from stallscope.tracer.analysis.requests import overflow_events
from stallscope.tracer.analysis.segments import NOT_KNOWN, ranges, sum_by
from stallscope.tracer.analysis.stall_queues import with_queue
from stallscope.tracer.analysis.tables import Tables
from stallscope.tracer.analysis.waits import with_waits
from stallscope.tracer.manifest import ITERATION

ITERATIONS = "event loop iterations"
ROOT_CALLS = "calls, since the event loop was not observed"

INSIDE, DRAIN, OUTSIDE = "inside", "drain", "outside"


@dataclass(frozen=True)
class Stalls:
    """The stalls of a recording and the overflows around them.

    Attributes:
        basis: ``ITERATIONS`` or ``ROOT_CALLS``.
        frame: one row per stall, sorted by start:

            ================= ======= ===== ============================================================
            start_ns          int64   ns    start of the iteration
            duration_ns       int64   ns    its length; until the end of the recording if unfinished
            pid, tid          int64         process and thread
            unfinished        bool          it lasted beyond the end of the recording
            first_call,       int64         the thread's calls that began in it: this range of rows
            last_call                       of ``Nested.calls``, the end not included
            explained_ns      int64   ns    time inside recorded calls
            listener          int64         the listener whose queue was the fullest, -1: none known
            queue_start       int64         length of its queue when the stall began, -1: not known
            queue_max         int64         greatest length seen in the stall, -1: not known
            queue_end         int64         length when the stall ended, -1: not known
            queue_limit       int64         its limit, -1: not known
            full_ns           int64   ns    from the start until it was first found full (by a sample or a request),
                                            -1: it was not, or it is not known
            drain_ns          int64   ns    from the end of the stall until every queue of the process was
                                            normal; 0: it was, or it is not known
            drained           bool          the queue was seen to become normal before the next stall began
                                            or the recording ended
            accepted          int64         connections accepted in the stall, -1: not observed
            accepted_drain    int64         connections accepted while the queue drained, -1: not observed
            overflows         int64         refused in the stall
            overflows_drain   int64         refused while the queue drained
            first_overflow_ns int64   ns    from the start until the first of either was seen (sampled: up to one
                                            sampling interval after it happened), -1: there was none
            connections       int64         different connections that were refused in either, -1: not known
            waited            int64         connections that were in the accept queue during the stall and were
                                            accepted later, by :func:`waits.with_waits`, -1: not known
            wait_median_ns,   int64   ns    how long they were in it, all together; -1: not known, or none
            wait_max_ns
            clients           int64         clients whose calls are in it, -1: no call told one
            ================= ======= ===== ============================================================

            A queue is normal at or below a tenth of its limit or, if that is more, at or below the length
            it had when the stall began, unless it was then already more than half full.
        overflows: every overflow, by :func:`requests.overflow_events`, or else the rows of
            :func:`overflows.attribute_overflows` (``connection`` is -1), with ``stall`` (int64, row of
            ``frame``, -1: none) and ``phase`` (``inside``, ``drain``, ``outside``). Overflows seen in
            an interval that touches a stall are inside it. What is not attributable is compared with
            the stalls of every process and counted in none of them.
        functions: time by function and stall: ``stall``, ``probe``, ``calls``, ``self_ns``, ``longest_ns``
            (all int64) and ``longest_call`` (int64, row of ``Nested.calls``); sorted by stall and,
            greatest first, self time.
        clients: the clients that took most of each stall, by :func:`clients.with_clients`.
        waits_exact: every wait in the accept queue was seen; otherwise they are at least that long.
    """

    basis: str
    frame: pd.DataFrame
    overflows: pd.DataFrame
    functions: pd.DataFrame
    clients: pd.DataFrame
    waits_exact: bool


def find_stalls(tables: Tables, nested: Nested) -> Stalls:
    """Return the stalls with the calls inside, the accept queue and the overflows around them."""
    basis, frame = _spans(tables, nested)
    frame = _with_calls(frame, nested)
    functions = time_by_function(frame, nested)
    frame = with_queue(frame, tables)
    exact = overflow_events(tables)
    overflows = _with_phase(attribute_overflows(tables).assign(connection=-1) if exact is None else exact, frame)
    known = overflows.loc[overflows["listener"] >= 0]
    for column, phase in (("overflows", INSIDE), ("overflows_drain", DRAIN)):
        rows = known.loc[known["phase"] == phase]
        frame[column] = sum_by(rows["stall"].to_numpy(), rows["count"].to_numpy(), len(frame))
    first = known.loc[known["stall"] >= 0].groupby("stall")["seen_ns"].min().reindex(frame.index)
    frame["first_overflow_ns"] = (first - frame["start_ns"]).fillna(NOT_KNOWN).astype(np.int64)
    frame["connections"] = NOT_KNOWN
    if exact is not None:
        frame["connections"] = overflows.groupby("stall")["connection"].nunique().reindex(frame.index, fill_value=0)
    frame, waits_exact = with_waits(_with_accepts(frame, tables), tables)
    frame, clients = with_clients(frame, tables, nested)
    return Stalls(basis, frame, overflows, functions, clients, waits_exact)


def time_by_function(frame: pd.DataFrame, nested: Nested) -> pd.DataFrame:
    """Return ``Stalls.functions`` for these stalls."""
    stall, call = ranges(frame["first_call"].to_numpy(), frame["last_call"].to_numpy())
    calls = nested.calls
    end = (frame["start_ns"] + frame["duration_ns"]).to_numpy()[stall]
    left = end - calls["start_ns"].to_numpy()[call]
    inside = pd.DataFrame(
        {
            "stall": stall,
            "probe": calls["probe"].to_numpy()[call].astype(np.int64),
            "self_ns": np.minimum(calls["self_ns"].to_numpy()[call], left),
            "longest_ns": np.minimum(calls["duration_ns"].to_numpy()[call], left),
        },
        copy=False,
    )
    groups = inside.groupby(["stall", "probe"], sort=True)
    result = groups.agg(calls=("self_ns", "size"), self_ns=("self_ns", "sum"), longest_ns=("longest_ns", "max"))
    longest = groups["longest_ns"].idxmax().to_numpy().astype(np.int64)
    result = result.reset_index().assign(longest_call=call[longest] if len(longest) else longest)
    return result.sort_values(["stall", "self_ns"], ascending=[True, False], kind="stable", ignore_index=True).astype(
        np.int64
    )


def loop_observed(tables: Tables) -> bool:
    """Return whether the event loop's probe exists and saw at least one iteration."""
    probes = [probe.id for probe in tables.manifest.probes if probe.kind == ITERATION]
    counters = tables.recording.counters
    if not tables.iterations.empty:
        return True
    if counters is None:
        return bool(probes)
    return any(counters.by_probe[probe].hits > 0 for probe in probes if probe in counters.by_probe)


def _spans(tables: Tables, nested: Nested) -> tuple[str, pd.DataFrame]:
    columns = ["start_ns", "duration_ns", "pid", "tid", "unfinished"]
    if loop_observed(tables):
        basis, spans = ITERATIONS, tables.iterations
    else:
        # the main thread, which runs the event loop, has the number of its process
        calls = nested.calls
        roots = (calls["depth"] == 0) & (calls["tid"] == calls["pid"])
        basis, spans = ROOT_CALLS, calls.loc[roots]
    stalled = spans.loc[spans["duration_ns"] >= max(tables.manifest.stall_ns, 1), columns]
    frame = stalled.sort_values("start_ns", kind="stable", ignore_index=True)
    return basis, frame.astype({"pid": np.int64, "tid": np.int64})


def _with_calls(frame: pd.DataFrame, nested: Nested) -> pd.DataFrame:
    """Add which calls each stall holds and how much of its time they explain."""
    calls = nested.calls
    tid, start = calls["tid"].to_numpy(), calls["start_ns"].to_numpy()
    begin = frame["start_ns"].to_numpy()
    end = begin + frame["duration_ns"].to_numpy()
    first, last = np.zeros(len(frame), np.int64), np.zeros(len(frame), np.int64)
    for thread in frame["tid"].unique():
        mine = (frame["tid"] == thread).to_numpy()
        low, high = np.searchsorted(tid, [thread, thread + 1])
        first[mine] = low + np.searchsorted(start[low:high], begin[mine], side="left")
        last[mine] = low + np.searchsorted(start[low:high], end[mine], side="left")
    stall, call = ranges(first, last)
    outer = calls["parent"].to_numpy()[call] < first[stall]
    span = np.minimum(calls["duration_ns"].to_numpy()[call], end[stall] - start[call])
    explained = sum_by(stall[outer], span[outer], len(frame))
    return frame.assign(first_call=first, last_call=last, explained_ns=explained)


def _with_accepts(frame: pd.DataFrame, tables: Tables) -> pd.DataFrame:
    """Add how many connections were accepted in each stall and while its queue drained."""
    begin = frame["start_ns"].to_numpy()
    end = begin + frame["duration_ns"].to_numpy()
    inside, draining = np.full(len(frame), NOT_KNOWN, np.int64), np.full(len(frame), NOT_KNOWN, np.int64)
    if loop_observed(tables):
        for pid in frame["pid"].unique():
            mine = (frame["pid"] == pid).to_numpy()
            times = np.sort(tables.accepts.loc[tables.accepts["pid"] == pid, "start_ns"].to_numpy())
            places = [
                np.searchsorted(times, moment[mine], side="right")
                for moment in (begin, end, end + frame["drain_ns"].to_numpy())
            ]
            inside[mine] = places[1] - places[0]
            draining[mine] = places[2] - places[1]
    return frame.assign(accepted=inside, accepted_drain=draining)


def _with_phase(overflows: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Add to which stall each overflow belongs and whether it fell inside it or in its drain."""
    stall = np.full(len(overflows), -1, np.int64)
    phase = np.full(len(overflows), OUTSIDE, dtype=object)
    begin = frame["start_ns"].to_numpy()
    end = begin + frame["duration_ns"].to_numpy()
    for pid in overflows["pid"].unique():
        rows = np.flatnonzero((overflows["pid"] == pid).to_numpy())
        # what no listener is known for is compared with every stall, and counts for none
        mine = np.flatnonzero((frame["pid"] == pid).to_numpy() | np.full(len(frame), pid == 0))
        if not len(mine):
            continue
        after, seen = overflows["after_ns"].to_numpy()[rows], overflows["seen_ns"].to_numpy()[rows]
        drained = end[mine] + frame["drain_ns"].to_numpy()[mine]
        for name, first, last in ((DRAIN, end[mine], drained), (INSIDE, begin[mine], end[mine])):
            # the first span not over when the interval began; it is touched if it began before the interval's end
            place = np.searchsorted(np.maximum.accumulate(last), after, side="right")
            touched = place < len(mine)
            touched[touched] = first[place[touched]] < seen[touched]
            stall[rows[touched]] = mine[place[touched]]
            phase[rows[touched]] = name
    return overflows.assign(stall=stall, phase=phase)
