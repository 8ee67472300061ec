"""The kernel's side of a listener: which functions are hooked how, on this kernel.

Kernel differences live here. ``inet_csk_accept`` takes 4 arguments on 6.1 and 2 on 6.12: so leading arguments
only, and the number of arguments from BTF. A kprobe's program does not run, and nobody is told, while this CPU
is in a bpf(2) call that reads a map, or in another kprobe: a storm may lose a few events to it, fentry none.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stallscope.probes.catalogue import Field
from stallscope.tracer.capture.bpf import load_trial
from stallscope.tracer.capture.btf import kernel_types
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.manifest import LISTENER, ProbeInfo

KPROBES = Path("/sys/bus/event_source/devices/kprobe")
KALLSYMS = Path("/proc/kallsyms")

MAX_FENTRY_ARGUMENTS = 6
"""A BPF trampoline passes no more on x86-64 before Linux commit 473e3150e30a, v6.6."""

EVENTS_PER_SECOND = 20_000
"""Rate limit of each kind of listener event on each CPU; what exceeds it is counted, not sent."""


@dataclass(frozen=True)
class Hook:
    """A kernel function: whether its entry and its return are hooked, and whether there is anything without it."""

    function: str
    on_entry: bool = True
    on_return: bool = True
    required: bool = False


HOOKS = (
    Hook("tcp_conn_request", required=True),
    Hook("tcp_check_req"),
    Hook("cookie_v4_check"),
    Hook("cookie_v6_check"),
    Hook("inet_csk_complete_hashdance"),
    Hook("inet_csk_reqsk_queue_add", on_return=False),
    Hook("inet_csk_accept", on_entry=False),
)

EVENTS = (
    "SYN taken",
    "SYN refused: accept queue full",
    "SYN refused: SYN queue full",
    "SYN refused otherwise",
    "SYN cookie sent",
    "third ACK refused silently: accept queue full",
    "third ACK refused with RST: accept queue full",
    "cookie ACK refused: accept queue full",
    "third ACK refused otherwise",
    "connection enqueued",
    "connection accepted",
)
"""Names of ``enum listener_event`` (event.h), in its order."""

FIELDS = (
    Field("queue_length", "connections", slot=0, bits=24),
    Field("queue_limit", "connections", slot=0, shift=24, bits=24),
    Field("peer_port", "port", slot=0, shift=48, bits=16),
    Field("peer_high", "upper half of the IPv6 address", slot=1),
    Field("peer_low", "lower half of the IPv6 address", slot=2),
)
"""What the values of a listener event mean; ``tid`` is the listener's index, ``stack`` the SYN queue's length."""

_MEMBERS = (
    "sock.sk_ack_backlog",
    "sock.sk_max_ack_backlog",
    "sock_common.skc_cookie",
    "sock_common.skc_net",
    "sock_common.skc_family",
    "sock_common.skc_dport",
    "sock_common.skc_daddr",
    "sock_common.skc_v6_daddr",
    "inet_connection_sock.icsk_accept_queue.qlen",
    "sk_buff.head",
    "sk_buff.network_header",
    "sk_buff.transport_header",
    "sk_buff.protocol",
    "net.ns.inum",
    "net.mib.net_statistics",
    "linux_mib.mibs",
    "iphdr.saddr",
    "ipv6hdr.saddr",
    "tcphdr.source",
)

_STRETCHES = {
    "VERDICT": (
        "LINUX_MIB_LISTENOVERFLOWS",
        "LINUX_MIB_LISTENDROPS",
        "LINUX_MIB_SYNCOOKIESSENT",
        "LINUX_MIB_EMBRYONICRSTS",
    ),
    "FULL": ("LINUX_MIB_TCPREQQFULLDROP", "LINUX_MIB_TCPREQQFULLDOCOOKIES"),
}
"""The counters read, by the stretch they are read in (listener.bpf.c).

Linux include/uapi/linux/snmp.h; their numbers differ between kernels (19, 20, 21 or 23 for the first).
"""

# Linux include/uapi/linux/bpf.h: enum bpf_prog_type, enum bpf_attach_type
_PROG_TRACING, _ATTACH_FENTRY = 26, 24

KPROBE_RUNG, FENTRY_RUNG = "kprobe", "fentry"


@dataclass(frozen=True)
class ListenerPlan:
    """How the listener is hooked on this kernel.

    Attributes:
        rungs: ``fentry`` or ``kprobe`` by function, for those that this kernel has.
        arguments: number of arguments by function, from BTF.
        offsets: byte offset by member path.
        numbers: numbers of the kernel's counters, and the address of its table of per-CPU offsets.
        missing: functions this kernel's types do not list.
        events_per_second: limit of each kind of event on each CPU.
    """

    rungs: Mapping[str, str]
    arguments: Mapping[str, int]
    offsets: Mapping[str, int]
    numbers: Mapping[str, int]
    missing: tuple[str, ...]
    events_per_second: int = EVENTS_PER_SECOND

    def flags(self, first_probe: int, fentry_prefix: str, fexit_prefix: str) -> list[str]:
        """Return the compiler flags of listener.bpf.c.

        Args:
            first_probe: probe id of the first listener event.
            fentry_prefix, fexit_prefix: what bcc wants before the function in the name of a tracing program.
        """
        flags = [f"-D{path.replace('.', '_').upper()}={offset}" for path, offset in self.offsets.items()]
        flags += [f"-D{name}={number}ULL" for name, number in self.numbers.items()]
        for stretch, names in _STRETCHES.items():
            first, last = (pick(self.numbers[name] for name in names) for pick in (min, max))
            flags += [f"-D{stretch}_FIRST={first}", f"-D{stretch}_COUNTERS={last - first + 1}"]
        flags += [f"-DPROBE_LISTENER={first_probe}", f"-DLISTENER_EVENTS_PER_WINDOW={self.events_per_second // 10}"]
        for hook in HOOKS:
            name = hook.function
            fentry = self.rungs.get(name) == FENTRY_RUNG
            flags += [
                f"-DUSES_FENTRY_{name}={int(fentry)}",
                f"-DARGUMENTS_{name}={self.arguments.get(name, 0)}",
                f"-DENTER_{name}={fentry_prefix if fentry else 'enter_'}{name}",
                f"-DRETURN_{name}={fexit_prefix if fentry else 'return_'}{name}",
            ]
        return flags

    def hooks(self) -> list[Hook]:
        """Return the hooks this kernel has."""
        return [hook for hook in HOOKS if hook.function in self.rungs]

    def without_fentry(self, functions: Sequence[str]) -> ListenerPlan:
        """Return the plan with these functions on the next rung, kprobe."""
        rungs = {name: KPROBE_RUNG if name in functions else rung for name, rung in self.rungs.items()}
        return replace(self, rungs=rungs)


def plan_listener() -> ListenerPlan:
    """Return how the listener is hooked on this kernel.

    Raises:
        SurroundingsError: the kernel has no BTF, a member is missing from it, it has neither fentry nor kprobes,
            or hides its addresses.
    """
    if not may_be_hooked():
        raise SurroundingsError("this kernel has neither kprobes nor fentry")
    types = kernel_types()
    known = types.functions(hook.function for hook in HOOKS)
    missing = tuple(hook.function for hook in HOOKS if hook.function not in known)
    for hook in HOOKS:
        if hook.required and hook.function in missing:
            raise SurroundingsError(f"this kernel's types do not list {hook.function}")
    fentry = not fentry_refusal(known["tcp_conn_request"].type_id)
    rungs = {
        name: FENTRY_RUNG if fentry and function.arguments <= MAX_FENTRY_ARGUMENTS else KPROBE_RUNG
        for name, function in known.items()
    }
    arguments = {name: function.arguments for name, function in known.items()}
    counters = types.enumerators(name for names in _STRETCHES.values() for name in names)
    numbers = {**counters, "PER_CPU_OFFSETS": _address_of("__per_cpu_offset")}
    return ListenerPlan(rungs, arguments, types.offsets(_MEMBERS), numbers, missing)


def may_be_hooked() -> bool:
    """Return whether this kernel has kprobes or fentry at all; asked before anything is read or compiled."""
    return KPROBES.is_dir() or not fentry_refusal()


def fentry_refusal(function_id: int = 0) -> str:
    """Return why the kernel refuses fentry programs, "" when it takes them.

    Args:
        function_id: BTF id of a function to try it on. Without one only a kernel that refuses all of them is
            told apart, at no cost: any other complains of the id.
    """
    reason = load_trial(_PROG_TRACING, _ATTACH_FENTRY, function_id)
    return reason if function_id or reason == os.strerror(errno.EPERM) else ""


def _address_of(symbol: str) -> int:
    """Return a kernel symbol's address.

    Raises:
        SurroundingsError: the kernel has no such symbol, or hides it from us.
    """
    try:
        match = re.search(rb"^([0-9a-f]+) \w %b$" % symbol.encode(), KALLSYMS.read_bytes(), re.MULTILINE)
    except OSError as error:
        raise SurroundingsError(f"cannot read {KALLSYMS}: {error.strerror}") from error
    if match is None:
        raise SurroundingsError(f"{KALLSYMS} has no {symbol}; use a kernel with CONFIG_KALLSYMS_ALL")
    address = int(match[1], 16)
    if not address:
        raise SurroundingsError(f"{KALLSYMS} hides addresses; run as root and set kernel.kptr_restrict below 2")
    return address


def listener_probes(first_probe: int, plan: ListenerPlan) -> list[ProbeInfo]:
    """Return the probe list's entries of the listener events."""
    rung = " and ".join(sorted(set(plan.rungs.values())))
    return [ProbeInfo(first_probe + index, name, LISTENER, rung, FIELDS) for index, name in enumerate(EVENTS)]
