"""The BTF reader on a small file that each test writes itself."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from stallscope.tracer.capture.btf import KernelFunction, KernelTypes
from stallscope.tracer.errors import SurroundingsError

INT, PTR, ARRAY, STRUCT, UNION, ENUM = 1, 2, 3, 4, 5, 6
TYPEDEF, CONST, FUNC, FUNC_PROTO, VAR, DATASEC = 8, 10, 12, 13, 14, 15
FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = 16, 17, 18, 19


class Btf:
    """Writes what Linux Documentation/bpf/btf.rst describes; every method returns the id of its type."""

    def __init__(self) -> None:
        self._strings = b"\0"
        self._types = b""
        self._count = 0

    def integer(self, name: str, bits: int) -> int:
        return self._add(name, INT, 0, bits // 8, struct.pack("<I", bits))

    def pointer(self, to: int) -> int:
        return self._add("", PTR, 0, to)

    def array(self, of: int, index: int, length: int) -> int:
        return self._add("", ARRAY, 0, 0, struct.pack("<III", of, index, length))

    def composite(self, kind: int, name: str, members: Sequence[tuple[str, int, int]]) -> int:
        """Members are (name, type, offset in bits)."""
        tail = b"".join(struct.pack("<III", self._name(member), to, offset) for member, to, offset in members)
        return self._add(name, kind, len(members), 64, tail)

    def with_bitfields(self, name: str, members: Sequence[tuple[str, int, int, int]]) -> int:
        """Members are (name, type, offset in bits, width in bits)."""
        packed = [(member, to, width << 24 | offset) for member, to, offset, width in members]
        place = len(self._types)
        made = self.composite(STRUCT, name, packed)
        (info,) = struct.unpack_from("<I", self._types, place + 4)
        self._types = self._types[: place + 4] + struct.pack("<I", info | 1 << 31) + self._types[place + 8 :]
        return made

    def enum(self, values: Sequence[tuple[str, int]]) -> int:
        return self._add("", ENUM, len(values), 4, b"".join(struct.pack("<Ii", self._name(n), v) for n, v in values))

    def enum64(self, name: str, value: int) -> int:
        return self._add("", ENUM64, 1, 8, struct.pack("<IQ", self._name(name), value))

    def modifier(self, kind: int, to: int, name: str = "") -> int:
        return self._add(name, kind, 0, to)

    def function(self, name: str, arguments: Sequence[int]) -> int:
        tail = b"".join(struct.pack("<II", 0, to) for to in arguments)
        return self._add(name, FUNC, 1, self._add("", FUNC_PROTO, len(arguments), 0, tail))

    def others(self, to: int) -> None:
        """One of each kind that nothing is looked for in, all with bytes behind them."""
        variable = self._add("variable", VAR, 0, to, struct.pack("<I", 1))
        self._add(".data", DATASEC, 2, 8, struct.pack("<IIIIII", variable, 0, 4, variable, 4, 4))
        self._add("tagged", DECL_TAG, 0, to, struct.pack("<i", -1))
        self._add("double", FLOAT, 0, 8)

    def write(self, folder: Path) -> Path:
        path = folder / "vmlinux"
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self._types), len(self._types), len(self._strings))
        path.write_bytes(header + self._types + self._strings)
        return path

    def _name(self, name: str) -> int:
        if not name:
            return 0
        place = self._strings.find(b"\0" + name.encode() + b"\0") + 1
        if not place:
            place = len(self._strings)
            self._strings += name.encode() + b"\0"
        return place

    def _add(self, name: str, kind: int, count: int, size_or_type: int, tail: bytes = b"") -> int:
        self._types += struct.pack("<III", self._name(name), kind << 24 | count, size_or_type) + tail
        self._count += 1
        return self._count


@pytest.fixture
def types(tmp_path: Path) -> KernelTypes:
    btf = Btf()
    u32 = btf.integer("unsigned int", 32)
    btf.others(u32)
    array = btf.array(u32, u32, 4)
    queue = btf.composite(STRUCT, "request_sock_queue", [("lock", u32, 0), ("qlen", u32, 64)])
    alias = btf.modifier(TYPEDEF, btf.modifier(CONST, btf.modifier(TYPE_TAG, queue, "rcu")), "queue_t")
    inner = btf.composite(STRUCT, "", [("low", u32, 0), ("high", u32, 32)])
    either = btf.composite(UNION, "", [("whole", array, 0), ("", inner, 0)])
    btf.composite(STRUCT, "sock", [])  # a forward-like one without members is not the struct
    btf.composite(STRUCT, "sock", [("first", u32, 0), ("", either, 128), ("queue", alias, 256), ("last", u32, 512)])
    btf.with_bitfields("flags", [("one", u32, 0, 1), ("many", u32, 8, 24), ("next", u32, 32, 0)])
    btf.composite(UNION, "packet", [("bytes", array, 0)])
    btf.enum([("MIB_NONE", 0), ("MIB_LISTENOVERFLOWS", 20), ("MIB_NEGATIVE", -3)])
    btf.enum64("MIB_LARGE", 1 << 40)
    pointer = btf.pointer(queue)
    btf.function("six", [pointer] * 6)
    btf.function("none", [])
    return KernelTypes(btf.write(tmp_path))


@pytest.mark.parametrize(
    ("path", "offset"),
    [
        ("sock.first", 0),
        ("sock.last", 64),
        ("sock.whole", 16),
        ("sock.low", 16),
        ("sock.high", 20),
        ("sock.queue", 32),
        ("sock.queue.qlen", 40),
        ("flags.one", 0),
        ("flags.many", 1),
        ("flags.next", 4),
    ],
)
def test_a_member_is_where_c_finds_it(types: KernelTypes, path: str, offset: int) -> None:
    assert types.offsets([path]) == {path: offset}


@pytest.mark.parametrize(
    "path", ["sock.middle", "sock.queue.length", "sock.first.deeper", "socket.first", "packet.bytes"]
)
def test_a_missing_member_is_named(types: KernelTypes, path: str) -> None:
    with pytest.raises(SurroundingsError, match=rf"this kernel's types have no {path}; please report"):
        types.offsets(["sock.first", path])


def test_functions_are_told_with_their_arguments(types: KernelTypes) -> None:
    found = types.functions(["six", "none", "unknown", "sock"])
    assert {name: function.arguments for name, function in found.items()} == {"six": 6, "none": 0}
    assert found["six"] == KernelFunction(found["none"].type_id - 2, 6)
    assert found["none"].type_id == types.count


def test_enumerators_are_found_in_whichever_enum(types: KernelTypes) -> None:
    assert types.enumerators(["MIB_NEGATIVE", "MIB_LISTENOVERFLOWS"]) == {"MIB_LISTENOVERFLOWS": 20, "MIB_NEGATIVE": -3}


@pytest.mark.parametrize("name", ["MIB_UNKNOWN", "sock", "MIB_LARGE"])
def test_a_missing_enumerator_is_named(types: KernelTypes, name: str) -> None:
    with pytest.raises(SurroundingsError, match=f"this kernel's types have no {name}; please report"):
        types.enumerators(["MIB_NONE", name])


def test_a_kernel_without_types_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(SurroundingsError, match=r"has no BTF: .*missing is not readable; .*CONFIG_DEBUG_INFO_BTF"):
        KernelTypes(tmp_path / "missing")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x9f\xeb\x01",
        struct.pack("<HBBIIIII", 0x9FEB, 1, 0, 24, 0, 0, 0, 0),
        # a type that is cut off in its header
        struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 6, 6, 1) + bytes(7),
    ],
)
def test_broken_bytes_are_one_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "broken"
    path.write_bytes(data)
    with pytest.raises(SurroundingsError, match="is not the BTF this version knows"):
        KernelTypes(path)


@pytest.mark.parametrize("kind", [INT, ARRAY, STRUCT, UNION, ENUM, FUNC_PROTO, VAR, DATASEC, DECL_TAG, ENUM64])
def test_a_type_whose_tail_is_cut_off_is_one_error(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "broken"
    types = struct.pack("<III", 1, kind << 24 | 3, 7)
    strings = b"\0sock\0"
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    path.write_bytes(header + types + strings)
    with pytest.raises(SurroundingsError, match="is not the BTF this version knows"):
        KernelTypes(path)


def test_a_struct_that_contains_itself_without_a_name_ends(tmp_path: Path) -> None:
    btf = Btf()
    btf.composite(STRUCT, "sock", [("", 1, 0)])
    with pytest.raises(SurroundingsError, match=r"no sock\.first"):
        KernelTypes(btf.write(tmp_path)).offsets(["sock.first"])


def test_a_typedef_of_itself_ends(tmp_path: Path) -> None:
    btf = Btf()
    btf.composite(STRUCT, "sock", [("first", 2, 0)])
    btf.modifier(TYPEDEF, 2, "loop")
    with pytest.raises(SurroundingsError, match=r"no sock\.first\.second"):
        KernelTypes(btf.write(tmp_path)).offsets(["sock.first.second"])
