"""The event loop's system calls: how they are seen on this kernel.

The functions behind the few that matter are hooked where the kernel can be hooked; nothing else on the host is
slowed down then. Raw tracepoints see every system call of the host: they are the last rung.

Hooked are ``__x64_sys_NAME``, not what they call: since Linux commit ebeb8c82ffaf (v4.17) each takes one argument,
the caller's registers, on every kernel, and its address is taken, so that no compiler makes it a part of another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stallscope.tracer.capture.btf import kernel_types
from stallscope.tracer.capture.listener import FENTRY_RUNG, KPROBE_RUNG, KPROBES, fentry_refusal
from stallscope.tracer.errors import SurroundingsError

TRACEPOINT_RUNG = "raw tracepoint"

WAITS = {"epoll_wait": 232, "epoll_pwait": 281, "epoll_pwait2": 441}
ACCEPTS = {"accept": 43, "accept4": 288}
SYSTEM_CALLS = {**WAITS, **ACCEPTS}
"""Numbers by name: Linux arch/x86/entry/syscalls/syscall_64.tbl."""

_YOUNG = ("epoll_pwait2",)
"""Since Linux commit 58169a52ebc9, v5.11; the others every kernel has."""


@dataclass(frozen=True)
class LoopPlan:
    """How the event loop's system calls are seen.

    Attributes:
        rung: ``fentry``, ``kprobe`` or ``raw tracepoint``.
        calls: names of the system calls whose functions are hooked; none with raw tracepoints.
        reason: why it is not fentry, "" when it is.
    """

    rung: str = TRACEPOINT_RUNG
    calls: tuple[str, ...] = ()
    reason: str = ""

    def programs(self, fentry_prefix: str, fexit_prefix: str) -> list[tuple[str, str, bool, str]]:
        """Return (system call, function, is its return, program name) for each place to hook, returns first.

        Args:
            fentry_prefix, fexit_prefix: what bcc wants before the function in the name of a tracing program.
        """
        prefixes = {True: fexit_prefix, False: fentry_prefix}
        if self.rung != FENTRY_RUNG:
            prefixes = {True: "return_", False: "enter_"}
        return [
            (call, f"__x64_sys_{call}", is_return, f"{prefixes[is_return]}__x64_sys_{call}")
            for is_return in (True, False)
            for call in self.calls
        ]


def plan_loop() -> LoopPlan:
    """Return the best way this kernel offers; never fails, as raw tracepoints need nothing of it."""
    has_kprobes = KPROBES.is_dir()
    if not has_kprobes and fentry_refusal():
        return LoopPlan(reason="this kernel has neither kprobes nor fentry")
    names = {f"__x64_sys_{call}": call for call in SYSTEM_CALLS}
    try:
        known = kernel_types().functions(names)
    except SurroundingsError as error:
        reason = str(error)
        calls = [call for call in SYSTEM_CALLS if call not in _YOUNG]
    else:
        calls = [call for name, call in names.items() if name in known]
        if not _is_enough(calls):
            lacking = ", ".join(name for name, call in names.items() if call not in calls)
            return LoopPlan(reason=f"this kernel's types do not list {lacking}")
        refusal = fentry_refusal(known["__x64_sys_epoll_wait"].type_id)
        if not refusal:
            return LoopPlan(FENTRY_RUNG, tuple(calls))
        reason = f"the kernel refuses fentry programs ({refusal})"
    if not has_kprobes:
        return LoopPlan(reason=f"{reason}, and it has no kprobes")
    return LoopPlan(KPROBE_RUNG, tuple(calls), reason)


def _is_enough(calls: Iterable[str]) -> bool:
    return set(SYSTEM_CALLS) - set(calls) <= set(_YOUNG)
