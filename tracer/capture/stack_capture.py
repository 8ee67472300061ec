"""Stacks of the traced servers, from the kernel's samples to rows and named stacks: one object to hold."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from stallscope.tracer.capture.program import Program
from stallscope.tracer.capture.stack_reader import StackReader
from stallscope.tracer.capture.stack_sampler import StackOptions, StackSampler
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.manifest import ProbeCounters
from stallscope.tracer.stack_table import StackTable


class StackCapture:
    """A sampler and its reader; threads may be added and removed at any time, and nothing runs without one."""

    def __init__(self, program: Program, options: StackOptions, stall_ns: int) -> None:
        """Take the programs from a set that was compiled with :func:`stack_sampler.stack_sources`.

        Args:
            stall_ns: an iteration that lasts so long is a stall.

        Raises:
            SurroundingsError: the kernel refused one of them.
        """
        self.options = options
        self._stall_ns = stall_ns
        self._sampler = StackSampler(program)
        self._reader = StackReader(self._sampler)
        self._is_wanted = not options.on_demand

    @property
    def table(self) -> StackTable:
        """What the rows' ``stack`` numbers mean; it grows."""
        return self._reader.table

    def take_up(self, pid: int) -> None:
        """Read a process's code, in the background, and sample it from now on if samples are wanted now.

        Raises:
            SurroundingsError: it is gone, too many are sampled, or the kernel refuses.
        """
        self._reader.add(pid)
        if self._is_wanted:
            self.add(pid)

    def attach(self, pids: Iterable[int]) -> list[str]:
        """Sample these processes from now on, and those that are taken up later; returns why not, a line each."""
        self._is_wanted = True
        failures = []
        for pid in pids:
            try:
                self.add(pid)
            except SurroundingsError as error:
                failures.append(str(error))
        return failures

    def detach(self) -> None:
        """Sample no process until ``attach`` is called again."""
        self._is_wanted = False
        self._sampler.detach()

    def add(self, pid: int) -> None:
        """Sample the main thread of a process from now on: a perf event and a few map updates.

        Raises:
            SurroundingsError: it is gone, too many are sampled, or the kernel refuses.
        """
        self._sampler.add(pid, self.options, self._stall_ns)

    def remove(self, pid: int) -> None:
        """Let go of a process that has ended; one that is not sampled is fine."""
        self._sampler.remove(pid)
        self._reader.remove(pid)

    def renew(self) -> None:
        """Begin a new table: no row is wanted any more that names a stack of the present one."""
        self._reader.renew()

    def take(self) -> tuple[npt.NDArray[np.void], list[str]]:
        """Return the rows (dtype ``EVENT``) made since the last time, and notes on what cannot be unwound."""
        return self._reader.take()

    def stop(self, now_ns: int) -> None:
        """Detach; threads that are off the CPU at this moment count until ``now_ns``, CLOCK_MONOTONIC."""
        self._reader.stop(now_ns)

    def finish(self) -> tuple[npt.NDArray[np.void], list[str]]:
        """Return the last rows and notes, after ``stop``; unwinding what is left may take a second."""
        return self._reader.finish()

    def counters(self) -> ProbeCounters:
        """Return how many samples were taken, sent and lost."""
        return self._sampler.counters()

    def close(self) -> None:
        """Detach and free everything but the programs, which are the set's."""
        self._reader.close()
        self._sampler.close()
