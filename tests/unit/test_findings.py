"""Every rule finds its case, with the numbers of that case, and stays silent otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from recordings import (
    CLIENTS,
    CRON,
    DATA,
    FREE,
    GOLDEN,
    ITERATION_ID,
    LIMIT,
    MS,
    PID,
    PROBES,
    PURGE,
    Builder,
    ProbeCounters,
    add_storm,
    at,
    hooked_manifest,
    manifest,
    quiet,
)

from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.analysis.findings import CAUSE, CLEARED, CONTRIBUTES, NOTICE, WEIGHTS, Finding, find_findings
from stallscope.tracer.analysis.rules import RULES, samples
from stallscope.tracer.manifest import Manifest, ProbeInfo
from stallscope.tracer.recording import read_recording

LOOP = {ITERATION_ID: ProbeCounters(hits=500, short_calls=500, short_ns=100 * MS)}
STORM_SAYS = (
    "query-buffer trims: 5 clients in one cron tick blocked Redis for 618 ms; "
    "during it connections were refused 43 times"
)


def analysed(
    builder: Builder, tmp_path: Path, counters: dict[int, ProbeCounters] | None = None, overflows_end: int = 900
) -> Analysis:
    path = builder.write(tmp_path / "a.stall", 10_000, {**LOOP, **(counters or {})}, overflows_end=overflows_end)
    return analyse(read_recording(path))


def found(analysis: Analysis, rule: str) -> Finding:
    """Return the one finding of a rule."""
    (finding,) = [finding for finding in find_findings(analysis) if finding.rule == rule]
    return finding


def rules_of(analysis: Analysis) -> set[str]:
    return {finding.rule for finding in find_findings(analysis)}


def server(**changes: object) -> Manifest:
    """Return the manifest of a server with other properties."""
    return manifest(targets=(replace(manifest().targets[0], **changes),))  # type: ignore[arg-type]


def with_sysctls(made: Manifest, ends: dict[str, int] | None = None, **sysctls: str) -> Manifest:
    space = made.namespaces[0]
    names = {name.replace("__", "."): value for name, value in sysctls.items()}
    starts = {**space.counters_start, **dict.fromkeys(ends or {}, 0)}
    return replace(made, namespaces=(replace(space, counters_start=starts, sysctls={**space.sysctls, **names}),))


def ended_with(builder: Builder, tmp_path: Path, ends: dict[str, int]) -> Analysis:
    """Return the analysis of a recording of which the kernel's counters ended so."""
    analysis = analysed(builder, tmp_path)
    space = analysis.manifest.namespaces[0]
    changed = replace(analysis.manifest, namespaces=(replace(space, counters_end={**space.counters_end, **ends}),))
    return replace(analysis, tables=replace(analysis.tables, recording=replace(analysis.recording, manifest=changed)))


def test_query_buffer_trims(tmp_path: Path) -> None:
    finding = found(analysed(add_storm(Builder(), 1000), tmp_path, overflows_end=943), "query-buffer-trims")
    assert finding.weight == CAUSE
    assert finding.title == f"{STORM_SAYS}; this Redis 2.8.17 lacks commit cec404f0 (5.0-rc4)"
    assert finding.remedy.startswith("upgrade to Redis 5.0 or later; a trim threshold of 32 KB would not help here")
    tick, clients, threshold = finding.evidence
    assert tick.text == (
        "one serverCron tick: 5 clients, 618 ms, of it 490 ms in sdsRemoveFreeSpace; connections were refused 43 times"
    )
    assert (tick.start_ns, tick.duration_ns) == (1001 * MS, 618 * MS)
    assert clients.text == "most of it for: fd 77 with 28.0 MB unused, 600 ms"
    assert threshold.text == "a trim threshold of 32 KB would have skipped 0 of 5 trims and saved 0 ns"


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"version": "2.8.17"}, True),
        ({"version": "4.0.14"}, True),
        ({"version": "4.9.103"}, True),
        ({"version": "4.9.104"}, False),
        ({"version": "5.0.6"}, False),
        ({"version": "8.0.1", "product": "valkey"}, False),
        ({"version": ""}, False),
    ],
)
def test_who_lacks_the_fix(changes: dict[str, str], lacks: bool, tmp_path: Path) -> None:
    finding = found(analysed(add_storm(Builder(server(**changes)), 1000), tmp_path), "query-buffer-trims")
    assert ("lacks commit cec404f0" in finding.title) == lacks
    assert ("still trimmed" in finding.remedy) != lacks


def test_a_storm_that_refused_nobody_is_a_notice_and_may_be_helped_by_a_threshold(tmp_path: Path) -> None:
    builder = Builder().span(ITERATION_ID, 1000, 40).span(CRON, 1000.5, 39).span(CLIENTS, 1000.6, 38.5)
    for index in range(12):
        builder.resize(1001 + index * 3, 3, idle_s=3, allocated=32768, free=32768)
        builder.span(7, 1001.2 + index * 3, 2.5, 0, 32768)
    finding = found(analysed(builder, tmp_path), "query-buffer-trims")
    assert (finding.weight, "refused" in finding.title) == (NOTICE, False)
    assert "until then a trim threshold of 32 KB keeps at most 32.8 kB and most of the time" in finding.remedy


def test_allocator_purges(tmp_path: Path) -> None:
    finding = found(analysed(add_storm(Builder(), 1000), tmp_path, overflows_end=943), "allocator-purges")
    assert finding.weight == CONTRIBUTES
    assert finding.title == "je_pages_purge returned 20.0 MB in 100 ms, 16% of 1 stall: jemalloc 3.6.0"
    assert "jemalloc 5 purges in small steps" in finding.remedy
    assert finding.evidence[0].text == "5 calls, 100 ms in a stall of 620 ms"


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({}, "CONFIG SET jemalloc-bg-thread yes"),
        ({"config:jemalloc-bg-thread": "yes"}, "jemalloc-bg-thread is on"),
    ],
)
def test_purges_of_a_newer_jemalloc(info: dict[str, str], says: str, tmp_path: Path) -> None:
    made = server(version="6.2.14", allocator="jemalloc-5.1.0", info=info)
    builder = Builder(made).queue(990, 0, 0).counter(990, 900).span(ITERATION_ID, 1000, 100)
    builder.span(PURGE, 1010, 80, 310_000_000).queue(1050, 512, 7).counter(1050, 907).queue(1110, 0, 7)
    finding = found(analysed(builder, tmp_path, overflows_end=907), "allocator-purges")
    assert finding.weight == CAUSE
    assert finding.title == "je_pages_purge returned 310 MB in 80.0 ms, 80% of 1 stall: jemalloc 5.1.0"
    assert says in finding.remedy
    assert "blocking-call" not in rules_of(analysed(builder, tmp_path))


def test_a_stand_in_is_named(tmp_path: Path) -> None:
    probes = tuple(replace(probe, symbol="madvise") if probe.id == PURGE else probe for probe in PROBES)
    finding = found(analysed(add_storm(Builder(manifest(probes=probes)), 1000), tmp_path), "allocator-purges")
    assert finding.title.startswith("madvise (instead of je_pages_purge) returned 20.0 MB")


def test_background_purges(tmp_path: Path) -> None:
    builder = quiet(Builder(), 9000)
    for index in range(3):
        builder.span(PURGE, 1000 + index * 100, 20 + index, 5_000_000, tid=PID + 7)
    analysis = analysed(builder, tmp_path)
    finding = found(analysis, "background-purges")
    assert (finding.weight, finding.remedy) == (CLEARED, "")
    assert finding.title == (
        "3 purges (15.0 MB, 63.0 ms) ran on other threads than the event loop's, as jemalloc_bg_thd: "
        "they did not stall clients"
    )
    assert finding.evidence[0].text == f"thread {PID + 7}"
    assert (finding.evidence[1].start_ns, finding.evidence[1].duration_ns) == (1200 * MS, 22 * MS)
    assert "allocator-purges" not in rules_of(analysis)


def test_blocking_call(tmp_path: Path) -> None:
    builder = Builder().queue(990, 0, 0).counter(990, 900).span(ITERATION_ID, 1000, 300).span(FREE, 1010, 280)
    builder.queue(1200, 512, 9).counter(1200, 909).queue(1310, 0, 9)
    finding = found(analysed(builder, tmp_path, overflows_end=909), "blocking-call")
    assert finding.weight == CAUSE
    assert (
        finding.title == "freeClient blocked Redis for 280 ms in one stall; meanwhile connections were refused 9 times"
    )
    assert finding.evidence[0].start_ns == 1000 * MS
    assert "freeClient" in finding.remedy


def test_unexplained_stalls(tmp_path: Path) -> None:
    builder = Builder().span(ITERATION_ID, 1000, 226).span(FREE, 1001, 1).span(ITERATION_ID, 2000, 20)
    builder.span(FREE, 2001, 18)
    finding = found(analysed(builder, tmp_path), "unexplained-stalls")
    assert finding.weight == NOTICE
    assert finding.title == "1 of 2 stalls is mostly unexplained: 225 ms in no traced function"
    assert finding.remedy.startswith("record again with --stacks=stalls --probe call --probe activeExpireCycle")
    assert "freeClient " not in finding.remedy
    builder.queue(990, 0, 0).counter(990, 900).queue(1100, 512, 1).counter(1100, 901).queue(1230, 0, 1)
    finding = found(analysed(builder, tmp_path), "unexplained-stalls")
    assert finding.weight == CONTRIBUTES
    assert finding.title.endswith("; meanwhile a connection was refused once")


@pytest.mark.parametrize(("hurt", "weight"), [(True, CONTRIBUTES), (False, NOTICE)])
def test_backlog_clamped(hurt: bool, weight: str, tmp_path: Path) -> None:
    made = with_sysctls(server(info={"config:tcp-backlog": "2048"}), net__core__somaxconn="128")
    made = replace(made, listeners=(replace(made.listeners[0], limit=128),))
    builder = Builder(made).queue(0, 0, 0, limit=128).counter(0, 900)
    if hurt:
        builder.queue(10, 129, 3, limit=128).counter(10, 903).queue(20, 0, 3, limit=128)
    finding = found(analysed(builder, tmp_path), "backlog-clamped")
    assert (finding.title, finding.weight) == ("backlog 2,048 is clamped to somaxconn 128", weight)
    assert "net.core.somaxconn=2048" in finding.remedy
    assert finding.evidence[2].text == "127.0.0.1:6379 has a limit of 128"


def test_a_backlog_that_is_not_clamped(tmp_path: Path) -> None:
    made = with_sysctls(server(info={"config:tcp-backlog": "511"}), net__core__somaxconn="4096")
    assert "backlog-clamped" not in rules_of(analysed(Builder(made).queue(0, 0, 0), tmp_path))
    assert "backlog-clamped" not in rules_of(analysed(Builder().queue(0, 0, 0), tmp_path))  # CONFIG is not known


def test_backlog_too_small(tmp_path: Path) -> None:
    builder = Builder().queue(1000, 2, 0).counter(1000, 900).queue(1010, 512, 30).counter(1010, 930)
    finding = found(analysed(builder.queue(1020, 1, 30), tmp_path, overflows_end=930), "backlog-too-small")
    assert finding.weight == CAUSE
    assert finding.title == (
        "backlog too small: connections were refused 30 times in 1 burst of up to 540, though no stall was under way; "
        "the queue holds 512"
    )
    assert "at least 540" in finding.remedy
    assert finding.evidence[0].text == "540 came within 10.0 ms, 30 of them refused"


def test_slow_drain() -> None:
    finding = found(analyse(read_recording(DATA / "slow-drain.stall")), "slow-drain")
    assert finding.weight == CAUSE
    assert finding.title == (
        "slow drain: connections were refused 488 times with no stall, while Redis accepted 2,000 of 3,000 connections "
        "a second, at most 10 an event loop iteration"
    )
    assert finding.remedy == "CONFIG SET max-new-connections-per-cycle above 10"
    assert (finding.evidence[0].start_ns, finding.evidence[0].duration_ns) == (1050 * MS, 950 * MS)


def test_slow_drain_of_a_server_without_that_limit() -> None:
    analysis = analyse(read_recording(DATA / "slow-drain.stall"))
    target = replace(analysis.manifest.targets[0], version="7.2.5", info={})
    recording = replace(analysis.recording, manifest=replace(analysis.manifest, targets=(target,)))
    finding = found(replace(analysis, tables=replace(analysis.tables, recording=recording)), "slow-drain")
    assert "an event loop iteration" not in finding.title
    assert finding.remedy.startswith("let clients keep their connections")


def stall_that_fills(tmp_path: Path, *, full_after_ms: float, length_ms: float) -> Analysis:
    builder = Builder().queue(990, 0, 0).counter(990, 900).span(ITERATION_ID, 1000, length_ms)
    builder.queue(1000 + full_after_ms, 512, 0).queue(1000 + full_after_ms + 10, 512, 5)
    builder.counter(1000 + full_after_ms + 10, 905).queue(1000 + length_ms + 10, 0, 5)
    return analysed(builder, tmp_path, overflows_end=905)


def test_ticks_that_are_a_small_part_of_their_stall_are_not_blamed_for_it(tmp_path: Path) -> None:
    """The longer tick fills its stall. The shorter one took 40 ms of 300 ms, in which 9 were refused."""
    builder = add_storm(Builder(), 1000).queue(4990, 0, 83).span(ITERATION_ID, 5000, 300).span(CRON, 5001, 40)
    builder.resize(5002, 38, idle_s=3, allocated=1000, free=500)
    builder.queue(5200, 512, 92).counter(5200, 952).queue(5310, 0, 92)
    finding = found(analysed(builder, tmp_path, overflows_end=952), "query-buffer-trims")
    assert finding.title.startswith(
        "query-buffer trims: 5 clients in one cron tick blocked Redis for 618 ms (the longest of 2 such ticks); "
        "during them connections were refused 43 times"
    )
    assert [("refused" in fact.text) for fact in finding.evidence[:2]] == [True, False]
    unexplained = found(analysed(builder, tmp_path, overflows_end=952), "unexplained-stalls")
    assert unexplained.title.endswith("meanwhile connections were refused 9 times")


def test_a_larger_backlog_would_have_overflowed_too(tmp_path: Path) -> None:
    """512 connections in 100 ms: 4,096 are there after 800 ms, 3,585 more than 511 after 700.2 ms more."""
    finding = found(stall_that_fills(tmp_path, full_after_ms=100, length_ms=1000), "larger-backlog")
    assert finding.weight == CLEARED
    assert finding.title == (
        "raising the backlog would not have helped: one of 4,096 would have overflowed 700 ms later, 200 ms before the "
        "stall ended"
    )
    assert "5,120 connections a second" in finding.evidence[0].text
    assert "4,608 more needed a place at this rate" in finding.evidence[1].text


def test_a_larger_backlog_would_have_hidden_the_stall(tmp_path: Path) -> None:
    finding = found(stall_that_fills(tmp_path, full_after_ms=500, length_ms=1000), "larger-backlog")
    assert finding.title == (
        "raising the backlog would only have hidden the stall: 1,024 would have held them all, yet clients would have "
        "waited up to 1.00 s"
    )
    assert "leave the backlog alone" in finding.remedy


def test_a_larger_backlog_must_hold_those_that_were_refused_too(tmp_path: Path) -> None:
    """The queue filled in 900 ms of 1 s, 57 more would have come at this rate; but 300 clients were refused."""
    builder = Builder(hooked_manifest()).queue(990, 0, 0).span(ITERATION_ID, 1000, 1000).queue(1900, 512, 0)
    for index in range(300):
        builder.request(1901 + index / 4, "SYN refused: accept queue full", 30000 + index, queue_length=512)
    finding = found(analysed(builder.queue(2010, 0, 300), tmp_path, overflows_end=1200), "larger-backlog")
    assert "812 would have held them all" in finding.title
    assert "300 more needed a place: 300 were refused" in finding.evidence[1].text


def test_syn_queue_full(tmp_path: Path) -> None:
    ends = {"TCPReqQFullDrop": 44, "TCPReqQFullDoCookies": 0}
    made = with_sysctls(manifest(), ends, net__ipv4__tcp_max_syn_backlog="128")
    analysis = ended_with(quiet(Builder(made), 9000), tmp_path, ends)
    finding = found(analysis, "syn-queue-full")
    assert (finding.weight, finding.title) == (CONTRIBUTES, "the SYN queue was full: 44 SYNs dropped")
    assert finding.evidence[-1].text == "net.ipv4.tcp_max_syn_backlog = 128"
    cookies = found(
        ended_with(quiet(Builder(made), 9000), tmp_path, {"TCPReqQFullDrop": 0, "TCPReqQFullDoCookies": 7}),
        "syn-queue-full",
    )
    assert (cookies.weight, cookies.title) == (NOTICE, "the SYN queue was full: 7 SYNs answered with a cookie")


def test_clients_reset(tmp_path: Path) -> None:
    made = with_sysctls(hooked_manifest(), net__ipv4__tcp_abort_on_overflow="1")
    builder = Builder(made).queue(0, 0, 0).queue(5, 512, 0).queue(20, 0, 0)
    for port in (40000, 40001, 40002):
        builder.request(10, "third ACK refused with RST: accept queue full", port, queue_length=512)
    finding = found(analysed(builder, tmp_path, overflows_end=903), "clients-reset")
    assert (finding.weight, finding.title) == (NOTICE, "tcp_abort_on_overflow is 1: 3 clients saw a reset")
    sampled = Builder(with_sysctls(manifest(), {"EmbryonicRsts": 3}, net__ipv4__tcp_abort_on_overflow="1"))
    sampled.queue(0, 0, 0).counter(0, 900).queue(10, 512, 5).counter(10, 905).queue(20, 0, 5)
    finding = found(ended_with(sampled, tmp_path, {"EmbryonicRsts": 3}), "clients-reset")
    assert finding.evidence[1].text == "the kernel counted EmbryonicRsts +3, for any reason"
    assert "clients-reset" not in rules_of(analysed(Builder(made).queue(0, 0, 0), tmp_path))


def test_silent_refusals() -> None:
    finding = found(analyse(read_recording(DATA / "refused.stall")), "silent-refusals")
    assert finding.weight == NOTICE
    assert finding.title == ("2 third ACKs were dropped silently: those clients believe that they are connected")
    assert [fact.start_ns for fact in finding.evidence] == [None, 1518 * MS, 1626 * MS]
    assert finding.evidence[1].text == f"client port 40020, 512 in the queue of {LIMIT}"


def test_no_known_cause() -> None:
    finding = found(analyse(read_recording(DATA / "cut-short.stall")), "no-known-cause")
    assert finding.weight == CONTRIBUTES
    assert finding.title == "11 overflows have no known cause"
    assert finding.evidence[0].text == "11: the recording was cut short, a stall in progress is not in it"


def test_losses() -> None:
    finding = found(analyse(read_recording(DATA / "with-losses.stall")), "losses")
    assert finding.weight == NOTICE
    assert finding.title == "5 events were lost: this is not the whole picture"
    assert [fact.text for fact in finding.evidence] == ["je_pages_purge: 3", "sdsRemoveFreeSpace: 2"]


def test_never_fired() -> None:
    finding = found(analyse(read_recording(DATA / "known-call.stall")), "never-fired")
    assert (finding.weight, finding.title) == (NOTICE, "attached, but never fired: freeClient")


def test_nothing_wrong(tmp_path: Path) -> None:
    probes = tuple(probe for probe in PROBES if probe.id in range(4))
    builder = quiet(Builder(manifest(probes=probes)), 9_000)
    (finding,) = find_findings(analysed(builder, tmp_path))
    assert (finding.rule, finding.weight) == ("nothing-wrong", CLEARED)
    assert finding.title == (
        "nothing wrong in 10.0 s: no event loop iteration of 10.0 ms or more, and no connection refused"
    )
    assert finding.evidence[0].text == "the accept queue held at most 2 connections"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda builder: builder.span(ITERATION_ID, 1000, 20),
        lambda builder: builder.queue(20, 512, 41).counter(20, 901),
    ],
)
def test_something_wrong(spoil: Callable[[Builder], Builder], tmp_path: Path) -> None:
    assert "nothing-wrong" not in rules_of(analysed(spoil(quiet(Builder(), 9_000)), tmp_path))


def test_what_was_not_watched_is_not_called_right(tmp_path: Path) -> None:
    assert "nothing-wrong" not in rules_of(analysed(Builder(), tmp_path))  # the queue was never sampled
    without_loop = manifest(probes=tuple(probe for probe in PROBES if probe.id > 1))
    assert "nothing-wrong" not in rules_of(analysed(quiet(Builder(without_loop), 9_000), tmp_path))
    lost = {ITERATION_ID: ProbeCounters(hits=501, short_calls=500, lost=1)}
    assert "nothing-wrong" not in rules_of(analysed(quiet(Builder(), 9_000), tmp_path, lost))


@pytest.mark.parametrize("name", GOLDEN)
def test_findings_are_sentences_in_order_of_weight(name: str) -> None:
    analysis = analyse(read_recording(DATA / f"{name}.stall"))
    findings = find_findings(analysis)
    order = [WEIGHTS.index(finding.weight) for finding in findings]
    assert order == sorted(order)
    for finding in findings:
        for text in (finding.title, finding.remedy, *(fact.text for fact in finding.evidence)):
            assert not re.search(r"[{}]|nan|None|  ", text)
        assert finding.evidence
        for fact in finding.evidence:
            assert fact.start_ns is None or 0 <= fact.start_ns <= analysis.tables.end_ns - at(0)


def test_every_rule_has_a_name_of_its_own_and_a_test() -> None:
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    tested = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    tested |= {"larger-backlog"}  # it has two
    tested |= {rule.name for rule in samples.RULES}  # in test_samples.py
    assert set(names) <= tested


def test_probes_of_several_binaries_are_one_function(tmp_path: Path) -> None:
    """Two servers of different builds have a probe each for one function."""
    second = ProbeInfo(99, "je_pages_purge", "call", "uprobe", PROBES[PURGE].fields, symbol="je_pages_purge")
    builder = quiet(Builder(manifest(probes=(*PROBES, second))), 9000)
    builder.span(PURGE, 100, 20, 1_000_000, tid=PID + 7).span(99, 200, 20, 2_000_000, tid=PID + 8)
    assert found(analysed(builder, tmp_path), "background-purges").title.startswith("2 purges (3.00 MB, 40.0 ms)")
