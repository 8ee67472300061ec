from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import (
    DATA,
    MS,
    PID,
    REQUEST_ID,
    Builder,
    ProbeCounters,
    add_storm,
    at,
    hooked_manifest,
)
from rich.console import Console

from stallscope.reports.terminal import render
from stallscope.tracer.analysis import requests
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.listener_summary import CounterMatch, OverflowCount
from stallscope.tracer.analysis.requests import (
    ACK_REFUSED_WITH_RST,
    ListenerRequests,
    QueueWait,
    RefusedConnections,
    refused_connections,
)
from stallscope.tracer.analysis.summary import Summary, summarise
from stallscope.tracer.analysis.tables import build_tables
from stallscope.tracer.capture.listener import EVENTS
from stallscope.tracer.recording import read_recording

FULL = "SYN refused: accept queue full"
SILENT = "third ACK refused silently: accept queue full"
TAKEN = "SYN taken"


def golden() -> Summary:
    return summarise(analyse(read_recording(DATA / "refused.stall")))


def summary_of(
    builder: Builder, tmp_path: Path, counters: dict[str, ProbeCounters] | None = None, overflows_end: int = 900
) -> Summary:
    path = tmp_path / "a.stall"
    by_id = {REQUEST_ID[name]: item for name, item in (counters or {}).items()}
    return summarise(analyse(read_recording(builder.write(path, 4000, by_id, overflows_end=overflows_end))))


def hooked() -> Builder:
    return Builder(hooked_manifest())


def linked(builder: Builder, tmp_path: Path, end_ms: float = 400_000) -> list[tuple[int, int, bool, int]]:
    """Return port, times, taken and wait in ms of the refused connections."""
    recording = read_recording(builder.write(tmp_path / "a.stall", end_ms))
    frame = refused_connections(build_tables(recording).requests)
    columns = (frame[name].tolist() for name in ("peer_port", "times", "taken", "wait_ns"))
    return [(port, times, taken, wait // MS) for port, times, taken, wait in zip(*columns, strict=True)]


def of_listener(summary: Summary, index: int = 0) -> ListenerRequests:
    assert summary.requests is not None
    return summary.requests.listeners[index]


def counts(listener: ListenerRequests) -> dict[str, int]:
    return {event.name: event.count for event in listener.events}


def text_of(summary: Summary) -> str:
    file = io.StringIO()
    render(summary, Console(file=file, width=80))
    return file.getvalue()


def test_the_events_have_the_names_the_recorder_gives_them() -> None:
    named = {*requests.REFUSALS, requests.SYN_TAKEN, requests.ENQUEUED, requests.ACCEPTED}
    assert named | {"SYN cookie sent"} == set(EVENTS)
    assert {name for name in EVENTS if name.endswith(": accept queue full")} == set(requests.QUEUE_FULL)


def test_the_rows_are_decoded_and_sorted() -> None:
    frame = build_tables(read_recording(DATA / "refused.stall")).requests
    assert len(frame) == 8 + 43 + 8 + 8
    assert frame["time_ns"].is_monotonic_increasing
    first = frame.loc[frame["event"] == FULL].iloc[0]
    assert (first["time_ns"], first["listener"], first["pid"], first["peer_port"]) == (at(1501), 0, PID, 40000)
    assert (first["queue_length"], first["queue_limit"], first["syn_queue_length"]) == (512, 511, 3)
    assert (first["peer_high"], first["peer_low"], first["wait_ns"]) == (0, 0xFFFF_7F00_0001, 0)
    accepted = frame.loc[frame["event"] == "connection accepted"]
    assert sorted(accepted["wait_ns"] // MS) == [1, 4, 6, 615, 615, 615, 615, 615]


def test_an_ipv6_address_with_its_upper_bit_set_is_kept(tmp_path: Path) -> None:
    peer = (0xFE80_0000_0000_0000, 0xFFFF_FFFF_FFFF_FFFE)
    builder = hooked().request(1, FULL, 40000, peer=peer)
    frame = build_tables(read_recording(builder.write(tmp_path / "a.stall", 10))).requests
    assert (int(frame["peer_high"].iloc[0]), int(frame["peer_low"].iloc[0])) == peer


def test_the_known_requests() -> None:
    summary = golden()
    listener = of_listener(summary)
    assert (listener.address, listener.pid, listener.exact) == ("127.0.0.1:6379", PID, True)
    assert counts(listener) == {TAKEN: 8, FULL: 41, SILENT: 2, "connection enqueued": 8, "connection accepted": 8}
    assert listener.refused == RefusedConnections(21, 43, 3, 14 * MS, 14 * MS, round(129.9 * MS))
    assert listener.wait == QueueWait(8, 615 * MS, 615 * MS, 615 * MS)
    assert summary.requests is not None
    assert (summary.requests.complete, summary.requests.thinned, summary.requests.lost) == (True, 0, 0)


def test_the_known_overflows_are_reconciled_one_by_one() -> None:
    summary = golden()
    (space,) = summary.reconciliation
    assert (space.observed, space.counted, space.one_by_one) == (48, 48, True)
    assert (space.unwatched, space.unexplained, space.not_attributable.total) == (5, 0, 0)
    assert space.matches == (
        CounterMatch("ListenOverflows", 48, 5, 48, 0),
        CounterMatch("ListenDrops", 48, 5, 48, 0),
    )
    assert summary.overflows == OverflowCount(41, 2, 0)
    assert summary.connections_refused == 21
    assert not [warning for warning in summary.warnings if "overflows" in warning]


def test_what_the_kernel_counted_and_nobody_saw_is_unexplained(tmp_path: Path) -> None:
    seen = {"ListenOverflows": 2, "ListenDrops": 3, "TCPReqQFullDoCookies": 4}
    builder = Builder(hooked_manifest(seen=seen, seen_elsewhere=dict.fromkeys(seen, 1)))
    summary = summarise(analyse(read_recording(builder.write(tmp_path / "a.stall", 1000, overflows_end=904))))
    (space,) = summary.reconciliation
    assert (space.observed, space.unexplained) == (3, 1)
    assert space.matches == (
        CounterMatch("ListenOverflows", 3, 1, 4, 1),
        CounterMatch("ListenDrops", 4, 1, 4, 0),
    ), "a counter whose end is not known is left out"
    text = " ".join(text_of(summary).split())
    assert "observed 3 of 4 ListenOverflows the kernel counted, 1 of them at listeners not watched; 1 unex" in text
    assert "observed 4 of 4 ListenDrops, 1 of them at listeners not watched" in text


def test_the_verdict_tells_connections_from_refusals() -> None:
    assert golden().verdict.endswith("; meanwhile 21 connections were refused 43 times.")


def test_refusals_at_other_times_are_not_called_connections(tmp_path: Path) -> None:
    builder = add_storm(hooked(), 1000).request(1500, FULL, 40000).request(1510, FULL, 40000)
    builder.request(2500, FULL, 40001)
    verdict = summary_of(builder, tmp_path, overflows_end=903).verdict
    assert verdict.endswith("meanwhile one connection was refused 2 times. At other times there was one refusal.")


def test_overflows_have_their_own_time_in_stalls(tmp_path: Path) -> None:
    # a sampled interval from 1615 to 1625 would have touched the stall, which ends at 1620
    builder = add_storm(hooked(), 1000).request(1619.99, FULL, 40000).request(1620, FULL, 40001)
    summary = summary_of(builder, tmp_path, overflows_end=902)
    assert summary.overflows == OverflowCount(1, 1, 0)
    assert summary.stalls[0].connections_refused == 2


def test_without_a_stall_connections_are_counted_too(tmp_path: Path) -> None:
    builder = hooked().request(100, FULL, 40000).request(200, FULL, 40000)
    summary = summary_of(builder, tmp_path, overflows_end=902)
    assert summary.verdict.startswith("One connection was refused 2 times, but no stall was recorded")


def test_thinned_events_are_counted_and_linked_numbers_are_lower_bounds(tmp_path: Path) -> None:
    builder = add_storm(hooked(), 1000).request(1500, FULL, 40000)
    summary = summary_of(builder, tmp_path, {FULL: ProbeCounters(hits=43, sent=1, lost=2, thinned=40)}, 943)
    listener = of_listener(summary)
    assert summary.requests is not None
    assert (summary.requests.complete, summary.requests.thinned, summary.requests.lost) == (False, 40, 2)
    assert (counts(listener), listener.events[0].rows, listener.exact) == ({FULL: 43}, 1, True)
    assert (summary.reconciliation[0].observed, summary.reconciliation[0].unexplained) == (43, 0)
    # not every overflow has its own time: those that were sampled do
    assert summary.overflows == OverflowCount(41, 2, 0)
    assert (summary.connections_refused, summary.stalls[0].connections_refused) == (None, None)
    assert "meanwhile 43 connections were refused" in summary.verdict
    assert f"{FULL}: 2 were counted and not recorded, the ring buffer was full" in summary.warnings
    text = text_of(summary)
    assert "at least 1 connection was refused 1 time; none got in\n" in text
    assert "counted, but not recorded one by one: 40 beyond the rate limit, 2 lost\n" in text


def test_of_several_listeners_only_rows_tell_which(tmp_path: Path) -> None:
    (first,) = hooked_manifest().listeners
    two = hooked_manifest(listeners=(first, replace(first, index=1, address="[::1]:6379")))
    builder = Builder(two).request(1, FULL, 40000).request(2, FULL, 40000, listener=1).request(3, TAKEN, 40001)
    summary = summary_of(builder, tmp_path, overflows_end=902)
    assert [(counts(of_listener(summary, index))) for index in (0, 1)] == [{TAKEN: 1, FULL: 1}, {FULL: 1}]
    assert of_listener(summary).exact
    thinned = summary_of(builder, tmp_path, {FULL: ProbeCounters(hits=9, sent=2, thinned=7)}, 909)
    assert counts(of_listener(thinned, 1)) == {FULL: 1}
    assert not of_listener(thinned, 1).exact
    assert "at least 1\n" in text_of(thinned)
    assert thinned.reconciliation[0].observed == 9


def test_what_the_kernel_counted_beyond_is_unexplained(tmp_path: Path) -> None:
    summary = summary_of(hooked().request(1, FULL, 40000), tmp_path, overflows_end=904)
    assert summary.reconciliation[0].unexplained == 3
    assert "overflows the kernel counted: 4; seen one by one: 1; unexplained: 3" in summary.warnings
    assert summary.verdict.endswith("The kernel counted 3 more refusals that were not seen.")
    assert "\n  observed 1 of 4 ListenOverflows the kernel counted; 3 unexplained\n" in text_of(summary)


def test_a_connection_that_got_in_ends_there(tmp_path: Path) -> None:
    builder = hooked().request(10, FULL, 40000).request(20, TAKEN, 40000).enters(21, 40000, 5)
    builder.request(1000, FULL, 40000).request(1500, FULL, 40000)
    assert linked(builder, tmp_path) == [(40000, 1, True, 11), (40000, 2, False, 500)]


def test_a_connection_that_was_refused_with_rst_ends_there(tmp_path: Path) -> None:
    builder = hooked().request(10, ACK_REFUSED_WITH_RST, 40000).request(20, FULL, 40000).enters(30, 40000, 1)
    assert linked(builder, tmp_path) == [(40000, 1, False, 0), (40000, 1, True, 10)]


@pytest.mark.parametrize(
    ("pause_ms", "expected"),
    [(120_000, [(40000, 2, False, 120_000)]), (122_000, [(40000, 1, False, 0), (40000, 1, False, 0)])],
)
def test_after_the_longest_retry_a_port_is_another_connection(
    pause_ms: int, expected: list[tuple[int, int, bool, int]], tmp_path: Path
) -> None:
    assert linked(hooked().request(10, FULL, 40000).request(10 + pause_ms, FULL, 40000), tmp_path) == expected


def test_one_port_of_two_clients_or_at_two_listeners_is_two_connections(tmp_path: Path) -> None:
    builder = hooked().request(10, FULL, 40000).request(11, FULL, 40000, peer=(0, 0xFFFF_7F00_0002))
    builder.request(12, FULL, 40000, listener=1)
    assert [row[:2] for row in linked(builder, tmp_path)] == [(40000, 1)] * 3


_EVENTS = st.sampled_from([FULL, SILENT, ACK_REFUSED_WITH_RST, TAKEN, "entered"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(_EVENTS, st.sampled_from([40000, 40001]), st.sampled_from([1, 500, 130_000])), max_size=25))
def test_linking_is_what_a_walk_through_each_clients_events_finds(events: list[tuple[str, int, int]]) -> None:
    builder, time_ms = hooked(), 10
    builder.enters(1, 50000, 1)  # so that the accept queue was seen
    walked: list[_Walked] = []
    current: dict[int, _Walked] = {}
    for event, port, pause_ms in events:
        time_ms += pause_ms
        known = current.get(port)
        if known and time_ms - known.seen_ms > 121_000:
            known = None
            del current[port]
        if event == "entered":
            builder.enters(time_ms, port, 3)
            if known:
                known.taken, known.until_ms = True, time_ms
            current.pop(port, None)
            continue
        builder.request(time_ms, event, port)
        if event == TAKEN:
            continue
        if known is None:
            known = current[port] = _Walked(port, time_ms)
            walked.append(known)
        known.times += 1
        known.seen_ms = known.until_ms = time_ms
        if event == ACK_REFUSED_WITH_RST:
            del current[port]
    with TemporaryDirectory() as place:
        found = linked(builder, Path(place), end_ms=5_000_000)
    assert found == [(item.port, item.times, item.taken, item.until_ms - item.first_ms) for item in walked]


@dataclass
class _Walked:
    port: int
    first_ms: int
    times: int = 0
    taken: bool = False
    until_ms: int = 0
    seen_ms: int = 0


def test_a_taken_syn_is_no_connection_where_the_accept_queue_was_seen(tmp_path: Path) -> None:
    builder = hooked().request(10, FULL, 40000).request(20, TAKEN, 40000)
    assert linked(builder, tmp_path) == [(40000, 1, True, 10)]
    builder.enters(30, 50000, 1)
    assert linked(builder, tmp_path) == [(40000, 1, False, 0)]


def test_hooks_at_the_accept_queue_that_never_fired_are_owned_up_to(tmp_path: Path) -> None:
    builder = hooked().request(10, TAKEN, 40000).accepts(20, 1)
    assert [item for item in summary_of(builder, tmp_path).warnings if "hooks at the accept queue saw none" in item]
    builder.enters(15, 40000, 5)
    assert not [item for item in summary_of(builder, tmp_path).warnings if "hooks at the accept queue" in item]


def test_the_block_in_the_terminal() -> None:
    part = text_of(golden()).split("\nConnection requests\n", 1)[1].split("\n\n", 1)[0]
    assert part.splitlines() == [
        "  127.0.0.1:6379",
        "  SYN taken                                       8",
        "  SYN refused: accept queue full                 41",
        "  third ACK refused silently: accept queue full   2",
        "  connection enqueued                             8",
        "  connection accepted                             8",
        "  21 connections were refused 43 times, waited 14.0 ms to 130 ms (median 14.0",
        "  ms); 3 got in",
        "  wait in the accept queue: p50 615 ms, p99 615 ms, longest 615 ms",
    ]
    assert "48 of 48 ListenOverflows the kernel counted, 5 of them at listeners" in text_of(golden())


def test_without_hooks_nothing_is_said_of_requests() -> None:
    summary = summarise(analyse(read_recording(DATA / "known-call.stall")))
    assert (summary.requests, summary.connections_refused) == (None, None)
    assert not summary.reconciliation[0].one_by_one
    assert "Connection requests" not in text_of(summary)


def test_hooks_that_saw_nothing_say_so(tmp_path: Path) -> None:
    assert "\nConnection requests\n  none\n" in text_of(summary_of(hooked(), tmp_path))


def test_everything_is_in_the_json() -> None:
    document = json.loads(json.dumps(golden().to_json(), allow_nan=False))
    (listener,) = document["requests"]["listeners"]
    assert listener["refused"]["connections"] == 21
    assert listener["events"][1] == {"name": FULL, "count": 41, "rows": 41}
    assert document["reconciliation"][0]["unwatched"] == 5
    assert document["stalls"][0]["connections_refused"] == 21
