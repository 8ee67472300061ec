"""The stack samples of a recording, one row each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from stallscope.tracer.analysis.rows import column, field_values
from stallscope.tracer.layout import STATE_ON_CPU
from stallscope.tracer.manifest import KINDS, STACK
from stallscope.tracer.recording import Recording

RUNNING, RUNNABLE, ASLEEP, BLOCKED = "running", "runnable", "asleep", "blocked"
STATES = (RUNNING, RUNNABLE, ASLEEP, BLOCKED)
"""On the CPU; off it, though it wanted to run; sleeping; sleeping so that no signal wakes it (mostly: for a disk)."""

_UNINTERRUPTIBLE = 0x2
"""Linux include/linux/sched.h, TASK_UNINTERRUPTIBLE."""


def stack_samples(
    recording: Recording, kinds: npt.NDArray[np.uint8], start: npt.NDArray[Any], duration: npt.NDArray[Any]
) -> pd.DataFrame:
    """Return the table ``samples``: one row per stack sample, sorted by ``tid``, ``time_ns``.

    ============= ======== ===== ==================================================================
    time_ns       int64    ns    when it was taken; off the CPU: when the thread left it
    duration_ns   int64    ns    how long it was off the CPU; 0 for samples on it
    weight_ns     int64    ns    the time it stands for
    pid           int64          process
    tid           int64          thread
    state         category       one of ``STATES``
    stack         int64          number in the recording's stacks, -1: not kept
    ============= ======== ===== ==================================================================

    Args:
        kinds: index in ``KINDS`` of every row; start, duration: of every row, ns, none unfinished.
    """
    rows = np.flatnonzero(kinds == KINDS.index(STACK))
    probe = column(recording, "probe")[rows]
    task = field_values(recording, STACK, rows, probe, "state")
    state = np.where(task & _UNINTERRUPTIBLE, STATES.index(BLOCKED), STATES.index(ASLEEP))
    state = np.where(task == 0, STATES.index(RUNNABLE), state)
    state = np.where(task == STATE_ON_CPU, STATES.index(RUNNING), state)
    stack = column(recording, "stack")[rows].astype(np.int64)
    known = len(recording.stacks.stacks)
    frame = pd.DataFrame(
        {
            "time_ns": start[rows].astype(np.int64),
            "duration_ns": duration[rows].astype(np.int64),
            "weight_ns": np.clip(field_values(recording, STACK, rows, probe, "weight_ns"), 0, 2**53),
            "pid": column(recording, "pid")[rows].astype(np.int64),
            "tid": column(recording, "tid")[rows].astype(np.int64),
            "state": pd.Categorical.from_codes(state, categories=pd.Index(STATES, dtype=object)),
            "stack": np.where((stack >= 0) & (stack < known), stack, -1),
        }
    )
    return frame.sort_values(["tid", "time_ns"], kind="stable", ignore_index=True)
