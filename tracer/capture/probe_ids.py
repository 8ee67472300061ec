"""The ids that probes have in every recording, as the programs are compiled with them."""

from __future__ import annotations

ITERATION_PROBE = 0
ACCEPT_PROBE = 1
QUEUE_PROBE = 2
COUNTER_PROBE = 3
FIRST_LISTENER_PROBE = 4
STACK_PROBE = 15
FIRST_CALL_PROBE = 16
MAX_PROBES = 256
"""Probe ids below ``FIRST_CALL_PROBE`` are fixed; functions follow in the order in which they were added."""
