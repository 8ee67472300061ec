"""What this machine lets us observe, and how to get more: asked before anything loads, and by ``doctor``.

Nothing is changed: the trial programs are two instructions long, attached to nothing, and freed at once.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stallscope.probes.catalogue import default_functions
from stallscope.tracer.capture.backlog import SockDiag, socket_inodes
from stallscope.tracer.capture.bcc_library import bcc_version, load_bcc
from stallscope.tracer.capture.bpf import has_uprobe_links, load_trial
from stallscope.tracer.capture.btf import KERNEL_BTF, kernel_types
from stallscope.tracer.capture.event_loop import TRACEPOINT_RUNG, plan_loop
from stallscope.tracer.capture.listener import KPROBES, fentry_refusal
from stallscope.tracer.capture.namespace import read_sysctls
from stallscope.tracer.capture.redis_target import Target, open_target
from stallscope.tracer.capture.symbols import Resolution, resolve
from stallscope.tracer.errors import SurroundingsError

OK, LIMITED, FAILED = "ok", "limited", "failed"

# Linux include/uapi/linux/capability.h
_CAPABILITIES = {
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_SYSLOG": 34,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_PTRACE": 19,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
_WITHOUT = {
    "CAP_SYS_PTRACE": "other users' processes are out of reach",
    "CAP_SYS_ADMIN": "servers in other network namespaces (containers) are out of reach",
    "CAP_SYSLOG": "refused connections are sampled, where the kernel could be hooked",
    "CAP_DAC_READ_SEARCH": "watch cannot see without probes whether another user's server waits for events",
}
"""What is missing without a capability; tests/kernel/test_capabilities.py takes each one away."""

_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""Linux include/linux/proc_ns.h, PROC_PID_INIT_INO."""

_PROG_RAW_TRACEPOINT = 17
_OLDEST_KERNEL = (5, 8)
"""BPF ring buffers: Linux commit 457f44363a88, v5.8."""


@dataclass(frozen=True)
class Check:
    """One fact about this machine.

    Attributes:
        name: what was looked at; state: ``ok``, ``limited`` (works on a lower rung) or ``failed``.
        detail: what was found; remedy: how to reach more, "" when nothing is missing.
        needed: nothing can be traced without it.
    """

    name: str
    state: str
    detail: str
    remedy: str = ""
    needed: bool = False


def check_machine() -> Iterator[Check]:
    """Yield every check of the machine, the fatal ones first."""
    yield _architecture()
    yield _kernel()
    yield _capabilities()
    yield _pid_namespace()
    yield _lockdown()
    yield _bcc()
    yield _uprobes()
    yield _event_loop()
    yield _btf()
    yield _kprobes()
    yield _fentry()
    yield _headers()


def check_server(pid: int) -> Iterator[Check]:
    """Yield what can be observed of one server.

    Raises:
        TargetError: no such process, or not a Redis or Valkey server.
    """
    target = open_target(pid)
    try:
        server = f"{target.product} {target.version or '(version not told by the binary)'}"
        yield Check(
            "server",
            OK,
            f"process {pid}: {server}, {target.allocator or 'allocator not known'}, {target.exe}",
        )
        yield _symbols(target)
        for resolution in resolve(target.image, default_functions(), redis_version=target.version or None):
            yield _function(resolution)
        yield from _listeners(pid)
    finally:
        target.close()


def _symbols(target: Target) -> Check:
    exe = target.image.exe
    if exe.has_debug_info:
        return Check("symbols", OK, "with debug information: arguments are decoded from it, inlined copies are known")
    if not exe.is_stripped:
        return Check("symbols", OK, "present, without debug information: arguments are decoded by a table of versions")
    return Check(
        "symbols", LIMITED, "stripped: only exported functions are found",
        "install the server's debug symbols (redis-server-dbgsym, debuginfo-install redis)",
    )  # fmt: skip


def _function(resolution: Resolution) -> Check:
    where = ", ".join(attachment.symbol for attachment in resolution.attachments)
    if resolution.status == "found":
        return Check(resolution.function, OK, f"found in {resolution.found_in}")
    detail = f"{resolution.status}: {resolution.reason}" + (f"; traced as {where}" if where else "")
    remedy = "" if where else "its calls are not seen; the event loop and the accept queue still are"
    return Check(resolution.function, OK if resolution.status == "alias" else LIMITED, detail, remedy)


def _listeners(pid: int) -> Iterator[Check]:
    owned = socket_inodes(pid)
    diag = SockDiag(pid)
    try:
        states = [state for state in diag.listeners() if state.inode in owned]
    finally:
        diag.close()
    sysctls = read_sysctls(pid)
    if not states:
        yield Check("listener", LIMITED, "it listens on no TCP port", "nothing to see of refused connections")
    for state in states:
        clamp = sysctls.get("net.core.somaxconn", "")
        detail = f"accept queue {state.queue_length} of {state.queue_limit}, {state.drops} dropped since it listens"
        yield Check(f"listener {state.name}", OK, f"{detail}; somaxconn {clamp or 'not known'}")


def require_capture() -> None:
    """Check what capturing cannot do without.

    Raises:
        SurroundingsError: the first thing that is missing, with its remedy. bcc is not looked at: the
            loader says it.
    """
    for check in (_architecture(), _kernel(), _capabilities(), _lockdown(), _uprobes()):
        if check.state == FAILED:
            raise SurroundingsError(f"{check.name}: {check.detail}; {check.remedy}")


def _architecture() -> Check:
    machine = platform.machine()
    if machine == "x86_64":
        return Check("architecture", OK, machine, needed=True)
    return Check("architecture", FAILED, machine, "stallscope traces x86-64 only", needed=True)


def _kernel() -> Check:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers >= _OLDEST_KERNEL:
        return Check("kernel", OK, release, needed=True)
    return Check("kernel", FAILED, release, "BPF ring buffers need Linux 5.8 or newer", needed=True)


def effective_capabilities() -> int:
    """Return the bit mask of this process's effective capabilities."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _holds(name: str) -> bool:
    return bool(effective_capabilities() >> _CAPABILITIES[name] & 1)


def _capabilities() -> Check:
    held = {name for name in _CAPABILITIES if _holds(name)}
    user = f"uid {os.geteuid()}"
    # since Linux 5.8 (a17b53c4a4b5, c9e0924e5c2b) these two stand for CAP_SYS_ADMIN
    to_trace = {"CAP_BPF", "CAP_PERFMON"} - held if "CAP_SYS_ADMIN" not in held else set()
    if to_trace:
        return Check(
            "permission", FAILED, f"{user} without {', '.join(sorted(to_trace))}",
            "run it with sudo, or with CAP_BPF, CAP_PERFMON and CAP_SYS_PTRACE", needed=True,
        )  # fmt: skip
    missing = [name for name in _WITHOUT if name not in held]
    if missing:
        return Check(
            "permission", LIMITED, f"{user} without {', '.join(missing)}",
            f"{'; '.join(_WITHOUT[name] for name in missing)}: run it with sudo", needed=True,
        )  # fmt: skip
    return Check("permission", OK, f"{user}, all capabilities that tracing needs", needed=True)


def _pid_namespace() -> Check:
    try:
        initial = os.stat("/proc/self/ns/pid").st_ino == _INITIAL_PID_NAMESPACE
    except OSError:
        initial = True
    if initial:
        return Check("pid namespace", OK, "the initial one")
    return Check(
        "pid namespace", LIMITED, "inside a container",
        "BPF sees the host's pids, so no event loop will be found; run on the host or with --pid=host",
    )  # fmt: skip


def _lockdown() -> Check:
    try:
        text = Path("/sys/kernel/security/lockdown").read_text(encoding="ascii").strip()
    except OSError:
        return Check("lockdown", OK, "none", needed=True)
    mode = text[text.index("[") + 1 : text.index("]")] if "[" in text else text
    if mode == "confidentiality":
        return Check(
            "lockdown", FAILED, "the kernel is locked down (confidentiality): BPF may not read memory",
            "boot with lockdown=integrity or none", needed=True,
        )  # fmt: skip
    return Check("lockdown", OK, mode, needed=True)


def _bcc() -> Check:
    try:
        load_bcc()
        return Check("bcc", OK, bcc_version(), needed=True)
    except SurroundingsError as error:
        detail, _, remedy = str(error).partition("; ")
        return Check("bcc", FAILED, detail, remedy, needed=True)


def _uprobes() -> Check:
    if not Path("/sys/bus/event_source/devices/uprobe/type").exists():
        return Check("uprobes", FAILED, "this kernel has none", "use a kernel with CONFIG_UPROBE_EVENTS", needed=True)
    if not _holds("CAP_SYS_ADMIN") and not has_uprobe_links():
        # a uprobe's perf event is refused with CAP_PERFMON (EACCES on 6.1 and 6.18); links are not
        return Check(
            "uprobes", FAILED, "before Linux 6.10, which has uprobe links, they take CAP_SYS_ADMIN",
            "run it with sudo", needed=True,
        )  # fmt: skip
    return Check("uprobes", OK, "functions are timed call by call", needed=True)


def _event_loop() -> Check:
    plan = plan_loop()
    if plan.rung != TRACEPOINT_RUNG:
        return Check("event loop", OK, f"{plan.rung} on epoll_wait and accept: every iteration is timed")
    reason = load_trial(_PROG_RAW_TRACEPOINT)
    if reason:
        return Check(
            "event loop",
            FAILED,
            f"raw tracepoint programs do not load ({reason})",
            "run as root on Linux 4.17 or newer",
        )
    return Check(
        "event loop", LIMITED,
        "raw tracepoints sys_enter and sys_exit: every iteration is timed, and every system call of the host "
        f"is slowed down a little ({plan.reason})",
        "use a distribution kernel",
    )  # fmt: skip


def _btf() -> Check:
    try:
        return Check("BTF", OK, f"{kernel_types().count:,} kernel types in {KERNEL_BTF}")
    except SurroundingsError as error:
        detail, _, remedy = str(error).partition("; ")
        return Check("BTF", LIMITED, detail, remedy)


def _kprobes() -> Check:
    if KPROBES.is_dir():
        return Check("kprobes", OK, "available")
    return Check(
        "kprobes", LIMITED, "this kernel has none (CONFIG_KPROBES is off): overflows are sampled, not seen one by one",
        "use a distribution kernel",
    )  # fmt: skip


def _fentry() -> Check:
    try:
        function = kernel_types().functions(["tcp_conn_request"]).get("tcp_conn_request")
    except SurroundingsError:
        function = None
    if function is None:
        return Check("fentry", LIMITED, "not possible without BTF", "use a kernel with CONFIG_DEBUG_INFO_BTF")
    reason = fentry_refusal(function.type_id)
    if not reason:
        return Check("fentry", OK, "available")
    return Check(
        "fentry", LIMITED, f"the kernel refuses fentry programs ({reason})",
        "use a kernel with CONFIG_FUNCTION_TRACER and CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS",
    )  # fmt: skip


def _headers() -> Check:
    build = Path(f"/lib/modules/{platform.release()}/build")
    found = "installed" if build.exists() else "not installed"
    return Check("kernel headers", OK, f"{found}; not needed")
