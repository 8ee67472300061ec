"""Which threads of a watch run first: a thread inherits the priority of the one that starts it."""

from __future__ import annotations

import contextlib
import os
import threading


def run_normally() -> None:
    """Give the calling thread, and what it starts, an ordinary priority: only looking at servers has to come first."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 0)
