"""Probes that are attached only while something is going on: planned and loaded beforehand, attached in milliseconds.

Attaching is a few system calls for each probe. Detaching waits in the kernel until no probe of that kind runs
any more, tens of milliseconds, so it is done in a thread: whoever follows the servers goes on meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from stallscope.probes.catalogue import Decoder
from stallscope.tracer.capture.binary import Attachment
from stallscope.tracer.capture.program import Program
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.watch.priority import run_normally


@dataclass(frozen=True)
class Place:
    """Where one function is probed in one process.

    Attributes:
        probe: id in the probe list; decoder: how its arguments are read.
        on_demand: attached only while detail is wanted.
    """

    probe: int
    decoder: Decoder
    attachment: Attachment
    on_demand: bool = False


@dataclass(frozen=True)
class _Attached:
    """The handles of one probe in one process."""

    program: Program
    handles: tuple[int, ...]
    probe: int
    pid: int


class OnDemand:
    """The places of all processes that are probed on demand, and what is attached there."""

    def __init__(self, owner: Callable[[int], Program | None]) -> None:
        """Start without a place.

        Args:
            owner: tells which program set a probe id belongs to; None: it is gone.
        """
        self._owner = owner
        self._places: dict[int, tuple[Place, ...]] = {}
        self._attached: dict[int, list[_Attached]] = {}
        self._is_wanted = False
        self._detacher: _Detacher | None = None

    @property
    def is_attached(self) -> bool:
        """Return whether the probes are attached (or all that could be)."""
        return self._is_wanted

    @property
    def is_detaching(self) -> bool:
        """Return whether probes are still being detached; to attach them meanwhile would count calls twice."""
        return self._detacher is not None and self._detacher.is_busy

    @property
    def probes(self) -> set[int]:
        """Return the ids of all probes that are attached on demand."""
        return {place.probe for places in self._places.values() for place in places}

    def add(self, pid: int, places: Sequence[Place]) -> list[str]:
        """Take up a process; where the probes are attached already, its are too. Returns what failed."""
        self._places[pid] = tuple(places)
        return self._attach(pid) if self._is_wanted else []

    def remove(self, pid: int) -> None:
        """Let go of a process that has ended; its probes are detached in the background."""
        self._places.pop(pid, None)
        self._let_go(self._attached.pop(pid, []), forget=False)

    def let_go(self, release: Callable[[], object]) -> None:
        """Have something else done that waits for the kernel; ``is_detaching`` until it is."""
        if self._detacher is None:
            self._detacher = _Detacher()
        self._detacher.put(release)

    def attach(self) -> tuple[int, list[str]]:
        """Attach every probe.

        Returns:
            When it was done, CLOCK_MONOTONIC ns, and what failed, one line each.
        """
        self._is_wanted = True
        failures = [text for pid in self._places for text in self._attach(pid)]
        return time.monotonic_ns(), failures

    def detach(self) -> None:
        """Begin to detach every probe; ``is_detaching`` until that is done."""
        self._is_wanted = False
        self._let_go([item for items in self._attached.values() for item in items])
        self._attached.clear()

    def close(self) -> None:
        """Wait until everything that was let go is detached; what is attached is the programs' to detach."""
        self._attached.clear()
        if self._detacher is not None:
            self._detacher.close()
            self._detacher = None

    def _attach(self, pid: int) -> list[str]:
        failures = []
        attached = self._attached.setdefault(pid, [])
        for place in self._places[pid]:
            program = self._owner(place.probe)
            if program is None:
                continue
            try:
                handles = program.attach_call(place.probe, place.attachment.path, place.attachment.offset, pid)
            except SurroundingsError as error:
                failures.append(str(error))
                continue
            attached.append(_Attached(program, handles, place.probe, pid))
        return failures

    def _let_go(self, gone: list[_Attached], *, forget: bool = True) -> None:
        if gone:
            self.let_go(lambda: _detach(gone, forget=forget))


def _detach(items: list[_Attached], *, forget: bool) -> None:
    """Detach; calls under way are forgotten, unless a process ended in them: nobody will see them return."""
    for program in {id(item.program): item.program for item in items}.values():
        mine = [item for item in items if item.program is program]
        program.detach_many([handle for item in mine for handle in item.handles])
        for pid in {item.pid for item in mine} if forget else ():
            program.forget_calls({item.probe for item in mine if item.pid == pid}, pid)


class _Detacher:
    """The thread that waits for the kernel."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._put = 0
        self._done = 0
        self._thread = threading.Thread(target=self._run, name="detach", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        return self._done < self._put

    def put(self, release: Callable[[], object]) -> None:
        self._put += 1
        self._queue.put(release)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        run_normally()
        for release in iter(self._queue.get, None):
            release()
            self._done += 1
