"""Rules about what Redis and its allocator did."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from stallscope.probes.catalogue import parse_version
from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.findings import CAUSE, CLEARED, CONTRIBUTES, NOTICE, Evidence
from stallscope.tracer.analysis.rules.rule import KEPT_EVIDENCE, Found, Rule, refused, since_start
from stallscope.tracer.analysis.segments import ranges
from stallscope.tracer.analysis.tables import Ints
from stallscope.tracer.analysis.trees import CLIENT_VISIT
from stallscope.tracer.analysis.whatif import DEFAULT_BYTES, what_if
from stallscope.tracer.manifest import CALL, STACK, ProbeInfo, TargetInfo
from stallscope.tracer.units import format_bytes, format_count, format_duration_ns

PURGE = "je_pages_purge"

FIX_COMMIT, FIX_RELEASE, FIX_VERSION = "cec404f0", "5.0-rc4", (4, 9, 104)
"""Redis commit cec404f0 trims idle buffers above 32 KB only; 5.0-rc4, in which it came, calls itself 4.9.104."""

GRADUAL_JEMALLOC = (5,)
"""jemalloc 5 purges by decay, in small steps; it comes with Redis 5.0 and later."""

MOSTLY, NOTABLE = 0.5, 0.05
"""What took half of the stalls' time is their cause; what took a twentieth contributed."""

WORTH_TRACING = (
    "call",
    "freeClient",
    "activeExpireCycle",
    "freeClientsInAsyncFreeQueue",
    "flushAppendOnlyFile",
    "redisFork",
)
"""Functions of the catalogue that are known to block for long and are not traced unless asked for."""


def query_buffer_trims(analysis: Analysis) -> Iterator[Found]:
    """Ticks of the cron of which at least half went into visiting clients, by process."""
    storms = _storms(analysis)
    for target in analysis.manifest.targets:
        mine = storms.loc[storms["pid"] == target.pid]
        if mine.empty:
            continue
        worst = mine.sort_values("duration_ns").iloc[-1]
        total = int(mine["refused"].sum())
        title = (
            f"query-buffer trims: {format_count(int(worst['clients']), 'client')} in one cron tick blocked Redis for "
            f"{format_duration_ns(int(worst['duration_ns']))}"
        )
        title += f" (the longest of {len(mine):,} such ticks)" if len(mine) > 1 else ""
        title += f"; during {'them' if len(mine) > 1 else 'it'} {refused(total)}" if total else ""
        version, lacks_fix = _lacks_fix(target)
        why = f"; this {version} lacks commit {FIX_COMMIT} ({FIX_RELEASE})" if lacks_fix else ""
        shown = mine.sort_values(["refused", "duration_ns"], ascending=False).head(KEPT_EVIDENCE)
        evidence = [_tick(analysis, row) for _, row in shown.iterrows()]
        told, threshold = _of_small_buffers(analysis)
        yield Found(
            CAUSE if total else NOTICE,
            title + why,
            (*evidence, *_clients(analysis, int(worst["stall"])), *told),
            {"fix": _fix(version, lacks_fix), "threshold": threshold},
        )


def allocator_purges(analysis: Analysis) -> Iterator[Found]:
    """Purges inside stalls, of the stalls that refused connections if any did."""
    frame, functions = analysis.stalls.frame, analysis.stalls.functions
    for target in analysis.manifest.targets:
        probes = {probe.id: probe for probe in _probes(analysis, PURGE)}
        stalls = frame.loc[frame["pid"] == target.pid]
        hurting = stalls.loc[analysis.blame.by_stall(len(frame))[stalls.index] > 0]
        stalls = stalls if hurting.empty else hurting
        mine = functions.loc[functions["probe"].isin(probes) & functions["stall"].isin(stalls.index)]
        time_ns = int(mine["self_ns"].sum())
        share = time_ns / max(int(stalls["duration_ns"].sum()), 1)
        if mine.empty or share < NOTABLE:
            continue
        symbol = probes[int(mine["probe"].iloc[0])].symbol or PURGE
        name = PURGE if "purge" in symbol else f"{symbol} (instead of {PURGE})"
        purged = _purged_bytes(analysis, stalls, list(probes.values()))
        allocator = target.info.get("mem_allocator") or target.allocator
        per_stall = mine.groupby("stall")["self_ns"].sum()
        mostly = (per_stall / stalls["duration_ns"].reindex(per_stall.index) >= MOSTLY).any()
        weight = NOTICE if hurting.empty else CAUSE if mostly else CONTRIBUTES
        rows = mine.join(stalls[["start_ns", "duration_ns"]], on="stall")
        rows = rows.sort_values("self_ns", ascending=False).head(KEPT_EVIDENCE)
        yield Found(
            weight,
            f"{name} returned {format_bytes(purged)} in {format_duration_ns(time_ns)}, {share:.0%} of "
            f"{format_count(len(stalls), 'stall')}" + (f": {allocator.replace('-', ' ')}" if allocator else ""),
            tuple(
                Evidence(
                    f"{format_count(calls, 'call')}, {format_duration_ns(self_ns)} in a stall of "
                    f"{format_duration_ns(length)}",
                    since_start(analysis, start_ns),
                    length,
                )
                for calls, self_ns, start_ns, length in rows[
                    ["calls", "self_ns", "start_ns", "duration_ns"]
                ].itertuples(index=False, name=None)
            ),
            {"allocator": _gradual(allocator, target)},
        )


def background_purges(analysis: Analysis) -> Iterator[Found]:
    """Purges on threads that run no event loop."""
    calls = analysis.nested.calls
    probes = _probes(analysis, PURGE)
    loops = set(analysis.tables.iterations["tid"].unique())
    mine = calls["probe"].isin([probe.id for probe in probes]) & (calls["tid"] != calls["pid"])
    rows = calls.loc[mine]
    rows = rows.loc[~rows["tid"].isin(loops)]
    if rows.empty:
        return
    purged = sum(int(_decoded(analysis, probe, rows, "purged_bytes").sum()) for probe in probes)
    threads = sorted(rows["tid"].unique())
    length = format_duration_ns(int(rows["duration_ns"].sum()))
    longest = rows.sort_values("duration_ns").iloc[-1]
    yield Found(
        CLEARED,
        f"{format_count(len(rows), 'purge')} ({format_bytes(purged)}, {length}) ran on other threads than the event "
        "loop's, as jemalloc_bg_thd: they did not stall clients",
        (
            Evidence(f"{'thread' if len(threads) == 1 else 'threads'} {', '.join(map(str, threads[:KEPT_EVIDENCE]))}"),
            Evidence(
                f"the longest took {format_duration_ns(int(longest['duration_ns']))}",
                since_start(analysis, longest["start_ns"]),
                int(longest["duration_ns"]),
            ),
        ),
    )


def blocking_call(analysis: Analysis) -> Iterator[Found]:
    """Stalls that refused connections and went into functions that no other rule is about."""
    frame, functions = analysis.stalls.frame, analysis.stalls.functions
    lost = analysis.blame.by_stall(len(frame))
    other = (lost > 0) & (frame["explained_ns"] >= MOSTLY * frame["duration_ns"])
    storms = _storms(analysis)
    other &= ~frame.index.isin(storms.loc[storms["fills"], "stall"])
    most = functions.drop_duplicates("stall").set_index("stall")["probe"].reindex(frame.index[other])
    for probe, stalls in most.groupby(most):
        info = analysis.manifest.probe(int(probe))
        if info is None or info.name == PURGE:
            continue
        rows = frame.loc[stalls.index]
        total = int(lost[stalls.index].sum())
        spent = functions.loc[functions["stall"].isin(stalls.index) & (functions["probe"] == probe), "self_ns"]
        which = "one stall" if len(rows) == 1 else f"{len(rows):,} stalls"
        yield Found(
            CAUSE,
            f"{info.name} blocked Redis for {format_duration_ns(int(spent.sum()))} in {which}; "
            f"meanwhile {refused(total)}",
            tuple(_stall(analysis, index, lost) for index in _worst(rows, lost)),
            {"function": info.name},
        )


def unexplained_stalls(analysis: Analysis) -> Iterator[Found]:
    """Stalls of which more than half is in no traced function, and no sampled stack told which other it was."""
    frame = analysis.stalls.frame
    rest = frame["duration_ns"] - frame["explained_ns"]
    told = frame.index.isin(list(analysis.samples.told))
    mine = frame.loc[(rest > (1 - MOSTLY) * frame["duration_ns"]) & ~told]
    if mine.empty:
        return
    lost = analysis.blame.by_stall(len(frame))
    total = int(lost[mine.index].sum())
    title = (
        f"{len(mine):,} of {format_count(len(frame), 'stall')} {'is' if len(mine) == 1 else 'are'} mostly unexplained: "
        f"{format_duration_ns(int(rest[mine.index].sum()))} in no traced function"
    )
    traced = {probe.name for probe in analysis.manifest.probes if probe.kind == CALL}
    # sampled stacks name functions that nobody thought of
    sampling = [] if any(probe.kind == STACK for probe in analysis.manifest.probes) else ["--stacks=stalls"]
    more = [f"--probe {name}" for name in WORTH_TRACING if name not in traced]
    yield Found(
        CONTRIBUTES if total else NOTICE,
        title + (f"; meanwhile {refused(total)}" if total else ""),
        tuple(_stall(analysis, index, lost) for index in _worst(mine, lost)),
        {"probes": " ".join([*sampling, *more]) or "--probe FUNC"},
    )


def _storms(analysis: Analysis) -> pd.DataFrame:
    """Return the slow trees that went into visits of clients.

    With the columns ``fills``, whether the tree took at least half of its stall, and ``refused``: the overflows
    of that stall if it does. So one stall's overflows are those of one tree at most.
    """
    trees, frame = analysis.trees, analysis.stalls.frame
    visits = [probe.id for probe in _probes(analysis, CLIENT_VISIT)]
    spent = trees.functions.loc[trees.functions["probe"].isin(visits)].groupby("tree")["total_ns"].sum()
    spent = spent.reindex(trees.frame.index, fill_value=0)
    storms = trees.frame.loc[spent >= MOSTLY * trees.frame["duration_ns"]]
    stall = storms["stall"].to_numpy()
    length = np.append(frame["duration_ns"].to_numpy(), 0)[stall]
    fills = (stall >= 0) & (storms["duration_ns"].to_numpy() >= MOSTLY * length)
    # of two that took exactly half of one stall, the first
    fills &= ~pd.Series(np.where(fills, stall, -1 - np.arange(len(stall)))).duplicated().to_numpy()
    lost = np.append(analysis.blame.by_stall(len(frame)), 0)[stall]
    return storms.assign(fills=fills, refused=np.where(fills, lost, 0))


def _tick(analysis: Analysis, tree: pd.Series[int]) -> Evidence:
    """Return one tick in words: its clients, its length, and where most of it went."""
    names = {probe.id: probe.name for probe in analysis.manifest.probes}
    most = analysis.trees.functions.loc[analysis.trees.functions["tree"] == tree.name].iloc[0]
    text = (
        f"one {names.get(int(tree['probe']), 'call')} tick: {format_count(int(tree['clients']), 'client')}, "
        f"{format_duration_ns(int(tree['duration_ns']))}, of it {format_duration_ns(int(most['self_ns']))} "
        f"in {names.get(int(most['probe']), 'a call')}"
    )
    text += f"; {refused(int(tree['refused']))}" if tree["refused"] else ""
    return Evidence(text, since_start(analysis, tree["start_ns"]), int(tree["duration_ns"]))


def _clients(analysis: Analysis, stall: int) -> list[Evidence]:
    """Return the clients that took most of one stall, as one fact."""
    clients = analysis.stalls.clients
    most = clients.loc[clients["stall"] == stall].head(3)
    if most.empty:
        return []
    words = []
    for field, client, peer, free_bytes, total_ns in most[
        ["field", "client", "peer", "free_bytes", "total_ns"]
    ].itertuples(index=False, name=None):
        name = f"{field} {client}" + (f" ({peer})" if peer else "")
        unused = f" with {format_bytes(free_bytes)} unused" if free_bytes >= 0 else ""
        words.append(f"{name}{unused}, {format_duration_ns(total_ns)}")
    return [Evidence(f"most of it for: {'; '.join(words)}")]


def _of_small_buffers(analysis: Analysis) -> tuple[list[Evidence], str]:
    """Return what a threshold of 32 KB would have done, as a fact and as advice."""
    if not len(analysis.trims.free_bytes):
        return [], ""
    result = what_if(analysis.tables, analysis.trims, analysis.stalls.frame, DEFAULT_BYTES)
    size = f"{DEFAULT_BYTES // 1024} KB"
    fact = (
        f"a trim threshold of {size} would have skipped {result.skipped:,} of {format_count(result.trims, 'trim')} "
        f"and saved {format_duration_ns(result.saved_ns)}"
    )
    if result.longest_left_ns <= MOSTLY * result.longest_stall_ns:
        kept = format_bytes(result.kept_limit_bytes)
        advice = f"; until then a trim threshold of {size} keeps at most {kept} and most of the time"
    else:
        advice = f"; a trim threshold of {size} would not help here, find the clients that leave large buffers"
    return [Evidence(fact)], advice


def _lacks_fix(target: TargetInfo) -> tuple[str, bool]:
    """Return the server as people name it, and whether it is known to lack the fix."""
    version = parse_version(target.version)
    name = f"{target.product.capitalize() or 'Redis'} {target.version}".strip()
    return name, target.product == "redis" and bool(version) and version < FIX_VERSION


def _fix(version: str, lacks_fix: bool) -> str:
    if lacks_fix:
        return "upgrade to Redis 5.0 or later"
    return (
        f"if {version} is older than Redis {FIX_RELEASE}, upgrade; with commit {FIX_COMMIT} buffers above 32 KB are "
        "still trimmed: keep clients from leaving larger ones (half-sent values, long pipelines)"
    )


def _gradual(allocator: str, target: TargetInfo) -> str:
    version = parse_version(allocator.replace("jemalloc-", ""))
    if version and version < GRADUAL_JEMALLOC:
        return "upgrade to Redis 5.0 or later, whose jemalloc 5 purges in small steps"
    if target.info.get("config:jemalloc-bg-thread") == "yes":
        return "jemalloc-bg-thread is on and this thread purged all the same: let less memory be freed at once"
    return "let jemalloc purge on a thread of its own: CONFIG SET jemalloc-bg-thread yes (Redis 6.0 and later)"


def _purged_bytes(analysis: Analysis, stalls: pd.DataFrame, probes: list[ProbeInfo]) -> int:
    _, place = ranges(stalls["first_call"].to_numpy(), stalls["last_call"].to_numpy())
    calls = analysis.nested.calls.iloc[place]
    return sum(int(_decoded(analysis, probe, calls, "purged_bytes").sum()) for probe in probes)


def _decoded(analysis: Analysis, probe: ProbeInfo, calls: pd.DataFrame, field: str) -> Ints:
    """Return one field of the calls of one function; nothing where it was not recorded."""
    decoded = analysis.tables.decoded(probe, calls)
    return decoded[field].to_numpy() if field in decoded else np.zeros(0, np.int64)


def _worst(stalls: pd.DataFrame, lost: Ints) -> list[int]:
    """Return the stalls with most overflows and, of those, the longest."""
    order = np.lexsort((-stalls["duration_ns"].to_numpy(), -lost[stalls.index]))
    return [int(index) for index in stalls.index[order[:KEPT_EVIDENCE]]]


def _stall(analysis: Analysis, index: int, lost: Ints) -> Evidence:
    columns = analysis.stalls.frame[["start_ns", "duration_ns", "explained_ns"]]
    start_ns, length, explained = (int(value) for value in columns.to_numpy()[index])
    text = f"a stall of {format_duration_ns(length)}, {format_duration_ns(length - explained)} of it unexplained"
    text += f"; {refused(int(lost[index]))}" if lost[index] else ""
    return Evidence(text, since_start(analysis, start_ns), length)


def _probes(analysis: Analysis, name: str) -> list[ProbeInfo]:
    return [probe for probe in analysis.manifest.probes if probe.kind == CALL and probe.name == name]


RULES = (
    Rule("query-buffer-trims", "{fix}{threshold}", query_buffer_trims),
    Rule("allocator-purges", "{allocator}", allocator_purges),
    Rule("blocking-call", "see who makes {function} take this long; its callers and arguments are in the recording",
         blocking_call),
    Rule("unexplained-stalls", "record again with {probes}", unexplained_stalls),
    Rule("background-purges", "", background_purges),
)  # fmt: skip
