"""The command line without root: help, usage errors, files that are no recordings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from stallscope.tracer import cli
from stallscope.tracer.capture.recorder import Progress
from stallscope.tracer.commands.parameters import Parsed
from stallscope.tracer.commands.record import progress_line, record
from stallscope.tracer.commands.summary import summary
from stallscope.tracer.errors import UsageError

STALLSCOPE = str(Path(sys.executable).with_name("stallscope"))
COMMANDS = sorted(cli.cli.commands)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """Return what the real command did: one process each, for the exit code and stderr that people get."""
    return subprocess.run([STALLSCOPE, *map(str, words)], capture_output=True, text=True, timeout=60)


def assert_one_line(done: subprocess.CompletedProcess[str], status: int, *parts: str) -> None:
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("stallscope: ")
    for part in parts:
        assert part in line


class TestHelp:
    def test_knows_all_commands(self) -> None:
        assert {"record", "summary", "probes", "doctor"} <= set(COMMANDS)
        done = CliRunner().invoke(cli.cli, ["--help"])
        assert done.exit_code == 0
        for name in COMMANDS:
            assert f"\n  {name} " in done.output

    @pytest.mark.parametrize("name", COMMANDS)
    def test_of_every_command_has_examples_that_parse(self, name: str) -> None:
        command = cli.cli.commands[name]
        done = CliRunner().invoke(cli.cli, [name, "--help"])
        assert done.exit_code == 0
        assert f"stallscope {name} " in done.output.partition("Examples:")[2]
        for line in done.output.partition("Examples:")[2].partition("Options:")[0].splitlines():
            words = line.partition("|")[0].split("   ")[0].replace("FILE", "x.stall").split()
            if words[:1] == ["sudo"]:
                words = words[1:]
            if words:
                assert words[:2] == ["stallscope", name]
                command.make_context(name, words[2:])

    @pytest.mark.parametrize("name", COMMANDS)
    def test_says_something_about_every_option(self, name: str) -> None:
        command = cli.cli.commands[name]
        assert command.help
        assert command.get_short_help_str().endswith((".", "..."))
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"
                assert parameter.help.endswith(".")

    @pytest.mark.parametrize("name", COMMANDS)
    def test_fits_a_terminal(self, name: str) -> None:
        done = CliRunner().invoke(cli.cli, [name, "--help"], terminal_width=80)
        assert max(map(len, done.output.splitlines())) <= 100

    def test_short_form_and_version(self) -> None:
        assert CliRunner().invoke(cli.cli, ["-h"]).output == CliRunner().invoke(cli.cli, ["--help"]).output
        assert "version 0." in CliRunner().invoke(cli.cli, ["--version"]).output

    def test_needs_nothing_heavy(self) -> None:
        """Help and usage errors come at once: nothing that takes tenths of a second is imported for them."""
        script = "import sys; from stallscope.tracer import cli; print([m for m in sys.modules])"
        modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        for heavy in ("pandas", "pyarrow", "plotly", "bcc", "numpy", "elftools"):
            assert f"'{heavy}'" not in modules


class TestUsage:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("record",), "nothing to record; name a server with --port PORT or -p PID"),
            (("record", "-p", 1, "--no-default-probes"), "--no-default-probes leaves nothing to trace"),
            (("record", "-p", 1, "--sample", "1us"), "--sample is below 1ms"),
            (("record", "-p", 1, "--ring-size", "32K"), "--ring-size must be a power of two"),
            (("record", "-p", 1, "--ring-size", "3M"), "--ring-size must be a power of two"),
            (("record", "-p", 1, "--stack-rate", 499), "--stack-rate samples nothing by itself; add --stacks"),
            (("top",), "nothing to watch; name a server with --port PORT or -p PID"),
            (("top", "-p", 1, "--no-default-probes"), "--no-default-probes leaves nothing to trace"),
            (("top", "-p", 1, "--sample", "1us"), "--sample is below 1ms"),
            (("top", "-p", 1, "--ring-size", "3M"), "--ring-size must be a power of two"),
            (("top", "-p", 1, "--capture", "1ms"), "--capture is below 1s"),
            (("top", "-p", 1), "is not a terminal; use --json for one record a second"),
            (("probes",), "give either -p PID or --binary FILE"),
            (("probes", "-p", 1, "--binary", "/bin/true"), "give either -p PID or --binary FILE"),
        ],
    )
    def test_that_asks_for_the_impossible_is_one_line(self, words: tuple[object, ...], said: str) -> None:
        assert_one_line(run(*words), 2, said)

    @pytest.mark.parametrize("option", ["-d", "--min-duration", "--stall", "--sample"])
    @pytest.mark.parametrize("text", ["5", "fast", "-3s", "10 parsecs", "", "1e3s", "nan s"])
    def test_of_a_duration_that_cannot_be_read_names_it(self, option: str, text: str) -> None:
        done = CliRunner().invoke(cli.cli, ["record", "-p", "1", option, text])
        assert done.exit_code == 2
        assert done.output.splitlines()[-1].startswith("Error: Invalid value for '")
        assert f'cannot read "{text}" as a duration; write a number and a unit' in done.output

    @pytest.mark.parametrize(
        "words",
        [
            ("record", "-p", "0"),
            ("record", "-p", "x"),
            ("record", "--port", "65536"),
            ("record", "-p", "1", "--ring-size", "big"),
            ("record", "-p", "1", "-o", "/"),
            ("summary",),
            ("doctor", "--no-such-option"),
            ("no-such-command",),
        ],
    )
    def test_that_click_refuses_ends_with_2_and_its_error_last(self, words: tuple[str, ...]) -> None:
        done = run(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in done.stderr

    def test_durations_and_sizes_reach_the_command_in_ns_and_bytes(self) -> None:
        words = ["-p", "1", "-d", "1m", "--min-duration", "500us", "--ring-size", "16M"]
        parameters = record.make_context("record", words).params
        assert (parameters["duration"], parameters["min_duration"]) == (60_000_000_000, 500_000)
        assert (parameters["stall"], parameters["sample"]) == (10_000_000, 10_000_000)
        assert parameters["ring_size"] == 16 * 2**20

    def test_what_if_is_asked_about_32_kb_unless_told_otherwise(self) -> None:
        assert summary.make_context("summary", ["x.stall"]).params["thresholds"] == (32768,)
        words = ["x.stall", "--what-if-trim-above", "1M", "--what-if-trim-above", "4K"]
        assert summary.make_context("summary", words).params["thresholds"] == (2**20, 4096)

    def test_of_several_servers_is_kept_in_order(self) -> None:
        parameters = record.make_context("record", ["-p", "3", "--port", "7", "-p", "2", "--port", "6"]).params
        assert (parameters["pids"], parameters["ports"]) == ((3, 2), (7, 6))


class TestFiles:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "is empty; it is not a recording"),
            (b"Hello, world. " * 999, "is not a stallscope recording; give a file made by stallscope record"),
            (b"\xff\xff\xff\xff\x10\x00\x00\x00" + bytes(99), "is not a stallscope recording"),
            (b"\x7fELF" + bytes(5000), "is not a stallscope recording"),
        ],
    )
    def test_that_are_no_recordings(self, tmp_path: Path, content: bytes, said: str) -> None:
        path = tmp_path / "other.stall"
        path.write_bytes(content)
        assert_one_line(run("summary", path), 2, str(path), said)

    def test_that_are_not_there(self, tmp_path: Path) -> None:
        assert_one_line(run("summary", tmp_path / "none.stall"), 2, "does not exist")
        assert_one_line(run("summary", tmp_path), 2, "is not a file")

    def test_that_may_not_be_read(self, tmp_path: Path) -> None:
        path = tmp_path / "secret.stall"
        path.mkdir(mode=0)
        assert_one_line(run("summary", path), 2, "is not a file")

    @pytest.mark.parametrize(
        "content", [b"", b"#!/bin/sh\n", b"\x7fELF" + bytes(60), b"\x7fELF\x02\x01\x01" + b"\xff" * 99]
    )
    def test_that_are_no_programs(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "program"
        path.write_bytes(content)
        assert_one_line(run("probes", "--binary", path), 4, str(path))

    def test_that_are_no_programs_and_not_there(self, tmp_path: Path) -> None:
        assert_one_line(run("probes", "--binary", tmp_path / "none"), 4, str(tmp_path / "none"))
        assert_one_line(run("probes", "--binary", tmp_path), 4, str(tmp_path))

    def test_json_of_probes_parses_on_any_program(self) -> None:
        done = run("probes", "--binary", sys.executable, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)


class TestProgressLine:
    def test_is_short_and_says_all(self) -> None:
        progress = Progress(
            elapsed_ns=3600 * 10**9, calls=12_345_678, stalls=3, longest_stall_ns=1_220_000_000, overflows=1_170,
            lost=9, hits=12_345_687, traced_share=0.123, own_share=0.0456,
        )  # fmt: skip
        line = progress_line(progress)
        for part in (
            "3600 s",
            "12,345,678 calls",
            "longest stall 1.22 s",
            "1,170 overflows",
            "9 lost",
            "12.3%",
            "4.6%",
        ):
            assert part in line
        assert len(line) <= 120
        assert "longest stall none" in progress_line(Progress())


def test_an_error_of_ours_in_a_converter_is_a_usage_error() -> None:
    def refuse(text: str) -> int:
        raise UsageError(f"no {text}")

    with pytest.raises(click.BadParameter, match="no thing"):
        Parsed("thing", refuse).convert("thing", None, None)
    assert Parsed("thing", refuse).convert(7, None, None) == 7
