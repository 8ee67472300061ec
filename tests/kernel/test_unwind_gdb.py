"""Stacks of real servers at random places, unwound, against gdb's backtraces of the same places."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from gdb_places import busy_server, compare, visit
from lab import LabError
from lab.server import find_server

from stallscope.tracer.unwind.registers import RED_ZONE_BYTES

PLACES = 41
DEBIAN = "/usr/bin/redis-server"
# Redis 7.0 puts IOV_MAX (1,024) struct iovec of 16 bytes on the stack to answer (networking.c, _writevToClient).
COPIED_BYTES = {"2.8.17": 16 * 1024, "5.0.6": 16 * 1024, DEBIAN: 24 * 1024}

pytestmark = [
    pytest.mark.skipif(shutil.which("gdb") is None, reason="requires gdb"),
    pytest.mark.skipif(os.geteuid() != 0, reason="requires root, to stop a server"),
]


@pytest.mark.parametrize("build", COPIED_BYTES)
def test_all_frames_are_those_of_gdb(build: str) -> None:
    try:
        find_server(build)
    except LabError as error:
        pytest.skip(str(error))
    with busy_server(build, seed=17) as server:
        places = visit(server, PLACES, seed=17)
    assert len({frames[0].address for frames in places.frames}) > PLACES // 4
    for below in (0, RED_ZONE_BYTES):
        found = compare(places, copied_bytes=COPIED_BYTES[build], below=below)
        assert found.differences == []
        assert (found.places, found.equal, found.to_main) == (PLACES, PLACES, PLACES)
        assert found.frames > 5 * PLACES
        # Debian's server has no .symtab: a function that is not exported has no name, or gdb's.
        assert found.names_compared > found.frames // 2
        assert not found.wrong_names, Path(build).name
