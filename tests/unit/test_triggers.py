"""Triggers: what is understood, what is refused with words, and when they come true."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import ITERATION_ID, LIMIT, MS, PID, PURGE, Builder, add_storm, at, hooked_manifest, manifest

from stallscope.tracer.errors import UsageError
from stallscope.tracer.layout import EVENT
from stallscope.tracer.manifest import ListenerInfo
from stallscope.tracer.watch.evaluation import Firing, TriggerState, UnderWay
from stallscope.tracer.watch.triggers import functions_of, parse_trigger, parse_triggers, shortest_ns


def state(*texts: str) -> TriggerState:
    made = TriggerState(parse_triggers(texts))
    made.follow(manifest())
    return made


def moments(firings: tuple[Firing, ...]) -> list[float]:
    return [(firing.time_ns - at(0)) / MS for firing in firings]


@pytest.mark.parametrize(
    ("text", "quantity", "bound", "extra"),
    [
        ("stall>50ms", "stall", 50 * MS, {}),
        (" stall >= 50 ms ", "stall", 50 * MS, {"inclusive": True}),
        ("iteration>1s", "stall", 1000 * MS, {}),
        ("overflow>0", "overflow", 0, {"time_ns": 1_000_000_000}),
        ("overflow>100 in 10s", "overflow", 100, {"time_ns": 10_000_000_000}),
        ("drop>=5", "drop", 5, {"inclusive": True, "time_ns": 1_000_000_000}),
        ("backlog>80% for 100ms", "backlog", 80, {"percent": True, "time_ns": 100 * MS}),
        ("backlog>400", "backlog", 400, {}),
        ("call:je_pages_purge>5ms", "call", 5 * MS, {"function": "je_pages_purge"}),
        ("call: libc:madvise >1us", "call", 1000, {"function": "libc:madvise"}),
        ("wait>100ms", "wait", 100 * MS, {}),
        ("lost>0", "lost", 0, {"time_ns": 1_000_000_000}),
    ],
)
def test_what_is_understood(text: str, quantity: str, bound: float, extra: dict[str, object]) -> None:
    trigger = parse_trigger(text)
    assert (trigger.quantity, trigger.bound) == (quantity, bound)
    for name in ("inclusive", "percent", "function", "time_ns"):
        assert getattr(trigger, name) == extra.get(name, type(getattr(trigger, name))()), name
    assert parse_trigger(trigger.text) == trigger, "its own text means the same"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "compares nothing"),
        ("stall", "compares nothing"),
        ("stall<50ms", "only > and >= are compared, not <"),
        ("stall=50ms", "only > and >= are compared, not ="),
        ("latency>50ms", '"latency" is not known; there are stall'),
        ("stall>", "the bound is missing"),
        ("stall>50", 'cannot read "50" as a duration'),
        ("stall>0", "always be true"),
        ("overflow>=0", "always be true"),
        ("overflow>5ms", '"5ms" is not a number'),
        ("overflow>80%", '"80%" is not a number'),
        ("overflow>-1", '"-1" is not a number'),
        ("backlog>180%", "at most 100%"),
        ("backlog>many", "or a share of the limit, as 80%"),
        ("backlog>80% for ever", 'cannot read "ever" as a duration'),
        ("backlog>80% in 1s", '"in" means nothing with backlog; it takes "for DURATION"'),
        ("stall>50ms for 1s", '"for" means nothing with stall'),
        ("overflow>1 in 0", "nothing happens in no time"),
        ("call>5ms", "which function's calls? write call:FUNCTION"),
        ("call:>5ms", "which function's calls?"),
        ("stall:x>5ms", "stall takes no name"),
    ],
)
def test_what_is_refused_and_why(text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_trigger(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert text in str(error.value)


@given(st.text(alphabet=st.sampled_from(list("stalover:>=%0159.ms inforbckdg\n")), max_size=30))
def test_any_text_is_read_or_refused_with_a_reason(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_trigger(text).bound >= 0


def test_what_the_probes_must_measure_for_them() -> None:
    triggers = parse_triggers(["stall>50ms", "call:a>5ms", "stall>20ms", "call:b>1ms", "call:a>2ms", "stall>50ms"])
    assert [trigger.text for trigger in triggers][-1] == "call:a>2ms", "a repeated one counts once"
    assert functions_of(triggers) == ("a", "b")
    assert shortest_ns(triggers, "stall", 10 * MS) == 20 * MS
    assert shortest_ns(triggers, "call", 0) == 1 * MS
    assert shortest_ns((), "stall", 10 * MS) == 10 * MS


def test_a_stall_fires_while_it_lasts_and_only_once() -> None:
    triggers = state("stall>50ms")
    nothing = Builder().events()
    assert triggers.observe(nothing, at(149), [UnderWay(PID, at(100), PID)]) == ()
    (firing,) = triggers.observe(nothing, at(153), [UnderWay(PID, at(100), PID)])
    assert (firing.time_ns, firing.value, firing.under_way, firing.pid) == (at(150), 53 * MS, True, PID)
    assert firing.describe() == "stall>50ms: 53.0 ms so far, event loop of process 4711"
    assert triggers.observe(nothing, at(400), [UnderWay(PID, at(100), PID)]) == ()
    assert triggers.held_ns == at(400)
    ended = Builder().span(ITERATION_ID, 100, 500).events()
    assert triggers.observe(ended, at(650)) == ()
    assert triggers.held_ns == at(600), "it held until its end, not until it was read"
    (again,) = triggers.observe(Builder().span(ITERATION_ID, 700, 60).events(), at(800))
    assert (again.time_ns, again.under_way, again.value) == (at(750), False, 60 * MS)


def test_several_long_calls_of_a_batch_are_one_firing_with_the_longest() -> None:
    triggers = state("call:je_pages_purge>5ms")
    builder = Builder().span(PURGE, 10, 6).span(PURGE, 20, 9).span(PURGE, 40, 5).span(ITERATION_ID, 0, 400)
    (firing,) = triggers.observe(builder.events(), at(500))
    assert (firing.time_ns, firing.value, firing.count) == (at(15), 9 * MS, 2)
    assert firing.describe() == "call:je_pages_purge>5ms: 9.00 ms, je_pages_purge of process 4711"


def test_a_call_of_a_function_that_is_not_probed_never_fires() -> None:
    triggers = state("call:unheardOf>5ms")
    assert triggers.observe(Builder().span(PURGE, 10, 6).events(), at(20)) == ()


def test_backlog_fires_after_it_was_above_for_so_long_and_again_only_after_it_was_below() -> None:
    triggers = state("backlog>80% for 100ms")
    full, low = round(LIMIT * 0.9), 10
    assert triggers.observe(Builder().queue(100, full, 0).events(), at(199)) == ()
    (firing,) = triggers.observe(Builder().events(), at(230))
    assert (firing.time_ns, firing.subject, firing.unit) == (at(200), "127.0.0.1:6379", "%")
    assert triggers.observe(Builder().queue(240, full + 1, 0).events(), at(900)) == ()
    assert triggers.held_ns == at(900)
    assert triggers.observe(Builder().queue(910, low, 0).queue(920, full, 0).events(), at(990)) == ()
    (again,) = triggers.observe(Builder().events(), at(1030))
    assert again.time_ns == at(1020)


def test_backlog_with_a_break_does_not_add_up() -> None:
    triggers = state("backlog>400 for 100ms")
    builder = Builder().queue(0, 500, 0).queue(60, 10, 0).queue(70, 500, 0).queue(160, 0, 0)
    assert triggers.observe(builder.events(), at(500)) == ()
    (firing,) = state("backlog>400").observe(builder.events(), at(500))[:1]
    assert (firing.time_ns, firing.value, firing.unit) == (at(0), 500, "connections")


def test_an_overflow_is_a_drop_here_that_the_kernel_counted_as_overflow() -> None:
    triggers = state("overflow>0", "drop>0")
    start = Builder().queue(0, 3, 40).counter(0, 900)
    assert triggers.observe(start.events(), at(1)) == (), "what was counted before is not news"
    elsewhere = Builder().counter(10, 905)
    assert triggers.observe(elsewhere.events(), at(11)) == (), "another listener of the namespace"
    dropped = Builder().queue(2000, 3, 42)
    assert [firing.trigger for firing in triggers.observe(dropped.events(), at(2001))] == ["drop>0"]
    # the counter is read before the drop shows at the listener
    assert triggers.observe(Builder().counter(4000, 908).events(), at(4001)) == ()
    both = triggers.observe(Builder().queue(4010, 3, 44).events(), at(4011))
    assert {(firing.trigger, firing.count, firing.pid) for firing in both} == {
        ("overflow>0", 2, PID),
        ("drop>0", 2, PID),
    }


def test_a_full_queue_without_drops_of_its_own_is_where_it_overflowed() -> None:
    triggers = state("overflow>0")
    triggers.observe(Builder().queue(0, LIMIT + 1, 0).counter(0, 900).events(), at(1))
    (firing,) = triggers.observe(Builder().counter(10, 944).events(), at(11))
    assert (firing.count, firing.subject) == (44, "127.0.0.1:6379")


def test_overflows_of_two_listeners_are_told_apart() -> None:
    made = manifest()
    second = ListenerInfo(1, "127.0.0.1:6380", 6380, 4712, 1002, 0, LIMIT)
    triggers = state("overflow>0")
    triggers.follow(replace(made, listeners=(*made.listeners, second)))
    triggers.observe(Builder().queue(0, 0, 0).queue(0, 0, 0, listener=1).counter(0, 0).events(), at(1))
    builder = Builder().queue(10, 0, 3).queue(10, LIMIT + 1, 7, listener=1).counter(10, 10)
    found = triggers.observe(builder.events(), at(11))
    assert {(firing.subject, firing.pid, firing.count) for firing in found} == {
        ("127.0.0.1:6379", PID, 3),
        ("127.0.0.1:6380", 4712, 7),
    }


def test_numbers_count_within_their_window_only() -> None:
    triggers = state("drop>10 in 1s")
    triggers.observe(Builder().queue(0, 0, 0).events(), at(1))
    drops = 0
    for step in range(20):
        drops += 5
        assert triggers.observe(Builder().queue(step * 600 + 600, 0, drops).events(), at(step * 600 + 601)) == ()
    (firing,) = triggers.observe(Builder().queue(12_700, 0, drops + 6).events(), at(12_701))
    assert firing.count == 11


def test_a_drop_counter_that_wraps_is_not_four_billion_drops() -> None:
    triggers = state("drop>0")
    triggers.observe(Builder().queue(0, 0, 2**32 - 2).events(), at(1))
    (firing,) = triggers.observe(Builder().queue(10, 0, 1).events(), at(11))
    assert firing.count == 3


def test_lost_events_fire_by_the_counters() -> None:
    triggers = state("lost>0")
    nothing = Builder().events()
    assert triggers.observe(nothing, at(0), lost=7) == ()
    assert triggers.observe(nothing, at(10), lost=7) == ()
    (firing,) = triggers.observe(nothing, at(20), lost=9)
    assert firing.describe() == "lost>0: 2 events, tracer"


def test_waits_are_those_of_the_hooked_kernel() -> None:
    triggers = TriggerState(parse_triggers(["wait>100ms"]))
    triggers.follow(hooked_manifest())
    builder = Builder(hooked_manifest()).enters(10, 40_000, 50).enters(20, 40_001, 300)
    (firing,) = triggers.observe(builder.events(), at(400))
    assert (firing.time_ns, firing.value, firing.subject) == (at(120), 300 * MS, "127.0.0.1:6379")


def test_the_incident_fires_everything_once() -> None:
    texts = ("stall>50ms", "overflow>0", "backlog>80% for 100ms", "call:je_pages_purge>5ms")
    triggers = state(*texts)
    events = add_storm(Builder().queue(900, 1, 40).counter(900, 900), 1000).events()
    found = triggers.observe(events, at(2000))
    assert [firing.trigger for firing in found] == [
        "stall>50ms", "call:je_pages_purge>5ms", "backlog>80% for 100ms", "overflow>0",
    ]  # fmt: skip
    assert moments(found) == [1050, 1098, 1505, 1505]


TEXTS = ("stall>50ms", "overflow>0", "backlog>80% for 100ms", "call:je_pages_purge>5ms", "drop>20 in 200ms")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 700), max_size=12))
def test_batches_do_not_matter(cuts: list[int]) -> None:
    """Where the stream is cut into batches changes neither what fires nor when."""
    builder = add_storm(add_storm(Builder().queue(900, 1, 40).counter(900, 900), 1000), 1690, 943, 83)
    events = builder.events()
    ends = events["start_ns"] + events["duration_ns"]
    whole = state(*TEXTS).observe(events, int(ends.max()))
    parts = state(*TEXTS)
    found: list[Firing] = []
    edges = [0, *sorted(cut for cut in cuts if cut <= len(events)), len(events)]
    for first, last in itertools.pairwise(edges):
        now_ns = int(ends[:last].max()) if last else at(0)
        found += parts.observe(events[first:last], now_ns)
    sampled = ("overflow>0", "backlog>80% for 100ms", "drop>20 in 200ms")
    assert [(f.trigger, f.time_ns) for f in found if f.trigger in sampled] == [
        (f.trigger, f.time_ns) for f in whole if f.trigger in sampled
    ]
    for text in set(TEXTS) - set(sampled):
        alone = [firing for firing in whole if firing.trigger == text]
        mine = [firing for firing in found if firing.trigger == text]
        assert min(f.time_ns for f in mine) == min(f.time_ns for f in alone)
        assert sum(f.count for f in mine) == sum(f.count for f in alone)
        assert max(f.value for f in mine) == max(f.value for f in alone)


def test_memory_is_bounded_whatever_comes() -> None:
    triggers = state("stall>50ms", "drop>0", "backlog>80%")
    for number in range(100):
        under_way = [UnderWay(100_000 + number * 100 + thread, at(0)) for thread in range(100)]
        events = Builder().events()
        triggers.observe(events, at(100 + number), under_way)
    assert len(triggers._fired) <= 4096
    rows = np.zeros(10_000, EVENT)
    rows["probe"] = 2
    rows["start_ns"] = at(0)
    rows["value"][:, 0] = 500 | 511 << 32
    rows["value"][:, 2] = np.arange(10_000)
    triggers.observe(rows, at(1))
    assert max(len(triggers.queues), len(triggers._episodes), len(triggers._windows)) <= 4096
