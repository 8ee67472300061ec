"""The tables of what ``stallscope import`` added; their columns are documented in ``tables.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.rows import Ints, column, field_values, of_probe
from stallscope.tracer.manifest import IMPORTED_SAMPLE, IMPORTED_SPAN, KINDS, PACKET, ProbeInfo
from stallscope.tracer.recording import Recording


@dataclass(frozen=True)
class ImportedTables:
    """The three tables of imported rows."""

    packets: pd.DataFrame
    spans: pd.DataFrame
    samples: pd.DataFrame


def imported_tables(
    recording: Recording,
    kinds: npt.NDArray[np.uint8],
    start: npt.NDArray[np.uint64],
    duration: npt.NDArray[np.uint64],
) -> ImportedTables:
    """Return the imported rows of a recording, sorted.

    Args:
        kinds: index in ``KINDS`` of every row; start, duration: of every row, ns.
    """
    # a row of no listed import is damaged
    listed = column(recording, "tid") < len(recording.manifest.imports)
    places = {
        kind: np.flatnonzero((kinds == KINDS.index(kind)) & listed) for kind in (PACKET, IMPORTED_SPAN, IMPORTED_SAMPLE)
    }
    return ImportedTables(
        _packets(recording, places[PACKET], start),
        _spans(recording, places[IMPORTED_SPAN], start, duration),
        _samples(recording, places[IMPORTED_SAMPLE], start),
    )


def _packets(recording: Recording, rows: Ints, start: npt.NDArray[np.uint64]) -> pd.DataFrame:
    probe = column(recording, "probe")[rows]
    names = ("connection", "port", "peer_high", "peer_low", "peer_port")
    fields = {name: field_values(recording, PACKET, rows, probe, name) for name in names}
    listeners = {item.port: item.index for item in reversed(recording.manifest.listeners)}
    ports, places = np.unique(fields["port"], return_inverse=True)
    listener = np.array([listeners.get(int(port), -1) for port in ports], np.int64)
    frame = pd.DataFrame(
        {
            "time_ns": start[rows].astype(np.int64),
            "event": of_probe(recording.manifest, PACKET, probe),
            "file": column(recording, "tid")[rows].astype(np.int64),
            "connection": fields["connection"],
            "listener": listener[places],
            "server": _text(recording, rows),
            "port": fields["port"],
            "peer_high": fields["peer_high"].view(np.uint64),
            "peer_low": fields["peer_low"].view(np.uint64),
            "peer_port": fields["peer_port"],
        }
    )
    return frame.sort_values(["file", "time_ns"], kind="stable", ignore_index=True)


def _spans(
    recording: Recording, rows: Ints, start: npt.NDArray[np.uint64], duration: npt.NDArray[np.uint64]
) -> pd.DataFrame:
    probe = column(recording, "probe")[rows]
    frame = pd.DataFrame(
        {
            "start_ns": start[rows].astype(np.int64),
            "duration_ns": duration[rows].astype(np.int64),
            "uncertain_ns": field_values(recording, IMPORTED_SPAN, rows, probe, "uncertain_ns"),
            "source": of_probe(recording.manifest, IMPORTED_SPAN, probe),
            "text": _text(recording, rows),
            "file": column(recording, "tid")[rows].astype(np.int64),
        }
    )
    return frame.sort_values("start_ns", kind="stable", ignore_index=True)


def _samples(recording: Recording, rows: Ints, start: npt.NDArray[np.uint64]) -> pd.DataFrame:
    probe = column(recording, "probe")[rows]
    frame = pd.DataFrame(
        {
            "time_ns": start[rows].astype(np.int64),
            "name": of_probe(recording.manifest, IMPORTED_SAMPLE, probe),
            "value": field_values(recording, IMPORTED_SAMPLE, rows, probe, "value").view(np.float64),
            "unit": of_probe(recording.manifest, IMPORTED_SAMPLE, probe, _unit),
            "file": column(recording, "tid")[rows].astype(np.int64),
        }
    )
    finite = frame.loc[np.isfinite(frame["value"].to_numpy())]
    return finite.sort_values(["name", "time_ns"], kind="stable", ignore_index=True)


def _unit(probe: ProbeInfo) -> str:
    return next((item.unit for item in probe.fields if item.name == "value"), "")


def _text(recording: Recording, rows: Ints) -> pd.Categorical:
    """Return the text each row points at, "" where it points at none."""
    texts = recording.manifest.texts
    names = list(dict.fromkeys((*texts, "")))
    places = {name: place for place, name in enumerate(names)}
    codes = np.array([*(places[text] for text in texts), places[""]], np.int32)
    stack = column(recording, "stack")[rows]
    told: npt.NDArray[Any] = np.where((stack >= 0) & (stack < len(texts)), stack, len(texts))
    return pd.Categorical.from_codes(codes[told], categories=pd.Index(names, dtype=object))
