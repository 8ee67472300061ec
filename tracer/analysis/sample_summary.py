"""Where stalls were, by stack samples, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from stallscope.tracer.analysis.sample_rows import ASLEEP, BLOCKED, RUNNABLE, RUNNING
from stallscope.tracer.analysis.samples import PASSES_ON, Samples, plain_name, state_times
from stallscope.tracer.analysis.tables import Tables
from stallscope.tracer.manifest import CALL, STACK
from stallscope.tracer.stack_table import KERNEL, NOT_UNWOUND

KEPT_FUNCTIONS = 40

IN_STALLS, IN_RECORDING = "stalls", "recording"


@dataclass(frozen=True)
class SampledFunction:
    """One function on the sampled stacks.

    Attributes:
        file: its file, as ``libc.so.6``, ``[kernel]``, or "".
        total_ns: time in it and what it called, once however often it is on one stack; self_ns: in itself.
        traced: it is in the probe list.
    """

    name: str
    file: str
    total_ns: int
    self_ns: int
    traced: bool


@dataclass(frozen=True)
class SampleSummary:
    """What stack samples tell; times are what samples stand for.

    Attributes:
        samples: of the whole recording; lost: taken, and not kept.
        scope: ``stalls``, or ``recording`` where none fell into a stall: what the times below are of.
        samples_in_scope: how many tell them.
        total_ns: all; the next four are parts of it: on the CPU, wanting one, asleep, and asleep so that no signal
            wakes (mostly for a disk).
        not_unwound_ns: of it, on stacks whose beginning is not known.
        functions: of it, most time first, without those that all goes through.
    """

    samples: int
    lost: int
    scope: str
    samples_in_scope: int
    total_ns: int
    running_ns: int
    runnable_ns: int
    asleep_ns: int
    blocked_ns: int
    not_unwound_ns: int
    functions: tuple[SampledFunction, ...]


def summarise_samples(tables: Tables, samples: Samples) -> SampleSummary | None:
    """Return what the stack samples tell; None where none were to be taken."""
    ids = [probe.id for probe in tables.manifest.probes if probe.kind == STACK]
    if not ids:
        return None
    weights = samples.in_stalls() if samples.are_in_stalls else samples.weights
    states = state_times(weights)
    times = _by_function(samples, weights)
    not_unwound_ns = times.pop((NOT_UNWOUND, ""), (0, 0))[0]
    traced = {probe.name for probe in tables.manifest.probes if probe.kind == CALL}
    traced |= {probe.symbol for probe in tables.manifest.probes if probe.kind == CALL}
    ranked = sorted(times.items(), key=lambda item: (-item[1][0], item[0]))
    told = [item for item in ranked if plain_name(item[0][0]) not in PASSES_ON or item[1][1] > 0]
    return SampleSummary(
        samples=len(samples.frame),
        lost=tables.missing(STACK),
        scope=IN_STALLS if samples.are_in_stalls else IN_RECORDING,
        samples_in_scope=int(weights["samples"].sum()),
        total_ns=int(weights["weight_ns"].sum()),
        running_ns=states[RUNNING],
        runnable_ns=states[RUNNABLE],
        asleep_ns=states[ASLEEP],
        blocked_ns=states[BLOCKED],
        not_unwound_ns=not_unwound_ns,
        functions=tuple(
            SampledFunction(name, file, total_ns, self_ns, name in traced or plain_name(name) in traced)
            for (name, file), (total_ns, self_ns) in told[:KEPT_FUNCTIONS]
        ),
    )


def _by_function(samples: Samples, weights: pd.DataFrame) -> dict[tuple[str, str], tuple[int, int]]:
    """Return (total, self) by name and file; of the kernel only the outermost function, which is its part in all."""
    times: dict[tuple[str, str], tuple[int, int]] = {}
    for stack, weight_ns in weights.groupby("stack")["weight_ns"].sum().items():
        frames = samples.functions_of(int(str(stack)))
        user = [(frame.name, frame.file) for frame in frames if frame.file != KERNEL]
        own = user[-1] if user and not frames[-1].is_kernel else None
        for place in set(user):
            total_ns, self_ns = times.get(place, (0, 0))
            times[place] = (total_ns + int(weight_ns), self_ns + (int(weight_ns) if place == own else 0))
    return times
