"""A damaged ELF file ends in a SymbolError or in an answer: never in a traceback, a hang or a crash."""

import os
import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stallscope.tracer.capture.binary import open_binary
from stallscope.tracer.capture.dwarf import Dwarf
from stallscope.tracer.capture.symbols import Resolution, resolve
from stallscope.tracer.errors import SymbolError

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="requires gcc"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="requires x86-64"),
]

NAMES = ["serverCron", "clientsCronResizeQueryBuffer", "sdsRemoveFreeSpace", "main"]
SOURCE = """
#include <stdlib.h>
struct client { long id; char *querybuf; long lastinteraction; };
volatile long sink;
const char *banner(void) { return "redis_version:%s"; }
__attribute__((used)) long sdsRemoveFreeSpace(char *s) { return sink += (long)s; }
__attribute__((used)) long clientsCronResizeQueryBuffer(struct client *c) {
    return sdsRemoveFreeSpace(c->querybuf);
}
__attribute__((noinline)) int serverCron(struct client *c) { return clientsCronResizeQueryBuffer(c) + sink; }
int main(void) { return serverCron(calloc(1, 64)) + !banner(); }
"""


@pytest.fixture(scope="module", params=["-gdwarf-5", "-gdwarf-4 -gz -no-pie", "-gdwarf-2 -shared -fPIC"])
def image(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    source, binary = folder / "a.c", folder / "server"
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-O2", *request.param.split(), "-o", binary, source], check=True)
    content = binary.read_bytes()
    work = folder / "damaged"
    return work, content


def check(path):
    said = ""
    try:
        resolutions = resolve(path, NAMES, full=True)
        binary = open_binary(path)
        for name in ("sdsRemoveFreeSpace", "main"):
            Dwarf(binary.elf).inlined_at(name)
        assert all(isinstance(one, Resolution) for one in resolutions)
    except SymbolError as error:
        said = str(error)
    assert "\n" not in said
    assert not said or str(path) in said


COMMON = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
INTERESTING = [
    0,
    1,
    2,
    7,
    8,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]


@COMMON
@given(data=st.data())
def test_overwritten_bytes(image, data):
    path, content = image
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 12))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    check(path)


@COMMON
@given(data=st.data())
def test_headers_with_extreme_numbers(image, data):
    path, content = image
    damaged = bytearray(content)
    section_headers = int.from_bytes(content[40:48], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.sampled_from([0, 64, section_headers]))
        at = start + 4 * data.draw(st.integers(0, 400))
        width = data.draw(st.sampled_from([1, 2, 4, 8]))
        value = data.draw(st.sampled_from(INTERESTING)) & ((1 << 8 * width) - 1)
        if at + width <= len(damaged):
            damaged[at : at + width] = value.to_bytes(width, "little")
    path.write_bytes(damaged)
    check(path)


@COMMON
@given(data=st.data())
def test_damaged_sections_of_debug_information_and_symbols(image, data):
    path, content = image
    path.write_bytes(content)
    sections = [s for s in open_binary(path).elf.sections if s.size and s.type != "SHT_NOBITS" and s.offset]
    section = data.draw(st.sampled_from(sections))
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        at = section.offset + data.draw(st.integers(0, section.size - 1))
        if at < len(damaged):
            damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    check(path)


@COMMON
@given(data=st.data())
def test_moved_and_missing_parts(image, data):
    path, content = image
    cut = sorted(data.draw(st.lists(st.integers(0, len(content)), min_size=2, max_size=2)))
    path.write_bytes(content[: cut[0]] + content[cut[1] :])
    check(path)


@settings(max_examples=300, deadline=None)
@given(noise=st.binary(max_size=400))
def test_noise_after_a_good_start(tmp_path_factory, noise):
    path = tmp_path_factory.getbasetemp() / "noise"
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\x3e\x00\x01\x00\x00\x00" + noise)
    check(path)
