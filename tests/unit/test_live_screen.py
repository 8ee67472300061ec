"""The live screen: a fixed view at several sizes; every line fits, and the numbers that matter are there."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from stallscope.reports.live import SORTS, Controls, render
from stallscope.tracer.commands.top import SORT_KEYS
from stallscope.tracer.live.view import (
    BlockedView,
    FunctionView,
    ListenerView,
    LiveView,
    LoopView,
    ServerView,
    StallView,
)

MS = 1_000_000
SIZES = [(80, 24), (120, 40), (60, 15), (200, 60), (40, 10), (79, 23), (100, 12)]
KEYS = (("p", "pause"), ("s", "sort: rate"), ("c", "capture 10 s"), ("q", "quit"))


def function(
    name: str, *, calls: int = 0, rate: float = 0, p99: int | None = None, top: int | None = None
) -> FunctionView:
    return FunctionView(name, calls, round(rate), rate, p99, p99, top, top, calls * 1000, calls * 1000, 0)


def a_view(**changes: object) -> LiveView:
    stalls = tuple(
        StallView(
            (1_750_000_000_123 - index) * MS, (451 - index) * MS, 21248, "sdsRemoveFreeSpace",
            ("serverCron", "clientsCron", "sdsRemoveFreeSpace"), 61, 385 * MS, (451 - index) * MS, 512, 511,
            615 + index,
        )
        for index in range(30)
    )  # fmt: skip
    view = LiveView(
        version=1,
        wall_ns=1_750_000_000 * 10**9,
        elapsed_ns=63 * 10**9,
        interval_ns=10**9,
        window_s=10,
        stall_ns=10 * MS,
        min_duration_ns=0,
        servers=(ServerView(21248, "redis", "2.8.17", "/opt/redis-server", False),),
        loop=LoopView(50_338, 3_312, 3312.0, 0.202, 15, 451 * MS, tuple(
            zip((0, 10 * MS, 20 * MS, 50 * MS, 100 * MS, 200 * MS, 500 * MS, 1000 * MS),
                (33_120, 3, 1, 2, 0, 1, 0, 0), strict=True))),
        functions=(
            function("serverCron", calls=620, rate=10, p99=227 * MS, top=451 * MS),
            function("clientsCronResizeQueryBuffer", calls=5_294, rate=488, p99=7_100_000, top=24 * MS),
            function("sdsRemoveFreeSpace", calls=3_875, rate=300, p99=8_410_000, top=24_400_000),
            function("je_pages_purge"),
        ),
        listeners=(ListenerView("127.0.0.1:6379", 21248, 512, 511, 512, (0,) * 50 + (100, 511) + (0,) * 9),),
        overflows=669,
        overflows_in_interval=54,
        overflow_history=(0,) * 59 + (615, 54),
        blocked=(BlockedView(21248, 1_220 * MS, ("serverCron", "clientsCron", "sdsRemoveFreeSpace")),),
        recent_stalls=stalls,
        worst_stall=stalls[0],
        stalls=(),
        lost=0,
        traced_share=0.012,
        own_share=0.039,
        notes=(),
    )  # fmt: skip
    return replace(view, **changes)  # type: ignore[arg-type]


def drawn(
    view: LiveView, width: int, height: int, controls: Controls | None = None, *, ascii_only: bool = False
) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    group = render(view, controls or Controls(keys=KEYS), width, height, ascii_only=ascii_only)
    console.print(group)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("ascii_only", [False, True])
class TestEverySize:
    def test_is_filled_and_not_exceeded(self, width: int, height: int, ascii_only: bool) -> None:
        lines = drawn(a_view(), width, height, ascii_only=ascii_only)
        assert len(lines) == height
        assert max(map(len, lines)) <= width

    def test_shows_what_matters_most(self, width: int, height: int, ascii_only: bool) -> None:
        text = "\n".join(drawn(a_view(), width, height, ascii_only=ascii_only))
        for part in (
            "stallscope top",
            "BLOCKED for 1.22 s",
            "busy 20.2%",
            "127.0.0.1:6379",
            "512/511",
            "669 since start",
        ):
            assert part in text
        assert "451 ms" in text or width < 60
        assert "clientsCro" in text, "the busiest function"

    def test_is_ascii_where_it_must_be(self, width: int, height: int, ascii_only: bool) -> None:
        text = "\n".join(drawn(a_view(), width, height, ascii_only=ascii_only))
        assert text.isascii() == ascii_only

    def test_holds_several_servers_and_listeners(self, width: int, height: int, ascii_only: bool) -> None:
        view = a_view(
            servers=tuple(ServerView(pid, "redis", "7.0.15", "/usr/bin/redis-server", False) for pid in range(9)),
            listeners=tuple(
                ListenerView(f"[2001:db8::{port}]:{port}", 1, 0, 511, port, (0,) * 61) for port in range(6300, 6309)
            ),
            notes=("process 3 ended " * 20,),
        )
        lines = drawn(view, width, height, ascii_only=ascii_only)
        assert len(lines) == height
        assert max(map(len, lines)) <= width
        assert "+6 more" in "\n".join(lines) or height < 20


class TestAt80x24:
    def test_everything_is_there(self) -> None:
        text = "\n".join(drawn(a_view(), 80, 24))
        for part in (
            "redis 2.8.17 pid 21248", "15:06:40 UTC", "+1:03", "3,312 iterations/s", "15 stalls, longest 451 ms",
            "in serverCron > clientsCron > sdsRemoveFreeSpace", "512/511", "10 s max 512", "54/s", "lost 0",
            "server 1.2%, own 3.9%", "33,120", "<10ms", "200ms", "8.41 ms", "24.4 ms",
            "sdsRemoveFreeSpace x61, 85.4% self", "615", "c  capture 10 s", "q  quit",
        ):  # fmt: skip
            assert part in text, part

    def test_the_newest_stall_is_the_first(self) -> None:
        lines = drawn(a_view(), 80, 24)
        stalls = [line[13:22].strip() for line in lines if "sdsRemoveFreeSpace x61" in line]
        assert stalls == sorted(stalls, reverse=True)
        assert len(stalls) >= 3

    @pytest.mark.parametrize(
        ("sort", "first"),
        [("rate", "clientsCronResize"), ("p99", "serverCron"), ("max", "serverCron"), ("total", "clientsCronResize")],
    )
    def test_functions_are_in_the_order_asked_for(self, sort: str, first: str) -> None:
        lines = drawn(a_view(), 80, 24, Controls(sort=sort))
        place = next(number for number, line in enumerate(lines) if line.startswith("function"))
        assert lines[place + 1].startswith(first)

    def test_says_that_it_is_paused_and_what_is_captured(self) -> None:
        text = "\n".join(drawn(a_view(), 80, 24, Controls(paused=True, capture="capturing: 3 of 10 s")))
        assert "PAUSED" in text
        assert "capturing: 3 of 10 s" in text
        assert "captured x.stall" in "\n".join(drawn(a_view(), 80, 24, Controls(message="captured x.stall")))

    def test_a_short_p99_is_below_the_limit_not_nothing(self) -> None:
        quiet = function("serverCron", calls=62, rate=10)
        lines = drawn(a_view(min_duration_ns=MS, functions=(quiet, function("freeClient"))), 80, 24)
        assert "<1.00 ms" in next(line for line in lines if line.startswith("serverCron"))
        assert "<" not in next(line for line in lines if line.startswith("freeClient"))

    def test_the_worst_stall_stays_however_many_came_after_it(self) -> None:
        worst = replace(a_view().recent_stalls[0], wall_ns=1_740_000_000 * 10**9, duration_ns=9_000 * MS)
        lines = [line for line in drawn(a_view(worst_stall=worst), 80, 24) if "sdsRemoveFreeSpace x61" in line]
        assert [" max " in line for line in lines] == [False] * (len(lines) - 1) + [True]
        assert lines[-1].startswith("21:20:00 max    9.00 s")

    def test_a_stall_whose_calls_are_not_all_known_says_of_what_part(self) -> None:
        stall = replace(a_view().recent_stalls[0], covered_ns=100 * MS, cause_self_ns=90 * MS)
        text = "\n".join(drawn(a_view(recent_stalls=(stall,)), 100, 24))
        assert "90.0% self of the last 100 ms" in text

    def test_nothing_yet(self) -> None:
        view = a_view(listeners=(), blocked=(), recent_stalls=(), functions=(), loop=None, overflow_history=(0,))
        text = "\n".join(drawn(view, 80, 24))
        assert "event loop not measured" in text
        assert "none of 10.0 ms or longer" in text

    def test_names_from_a_binary_do_not_reach_the_terminal_raw(self) -> None:
        view = a_view(functions=(function("\x1b[2Jevil", calls=1),), blocked=(BlockedView(1, MS, ("\x1b[2J",)),))
        assert "\x1b[2J" not in "\n".join(drawn(view, 80, 24))


def test_a_terminal_too_small_is_told() -> None:
    assert drawn(a_view(), 39, 24) == ["the terminal is smaller than 40x10"]
    assert drawn(a_view(), 5, 2) == ["the …"]


def test_colour_goes_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    def coloured() -> str:
        console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
        console.print(render(a_view(), Controls(keys=KEYS), 80, 24))
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;31m" in coloured()
    monkeypatch.setenv("NO_COLOR", "1")
    assert ";31m" not in coloured()


def test_the_command_and_the_screen_know_the_same_orders() -> None:
    assert SORTS == SORT_KEYS
