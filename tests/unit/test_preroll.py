"""The pre-roll: whole chunks, exact boundaries, bounded memory, and no silent loss."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import MS, PURGE, QUEUE_ID, Builder, at, manifest

from stallscope.tracer.boundary import Boundary, Moment
from stallscope.tracer.layout import EVENT, EVENT_BYTES
from stallscope.tracer.watch.preroll import Preroll


def boundary(time_ms: float) -> Boundary:
    return Boundary(at(time_ms), {}, Moment())


def calls(end_ms: float, count: int, first: int = 0) -> npt.NDArray[np.void]:
    events = np.zeros(count, EVENT)
    events["probe"] = PURGE
    events["duration_ns"] = MS
    events["start_ns"] = at(end_ms) - MS
    events["value"][:, 0] = np.arange(first, first + count)
    return events


def numbers(preroll: Preroll, since_ms: float) -> list[int]:
    return [int(value) for chunk in preroll.take(at(since_ms)).chunks for value in chunk.events["value"][:, 0]]


def filled(preroll: Preroll, chunks: int, per_chunk: int = 10) -> Preroll:
    """Add chunks of half a second, numbered through."""
    for chunk in range(chunks):
        preroll.add(calls(chunk * 500 + 250, per_chunk, chunk * per_chunk))
        preroll.close_chunk(boundary((chunk + 1) * 500))
    return preroll


def test_whole_chunks_are_taken_and_the_boundaries_meet() -> None:
    preroll = filled(Preroll(10_000 * MS, 10**6, boundary(0)), 6)
    preroll.add(calls(3100, 3, 60))
    taken = preroll.take(at(1600))
    assert [chunk.begin.time_ns for chunk in taken.chunks] == [at(1500), at(2000), at(2500), at(3000)]
    assert [chunk.end and chunk.end.time_ns for chunk in taken.chunks] == [at(2000), at(2500), at(3000), None]
    assert numbers(preroll, 1600) == list(range(30, 63))
    assert (taken.missing_ns, taken.dropped) == (0, 0)
    assert preroll.take(at(1500)).chunks[0].begin.time_ns == at(1500), "a chunk that ended then is not needed"


def test_what_is_older_than_asked_for_expires_uncounted() -> None:
    preroll = filled(Preroll(1000 * MS, 10**6, boundary(0)), 10)
    assert preroll.take(at(0)).chunks[0].begin.time_ns == at(3500)
    assert (preroll.dropped, preroll.expired) == (0, 70)
    assert preroll.take(at(4000)).missing_ns == 0


def test_the_memory_bound_drops_the_oldest_and_counts_it() -> None:
    kept = 3
    size = 10 * EVENT_BYTES + 2 * 200 + 800
    preroll = filled(Preroll(10_000 * MS, kept * size, boundary(0)), 10)
    assert preroll.bytes <= kept * size
    assert numbers(preroll, 0) == list(range(70, 100))
    taken = preroll.take(at(2600))
    assert (preroll.dropped, taken.dropped, taken.missing_ns) == (70, 20, 900 * MS)
    assert preroll.take(at(3600)).dropped == 0, "what was dropped is older than that"


def test_a_start_that_is_not_old_enough_is_not_a_loss() -> None:
    preroll = filled(Preroll(5000 * MS, 10**6, boundary(0)), 2)
    assert preroll.take(at(-4000)).missing_ns == 0


def test_one_chunk_larger_than_the_memory_loses_its_oldest_events() -> None:
    preroll = Preroll(5000 * MS, 100 * EVENT_BYTES, boundary(0))
    assert not preroll.is_filling
    for part in range(10):
        preroll.add(calls(10 + part, 30, part * 30))
    assert preroll.is_filling
    taken = preroll.take(at(0))
    found = numbers(preroll, 0)
    assert found == list(range(300 - len(found), 300))
    assert (taken.dropped, taken.chunks[0].dropped) == (300 - len(found), 300 - len(found))
    preroll.add(calls(100, 1000, 300))
    assert preroll.bytes <= 100 * EVENT_BYTES
    assert numbers(preroll, 0)[-1] == 1299


def test_the_last_samples_stand_at_the_start_of_each_chunk() -> None:
    preroll = Preroll(60_000 * MS, 10**6, boundary(0))
    preroll.follow(manifest())
    preroll.add(Builder().queue(10, 3, 40).queue(20, 4, 41).counter(20, 900).counter(20, 7, counter=1).events())
    preroll.close_chunk(boundary(500))
    preroll.add(Builder().queue(600, 9, 41, listener=1).queue(700, 5, 41).events())
    preroll.close_chunk(boundary(1000))
    first, second, third = preroll.take(at(0)).chunks
    assert len(first.samples) == 0
    assert sorted(second.samples["value"].tolist()) == sorted([[4 | 511 << 32, 41, 0], [0, 900, 0], [1, 7, 0]])
    queues = third.samples[third.samples["probe"] == QUEUE_ID]
    assert sorted(queues["value"].tolist()) == sorted([[5 | 511 << 32, 41, 0], [9 | 511 << 32, 41, 1]])
    for time_ms in range(2000, 8000, 500):
        preroll.add(Builder().queue(time_ms, 5, 41).events())
        preroll.close_chunk(boundary(time_ms + 100))
    last = preroll.take(at(0)).chunks[-1].samples
    assert last["value"].tolist() == [[5 | 511 << 32, 41, 0]], "what is gone is not said to be there"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.booleans()), max_size=60),
    st.integers(40, 400),
    st.integers(0, 20),
)
def test_what_is_kept_is_the_newest_without_a_hole(steps: list[tuple[int, bool]], room: int, keep: int) -> None:
    """Kept, dropped and expired together are all that came; kept is an unbroken tail; memory is bounded."""
    preroll = Preroll(keep * 100 * MS, room * EVENT_BYTES, boundary(0))
    total = 0
    for step, (count, closes) in enumerate(steps):
        preroll.add(calls(step * 100, count, total))
        total += count
        if closes:
            preroll.close_chunk(boundary((step + 1) * 100))
        assert preroll.bytes <= room * EVENT_BYTES
    kept = numbers(preroll, 0)
    assert kept == list(range(total - len(kept), total))
    assert preroll.dropped + preroll.expired + len(kept) == total
    taken = preroll.take(at(0)).chunks
    assert all(one.end is two.begin for one, two in itertools.pairwise(taken))
