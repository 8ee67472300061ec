"""The last sample of every accept queue and kernel counter: what holds where a recording begins in a session."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stallscope.tracer.manifest import COUNTER, QUEUE, Manifest
from stallscope.tracer.recording import empty_events

_STALE_NS = 5_000_000_000
"""Everything that is sampled is sampled once a second at least: an older sample is of something that is gone."""

_KEYS = {QUEUE: ("listener",), COUNTER: ("counter", "namespace")}
"""The fields that say what a sample is of, by kind of probe."""


class LastSamples:
    """Remembers the last row of everything that is sampled."""

    def __init__(self) -> None:
        self._keys: dict[int, tuple[tuple[int, int, int], ...]] = {}
        self._rows: dict[tuple[int, ...], np.void] = {}

    def follow(self, manifest: Manifest) -> None:
        """Learn which probes are samples, and of what; to be called again whenever the probe list has grown."""
        self._keys = {
            probe.id: tuple(
                (item.slot, item.shift, item.bits) for item in probe.fields if item.name in _KEYS[probe.kind]
            )
            for probe in manifest.probes
            if probe.kind in _KEYS
        }

    def add(self, events: npt.NDArray[np.void], now_ns: int) -> None:
        """Take events (dtype ``EVENT``) in their order, and forget what was not sampled lately (CLOCK_MONOTONIC)."""
        for row in events[np.isin(events["probe"], np.array(list(self._keys), np.uint16))]:
            probe = int(row["probe"])
            values = row["value"].tolist()
            subject = [values[slot] >> shift & (1 << bits) - 1 for slot, shift, bits in self._keys[probe]]
            self._rows[(probe, *subject)] = row.copy()  # or it would keep its whole batch in memory
        for key in [key for key, row in self._rows.items() if int(row["start_ns"]) < now_ns - _STALE_NS]:
            del self._rows[key]

    def rows(self) -> npt.NDArray[np.void]:
        """Return them all (dtype ``EVENT``), in an array of their own."""
        found = empty_events(len(self._rows))
        for place, row in enumerate(self._rows.values()):
            found[place] = row
        return found
