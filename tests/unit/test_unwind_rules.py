"""Unwind rules from hand-written directives: the assembler makes .eh_frame, the test says what it must mean."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from stallscope.tracer.capture.elf import ElfFile
from stallscope.tracer.unwind import cfi
from stallscope.tracer.unwind.code import CodeImage, CodeMapping
from stallscope.tracer.unwind.registers import REGISTER_COUNT, REGISTERS, RIP, RSP
from stallscope.tracer.unwind.rules import NO_RULE, Kind, RuleSet, RuleTableBuilder
from stallscope.tracer.unwind.unwinder import MAX_FRAMES, Ended, Frame, Unwinder, UnwoundStacks

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="requires gcc")

RBX, RBP, R10 = (REGISTERS.index(name) for name in ("rbx", "rbp", "r10"))
BASE = 0x7F00_0000_0000
STACK = 0x7FFC_0000_1000


def assembled(folder: Path, body: str) -> Path:
    """Return a library whose functions are one byte of code an instruction: ``nop`` throughout."""
    source, library = folder / "hand.s", folder / "libhand.so"
    source.write_text(f'.text\n{body}\n.section .note.GNU-stack,"",@progbits\n')
    subprocess.run(["gcc", "-shared", "-nostdlib", "-Wl,--build-id=sha1", "-o", library, source], check=True)
    return library


def function(name: str, body: str) -> str:
    return (
        f".globl {name}\n.type {name},@function\n{name}:\n.cfi_startproc\n{body}\n.cfi_endproc\n.size {name},.-{name}\n"
    )


def symbols(library: Path) -> dict[str, int]:
    listing = subprocess.run(["nm", library], check=True, capture_output=True, text=True).stdout
    return {line.split()[2]: int(line.split()[0], 16) for line in listing.splitlines() if " T " in line}


def rules_of(rules: cfi.FrameRules, address: int) -> dict[str, object]:
    index = int(rules.at(np.array([address], np.uint64))[0])
    table = rules.table
    if index == NO_RULE:
        return {}
    registers = {
        REGISTERS[number]: (Kind(table.kind[index, number]).name, int(table.value[index, number]))
        for number in range(REGISTER_COUNT)
        if table.kind[index, number] != Kind.SAME and number != RSP
    }
    return {"cfa": (int(table.cfa_register[index]), int(table.cfa_value[index])), **registers}


def table_of(library: Path) -> cfi.FrameRules:
    return CodeImage.from_file(str(library)).rules


class Process:
    """A library mapped at BASE, and a stack at STACK that tests fill word by word."""

    def __init__(self, library: Path, *, size: int = 1024) -> None:
        self.image = CodeImage.from_file(str(library))
        self.at = symbols(library)
        offset = ElfFile(str(library)).file_offset(min(self.at.values())) & -4096
        address = self.image.code_address(offset)
        self.mapping = CodeMapping(BASE + address, BASE + address + 0x4000, offset, str(library), self.image.build_id)
        self.stack = np.zeros(size // 8, np.uint64)
        self.registers = np.zeros(REGISTER_COUNT, np.uint64)
        self.registers[RSP] = STACK

    def code(self, name: str, offset: int = 0) -> int:
        return BASE + self.at[name] + offset

    def unwinder(self) -> Unwinder:
        return Unwinder([self.mapping], {self.mapping.path: self.image})

    def unwind(self, pc: int, *, length: int | None = None) -> UnwoundStacks:
        self.registers[RIP] = pc
        lengths = np.array([self.stack.nbytes if length is None else length])
        return self.unwinder().unwind(
            self.registers[np.newaxis].copy(), self.stack.view(np.uint8)[np.newaxis].copy(), lengths
        )

    def chain(self, pc: int, *, length: int | None = None) -> tuple[list[int], Ended]:
        found = self.unwind(pc, length=length)
        return found.addresses[0, : found.depth[0]].tolist(), Ended(found.ended[0])


OUTERMOST = function("outermost", ".cfi_undefined rip\n" + "nop\n" * 8)
PLAIN = function(
    "plain", "nop\n.cfi_adjust_cfa_offset 8\n.cfi_rel_offset rbx, 0\nnop\nnop\n.cfi_adjust_cfa_offset -8\nnop\n"
)


def test_rows_follow_the_directives(tmp_path: Path) -> None:
    body = """nop
        .cfi_def_cfa_offset 16
        .cfi_offset rbp, -16
        nop
        .cfi_def_cfa_register rbp
        nop
        .cfi_remember_state
        .cfi_restore rbp
        .cfi_def_cfa rsp, 8
        nop
        .cfi_restore_state
        .cfi_register r12, r10
        .cfi_undefined rbx
        nop
        .cfi_same_value rbx
        .cfi_val_offset r12, -24
        nop"""
    library = assembled(tmp_path, function("f", body))
    table, start = table_of(library), symbols(library)["f"]
    ra = {"rip": ("OFFSET", -8)}
    saved = {"rbp": ("OFFSET", -16)}
    assert [rules_of(table, start + at) for at in range(6)] == [
        {"cfa": (RSP, 8), **ra},
        {"cfa": (RSP, 16), **saved, **ra},
        {"cfa": (RBP, 16), **saved, **ra},
        {"cfa": (RSP, 8), **ra},
        {"cfa": (RBP, 16), **saved, **ra, "r12": ("REGISTER", R10), "rbx": ("UNDEFINED", 0)},
        {"cfa": (RBP, 16), **saved, **ra, "r12": ("VAL_OFFSET", -24)},
    ]
    assert rules_of(table, start + 6) == rules_of(table, start - 1) == {}


def test_long_functions_and_odd_instructions(tmp_path: Path) -> None:
    """The wider advances, negative offsets, GNU_args_size, and vector registers nobody needs."""
    body = f"""nop
        .cfi_def_cfa_offset 24
        .skip 300, 0x90
        .cfi_escape 0x2e, 16
        .cfi_def_cfa_offset 32
        .skip 70000, 0x90
        .cfi_offset xmm1, -32
        .cfi_escape 0x13, 0x7b   # def_cfa_offset_sf -5, factored by -8
        .cfi_escape 0x11, {RBX}, 0x02 # offset_extended_sf rbx, 2 * -8
        nop"""
    library = assembled(tmp_path, function("f", body))
    table, start = table_of(library), symbols(library)["f"]
    ra = {"rip": ("OFFSET", -8)}
    assert rules_of(table, start + 300) == {"cfa": (RSP, 24), **ra}
    assert rules_of(table, start + 301) == rules_of(table, start + 70300) == {"cfa": (RSP, 32), **ra}
    assert rules_of(table, start + 70301) == {"cfa": (RSP, 40), "rbx": ("OFFSET", -16), **ra}


def test_unknown_instruction_or_expression_costs_only_its_function(tmp_path: Path) -> None:
    unknown = function("unknown", "nop\n.cfi_escape 0x0c, 40, 8\nnop")
    branches = function("branches", "nop\n.cfi_escape 0x0f, 3, 0x28, 0, 0\nnop")
    empty = function("empty", "nop\n.cfi_escape 0x0f, 1, 0x96\nnop")
    library = assembled(tmp_path, unknown + branches + empty + PLAIN)
    table, at = table_of(library), symbols(library)
    assert rules_of(table, at["plain"] + 1)["cfa"] == (RSP, 16)
    assert [rules_of(table, at[name] + 1) for name in ("unknown", "branches", "empty")] == [{}, {}, {}]


def test_damaged_section_ends_its_stacks_and_says_so(tmp_path: Path) -> None:
    process = Process(assembled(tmp_path, function("damaged", "nop\n.cfi_escape 0x3f\nnop") + PLAIN))
    unwinder = process.unwinder()
    process.registers[RIP] = process.code("plain")
    for _ in range(2):
        found = unwinder.unwind(process.registers[np.newaxis], np.zeros((1, 64), np.uint8), np.array([64]))
        assert found.ended[0] == Ended.NO_RULE
    (problem,) = unwinder.problems
    assert "libhand.so" in problem
    assert "\n" not in problem


def test_no_section_no_rules() -> None:
    table = cfi.FrameRules(b"", 0)
    assert table.at(np.array([0, 5], np.uint64)).tolist() == [NO_RULE, NO_RULE]


def test_stretches_in_any_order_with_gaps() -> None:
    one, two = (RuleSet((RSP, offset), (), False) for offset in (8, 16))
    builder = RuleTableBuilder()
    builder.add(100, 110, two)
    builder.add(10, 20, one)
    builder.add(20, 30, two)
    builder.add(30, 30, one)
    table = builder.build()
    probed = np.array([9, 10, 19, 20, 29, 30, 99, 100, 109, 110], np.uint64)
    assert table.at(probed).tolist() == [NO_RULE, 1, 1, 0, 0, NO_RULE, NO_RULE, 0, 0, NO_RULE]


def test_return_addresses_belong_to_the_call_before_them(tmp_path: Path) -> None:
    """A call as last instruction returns to the next function, whose rules must not be used."""
    first = function("first", "nop\n.cfi_def_cfa_offset 32\nnop\nnop")
    process = Process(assembled(tmp_path, PLAIN + first + OUTERMOST))
    behind = process.code("first", 3)
    assert behind == process.code("outermost")
    process.stack[0], process.stack[1 + 3] = behind, process.code("outermost", 1)
    found = process.unwind(process.code("plain"))
    expected = [process.code("plain"), behind, process.code("outermost", 1)]
    assert (found.addresses[0, :3].tolist(), found.depth[0], found.ended[0]) == (expected, 3, Ended.REACHED_END)
    frames = process.unwinder().frames(found.addresses[0, :3], found.is_exact[0, :3])
    assert [(frame.function, frame.offset) for frame in frames] == [("plain", 0), ("first", 3), ("outermost", 1)]
    assert found.places[0, :4].tolist() == [expected[0], expected[1] - 1, expected[2] - 1, 0]


def test_saved_registers_find_outer_frames(tmp_path: Path) -> None:
    """The inner function saved rbp; its caller is found through the rbp that was saved."""
    inner = function("inner", ".cfi_def_cfa_offset 24\n.cfi_offset rbp, -24\nnop")
    outer = function("outer", ".cfi_def_cfa rbp, 16\n.cfi_offset rbp, -16\nnop\nnop")
    process = Process(assembled(tmp_path, inner + outer + OUTERMOST))
    process.registers[RBP] = 0xDEAD
    process.stack[0], process.stack[2] = STACK + 0x80, process.code("outer", 1)
    process.stack[0x88 // 8] = process.code("outermost", 2)
    assert process.chain(process.code("inner")) == (
        [process.code("inner"), process.code("outer", 1), process.code("outermost", 2)],
        Ended.REACHED_END,
    )


def test_register_already_restored_below_the_stack_pointer(tmp_path: Path) -> None:
    """After its pop, in the epilogue, the rules still name a place below the stack pointer."""
    inner = function("inner", ".cfi_offset rbp, -16\nnop")
    outer = function("outer", ".cfi_def_cfa rbp, 16\nnop\nnop")
    process = Process(assembled(tmp_path, inner + outer + OUTERMOST))
    process.registers[RBP] = STACK + 0x40
    process.stack[0], process.stack[0x48 // 8] = process.code("outer", 1), process.code("outermost", 1)
    assert process.chain(process.code("inner"))[1] == Ended.REACHED_END
    # With the red zone copied the place itself counts.
    rows = np.zeros((1, 16 + process.stack.nbytes), np.uint8)
    rows[0, 16:] = process.stack.view(np.uint8)
    rows[0, 8:16] = np.array([STACK + 0x60], np.uint64).view(np.uint8)
    rows[0, 16 + 0x68 : 16 + 0x70] = np.array([process.code("outermost", 3)], np.uint64).view(np.uint8)
    found = process.unwinder().unwind(process.registers[np.newaxis], rows, np.array([rows.shape[1]]), below=16)
    assert found.addresses[0, : found.depth[0]].tolist()[1:] == [process.code("outer", 1), process.code("outermost", 3)]


def test_signal_frame_restores_everything_and_its_caller_is_exact(tmp_path: Path) -> None:
    """The interrupted address is looked up as it is, even the first one of a function."""
    restore = "".join(
        # expression: breg7 offset; the saved registers lie where the kernel put them, above the stack pointer
        f".cfi_escape 0x10, {register}, 3, 0x77, {offset & 0x7F | 0x80}, {offset >> 7}\n"
        for register, offset in ((RBP, 0x100), (RSP, 0x108), (RIP, 0x110))
    )
    trampoline = (
        ".cfi_startproc\n.cfi_signal_frame\n.cfi_escape 0x0f, 4, 0x77, 0x88, 2, 0x06\n"
        + restore
        + "nop\n.globl trampoline\n.type trampoline,@function\ntrampoline:\nnop\nnop\n.cfi_endproc\n"
    )
    handler = function("handler", "nop")
    outer = function("outer", "nop\n.cfi_def_cfa rbp, 16\nnop")
    process = Process(assembled(tmp_path, trampoline + handler + outer + OUTERMOST))
    process.stack[0] = process.code("trampoline")
    above = STACK + 8
    process.stack[(8 + 0x100) // 8 : (8 + 0x118) // 8] = [0x77, above + 0x180, process.code("outer")]
    process.stack[(8 + 0x180) // 8] = process.code("outermost", 1)
    found = process.unwind(process.code("handler"))
    expected = [
        process.code("handler"),
        process.code("trampoline"),
        process.code("outer"),
        process.code("outermost", 1),
    ]
    assert found.addresses[0, : found.depth[0]].tolist() == expected
    assert found.is_exact[0, :4].tolist() == [True, False, True, False]
    assert found.ended[0] == Ended.REACHED_END


def test_every_reason_to_stop(tmp_path: Path) -> None:
    loop = function("loop", ".cfi_def_cfa_offset 8\nnop\nnop")
    backwards = function("backwards", ".cfi_def_cfa rbp, 0\nnop\nnop")
    bare = ".globl bare\n.type bare,@function\nbare:\nnop\nnop\n.size bare,.-bare\n"
    process = Process(assembled(tmp_path, PLAIN + bare + backwards + loop + OUTERMOST), size=8 * 400)
    plain = process.code("plain")
    process.stack[0] = process.code("bare", 1)
    assert process.chain(plain)[1] == Ended.NO_RULE
    process.stack[0] = 0x1234
    assert process.chain(plain) == ([plain, 0x1234], Ended.NOT_CODE)
    process.stack[0] = 0
    assert process.chain(plain) == ([plain], Ended.REACHED_END)
    assert process.chain(plain, length=7) == ([plain], Ended.STACK_TOO_SHORT)
    process.stack[0] = process.code("backwards", 1)
    process.registers[RBP] = STACK + 8
    assert process.chain(plain) == ([plain, process.code("backwards", 1)], Ended.NO_PROGRESS)
    process.registers[RBP] = STACK - 800
    assert process.chain(plain)[1] == Ended.STACK_TOO_SHORT
    process.stack[:] = process.code("loop", 1)
    addresses, ended = process.chain(plain)
    assert (len(addresses), ended) == (MAX_FRAMES, Ended.TOO_DEEP)


def test_stacks_of_one_call_do_not_touch_each_other(tmp_path: Path) -> None:
    process = Process(assembled(tmp_path, PLAIN + OUTERMOST))
    process.stack[0] = process.code("outermost", 1)
    process.stack[1] = process.code("plain", 1)
    process.stack[2] = process.code("outermost", 1)
    places = [process.code("plain"), process.code("plain", 1), 0x99, process.code("outermost")]
    registers = np.tile(process.registers, (4, 1))
    registers[:, RIP] = places
    copies = np.tile(process.stack.view(np.uint8), (4, 1))
    found = process.unwinder().unwind(registers, copies, np.array([1024, 1024, 1024, 0]))
    assert found.depth.tolist() == [2, 3, 1, 1]
    assert [Ended(ended).name for ended in found.ended] == ["REACHED_END", "REACHED_END", "NOT_CODE", "REACHED_END"]
    assert (found.addresses[:, 0] == places).all()


def test_a_replaced_file_is_not_used(tmp_path: Path) -> None:
    process = Process(assembled(tmp_path, PLAIN))
    mapping = CodeMapping(**{**vars(process.mapping), "build_id": "00" * 20})
    unwinder = Unwinder([mapping], {mapping.path: process.image})
    process.registers[RIP] = process.code("plain")
    found = unwinder.unwind(process.registers[np.newaxis], np.zeros((1, 64), np.uint8), np.array([64]))
    assert found.ended[0] == Ended.NO_RULE
    offset = process.code("plain") - mapping.start + mapping.file_offset
    assert unwinder.frames(found.addresses[0, :1]) == [Frame("", "libhand.so", offset)]


def test_shapes_are_checked(tmp_path: Path) -> None:
    unwinder = Unwinder([], {})
    with pytest.raises(ValueError, match="registers"):
        unwinder.unwind(np.zeros((2, 16), np.uint64), np.zeros((2, 8), np.uint8), np.zeros(2, np.int64))


def test_names_of_addresses(tmp_path: Path) -> None:
    alias = ".globl __GI_plain\n.set __GI_plain,plain\n.type __GI_plain,@function\n"
    hidden = ".type local,@function\nnop\nlocal:\nnop\nnop\n.size local,2\nnop\nnop\n"
    process = Process(assembled(tmp_path, alias + PLAIN + hidden + OUTERMOST))
    unwinder = process.unwinder()
    end = process.code("plain", 4)
    frames = unwinder.frames(np.array([process.code("plain", 2), end + 1, end, 5], np.uint64))
    assert [str(frame) for frame in frames] == ["plain", "local", f"libhand.so+{end - BASE:#x}", "0x5"]
    assert frames[0] == Frame("plain", "libhand.so", 2, process.code("plain"))


@pytest.mark.parametrize("name", ["libm.so.6", "ld-linux-x86-64.so.2"])
def test_functions_one_by_one_are_the_same_as_all_at_once(name: str) -> None:
    library = Path("/lib/x86_64-linux-gnu") / name
    if not library.exists():
        pytest.skip(f"requires {library}")
    elf = ElfFile(str(library))
    section, header = elf.by_name[".eh_frame"], elf.by_name[".eh_frame_hdr"]
    content = elf.data(section)
    index = cfi.read_index(elf.data(header), header.address, section.address)
    assert index is not None
    at_once = cfi.FrameRules(content, section.address)
    one_by_one = cfi.FrameRules(content, section.address, index)
    assert at_once.at(index.starts[:1]).tolist() != [NO_RULE]
    # Every stretch of every tenth function, and the bytes around it.
    starts = at_once.table.starts[np.searchsorted(at_once.table.starts, index.starts[::10])]
    places = np.unique(np.concatenate([starts - 1, starts, starts + 1, starts + 20]))
    for part in np.array_split(places, 5):
        one_by_one.at(part)
    first, second = at_once.at(places), one_by_one.at(places)
    assert (first == NO_RULE).sum() == (second == NO_RULE).sum() < len(places) / 2
    for name in ("cfa_register", "kind", "is_signal_frame"):
        known = first != NO_RULE
        assert np.array_equal(
            getattr(at_once.table, name)[first[known]], getattr(one_by_one.table, name)[second[known]]
        )
    assert len(one_by_one.table.starts) < len(at_once.table.starts) / 2


def test_stubs_without_rules_are_as_called_and_others_keep_theirs(tmp_path: Path) -> None:
    library = assembled(tmp_path, PLAIN + function("stub", ".cfi_def_cfa_offset 24\nnop\nnop"))
    elf, at = ElfFile(str(library)), symbols(library)
    section = elf.by_name[".eh_frame"]
    stubs = [(0x9000, 0x9010), (at["stub"], at["stub"] + 2)]
    rules = cfi.FrameRules(elf.data(section), section.address, None, stubs)
    numbers = rules.at(np.array([0x9000, 0x900F, at["stub"]], np.uint64))
    assert rules.table.cfa_register[numbers].tolist() == [RSP, RSP, RSP]
    assert rules.table.cfa_value[numbers].tolist() == [8, 8, 24]


def test_index_of_another_encoding_is_not_used() -> None:
    whole = bytes([1, 0x1B, 3, 0x3B]) + (0).to_bytes(4, "little") + (2).to_bytes(4, "little") + bytes(16)
    index = cfi.read_index(whole, 0x100, 0x80)
    assert index is not None
    assert (index.starts.tolist(), index.offsets.tolist()) == ([0x100, 0x100], [0x80, 0x80])
    for damaged in (
        b"",
        whole[:3],
        b"\2" + whole[1:],
        whole[:3] + b"\x1b" + whole[4:],
        whole[:-1],
        whole[:8] + bytes(20),
    ):
        assert cfi.read_index(damaged, 0x100, 0x80) is None
