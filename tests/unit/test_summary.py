from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    CRON,
    DATA,
    FREE,
    ITERATION_ID,
    MS,
    PID,
    PROBES,
    PURGE,
    TRIM,
    WALL_OFFSET_NS,
    Builder,
    add_storm,
    at,
    manifest,
    quiet,
)

from stallscope.probes.catalogue import Field
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.functions import FunctionSummary, quantile
from stallscope.tracer.analysis.listener_summary import OverflowCount
from stallscope.tracer.analysis.rows import extract
from stallscope.tracer.analysis.stall_summary import KEPT_STALLS, ClientInStall
from stallscope.tracer.analysis.stalls import ITERATIONS, ROOT_CALLS
from stallscope.tracer.analysis.summary import Summary, summarise
from stallscope.tracer.analysis.tables import build_tables
from stallscope.tracer.errors import RecordingError
from stallscope.tracer.manifest import Note, ProbeCounters, ProbeInfo
from stallscope.tracer.recording import read_recording


def golden(name: str) -> Summary:
    return summarise(analyse(read_recording(DATA / f"{name}.stall")))


def summary_of(builder: Builder, tmp_path: Path, end_ms: float = 10_000) -> Summary:
    return summarise(analyse(read_recording(builder.write(tmp_path / "a.stall", end_ms))))


def function(summary: Summary, name: str) -> FunctionSummary:
    return next(item for item in summary.functions if item.name == name)


def test_the_known_call_is_blamed_in_one_sentence() -> None:
    assert golden("known-call").verdict == (
        "Redis was blocked for 620 ms: 490 ms of it in 5 calls of sdsRemoveFreeSpace (called by serverCron > "
        "clientsCron > clientsCronResizeQueryBuffer); meanwhile 43 connections were refused."
    )


def test_the_known_stall() -> None:
    summary = golden("known-call")
    assert summary.stall_basis == ITERATIONS
    assert (summary.stall_count, summary.stall_total_ns) == (1, 620 * MS)
    (stall,) = summary.stalls
    assert stall.start_ns == 1000 * MS
    assert stall.wall_ns == at(1000) + WALL_OFFSET_NS
    assert (stall.overflows, stall.overflows_drain) == (41, 2)
    assert (stall.listener, stall.queue_start, stall.queue_max, stall.queue_limit) == ("127.0.0.1:6379", 3, 512, 511)
    assert (stall.accepted, stall.accepted_drain, stall.drain_ns, stall.drained) == (0, 512, 30 * MS, True)
    assert stall.unexplained_ns == 2 * MS
    assert stall.blamed == ("serverCron", "clientsCron", "clientsCronResizeQueryBuffer", "sdsRemoveFreeSpace")
    assert [(item.name, item.calls, item.self_ns) for item in stall.functions[:2]] == [
        ("sdsRemoveFreeSpace", 5, 490 * MS),
        ("je_pages_purge", 5, 100 * MS),
    ]
    worst = stall.calls[0]
    assert worst.path[-1] == "sdsRemoveFreeSpace"
    assert (worst.duration_ns, worst.self_ns) == (118 * MS, 98 * MS)
    assert worst.arguments == {"length_bytes": 28_000_000, "free_bytes": 28_000_000}


def test_what_the_known_stall_did_to_the_queue_and_to_whom() -> None:
    (stall,) = golden("known-call").stalls
    assert (stall.full_ns, stall.first_overflow_ns) == (495 * MS, 505 * MS)
    assert (stall.waited, stall.clients) == (512, 1)
    assert stall.clients_blamed == (ClientInStall("fd", 77, "", 5, 600 * MS, 28_000_000),)


def test_slow_drain_is_the_verdict_where_no_stall_was() -> None:
    summary = golden("slow-drain")
    assert summary.verdict == (
        "488 connections were refused, but no stall was recorded (accept queue of 127.0.0.1:6379 at most 512 of 511); "
        "cause: slow drain."
    )
    assert summary.blame.causes == {"stall": 0, "slow drain": 488, "backlog too small": 0, "no known cause": 0}


def test_everything_that_explains_is_in_the_json() -> None:
    document = json.loads(json.dumps(golden("known-call").to_json(), allow_nan=False))
    assert document["findings"][0]["rule"] == "query-buffer-trims"
    assert document["findings"][0]["evidence"][0]["start_ns"] == 1001 * MS
    assert document["blame"]["causes"]["stall"] == 43
    assert 0 < document["blame"]["coincidence"]["p_value"] < 1
    assert document["trees"][0]["functions"][0]["name"] == "sdsRemoveFreeSpace"
    assert document["what_if"][0]["threshold_bytes"] == 32 * 1024
    assert document["stalls"][0]["clients_blamed"][0]["client"] == 77
    assert document["waits_exact"] is False


def test_the_known_functions() -> None:
    summary = golden("known-call")
    cron = function(summary, "serverCron")
    assert (cron.calls, cron.recorded, cron.short_calls, cron.hits) == (16, 4, 12, 16)
    assert (cron.p50_ns, cron.p99_ns, cron.max_ns) == (None, 618 * MS, 618 * MS)
    assert cron.total_ns == 618 * MS + 6 * MS + 6 * MS  # the storm's, three short ones, twelve only counted
    assert cron.self_ns == 2 * MS + 6 * MS + 6 * MS
    assert cron.busy_share == pytest.approx(630 / 650)
    assert cron.elapsed_share == pytest.approx(630 / 4000)
    trim = function(summary, "sdsRemoveFreeSpace")
    assert (trim.calls, trim.total_ns, trim.self_ns) == (5, 590 * MS, 490 * MS)
    assert trim.p50_ns == trim.p999_ns == 118 * MS
    assert [item.name for item in summary.functions][:2] == ["sdsRemoveFreeSpace", "je_pages_purge"]


def test_the_known_arguments() -> None:
    summary = golden("known-call")
    (purged,) = function(summary, "je_pages_purge").fields
    assert (purged.total, purged.minimum, purged.maximum) == (20_000_000, 4_000_000, 4_000_000)
    fields = {item.name: item for item in function(summary, "clientsCronResizeQueryBuffer").fields}
    assert fields["allocated_bytes"].total == 280_000_000
    assert fields["free_bytes"].total == 140_000_000
    assert (fields["idle_s"].minimum, fields["idle_s"].median, fields["idle_s"].maximum) == (3, 5, 7)
    assert fields["fd"].total is None
    assert fields["fd"].median == 77


def test_the_known_loop_queue_and_counters() -> None:
    summary = golden("known-call")
    assert summary.loop is not None
    assert (summary.loop.iterations, summary.loop.stalls) == (8, 1)
    assert (summary.loop.busy_ns, summary.loop.longest_ns) == (650 * MS, 620 * MS)
    assert summary.overflows == OverflowCount(41, 2, 0)
    (listener,) = summary.listeners
    assert (listener.queue_max, listener.queue_limit, listener.drops) == (512, 511, 43)
    assert listener.overflows == OverflowCount(41, 2, 0)
    (space,) = summary.reconciliation
    assert (space.observed, space.counted, space.not_attributable.total) == (43, 43, 0)
    assert space.other_counters == {"ListenDrops": 43}
    assert summary.losses == ()
    assert summary.complete
    assert summary.elapsed_ns == 4000 * MS


def test_a_probe_that_never_fired_is_named() -> None:
    summary = golden("known-call")
    (warning,) = summary.warnings
    assert warning.startswith("attached, but never fired: freeClient;")
    assert function(summary, "freeClient").hits == 0


def test_two_stalls_back_to_back_are_told_apart() -> None:
    summary = golden("two-stalls")
    assert [stall.start_ns // MS for stall in summary.stalls] == [1000, 1690]
    assert [stall.overflows + stall.overflows_drain for stall in summary.stalls] == [43, 43]
    assert summary.overflows == OverflowCount(82, 4, 7)
    assert summary.verdict.endswith(
        "It is the worst of 2 stalls, 1.24 s together; 50 connections were refused at other times."
    )


def test_a_recording_that_was_cut_short_says_so() -> None:
    summary = golden("cut-short")
    assert not summary.complete
    assert summary.stalls == ()
    assert summary.stall_basis == ITERATIONS
    assert summary.overflows == OverflowCount(0, 0, 11)
    assert summary.verdict == (
        "11 connections were refused, but no stall was recorded (accept queue of 127.0.0.1:6379 at most 512 of 511). "
        "The recording was cut short, a stall in progress is not in it."
    )
    (space,) = summary.reconciliation
    assert (space.observed, space.counted) == (11, None)
    assert any("cut short" in warning for warning in summary.warnings)
    assert function(summary, "je_pages_purge").recorded == 1


def test_losses_are_in_the_verdict_and_by_function() -> None:
    summary = golden("with-losses")
    assert summary.verdict.endswith("5 events were lost, so this is not the whole picture.")
    assert {(loss.name, loss.lost, loss.unpaired) for loss in summary.losses} == {
        ("je_pages_purge", 3, 0),
        ("sdsRemoveFreeSpace", 2, 2),
    }
    assert function(summary, "je_pages_purge").lost == 3
    assert [(note.time_ns // MS, note.text) for note in summary.notes] == [(3000, "process 4711 was restarted as 4811")]


def test_of_an_empty_recording_nothing_is_claimed() -> None:
    summary = golden("empty")
    assert summary.verdict == "Nothing was observed in 2.00 s: this says nothing about Redis."
    assert (summary.rows, summary.stalls, summary.overflows.total) == (0, (), 0)
    assert all(item.calls == 0 and item.p50_ns is None and item.max_ns is None for item in summary.functions)


def test_a_quiet_recording_says_what_was_looked_at(tmp_path: Path) -> None:
    builder = quiet(Builder(), 5000).span(CRON, 100, 2)
    counters = {ITERATION_ID: ProbeCounters(hits=500, short_calls=500, short_ns=9 * MS)}
    summary = summarise(analyse(read_recording(builder.write(tmp_path / "a.stall", 5000, counters))))
    assert summary.verdict == (
        "Nothing wrong was seen in 5.00 s: 500 event loop iterations, all shorter than 10.0 ms; "
        "1 call of 1 function; an accept queue of at most 2 of 511, no overflows."
    )


def test_a_stall_that_refused_nobody(tmp_path: Path) -> None:
    builder = quiet(Builder(), 10_000).span(ITERATION_ID, 2005, 900).span(CRON, 2010, 880)
    assert summary_of(builder, tmp_path).verdict == (
        "Redis was blocked for 900 ms: 880 ms of it in one call of serverCron; "
        "no connection was refused (accept queue at most 2 of 511)."
    )


def test_a_stall_of_which_most_was_not_traced_blames_nobody(tmp_path: Path) -> None:
    builder = Builder().span(ITERATION_ID, 3000, 900).span(CRON, 3010, 100)
    summary = summary_of(builder, tmp_path)
    assert summary.stalls[0].blamed == ()
    assert summary.verdict == (
        "Redis was blocked for 900 ms, 800 ms of it by something that was not traced; "
        "the accept queue was not observed."
    )
    (tmp_path / "b").mkdir()
    bare = summary_of(Builder().span(ITERATION_ID, 3000, 900), tmp_path / "b")
    assert bare.verdict.startswith("Redis was blocked for 900 ms by something that was not traced;")


def test_a_stall_in_progress_at_the_end_lasted_at_least_so_long(tmp_path: Path) -> None:
    builder = Builder().span(ITERATION_ID, 1000, None).span(CRON, 1001, None)
    summary = summary_of(builder, tmp_path, end_ms=1700)
    assert summary.verdict.startswith("Redis was blocked for at least 700 ms: 699 ms of it in one call of serverCron")
    assert function(summary, "serverCron").unfinished == 1


def test_overflows_of_other_listeners_are_not_held_against_redis(tmp_path: Path) -> None:
    builder = Builder().queue(0, 0, 0).counter(0, 900).queue(10, 1, 0).counter(20, 905)
    summary = summary_of(builder, tmp_path)
    assert summary.verdict.startswith("5 connections were refused, but no stall was recorded")
    assert "none can be attributed to the listeners that were watched" in summary.verdict
    assert summary.reconciliation[0].not_attributable.total == 5


def test_without_the_event_loop_the_summary_says_what_stands_for_it(tmp_path: Path) -> None:
    probes = tuple(probe for probe in PROBES if probe.id > 1)
    summary = summary_of(Builder(manifest(probes=probes)).span(CRON, 1000, 50), tmp_path)
    assert summary.stall_basis == ROOT_CALLS
    assert summary.loop is None
    assert function(summary, "serverCron").busy_share is None
    assert any("event loop was not observed" in warning for warning in summary.warnings)


def test_overflows_the_samples_missed_are_owned_up_to(tmp_path: Path) -> None:
    builder = Builder().queue(0, 512, 0).counter(0, 900).queue(10, 512, 4).counter(10, 904)
    summary = summarise(analyse(read_recording(builder.write(tmp_path / "a.stall", 20, overflows_end=909))))
    assert (summary.reconciliation[0].observed, summary.reconciliation[0].counted) == (4, 9)
    assert any(warning.startswith("observed 4 of 9 overflows") for warning in summary.warnings)


def test_rows_the_kernel_sent_and_the_file_lacks_are_owned_up_to(tmp_path: Path) -> None:
    builder = add_storm(Builder(), 1000)
    path = builder.write(tmp_path / "a.stall", 4000, {TRIM: ProbeCounters(hits=9, sent=9)})
    warnings = summarise(analyse(read_recording(path))).warnings
    assert "sdsRemoveFreeSpace: 4 of 9 recorded calls are not in the file" in warnings


def test_abandoned_calls_are_counted_and_left_out(tmp_path: Path) -> None:
    builder = Builder().span(CRON, 1000, 100).span(TRIM, 1050, None).span(PURGE, 3000, 5)
    summary = summary_of(builder, tmp_path)
    trim = function(summary, "sdsRemoveFreeSpace")
    assert (trim.abandoned, trim.recorded, trim.max_ns) == (1, 0, None)
    assert any("never returned" in warning for warning in summary.warnings)


def test_symbols_tell_functions_of_one_name_apart(tmp_path: Path) -> None:
    lazy = replace(PROBES[PURGE], id=20, symbol="je_pages_purge_lazy")
    forced = replace(PROBES[PURGE], id=21, symbol="je_pages_purge_forced")
    builder = Builder(manifest(probes=(*PROBES[:PURGE], lazy, forced))).span(20, 100, 5).span(21, 200, 5)
    names = {item.name for item in summary_of(builder, tmp_path).functions}
    assert {"je_pages_purge_lazy", "je_pages_purge_forced"} <= names


def test_only_the_worst_stalls_are_listed_but_all_are_counted(tmp_path: Path) -> None:
    builder = Builder()
    for index in range(KEPT_STALLS + 30):
        builder.span(ITERATION_ID, index * 100, 11 + index * 0.5)
    summary = summary_of(builder, tmp_path)
    assert summary.stall_count == KEPT_STALLS + 30
    assert len(summary.stalls) == KEPT_STALLS
    starts = [stall.start_ns for stall in summary.stalls]
    assert starts == sorted(starts)
    assert min(stall.duration_ns for stall in summary.stalls) == (11 + 15) * MS


def test_notes_and_cost_reach_the_reader(tmp_path: Path) -> None:
    made = manifest(notes=(Note(at(5), "restarted"),), cost={"own_cpu_ns": 7.0})
    summary = summary_of(Builder(made), tmp_path)
    assert summary.cost == {"own_cpu_ns": 7.0}
    assert summary.notes == (Note(5 * MS, "restarted"),)


@pytest.mark.parametrize("name", ["known-call", "cut-short", "with-losses", "empty", "two-stalls"])
def test_a_summary_is_json(name: str) -> None:
    summary = golden(name)
    document = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert document["summary_version"] == 1
    assert document["verdict"] == summary.verdict
    assert len(document["functions"]) == len(summary.functions)
    assert document["listeners"][0]["overflows"]["inside"] == summary.listeners[0].overflows.inside


def test_damaged_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    builder = Builder().span(CRON, 100, 5).span(99, 100, 5)
    builder._rows += [(2**63, 5, CRON, PID, (0, 0, 0), 0), (at(1), 2**63, CRON, PID, (0, 0, 0), 0)]
    path = tmp_path / "a.stall"
    summary = summarise(analyse(read_recording(builder.write(path, 500))))
    assert function(summary, "serverCron").recorded == 1
    assert "3 rows are damaged or unknown and were left out" in summary.warnings
    assert summary.elapsed_ns == 500 * MS


@pytest.mark.parametrize(
    "item",
    [
        Field("a", "x", 3),
        Field("a", "x", -1),
        Field("a", "x", 0, shift=64),
        Field("a", "x", 0, bits=0),
        Field("a", "x", 0, 1),
    ],
)
def test_fields_outside_the_values_are_refused(tmp_path: Path, item: Field) -> None:
    probes = (*PROBES, ProbeInfo(30, "f", "call", "uprobe", (item,)))
    with pytest.raises(RecordingError, match="field a of probe f is impossible"):
        summary_of(Builder(manifest(probes=probes)), tmp_path)


@given(st.integers(0, 2**64 - 1), st.integers(0, 63), st.integers(1, 64), st.booleans())
def test_fields_are_cut_out_of_values_bit_by_bit(value: int, shift: int, bits: int, signed: bool) -> None:
    if bits == 64:
        shift = 0
    expected = (value >> shift) & ((1 << bits) - 1)
    if signed and expected >> (bits - 1):
        expected -= 1 << bits
    item = Field("x", "x", 0, shift, bits, signed)
    assert int(extract(np.array([value], np.uint64), item)[0]) == expected


def test_decoded_arguments_are_columns_by_name() -> None:
    tables = build_tables(read_recording(DATA / "known-call.stall"))
    resize = next(probe for probe in PROBES if probe.name == "clientsCronResizeQueryBuffer")
    decoded = tables.decoded(resize)
    assert decoded.columns.tolist() == ["fd", "last_interaction_s", "allocated_bytes", "free_bytes", "idle_s"]
    assert decoded["idle_s"].tolist() == [3, 4, 5, 6, 7]
    assert (tables.calls.loc[decoded.index, "probe"] == resize.id).all()
    assert len(tables.accepts) == 512
    assert tables.accepts["fd"].tolist() == list(range(100, 612))
    assert (tables.accepts["listener_fd"] == 5).all()
    assert tables.iterations[["ready", "accepted"]].to_numpy().tolist() == [[4, 0]]


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=50), st.integers(0, 50), st.sampled_from([0.5, 0.99, 0.999]))
def test_quantiles_are_those_of_all_calls_where_they_are_known(lengths: list[int], short: int, share: float) -> None:
    """Counted-only calls are shorter than every recorded one; give them -1 and sort it all by hand."""
    everything = [-1] * short + sorted(lengths)
    found = quantile(np.sort(np.array(lengths, np.int64)), short, share)
    if not everything:
        assert found is None
        return
    expected = everything[max(math.ceil(share * len(everything)), 1) - 1]
    assert found == (None if expected == -1 else expected)


def test_a_function_with_no_row_keeps_its_counts(tmp_path: Path) -> None:
    counters = {FREE: ProbeCounters(hits=70, short_calls=70, short_ns=7 * MS)}
    summary = summarise(analyse(read_recording(Builder().span(CRON, 1, 5).write(tmp_path / "a.stall", 100, counters))))
    free = function(summary, "freeClient")
    assert (free.calls, free.recorded, free.total_ns, free.self_ns) == (70, 0, 7 * MS, 7 * MS)
    assert (free.p50_ns, free.p999_ns, free.max_ns) == (None, None, None)
