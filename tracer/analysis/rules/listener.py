"""Rules about the listener: its backlog, how fast it is emptied, and what refused clients see."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from stallscope.probes.catalogue import parse_version
from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.blame import SLOW_DRAIN, SMALL_BACKLOG
from stallscope.tracer.analysis.findings import CAUSE, CLEARED, CONTRIBUTES, NOTICE, Evidence
from stallscope.tracer.analysis.requests import ACK_REFUSED_WITH_RST, event_hits, requests_observed
from stallscope.tracer.analysis.rules.rule import KEPT_EVIDENCE, Found, Rule, refused, since_start
from stallscope.tracer.analysis.tables import NS_PER_S
from stallscope.tracer.manifest import NamespaceInfo, TargetInfo
from stallscope.tracer.units import format_count, format_duration_ns

SOMAXCONN = "net.core.somaxconn"
ABORT = "net.ipv4.tcp_abort_on_overflow"
SYN_BACKLOG = "net.ipv4.tcp_max_syn_backlog"
BACKLOG = "config:tcp-backlog"
PER_CYCLE, PER_CYCLE_DEFAULT = "config:max-new-connections-per-cycle", 10

LARGE_BACKLOG = 4096
"""The default of somaxconn since Linux commit 19f92a030ca6, v5.4: what people raise a backlog to."""

RETRY_NS = NS_PER_S
"""Linux sends a SYN again after TCP_TIMEOUT_INIT, 1 s (RFC 6298)."""

SYN_QUEUE_FULL = "SYN refused: SYN queue full"
SILENT = ("third ACK refused silently: accept queue full", "cookie ACK refused: accept queue full")


def backlog_clamped(analysis: Analysis) -> Iterator[Found]:
    """Listeners whose limit is somaxconn and below what the configuration asks for."""
    for target in analysis.manifest.targets:
        wanted = _number(target.info.get(BACKLOG))
        clamp = _number(_namespace(analysis, target.namespace).sysctls.get(SOMAXCONN))
        listeners = [item for item in analysis.manifest.listeners if item.pid == target.pid]
        clamped = [item for item in listeners if clamp == item.limit and clamp < wanted]
        if not clamped:
            continue
        overflows = analysis.blame.overflows
        hurt = overflows["listener"].isin([item.index for item in clamped]).any()
        yield Found(
            CONTRIBUTES if hurt else NOTICE,
            f"backlog {wanted:,} is clamped to somaxconn {clamp:,}",
            (
                Evidence(f"CONFIG GET tcp-backlog: {wanted}"),
                Evidence(f"{SOMAXCONN} = {clamp}"),
                *(Evidence(f"{item.address} has a limit of {item.limit:,}") for item in clamped[:KEPT_EVIDENCE]),
            ),
            {"wanted": str(wanted)},
        )


def backlog_too_small(analysis: Analysis) -> Iterator[Found]:
    """Bursts that came faster than Redis returns to its queue, and did not fit into it."""
    mine = analysis.blame.episodes
    mine = mine.loc[mine["cause"] == SMALL_BACKLOG]
    if mine.empty:
        return
    largest = mine.sort_values("came", ascending=False)
    needed, limit = int(largest["came"].iloc[0]), int(largest["queue_limit"].iloc[0])
    yield Found(
        CAUSE,
        f"backlog too small: {refused(int(mine['overflows'].sum()))} in {format_count(len(mine), 'burst')} of up to "
        f"{needed:,}, though no stall was under way; the queue holds {limit + 1:,}",
        tuple(
            Evidence(
                f"{came:,} came within {format_duration_ns(end - start)}, {overflows:,} of them refused",
                since_start(analysis, start),
                end - start,
            )
            for came, start, end, overflows in largest[["came", "start_ns", "end_ns", "overflows"]]
            .head(KEPT_EVIDENCE)
            .itertuples(index=False)
        ),
        {"needed": str(needed)},
    )


def slow_drain(analysis: Analysis) -> Iterator[Found]:
    """Times in which Redis accepted all the time, and fewer than came."""
    episodes = analysis.blame.episodes
    for target in analysis.manifest.targets:
        mine = episodes.loc[(episodes["cause"] == SLOW_DRAIN) & (episodes["pid"] == target.pid)]
        if mine.empty:
            continue
        worst = mine.sort_values("overflows", ascending=False).head(KEPT_EVIDENCE)
        spans = np.maximum((worst["end_ns"] - worst["start_ns"]).to_numpy(), 1)
        accepted, came = (worst[name].to_numpy() * NS_PER_S / spans for name in ("accepted", "came"))
        limit = _per_cycle(target)
        evidence = [
            Evidence(
                f"{format_count(overflows, 'overflow')} in {format_duration_ns(span)}: {rate:,.0f} accepted of "
                f"{arrivals:,.0f} a second",
                since_start(analysis, start),
                int(span),
            )
            for start, overflows, span, rate, arrivals in zip(
                worst["start_ns"], worst["overflows"], spans, accepted, came, strict=True
            )
        ]
        if limit:
            evidence.append(Evidence(f"max-new-connections-per-cycle is {limit}: so many are accepted an iteration"))
        yield Found(
            CAUSE,
            f"slow drain: {refused(int(mine['overflows'].sum()))} with no stall, while Redis accepted "
            f"{accepted[0]:,.0f} of {came[0]:,.0f} connections a second"
            + (f", at most {limit} an event loop iteration" if limit else ""),
            tuple(evidence),
            {
                "how": f"CONFIG SET max-new-connections-per-cycle above {limit}"
                if limit
                else "let clients keep their connections (a pool), or spread them over more servers"
            },
        )


def larger_backlog(analysis: Analysis) -> Iterator[Found]:
    """The worst stall that filled a queue: what a larger backlog would have done."""
    frame = analysis.stalls.frame
    mine = frame.loc[(frame["overflows"] > 0) & (frame["full_ns"] > 0) & (frame["queue_start"] >= 0)]
    if mine.empty:
        return
    stall = mine.sort_values(["overflows", "duration_ns"], ascending=False).iloc[0]
    start, limit = int(stall["queue_start"]), int(stall["queue_limit"])
    length_ns, full_ns = int(stall["duration_ns"]), int(stall["full_ns"])
    rest_ns = max(length_ns - full_ns, 1)
    rate = (limit + 1 - start) * NS_PER_S / full_ns
    # more may have come once it was full; a client that was refused comes again after a second at the earliest
    counted = int(stall["connections"]) if stall["connections"] >= 0 else int(stall["overflows"])
    turned_away = counted if stall["connections"] >= 0 or rest_ns < RETRY_NS else 0
    came_later = max(math.ceil(rate * rest_ns / NS_PER_S), turned_away)
    needed = limit + 1 + came_later
    listener = next(item for item in analysis.manifest.listeners if item.index == stall["listener"])
    larger = max(LARGE_BACKLOG, _number(_namespace(analysis, listener.namespace).sysctls.get(SOMAXCONN)))
    larger = larger if larger > limit else 2 * limit
    evidence = (
        Evidence(
            f"the queue of {listener.address} grew from {start:,} to above its limit of {limit:,} in "
            f"{format_duration_ns(full_ns)}: {rate:,.0f} connections a second",
            since_start(analysis, stall["start_ns"]),
            full_ns,
        ),
        Evidence(
            f"in the {format_duration_ns(rest_ns)} from then to the stall's end, {came_later:,} more needed a place"
            + (f": {turned_away:,} were refused" if came_later == turned_away else " at this rate"),
            since_start(analysis, stall["start_ns"] + full_ns),
            rest_ns,
        ),
    )
    if needed > larger + 1:
        later_ns = (larger - limit) * rest_ns / came_later
        title = (
            f"raising the backlog would not have helped: one of {larger:,} would have overflowed "
            f"{format_duration_ns(later_ns)} later, {format_duration_ns(length_ns - full_ns - later_ns)} before the "
            "stall ended"
        )
    else:
        title = (
            f"raising the backlog would only have hidden the stall: {needed:,} would have held them all, yet clients "
            f"would have waited up to {format_duration_ns(length_ns)}"
        )
    yield Found(CLEARED, title, evidence)


def syn_queue_full(analysis: Analysis) -> Iterator[Found]:
    """SYNs that the SYN queue had no room for: dropped, or answered with a cookie."""
    exact = event_hits(analysis.tables).get(SYN_QUEUE_FULL, 0) if requests_observed(analysis.manifest) else 0
    for space in analysis.manifest.namespaces:
        dropped, cookies = _grown(space, "TCPReqQFullDrop"), _grown(space, "TCPReqQFullDoCookies")
        if not dropped and not cookies:
            continue
        limit = space.sysctls.get(SYN_BACKLOG, "")
        evidence = [
            Evidence(f"the kernel counted TCPReqQFullDrop +{dropped:,}, TCPReqQFullDoCookies +{cookies:,}, of all "
                     "listeners of the network namespace")
        ]  # fmt: skip
        if exact:
            evidence.append(Evidence(f"{format_count(exact, 'SYN')} refused at a watched listener"))
        evidence += [Evidence(f"{SYN_BACKLOG} = {limit}")] if limit else []
        what = [f"{format_count(dropped, 'SYN')} dropped"] if dropped else []
        what += [f"{format_count(cookies, 'SYN')} answered with a cookie"] if cookies else []
        yield Found(CONTRIBUTES if dropped else NOTICE, f"the SYN queue was full: {', '.join(what)}", tuple(evidence))


def clients_reset(analysis: Analysis) -> Iterator[Found]:
    """tcp_abort_on_overflow: clients whose third ACK is refused are reset."""
    total = int(analysis.blame.overflows["count"].sum())
    for space in analysis.manifest.namespaces:
        if space.sysctls.get(ABORT) != "1" or not total:
            continue
        if requests_observed(analysis.manifest):
            resets = event_hits(analysis.tables).get(ACK_REFUSED_WITH_RST, 0)
            told = f"{format_count(resets, 'third ACK')} of a watched listener answered with RST"
        else:
            resets = _grown(space, "EmbryonicRsts")
            told = f"the kernel counted EmbryonicRsts +{resets:,}, for any reason"
        saw = f"{format_count(resets, 'client')} saw a reset" if resets else "no client saw a reset"
        yield Found(NOTICE, f"tcp_abort_on_overflow is 1: {saw}", (Evidence(f"{ABORT} = 1"), Evidence(told)))


def silent_refusals(analysis: Analysis) -> Iterator[Found]:
    """Third ACKs that were dropped without a word, where the kernel's functions were hooked."""
    if not requests_observed(analysis.manifest):
        return
    hits = {name: number for name, number in event_hits(analysis.tables).items() if name in SILENT and number}
    if not hits:
        return
    total = sum(hits.values())
    rows = analysis.tables.requests
    rows = rows.loc[rows["event"].isin(SILENT)].head(KEPT_EVIDENCE)
    yield Found(
        NOTICE,
        f"{format_count(total, 'third ACK was', 'third ACKs were')} dropped silently: those clients believe that they "
        "are connected",
        (
            *(Evidence(f"{name}: {number:,}") for name, number in hits.items()),
            *(
                Evidence(f"client port {port}, {length:,} in the queue of {limit:,}", since_start(analysis, time_ns))
                for time_ns, port, length, limit in rows[
                    ["time_ns", "peer_port", "queue_length", "queue_limit"]
                ].itertuples(index=False)
            ),
        ),
    )


def _per_cycle(target: TargetInfo) -> int:
    """Return how many connections Redis accepts an iteration at most, 0 where it has no such limit."""
    told = _number(target.info.get(PER_CYCLE))
    since_74 = target.product == "redis" and parse_version(target.version) >= (7, 4)
    return told or (PER_CYCLE_DEFAULT if since_74 else 0)


def _namespace(analysis: Analysis, index: int) -> NamespaceInfo:
    unknown = NamespaceInfo(index, 0, {})
    return next((space for space in analysis.manifest.namespaces if space.index == index), unknown)


def _grown(space: NamespaceInfo, counter: str) -> int:
    """Return by how much a kernel counter grew; 0 where its end is not known."""
    started = space.counters_start.get(counter, 0)
    return max(space.counters_end.get(counter, started) - started, 0)


def _number(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 12 else 0


RULES = (
    Rule("slow-drain", "{how}", slow_drain),
    Rule("backlog-too-small", f"raise tcp-backlog and {SOMAXCONN} to at least {{needed}} and restart Redis, or let "
         "clients come back at different times", backlog_too_small),
    Rule("backlog-clamped", f"sysctl -w {SOMAXCONN}={{wanted}}, then restart Redis: the limit is taken when it begins "
         "to listen", backlog_clamped),
    Rule("syn-queue-full", f"raise {SYN_BACKLOG} and the backlog, and keep net.ipv4.tcp_syncookies = 1",
         syn_queue_full),
    Rule("clients-reset", f"sysctl -w {ABORT}=0 lets clients try again instead of failing at once; choose which they "
         "handle better", clients_reset),
    Rule("silent-refusals", "give clients a time-out for the first reply, not only for connecting", silent_refusals),
    Rule("larger-backlog", "leave the backlog alone and remove the stall", larger_backlog),
)  # fmt: skip
