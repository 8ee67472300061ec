"""Reading the columns of a recording: what a row's values and its probe mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.probes.catalogue import Field
from stallscope.tracer.manifest import Manifest, ProbeInfo
from stallscope.tracer.recording import Recording

Ints = npt.NDArray[np.int64]


def column(recording: Recording, name: str) -> npt.NDArray[Any]:
    """Return one column of all rows, in the order in which they were written."""
    values: npt.NDArray[Any] = recording.table[name].to_numpy()
    return values


def extract(values: npt.NDArray[np.uint64], item: Field) -> npt.NDArray[Any]:
    """Return the number a field holds in these values of its slot; int64, or uint64 for 64 unsigned bits."""
    shifted = values >> np.uint64(item.shift)
    if item.bits >= 64:
        return shifted.astype(np.int64) if item.signed else shifted
    masked = (shifted & np.uint64((1 << item.bits) - 1)).astype(np.int64)
    if not item.signed:
        return masked
    sign = np.int64(1 << (item.bits - 1))
    return (masked ^ sign) - sign


def field_values(recording: Recording, kind: str, rows: Ints, probe_ids: npt.NDArray[Any], name: str) -> Ints:
    """Return one field of rows of one kind, int64; 0 where the probe does not declare it."""
    result = np.zeros(len(rows), np.int64)
    for probe in recording.manifest.probes:
        item = next((item for item in probe.fields if item.name == name), None)
        if probe.kind != kind or item is None:
            continue
        mine = probe_ids == probe.id
        values = column(recording, f"value{item.slot}")[rows[mine]]
        result[mine] = extract(values, item).astype(np.int64)
    return result


def of_probe(
    manifest: Manifest,
    kind: str,
    probe_ids: npt.NDArray[Any],
    told: Callable[[ProbeInfo], str] = lambda item: item.name,
) -> pd.Categorical:
    """Return what the probe list tells about the probe of each row of one kind, by default its name.

    The categories are in the order of the probe list.
    """
    known = [item for item in manifest.probes if item.kind == kind]
    names = list(dict.fromkeys(told(item) for item in known))
    places = {name: place for place, name in enumerate(names)}
    codes = np.zeros(2**16, np.int32)
    for item in known:
        codes[item.id] = places[told(item)]
    return pd.Categorical.from_codes(codes[probe_ids], categories=pd.Index(names, dtype=object))
