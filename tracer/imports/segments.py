"""The TCP segments of some ports, out of captured frames: link, IP and TCP headers decoded as arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from stallscope.tracer.imports.pcap import Bytes, Frames, Ints

SYN, RST, ACK, FIN = 0x02, 0x04, 0x10, 0x01
"""TCP flags, RFC 9293 section 3.1."""

_MAPPED = np.uint64(0xFFFF_0000_0000)
"""An IPv4 address in the lower half of an IPv6 address, RFC 4291 section 2.5.5.2."""

_IPV4, _IPV6 = 0x0800, 0x86DD
_VLAN_TAGS = (0x8100, 0x88A8, 0x9100)
_MAX_VLAN_TAGS = 3
_TCP = 6
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION = 0, 43, 44, 51, 60
_MAX_EXTENSION_HEADERS = 8
_TCP_FIELDS_BYTES = 14
"""Of a TCP header: up to and with its flags; what is read of it."""


@dataclass(frozen=True)
class Segments:
    """TCP segments to or from the ports that were asked for; one array each, all of shape (n,).

    Attributes:
        time_ns: since 1970.
        to_server: the destination is the port that was asked for.
        server_high, server_low, peer_high, peer_low: IPv6 addresses, IPv4 mapped; uint64.
        port, peer_port: uint16. flags: uint8. sequence, acknowledged: uint32.
        payload: bytes after the TCP header, on the wire; int32.
        ident: IPv4 identification, 0 for IPv6; uint16.
    """

    time_ns: Ints
    to_server: npt.NDArray[np.bool_]
    server_high: npt.NDArray[np.uint64]
    server_low: npt.NDArray[np.uint64]
    peer_high: npt.NDArray[np.uint64]
    peer_low: npt.NDArray[np.uint64]
    port: npt.NDArray[np.uint16]
    peer_port: npt.NDArray[np.uint16]
    flags: npt.NDArray[np.uint8]
    sequence: npt.NDArray[np.uint32]
    acknowledged: npt.NDArray[np.uint32]
    payload: npt.NDArray[np.int32]
    ident: npt.NDArray[np.uint16]

    def __len__(self) -> int:
        return len(self.time_ns)

    def take(self, rows: npt.NDArray[Any]) -> Segments:
        """Return some rows, by place or by a mask."""
        return Segments(*(getattr(self, item.name)[rows] for item in fields(self)))


def joined(parts: Sequence[Segments]) -> Segments:
    """Return all rows of all parts."""
    parts = parts or [no_segments()]
    return Segments(*(np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(Segments)))


def no_segments() -> Segments:
    """Return no rows."""
    empty = np.zeros(0, np.int64)
    u64, u16 = empty.astype(np.uint64), empty.astype(np.uint16)
    u32 = empty.astype(np.uint32)
    return Segments(
        empty, empty.astype(np.bool_), u64, u64, u64, u64, u16, u16, empty.astype(np.uint8), u32, u32,
        empty.astype(np.int32), u16,
    )  # fmt: skip


@dataclass
class Seen:
    """What was counted while frames were decoded.

    Attributes:
        tcp: TCP segments of any port; fragments: later fragments of IP packets, which have no TCP header.
        cut: frames whose snap length cut their headers off.
        other_links: frames by the number of a link type that is not decoded.
        servers: how many SYN-ACKs each port sent, all ports of the capture.
    """

    tcp: int = 0
    fragments: int = 0
    cut: int = 0
    other_links: dict[int, int] = field(default_factory=dict)
    servers: dict[int, int] = field(default_factory=dict)


def decode(frames: Frames, ports: Iterable[int], seen: Seen) -> Segments:
    """Return the segments to and from these ports; what else was there is counted in ``seen``."""
    layer = _Layer(frames.data, frames.start, frames.start + frames.captured, np.arange(len(frames.start)))
    network = _network(layer, frames.link, seen)
    version = network.u8(0) >> 4
    length = frames.length[network.row] - (network.at - frames.start[network.row])
    parts = [_ipv4(network.keep(version == 4), length[version == 4], seen)]
    if (version == 6).any():
        parts.append(_ipv6(network.keep(version == 6), length[version == 6], seen))
    segments = joined([_tcp(part, frames.time_ns, ports, seen) for part in parts])
    return segments.take(segments.time_ns >= 0)


@dataclass(frozen=True)
class _Layer:
    """Where one layer's headers begin: of frame ``row`` at ``at``; ``end`` is after its last captured byte."""

    data: Bytes
    at: Ints
    end: Ints
    row: Ints

    def u8(self, offset: int) -> Ints:
        return self.data[np.minimum(self.at + offset, len(self.data) - 1)].astype(np.int64)

    def u16(self, offset: int) -> Ints:
        return self.u8(offset) << 8 | self.u8(offset + 1)

    def u32(self, offset: int) -> Ints:
        return self.u16(offset) << 16 | self.u16(offset + 2)

    def u64(self, offset: int) -> npt.NDArray[np.uint64]:
        return self.u32(offset).view(np.uint64) << np.uint64(32) | self.u32(offset + 4).view(np.uint64)

    def keep(self, rows: npt.NDArray[Any]) -> _Layer:
        return _Layer(self.data, self.at[rows], self.end[rows], self.row[rows])

    def moved(self, by: Ints | int) -> _Layer:
        return _Layer(self.data, self.at + by, self.end, self.row)

    def having(self, size: int, seen: Seen) -> _Layer:
        """Return those of which this many bytes were captured; the others are counted as cut."""
        enough = self.at + size <= self.end
        if enough.all():
            return self
        seen.cut += int(np.count_nonzero(~enough))
        return self.keep(enough)


def _network(layer: _Layer, link: Ints, seen: Seen) -> _Layer:
    """Return where the IP headers begin, of the frames that have one."""
    parts = []
    for number in np.unique(link):
        mine = layer if (link == number).all() else layer.keep(link == number)
        finder = _LINKS.get(int(number))
        if finder is None:
            seen.other_links[int(number)] = seen.other_links.get(int(number), 0) + len(mine.at)
        else:
            parts.append(finder(mine, seen))
    return _together(layer.data, parts).having(1, seen)


def _together(data: Bytes, parts: Sequence[_Layer]) -> _Layer:
    if len(parts) == 1:
        return parts[0]
    columns = ([getattr(part, name) for part in parts] for name in ("at", "end", "row"))
    return _Layer(data, *(np.concatenate([np.zeros(0, np.int64), *column]) for column in columns))


def _ethernet(layer: _Layer, seen: Seen) -> _Layer:
    return _tagged(layer.having(14, seen).moved(12), seen)


def _cooked(layer: _Layer, seen: Seen) -> _Layer:
    return _tagged(layer.having(16, seen).moved(14), seen)


def _cooked_2(layer: _Layer, seen: Seen) -> _Layer:
    layer = layer.having(20, seen)
    ip = np.isin(layer.u16(0), (_IPV4, _IPV6))
    tagged = np.isin(layer.u16(0), _VLAN_TAGS)
    plain = layer.keep(ip).moved(20)
    if not tagged.any():
        return plain
    # the tag's control word and the real type come first after the header
    return _together(layer.data, [plain, _tagged(layer.keep(tagged).moved(22), seen)])


def _tagged(layer: _Layer, seen: Seen) -> _Layer:
    """Return where the IP headers begin; the layer is at the type that may be that of a VLAN tag."""
    for _ in range(_MAX_VLAN_TAGS):
        tagged = np.isin(layer.u16(0), _VLAN_TAGS)
        if not tagged.any():
            break
        layer = layer.moved(np.where(tagged, 4, 0)).having(2, seen)
    return layer.keep(np.isin(layer.u16(0), (_IPV4, _IPV6))).moved(2)


def _after(header_bytes: int) -> Callable[[_Layer, Seen], _Layer]:
    return lambda layer, seen: layer.having(header_bytes, seen).moved(header_bytes)


_LINKS: dict[int, Callable[[_Layer, Seen], _Layer]] = {
    0: _after(4),  # BSD loopback; the IP version says the rest
    1: _ethernet,
    12: _after(0),  # raw IP, as OpenBSD and others number it
    14: _after(0),
    101: _after(0),
    108: _after(4),
    113: _cooked,
    228: _after(0),
    229: _after(0),
    276: _cooked_2,
}
"""https://www.tcpdump.org/linktypes.html"""


@dataclass(frozen=True)
class _Packets:
    """IP packets with a TCP header: the layer is at it, ``length`` bytes are behind it on the wire."""

    tcp: _Layer
    length: Ints
    source: tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]
    destination: tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]
    ident: Ints


def _ipv4(layer: _Layer, length: Ints, seen: Seen) -> _Packets:
    enough = layer.at + 20 <= layer.end
    layer, length = layer.having(20, seen), length[enough]
    header = (layer.u8(0) & 0x0F) * 4
    tcp = (layer.u8(9) == _TCP) & (header >= 20)
    later = (layer.u16(6) & 0x1FFF) != 0
    seen.fragments += int(np.count_nonzero(tcp & later))
    kept = tcp & ~later
    layer, length, header = layer.keep(kept), length[kept], header[kept]
    total = layer.u16(2)
    # a packet that the network card cuts up is captured whole, and too long for its own length field
    behind = np.where(total == 0, length, total) - header
    low = [layer.u32(offset).view(np.uint64) | _MAPPED for offset in (12, 16)]
    high = np.zeros(len(layer.at), np.uint64)
    return _Packets(layer.moved(header), behind, (high, low[0]), (high, low[1]), layer.u16(4))


def _ipv6(layer: _Layer, length: Ints, seen: Seen) -> _Packets:
    enough = layer.at + 40 <= layer.end
    layer, length = layer.having(40, seen), length[enough]
    following, used = layer.u8(6), np.full(len(layer.at), 40, np.int64)
    later = np.zeros(len(layer.at), np.bool_)
    for _ in range(_MAX_EXTENSION_HEADERS):
        options = np.isin(following, (_HOP_BY_HOP, _ROUTING, _DESTINATION))
        fragment, authentication = following == _FRAGMENT, following == _AUTHENTICATION
        extension = (options | fragment | authentication) & (layer.at + used + 8 <= layer.end)
        if not extension.any():
            break
        here = layer.moved(used)
        size = np.select([options, authentication], [(here.u8(1) + 1) * 8, (here.u8(1) + 2) * 4], 8)
        later |= extension & fragment & ((here.u16(2) & 0xFFF8) != 0)
        following = np.where(extension, here.u8(0), following)
        used = np.where(extension, used + size, used)
    tcp = following == _TCP
    seen.fragments += int(np.count_nonzero(tcp & later))
    kept = tcp & ~later
    payload = layer.u16(4)
    behind = np.where(payload == 0, length, payload + 40) - used
    addresses = [layer.keep(kept).u64(offset) for offset in (8, 16, 24, 32)]
    return _Packets(
        layer.moved(used).keep(kept),
        behind[kept],
        (addresses[0], addresses[1]),
        (addresses[2], addresses[3]),
        np.zeros(int(np.count_nonzero(kept)), np.int64),
    )


def _tcp(packets: _Packets, time_ns: Ints, ports: Iterable[int], seen: Seen) -> Segments:
    tcp = packets.tcp
    seen.tcp += len(tcp.at)
    enough = tcp.at + _TCP_FIELDS_BYTES <= tcp.end
    seen.cut += int(np.count_nonzero(~enough))
    source, destination, flags = tcp.u16(0), tcp.u16(2), tcp.u8(13)
    _count_servers(source[enough & (flags & (SYN | ACK) == SYN | ACK)], seen)
    wanted = np.array(sorted(ports), np.int64)
    to_server, from_server = np.isin(destination, wanted), np.isin(source, wanted)
    # where both ends have such a port, the handshake tells who serves
    answer = from_server & (~to_server | (flags & (SYN | ACK) == SYN | ACK))
    rows = np.flatnonzero(enough & (to_server | from_server))
    tcp, answer = tcp.keep(rows), answer[rows]

    def chosen(of_answer: npt.NDArray[Any], otherwise: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.where(answer, of_answer[rows], otherwise[rows])

    header = (tcp.u8(12) >> 4) * 4
    return Segments(
        time_ns=time_ns[tcp.row],
        to_server=~answer,
        server_high=chosen(packets.source[0], packets.destination[0]),
        server_low=chosen(packets.source[1], packets.destination[1]),
        peer_high=chosen(packets.destination[0], packets.source[0]),
        peer_low=chosen(packets.destination[1], packets.source[1]),
        port=chosen(source, destination).astype(np.uint16),
        peer_port=chosen(destination, source).astype(np.uint16),
        flags=flags[rows].astype(np.uint8),
        sequence=tcp.u32(4).astype(np.uint32),
        acknowledged=tcp.u32(8).astype(np.uint32),
        payload=np.maximum(packets.length[rows] - header, 0).astype(np.int32),
        ident=packets.ident[rows].astype(np.uint16),
    )


def _count_servers(ports: Ints, seen: Seen) -> None:
    for port, count in zip(*np.unique(ports, return_counts=True), strict=True):
        seen.servers[int(port)] = seen.servers.get(int(port), 0) + int(count)
