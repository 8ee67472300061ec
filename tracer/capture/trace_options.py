"""What is traced in every server, and how closely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stallscope.probes import catalogue
from stallscope.tracer.capture.stack_sampler import StackOptions


@dataclass(frozen=True)
class TraceOptions:
    """What to trace.

    Attributes:
        functions: catalogue names, symbols, or ``LIBRARY:SYMBOL``.
        min_duration_ns: calls shorter than this are counted in the kernel, not recorded.
        stall_ns: event loop iterations shorter than this are counted, not recorded.
        ring_bytes: size of each ring buffer, a power of two.
        on_demand: those of the functions that are attached only while detail is wanted.
        loop_on_demand: so are the raw tracepoints, where event loops are seen by them.
        stacks: when to sample stacks, None for never.
    """

    functions: Sequence[str]
    min_duration_ns: int
    stall_ns: int
    sample_ns: int
    ring_bytes: int
    on_demand: frozenset[str] = frozenset()
    loop_on_demand: bool = False
    stacks: StackOptions | None = None


def requested_functions(extra: Sequence[str], *, defaults: bool) -> list[str]:
    """Return the functions to trace: the catalogue's default set unless turned off, then the user's, each once."""
    return list(dict.fromkeys([*(catalogue.default_functions() if defaults else ()), *extra]))
