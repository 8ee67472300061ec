"""How the event loop's system calls are seen, on kernels that the test makes up."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from stallscope.tracer.capture import event_loop
from stallscope.tracer.capture.btf import KernelFunction
from stallscope.tracer.capture.event_loop import SYSTEM_CALLS, TRACEPOINT_RUNG, plan_loop
from stallscope.tracer.capture.listener import FENTRY_RUNG, KPROBE_RUNG
from stallscope.tracer.errors import SurroundingsError

FUNCTIONS = {f"__x64_sys_{call}" for call in SYSTEM_CALLS}


class Kernel:
    """What ``plan_loop`` looks at; the test changes it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kprobes = folder / "kprobe"
        self.kprobes.mkdir()
        self.functions_known = set(FUNCTIONS)
        self.has_types = True
        self.refusal = ""
        self.refuses_all = ""
        monkeypatch.setattr(event_loop, "KPROBES", self.kprobes)
        monkeypatch.setattr(event_loop, "kernel_types", self._types)
        monkeypatch.setattr(
            event_loop, "fentry_refusal", lambda function=0: self.refusal if function else self.refuses_all
        )

    def _types(self) -> Kernel:
        if not self.has_types:
            raise SurroundingsError("this kernel has no BTF")
        return self

    def functions(self, names: Iterable[str]) -> dict[str, KernelFunction]:
        return {name: KernelFunction(7, 1) for name in names if name in self.functions_known}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def test_fentry_is_taken_where_it_can_be(kernel: Kernel) -> None:
    plan = plan_loop()
    assert (plan.rung, plan.calls, plan.reason) == (FENTRY_RUNG, tuple(SYSTEM_CALLS), "")


def test_kprobes_come_next(kernel: Kernel) -> None:
    kernel.refusal = "Invalid argument"
    plan = plan_loop()
    assert (plan.rung, plan.calls) == (KPROBE_RUNG, tuple(SYSTEM_CALLS))
    assert "Invalid argument" in plan.reason


def test_without_types_kprobes_take_the_calls_that_every_kernel_has(kernel: Kernel) -> None:
    kernel.has_types = False
    plan = plan_loop()
    assert plan.rung == KPROBE_RUNG
    assert set(SYSTEM_CALLS) - set(plan.calls) == {"epoll_pwait2"}


def test_without_either_it_is_raw_tracepoints(kernel: Kernel) -> None:
    kernel.kprobes.rmdir()
    kernel.refuses_all = "Operation not permitted"
    plan = plan_loop()
    assert (plan.rung, plan.calls) == (TRACEPOINT_RUNG, ())
    assert plan.reason == "this kernel has neither kprobes nor fentry"


def test_a_kernel_that_refuses_fentry_and_has_no_kprobes(kernel: Kernel) -> None:
    kernel.kprobes.rmdir()
    kernel.refusal = "Invalid argument"
    plan = plan_loop()
    assert plan.rung == TRACEPOINT_RUNG
    assert plan.reason == "the kernel refuses fentry programs (Invalid argument), and it has no kprobes"


def test_a_kernel_older_than_epoll_pwait2_is_hooked_without_it(kernel: Kernel) -> None:
    kernel.functions_known.remove("__x64_sys_epoll_pwait2")
    plan = plan_loop()
    assert plan.rung == FENTRY_RUNG
    assert "epoll_pwait2" not in plan.calls


@pytest.mark.parametrize("call", ["epoll_wait", "epoll_pwait", "accept", "accept4"])
def test_a_half_that_cannot_be_hooked_is_no_event_loop(kernel: Kernel, call: str) -> None:
    kernel.functions_known.remove(f"__x64_sys_{call}")
    plan = plan_loop()
    assert plan.rung == TRACEPOINT_RUNG
    assert f"__x64_sys_{call}" in plan.reason


def test_each_call_has_an_entry_and_a_return_and_returns_go_first(kernel: Kernel) -> None:
    places = plan_loop().programs("kfunc__", "kretfunc__")
    assert [is_return for *_, is_return, _ in places] == [True] * 5 + [False] * 5
    assert {function for _, function, _, _ in places} == FUNCTIONS
    assert all(name == ("kretfunc__" if is_return else "kfunc__") + function for _, function, is_return, name in places)
