from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recordings import CRON, DATA, MS, PURGE, TRIM, Builder

from stallscope.tracer.analysis.analysis import Analysis, analyse
from stallscope.tracer.analysis.containment import self_times
from stallscope.tracer.analysis.nesting import find_parents
from stallscope.tracer.analysis.short_calls import without_short_calls
from stallscope.tracer.recording import read_recording


def analysis_of(name: str) -> Analysis:
    return analyse(read_recording(DATA / f"{name}.stall"))


@pytest.mark.parametrize("name", [path.stem for path in sorted(DATA.glob("*.stall"))])
@pytest.mark.parametrize("min_duration_ns", [0, 2 * MS, 21 * MS, 119 * MS, 617 * MS, 10**12])
def test_what_stays_nests_as_if_nothing_else_had_been_recorded(name: str, min_duration_ns: int) -> None:
    before = analysis_of(name)
    after, left_out = without_short_calls(before, min_duration_ns)
    calls = before.nested.calls
    keep = (calls["duration_ns"] >= min_duration_ns) | calls["unfinished"]
    kept = after.nested.calls
    assert left_out == int((~keep).sum())
    assert kept["row"].tolist() == calls.loc[keep, "row"].tolist()
    columns = [kept[column].to_numpy() for column in ("tid", "start_ns", "duration_ns")]
    parent, depth, _ = find_parents(*columns)
    assert kept["parent"].tolist() == parent.tolist()
    assert kept["depth"].tolist() == depth.tolist()
    assert kept["self_ns"].tolist() == self_times(parent, columns[2]).tolist()


@pytest.mark.parametrize("min_duration_ns", [0, 2 * MS, 21 * MS, 119 * MS])
def test_stalls_keep_their_calls(min_duration_ns: int) -> None:
    before = analysis_of("two-stalls")
    after, _ = without_short_calls(before, min_duration_ns)
    for old, new in zip(before.stalls.frame.itertuples(), after.stalls.frame.itertuples(), strict=True):
        inside = before.nested.calls.iloc[old.first_call : old.last_call]
        expected = inside.loc[inside["duration_ns"] >= min_duration_ns, "row"].tolist()
        assert expected
        assert after.nested.calls["row"].iloc[new.first_call : new.last_call].tolist() == expected
        assert (old.explained_ns, old.overflows) == (new.explained_ns, new.overflows)
    functions = after.stalls.functions
    longest = after.nested.calls["probe"].to_numpy()[functions["longest_call"].to_numpy()]
    assert longest.tolist() == functions["probe"].tolist()


def test_unfinished_calls_stay_with_what_they_are_in(tmp_path: Path) -> None:
    builder = Builder().span(CRON, 90, None).span(TRIM, 95, None).span(PURGE, 96, 1)
    before = analyse(read_recording(builder.write(tmp_path / "x.stall", 100)))
    after, left_out = without_short_calls(before, 50 * MS)
    assert left_out == 1
    assert after.nested.calls["probe"].tolist() == [CRON, TRIM]
    assert after.nested.calls["self_ns"].tolist() == [5 * MS, 5 * MS]


def test_calls_that_cross_lose_their_callers_whole(tmp_path: Path) -> None:
    """Only a damaged recording has them; nothing may point to a caller that is gone."""
    builder = Builder()
    for index in range(60):
        builder.span((CRON, TRIM, PURGE)[index % 3], index * 7 % 31, 5 + index * 5 % 17)
    before = analyse(read_recording(builder.write(tmp_path / "x.stall", 100)))
    assert before.nested.crossing
    after, left_out = without_short_calls(before, 12 * MS)
    assert left_out == len(before.nested.calls) - len(after.nested.calls)
    assert left_out > 0
    parent = after.nested.calls["parent"].to_numpy()
    assert (parent < np.arange(len(parent))).all()
    assert after.nested.calls["duration_ns"].min() >= 12 * MS
