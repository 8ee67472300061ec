"""The recording: one Arrow IPC stream, one row per event, one clock.

Schema metadata holds the first manifest; any batch may carry a newer one and a snapshot of the kernel's
counters as its own metadata; the last batch is the footer. So a file that was cut short (kill -9, power,
disk full) is readable up to its last flush and knows that it was cut. Anyone can read the rows with
pyarrow, pandas, polars or duckdb; nobody needs root.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stallscope.tracer.errors import RecordingError, StallscopeError, UsageError
from stallscope.tracer.layout import EVENT
from stallscope.tracer.manifest import Counters, Manifest
from stallscope.tracer.stack_table import StackTable

if TYPE_CHECKING:
    import pandas as pd

METADATA_KEY = b"stallscope"
SUFFIX = ".stall"

_FLAT = {
    "start_ns": pa.uint64(),
    "duration_ns": pa.uint64(),
    "value0": pa.uint64(),
    "value1": pa.uint64(),
    "value2": pa.uint64(),
    "pid": pa.uint32(),
    "tid": pa.uint32(),
    "probe": pa.uint16(),
    "cpu": pa.uint16(),
    "stack": pa.int32(),
}
COLUMNS = tuple(_FLAT)
"""Columns of every recording, as in ``probes/event.h`` with ``value`` spread over three."""

_VALUE_COLUMNS = ("value0", "value1", "value2")


def _batch(events: npt.NDArray[np.void], schema: pa.Schema) -> pa.RecordBatch:
    """Return the records (dtype ``EVENT``, shape (n,)) as one Arrow batch; every column is copied once."""
    arrays = []
    for member in schema:
        name = member.name
        column = events["value"][:, _VALUE_COLUMNS.index(name)] if name in _VALUE_COLUMNS else events[name]
        # not pa.array(): it imports pandas (0.6 s, 40 MB), which a recorder has no use for
        buffer = pa.py_buffer(np.ascontiguousarray(column))
        arrays.append(pa.Array.from_buffers(member.type, len(events), [None, buffer]))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


class RecordingWriter:
    """Writes one recording; every ``write`` reaches the operating system before it returns."""

    def __init__(self, path: Path, manifest: Manifest, stacks: StackTable | None = None) -> None:
        """Create the file and write the manifest.

        Args:
            stacks: what the rows' ``stack`` numbers mean; with each batch goes what was added to it.

        Raises:
            StallscopeError: the file cannot be created.
        """
        self.path = path
        self.rows = 0
        self._stacks = stacks
        self._frames_written = self._stacks_written = 0
        self._schema = pa.schema(
            list(_FLAT.items()), metadata={METADATA_KEY: json.dumps({"manifest": manifest.to_json()})}
        )
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise StallscopeError(f"cannot write {path}: {error.strerror}; choose another file with -o") from error
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        # pyarrow holds the schema, and with it the manifest, back until the first batch
        self._write(empty_events(), {})

    def write(
        self, events: npt.NDArray[np.void], counters: Counters | None = None, manifest: Manifest | None = None
    ) -> None:
        """Append records (dtype ``EVENT``, shape (n,), n may be 0) and what is known at this moment.

        Raises:
            StallscopeError: the disk is full or the file cannot be written.
        """
        side: dict[str, Any] = {}
        if counters is not None:
            side["counters"] = counters.to_json()
        if manifest is not None:
            side["manifest"] = manifest.to_json()
        self._write(events, side)

    def finish(self, events: npt.NDArray[np.void], counters: Counters, manifest: Manifest) -> None:
        """Append the last records and the footer, and close the file."""
        self._write(events, {"counters": counters.to_json(), "manifest": manifest.to_json(), "footer": True})
        self._stream.close()
        self._file.close()

    def copy(self, batch: pa.RecordBatch, side: dict[str, Any]) -> None:
        """Append a batch of another recording, with the counters and stacks that were beside it."""
        kept = {name: side[name] for name in ("counters", "stacks") if name in side}
        self._send(batch, {METADATA_KEY: json.dumps(kept)} if kept else None)

    def abandon(self) -> None:
        """Close the file without a footer: it stays readable and says that it was cut short."""
        self._file.close()

    def _write(self, events: npt.NDArray[np.void], side: dict[str, Any]) -> None:
        if self._stacks is not None:
            piece = self._stacks.piece(self._frames_written, self._stacks_written)
            self._frames_written += len(piece["frames"])
            self._stacks_written += len(piece["stacks"])
            if piece["frames"] or piece["stacks"]:
                side = {**side, "stacks": piece}
        self._send(_batch(events, self._schema), {METADATA_KEY: json.dumps(side)} if side else None)

    def _send(self, batch: pa.RecordBatch, metadata: dict[bytes, str] | None) -> None:
        try:
            self._stream.write_batch(batch, custom_metadata=metadata)
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise StallscopeError(
                f"cannot write {self.path}: {reason}; what was recorded before is readable"
            ) from error
        self.rows += batch.num_rows

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:
            self.abandon()


@dataclass(frozen=True)
class Recording:
    """A recording that was read.

    Attributes:
        manifest: the newest manifest in the file.
        counters: the newest snapshot of the in-kernel counters, or None.
        complete: a footer was found; otherwise the file was cut short.
        table: all rows, in the order in which they were written; columns ``COLUMNS``.
        snapshots: every snapshot of the in-kernel counters, oldest first.
        stacks: what the ``stack`` column of stack samples indexes.
    """

    path: Path
    manifest: Manifest
    counters: Counters | None
    complete: bool
    table: pa.Table
    snapshots: tuple[Counters, ...] = ()
    stacks: StackTable = field(default_factory=StackTable, compare=False)

    def frame(self) -> pd.DataFrame:
        """Return all rows as a DataFrame with the columns ``COLUMNS``."""
        frame: pd.DataFrame = self.table.to_pandas()
        return frame

    @property
    def ended_ns(self) -> int:
        """Return the end of what was recorded, CLOCK_MONOTONIC ns: the footer's, else of the last thing known."""
        if self.manifest.ended_ns:
            return self.manifest.ended_ns
        last = self.counters.time_ns if self.counters else self.manifest.started_ns
        if self.table.num_rows:
            last = max(last, int(pa.compute.max(self.table["start_ns"]).as_py()))
        return last


def read_recording(path: Path) -> Recording:
    """Read a recording, also one that was cut short or is still being written.

    Raises:
        RecordingError: no such file, not a recording, another version, or damaged beyond its manifest.
    """
    import pyarrow.compute  # noqa: F401  (registers pa.compute)

    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise RecordingError(f"{path} {what}; give a recording made by stallscope record")
        if path.stat().st_size == 0:
            raise RecordingError(f"{path} is empty; it is not a recording")
        path.open("rb").close()
    except OSError as error:
        raise RecordingError(f"{path} cannot be read: {error.strerror}; give a file you may read") from error
    try:
        source = pa.memory_map(str(path))
        reader = pa.ipc.open_stream(source)
        document = json.loads((reader.schema.metadata or {})[METADATA_KEY])
        columns = dict(zip(reader.schema.names, reader.schema.types, strict=True))
    except (OSError, pa.ArrowException, ValueError, KeyError, RecursionError) as error:
        raise RecordingError(f"{path} is not a stallscope recording; give a file made by stallscope record") from error
    if list(columns.items()) != list(_FLAT.items()):
        raise RecordingError(f"{path} has other columns than a recording of this version; it cannot be read")
    manifest = Manifest.from_json(document.get("manifest") if isinstance(document, dict) else None)
    snapshots = []
    stacks = StackTable()
    complete = False
    batches = []
    for batch, side in _batches(reader):
        batches.append(batch)
        if "manifest" in side:
            manifest = Manifest.from_json(side["manifest"])
        if "counters" in side:
            snapshots.append(Counters.from_json(side["counters"]))
        if "stacks" in side:
            stacks.extend(side["stacks"])
        complete = complete or side.get("footer") is True
    table = pa.Table.from_batches(batches, schema=reader.schema)
    return Recording(path, manifest, snapshots[-1] if snapshots else None, complete, table, tuple(snapshots), stacks)


def _batches(reader: pa.RecordBatchStreamReader) -> Iterator[tuple[pa.RecordBatch, dict[str, Any]]]:
    """Yield each readable batch with its side document; stop at the end or where the file is torn."""
    while True:
        try:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
            batch.validate(full=True)
            side = json.loads(metadata[METADATA_KEY]) if metadata is not None and METADATA_KEY in metadata else {}
        except (StopIteration, OSError, pa.ArrowException, ValueError, RecursionError):
            return
        if any(column.null_count for column in batch.columns):
            return
        yield batch, side if isinstance(side, dict) else {}


def extend_recording(recording: Recording, path: Path, events: npt.NDArray[np.void], manifest: Manifest) -> None:
    """Write a copy of a recording with records added (dtype ``EVENT``, shape (n,)), under another manifest.

    One that was cut short stays so. The recording itself is not changed.

    Raises:
        StallscopeError: the copy cannot be written.
    """
    with RecordingWriter(path, manifest) as writer:
        with pa.memory_map(str(recording.path)) as source:
            for batch, side in _batches(pa.ipc.open_stream(source)):
                writer.copy(batch, side)
        if recording.complete:
            writer.finish(events, recording.counters or Counters(manifest.ended_ns, {}), manifest)
        else:
            writer.write(events)


def joined_events(parts: Sequence[npt.NDArray[np.void]]) -> npt.NDArray[np.void]:
    """Return the records of all parts (dtype ``EVENT``) in one array, copied as plain words: twice as fast."""
    filled = [part for part in parts if len(part)]
    if len(filled) == 1:
        return filled[0]
    return np.concatenate([np.ascontiguousarray(part).view("<u8") for part in filled or [empty_events()]]).view(EVENT)


def empty_events(count: int = 0) -> npt.NDArray[np.void]:
    """Return ``count`` zeroed records of dtype ``EVENT``."""
    return np.zeros(count, dtype=EVENT)


def new_recording_path(path: Path | None, *, force: bool = False) -> Path:
    """Return where a new recording goes: the given path, else a name with the time in this folder.

    Raises:
        UsageError: the file exists and ``force`` is not set, or its folder does not exist.
    """
    chosen = path or Path(time.strftime("stallscope-%Y%m%d-%H%M%S") + SUFFIX)
    try:
        if chosen.exists() and not force:
            raise UsageError(f"{chosen} exists; choose another name with -o or overwrite it with --force")
        if not chosen.absolute().parent.is_dir():
            raise UsageError(f"there is no folder {chosen.absolute().parent}; make it or choose another name with -o")
    except OSError as error:
        raise UsageError(f"{chosen} cannot be written: {error.strerror}; choose another name with -o") from error
    return chosen
