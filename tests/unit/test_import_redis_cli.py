"""SLOWLOG, LATENCY and INFO as redis-cli printed them for Redis 2.8.17 and 7.0.15, in all its forms.

The files in tests/data/redis-cli are what redis-cli 7.0.15 printed; the commands before were the same for both servers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stallscope.tracer.errors import UsageError
from stallscope.tracer.imports import info, latency, slowlog
from stallscope.tracer.imports.formats import read_text
from stallscope.tracer.imports.replies import number, parse, sections, unescaped
from stallscope.tracer.imports.rows import MAX_TEXT, Input

DATA = Path(__file__).parent.parent / "data" / "redis-cli"
FORMS = ("raw", "no-raw", "csv", "json")
VERSIONS = ("2.8", "7.0")
SCRIPT = "redis.call('set', KEYS[1], ARGV[1]); local n = 0; for i = 1, 3000000 do n = n + i end; return n"


def text(name: str) -> str:
    return (DATA / name).read_text()


def only(found: list[Input]) -> Input:
    (one,) = found
    return one


def spans(item: Input) -> list[tuple[str, int, int, str]]:
    """Return source, the second it ended in, its duration in ns and its text, of each row."""
    return [
        (
            item.probes[row["probe"]].name,
            (int(row["start_ns"]) + int(row["duration_ns"])) // 10**9,
            int(row["duration_ns"]),
            item.texts[row["stack"]] if row["stack"] >= 0 else "",
        )
        for row in item.rows
    ]


@pytest.mark.parametrize("form", FORMS)
class TestForms:
    @pytest.mark.parametrize("version", VERSIONS)
    def test_of_slowlog_say_the_same(self, form: str, version: str) -> None:
        found = only(read_text(text(f"slowlog-{version}.{form}.txt"), "x"))
        assert (found.format, found.counts) == ("SLOWLOG", {"entries": 3})
        script = f'eval {SCRIPT} 1 a key two lines "quoted"'
        expected = {
            "2.8": [
                ("SLOWLOG", 1795529582, 20_120_000, "debug sleep 0.02"),
                ("SLOWLOG", 1795529583, 10_114_000, "debug sleep 0.01"),
                ("SLOWLOG", 1795529584, 49_263_000, script),
            ],
            "7.0": [
                ("SLOWLOG", 1795529585, 20_093_000, "debug sleep 0.02 from 127.0.0.1:60578"),
                ("SLOWLOG", 1795529586, 10_124_000, "debug sleep 0.01 from 127.0.0.1:58212"),
                ("SLOWLOG", 1795529588, 61_148_000, f"{script} from 127.0.0.1:58218"),
            ],
        }
        assert spans(found) == expected[version]
        assert (found.rows["value"][:, 0] == 10**9).all()

    @pytest.mark.parametrize("version", VERSIONS)
    def test_of_latency_history_say_the_same(self, form: str, version: str) -> None:
        found = only(read_text(text(f"history-{version}.{form}.txt"), "command"))
        told = spans(only(read_text(text(f"history-{version}.json.txt"), "command")))
        assert (found.format, found.counts, len(told)) == ("LATENCY", {"samples": 3}, 3)
        assert spans(found) == told
        assert {(source, ms // 1_000_000) for source, _, ms, _ in told} >= {("LATENCY command", 20)}

    @pytest.mark.parametrize(
        ("version", "ended_s", "latest_ms", "max_ms"), [("2.8", 1795529584, 49, 49), ("7.0", 1795529588, 61, 61)]
    )
    def test_of_latency_latest_say_the_same(
        self, form: str, version: str, ended_s: int, latest_ms: int, max_ms: int
    ) -> None:
        found = only(read_text(text(f"latest-{version}.{form}.txt"), "x"))
        assert spans(found) == [
            ("LATENCY command", ended_s, latest_ms * 1_000_000, f"longest ever {max_ms} ms"),
        ]

    def test_of_an_empty_reply_are_nothing_and_say_so(self, form: str) -> None:
        found = only(read_text(text(f"empty-7.0.{form}.txt"), "x"))
        assert (found.format, len(found.rows), found.notes) == ("", 0, ("it is empty: no entry, no sample",))

    def test_that_were_asked_twice_have_every_entry_once(self, form: str) -> None:
        once = text(f"slowlog-7.0.{form}.txt")
        assert spans(only(read_text(once + once, "x"))) == spans(only(read_text(once, "x")))
        twice = text(f"history-7.0.{form}.txt") * 2
        assert len(only(read_text(twice, "x")).rows) == 3

    def test_with_line_ends_of_windows(self, form: str) -> None:
        plain = text(f"slowlog-7.0.{form}.txt")
        assert spans(only(read_text(plain.replace("\n", "\r\n"), "x"))) == spans(only(read_text(plain, "x")))


class TestSessions:
    SESSION = (
        "$ redis-cli\n127.0.0.1:6379> config get slowlog-max-len\n1) \"slowlog-max-len\"\n2) \"128\"\n"
        "127.0.0.1:6379> slowlog get 10\n{slowlog}127.0.0.1:6379[3]> LATENCY HISTORY fork\n{history}"
        "127.0.0.1:6379> latency doctor\nDave, no latency spike was observed\n"
    )  # fmt: skip

    def test_copied_from_a_terminal_give_all_that_is_in_them(self) -> None:
        session = self.SESSION.format(slowlog=text("slowlog-2.8.no-raw.txt"), history=text("history-2.8.no-raw.txt"))
        log, history = read_text(session, "x")
        assert (log.format, len(log.rows)) == ("SLOWLOG", 3)
        assert {source for source, *_ in spans(history)} == {"LATENCY fork"}

    def test_whose_slowlog_is_empty_know_that_it_was_asked(self) -> None:
        session = self.SESSION.format(slowlog="(empty list or set)\n", history=text("history-2.8.no-raw.txt"))
        log, history = read_text(session, "x")
        assert (log.format, len(log.rows), log.counts) == ("SLOWLOG", 0, {"entries": 0})
        assert len(history.rows) == 3

    def test_made_by_a_loop_name_the_events(self) -> None:
        loop = "".join(f"> latency history {event}\n{text('history-7.0.raw.txt')}" for event in ("command", "fork"))
        assert {source for source, *_ in spans(only(read_text(loop, "x")))} == {"LATENCY command", "LATENCY fork"}

    def test_that_hold_something_else_after_the_command_are_refused(self) -> None:
        with pytest.raises(UsageError, match='what follows "slowlog get" is not what redis-cli prints for it'):
            read_text("> slowlog get\nhello\n", "x")

    def test_without_a_command_are_named_after_the_file(self) -> None:
        assert {source for source, *_ in spans(only(read_text(text("history-7.0.raw.txt"), "aof-write")))} == {
            "LATENCY aof-write"
        }


class TestRefusals:
    @pytest.mark.parametrize(
        "content",
        [
            "Hello, world.\n",
            "1\n2\n3\n",
            "1) hello\n",
            "[1, 2, 3]\n",
            '{"a": 1}\n',
            "[[1,2,3,[]]]\n",
            "a,b,c\n",
            "<html><body>1) \n",
            "1795529588\n61\n1795529588\n",
            "# A heading\nand some text\n",
        ],
    )
    def test_of_other_texts_name_what_is_accepted(self, content: str) -> None:
        with pytest.raises(UsageError, match=r"it is not a capture \(pcap, pcapng\), or what redis-cli prints for"):
            read_text(content, "x")

    @pytest.mark.parametrize("error", ["NOAUTH Authentication required.", "(error) ERR unknown command 'latency'"])
    def test_of_errors_that_redis_cli_printed_repeat_them(self, error: str) -> None:
        with pytest.raises(UsageError, match="redis-cli printed an error instead of a reply: "):
            read_text(f"{error}\n\n", "x")
        assert len(read_text(f"> config get x\n{error}\n> slowlog get\n[]\n", "x")) == 1


class TestRawSlowlog:
    """In a pipe nothing marks where an entry begins, and arguments may look like numbers."""

    def test_with_arguments_that_are_numbers(self) -> None:
        lines = ["7", "1795529588", "61", "zadd", "z", "9", "1795529588", "5", "6", "1795529587", "62", "get", "k", ""]
        found = slowlog.entries(parse(tuple(lines)))
        assert found is not None
        assert [(entry.id, entry.arguments) for entry in found] == [
            (6, ("get", "k")),
            (7, ("zadd", "z", "9", "1795529588", "5")),
        ]

    def test_with_a_client_that_has_a_name(self) -> None:
        lines = ["7", "1795529588", "61", "set", "a", "b", "10.0.0.1:555", "worker", "6", "1795529580", "9", "ping"]
        lines += ["[2001:db8::7]:555", "", ""]
        found = slowlog.entries(parse(tuple(lines)))
        assert found is not None
        assert [(entry.id, entry.client, entry.client_name, entry.arguments) for entry in found] == [
            (6, "[2001:db8::7]:555", "", ("ping",)),
            (7, "10.0.0.1:555", "worker", ("set", "a", "b")),
        ]
        assert found[1].text == "set a b from 10.0.0.1:555 (worker)"

    def test_with_long_commands_keeps_their_beginning(self) -> None:
        entry = slowlog.Entry(1, 1795529588, 5, ("set", "x" * 1000))
        assert len(entry.text) == MAX_TEXT
        assert entry.text.endswith("xxx...")


class TestReplies:
    def test_numbered_to_the_right_nest_as_they_were_printed(self) -> None:
        lines = [f'{index:>2}) 1) "event-{index}"\n    2) (integer) 7' for index in range(1, 13)]
        (reply,) = parse(tuple("\n".join(lines).splitlines()))
        assert reply.value == [[f"event-{index}", 7] for index in range(1, 13)]

    def test_unescape_what_was_quoted(self) -> None:
        assert unescaped(r"a\"b\\n\n\t\x41\xc3\xa9\a") == 'a"b\\n\n\tAé\a'

    @pytest.mark.parametrize(
        ("value", "expected"),
        [("12", 12), (" -3 ", -3), (7, 7), (True, None), ("1.5", None), ("", None), ("9" * 30, None), (10**30, None)],
    )
    def test_know_integers(self, value: object, expected: int | None) -> None:
        assert number(value) == expected

    def test_are_cut_at_prompts_only(self) -> None:
        text = "a > b\n127.0.0.1:6379> info\nx\nredis 127.0.0.1:6379> slowlog get 5\ny > z\nnot connected> ping\n"
        assert [section.command for section in sections(text)] == [("info",), ("slowlog", "get", "5"), ("ping",)]
        assert [section.command for section in sections("a > b\n")] == [()]


def series(item: Input, name: str) -> list[tuple[int, float]]:
    place = next(place for place, probe in enumerate(item.probes) if probe.name == name)
    rows = item.rows[item.rows["probe"] == place]
    values = rows["value"][:, 0].view(np.float64)
    return list(zip(rows["start_ns"].tolist(), values.tolist(), strict=True))


class TestInfo:
    @pytest.mark.parametrize("version", VERSIONS)
    def test_in_a_loop_is_a_series_of_every_number_that_tells_something(self, version: str) -> None:
        lines = text(f"info-{version}.txt").splitlines()
        item = only(read_text("\n".join(lines), "x"))
        assert (item.format, item.counts["dumps"]) == ("INFO", 3)
        for name in ("connected_clients", "rejected_connections", "instantaneous_ops_per_sec", "used_memory"):
            told = [float(line.split(":")[1]) for line in lines if line.startswith(f"{name}:")]
            assert [value for _, value in series(item, name)] == told
        commands = [value for _, value in series(item, "total_commands_processed")]
        assert commands == sorted(commands)
        assert [value for _, value in series(item, "db0.keys")] == [float(count) for count in (1, 2)]

    def test_of_old_servers_is_placed_at_the_line_before_it(self) -> None:
        lines = text("info-2.8.txt").splitlines()
        told = [info.wall_time_ns(line) for line in lines if line[:1].isdigit()]
        assert [time for time, _ in series(only(read_text("\n".join(lines), "x")), "used_memory")] == told

    def test_of_new_servers_is_placed_at_their_own_clock(self) -> None:
        lines = text("info-7.0.txt").splitlines()
        told = [int(line.split(":")[1]) * 1000 for line in lines if line.startswith("server_time_usec:")]
        without = "\n".join(line for line in lines if not line[:1].isdigit())
        for content in ("\n".join(lines), without):
            assert [time for time, _ in series(only(read_text(content, "x")), "used_memory")] == told

    def test_without_any_time_is_refused_with_the_command_that_gives_it_one(self) -> None:
        without = "\n".join(line for line in text("info-2.8.txt").splitlines() if not line[:1].isdigit())
        with pytest.raises(
            UsageError, match=r"have no time; print one before each, as: while sleep 1; do date \+%s.%N"
        ):
            read_text(without, "x")

    def test_of_which_some_dumps_have_no_time_counts_them(self) -> None:
        lines = text("info-2.8.txt").splitlines()
        times = [place for place, line in enumerate(lines) if line[:1].isdigit()]
        del lines[times[1]]
        item = only(read_text("\n".join(lines), "x"))
        assert item.counts["dumps without a time"] == 1
        assert item.notes == ("1 of 3 INFO dumps have no time and were left out",)

    def test_of_one_section_is_enough(self) -> None:
        content = "".join(
            f"17955295{second}.5\n# Stats\r\nrejected_connections:{second}\r\n\r\n" for second in (10, 11, 12)
        )
        item = only(read_text(content, "x"))
        assert series(item, "rejected_connections") == [
            (1795529510_500_000_000, 10), (1795529511_500_000_000, 11), (1795529512_500_000_000, 12),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("1795529588.123456789", 1795529588_123456789),
            ("1795529588,5", 1795529588_500000000),
            ("1795529588", 1795529588_000000000),
            ("2026-11-24T14:13:08,123456789+01:00", 1795525988_123456789),
            ("2026-11-24T14:13:08Z", 1795529588_000000000),
            ("2026-11-24 14:13:08.5-0030", 1795531388_500000000),
            ("2026-13-24T14:13:08Z", None),
            ("2026-11-24T14:13:08", None),
            ("123456", None),
            ("9999999999", None),
        ],
    )
    def test_times(self, line: str, expected: int | None) -> None:
        assert info.wall_time_ns(line) == expected

    def test_numbers_are_those_of_a_dump_with_their_names(self) -> None:
        fields = {
            "used_memory": "1000", "used_memory_human": "1000B", "mem_fragmentation_ratio": "1.25", "role": "master",
            "db0": "keys=7,expires=1,avg_ttl=0", "lru_clock": "5", "used_memory_dataset_perc": "12.5%", "x": "nan",
            "y": "1_000", "slave0": "ip=10.0.0.2,port=6379,state=online,offset=9,lag=1", "z": "inf", "e": "",
        }  # fmt: skip
        assert info.numbers(fields) == {
            "used_memory": 1000, "mem_fragmentation_ratio": 1.25, "used_memory_dataset_perc": 12.5,
            "db0.keys": 7, "db0.expires": 1, "db0.avg_ttl": 0, "slave0.port": 6379, "slave0.offset": 9, "slave0.lag": 1,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "unit"),
        [
            ("connected_clients", "clients"), ("used_memory_peak", "B"), ("instantaneous_input_kbps", "kB/s"),
            ("latest_fork_usec", "us"), ("rdb_last_bgsave_time_sec", "s"), ("used_cpu_sys", "s"), ("db0.keys", ""),
            ("mem_fragmentation_ratio", ""), ("used_memory_dataset_perc", "%"), ("mem_not_counted_for_evict", "B"),
            ("instantaneous_eviction_exceeded_per_sec", "1/s"),
        ],
    )  # fmt: skip
    def test_units_are_told_by_the_names(self, name: str, unit: str) -> None:
        assert info.unit(name) == unit

    def test_keeps_no_more_fields_than_a_recording_can_hold(self) -> None:
        dump: dict[str, Any] = {f"field{index}": "0" for index in range(info.MAX_FIELDS + 5)}
        other = dict.fromkeys(dump, "1")
        item = info.info_input([info.Dump(1795529588_000000000, dump), info.Dump(1795529589_000000000, other)])
        assert len(item.probes) == info.MAX_FIELDS
        assert item.notes == (f"5 of {info.MAX_FIELDS + 5:,} INFO fields that changed were left out",)


def test_latency_keeps_the_longest_of_a_second() -> None:
    samples = [latency.Sample("fork", 1795529588, 5), latency.Sample("fork", 1795529588, 9, 20)]
    assert spans(latency.latency_input(samples)) == [("LATENCY fork", 1795529588, 9_000_000, "longest ever 20 ms")]
