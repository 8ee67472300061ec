"""A part of a session as a recording: which rows are in it, and what its counters say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from recordings import MS, Builder, at, manifest

from stallscope.tracer.boundary import Moment
from stallscope.tracer.capture.excerpt import Excerpt
from stallscope.tracer.capture.probe_ids import ACCEPT_PROBE, FIRST_CALL_PROBE, ITERATION_PROBE, MAX_PROBES
from stallscope.tracer.capture.session import Mark, Session
from stallscope.tracer.errors import StallscopeError
from stallscope.tracer.last_samples import LastSamples
from stallscope.tracer.manifest import Manifest, ProbeCounters, ProbeInfo
from stallscope.tracer.recording import Recording, read_recording

CRON, TRIM = FIRST_CALL_PROBE, FIRST_CALL_PROBE + 1
PROBES = (
    *(probe for probe in manifest().probes if probe.id < 4),
    ProbeInfo(CRON, "serverCron", "call", "uprobe"),
    ProbeInfo(TRIM, "sdsRemoveFreeSpace", "call", "uprobe"),
)


class StandIn:
    """What an excerpt asks of a session."""

    def part(self, start: Mark, end: Mark | None = None, counters: Any = None) -> Manifest:
        return manifest(probes=PROBES, started_ns=start.time_ns, ended_ns=end.time_ns if end else 0)


def mark(
    time_ms: float, counters: dict[int, ProbeCounters], *, returned: dict[int, int] | None = None,
    unfinished: npt.NDArray[np.void] | None = None, overflows: int = 900,
) -> Mark:  # fmt: skip
    awaited = np.zeros(MAX_PROBES, np.int64)
    for probe, counter in counters.items():
        awaited[probe] = counter.sent - (returned or {}).get(probe, 0)
    kernel = {4026531840: {"ListenOverflows": overflows, "ListenDrops": overflows}}
    nothing = Builder().events()
    under_way = nothing if unfinished is None else unfinished
    return Mark(at(time_ms), counters, Moment(kernel), under_way, awaited, nothing, 0)


def excerpt(path: Path, start: Mark, samples: npt.NDArray[np.void] | None = None) -> Excerpt:
    return Excerpt(cast(Session, StandIn()), path, start, Builder().events() if samples is None else samples)


def finished(made: Excerpt) -> Recording:
    made.finish("the duration was over")
    return read_recording(made.path)


def starts(recording: Recording, probe: int) -> list[float]:
    frame = recording.frame()
    return ((frame[frame["probe"] == probe]["start_ns"].astype("int64") - at(0)) / MS).tolist()


def test_has_the_rows_between_its_marks_whenever_they_come(tmp_path: Path) -> None:
    path = tmp_path / "part.stall"
    # 5 were sent before, of which 3 had been returned; the other two come with the first rows
    made = excerpt(path, mark(1000, {CRON: ProbeCounters(hits=5, sent=5)}, returned={CRON: 3}))
    assert not made.add(Builder().span(CRON, 980, 1).events())
    assert not made.add(Builder().span(CRON, 990, 1).span(CRON, 1010, 1).events())
    # 8 were sent at the end: one more is to come, and what comes after it is not in it
    made.stop(mark(2000, {CRON: ProbeCounters(hits=8, sent=8)}, returned={CRON: 6}))
    assert not made.add(Builder().span(CRON, 1020, 1).events())
    assert not path.exists()
    assert made.add(Builder().span(CRON, 1030, 1).span(CRON, 2001, 1).events())
    found = finished(made)
    assert starts(found, CRON) == [1010, 1020, 1030]
    assert found.counters is not None
    assert found.counters.by_probe[CRON] == ProbeCounters(hits=3, sent=3)
    assert (found.complete, found.manifest.started_ns, found.ended_ns) == (True, at(1000), at(2000))
    assert list(tmp_path.iterdir()) == [path]


def test_what_began_before_is_unpaired(tmp_path: Path) -> None:
    """Under way at the start: one that is sent, one too short to be, one that lasts; and one of the event loop."""
    under_way = Builder().span(CRON, 900, None).span(TRIM, 999, None).span(TRIM, 998, None, tid=7).events()
    before = {
        CRON: ProbeCounters(hits=10, sent=9),
        TRIM: ProbeCounters(hits=20, short_calls=18),
        ITERATION_PROBE: ProbeCounters(hits=100, short_calls=100),
    }
    made = excerpt(tmp_path / "a.stall", mark(1000, before, returned={CRON: 9}, unfinished=under_way))
    made.add(Builder().span(CRON, 900, 200).span(ITERATION_PROBE, 890, 220).span(CRON, 1200, 5).events())
    after = {
        CRON: ProbeCounters(hits=12, sent=11),
        TRIM: ProbeCounters(hits=25, short_calls=23, short_ns=5),
        ITERATION_PROBE: ProbeCounters(hits=104, sent=1, short_calls=103),
        ACCEPT_PROBE: ProbeCounters(hits=1, sent=0, short_calls=1),
    }
    still = Builder().span(TRIM, 998, None, tid=7).span(CRON, 1900, None).events()
    returned = {CRON: 11, ITERATION_PROBE: 1}
    made.stop(mark(2000, after, returned=returned, unfinished=still))
    assert made.add(Builder().events())
    found = finished(made)
    assert starts(found, CRON) == [1200, 1900]
    assert starts(found, ITERATION_PROBE) == starts(found, TRIM) == []
    assert found.counters is not None
    counters = found.counters.by_probe
    # two were entered: one returned, one is under way; the one from before returned unpaired
    assert counters[CRON] == ProbeCounters(hits=2, sent=1, unpaired=1)
    assert counters[TRIM] == ProbeCounters(hits=5, short_calls=4, short_ns=5, unpaired=1)
    assert counters[ITERATION_PROBE] == ProbeCounters(hits=3, short_calls=3)
    assert counters[ACCEPT_PROBE] == ProbeCounters(hits=1, short_calls=1)


def test_begins_with_what_was_sampled_last(tmp_path: Path) -> None:
    last = LastSamples()
    last.follow(manifest())
    last.add(Builder().queue(100, 3, 40).counter(100, 900).counter(100, 950, counter=1).events(), at(100))
    last.add(Builder().queue(900, 7, 41).span(CRON, 1, 1).events(), at(900))
    made = excerpt(tmp_path / "a.stall", mark(1000, {}, overflows=907), last.rows())
    made.stop(mark(2000, {}))
    assert made.add(Builder().events())
    frame = finished(made).frame()
    assert set(frame["start_ns"]) == {at(1000)}
    queue = frame[frame["probe"] == 2]
    assert [(value & 0xFFFF, drops) for value, drops in zip(queue["value0"], queue["value1"], strict=True)] == [(7, 41)]
    assert frame[frame["probe"] == 3]["value1"].tolist() == [907, 907], "as the manifest's counters at the start"


def test_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    with pytest.raises(StallscopeError, match="cannot write"):
        excerpt(tmp_path / "none" / "a.stall", mark(1000, {}))


def test_that_is_left_in_the_middle_is_readable(tmp_path: Path) -> None:
    made = excerpt(tmp_path / "a.stall", mark(1000, {CRON: ProbeCounters()}))
    made.add(Builder().span(CRON, 1010, 1).events())
    assert made.is_due(at(1600))
    made.write(at(1600), {CRON: ProbeCounters(hits=1, sent=1)})
    made.abandon()
    (path,) = tmp_path.iterdir()
    found = read_recording(path)
    assert (path.name, found.complete, starts(found, CRON)) == ("a.stall.partial", False, [1010])
