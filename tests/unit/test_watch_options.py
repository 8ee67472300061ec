"""Options of watch: the file, the command line over it, and what SIGHUP may change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.tracer.errors import UsageError
from stallscope.tracer.units import parse_share
from stallscope.tracer.watch.options import (
    OPTIONS,
    RELOADABLE,
    WatchOptions,
    parse_address,
    read_config,
    reloaded,
    watch_options,
)
from stallscope.tracer.watch.triggers import parse_triggers

EXAMPLE = Path(__file__).parents[2] / "packaging" / "watch.toml"


def config(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "watch.toml"
    path.write_text(text)
    return path


def test_a_file_says_everything_the_command_line_can(tmp_path: Path) -> None:
    text = """
        pid = [4711, 4712]
        port = 6379
        all-redis = true
        trigger = ["stall>50ms", "overflow>0", "stall>50ms"]
        before = "2s"
        after = "3s"
        cooldown = "5m"
        max-length = "1m"
        max-captures = 7
        max-disk = "2G"
        memory = "32M"
        output = "/var/lib/stallscope"
        detail = "always"
        stacks = false
        probe = ["dictRehashMilliseconds"]
        exec = "mail -s stall root"
        exec-timeout = "10s"
        report = true
        max-overhead = "0.5%"
        metrics = ":9121"
        sample = "20ms"
        ring-size = "16M"
    """
    assert watch_options(read_config(config(tmp_path, text)), {}) == WatchOptions(
        pids=(4711, 4712), ports=(6379,), all_redis=True, triggers=parse_triggers(["stall>50ms", "overflow>0"]),
        before_ns=2 * 10**9, after_ns=3 * 10**9, cooldown_ns=300 * 10**9, longest_ns=60 * 10**9, max_captures=7,
        max_disk_bytes=2 * 2**30, memory_bytes=32 * 2**20, output=Path("/var/lib/stallscope"), detail="always",
        stacks=False, probes=("dictRehashMilliseconds",), command="mail -s stall root", command_ns=10 * 10**9,
        report=True, max_overhead=0.005, metrics=("127.0.0.1", 9121), sample_ns=20_000_000, ring_bytes=16 * 2**20,
    )  # fmt: skip
    assert all(f"{name} =" in text for name in OPTIONS), "every option is in this test"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("triger = 'stall>50ms'", '"triger" is not an option; did you mean "trigger"?'),
        ("zzz = 1", '"zzz" is not an option; there are pid, port'),
        ("trigger = 'stall<50ms'", '"trigger": cannot read the trigger "stall<50ms": only > and >='),
        ("trigger = [50]", '"trigger": 50 is not a text; put it in quotes'),
        ("before = '5'", '"before": cannot read "5" as a duration'),
        ("before = ['5s']", '"before" takes one value, not a list'),
        ("max-captures = 0", '"max-captures": 0 is not a number above 0'),
        ("max-captures = true", '"max-captures": True is not a number above 0'),
        ("port = 70000", '"port": 70000 is not a TCP port'),
        ("report = 'yes'", "\"report\": 'yes' is neither true nor false"),
        ("detail = 'never'", "\"detail\": 'never' is not known; there are"),
        ("max-overhead = '1'", '"max-overhead": cannot read "1" as a share; write a percentage, as 1% or 0.5%'),
        ("metrics = 'localhost'", '"metrics": cannot read "localhost" as an address'),
        ("metrics = {a = 1}", "\"metrics\": {'a': 1} is not a text"),
        ("[watch]\nport = 1", '"watch" is not an option'),
        ("port = ", "is not TOML:"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = config(tmp_path, text)
    with pytest.raises(UsageError) as error:
        read_config(path)
    assert str(error.value).startswith(str(path))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory; give a file with --config"):
        read_config(tmp_path / "nothing.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not TOML"):
        read_config(tmp_path / "binary.toml")


GIVEN = {"ports": (6379,), "triggers": parse_triggers(["stall>50ms"])}


def test_the_command_line_wins() -> None:
    options = watch_options({**GIVEN, "before_ns": 1, "after_ns": 2}, {"before_ns": 3})
    assert (options.before_ns, options.after_ns, options.ports) == (3, 2, (6379,))
    assert options.capture.before_ns == 3


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"ports": ()}, "nothing to watch"),
        ({"triggers": ()}, "nothing to wait for"),
        ({"memory_bytes": 1000}, "--memory is below 1M"),
        ({"max_disk_bytes": 1000}, "--max-disk is below 1M"),
        ({"longest_ns": 10**9}, "--max-length is shorter than --before and --after together"),
        ({"sample_ns": 10}, "--sample is below 1ms"),
        ({"ring_bytes": 100_000}, "--ring-size must be a power of two"),
    ],
)
def test_what_does_not_go_together_is_refused(changed: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        watch_options({**GIVEN, **changed}, {})


def test_a_reload_changes_what_it_may_and_says_the_rest() -> None:
    now = watch_options(GIVEN, {})
    wanted = replace(now, before_ns=1, ports=(6380,), max_captures=3, command="true", ring_bytes=2**20)
    after, changed, restart = reloaded(now, wanted)
    assert changed == ("before", "max-captures", "exec")
    assert restart == ("port", "ring-size")
    assert after == replace(now, before_ns=1, max_captures=3, command="true")
    assert reloaded(now, now) == (now, (), ())


@pytest.mark.parametrize(
    ("triggers", "is_taken"),
    [
        (["stall>80ms"], True),
        (["stall>50ms", "overflow>0"], True),
        (["stall>20ms"], False),
        (["stall>50ms", "call:je_pages_purge>1ms"], False),
    ],
)
def test_triggers_are_taken_up_when_the_attached_probes_can_see_them(triggers: list[str], is_taken: bool) -> None:
    now = watch_options(GIVEN, {})
    after, changed, restart = reloaded(now, replace(now, triggers=parse_triggers(triggers)))
    assert (changed, restart) == ((("trigger",), ()) if is_taken else ((), ("trigger",)))
    assert (after.triggers == parse_triggers(triggers)) == is_taken


def test_whom_to_watch_and_how_takes_a_restart() -> None:
    assert not {"pid", "port", "all-redis", "output", "metrics", "ring-size", "sample"} & set(RELOADABLE)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9121", ("127.0.0.1", 9121)),
        (":9121", ("127.0.0.1", 9121)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:9121", ("::1", 9121)),
        ("[::]:9121", ("::", 9121)),
    ],
)
def test_metrics_are_for_this_host_unless_an_address_is_named(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@given(st.text(max_size=12))
def test_any_address_and_share_is_read_or_refused(text: str) -> None:
    for parse in (parse_address, parse_share):
        try:
            parse(text)
        except UsageError as error:
            assert "cannot read" in str(error)  # noqa: PT017


def test_the_packaged_file_is_right() -> None:
    options = watch_options(read_config(EXAMPLE), {})
    assert options.triggers
    assert options.metrics is None or options.metrics[0] == "127.0.0.1"
    commented = {
        line.removeprefix("# ").partition(" = ")[0] for line in EXAMPLE.read_text().splitlines() if " = " in line
    }
    assert set(OPTIONS) <= commented, "every option is shown, if only as a comment"
