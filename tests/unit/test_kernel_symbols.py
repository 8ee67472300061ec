"""The kernel's functions, read from a list like /proc/kallsyms."""

from __future__ import annotations

from pathlib import Path

import pytest

from stallscope.tracer.capture.kernel_symbols import KernelSymbols

KALLSYMS = """\
ffffffff81000200 T schedule
ffffffff81000100 t __schedule.constprop.0
ffffffff81000300 D some_data
ffffffff81000400 W weak_function
ffffffffc0000000 t ext4_sync_file\t[ext4]
"""


@pytest.fixture
def symbols(tmp_path: Path) -> KernelSymbols:
    path = tmp_path / "kallsyms"
    path.write_text(KALLSYMS)
    return KernelSymbols(path)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (0xFFFFFFFF81000100, "__schedule"),
        (0xFFFFFFFF810001FF, "__schedule"),
        (0xFFFFFFFF81000200, "schedule"),
        (0xFFFFFFFF81000350, "schedule"),
        (0xFFFFFFFF81000400, "weak_function"),
        (0xFFFFFFFFC0000010, "ext4_sync_file"),
        (0xFFFFFFFF81000000, ""),
        (0, ""),
    ],
)
def test_an_address_is_in_the_function_before_it(symbols: KernelSymbols, address: int, name: str) -> None:
    assert symbols.at(address) == name


def test_a_list_that_is_hidden_names_nothing(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.write_text("".join(f"{0:016x} T {name}\n" for name in ("schedule", "sys_read")))
    assert KernelSymbols(hidden).at(0xFFFFFFFF81000200) == ""
    assert KernelSymbols(tmp_path / "missing").at(0xFFFFFFFF81000200) == ""
