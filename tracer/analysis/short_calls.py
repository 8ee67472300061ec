"""A recording without its short calls, as if they had only been counted while it was recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stallscope.tracer.analysis.analysis import Analysis
from stallscope.tracer.analysis.containment import NO_PARENT
from stallscope.tracer.analysis.nesting import Nested
from stallscope.tracer.analysis.stalls import time_by_function


def without_short_calls(analysis: Analysis, min_duration_ns: int) -> tuple[Analysis, int]:
    """Return the analysis without the calls shorter than this, and how many they were.

    A call is never shorter than what it calls, so what stays keeps its caller and its depth; the time of what is
    left out becomes self time of the caller, as with ``record --min-duration``. Unfinished calls stay.
    ``tables`` still holds every call.
    """
    calls = analysis.nested.calls
    duration = calls["duration_ns"].to_numpy()
    keep = (duration >= min_duration_ns) | calls["unfinished"].to_numpy()
    left_out = int(np.count_nonzero(~keep))
    if not left_out:
        return analysis, 0
    parent = calls["parent"].to_numpy()
    # only damaged recordings have calls longer than their callers
    keep &= (parent == NO_PARENT) | keep[np.maximum(parent, 0)]
    self_ns = calls["self_ns"].to_numpy().copy()
    absorbed = np.flatnonzero(~keep & (parent != NO_PARENT) & keep[np.maximum(parent, 0)])
    np.add.at(self_ns, parent[absorbed], duration[absorbed])
    # how many calls are kept before each place, so the new number of a call that is kept
    place = np.concatenate([[0], np.cumsum(keep)])
    kept_parent = parent[keep]
    kept = calls.loc[keep].reset_index(drop=True)
    kept["parent"] = np.where(kept_parent == NO_PARENT, NO_PARENT, place[np.maximum(kept_parent, 0)])
    kept["self_ns"] = self_ns[keep]
    nested = Nested(kept, analysis.nested.paths, analysis.nested.abandoned, analysis.nested.crossing)
    ranges = {name: place[analysis.stalls.frame[name].to_numpy()] for name in ("first_call", "last_call")}
    frame = analysis.stalls.frame.assign(**ranges)
    stalls = replace(analysis.stalls, frame=frame, functions=time_by_function(frame, nested))
    return replace(analysis, nested=nested, stalls=stalls), int(np.count_nonzero(~keep))
