"""Damaged unwind rules and arbitrary stacks end in an answer, and one line about the file."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stallscope.tracer.unwind.code import CodeImage, CodeMapping
from stallscope.tracer.unwind.registers import REGISTER_COUNT, RIP, RSP
from stallscope.tracer.unwind.unwinder import MAX_FRAMES, Ended, Unwinder

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="requires gcc"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="requires x86-64"),
]
SOURCE = Path(__file__).with_name("targets") / "stepped.c"
BASE, STACK = 0x5555_0000_0000, 0x7FFF_0000_0000


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "stepped"
    # rules are kept by build-id: with one, only the first damage would be read, and whoever comes later would get it
    subprocess.run(["gcc", "-O2", "-Wl,--build-id=none", "-o", path, SOURCE], check=True)
    return path


@cache
def section_of(program: Path, name: str) -> tuple[int, int, int]:
    """Return the address, the offset in the file and the size of a section."""
    listing = subprocess.run(["readelf", "-SW", program], check=True, capture_output=True, text=True).stdout
    parts = next(line.partition("]")[2].split() for line in listing.splitlines() if f" {name} " in line)
    address, offset, size = (int(part, 16) for part in parts[2:5])
    return address, offset, size


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_rules(program: Path, data: st.DataObject) -> None:
    content = bytearray(program.read_bytes())
    _, offset, size = section_of(program, ".eh_frame")
    for _ in range(data.draw(st.integers(1, 8))):
        at = offset + data.draw(st.integers(0, size - 1))
        content[at] = data.draw(st.integers(0, 255))
    image = CodeImage.from_bytes(bytes(content), "stepped")
    unwind_anything(program, image, data.draw(st.integers(0, 2**32)))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_arbitrary_stacks(program: Path, seed: int) -> None:
    unwind_anything(program, CodeImage.from_file(str(program)), seed)


def unwind_anything(program: Path, image: CodeImage, seed: int) -> None:
    """Unwind stacks full of addresses of code and of the stack, from places all over the code."""
    random = np.random.default_rng(seed)
    address, offset, size = section_of(program, ".text")
    mapping = CodeMapping(BASE + address, BASE + address + size, offset, "stepped", "")
    unwinder = Unwinder([mapping], {"stepped": image})
    registers = STACK + random.integers(0, 512, (20, REGISTER_COUNT)).astype(np.uint64)
    registers[:, RSP] = STACK
    registers[:, RIP] = mapping.start + random.integers(0, size, 20).astype(np.uint64)
    words = np.where(
        random.random((20, 128)) < 0.7,
        mapping.start + random.integers(0, size, (20, 128)),
        STACK + random.integers(-64, 1100, (20, 128)),
    ).astype(np.uint64)
    found = unwinder.unwind(registers, words.view(np.uint8), random.integers(0, 1200, 20))
    assert len(unwinder.problems) <= 1
    assert "\n" not in "".join(unwinder.problems)
    assert set(found.ended.tolist()) <= set(Ended)
    assert ((found.depth >= 1) & (found.depth <= MAX_FRAMES)).all()
    assert ((found.addresses != 0).sum(axis=1) == found.depth).all()
    assert len(unwinder.frames(found.places[found.places != 0])) == found.depth.sum()
