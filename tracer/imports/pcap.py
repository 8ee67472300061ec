"""Capture files as arrays: where each frame lies, when it was captured, on which kind of link.

Read in pieces, so memory does not grow with the file; the only loop per packet finds the next header, at
0.25 us a packet. A library was measured first: dpkt takes 1.6 us a packet for the same (6.4 us with the headers
decoded), and reads a pcapng file as if all its interfaces were the first.

Formats: https://datatracker.ietf.org/doc/draft-ietf-opsawg-pcap/ and draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from stallscope.tracer.errors import UsageError
from stallscope.tracer.imports.rows import NS_PER_S

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

PAD_BYTES = 64
"""Zeros after each piece, so that a header's fields may be read before it is known that they were captured."""

_PIECE_BYTES = 8 << 20
_MAX_RECORD_BYTES = 16 << 20
"""No packet is longer (libpcap's largest snap length is 256 kB); a longer record means damage."""

_MAX_WALL_NS = 2**62

_PCAP_MAGICS = {
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
"""Byte order and nanoseconds of a fraction's unit, by the first four bytes."""

_SECTION, _INTERFACE, _OLD_PACKET, _SIMPLE_PACKET, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 2, 3, 5, 6
_SECTION_MAGIC = b"\x0a\x0d\x0d\x0a"
_ORDERS = {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
_TSRESOL, _TSOFFSET, _IFDROP, _OSDROP = 9, 14, 5, 7


@dataclass(frozen=True)
class Frames:
    """Some frames of a capture, in the order of the file.

    Attributes:
        data: the piece of the file they lie in, and ``PAD_BYTES`` zeros; uint8.
        start, captured: place of each frame's first byte and how many were captured; int64, shape (n,).
        length: how many bytes the frame had on the wire.
        link: link type of each (LINKTYPE_ numbers of tcpdump.org); time_ns: since 1970.
    """

    data: Bytes
    start: Ints
    captured: Ints
    length: Ints
    link: Ints
    time_ns: Ints


def is_capture(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is a pcap or pcapng capture."""
    return head[:4] in _PCAP_MAGICS or (head[:4] == _SECTION_MAGIC and head[8:12] in _ORDERS)


@dataclass
class _Interface:
    link: int
    ticks_per_s: int = 1_000_000
    binary_shift: int = 0
    offset_s: int = 0
    dropped: int = 0


@dataclass
class Capture:
    """A capture that is being read; everything but ``format`` is complete once ``frames`` is exhausted.

    Attributes:
        format: ``pcap`` or ``pcapng``; packets: how many were read.
        dropped: packets the capturing program reported as lost (pcapng only).
        notes: where the file is cut off or damaged, and what could not be used.
    """

    stream: BinaryIO
    format: str = ""
    packets: int = 0
    untimed: int = 0
    notes: list[str] = field(default_factory=list)
    _interfaces: list[_Interface] = field(default_factory=list)
    _section_first: int = 0
    _order: str = "<"

    @property
    def dropped(self) -> int:
        """Return how many packets the capturing program reported as lost."""
        return sum(interface.dropped for interface in self._interfaces)

    def frames(self) -> Iterator[Frames]:
        """Yield the frames, piece by piece; a file that is cut off or damaged ends with a note.

        Raises:
            UsageError: it is not a capture.
        """
        head = self._read(24)
        if not is_capture(head):
            raise UsageError("it is not a capture")
        if head[:4] == _SECTION_MAGIC:
            self.format = "pcapng"
            yield from self._pieces(head, self._pcapng_piece)
            if self.untimed:
                self.notes.append(f"packets without a time (simple packet blocks) were left out: {self.untimed:,}")
            return
        self.format = "pcap"
        self._order, unit_ns = _PCAP_MAGICS[head[:4]]
        if len(head) < 24:
            self.notes.append("the file is cut off in its header")
            return
        # the upper bits say how long the frame check sequence is
        link = struct.unpack_from(f"{self._order}I", head, 20)[0] & 0xFFFF
        self._interfaces.append(_Interface(link, NS_PER_S // unit_ns))
        yield from self._pieces(b"", self._pcap_piece)

    def _pieces(self, tail: bytes, walk: _Walk) -> Iterator[Frames]:
        ended = False
        while not ended:
            piece = self._read(max(_PIECE_BYTES, 2 * len(tail)))
            ended = not piece
            data = tail + piece if tail else piece
            position, wanted = 0, True
            while wanted:
                frames, position, wanted, damage = walk(data, position)
                if frames is not None:
                    self.packets += len(frames.start)
                    yield frames
                if damage:
                    self.notes.append(f"the file is damaged after packet {self.packets:,} ({damage}); read up to there")
                    return
            tail = data[position:]
        if tail:
            self.notes.append(f"the file is cut off after packet {self.packets:,}; read up to there")

    def _read(self, size: int) -> bytes:
        """Return the next bytes, fewer where a compressed file is torn."""
        try:
            return self.stream.read(size)
        except (EOFError, zlib.error, OSError) as error:
            self.notes.append(f"reading ended early: {str(error).splitlines()[0] if str(error) else 'torn file'}")
            return b""

    def _pcap_piece(self, data: bytes, position: int) -> _Walked:
        size_at = struct.Struct(f"{self._order}I").unpack_from
        end = len(data)
        places: list[int] = []
        damage = ""
        while position + 16 <= end:
            size = size_at(data, position + 8)[0]
            if size > _MAX_RECORD_BYTES:
                damage = f"a packet of {size:,} bytes"
                break
            following = position + 16 + size
            if following > end:
                break
            places.append(position)
            position = following
        if not places:
            return None, position, False, damage
        words = _Words(data, self._order)
        at = np.array(places, np.int64)
        interface = self._interfaces[0]
        time_ns = words.u32(at) * NS_PER_S + words.u32(at + 4) * (NS_PER_S // interface.ticks_per_s)
        link = np.full(len(at), interface.link, np.int64)
        frames = Frames(words.data, at + 16, words.u32(at + 8), words.u32(at + 12), link, time_ns)
        return frames, position, False, damage

    def _pcapng_piece(self, data: bytes, position: int) -> _Walked:
        """Walk the blocks of one section; the byte order may change with the next."""
        head_at = struct.Struct(f"{self._order}II").unpack_from
        end = len(data)
        places: list[int] = []
        damage, more = "", False
        while position + 12 <= end:
            kind, size = head_at(data, position)
            if kind == _SECTION:
                order = _ORDERS.get(data[position + 8 : position + 12])
                if order is None:
                    damage = "a section of an unknown byte order"
                    break
                if order != self._order and places:
                    more = True
                    break
                if order != self._order:
                    self._order = order
                    head_at = struct.Struct(f"{order}II").unpack_from
                    size = head_at(data, position)[1]
            if size < 12 or size % 4 or size > _MAX_RECORD_BYTES:
                damage = f"a block of {size:,} bytes"
                break
            if position + size > end:
                break
            if kind in (_PACKET, _OLD_PACKET):
                if size < 32:
                    damage = f"a packet block of {size} bytes"
                    break
                places.append(position)
            elif kind == _SECTION:
                if places:
                    # interfaces are numbered anew: what was found belongs to the old numbers
                    more = True
                    break
                self._section_first = len(self._interfaces)
            elif kind != _SIMPLE_PACKET:
                self._describe(kind, data[position + 8 : position + size - 4])
            else:
                self.untimed += 1
            position += size
        if not places:
            return None, position, False, damage
        frames, bad = self._pcapng_frames(data, np.array(places, np.int64))
        return frames, position, more and not damage, damage or bad

    def _pcapng_frames(self, data: bytes, at: Ints) -> tuple[Frames, str]:
        words = _Words(data, self._order)
        old = words.u32(at) == _OLD_PACKET
        place = np.where(old, words.u16(at + 8), words.u32(at + 8))
        known = self._interfaces[self._section_first :]
        captured = words.u32(at + 20)
        sound = (place < len(known)) & (captured <= words.u32(at + 4) - 32)
        bad = "" if sound.all() else "a packet of no interface or longer than its block"
        if bad:
            first_bad = int(np.flatnonzero(~sound)[0])
            at, place, captured = at[:first_bad], place[:first_bad], captured[:first_bad]
        ticks = (words.u32(at + 12) << 32 | words.u32(at + 16)).view(np.uint64)
        time_ns = np.zeros(len(at), np.int64)
        for index in np.unique(place):
            mine = place == index
            time_ns[mine] = _nanoseconds(ticks[mine], known[index])
        link = np.array([interface.link for interface in known] or [0], np.int64)[place]
        return Frames(words.data, at + 28, captured, words.u32(at + 24), link, time_ns), bad

    def _describe(self, kind: int, body: bytes) -> None:
        """Take in a block that describes an interface or says what it lost."""
        if kind == _INTERFACE and len(body) >= 8:
            interface = _Interface(struct.unpack_from(f"{self._order}H", body)[0])
            for code, value in self._options(body[8:]):
                if code == _TSRESOL and value:
                    shift = value[0] & 0x7F
                    if value[0] & 0x80:
                        interface.binary_shift = min(shift, 63)
                    else:
                        interface.ticks_per_s = 10 ** min(shift, 18)
                elif code == _TSOFFSET and len(value) == 8:
                    interface.offset_s = struct.unpack(f"{self._order}q", value)[0]
            self._interfaces.append(interface)
        elif kind == _STATISTICS and len(body) >= 12:
            index = self._section_first + struct.unpack_from(f"{self._order}I", body)[0]
            if index < len(self._interfaces):
                lost = [value for code, value in self._options(body[12:]) if code in (_IFDROP, _OSDROP)]
                numbers = [struct.unpack(f"{self._order}Q", value)[0] for value in lost if len(value) == 8]
                self._interfaces[index].dropped = min(sum(numbers), _MAX_WALL_NS)

    def _options(self, body: bytes) -> Iterator[tuple[int, bytes]]:
        position = 0
        while position + 4 <= len(body):
            code, size = struct.unpack_from(f"{self._order}HH", body, position)
            if code == 0:
                return
            yield code, body[position + 4 : position + 4 + size]
            position += 4 + (size + 3) // 4 * 4


class _Words:
    """Numbers at any places of a piece of the file."""

    def __init__(self, data: bytes, order: str) -> None:
        self.data = np.concatenate([np.frombuffer(data, np.uint8), np.zeros(PAD_BYTES, np.uint8)])
        self._shifts = (0, 8, 16, 24) if order == "<" else (24, 16, 8, 0)

    def u32(self, at: Ints) -> Ints:
        """Return the 32-bit numbers at these places."""
        value = np.zeros(len(at), np.int64)
        for place, shift in enumerate(self._shifts):
            value |= self.data[at + place].astype(np.int64) << shift
        return value

    def u16(self, at: Ints) -> Ints:
        """Return the 16-bit numbers at these places."""
        first, second = self.data[at].astype(np.int64), self.data[at + 1].astype(np.int64)
        return first | second << 8 if self._shifts[0] == 0 else first << 8 | second


def _nanoseconds(ticks: npt.NDArray[np.uint64], interface: _Interface) -> Ints:
    """Return the time since 1970 of timestamps of one interface; -1 for what is beyond any clock."""
    if interface.binary_shift:
        shift = np.uint64(interface.binary_shift)
        seconds = ticks >> shift
        fraction = (ticks & ((np.uint64(1) << shift) - np.uint64(1))).astype(np.float64)
        rest = (fraction / float(2**interface.binary_shift) * NS_PER_S).astype(np.uint64)
    else:
        per_s = np.uint64(interface.ticks_per_s)
        seconds = ticks // per_s
        fraction = (ticks % per_s).astype(np.float64)
        rest = np.rint(fraction * (NS_PER_S / interface.ticks_per_s)).astype(np.uint64)
    limit_s = _MAX_WALL_NS // NS_PER_S
    possible = seconds < limit_s
    wall_s = np.where(possible, seconds, 0).astype(np.int64) + min(max(interface.offset_s, -limit_s), limit_s)
    possible &= (wall_s >= 0) & (wall_s < limit_s)
    return np.where(possible, wall_s * NS_PER_S + rest.astype(np.int64), -1)


_Walked = tuple["Frames | None", int, bool, str]
"""Frames found, place after them, whether to walk on in the same piece, and what is wrong with the rest."""

_Walk = Callable[[bytes, int], _Walked]
