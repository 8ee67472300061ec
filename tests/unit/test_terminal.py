from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from recordings import CRON, DATA, GOLDEN, ITERATION_ID, MS, PROBES, Builder, ProbeCounters, add_storm, manifest
from rich.console import Console

from stallscope.reports.findings_text import SHOWN_TREES
from stallscope.reports.terminal import SHOWN_STALLS, render
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.summary import Summary, summarise
from stallscope.tracer.manifest import Note, TargetInfo
from stallscope.tracer.recording import read_recording


def text_of(summary: Summary, *, width: int = 80, terminal: bool = False) -> str:
    file = io.StringIO()
    render(
        summary, Console(file=file, width=width, force_terminal=terminal, color_system="standard" if terminal else None)
    )
    return file.getvalue()


def golden(name: str) -> Summary:
    return summarise(analyse(read_recording(DATA / f"{name}.stall")))


def rows(text: str, title: str) -> list[list[str]]:
    """Return the cells of the table under a title, by runs of two blanks."""
    part = text.split(f"\n{title}", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
    return [re.split(r"\s{2,}", line.strip()) for line in part]


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_line_is_longer_than_the_terminal_or_ends_in_blanks(name: str, width: int) -> None:
    for line in text_of(golden(name), width=width).splitlines():
        assert len(line) <= width
        assert line == line.rstrip()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_verdict_comes_first(name: str) -> None:
    summary = golden(name)
    first = text_of(summary).split("\n\n", 1)[0]
    assert " ".join(first.split()) == summary.verdict


def test_piped_output_is_plain_text() -> None:
    assert "\x1b" not in text_of(golden("known-call"))


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    coloured = text_of(golden("known-call"), terminal=True)
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", coloured)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text_of(golden("known-call"), terminal=True))


def test_colour_adds_nothing_to_the_text() -> None:
    summary = golden("two-stalls")
    assert re.sub(r"\x1b\[[0-9;]*m", "", text_of(summary, terminal=True)) == text_of(summary)


def test_the_stall_is_one_row() -> None:
    header, row = rows(text_of(golden("known-call")), "Stalls: event loop iterations of at least 10.0 ms")
    assert dict(zip(header, row, strict=True)) == {
        "at": "1.000 s",
        "blocked": "620 ms",
        "queue": "512/511",
        "refused": "43",
        "drain": "30.0 ms",
        "accepted": "512",
        "mostly in": "sdsRemoveFreeSpace",
    }


def test_what_is_inside_the_worst_stall() -> None:
    lines = rows(text_of(golden("known-call")), "Inside the worst: 620 ms at 1.000 s (15:06:41.000 UTC)")
    assert lines[0] == ["serverCron > clientsCron > clientsCronResizeQueryBuffer > sdsRemoveFreeSpace"]
    assert lines[2] == ["sdsRemoveFreeSpace", "5", "490 ms", "79.0%", "118 ms"]
    assert lines[-5:] == [
        ["unexplained", "2.00 ms", "0.3%"],
        ["accept queue: 3 before, 512 at most, 512 at the end; limit 511"],
        ["queue full after 495 ms, first overflow seen after 505 ms"],
        ["waited in the queue: at least 512 connections, the longest at least 626 ms"],
        ["for 1 client, most for fd 77 600 ms"],
    ]


def section(text: str, title: str) -> str:
    """Return the text under a title as one line."""
    return " ".join(text.split(f"\n{title}", 1)[1].split("\n\n", 1)[0].split())


def test_findings_come_with_facts_and_a_remedy() -> None:
    part = section(text_of(golden("known-call")), "Findings")
    assert part.startswith("cause query-buffer trims: 5 clients in one cron tick blocked Redis for 618 ms; ")
    assert "- at 1.001 s: one serverCron tick: 5 clients, 618 ms, of it 490 ms in sdsRemoveFreeSpace; " in part
    assert "> upgrade to Redis 5.0 or later; " in part
    assert "contributes je_pages_purge returned 20.0 MB in 100 ms" in part
    assert "cleared raising the backlog would only have hidden the stall" in part


def test_what_the_warnings_say_is_not_said_twice() -> None:
    text = text_of(golden("with-losses"))
    assert "never fired" not in section(text, "Findings")
    assert " ".join(text.split()).count("never fired") == 1


def test_slow_calls_with_all_they_called() -> None:
    lines = rows(text_of(golden("two-stalls")), "Slow calls with all they called, at least 10.0 ms")
    assert lines[1] == ["1.001 s", "618 ms", "5", "17", "490 ms", "sdsRemoveFreeSpace (in serverCron)"]
    assert len(lines) == 3


def test_only_the_longest_slow_calls_are_shown(tmp_path: Path) -> None:
    builder = Builder()
    for index in range(SHOWN_TREES + 2):
        builder.span(CRON, index * 100, 20 + index)
    text = text_of(summarise(analyse(read_recording(builder.write(tmp_path / "a.stall", 2000)))))
    title = f"Slow calls with all they called, at least 10.0 ms (the longest {SHOWN_TREES} of {SHOWN_TREES + 2})"
    assert len(rows(text, title)) == SHOWN_TREES + 1


def test_overflows_without_a_known_cause_say_why() -> None:
    part = section(text_of(golden("cut-short")), "Accept queues")
    assert "by cause: 11 no known cause" in part
    assert "no known cause: 11 the recording was cut short, a stall in progress is not in it" in part


def test_what_if_is_asked_about_every_threshold() -> None:
    analysis = analyse(read_recording(DATA / "known-call.stall"))
    part = section(text_of(summarise(analysis, (32 * 1024, 28_000_000))), "What if only query buffers with more")
    assert "above 32 KB: 0 of 5 trims skipped, 0 ns saved, 0 B not given back" in part
    assert "skipped, 590 ms saved, 140 MB not given back (at a time at most 28.0 MB: 1 client); stalls 1 -> 1" in part
    assert "the longest 620 ms -> 30.0 ms" in part
    assert "What if" not in text_of(golden("empty"))


def test_functions_fit_80_columns_by_name_and_number() -> None:
    text = text_of(golden("known-call"))
    assert ["clientsCronResizeQueryBuffer", "5", "600 ms", "10.0 ms", "92.3%"] in rows(text, "Functions")
    lengths = rows(text, "One call (shorter than 1.00 ms: counted, not timed one by one)")
    assert ["serverCron", "<1.00 ms", "618 ms", "618 ms", "618 ms"] in lengths


def test_a_wide_terminal_shows_functions_in_one_table() -> None:
    text = text_of(golden("known-call"), width=120)
    assert "One call" not in text
    row = ["serverCron", "16", "630 ms", "14.0 ms", "96.9%", "<1.00 ms", "618 ms", "618 ms", "618 ms"]
    assert row in rows(text, "Functions")


def test_arguments_are_in_their_units() -> None:
    lines = rows(text_of(golden("known-call")), "Arguments of recorded calls")
    assert ["purged_bytes", "20.0 MB", "4.00 MB", "4.00 MB", "4.00 MB"] in lines
    assert ["idle_s", "3 s", "5 s", "7 s"] in lines
    assert not any(line[0] in ("fd", "last_interaction_s") for line in lines)


def test_accept_queues_and_the_kernels_counters() -> None:
    text = text_of(golden("two-stalls"))
    lines = rows(text, "Accept queues")
    assert lines[1] == ["127.0.0.1:6379", "512", "511", "93", "82", "4", "7"]
    assert lines[-4:] == [
        ["observed 93 of 93 ListenOverflows the kernel counted"],
        ["by cause: 86 stall, 7 backlog too small"],
        ["in stalls: 86 of 93; by chance 29, since 2 stalls took 31.5% of the time; as"],
        ["many or more in 0.13 of all shifts"],
    ]
    assert "observed 11 ListenOverflows; the kernel's count at the end is not known" in text_of(golden("cut-short"))


def test_overflows_of_unknown_listeners_have_their_own_row(tmp_path: Path) -> None:
    builder = Builder().queue(0, 0, 0).counter(0, 900).queue(10, 1, 0).counter(20, 905)
    text = text_of(summarise(analyse(read_recording(builder.write(tmp_path / "a.stall", 1000)))))
    assert ["not attributable", "5", "0", "0", "5"] in rows(text, "Accept queues")


def test_how_far_to_trust_it() -> None:
    text = text_of(golden("with-losses"))
    lines = rows(text, "How far to trust this")
    assert ["recording", "complete"] in lines
    assert ["lost", "5 events"] in lines
    assert ["listener", "sampled every 10 ms"] in lines
    assert ["at 3.000 s", "process 4711 was restarted as 4811"] in lines
    assert any(line[0] == "warning" and "je_pages_purge: 3 calls" in line[1] for line in lines)
    assert ["recording", "cut short"] in rows(text_of(golden("cut-short")), "How far to trust this")


def test_costs_are_in_their_units() -> None:
    cost = {
        "own_cpu_ns": 1.6e9,
        "own_cpu_s": 2.0,
        "peak_memory_bytes": 1.2e8,
        "overhead_ratio": 0.0123,
        "calls": 53144.0,
    }
    text = " ".join(text_of(replace(golden("known-call"), cost=cost)).split())
    assert "own cpu 1.60 s, own cpu 2.00 s, peak memory 120 MB, overhead 1.23%, calls 53,144" in text


def test_of_many_stalls_the_worst_are_shown_in_order(tmp_path: Path) -> None:
    builder = Builder()
    for index in range(30):
        builder.span(ITERATION_ID, index * 100, 11 + (index * 7) % 30)
    text = text_of(summarise(analyse(read_recording(builder.write(tmp_path / "a.stall", 4000)))))
    title = f"Stalls: event loop iterations of at least 10.0 ms (the worst {SHOWN_STALLS} of 30)"
    lines = rows(text, title)[1:]
    assert len(lines) == SHOWN_STALLS
    times = [float(line[0].removesuffix(" s")) for line in lines]
    assert times == sorted(times)
    assert min(float(line[1].removesuffix(" ms")) for line in lines) == 33


def test_what_is_not_known_is_a_question_mark(tmp_path: Path) -> None:
    probes = tuple(probe for probe in PROBES if probe.id > 1)
    builder = Builder(manifest(probes=probes)).span(CRON, 1000, 50)
    text = text_of(summarise(analyse(read_recording(builder.write(tmp_path / "a.stall", 4000)))))
    assert rows(text, "Stalls: calls of at least 10.0 ms")[1] == [
        "1.000 s", "50.0 ms", "?", "0", "-", "?", "serverCron",
    ]  # fmt: skip
    assert rows(text, "Functions")[1][-1] == "?"
    assert rows(text, "Accept queues")[1][1] == "?"


def test_an_unfinished_stall_and_drain_are_marked_as_lower_bounds(tmp_path: Path) -> None:
    builder = add_storm(Builder(), 1000).span(ITERATION_ID, 1630, None)
    counters = {ITERATION_ID: ProbeCounters(hits=2, sent=1)}
    text = text_of(summarise(analyse(read_recording(builder.write(tmp_path / "a.stall", 2000, counters)))))
    lines = rows(text, "Stalls: event loop iterations")
    assert lines[1][4] == "> 10.0 ms"
    assert lines[2][1] == "> 370 ms"


def test_nothing_from_the_file_reaches_the_terminal_as_a_command() -> None:
    summary = golden("known-call")
    nasty = "\x1b[31mred\x07\r\n\x9b2J[bold]name[/bold] :smile:"
    function = replace(summary.functions[0], name=nasty, note=nasty)
    stall = replace(summary.stalls[0], blamed=(nasty, nasty))
    text = text_of(
        replace(
            summary,
            verdict=nasty,
            functions=(function,),
            stalls=(stall,),
            rungs={nasty: nasty},
            notes=(Note(5 * MS, nasty),),
            warnings=(nasty,),
            host={"kernel": nasty},
            targets=(TargetInfo(1, 2, nasty, version=nasty),),
            listeners=(replace(summary.listeners[0], address=nasty),),
            cost={nasty: 1.0},
        )
    )
    assert not [character for character in text if not character.isprintable() and character != "\n"]
    assert "[bold]name[/bold] :smile:" in text


def test_odd_characters_can_be_written_to_any_pipe() -> None:
    summary = replace(golden("known-call"), verdict="lone surrogate \ud800 and \N{SNOWMAN}")
    assert text_of(summary).encode("utf-8")
