"""The tracks of a Perfetto trace: which there are, and which of them each event belongs to.

Protos: TrackDescriptor, ProcessDescriptor, ThreadDescriptor and CounterDescriptor in Perfetto's
protos/perfetto/trace/track_event/.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from stallscope.reports.export.naming import counter_names, listener_names, process_names
from stallscope.reports.export.perfetto_packets import PacketWriter
from stallscope.reports.export.protobuf import bytes_field, number_field
from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.tables import Ints


class Descriptor:
    """Field numbers of TrackDescriptor and what it holds."""

    UUID = 1
    NAME = 2
    PROCESS = 3
    THREAD = 4
    PARENT_UUID = 5
    COUNTER = 8
    PROCESS_PID = 1
    PROCESS_NAME = 6
    THREAD_PID = 1
    THREAD_TID = 2
    THREAD_NAME = 5
    COUNTER_UNIT_NAME = 6


class Tracks:
    """Declares each track when its first event asks for it, and knows its uuid.

    Attributes:
        recording: uuid of the track of the recording itself; listener_names: by index.
    """

    def __init__(self, analysis: Analysis, packets: PacketWriter) -> None:
        self._packets = packets
        self._manifest = analysis.manifest
        self._uuids: dict[tuple[object, ...], int] = {}
        tables = analysis.tables
        self.listener_names = listener_names(
            self._manifest,
            {*tables.queues["listener"], *tables.requests["listener"], *analysis.stalls.overflows["listener"]},
        )
        self._owner = {listener.index: listener.pid for listener in self._manifest.listeners}
        spans = (analysis.nested.calls, analysis.nested.abandoned, tables.iterations, tables.accepts)
        pids = {*self._owner.values(), *(pid for frame in spans for pid in frame["pid"].unique().tolist())}
        self._processes = process_names(self._manifest, pids)
        self.recording = self._declared("recording", name="recording")

    def threads(self, frame: pd.DataFrame) -> Ints:
        """Return the track of the thread of each row, by the columns ``pid`` and ``tid``."""
        return self._by(frame["pid"].to_numpy(), frame["tid"].to_numpy(), self._thread)

    def beside_threads(self, frame: pd.DataFrame, name: str) -> Ints:
        """Return the track of this name beside the thread of each row."""
        return self._by(frame["pid"].to_numpy(), frame["tid"].to_numpy(), lambda pid, tid: self._beside(pid, tid, name))

    def of_listeners(self, indexes: Ints, name: str, unit: str = "") -> Ints:
        """Return the track of this name of each listener; with a unit it is a counter."""
        return self._by(indexes, indexes, lambda index, _: self._of_listener(index, name, unit))

    def kernel_counters(self, namespaces: Ints, counters: Ints) -> Ints:
        """Return the track of each counter of each network namespace."""
        return self._by(namespaces, counters, self._kernel_counter)

    def _by(self, first: Ints, second: Ints, uuid: Callable[[int, int], int]) -> Ints:
        pairs = pd.DataFrame({"first": first, "second": second}).groupby(["first", "second"], sort=False)
        different = pairs.size().index.to_frame().to_numpy().tolist()
        uuids = np.array([uuid(one, other) for one, other in different], np.int64)
        return uuids[pairs.ngroup().to_numpy()]

    def _process(self, pid: int) -> int:
        process = number_field(Descriptor.PROCESS_PID, pid)
        process += bytes_field(Descriptor.PROCESS_NAME, self._processes.get(pid, "process"))
        return self._declared("process", pid, content=bytes_field(Descriptor.PROCESS, process))

    def _thread(self, pid: int, tid: int) -> int:
        self._process(pid)
        thread = number_field(Descriptor.THREAD_PID, pid) + number_field(Descriptor.THREAD_TID, tid)
        thread += bytes_field(Descriptor.THREAD_NAME, "main thread" if tid == pid else "thread")
        return self._declared("thread", pid, tid, content=bytes_field(Descriptor.THREAD, thread))

    def _beside(self, pid: int, tid: int, name: str) -> int:
        label = name if pid == tid else f"{name} of thread {tid}"
        return self._declared(label, pid, tid, parent=self._process(pid), name=label)

    def _of_listener(self, index: int, name: str, unit: str) -> int:
        label = f"{name}, {self.listener_names.get(index, 'listener not known')}"
        owner = self._owner.get(index)
        return self._declared(label, index, parent=self._process(owner) if owner else 0, name=label, unit=unit)

    def _kernel_counter(self, namespace: int, counter: int) -> int:
        label = counter_names(self._manifest).get(counter, f"counter {counter}")
        if len(self._manifest.namespaces) > 1:
            inodes = {item.index: item.inode for item in self._manifest.namespaces}
            label += f", network namespace {inodes.get(namespace, namespace)}"
        return self._declared("counter", namespace, counter, name=label, unit="events")

    def _declared(self, *key: object, content: bytes = b"", parent: int = 0, name: str = "", unit: str = "") -> int:
        """Return the uuid of a track; it is written the first time it is asked for."""
        if key not in self._uuids:
            uuid = self._uuids[key] = len(self._uuids) + 1
            descriptor = number_field(Descriptor.UUID, uuid) + content
            if parent:
                descriptor += number_field(Descriptor.PARENT_UUID, parent)
            if name:
                descriptor += bytes_field(Descriptor.NAME, name)
            if unit:
                descriptor += bytes_field(Descriptor.COUNTER, bytes_field(Descriptor.COUNTER_UNIT_NAME, unit))
            self._packets.track(descriptor)
        return self._uuids[key]
