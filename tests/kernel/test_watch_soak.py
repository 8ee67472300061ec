"""A soak of ``stallscope watch``, shortened; ``make soak`` runs the same for an hour."""

from __future__ import annotations

import sys
from pathlib import Path

from tracing import built

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from soak import NEW, OLD, soak

SECONDS = 75.0
SEED = 20


def test_every_stall_is_captured_and_none_invented_whatever_happens() -> None:
    """In the middle the watch is killed, the disk runs full, and the server is killed, and upgraded."""
    for build in (OLD, NEW):
        built(build)
    result = soak(SECONDS, SEED)
    print("\n".join(result.lines()))
    assert len(result.stalls) >= 4
    assert {stall.pid for stall in result.stalls} > {result.stalls[0].pid}, "on more than one server"
    assert result.missed == []
    assert result.invented == []
    assert result.captures > 0
