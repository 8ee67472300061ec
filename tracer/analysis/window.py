"""A part of a recording, as a recording of its own, so that everything can be said about it alone.

The window grows to the whole event loop iterations at its ends: a stall is never cut. What the kernel only
counted is known twice a second, so of counted calls and losses a window has those up to the next snapshot.
"""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime, timedelta, timezone

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stallscope.tracer.analysis.tables import NS_PER_S, Ints, check_fields, extract
from stallscope.tracer.errors import UsageError
from stallscope.tracer.layout import MAX_SPAN_NS, UNFINISHED_NS, mark_unfinished
from stallscope.tracer.manifest import (
    CALL,
    COUNTER,
    ITERATION,
    QUEUE,
    Counters,
    Manifest,
    NamespaceInfo,
    ProbeCounters,
)
from stallscope.tracer.recording import Recording
from stallscope.tracer.units import format_duration_ns, parse_duration_ns

_CLOCK = re.compile(r"([01]?[0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.,][0-9]{1,9})?)?")


def parse_moment(text: str, manifest: Manifest) -> int:
    """Return a moment of a recording, CLOCK_MONOTONIC ns.

    Args:
        text: a time since the start, as ``12.5s``; or by the wall clock, in UTC unless it says otherwise, as
            ``13:44:15.2`` (the first such time since the start) or ``2026-11-24T13:44:15+01:00``.

    Raises:
        UsageError: it is neither.
    """
    wanted = text.strip()
    start_wall_ns = manifest.started_ns + manifest.wall_offset_ns
    try:
        if wanted[-1:].isalpha() and not wanted.endswith("Z"):
            return manifest.started_ns + parse_duration_ns(wanted)
        if wanted == "0":
            return manifest.started_ns
        if not _CLOCK.fullmatch(wanted):
            return _wall_ns(datetime.fromisoformat(wanted.replace("Z", "+00:00"))) - manifest.wall_offset_ns
        first = datetime.fromtimestamp(start_wall_ns // NS_PER_S, timezone.utc)
        clock = wanted.replace(",", ".") if wanted.count(":") == 2 else f"{wanted}:00"
        hour, minute, second = clock.split(":")
        midnight = first.replace(hour=0, minute=0, second=0, microsecond=0)
        since_midnight_ns = round((int(hour) * 3600 + int(minute) * 60) * NS_PER_S + float(second) * NS_PER_S)
        moment = _wall_ns(midnight) + since_midnight_ns
        if moment < start_wall_ns - NS_PER_S:
            moment = _wall_ns(midnight + timedelta(days=1)) + since_midnight_ns
    except (UsageError, ValueError, OverflowError, OSError) as error:
        raise UsageError(
            f'cannot read "{text}" as a time; write 12.5s after the start, 13:44:15 or 2026-11-24T13:44:15 in UTC'
        ) from error
    return moment - manifest.wall_offset_ns


def cut(recording: Recording, from_ns: int | None, to_ns: int | None) -> Recording:
    """Return what was recorded from one moment to another, CLOCK_MONOTONIC ns; None: from the start, to the end.

    Spans that began before and end inside are whole; those that end later count as unfinished.

    Raises:
        UsageError: nothing of the recording is between these moments.
        RecordingError: the probe list contradicts the format.
    """
    manifest = recording.manifest
    check_fields(manifest)
    started_ns, ended_ns = manifest.started_ns, recording.ended_ns
    first = started_ns if from_ns is None else from_ns
    last = ended_ns if to_ns is None else to_ns
    _check(first - started_ns, last - started_ns, ended_ns - started_ns)
    first, last = max(first, started_ns), min(last, ended_ns)
    rows = _Rows(recording)
    first, last = rows.grown(first, last)
    kept, start, duration = rows.inside(first, last)
    table = recording.table.take(pa.array(kept))
    for name, values in (("start_ns", start), ("duration_ns", duration)):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), pa.array(values))
    namespaces = tuple(rows.namespace(item, first, last, ended_ns) for item in manifest.namespaces)
    return Recording(
        path=recording.path,
        manifest=dataclasses.replace(
            manifest,
            started_ns=first,
            ended_ns=last,
            namespaces=namespaces,
            notes=tuple(note for note in manifest.notes if note.time_ns <= last),
        ),
        counters=_counted(recording, first, last, rows.sent(kept)),
        complete=recording.complete or last < ended_ns,
        table=table,
        snapshots=_snapshots(recording, first, last),
        stacks=recording.stacks,
    )


def _check(first_ns: int, last_ns: int, length_ns: int) -> None:
    """Check a window, given in ns since the start of a recording."""
    length = format_duration_ns(length_ns)
    if first_ns >= length_ns:
        raise UsageError(f"the window starts at {_place(first_ns)}, after the end of the recording; it lasts {length}")
    if first_ns >= last_ns:
        raise UsageError(
            f"the window ends at {_place(last_ns)}, not after its start at {_place(first_ns)}; "
            f"the recording lasts {length}"
        )
    if last_ns <= 0:
        raise UsageError(f"the window ends {format_duration_ns(-last_ns)} before the recording; it lasts {length}")


def _place(time_ns: int) -> str:
    return f"{time_ns / NS_PER_S:.6g} s"


class _Rows:
    """The rows of a recording, and which of them belong to a window."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        column = recording.table.column
        start = column("start_ns").to_numpy()
        duration = column("duration_ns").to_numpy()
        self._unfinished = mark_unfinished(duration)
        sane = (start < np.uint64(MAX_SPAN_NS)) & ((duration <= np.uint64(MAX_SPAN_NS)) | self._unfinished)
        # damaged rows stay outside of every window
        self._start = np.where(sane, start, np.uint64(MAX_SPAN_NS)).astype(np.int64)
        length = np.where(sane & ~self._unfinished, duration, 0).astype(np.int64)
        self._end = np.where(self._unfinished, MAX_SPAN_NS, self._start + length)
        self._probe = column("probe").to_numpy()
        self._kind = np.full(2**16, "", dtype="U9")
        for probe in recording.manifest.probes:
            self._kind[probe.id] = probe.kind

    def grown(self, first: int, last: int) -> tuple[int, int]:
        """Return the window with the whole iterations at its ends; where there are none, main threads' calls."""
        kind = self._kind[self._probe]
        whole = kind == ITERATION
        if not whole.any():
            column = self._recording.table.column
            whole = (kind == CALL) & (column("tid").to_numpy() == column("pid").to_numpy())
        whole &= ~self._unfinished
        around = [whole & (self._start < edge) & (self._end > edge) for edge in (first, last)]
        begin = int(self._start[around[0]].min(initial=first))
        return max(begin, self._recording.manifest.started_ns), int(self._end[around[1]].max(initial=last))

    def inside(self, first: int, last: int) -> tuple[Ints, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """Return the rows of a window, and their start and duration in it.

        Of everything sampled, the last sample before the window stands at its start.
        """
        touches = (self._start < last) & ((self._end > first) | (self._start >= first))
        kind = self._kind[self._probe]
        sampled = (kind == QUEUE) | (kind == COUNTER)
        kept = np.flatnonzero(touches & (~sampled | (self._start >= first)))
        before = self._last_samples(np.flatnonzero(sampled & (self._start < first)))
        rows = np.sort(np.concatenate([kept, before])).astype(np.int64)
        start = np.where(sampled[rows], np.maximum(self._start[rows], first), self._start[rows])
        duration = np.where(self._end[rows] > last, np.uint64(UNFINISHED_NS),
                            (self._end[rows] - self._start[rows]).astype(np.uint64))  # fmt: skip
        return rows, start.astype(np.uint64), duration

    def sent(self, rows: Ints) -> dict[int, int]:
        """Return how many of these rows each probe has."""
        counts = np.bincount(self._probe[rows], minlength=1)
        return {int(probe): int(counts[probe]) for probe in np.flatnonzero(counts)}

    def namespace(self, item: NamespaceInfo, first: int, last: int, ended_ns: int) -> NamespaceInfo:
        """Return a namespace with its counters as they were at both ends of a window."""
        known = dict(item.counters_start)
        ends = dict(known)
        names = self._recording.manifest.counter_names
        for probe in self._recording.manifest.probes:
            if probe.kind != COUNTER:
                continue
            rows = np.flatnonzero((self._probe == probe.id) & (self._start <= last))
            fields = {field.name: self._field(rows, field.name, probe.id) for field in probe.fields}
            # a damaged row may name a counter that is not listed
            mine = np.flatnonzero((fields["namespace"] == item.index) & (fields["counter"] < len(names)))
            for place in mine[np.argsort(self._start[rows[mine]], kind="stable")].tolist():
                name = names[int(fields["counter"][place])]
                count = int(fields["count"][place])
                ends[name] = count
                if self._start[rows[place]] <= first:
                    known[name] = count
        if first <= self._recording.manifest.started_ns and last >= ended_ns:
            return item
        # how many of those at listeners that were not watched fell into the window is not known
        known_end = not any(item.seen_elsewhere.values())
        return dataclasses.replace(
            item, counters_start=known, counters_end=ends if known_end else {}, seen={}, seen_elsewhere={}
        )

    def _last_samples(self, rows: Ints) -> Ints:
        """Return, of these rows, the last of each listener and of each counter of each namespace."""
        last: dict[tuple[int, int, int], int] = {}
        for probe in self._recording.manifest.probes:
            keys = {QUEUE: ("listener",), COUNTER: ("namespace", "counter")}.get(probe.kind)
            mine = rows[self._probe[rows] == probe.id]
            if keys is None or not len(mine):
                continue
            mine = mine[np.argsort(self._start[mine], kind="stable")]
            values = [self._field(mine, key, probe.id) for key in keys] + [np.zeros(len(mine), np.int64)]
            found, place = np.unique(np.column_stack(values[:2])[::-1], axis=0, return_index=True)
            for key, index in zip(found.tolist(), place.tolist(), strict=True):
                last[probe.id, key[0], key[1]] = int(mine[len(mine) - 1 - index])
        return np.array(sorted(last.values()), np.int64)

    def _field(self, rows: Ints, name: str, probe_id: int) -> Ints:
        probe = self._recording.manifest.probe(probe_id)
        item = next((field for field in probe.fields if field.name == name), None) if probe else None
        if item is None:
            return np.zeros(len(rows), np.int64)
        values = self._recording.table.column(f"value{item.slot}").to_numpy()[rows]
        return extract(values, item).astype(np.int64)


def _counted(recording: Recording, first: int, last: int, sent: dict[int, int]) -> Counters | None:
    """Return the kernel's counters of a window: rows exactly, the rest between the snapshots around it."""
    if recording.counters is None:
        return None
    snapshots = sorted(recording.snapshots or (recording.counters,), key=lambda item: item.time_ns)
    before = next((item for item in reversed(snapshots) if item.time_ns <= first), None)
    after = next((item for item in snapshots if item.time_ns >= last), snapshots[-1])
    earlier = before.by_probe if before else {}
    by_probe = {}
    for probe, counters in after.by_probe.items():
        grown = _difference(counters, earlier.get(probe, ProbeCounters()))
        mine = sent.get(probe, 0)
        hits = mine + grown.short_calls + grown.missing + grown.thinned
        by_probe[probe] = dataclasses.replace(grown, sent=mine, hits=hits)
    return Counters(last, by_probe)


def _snapshots(recording: Recording, first: int, last: int) -> tuple[Counters, ...]:
    """Return the snapshots up to the first one after a window, counted from the last one before it."""
    ordered = sorted(recording.snapshots, key=lambda item: item.time_ns)
    before = next((item for item in reversed(ordered) if item.time_ns <= first), None)
    earlier = before.by_probe if before else {}
    later = next((item.time_ns for item in ordered if item.time_ns >= last), last)
    return tuple(
        Counters(
            min(item.time_ns, last),
            {
                probe: _difference(counters, earlier.get(probe, ProbeCounters()))
                for probe, counters in item.by_probe.items()
            },
        )
        for item in ordered
        if first < item.time_ns <= later
    )


def _difference(counters: ProbeCounters, earlier: ProbeCounters) -> ProbeCounters:
    names = [member.name for member in dataclasses.fields(ProbeCounters)]
    return ProbeCounters(**{name: max(getattr(counters, name) - getattr(earlier, name), 0) for name in names})


def _wall_ns(moment: datetime) -> int:
    """Return ns since 1970; without a time zone it is UTC."""
    known = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    since = known - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (since.days * 86_400 + since.seconds) * NS_PER_S + since.microseconds * 1000
