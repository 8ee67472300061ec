"""Every instruction of small programs, unwound, against a shadow stack kept while stepping through them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import single_step

from stallscope.tracer.unwind.registers import RED_ZONE_BYTES
from stallscope.tracer.unwind.unwinder import Ended, Unwinder

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="requires gcc"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="requires x86-64"),
]
SOURCE = Path(__file__).with_name("targets") / "stepped.c"
COPIED_BYTES = 8 * 1024
LIMIT = 40_000
AT_ONCE = 2000


@pytest.mark.parametrize(
    ("options", "misled"),
    [
        ("-O2 -fomit-frame-pointer", {}),
        ("-O2 -fomit-frame-pointer -no-pie -fcf-protection", {}),
        # gcc says that rbp is still in the frame after the epilogue has popped it, for two instructions. A caller
        # that is found through rbp is then lost.
        ("-O0", {"realigned": 2}),
        # Stubs without unwind rules, and the functions they lead to chosen at the start.
        ("-O3 -static", {}),
    ],
)
def test_every_instruction_unwinds_to_its_callers(tmp_path: Path, options: str, misled: dict[str, int]) -> None:
    program = tmp_path / "stepped"
    subprocess.run(["gcc", "-o", program, SOURCE, "-Wl,-z,lazy", *options.split()], check=True)
    steps = stepped(program)
    for below in (RED_ZONE_BYTES, 0):
        assert unwind_and_compare(steps, below) == misled


def stepped(program: Path) -> single_step.Steps:
    try:
        steps = single_step.run(program, size=COPIED_BYTES, below=RED_ZONE_BYTES, limit=LIMIT)
    except OSError as error:
        pytest.skip(f"requires ptrace: {error}")
    assert len(steps.truth) > 4000
    return steps


def unwind_and_compare(steps: single_step.Steps, below: int) -> Counter[str]:
    """Return at how many instructions of each function the unwinder and the shadow stack differ."""
    unwinder = Unwinder(steps.mappings, steps.images)
    stacks, lengths = steps.stacks[:, RED_ZONE_BYTES - below :], steps.lengths - RED_ZONE_BYTES + below
    wrong: Counter[str] = Counter()
    seen: set[str] = set()
    for first in range(0, len(steps.truth), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        found = unwinder.unwind(steps.registers[part], stacks[part], lengths[part], below=below)
        chains = found.places.tolist()
        places = np.unique(found.places[found.places != 0])
        names = dict(zip(places.tolist(), (str(frame) for frame in unwinder.frames(places)), strict=True))
        seen |= set(names.values())
        for row, (truth, exact) in enumerate(zip(steps.truth[part], steps.exact[part], strict=True)):
            chain = [names[place] for place in chains[row][: found.depth[row]]]
            if chain[0] == "__longjmp" and chain[1] == "jumps":
                # As libc declares it: once the target's registers are loaded, the target is the caller.
                assert truth[0] == found.addresses[row, 0]
            elif (
                found.addresses[row, : len(truth)].tolist() != truth
                or found.ended[row] != Ended.REACHED_END
                or np.flatnonzero(found.is_exact[row]).tolist() != exact
                or chain[-1] != "_start"
                or "main" not in chain
            ):
                wrong[chain[0]] += 1
    assert seen >= EVERYWHERE
    return wrong


EVERYWHERE = {
    "leaf",
    "saves_all",
    "recursive",
    "with_alloca",
    "realigned",
    "ascending",
    "on_signal",
    "leaves",
    "jumps",
    "rarely",
    "main",
    "_start",
}
