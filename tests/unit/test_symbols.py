"""Every answer of the resolver on small programs whose truth is known, because they are built here."""

import io
import json
import lzma
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from rich.console import Console

from stallscope.reports.probes import describe, render
from stallscope.tracer.capture import debugfiles
from stallscope.tracer.capture.binary import FileImage, open_binary, open_process
from stallscope.tracer.capture.dwarf import Dwarf
from stallscope.tracer.capture.elf import ElfFile
from stallscope.tracer.capture.symbols import resolve
from stallscope.tracer.errors import SymbolError, TargetError

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="requires gcc"),
    pytest.mark.skipif(shutil.which("objcopy") is None, reason="requires objcopy (binutils)"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="requires x86-64"),
]

NOINLINE = "__attribute__((noinline,noclone,used))"

# A server in miniature: the catalogue's call chain, and a function that only ends in the same name.
SERVER = f"""
#include <unistd.h>
#define VERSION "7.0.15"
struct client {{ long id; int flags; char *querybuf; long lastinteraction; char rest[100]; }};
volatile long sink;
const char *banner(void) {{ return "redis_version:%s"; }}
const char *version(void) {{ return VERSION; }}
{NOINLINE} long hi_sdsRemoveFreeSpace(char *s) {{ return sink += (long)s; }}
QUALIFIER long sdsRemoveFreeSpace(char *s) {{ sink += (long)s; sink *= 3; return sink; }}
QUALIFIER long clientsCronResizeQueryBuffer(struct client *c) {{
    return sdsRemoveFreeSpace(c->querybuf) + sink;
}}
{NOINLINE} long clientsCron(struct client *c) {{ return clientsCronResizeQueryBuffer(c) + sink; }}
{NOINLINE} int serverCron(struct client *c) {{ return clientsCron(c) + hi_sdsRemoveFreeSpace(0); }}
int (*volatile timer)(struct client *);
int main(int argc, char **argv) {{
    struct client c = {{0}};
    timer = serverCron;
    if (argc > 1) {{ write(1, "ready\\n", 6); pause(); }}
    return timer(&c) & (banner() == version());
}}
"""
CRON = ["serverCron", "clientsCron", "clientsCronResizeQueryBuffer", "sdsRemoveFreeSpace"]


def build(folder: Path, source: str, *options: str, name: str = "server") -> Path:
    code, binary = folder / f"{name}.c", folder / name
    code.write_text(source)
    subprocess.run(["gcc", "-o", binary, code, "-Wno-unused-result", *options], check=True, cwd=folder)
    return binary


def server(folder: Path, *options: str, name: str = "server", qualifier: str = NOINLINE) -> Path:
    return build(folder, SERVER, "-O1", f"-DQUALIFIER={qualifier}", *options, name=name)


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def address_of(binary: Path, symbol: str) -> int:
    listing = subprocess.run(["nm", str(binary)], check=True, capture_output=True, text=True).stdout
    return next(int(line.split()[0], 16) for line in listing.splitlines() if line.endswith(f" {symbol}"))


def offset_of(binary: Path, address: int) -> int:
    with binary.open("rb") as file:
        return next(iter(ELFFile(file).address_offsets(address)))


def statuses(resolutions) -> dict[str, str]:
    return {one.function: one.status for one in resolutions}


@pytest.mark.parametrize(
    "options",
    [
        ("-pie", "-fPIE"),
        ("-no-pie", "-fno-pie"),
        ("-no-pie", "-fno-pie", "-Wl,-Ttext-segment=0x10000000"),
        ("-pie", "-fPIE", "-Wl,-z,noseparate-code"),
        ("-pie", "-fPIE", "-Wl,--hash-style=gnu", "-fcf-protection=full"),
        ("-static",),
    ],
    ids=lambda options: " ".join(options),
)
def test_offsets_are_of_the_file_and_addresses_those_of_nm(tmp_path, options):
    binary = server(tmp_path, *options)
    for resolution in resolve(binary, CRON):
        (attachment,) = resolution.attachments
        assert resolution.status == "found"
        assert resolution.found_in == ".symtab"
        assert resolution.address == address_of(binary, resolution.function)
        assert attachment.offset == offset_of(binary, resolution.address)
        assert attachment.path == str(binary)


def test_build_id_is_that_of_the_file(tmp_path):
    binary = server(tmp_path, "-Wl,--build-id=0x0123456789abcdef")
    assert open_binary(binary).build_id == "0123456789abcdef"
    assert resolve(binary, ["serverCron"])[0].attachments[0].build_id == "0123456789abcdef"
    assert open_binary(server(tmp_path, "-Wl,--build-id=none", name="without")).build_id == ""


def test_a_name_that_ends_the_same_is_another_function(tmp_path):
    source = "int hi_sdsRemoveFreeSpace(void) { return 1; } int main(void) { return hi_sdsRemoveFreeSpace(); }"
    (resolution,) = resolve(build(tmp_path, source, "-O0"), ["sdsRemoveFreeSpace"])
    assert resolution.status == "missing"
    assert resolution.attachments == ()


def test_arguments_are_decoded_by_the_release_in_the_binary(tmp_path):
    binary = open_binary(server(tmp_path))
    assert (binary.server, binary.version) == ("redis", "7.0.15")
    decoders = {one.function: one.decoder for one in resolve(binary, CRON)}
    assert decoders["sdsRemoveFreeSpace"].kind == "sds"
    assert decoders["clientsCronResizeQueryBuffer"].params == (1, 0, 8, 48, 224, 1)
    told = resolve(binary, CRON, redis_version="2.8.17")
    assert told[3].decoder.kind == "sdshdr"
    assert told[2].decoder.params == (1, 8, 4, 40, 136, 0)


def test_valkey_s_own_release_counts_not_the_one_it_tells_clients(tmp_path):
    source = SERVER.replace('"redis_version:%s"', '"Valkey version=%s" "\\0" "7.2.4" "\\0" "8.0.1"')
    binary = open_binary(build(tmp_path, source.replace("QUALIFIER", NOINLINE), "-O1"))
    assert (binary.server, binary.version) == ("valkey", "8.0.1")
    trim, client = resolve(binary, ["sdsRemoveFreeSpace", "clientsCronResizeQueryBuffer"], redis_version="7.2.4")
    assert client.decoder.params == (1, 0, 8, 64, 280, 1)
    assert trim.status == "found"
    assert trim.instead == ("sdsRemoveFreeSpace", "sdsfree"), "idle buffers are freed since 8.0"
    assert "sdsfree" in trim.reason


def test_the_own_release_is_told_from_those_of_commands(tmp_path):
    strings = '"redis_version:%s" "\\0" "7.2.0" "\\0" "7.0.12" "\\0" "6.2.0" "\\0" "7.0.12vm-17902820560000000000"'
    binary = open_binary(build(tmp_path, f"const char *s = {strings}; int main(void) {{ return !s; }}"))
    assert binary.version == "7.0.12"


@pytest.mark.parametrize(
    "form", [("-gdwarf-4",), ("-gdwarf-5",), ("-gdwarf-5", "-gz"), ("-gdwarf-2", "-gstrict-dwarf")]
)
def test_offsets_of_the_client_come_from_debug_information(tmp_path, form):
    binary = server(tmp_path, *form)
    (resolution,) = resolve(binary, ["clientsCronResizeQueryBuffer"])
    assert resolution.decoder.params == (1, 0, 8, 16, 24, 1)
    members = Dwarf(ElfFile(str(binary))).members("client", "querybuf")
    assert members == {"id": 0, "flags": 8, "querybuf": 16, "lastinteraction": 24, "rest": 32}
    assert Dwarf(ElfFile(str(binary))).members("client", "no_such_member") == {}


def test_stripped_binary_with_a_debug_link_beside_it(tmp_path):
    binary = server(tmp_path, "-Wl,--build-id=none")
    wanted = {one.function: one.address for one in resolve(binary, CRON)}
    debug = tmp_path / "server.debug"
    run("objcopy", "--only-keep-debug", binary, debug)
    run("strip", binary)
    assert set(statuses(resolve(binary, CRON)).values()) == {"missing"}
    run("objcopy", f"--add-gnu-debuglink={debug}", binary)
    found = resolve(binary, CRON)
    assert {one.function: one.address for one in found} == wanted
    assert {one.found_in for one in found} == {f"debug file {debug}"}
    assert [one.attachments[0].offset for one in found] == [offset_of(binary, one.address) for one in found]


def test_a_debug_file_of_another_build_is_refused(tmp_path):
    binary = server(tmp_path, "-Wl,--build-id=none")
    debug = tmp_path / "server.debug"
    run("objcopy", "--only-keep-debug", binary, debug)
    run("strip", binary)
    run("objcopy", f"--add-gnu-debuglink={debug}", binary)
    debug.write_bytes(debug.read_bytes() + b"\0")
    assert set(statuses(resolve(binary, CRON)).values()) == {"missing"}


def test_debug_folder_by_build_id(tmp_path, monkeypatch):
    monkeypatch.setattr(debugfiles, "DEBUG_FOLDER", str(tmp_path / "debug"))
    binary = server(tmp_path, "-Wl,--build-id=0xabcdef")
    other = server(tmp_path, "-Wl,--build-id=0x123456", name="other")
    folder = tmp_path / "debug/.build-id/ab"
    folder.mkdir(parents=True)
    run("objcopy", "--only-keep-debug", other, folder / "cdef.debug")
    run("strip", binary)
    assert set(statuses(resolve(binary, CRON)).values()) == {"missing"}, "its build-id is another"
    run(
        "objcopy",
        "--only-keep-debug",
        server(tmp_path, "-Wl,--build-id=0xabcdef", name="again"),
        folder / "cdef.debug",
    )
    assert {one.found_in for one in resolve(binary, CRON)} == {f"debug file {folder}/cdef.debug"}


def test_mini_debug_info(tmp_path):
    binary = server(tmp_path)
    wanted = {one.function: one.address for one in resolve(binary, CRON)}
    mini = tmp_path / "mini"
    run(
        "objcopy",
        "-S",
        "--remove-section=.comment",
        *[f"--keep-symbol={name}" for name in CRON],
        binary,
        mini,
    )
    packed = tmp_path / "mini.xz"
    packed.write_bytes(lzma.compress(mini.read_bytes()))
    run("strip", binary)
    run("objcopy", f"--add-section=.gnu_debugdata={packed}", binary)
    found = resolve(binary, CRON)
    assert {one.function: one.address for one in found} == wanted
    assert {one.found_in for one in found} == {".gnu_debugdata"}


def test_exported_functions_of_a_stripped_server(tmp_path):
    binary = server(tmp_path, "-rdynamic")
    run("strip", binary)
    found = resolve(binary, CRON)
    assert {one.found_in for one in found} == {".dynsym"}
    assert set(statuses(found).values()) == {"found"}


CLONES = f"""
{NOINLINE} long first(void *c) __asm__("freeClient.constprop.0");
{NOINLINE} long second(void *c) __asm__("freeClient.constprop.1");
{NOINLINE} long frozen(void *c) __asm__("freeClient.constprop.0.cold");
{NOINLINE} long unlike(void *c) __asm__("freeClient.partly");
{NOINLINE} long part(void *c) __asm__("clientsCron.part.0");
{NOINLINE} long sra(char *s) __asm__("sdsRemoveFreeSpace.isra.0");
volatile long sink;
long first(void *c) {{ return sink += 1; }}
long second(void *c) {{ return sink += 2; }}
long frozen(void *c) {{ return sink += 3; }}
long unlike(void *c) {{ return sink += 4; }}
{NOINLINE} long clientsCronResizeQueryBuffer(void);
long part(void *c) {{ return clientsCronResizeQueryBuffer() + (sink += 5); }}
long sra(char *s) {{ return sink += 6; }}
{NOINLINE} long clientsCronResizeQueryBuffer(void) {{ return sra(0) + sink; }}
{NOINLINE} long clientsCron(void *c) {{ return c ? part(c) + 1 : 0; }}
{NOINLINE} long serverCron(void *c) {{ return clientsCron(c) + sink; }}
int main(int n, char **a) {{ return serverCron(a) + first(a) + second(a) + frozen(a) + unlike(a); }}
"""


def test_clones_are_probed_and_cold_parts_are_not(tmp_path):
    binary = build(tmp_path, CLONES, "-O1")
    free, cron, trim = resolve(binary, ["freeClient", "clientsCron", "sdsRemoveFreeSpace"], redis_version="7.0.15")
    assert [one.symbol for one in free.attachments] == ["freeClient.constprop.0", "freeClient.constprop.1"]
    assert free.status == "found"
    assert free.decoder.kind == "client"
    assert [one.symbol for one in cron.attachments] == ["clientsCron.part.0"], "one call, one span"
    assert [one.symbol for one in trim.attachments] == ["sdsRemoveFreeSpace.isra.0"]
    assert trim.decoder.kind == "none", "isra clones may get their arguments elsewhere"


def test_inlined_by_link_time_optimisation_with_debug_information(tmp_path):
    binary = server(tmp_path, "-O3", "-flto", "-g", qualifier="static")
    found = {one.function: one for one in resolve(binary, CRON)}
    for name in ("sdsRemoveFreeSpace", "clientsCronResizeQueryBuffer"):
        assert found[name].status == "inlined"
        assert found[name].instead == ("clientsCron",)
        assert [one.symbol for one in found[name].attachments] == ["clientsCron"]
        assert found[name].address == address_of(binary, "clientsCron")
        assert "inlined into clientsCron" in found[name].reason
    assert found["clientsCron"].status == "found"


@pytest.mark.parametrize("form", ["-gdwarf-3", "-gdwarf-4", "-gdwarf-5"])
def test_a_symbol_kept_although_every_call_was_inlined(tmp_path, form):
    inline = "__attribute__((used))"
    binary = server(tmp_path, "-O3", form, qualifier=inline)
    found = {one.function: one for one in resolve(binary, CRON)}
    assert address_of(binary, "sdsRemoveFreeSpace")
    assert found["sdsRemoveFreeSpace"].status == "inlined"
    assert found["sdsRemoveFreeSpace"].instead == ("clientsCron",)
    assert found["sdsRemoveFreeSpace"].inlined_into == ("clientsCron",)


def test_without_debug_information_the_callers_tell(tmp_path):
    binary = server(tmp_path, "-O3", qualifier="__attribute__((used))")
    found = {one.function: one for one in resolve(binary, CRON)}
    trim = found["sdsRemoveFreeSpace"]
    assert trim.status == "bypassed"
    assert trim.instead == ("clientsCron",)
    assert [one.symbol for one in trim.attachments] == ["clientsCron"]
    assert "no debug information" in trim.reason


RESIZE = f"""
volatile long sink;
{NOINLINE} long sdsResize(char *s, long size) {{ sink += (long)s; return sink * size; }}
{NOINLINE} long sdsRemoveFreeSpace(char *s) {{ WRAPPER; }}
{NOINLINE} long clientsCronResizeQueryBuffer(char *s) {{ return CALLED + sink; }}
{NOINLINE} long clientsCron(char *s) {{ return clientsCronResizeQueryBuffer(s) + sink; }}
{NOINLINE} long serverCron(char *s) {{ return clientsCron(s) + sdsRemoveFreeSpace(s); }}
int main(int n, char **a) {{ return serverCron(a[0]); }}
"""
BOTH = "sdsRemoveFreeSpace(s) + sdsResize(s, 1)"


@pytest.mark.parametrize(
    ("called", "wrapper", "status", "probed"),
    [
        ("sdsRemoveFreeSpace(s)", "return sdsResize(s, 2)", "found", ["sdsRemoveFreeSpace"]),
        ("sdsResize(s, 1)", "return sdsResize(s, 2)", "alias", ["sdsResize"]),
        (BOTH, "return sdsResize(s, 2)", "alias", ["sdsResize"]),
        (BOTH, "return sink -= 7", "alias", ["sdsRemoveFreeSpace", "sdsResize"]),
    ],
    ids=["through the wrapper", "around it", "both ways", "both, not a wrapper"],
)
def test_the_name_that_the_expected_caller_calls_is_probed(tmp_path, called, wrapper, status, probed):
    binary = build(tmp_path, RESIZE, "-O2", f"-DCALLED={called}", f"-DWRAPPER={wrapper}")
    (resolution,) = resolve(binary, ["sdsRemoveFreeSpace"], redis_version="7.0.15")
    assert resolution.status == status
    assert [one.symbol for one in resolution.attachments] == probed
    assert resolution.instead == (() if status == "found" else tuple(probed))


def test_an_alias_asked_for_by_name_is_that_symbol(tmp_path):
    binary = build(tmp_path, RESIZE, "-O2", f"-DCALLED={BOTH}", "-DWRAPPER=return sdsResize(s, 2)")
    (resolution,) = resolve(binary, ["sdsResize"], redis_version="7.0.15")
    assert (resolution.function, resolution.status) == ("sdsResize", "found")


REACHED = f"""
volatile long sink;
{NOINLINE} long by_call(long n) {{ return sink += n; }}
{NOINLINE} long by_tail_call(long n) {{ return sink += 2 * n; }}
{NOINLINE} long by_branch(long n) {{ return sink += 3 * n; }}
{NOINLINE} long by_address(long n) {{ return sink += 4 * n; }}
{NOINLINE} long by_table(long n) {{ return sink += 5 * n; }}
{NOINLINE} long by_nobody(long n) {{ return sink += 6 * n; }}
{NOINLINE} long by_itself(long n) {{ return n ? by_itself(n - 1) * n + sink : 1; }}
long (*const table[])(long) = {{ by_table, 0 }};
long (*volatile pointer)(long);
{NOINLINE} long tail(long n) {{ sink++; return by_tail_call(n); }}
{NOINLINE} long branch(long n) {{ if (n > 3) return by_branch(n); return sink; }}
int main(int n, char **a) {{
    pointer = by_address;
    return by_call(n) + tail(n) + branch(n) + pointer(n) + table[n & 1](n);
}}
"""
REACHED_NAMES = ["by_call", "by_tail_call", "by_branch", "by_address", "by_table", "by_nobody", "by_itself"]


@pytest.mark.parametrize("full", [False, True], ids=["fast", "full"])
@pytest.mark.parametrize("options", [("-pie", "-fPIE"), ("-no-pie", "-fno-pie")], ids=["pie", "non-pie"])
def test_every_way_a_function_is_reached(tmp_path, options, full):
    binary = build(tmp_path, REACHED, "-O2", *options)
    found = resolve(binary, REACHED_NAMES, full=full)
    assert statuses(found) == {
        name: "bypassed" if name in ("by_nobody", "by_itself") else "found" for name in REACHED_NAMES
    }
    if full:
        callers = {one.function: one.callers for one in found}
        assert callers["by_call"] == ("main",)
        assert callers["by_tail_call"] == ("tail",)
        assert callers["by_branch"] == ("branch",)
        assert callers["by_address"] == ("main",)


def test_sites_say_how(tmp_path):
    binary = open_binary(build(tmp_path, REACHED, "-O2", "-pie", "-fPIE"))
    kinds = {name: {site.kind for site in binary.callers(binary.find(name)[0])} for name in REACHED_NAMES}
    assert kinds == {
        "by_call": {"call"},
        "by_tail_call": {"jump"},
        "by_branch": {"jump"},
        "by_address": {"taken"},
        "by_table": {"pointer"},
        "by_nobody": set(),
        "by_itself": {"call"},
    }


LIBRARY = f"""
volatile long sink;
{NOINLINE} long exported(long n) {{ return sink += n; }}
{NOINLINE} long entry(long n) {{ return exported(n) + 1; }}
static {NOINLINE} long je_pages_purge_lazy(void *p, long n) {{ return sink += n; }}
static {NOINLINE} long je_pages_purge_forced(void *p, long n) {{ return sink -= n; }}
static {NOINLINE} long je_pages_purge_never(void *p, long n) {{ return sink -= 2 * n; }}
long give_back(long n) {{ return je_pages_purge_lazy(0, n) + je_pages_purge_forced(0, n) + sink; }}
"""


@pytest.fixture
def with_library(tmp_path):
    library = build(tmp_path, LIBRARY, "-O2", "-shared", "-fPIC", name="libjemalloc.so.2")
    source = "long give_back(long); long entry(long); int main(void) { return give_back(1) + entry(2); }"
    return build(tmp_path, source, str(library), f"-Wl,-rpath,{tmp_path}", "-no-pie"), library


def test_a_process_s_shared_library(with_library, tmp_path):
    source = (
        "#include <unistd.h>\nlong give_back(long); "
        'int main(void) { give_back(1); write(1, "ready\\n", 6); pause(); return 0; }'
    )
    binary = build(tmp_path, source, str(with_library[1]), f"-Wl,-rpath,{tmp_path}", name="live")
    with subprocess.Popen([binary], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            image = open_process(process.pid)
            purge, chosen, absent, unknown = resolve(
                image, ["je_pages_purge", "libjemalloc.so.2:entry", "libjemalloc:nothing", "libfoo:bar"]
            )
            assert purge.library == "libjemalloc.so.2"
            assert purge.status == "alias"
            assert [one.symbol for one in purge.attachments] == [
                "je_pages_purge_lazy",
                "je_pages_purge_forced",
            ]
            assert purge.attachments[0].path == f"/proc/{process.pid}/root{with_library[1]}"
            assert (chosen.status, chosen.address) == ("found", address_of(with_library[1], "entry"))
            assert (absent.status, unknown.status) == ("missing", "missing")
            assert "libfoo" in unknown.reason
            with_library[1].unlink()
            (deleted,) = resolve(open_process(process.pid), ["je_pages_purge"])
            assert deleted.attachments[0].path.startswith(f"/proc/{process.pid}/map_files/")
            assert deleted.attachments[0].offset == purge.attachments[0].offset
        finally:
            process.kill()


def test_calls_through_the_plt_count(with_library):
    library = open_binary(with_library[1])
    sites = library.callers(library.find("exported")[0])
    assert {(site.kind, site.function) for site in sites} == {("plt", "entry")}


def test_a_library_given_by_path(with_library):
    binary, library = with_library
    (resolution,) = resolve(FileImage(open_binary(binary)), [f"{library}:give_back"])
    assert resolution.status == "found"
    assert resolution.attachments[0].path == str(library)


def test_the_c_library_stands_in_for_an_allocator_without_symbols(tmp_path):
    (resolution,) = resolve(server(tmp_path), ["je_pages_purge"])
    if not resolution.attachments:
        pytest.skip("requires the C library in one of the usual folders")
    assert resolution.status == "alias"
    assert resolution.instead == ("madvise",)
    assert resolution.library.startswith("libc.so")
    assert resolution.decoder.params == (2, 0, 0)


def test_a_live_process_whose_binary_was_deleted(tmp_path):
    binary = server(tmp_path)
    wanted = resolve(binary, CRON)
    with subprocess.Popen([binary, "wait"], stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            binary.unlink()
            found = resolve(process.pid, CRON)
        finally:
            process.kill()
    assert [one.address for one in found] == [one.address for one in wanted]
    assert {one.attachments[0].path for one in found} == {f"/proc/{process.pid}/exe"}
    assert [one.attachments[0].offset for one in found] == [one.attachments[0].offset for one in wanted]


def test_a_process_that_is_not_there():
    with pytest.raises(TargetError, match="process 4194305"):
        open_process(4194305)


def test_resolving_this_very_process():
    assert open_process(os.getpid()).exe.shown == str(Path(sys.executable).resolve())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an ELF file"),
        (b"#!/bin/sh\nexec redis-server\n", "not an ELF file"),
        (b"\x7fELF\x02\x01\x01", "damaged"),
        (b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, 183) + bytes(60), "machine 183"),
        (b"\x7fELF\x01\x01\x01" + bytes(9) + struct.pack("<HH", 3, 3) + bytes(60), "machine 3"),
        (b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 1, 62) + bytes(60), "no program or library"),
    ],
)
def test_files_that_are_no_servers(tmp_path, content, says):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(SymbolError, match=says) as caught:
        resolve(path, CRON)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(SymbolError) as caught:
            open_binary(path)
        assert "\n" not in str(caught.value)


def test_a_binary_cut_short_anywhere_is_an_error_or_an_answer(tmp_path):
    content = server(tmp_path, "-g").read_bytes()
    cut = tmp_path / "cut"
    for length in range(0, len(content), len(content) // 60):
        cut.write_bytes(content[:length])
        with pytest.raises(SymbolError):
            resolve(cut, CRON)


def test_a_compressed_section_cannot_demand_more_memory_than_it_says(tmp_path):
    binary = server(tmp_path, "-g", "-gz")
    content = bytearray(binary.read_bytes())
    with binary.open("rb") as file:
        offset = ELFFile(file).get_section_by_name(".debug_info").header.sh_offset
    struct.pack_into("<Q", content, offset + 8, 1 << 60)
    binary.write_bytes(content)
    with pytest.raises(SymbolError, match="damaged"):
        resolve(binary, ["clientsCronResizeQueryBuffer"])


def test_crc_is_that_of_the_debug_link(tmp_path):
    binary, debug = server(tmp_path), tmp_path / "x.debug"
    debug.write_bytes(b"anything")
    run("objcopy", f"--add-gnu-debuglink={debug}", binary)
    assert ElfFile(str(binary)).debug_link == ("x.debug", zlib.crc32(b"anything"))


def test_a_stripped_binary_with_nothing_to_probe_says_so_in_one_line_with_the_remedy(tmp_path):
    binary = server(tmp_path)
    run("strip", binary)
    for resolution in resolve(binary, ["serverCron", "no_such_function"]):
        assert (resolution.status, resolution.attachments) == ("missing", ())
        assert resolution.reason == (
            f'no symbol "{resolution.function}" in {binary} (stripped); '
            "install its debug symbols (redis-tools-dbgsym, debuginfo-install redis)"
        )


def test_a_binary_with_its_symbols_is_not_called_stripped(tmp_path):
    binary = server(tmp_path)
    (resolution,) = resolve(binary, ["no_such_function"])
    assert resolution.reason == f'no symbol "no_such_function" in {binary}'
    assert (
        resolve(binary, ["serverCorn"])[0].reason == f'no symbol "serverCorn" in {binary}; did you mean "serverCron"?'
    )


def test_the_plain_data_of_probes(tmp_path):
    found = resolve(server(tmp_path), ["clientsCronResizeQueryBuffer", "no[thing]", "libfoo:bar"], full=True)
    entries = json.loads(json.dumps(describe(found)))
    assert [one["status"] for one in entries] == ["found", "missing", "missing"]
    assert entries[0]["callers"] == ["clientsCron"]
    assert entries[0]["arguments"][0] == {"name": "client_id", "unit": "low 32 bits of the client id"}
    assert entries[0]["attachments"][0]["offset"] == found[0].attachments[0].offset


def printed(resolutions, width):
    output = io.StringIO()
    render(resolutions, Console(file=output, width=width))
    return output.getvalue()


def test_the_list_of_probes(tmp_path):
    found = resolve(server(tmp_path), ["clientsCronResizeQueryBuffer", "no[thing]", "libfoo:bar"], full=True)
    lines = printed(found, 80).splitlines()
    assert lines[0] == f"clientsCronResizeQueryBuffer  found    {found[0].address:#x} (.symtab)"
    assert lines[1] == "    arguments: client_id, last_interaction_s, allocated_bytes, free_bytes"
    assert "no[thing]                     missing  -" in lines
    assert [line for line in lines if line.startswith('    why: no symbol "no[thing]"')]


def test_the_list_says_what_is_probed_instead(tmp_path):
    binary = build(tmp_path, RESIZE, "-O2", f"-DCALLED={BOTH}", "-DWRAPPER=return sink -= 7")
    (resolution,) = resolve(binary, ["sdsRemoveFreeSpace"], redis_version="7.0.15")
    lines = printed([resolution], 80).splitlines()
    assert lines[0] == f"sdsRemoveFreeSpace  alias  {resolution.address:#x} (.symtab)"
    assert lines[1:3] == ["    and: sdsResize", "    arguments: length_bytes, free_bytes"]
    inlined = resolve(server(tmp_path, "-O3", "-flto", "-g", qualifier="static", name="inlined"), CRON)
    line = next(line for line in printed(inlined, 80).splitlines() if line.startswith("sdsRemoveFreeSpace "))
    assert line.split()[1:3] == ["inlined", "clientsCron"]


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_list_keeps_to_the_width_and_breaks_no_word(tmp_path, width):
    names = ["flushAppendOnlyFile", *CRON, "freeClient", "libfoo:bar", "je_pages_purge"]
    found = resolve(build(tmp_path, CLONES, "-O1"), names, redis_version="7.0.15", full=True)
    text = printed(found, width)
    assert text.split() == printed(found, 10_000).split()
    for line in text.splitlines():
        assert len(line) <= width or len(line.split()) <= 3, line


def test_the_list_uses_the_room_of_a_wide_terminal(tmp_path):
    found = resolve(server(tmp_path), ["libfoo:bar", *CRON], full=True)
    narrow, wide = (printed(found, width).splitlines() for width in (80, 160))
    assert len(wide) < len(narrow)
