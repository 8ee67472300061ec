"""Whether a thread has left a stack frame: a call whose frame is gone will never return."""

from __future__ import annotations

from pathlib import Path


def has_left(pid: int, tid: int, sp: int) -> bool:
    """Return whether a thread's stack no longer holds the frame that began at ``sp``.

    False where that cannot be told: the thread is running, the whole process has ended (the call was
    under way when it did), or the kernel does not say (CONFIG_HAVE_ARCH_TRACEHOOK).
    """
    try:
        fields = Path(f"/proc/{pid}/task/{tid}/syscall").read_text(encoding="ascii").split()
    except ProcessLookupError:
        return _is_running(pid)
    except FileNotFoundError:
        return _is_running(pid) and not Path(f"/proc/{pid}/task/{tid}").exists()
    except OSError:
        return False
    # "NUMBER ARGUMENTS... SP PC" in a system call, "-1 SP PC" when blocked elsewhere, or "running"
    return len(fields) >= 3 and int(fields[-2], 16) > sp


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
