from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from recordings import manifest

from stallscope.tracer.errors import RecordingError
from stallscope.tracer.manifest import Counters, Manifest, Note, ProbeCounters


def document() -> dict[str, Any]:
    made = manifest(
        notes=(Note(1, "a"), Note(2, "b")), cost={"own_cpu_ns": 1.5}, wall_offset_end_ns=3, ended_by="signal"
    )
    loaded: dict[str, Any] = json.loads(json.dumps(made.to_json()))
    return loaded


def test_a_manifest_comes_back_from_json_as_it_was() -> None:
    made = manifest(notes=(Note(1, "a"),), cost={"own_cpu_ns": 1.5})
    assert Manifest.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_additions_of_a_newer_version_are_ignored() -> None:
    with_more = document() | {"colour": "red"}
    with_more["probes"][0]["colour"] = "red"
    with_more["probes"][0]["fields"][0]["colour"] = ["red"]
    assert Manifest.from_json(with_more) == Manifest.from_json(document())


def test_what_has_a_default_may_be_missing() -> None:
    less = document()
    for name in ("notes", "cost", "ended_ns", "host", "command", "ended_by", "format_version", "wall_offset_end_ns"):
        del less[name]
    assert Manifest.from_json(less).notes == ()


def test_another_format_version_names_the_remedy() -> None:
    with pytest.raises(RecordingError, match=r"format 2 is not known here.*newer"):
        Manifest.from_json(document() | {"format_version": 2})


@pytest.mark.parametrize(
    "required",
    ["started_ns", "wall_offset_ns", "probes", "targets", "listeners", "namespaces", "stall_ns", "counter_names"],
)
def test_what_is_missing_is_named(required: str) -> None:
    less = document()
    del less[required]
    with pytest.raises(RecordingError, match=f"manifest.{required} is missing"):
        Manifest.from_json(less)


@pytest.mark.parametrize("wrong", [None, "7", [], {}, True, 1.5, 2**63, -(2**63)])
def test_an_integer_of_another_kind_or_beyond_any_clock_is_refused(wrong: object) -> None:
    with pytest.raises(RecordingError, match=r"manifest\.started_ns"):
        Manifest.from_json(document() | {"started_ns": wrong})


def test_no_value_of_another_type_gets_through() -> None:
    """Every value in the document, replaced by one of another type, is refused or ignored; never a traceback."""
    original = document()
    for path in places(original):
        for wrong in (None, "text", 12, 1.5, float("nan"), True, [], {}, [[]], {"a": {}}):
            broken = copy.deepcopy(original)
            place = broken
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = wrong
            try:
                Manifest.from_json(broken)
            except RecordingError as error:
                message = str(error)
                assert "\n" not in message


@pytest.mark.parametrize("wrong", [None, 3, "x", [], [1]])
def test_what_is_no_object_is_refused(wrong: object) -> None:
    with pytest.raises(RecordingError):
        Manifest.from_json(wrong)
    with pytest.raises(RecordingError):
        Counters.from_json(wrong)


def test_probes_are_found_by_id() -> None:
    made = manifest()
    found = made.probe(7)
    assert found is not None
    assert found.name == "sdsRemoveFreeSpace"
    assert made.probe(99) is None


def test_counters_come_back_from_json_as_they_were() -> None:
    counters = Counters(12, {0: ProbeCounters(hits=3), 300: ProbeCounters(1, 2, 3, 4, 5, 6, 7, 8)})
    assert Counters.from_json(json.loads(json.dumps(counters.to_json()))) == counters
    assert counters.by_probe[300].missing == 5 + 6


@pytest.mark.parametrize(
    "wrong",
    [{"by_probe": {"x": {}}}, {"time_ns": 1, "by_probe": {"1": {"hits": "3"}}}, {"time_ns": [], "by_probe": {}}],
)
def test_broken_counters_are_refused(wrong: object) -> None:
    with pytest.raises(RecordingError):
        Counters.from_json(wrong)


def places(value: Any) -> list[tuple[Any, ...]]:
    """Return the path to every value inside a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: list[tuple[Any, ...]] = []
    for step, item in inner:
        found += [(step,), *((step, *rest) for rest in places(item))]
    return found
