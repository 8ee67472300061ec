"""Writes captures whose truth is known: packets by hand, in every file format and on every kind of link."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
ETHERNET, NULL, RAW, LOOP, COOKED, COOKED_2 = 1, 0, 101, 108, 113, 276
WALL_NS = 1_750_000_000_000_000_000
MS = 1_000_000
PORT = 6379
SERVER, CLIENT = "192.0.2.1", "198.51.100.7"


@dataclass(frozen=True)
class Packet:
    """One TCP packet; ``at_ms`` after ``WALL_NS``. Sequence numbers are absolute."""

    at_ms: float
    flags: int
    to_server: bool = True
    sequence: int = 1000
    acknowledged: int = 0
    payload: bytes = b""
    peer_port: int = 40000
    client: str = CLIENT
    server: str = SERVER
    port: int = PORT
    ident: int = 0
    fragment: int = 0
    extensions: tuple[tuple[int, bytes], ...] = ()
    total_length: int | None = None

    @property
    def time_ns(self) -> int:
        return WALL_NS + round(self.at_ms * MS)

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.server

    def tcp(self) -> bytes:
        ports = (self.peer_port, self.port) if self.to_server else (self.port, self.peer_port)
        head = struct.pack(
            ">HHIIBBHHH", *ports, self.sequence % 2**32, self.acknowledged % 2**32, 0x50, self.flags, 1024, 0, 0
        )
        return head + self.payload

    def ip(self) -> bytes:
        ends = (self.client, self.server) if self.to_server else (self.server, self.client)
        source, destination = (ipaddress.ip_address(end).packed for end in ends)
        body = self.tcp()
        if not self.is_ipv6:
            length = 20 + len(body) if self.total_length is None else self.total_length
            head = struct.pack(">BBHHHBBH", 0x45, 0, length, self.ident, self.fragment, 64, 6, 0)
            return head + source + destination + body
        following = 6
        for kind, content in reversed(self.extensions):
            body = bytes([following]) + content + body
            following = kind
        length = len(body) if self.total_length is None else self.total_length
        return struct.pack(">IHBB", 6 << 28, length, following, 64) + source + destination + body

    def frame(self, link: int = ETHERNET, vlans: Iterable[int] = ()) -> bytes:
        kind = 0x86DD if self.is_ipv6 else 0x0800
        tags = b"".join(struct.pack(">HH", tag, 7) for tag in vlans)
        if link == ETHERNET:
            return bytes(12) + tags + struct.pack(">H", kind) + self.ip()
        if link == COOKED:
            return bytes(14) + tags + struct.pack(">H", kind) + self.ip()
        if link == COOKED_2:
            tagged = list(vlans)
            head = struct.pack(">HHIHBB8s", tagged[0] if tagged else kind, 0, 2, 1, 0, 6, bytes(8))
            rest = struct.pack(">HH", 7, kind) if tagged else b""
            return head + rest + self.ip()
        if link == NULL:
            return struct.pack("<I", 10 if self.is_ipv6 else 2) + self.ip()
        if link == LOOP:
            return struct.pack(">I", 24 if self.is_ipv6 else 2) + self.ip()
        return self.ip()


@dataclass
class Connection:
    """The packets of one client's attempt; every method adds one."""

    peer_port: int = 40000
    client: str = CLIENT
    server: str = SERVER
    port: int = PORT
    isn: int = 1000
    server_isn: int = 9000
    packets: list[Packet] = field(default_factory=list)

    def _add(self, at_ms: float, flags: int, *, to_server: bool, **more: object) -> Connection:
        packet = Packet(
            at_ms, flags, to_server, peer_port=self.peer_port, client=self.client, server=self.server, port=self.port
        )
        self.packets.append(replace(packet, **more))  # type: ignore[arg-type]
        return self

    def syn(self, at_ms: float, **more: object) -> Connection:
        return self._add(at_ms, SYN, to_server=True, **{"sequence": self.isn, **more})

    def syn_ack(self, at_ms: float, **more: object) -> Connection:
        known = {"sequence": self.server_isn, "acknowledged": self.isn + 1}
        return self._add(at_ms, SYN | ACK, to_server=False, **{**known, **more})

    def ack(self, at_ms: float, **more: object) -> Connection:
        known = {"sequence": self.isn + 1, "acknowledged": self.server_isn + 1}
        return self._add(at_ms, ACK, to_server=True, **{**known, **more})

    def send(
        self, at_ms: float, payload: bytes, *, offset: int = 0, flags: int = PSH | ACK, **more: object
    ) -> Connection:
        known = {"sequence": self.isn + 1 + offset, "acknowledged": self.server_isn + 1, "payload": payload}
        return self._add(at_ms, flags, to_server=True, **{**known, **more})

    def reply(self, at_ms: float, payload: bytes, *, offset: int = 0, flags: int = PSH | ACK) -> Connection:
        known = {"sequence": self.server_isn + 1 + offset, "acknowledged": self.isn + 1, "payload": payload}
        return self._add(at_ms, flags, to_server=False, **known)

    def rst(self, at_ms: float, *, to_server: bool = False) -> Connection:
        return self._add(at_ms, RST | ACK, to_server=to_server, sequence=0, acknowledged=self.isn + 1)


def in_order(*connections: Connection) -> list[Packet]:
    """Return the packets of all connections by time."""
    return sorted((packet for item in connections for packet in item.packets), key=lambda packet: packet.at_ms)


def pcap(
    packets: Iterable[Packet], *, link: int = ETHERNET, order: str = "<", nanoseconds: bool = False,
    snaplen: int = 262144, vlans: tuple[int, ...] = (),
) -> bytes:  # fmt: skip
    magic, unit = (0xA1B23C4D, 1) if nanoseconds else (0xA1B2C3D4, 1000)
    parts = [struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, snaplen, link)]
    for packet in packets:
        frame = packet.frame(link, vlans)
        seconds, rest = divmod(packet.time_ns, 10**9)
        parts.append(struct.pack(f"{order}IIII", seconds, rest // unit, len(frame[:snaplen]), len(frame)))
        parts.append(frame[:snaplen])
    return b"".join(parts)


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    size = struct.pack(f"{order}I", len(body) + 12)
    return struct.pack(f"{order}I", kind) + size + body + size


def option(code: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(f"{order}HH", code, len(value)) + value + bytes(-len(value) % 4)


def section(order: str = "<") -> bytes:
    return block(0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1), order)


def interface(link: int = ETHERNET, *options: bytes, order: str = "<") -> bytes:
    return block(1, struct.pack(f"{order}HHI", link, 0, 262144) + b"".join(options), order)


def enhanced(
    packet: Packet, *, index: int = 0, link: int = ETHERNET, order: str = "<", ticks: int | None = None,
    old: bool = False,
) -> bytes:  # fmt: skip
    """Return a packet block; ``ticks`` in the interface's unit, microseconds unless given."""
    frame = packet.frame(link)
    count = packet.time_ns // 1000 if ticks is None else ticks
    place = struct.pack(f"{order}HH", index, 0) if old else struct.pack(f"{order}I", index)
    head = place + struct.pack(f"{order}IIII", count >> 32, count & 0xFFFF_FFFF, len(frame), len(frame))
    return block(2 if old else 6, head + frame, order)
