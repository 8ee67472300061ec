"""The loaded programs of the listener: attached once, told which sockets to watch."""

from __future__ import annotations

import numpy as np

from stallscope.tracer.capture.bcc_library import tracing_prefixes
from stallscope.tracer.capture.bpf import BpfMap, attach_kprobe, attach_tracing
from stallscope.tracer.capture.listener import EVENTS, FENTRY_RUNG, Hook, ListenerPlan
from stallscope.tracer.capture.loaded_programs import LoadedPrograms, join_sources
from stallscope.tracer.capture.loader import KPROBE, TRACING, Loader
from stallscope.tracer.capture.probe_ids import FIRST_LISTENER_PROBE
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.layout import struct_dtype
from stallscope.tracer.manifest import ListenerInfo

LISTENER_PROBES = range(FIRST_LISTENER_PROBE, FIRST_LISTENER_PROBE + len(EVENTS))

COUNTED = ("ListenOverflows", "ListenDrops", "TCPReqQFullDoCookies")
"""Members of ``struct counted_requests`` (event.h) by the kernel's names, in its order."""

_U64 = np.dtype("<u8")
_MAX_LISTENERS = 1024
_MAX_NAMESPACES = 256
_MAX_WAITING = 65536
"""Connections followed from the enqueue to accept(), all listeners together; beyond, the oldest is forgotten."""


class ListenerProgram(LoadedPrograms):
    """Every connection request to the watched listeners becomes a record.

    Attributes:
        plan: the rungs in force, after any that failed was replaced by the next.
        failures: what could not be attached, one line each.
    """

    def __init__(self, plan: ListenerPlan, *, ring_bytes: int, loader: Loader | None = None) -> None:
        """Compile, load and attach; a function whose fentry fails is hooked by kprobe.

        Raises:
            SurroundingsError: nothing can be hooked at the SYN, without which there is nothing to count.
        """
        self.plan = plan
        self.failures: list[str] = []
        self._load(ring_bytes, loader)
        refused = self._attach()
        if any(plan.rungs[hook.function] == FENTRY_RUNG for hook in refused):
            self.close()
            self.plan = plan.without_fentry([hook.function for hook in refused])
            self.failures.clear()
            self._load(ring_bytes, None)
            refused = self._attach()
        for hook in refused:
            if hook.required:
                self.close()
                raise SurroundingsError(self.failures[0])

    def watch(self, listener: ListenerInfo) -> None:
        """Report what happens to this listener's connection requests from now on.

        Raises:
            SurroundingsError: too many are watched already.
        """
        value = np.zeros(1, struct_dtype("watched_listener"))
        value["index"], value["pid"] = listener.index, listener.pid
        try:
            self._listeners.update(listener.cookie, value[0])
        except OSError as error:
            raise SurroundingsError(
                f"{listener.address} is only sampled, not seen request by request: {_MAX_LISTENERS} listeners are "
                "watched already"
            ) from error

    def unwatch(self, listener: ListenerInfo) -> None:
        """Make room for another listener; one that is not watched is fine."""
        self._listeners.delete(listener.cookie)

    def counted_requests(self, *, watched: bool) -> dict[int, dict[str, int]]:
        """Return what the hooked functions added to the kernel's counters since they were attached.

        Args:
            watched: of the listeners that are watched, or of all others.

        Returns:
            Counts by the kernel's name of the counter, by inode of the network namespace; namespaces
            where nothing was refused are left out.
        """
        return {
            int(whose["namespace"]): dict(zip(COUNTED, map(int, counts[0].item()), strict=True))
            for whose, counts in self._counted_requests.items()
            if bool(whose["watched"]) == watched
        }

    def _load(self, ring_bytes: int, loader: Loader | None) -> None:
        fentry, fexit = tracing_prefixes()
        flags = [
            *self.plan.flags(FIRST_LISTENER_PROBE, fentry, fexit),
            f"-DMAX_LISTENERS={_MAX_LISTENERS}",
            f"-DMAX_NAMESPACES={_MAX_NAMESPACES}",
            f"-DMAX_WAITING={_MAX_WAITING}",
        ]
        programs = {}
        for hook in self.plan.hooks():
            kind = TRACING if self.plan.rungs[hook.function] == FENTRY_RUNG else KPROBE
            if hook.on_entry:
                programs[self._name(hook, is_return=False)] = kind
            if hook.on_return:
                programs[self._name(hook, is_return=True)] = kind
        super().__init__(
            join_sources(["listener.bpf.c"]), flags, programs, ["listeners", "counted_requests"],
            ring_bytes=ring_bytes, loader=loader,
        )  # fmt: skip
        fds = self._loaded.maps
        self._listeners = BpfMap(fds["listeners"], _U64, struct_dtype("watched_listener"))
        self._counted_requests = BpfMap(
            fds["counted_requests"], struct_dtype("requests_of"), struct_dtype("counted_requests")
        )

    def _attach(self) -> list[Hook]:
        """Attach every hook, returns before entries; returns those that failed."""
        refused = []
        for hook in self.plan.hooks():
            try:
                for is_return in (True, False):
                    if hook.on_return if is_return else hook.on_entry:
                        self._attach_one(hook, is_return=is_return)
            except SurroundingsError as error:
                refused.append(hook)
                self.failures.append(str(error))
        return refused

    def _attach_one(self, hook: Hook, *, is_return: bool) -> None:
        program = self.program(self._name(hook, is_return=is_return))
        if self.plan.rungs[hook.function] == FENTRY_RUNG:
            self._keep(attach_tracing(program, hook.function))
        else:
            self._keep(attach_kprobe(program, hook.function, is_return=is_return))

    def _name(self, hook: Hook, *, is_return: bool) -> str:
        """Return the name of a hook's program in the compiled source, as ``ListenerPlan.flags`` gave it."""
        if self.plan.rungs[hook.function] == FENTRY_RUNG:
            return tracing_prefixes()[is_return] + hook.function
        return ("return_" if is_return else "enter_") + hook.function
