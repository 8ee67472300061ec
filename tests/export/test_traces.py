"""Perfetto's trace processor reads the native trace and Chrome's JSON, and finds in them what was recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from mixed import DRIFT_NS, NOTE, OTHER_PID, OTHER_THREAD
from perfetto.protos.perfetto.trace import perfetto_trace_pb2
from recordings import LIMIT, MS, PID, STARTED_NS, WALL_OFFSET_NS, at
from trace_processor import TraceProcessor, missing

from stallscope.tracer.analysis.analysis import Analysis

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

RECORDINGS = ("known-call", "two-stalls", "refused", "with-losses", "empty", "cut-short", "mixed", "imported")
ZERO_NS = {"perfetto": STARTED_NS, "chrome": 0}

Open = Callable[[str, str], TraceProcessor]
Of = Callable[[str], Analysis]


@pytest.fixture(scope="module")
def opened(export: Callable[[str, str], Path]) -> Iterator[Open]:
    """Return the trace processor that has read a recording's export in a format."""
    known: dict[tuple[str, str], TraceProcessor] = {}

    def of(name: str, format_name: str) -> TraceProcessor:
        key = (name, format_name)
        if key not in known:
            known[key] = TraceProcessor(export(name, format_name))
        return known[key]

    yield of
    for processor in known.values():
        processor.close()


@pytest.mark.parametrize("format_name", ["perfetto", "chrome"])
class TestBoth:
    @pytest.mark.parametrize("name", RECORDINGS)
    def test_are_read_without_a_complaint(self, name: str, format_name: str, opened: Open) -> None:
        assert opened(name, format_name).complaints() == {}

    @pytest.mark.parametrize("name", RECORDINGS)
    def test_have_every_call_at_its_place(self, name: str, format_name: str, opened: Open, analysis_of: Of) -> None:
        calls = analysis_of(name).nested.calls
        names = {probe.id: probe.name for probe in analysis_of(name).manifest.probes}
        native = format_name == "perfetto"
        zero_ns = 0 if native else min([STARTED_NS, *calls["start_ns"]])
        expected = [
            (row.pid, row.tid, row.start_ns - zero_ns,
             -1 if row.unfinished and native else row.duration_ns, row.depth, names[row.probe],
             None if row.parent < 0 else names[calls["probe"][row.parent]], row.self_ns)
            for row in calls.itertuples()
        ]  # fmt: skip
        seen = opened(name, format_name).rows(
            """
            select pid, tid, s.ts as ts, s.dur as dur, s.depth as depth, s.name as name,
                   o.name as outer_name, extract_arg(s.arg_set_id, '{}self_ns') as self_ns
            from slice s join thread_track tt on s.track_id = tt.id join thread using (utid) join process using (upid)
            left join slice o on s.parent_id = o.id
            where s.category = 'call' order by tid, ts, depth
            """.format("debug." if native else "args.")
        )
        assert sorted(seen, key=str) == sorted(expected, key=str)

    def test_have_the_decoded_arguments(self, format_name: str, opened: Open) -> None:
        prefix = "debug." if format_name == "perfetto" else "args.arg_"
        sql = """
            select extract_arg(arg_set_id, '{0}fd') as fd, extract_arg(arg_set_id, '{0}allocated_bytes') as allocated,
                   extract_arg(arg_set_id, '{0}idle_s') as idle_s
            from slice where name = 'clientsCronResizeQueryBuffer' order by ts"""
        rows = opened("known-call", format_name).rows(sql.format(prefix))
        assert rows == [(77, 56_000_000, 3 + index) for index in range(5)]
        purged = "select sum(extract_arg(arg_set_id, '{}purged_bytes')) as v from slice where name = 'je_pages_purge'"
        assert opened("known-call", format_name).value(purged.format(prefix)) == 5 * 4_000_000

    def test_count_as_the_kernel_did(self, format_name: str, opened: Open, analysis_of: Of) -> None:
        """Every sample of every counter is there, with its value at its time."""
        tables = analysis_of("two-stalls").tables
        seen = opened("two-stalls", format_name).rows(
            "select t.name as name, ts, value from counter c join track t on t.id = c.track_id order by t.name, ts"
        )
        by_name: dict[str, list[tuple[int, float]]] = {}
        for name, ts, value in seen:
            by_name.setdefault(name.partition(",")[0].partition(" events")[0], []).append((ts, value))
        shift = ZERO_NS[format_name] - STARTED_NS
        for name, column in (
            ("accept queue length", "queue_length"),
            ("accept queue limit", "queue_limit"),
            ("socket drops", "drops"),
        ):
            times = (tables.queues["time_ns"] + shift).tolist()
            assert by_name.pop(name) == list(zip(times, tables.queues[column].tolist(), strict=True))
        times = (tables.counters["time_ns"] + shift).tolist()
        assert by_name.pop("ListenOverflows") == list(zip(times, tables.counters["count"].tolist(), strict=True))
        assert by_name == {}

    def test_have_the_overflows(self, format_name: str, opened: Open, analysis_of: Of) -> None:
        prefix = "debug" if format_name == "perfetto" else "args"
        rows = opened("two-stalls", format_name).rows(
            f"""
            select extract_arg(arg_set_id, '{prefix}.stall') as stall,
                   extract_arg(arg_set_id, '{prefix}.phase') as phase,
                   sum(extract_arg(arg_set_id, '{prefix}.count')) as refused
            from slice where category = 'overflow' group by 1, 2 order by 1, 2
            """
        )
        assert rows == [
            (None, "outside", 7), (0, "drain", 2), (0, "inside", 41), (1, "drain", 2), (1, "inside", 41)
        ]  # fmt: skip
        seen_ns = analysis_of("two-stalls").stalls.overflows["seen_ns"] - STARTED_NS + ZERO_NS[format_name]
        times = opened("two-stalls", format_name).rows("select ts from slice where category = 'overflow' order by ts")
        assert [ts for (ts,) in times] == sorted(seen_ns)

    def test_have_the_stalls(self, format_name: str, opened: Open) -> None:
        rows = opened("two-stalls", format_name).rows("select ts, dur from slice where name = 'stall' order by ts")
        zero = ZERO_NS[format_name]
        assert rows == [(zero + 1000 * MS, 620 * MS), (zero + 1690 * MS, 620 * MS)]

    def test_tell_processes_and_threads_apart(self, format_name: str, opened: Open) -> None:
        trace = opened("mixed", format_name)
        processes = trace.rows("select pid, name from process where name is not null and pid > 0 order by pid")
        assert processes == [(PID, "redis-server 2.8.17"), (OTHER_PID, "valkey-server 8.1")]
        rows = trace.rows(
            """
            select pid, tid, count(*) as calls from slice s join thread_track t on s.track_id = t.id
            join thread using (utid) join process using (upid) where category = 'call' group by 1, 2 order by 1, 2
            """
        )
        assert rows == [(PID, PID, 19), (PID, OTHER_THREAD, 3), (OTHER_PID, OTHER_PID, 6)]

    def test_show_what_became_of_connection_requests(self, format_name: str, opened: Open, analysis_of: Of) -> None:
        expected = analysis_of("refused").tables.requests["event"].value_counts()
        rows = opened("refused", format_name).rows(
            "select name, count(*) as times from slice where category = 'request' group by 1"
        )
        assert dict(rows) == {name: count for name, count in expected.items() if count}
        name = "peer" if format_name == "chrome" else "peer_port"
        key = f"{'args' if format_name == 'chrome' else 'debug'}.{name}"
        refused_once_more = opened("refused", format_name).value(
            f"""select count(*) from slice where category = 'request' and name glob 'SYN refused*'
            and extract_arg(arg_set_id, '{key}') in ('127.0.0.1:40000', 40000)"""
        )
        assert refused_once_more == 3

    def test_mark_an_abandoned_call(self, format_name: str, opened: Open) -> None:
        rows = opened("mixed", format_name).rows("select name, ts, dur from slice where category = 'abandoned'")
        # Chrome's times begin with the first event, 20 ms before the recording
        assert rows == [("je_pages_purge", at(1050) if format_name == "perfetto" else 1070 * MS, 0)]


def test_chrome_has_what_other_tools_told(opened: Open, analysis_of: Of) -> None:
    tables, trace = analysis_of("imported").tables, opened("imported", "chrome")
    assert trace.value("select count(*) from slice where category = 'packet' and name = 'SYN'") == 50
    assert trace.value("select count(*) from slice where category = 'packet'") == len(tables.packets)
    spans = trace.rows(
        """select name, dur, extract_arg(arg_set_id, 'args.text') as text
        from slice where category = 'imported span' order by ts"""
    )
    expected = tables.imported_spans[["source", "duration_ns", "text"]].to_records(index=False).tolist()
    assert spans
    assert sorted(spans) == sorted(expected)
    samples = trace.rows("select max(value) as v from counter c join counter_track t on c.track_id = t.id "
                         "where t.name glob 'connected_clients, clients*'")  # fmt: skip
    frame = tables.imported_samples
    assert samples == [(frame.loc[frame["name"] == "connected_clients", "value"].max(),)]


class TestNative:
    def test_has_a_flow_from_each_stall_to_each_of_its_overflows(self, opened: Open, analysis_of: Of) -> None:
        for name in ("known-call", "two-stalls", "refused", "mixed"):
            overflows = analysis_of(name).stalls.overflows
            frame = analysis_of(name).stalls.frame
            mine = overflows.loc[overflows["stall"] >= 0]
            begins = frame["start_ns"].to_numpy()[mine["stall"]].tolist()
            expected = sorted(zip(begins, mine["seen_ns"].tolist(), mine["count"].tolist(), strict=True))
            assert expected
            seen = opened(name, "perfetto").rows(
                """
                select o.ts as begin, i.ts as seen, extract_arg(i.arg_set_id, 'debug.count') as count
                from flow join slice o on o.id = slice_out join slice i on i.id = slice_in
                where o.name = 'stall' and i.name = 'overflow'
                """
            )
            assert sorted(seen) == expected
            assert opened(name, "perfetto").value("select count(*) from flow") == len(expected)

    def test_shows_wall_time(self, opened: Open) -> None:
        rows = opened("mixed", "perfetto").rows(
            "select ts, to_realtime(ts) as wall from slice where name = 'serverCron' order by ts"
        )
        assert rows[0] == (at(1001), at(1001) + WALL_OFFSET_NS)
        snapshots = opened("mixed", "perfetto").rows(
            "select ts, clock_value from clock_snapshot where clock_name = 'REALTIME' order by ts"
        )
        assert snapshots == [(at(0), at(0) + WALL_OFFSET_NS), (at(4000), at(4000) + WALL_OFFSET_NS + DRIFT_NS)]

    def test_says_what_is_known_of_a_stall_and_nothing_else(self, opened: Open) -> None:
        facts = "select key, display_value as value from slice join args using (arg_set_id) where name = 'stall'"
        stall = dict(opened("known-call", "perfetto").rows(facts))
        for key, value in {
            "stall": 0, "queue_start": 3, "queue_max": LIMIT + 1, "queue_limit": LIMIT, "overflows": 41,
            "overflows_drain": 2, "accepted": 0, "accepted_drain": 512, "explained_ns": 618 * MS, "drain_ns": 30 * MS,
            "listener": "127.0.0.1:6379", "drained": "true",
        }.items():  # fmt: skip
            assert stall.pop(f"debug.{key}") == str(value), key
        # single connections are not known without kernel probes: -1 in the analysis is no annotation here
        assert [key for key in stall if key.startswith("debug.")] == []

    def test_names_tracks_units_and_owners(self, opened: Open) -> None:
        rows = opened("mixed", "perfetto").rows(
            """
            select t.name as name, t.unit as unit, p.pid as pid from counter_track t
            left join process_counter_track pt on pt.id = t.id left join process p using (upid) order by t.name
            """
        )
        assert rows == [
            ("ListenOverflows, network namespace 4026531840", "events", None),
            ("ListenOverflows, network namespace 4026531999", "events", None),
            ("accept queue length, 127.0.0.1:6379", "connections", PID),
            ("accept queue length, [::1]:6380", "connections", OTHER_PID),
            ("accept queue limit, 127.0.0.1:6379", "connections", PID),
            ("accept queue limit, [::1]:6380", "connections", OTHER_PID),
            ("socket drops, 127.0.0.1:6379", "connections", PID),
            ("socket drops, [::1]:6380", "connections", OTHER_PID),
        ]

    def test_tells_about_the_recording(self, opened: Open) -> None:
        facts = "select key, display_value as value from slice join args using (arg_set_id) where name = 'recording'"
        mixed, cut = (dict(opened(name, "perfetto").rows(facts)) for name in ("mixed", "cut-short"))
        assert (mixed["debug.complete"], mixed["debug.lost_events"]) == ("true", "3")
        assert cut["debug.complete"] == "false"
        assert opened("mixed", "perfetto").rows("select ts, name from slice where category = 'note'") == [
            (at(3000), NOTE)
        ]
        assert opened("empty", "perfetto").rows("select name, dur from slice") == [("recording", 2000 * MS)]

    @pytest.mark.parametrize("name", RECORDINGS)
    def test_follows_the_published_protos(self, name: str, export: Callable[[str, str], Path]) -> None:
        """Perfetto's own classes read every field we write, and each event's track and names were told before."""
        trace = perfetto_trace_pb2.Trace.FromString(export(name, "perfetto").read_bytes())
        tracks: set[int] = set()
        interned: dict[str, set[int]] = {
            "event_names": set(),
            "event_categories": set(),
            "debug_annotation_names": set(),
        }
        assert trace.packet[0].sequence_flags == perfetto_trace_pb2.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        for packet in trace.packet:
            assert packet.trusted_packet_sequence_id == 1
            if packet.HasField("track_descriptor"):
                assert packet.track_descriptor.parent_uuid in tracks | {0}
                tracks.add(packet.track_descriptor.uuid)
            for kind, iids in interned.items():
                iids.update(entry.iid for entry in getattr(packet.interned_data, kind))
            if packet.HasField("track_event"):
                event = packet.track_event
                assert event.track_uuid in tracks
                assert {event.name_iid} <= interned["event_names"] | {0}
                assert set(event.category_iids) <= interned["event_categories"]
                assert {item.name_iid for item in event.debug_annotations} <= interned["debug_annotation_names"]
            assert unknown_fields(packet) == 0


def unknown_fields(message: Message) -> int:
    """Return how many fields Perfetto's protos do not have, in the message and in those inside."""
    inside = 0
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            inside += sum(unknown_fields(item) for item in (value if field.is_repeated else [value]))
    return inside + len(UnknownFieldSet(message))


def test_self_times_are_those_of_the_slices(opened: Open, analysis_of: Of) -> None:
    """In the trace processor's own words: self time is duration without the slices directly inside."""
    calls = analysis_of("two-stalls").nested.calls
    rows = opened("two-stalls", "perfetto").rows(
        """
        select name, sum(dur - coalesce((select sum(i.dur) from slice i where i.parent_id = s.id), 0)) as self_ns
        from slice s where category = 'call' group by 1
        """
    )
    assert sum(self_ns for _, self_ns in rows) == int(np.sum(calls["self_ns"]))
