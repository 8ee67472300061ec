"""Puts the rows of inputs on the clock of a recording, or makes a recording of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import numpy as np
import numpy.typing as npt

from stallscope.tracer.errors import UsageError
from stallscope.tracer.imports.pcap import Ints
from stallscope.tracer.imports.rows import NS_PER_S, Input
from stallscope.tracer.layout import NO_STACK
from stallscope.tracer.manifest import ImportInfo, Manifest, Note, ProbeInfo
from stallscope.tracer.recording import Recording, empty_events, joined_events
from stallscope.tracer.units import format_duration_ns

MAX_TEXTS = 10_000
"""Different texts kept in one recording: the manifest holds them, and is read as a whole."""

_FIRST_NS = NS_PER_S
"""Where the clock of a recording begins that has only imported rows: 0 would mean "not known"."""

_MAX_DRIFT_NS, _MAX_DRIFT_RATIO = 2_000_000, 500e-6
"""NTP slews a clock by no more than 500 ppm (RFC 5905, PHI and adjtimex); what is beyond that is a step."""


@dataclass(frozen=True)
class Placed:
    """Rows on the clock of the recording whose manifest this is.

    Attributes:
        events: dtype ``EVENT``, shape (n,); imports: one for each input, in their order.
    """

    events: npt.NDArray[np.void]
    manifest: Manifest
    imports: tuple[ImportInfo, ...]


def place_in(recording: Recording, inputs: Sequence[Input], offset_ns: int = 0) -> Placed:
    """Return the rows that lie in the time of a recording, on its clock.

    A row is kept if any part of it, with all that its time is uncertain by, lies between the recording's start and its
    end.

    Args:
        offset_ns: added to the inputs' clocks.

    Raises:
        UsageError: no row of any input does.
    """
    manifest = recording.manifest
    ended_ns = recording.ended_ns
    place = _Placing(manifest, offset_ns)
    for item in inputs:
        start_ns = _monotonic(_wall(item, offset_ns), manifest, ended_ns)
        length_ns = (item.rows["duration_ns"] + _uncertain(item)).astype(np.int64)
        place.add(item, start_ns, (start_ns + length_ns >= manifest.started_ns) & (start_ns <= ended_ns))
    if any(item.outside for item in place.imports) and not any(item.rows for item in place.imports):
        raise UsageError(_far_outside(manifest, ended_ns, place.imports))
    return place.result(_clock_notes(manifest, ended_ns))


def recording_of(inputs: Sequence[Input], offset_ns: int = 0, command: tuple[str, ...] = ()) -> Placed:
    """Return a recording that has only imported rows; its clock starts at the first.

    Raises:
        UsageError: there is no row.
    """
    starts = [_wall(item, offset_ns) for item in inputs if len(item.rows)]
    if not starts:
        raise UsageError("nothing to import: no input has an entry, a sample or a packet")
    first_ns = min(int(start.min()) for start in starts)
    manifest = Manifest(
        started_ns=_FIRST_NS, wall_offset_ns=first_ns - _FIRST_NS, probes=(), targets=(), listeners=(), namespaces=(),
        min_duration_ns=0, stall_ns=0, sample_ns=0, rungs={}, counter_names=(), command=command, ended_by="import",
    )  # fmt: skip
    place = _Placing(manifest, offset_ns)
    for item in inputs:
        start_ns = _wall(item, offset_ns) - manifest.wall_offset_ns
        place.add(item, start_ns, np.ones(len(start_ns), np.bool_))
    placed = place.result(())
    ended_ns = int((placed.events["start_ns"] + placed.events["duration_ns"]).max())
    return replace(
        placed,
        manifest=replace(placed.manifest, ended_ns=ended_ns, wall_offset_end_ns=manifest.wall_offset_ns),
    )


class _Placing:
    """Collects placed rows, under the probe list and the texts of one manifest."""

    def __init__(self, manifest: Manifest, offset_ns: int) -> None:
        self._manifest = manifest
        self._offset_ns = offset_ns
        self._probes = list(manifest.probes)
        self._texts = {text: place for place, text in enumerate(manifest.texts)}
        self._parts: list[npt.NDArray[np.void]] = []
        self.imports: list[ImportInfo] = []

    def add(self, item: Input, start_ns: Ints, kept: npt.NDArray[np.bool_]) -> None:
        """Take in the kept rows of an input, which start at these times."""
        rows = item.rows[kept]
        # what began before the machine did is shown from its start
        rows["start_ns"] = np.maximum(start_ns[kept], 0)
        rows["tid"] = len(self._manifest.imports) + len(self.imports)
        used = np.bincount(rows["probe"], minlength=len(item.probes)) > 0
        ids = np.array([self._probe(probe) if used[place] else 0 for place, probe in enumerate(item.probes)], np.uint16)
        if len(rows):
            rows["probe"] = ids[rows["probe"]]
        left_out = self._add_texts(item, rows)
        notes = item.notes
        if left_out:
            notes += (f"{left_out:,} rows have no text: a recording keeps {MAX_TEXTS:,} different ones",)
        walls = _wall(item, self._offset_ns)
        self._parts.append(rows)
        self.imports.append(
            ImportInfo(
                file=item.file,
                format=item.format,
                rows=len(rows),
                outside=len(item.rows) - len(rows),
                first_wall_ns=int(walls.min()) if len(walls) else 0,
                last_wall_ns=int(walls.max()) if len(walls) else 0,
                offset_ns=self._offset_ns,
                counts=item.counts,
                notes=notes,
            )
        )

    def result(self, notes: tuple[Note, ...]) -> Placed:
        """Return what was collected."""
        manifest = replace(
            self._manifest,
            probes=tuple(self._probes),
            imports=(*self._manifest.imports, *self.imports),
            texts=tuple(self._texts),
            notes=(*self._manifest.notes, *notes),
        )
        events = joined_events(self._parts) if self._parts else empty_events()
        return Placed(events, manifest, tuple(self.imports))

    def _probe(self, wanted: ProbeInfo) -> int:
        """Return the id of a probe in the recording's list, to which it is added if it is new."""
        for known in self._probes:
            if (known.kind, known.name, known.fields) == (wanted.kind, wanted.name, wanted.fields):
                return known.id
        number = max((probe.id for probe in self._probes), default=-1) + 1
        if number >= 2**16:
            raise UsageError("the recording has no room for more kinds of rows; import into another copy of it")
        self._probes.append(replace(wanted, id=number))
        return number

    def _add_texts(self, item: Input, rows: npt.NDArray[np.void]) -> int:
        """Make the rows point at the recording's texts; returns how many rows lost theirs."""
        told = rows["stack"] >= 0
        places = np.full(len(item.texts) + 1, NO_STACK, np.int32)
        for place in np.unique(rows["stack"][told]):
            text = item.texts[place]
            if text in self._texts or len(self._texts) < MAX_TEXTS:
                places[place] = self._texts.setdefault(text, len(self._texts))
        rows["stack"] = places[np.where(told, rows["stack"], len(item.texts))]
        return int(np.count_nonzero(told & (rows["stack"] < 0)))


def _wall(item: Input, offset_ns: int) -> Ints:
    return item.rows["start_ns"].astype(np.int64) + offset_ns


def _uncertain(item: Input) -> npt.NDArray[np.uint64]:
    """Return by how much later each row may lie; uint64 ns."""
    uncertain = np.array([any(known.name == "uncertain_ns" for known in probe.fields) for probe in item.probes])
    if not uncertain.any():
        return np.zeros(len(item.rows), np.uint64)
    return np.where(uncertain[item.rows["probe"]], item.rows["value"][:, 0], np.uint64(0))


def _monotonic(wall_ns: Ints, manifest: Manifest, ended_ns: int) -> Ints:
    """Return wall-clock times on the recording's clock; a clock that was slewed meanwhile is followed."""
    times = wall_ns - manifest.wall_offset_ns
    drift_ns = _drift_ns(manifest)
    elapsed_ns = ended_ns - manifest.started_ns
    if not drift_ns or elapsed_ns <= 0 or abs(drift_ns) > _MAX_DRIFT_NS + _MAX_DRIFT_RATIO * elapsed_ns:
        return times
    share = np.clip((times - manifest.started_ns) / elapsed_ns, 0, 1)
    return times - np.rint(share * drift_ns).astype(np.int64)


def _drift_ns(manifest: Manifest) -> int:
    return manifest.wall_offset_end_ns - manifest.wall_offset_ns if manifest.wall_offset_end_ns else 0


def _clock_notes(manifest: Manifest, ended_ns: int) -> tuple[Note, ...]:
    drift_ns = _drift_ns(manifest)
    if abs(drift_ns) <= _MAX_DRIFT_NS + _MAX_DRIFT_RATIO * max(ended_ns - manifest.started_ns, 0):
        return ()
    text = f"the wall clock was set by {format_duration_ns(drift_ns)} while recording: imported rows may be off by that"
    return () if any(note.text == text for note in manifest.notes) else (Note(ended_ns, text),)


def _far_outside(manifest: Manifest, ended_ns: int, imports: Sequence[ImportInfo]) -> str:
    """Return by how much the nearest input misses the recording, and the remedy."""
    begin_ns = manifest.started_ns + manifest.wall_offset_ns
    end_ns = ended_ns + manifest.wall_offset_ns
    gaps = {
        (info.first_wall_ns - end_ns if info.first_wall_ns > end_ns else info.last_wall_ns - begin_ns): info
        for info in imports
        if info.outside
    }
    gap_ns = min(gaps, key=abs)
    info = gaps[gap_ns]
    side = "after the recording ends" if gap_ns > 0 else "before the recording starts"
    event = "begins" if gap_ns > 0 else "ends"
    offset_s = -(abs(gap_ns) // NS_PER_S + 1) if gap_ns > 0 else abs(gap_ns) // NS_PER_S + 1
    return (
        f"nothing of {info.file} lies in the recording: it {event} {abs(gap_ns) / NS_PER_S:,.3f} s {side} "
        f"({_utc(info.first_wall_ns)} to {_utc(info.last_wall_ns)}, recorded {_utc(begin_ns)} to {_utc(end_ns)}); "
        f"if its clock is wrong, correct it with --offset, by at least {offset_s + info.offset_ns // NS_PER_S:+}s"
    )


def _utc(wall_ns: int) -> str:
    try:
        return datetime.fromtimestamp(wall_ns // NS_PER_S, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{wall_ns} ns"
