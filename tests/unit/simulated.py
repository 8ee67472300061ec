"""Sides of made-up calls, by the simulations of tests/statistics."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "statistics"))

import simulate
from simulate import FUNCTION

from stallscope.tracer.analysis.compare.sides import Side


def plain(
    lengths_ns: np.ndarray, seconds: float, *, short_calls: int = 0, min_duration_ns: int = 0, ordered: bool = False
) -> Side:
    """Return a side of calls that come one by one, evenly, mixed unless ``ordered``."""
    lengths = lengths_ns if ordered else np.random.default_rng(9).permutation(lengths_ns)
    times = (np.arange(len(lengths)) + 0.5) * seconds / len(lengths) * 1e9
    spans = simulate.spans(times, lengths, np.arange(len(lengths)))
    if short_calls:
        spans = replace(
            spans,
            short_at_s=np.array([0.0, seconds]),
            short_calls=np.array([0.0, short_calls]),
            short_ns=np.array([0.0, short_calls * 1000.0]),
        )
    made = simulate.side([{FUNCTION: spans}], seconds)
    analysis: Any = SimpleNamespace(manifest=SimpleNamespace(min_duration_ns=min_duration_ns))
    return Side((replace(made.runs[0], analysis=analysis),)) if min_duration_ns else made


def one_call_a_block(lengths_ns: np.ndarray) -> Side:
    """Return a side of which each of the 24 blocks has one call."""
    assert len(lengths_ns) == 24
    return plain(lengths_ns, 24, ordered=True)


__all__ = ["FUNCTION", "one_call_a_block", "plain", "simulate"]
