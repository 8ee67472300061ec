#!/usr/bin/env python3
"""Becomes another program after arranging its surroundings: ``launch.py PARENT FILES PROGRAM ...``.

Transparent huge pages are off for this process alone, whatever the machine's setting: with them the copies
that stall Redis are five times shorter. The kernel kills it when PARENT, which started it, dies by whatever
death. It may open FILES descriptors. Its niceness holds for its session too. The pid stays the same.
"""

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress

PR_SET_PDEATHSIG = 1
PR_SET_THP_DISABLE = 41
"""linux/prctl.h; the second since Linux 3.15."""


def main(parent: int, files: int, command: list[str]) -> None:
    """Arrange the surroundings and replace this process with the command."""
    die_with(parent)
    _prctl(PR_SET_THP_DISABLE, 1)
    allow_files(files)
    carry_niceness()
    os.execv(command[0], command)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; end now if it already has."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("launch.py: the process that started this one is gone")


def allow_files(files: int) -> int:
    """Raise the limit of open descriptors to ``files`` or as near as may be, and return the limit reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < files:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, max(files, hard)))
        except (ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def carry_niceness() -> None:
    """Give the session of this process its own niceness, where that is not 0.

    Where the kernel shares the processors out among sessions first (kernel.sched_autogroup_enabled), niceness
    counts inside a session only: a server in a session of its own would lose what ``nice`` gave its parent.
    """
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    if niceness != 0:
        # No such file where the kernel does not do so; without root it refuses what is below 0.
        with suppress(OSError), open("/proc/self/autogroup", "w") as group:  # noqa: PTH123
            group.write(str(niceness))


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        sys.exit(f"launch.py: prctl({option}) failed: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
