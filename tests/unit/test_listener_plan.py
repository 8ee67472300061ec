"""How the listener's hooks are chosen, on kernels that the test makes up."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from stallscope.tracer.capture import listener
from stallscope.tracer.capture.btf import KernelFunction
from stallscope.tracer.capture.listener import (
    EVENTS,
    FENTRY_RUNG,
    HOOKS,
    KPROBE_RUNG,
    MAX_FENTRY_ARGUMENTS,
    ListenerPlan,
    listener_probes,
    plan_listener,
)
from stallscope.tracer.errors import SurroundingsError
from stallscope.tracer.layout import header_text
from stallscope.tracer.manifest import LISTENER

ARGUMENTS = {hook.function: 2 for hook in HOOKS} | {"tcp_conn_request": 6, "tcp_check_req": 7}
ADDRESS = 0xFFFFFFFFB639EB60
PROGRAM = files("stallscope.probes").joinpath("listener.bpf.c").read_text(encoding="utf-8")


class Types:
    """A kernel's types, without any member whose path is in ``lacks``."""

    def __init__(self, arguments: dict[str, int], lacks: Iterable[str] = ()) -> None:
        self._arguments = arguments
        self._lacks = set(lacks)

    def functions(self, names: Iterable[str]) -> dict[str, KernelFunction]:
        return {name: KernelFunction(100, self._arguments[name]) for name in names if name in self._arguments}

    def offsets(self, paths: Iterable[str]) -> dict[str, int]:
        return self._numbered(paths)

    def enumerators(self, names: Iterable[str]) -> dict[str, int]:
        return self._numbered(names)

    def _numbered(self, names: Iterable[str]) -> dict[str, int]:
        wanted = list(names)
        for name in wanted:
            if name in self._lacks:
                raise SurroundingsError(f"this kernel's types have no {name}; please report the kernel's version")
        return {name: number for number, name in enumerate(wanted)}


class Kernel:
    """What ``plan_listener`` looks at; the test changes it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._symbols = folder / "kallsyms"
        self._kprobes = folder / "kprobe"
        self._kprobes.mkdir()
        monkeypatch.setattr(listener, "KPROBES", self._kprobes)
        monkeypatch.setattr(listener, "KALLSYMS", self._symbols)
        self.refuses_fentry("")
        self.has(ARGUMENTS)
        self.shows(f"ffffffffb6000000 T tcp_v4_connect\n{ADDRESS:016x} D __per_cpu_offset\n")

    def has(self, arguments: dict[str, int], lacks: Iterable[str] = ()) -> None:
        self._monkeypatch.setattr(listener, "kernel_types", lambda: Types(arguments, lacks))

    def shows(self, symbols: str) -> None:
        self._symbols.write_text(symbols)

    def refuses_fentry(self, reason: str) -> None:
        self._monkeypatch.setattr(listener, "load_trial", lambda *_: reason)

    def has_no_kprobes(self) -> None:
        self._kprobes.rmdir()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def flags_of(plan: ListenerPlan) -> dict[str, str]:
    """Return the defined names and their values."""
    flags = plan.flags(4, "fentry_", "fexit_")
    found = dict(re.fullmatch(r"-D(\w+)=(\S+)", flag).groups() for flag in flags)  # type: ignore[union-attr]
    assert len(found) == len(flags), "each name once"
    return found


def test_fentry_is_chosen_where_the_trampoline_can_pass_the_arguments(kernel: Kernel) -> None:
    plan = plan_listener()
    assert plan.rungs == dict.fromkeys(ARGUMENTS, FENTRY_RUNG) | {"tcp_check_req": KPROBE_RUNG}
    assert plan.arguments == ARGUMENTS
    assert plan.missing == ()
    assert [hook.function for hook in plan.hooks()] == [hook.function for hook in HOOKS]


def test_a_kernel_that_refuses_fentry_gets_kprobes(kernel: Kernel) -> None:
    kernel.refuses_fentry("Unknown error 524")
    assert set(plan_listener().rungs.values()) == {KPROBE_RUNG}


def test_a_kernel_with_neither_is_told_before_anything_is_read(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.refuses_fentry("Operation not permitted")
    kernel.has_no_kprobes()
    monkeypatch.setattr(listener, "kernel_types", lambda: pytest.fail("read"))
    with pytest.raises(SurroundingsError, match="this kernel has neither kprobes nor fentry"):
        plan_listener()


def test_a_function_that_is_not_there_is_left_out(kernel: Kernel) -> None:
    kernel.has({name: count for name, count in ARGUMENTS.items() if name != "cookie_v6_check"})
    plan = plan_listener()
    assert plan.missing == ("cookie_v6_check",)
    assert "cookie_v6_check" not in [hook.function for hook in plan.hooks()]
    assert flags_of(plan)["USES_FENTRY_cookie_v6_check"] == "0"


def test_nothing_goes_without_the_function_at_the_syn(kernel: Kernel) -> None:
    kernel.has({name: count for name, count in ARGUMENTS.items() if name != "tcp_conn_request"})
    with pytest.raises(SurroundingsError, match="this kernel's types do not list tcp_conn_request"):
        plan_listener()


@pytest.mark.parametrize("name", ["sock_common.skc_cookie", "net.mib.net_statistics", "LINUX_MIB_LISTENOVERFLOWS"])
def test_a_member_that_is_not_there_is_named(kernel: Kernel, name: str) -> None:
    kernel.has(ARGUMENTS, lacks=[name])
    with pytest.raises(SurroundingsError, match=f"this kernel's types have no {name}"):
        plan_listener()


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        ("ffffffffb6000000 T tcp_v4_connect\n", "has no __per_cpu_offset; use a kernel with CONFIG_KALLSYMS_ALL"),
        ("0000000000000000 D __per_cpu_offset\n", "hides addresses; run as root and set kernel.kptr_restrict below 2"),
        ("ffffffffb6000000 r __ksymtab___per_cpu_offset\n", "has no __per_cpu_offset"),
    ],
)
def test_a_kernel_that_hides_its_addresses_says_so(kernel: Kernel, symbols: str, message: str) -> None:
    kernel.shows(symbols)
    with pytest.raises(SurroundingsError, match=message):
        plan_listener()


def test_the_flags_hold_all_that_the_program_asks_for(kernel: Kernel) -> None:
    plan = plan_listener()
    flags = flags_of(plan)
    for hook in HOOKS:
        fentry = plan.rungs[hook.function] == FENTRY_RUNG
        assert flags[f"USES_FENTRY_{hook.function}"] == str(int(fentry))
        assert flags[f"ARGUMENTS_{hook.function}"] == str(ARGUMENTS[hook.function])
        assert flags[f"ENTER_{hook.function}"] == ("fentry_" if fentry else "enter_") + hook.function
        assert flags[f"RETURN_{hook.function}"] == ("fexit_" if fentry else "return_") + hook.function
        assert bool(re.search(rf"\bON_ENTRY\({hook.function},", PROGRAM)) == hook.on_entry
        assert bool(re.search(rf"\bON_RETURN\({hook.function},", PROGRAM)) == hook.on_return
    assert int(flags["PER_CPU_OFFSETS"].removesuffix("ULL")) == ADDRESS
    assert flags["PROBE_LISTENER"] == "4"
    for path, offset in plan.offsets.items():
        name = path.replace(".", "_").upper()
        assert flags[name] == str(offset)
        assert re.search(rf"\b{name}\b", PROGRAM), f"{name} is used"
    for stretch in ("VERDICT", "FULL"):
        first, count = int(flags[f"{stretch}_FIRST"]), int(flags[f"{stretch}_COUNTERS"])
        read = set(re.findall(rf"{stretch}_GAINED\((LINUX_MIB_\w+)\)", PROGRAM))
        assert {plan.numbers[name] for name in read} <= set(range(first, first + count)), "all lie in what is read"
        assert {first, first + count - 1} <= {plan.numbers[name] for name in read}, "and no more is read"
    for name in plan.numbers:
        assert re.search(rf"\b{name}\b", PROGRAM), f"{name} is used"


def test_a_limit_is_that_of_a_tenth_of_a_second(kernel: Kernel) -> None:
    plan = replace(plan_listener(), events_per_second=500)
    assert flags_of(plan)["LISTENER_EVENTS_PER_WINDOW"] == "50"


def test_the_next_rung_is_kprobe_for_those_that_failed_only(kernel: Kernel) -> None:
    plan = plan_listener()
    next_plan = plan.without_fentry(["tcp_conn_request"])
    changed = {name for name, rung in next_plan.rungs.items() if rung != plan.rungs[name]}
    assert changed == {"tcp_conn_request"}
    assert next_plan.rungs["tcp_conn_request"] == KPROBE_RUNG
    assert replace(next_plan, rungs=plan.rungs) == plan
    assert set(plan.without_fentry(list(plan.rungs)).rungs.values()) == {KPROBE_RUNG}


def test_more_arguments_than_a_trampoline_passes_are_for_kprobes(kernel: Kernel) -> None:
    kernel.has(dict.fromkeys(ARGUMENTS, MAX_FENTRY_ARGUMENTS + 1))
    assert set(plan_listener().rungs.values()) == {KPROBE_RUNG}


def test_every_event_of_the_header_has_a_name_and_a_probe(kernel: Kernel) -> None:
    text = re.search(r"enum listener_event \{(.*?)\};", header_text(), re.DOTALL)
    assert text is not None
    names = re.findall(r"\b([A-Z_]+),", text[1])
    assert names[-1] == "LISTENER_EVENTS"
    assert len(names) - 1 == len(EVENTS) == len(set(EVENTS))
    probes = listener_probes(4, plan_listener())
    assert [(probe.id, probe.name, probe.kind) for probe in probes] == [
        (4 + index, name, LISTENER) for index, name in enumerate(EVENTS)
    ]
    assert {probe.rung for probe in probes} == {"fentry and kprobe"}
