"""Whatever is in a file, reading it ends in a result or in a RecordingError of one line.

STALLSCOPE_FUZZ_EXAMPLES=2000 looks longer.
"""

from __future__ import annotations

import copy
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recordings import DATA, GOLDEN, Builder, add_storm, manifest
from rich.console import Console

from stallscope.reports.terminal import render
from stallscope.tracer.analysis.analysis import analyse
from stallscope.tracer.analysis.summary import summarise
from stallscope.tracer.errors import RecordingError
from stallscope.tracer.layout import EVENT
from stallscope.tracer.manifest import Counters, Manifest
from stallscope.tracer.recording import RecordingWriter, read_recording

EXAMPLES = int(os.environ.get("STALLSCOPE_FUZZ_EXAMPLES", "40"))
FUZZ = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])

numbers = st.one_of(
    st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
)


def go_all_the_way(path: Path) -> bool:
    """Read, summarise and render a file; returns whether it was readable."""
    try:
        summary = summarise(analyse(read_recording(path)))
    except RecordingError as error:
        message = str(error)
        assert "\n" not in message
        return False
    json.dumps(summary.to_json(), allow_nan=False)
    file = io.StringIO()
    render(summary, Console(file=file, width=80))
    assert file.getvalue().encode()
    return True


@pytest.fixture(scope="module")
def golden_bytes() -> dict[str, bytes]:
    return {name: (DATA / f"{name}.stall").read_bytes() for name in GOLDEN}


@FUZZ
@given(data=st.data())
def test_flipped_bytes(data: st.DataObject, tmp_path: Path, golden_bytes: dict[str, bytes]) -> None:
    content = bytearray(golden_bytes[data.draw(st.sampled_from(sorted(golden_bytes)))])
    places = st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=20)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.stall"
    path.write_bytes(content)
    go_all_the_way(path)


@FUZZ
@given(data=st.data())
def test_parts_removed_doubled_and_swapped(data: st.DataObject, tmp_path: Path, golden_bytes: dict[str, bytes]) -> None:
    content = golden_bytes["known-call"]
    first, second = sorted((data.draw(st.integers(0, len(content))), data.draw(st.integers(0, len(content)))))
    changed = {
        "removed": content[:first] + content[second:],
        "doubled": content[:second] + content[first:],
        "zeroed": content[:first] + bytes(second - first) + content[second:],
        "swapped": content[second:] + content[:second],
        "cut": content[:first],
    }[data.draw(st.sampled_from(["removed", "doubled", "zeroed", "swapped", "cut"]))]
    path = tmp_path / "a.stall"
    path.write_bytes(changed)
    go_all_the_way(path)


@FUZZ
@given(rows=st.lists(st.tuples(numbers, numbers, numbers, numbers, numbers, st.integers(0, 12), numbers), max_size=30))
def test_any_numbers_in_the_rows(rows: list[tuple[int, ...]], tmp_path: Path) -> None:
    events = np.zeros(len(rows), EVENT)
    for event, (start, duration, first, second, third, probe, thread) in zip(events, rows, strict=True):
        event["start_ns"], event["duration_ns"], event["value"] = start, duration, (first, second, third)
        event["probe"], event["tid"], event["pid"] = probe, thread % 3, thread % 2
    path = tmp_path / "a.stall"
    with RecordingWriter(path, manifest()) as writer:
        writer.finish(events, Counters(0, {}), manifest())
    assert go_all_the_way(path)


@FUZZ
@given(data=st.data())
def test_rows_of_a_real_shape_with_some_numbers_changed(data: st.DataObject, tmp_path: Path) -> None:
    events = add_storm(Builder(), 1000).events()
    for _ in range(data.draw(st.integers(1, 10))):
        row = data.draw(st.integers(0, len(events) - 1))
        name = data.draw(st.sampled_from(["start_ns", "duration_ns", "tid", "pid", "probe", "value"]))
        limit = 2 ** (8 * min(EVENT[name].itemsize, 8))
        events[name][row] = data.draw(numbers) % limit
    path = tmp_path / "a.stall"
    with RecordingWriter(path, manifest()) as writer:
        writer.finish(events, Counters(0, {}), manifest())
    assert go_all_the_way(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.just("\ud800\x1b"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_the_manifest(data: st.DataObject, tmp_path: Path) -> None:
    document: dict[str, Any] = copy.deepcopy(json.loads(json.dumps(manifest(cost={"own_cpu_ns": 1.0}).to_json())))
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = document
        while True:
            steps = list(place) if isinstance(place, dict) else list(range(len(place)))
            step = data.draw(st.sampled_from(steps))
            if not isinstance(place[step], (dict, list)) or not place[step] or data.draw(st.integers(0, 4)) == 0:
                same_kind = st.integers(-(2**62), 2**62) if isinstance(place[step], int) else json_values
                place[step] = data.draw(json_values | same_kind)
                break
            place = place[step]
    path = tmp_path / "a.stall"
    try:
        broken = Manifest.from_json(document)
    except RecordingError as error:
        message = str(error)
        assert "\n" not in message
        return
    with RecordingWriter(path, broken) as writer:
        writer.write(add_storm(Builder(), 1000).events())
    go_all_the_way(path)


@FUZZ
@given(document=json_values)
def test_any_counters(document: object, tmp_path: Path) -> None:
    path = tmp_path / "a.stall"
    side = {"time_ns": 1, "by_probe": {"4": document, "7": {"hits": document, "short_ns": 2**62 - 1}}}
    try:
        counters = Counters.from_json(side)
    except RecordingError as error:
        message = str(error)
        assert "\n" not in message
        return
    with RecordingWriter(path, manifest()) as writer:
        writer.write(add_storm(Builder(), 1000).events(), counters)
    assert go_all_the_way(path)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_files_go_all_the_way(name: str) -> None:
    assert go_all_the_way(DATA / f"{name}.stall")
