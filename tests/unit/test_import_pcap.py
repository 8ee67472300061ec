"""Capture files: every format, byte order and clock; torn and damaged ones."""

from __future__ import annotations

import gzip
import io
import struct
from collections.abc import Sequence

import numpy as np
import pytest
from captures import (
    COOKED,
    COOKED_2,
    ETHERNET,
    LOOP,
    NULL,
    PORT,
    RAW,
    SYN,
    WALL_NS,
    Packet,
    block,
    enhanced,
    interface,
    option,
    pcap,
    section,
)

from stallscope.tracer.errors import UsageError
from stallscope.tracer.imports import pcap as module
from stallscope.tracer.imports.pcap import Capture, is_capture
from stallscope.tracer.imports.segments import Seen, Segments, decode, joined

PACKETS = [Packet(index * 0.5, SYN, sequence=index, peer_port=40000 + index) for index in range(5)]


def read(content: bytes, ports: Sequence[int] = (PORT,)) -> tuple[Segments, Capture, Seen]:
    capture, seen = Capture(io.BytesIO(content)), Seen()
    return joined([decode(frames, ports, seen) for frames in capture.frames()]), capture, seen


def times(segments: Segments) -> list[int]:
    return [int(time) for time in segments.time_ns]


def expected(packets: Sequence[Packet] = PACKETS) -> list[int]:
    return [packet.time_ns for packet in packets]


class TestPcap:
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("nanoseconds", [False, True])
    def test_in_both_byte_orders_and_units(self, order: str, nanoseconds: bool) -> None:
        content = pcap(PACKETS, order=order, nanoseconds=nanoseconds)
        assert is_capture(content[:24])
        segments, capture, _ = read(content)
        assert times(segments) == expected()
        assert segments.peer_port.tolist() == [40000, 40001, 40002, 40003, 40004]
        assert (capture.format, capture.packets, capture.notes) == ("pcap", 5, [])

    def test_keeps_every_nanosecond(self) -> None:
        packet = Packet(0.123457, SYN)
        assert times(read(pcap([packet], nanoseconds=True))[0]) == [WALL_NS + 123_457]

    def test_ignores_the_length_of_the_frame_check_sequence_in_the_link_type(self) -> None:
        content = bytearray(pcap(PACKETS))
        content[23] |= 0x50
        assert times(read(bytes(content))[0]) == expected()

    @pytest.mark.parametrize("cut", [1, 10, 17, 54, 69])
    def test_that_is_cut_off_keeps_what_was_read_and_says_so(self, cut: int) -> None:
        segments, capture, _ = read(pcap(PACKETS)[:-cut])
        assert times(segments) == expected()[:4]
        assert capture.notes == ["the file is cut off after packet 4; read up to there"]

    def test_that_is_cut_off_in_its_header(self) -> None:
        segments, capture, _ = read(pcap(PACKETS)[:20])
        assert (len(segments), capture.notes) == (0, ["the file is cut off in its header"])

    def test_that_is_damaged_is_read_up_to_there(self) -> None:
        content = pcap(PACKETS[:2]) + struct.pack("<IIII", 1, 1, 0xFFFF_FFF0, 60) + bytes(500)
        segments, capture, _ = read(content)
        assert times(segments) == expected()[:2]
        assert capture.notes == [
            "the file is damaged after packet 2 (a packet of 4,294,967,280 bytes); read up to there"
        ]

    def test_longer_than_a_piece_is_read_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = times(read(pcap(PACKETS))[0])
        for size in (24, 33, 70, 100, 141):
            monkeypatch.setattr(module, "_PIECE_BYTES", size)
            assert times(read(pcap(PACKETS))[0]) == whole
            assert times(read(section() + interface() + b"".join(map(enhanced, PACKETS)))[0]) == whole

    def test_that_is_none(self) -> None:
        with pytest.raises(UsageError, match="it is not a capture"):
            read(b"Hello, world. " * 9)


class TestPcapng:
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("old", [False, True])
    def test_in_both_byte_orders_with_new_and_old_packet_blocks(self, order: str, old: bool) -> None:
        blocks = [enhanced(packet, order=order, old=old) for packet in PACKETS]
        content = section(order) + interface(order=order) + b"".join(blocks)
        assert is_capture(content[:24])
        segments, capture, _ = read(content)
        assert times(segments) == expected()
        assert (capture.format, capture.packets, capture.notes) == ("pcapng", 5, [])

    @pytest.mark.parametrize(("resolution", "ticks_per_s"), [(9, 10**9), (3, 10**3), (10, 10**10), (0x80 | 20, 2**20)])
    def test_of_any_resolution(self, resolution: int, ticks_per_s: int) -> None:
        packet = Packet(250.0, SYN)
        ticks = packet.time_ns * ticks_per_s // 10**9
        content = section() + interface(ETHERNET, option(9, bytes([resolution]))) + enhanced(packet, ticks=ticks)
        assert times(read(content)[0]) == [packet.time_ns]

    def test_with_an_offset_of_the_clock(self) -> None:
        packet = Packet(0, SYN)
        start = interface(ETHERNET, option(14, struct.pack("<q", 3600)), option(0, b""))
        content = section() + start + enhanced(packet)
        assert times(read(content)[0]) == [packet.time_ns + 3600 * 10**9]

    def test_of_several_interfaces_each_with_its_link_and_clock(self) -> None:
        blocks = [
            enhanced(PACKETS[0], index=0),
            enhanced(PACKETS[1], index=1, link=COOKED_2, ticks=PACKETS[1].time_ns),
            enhanced(PACKETS[2], index=2, link=RAW),
        ]
        interfaces = interface(), interface(COOKED_2, option(9, b"\x09")), interface(RAW)
        segments, _, seen = read(section() + b"".join(interfaces) + b"".join(blocks))
        assert sorted(times(segments)) == expected()[:3]
        assert (seen.tcp, seen.cut) == (3, 0)

    def test_of_several_sections_numbers_interfaces_anew(self) -> None:
        first = section("<") + interface(RAW) + enhanced(PACKETS[0], link=RAW)
        second = section(">") + interface(ETHERNET, order=">") + enhanced(PACKETS[1], order=">")
        third = section(">") + interface(COOKED, order=">") + enhanced(PACKETS[2], link=COOKED, order=">")
        assert times(read(first + second + third)[0]) == expected()[:3]

    def test_says_what_the_capture_itself_lost(self) -> None:
        statistics = struct.pack("<III", 0, 0, 0) + option(5, struct.pack("<Q", 40)) + option(7, struct.pack("<Q", 2))
        content = section() + interface() + enhanced(PACKETS[0]) + block(5, statistics)
        assert read(content)[1].dropped == 42

    def test_with_packets_that_have_no_time(self) -> None:
        frame = PACKETS[0].frame()
        content = section() + interface() + block(3, struct.pack("<I", len(frame)) + frame) + enhanced(PACKETS[1])
        segments, capture, _ = read(content)
        assert times(segments) == expected()[1:2]
        assert capture.notes == ["packets without a time (simple packet blocks) were left out: 1"]

    @pytest.mark.parametrize(
        ("rest", "why"),
        [
            (struct.pack("<II", 6, 13) + bytes(50), "a block of 13 bytes"),
            (struct.pack("<II", 6, 8) + bytes(50), "a block of 8 bytes"),
            (struct.pack("<II", 6, 16) + bytes(50), "a packet block of 16 bytes"),
            (struct.pack("<IIQ", 0x0A0D0D0A, 28, 0) + bytes(50), "a section of an unknown byte order"),
            (enhanced(PACKETS[2], index=7), "a packet of no interface or longer than its block"),
        ],
    )
    def test_that_is_damaged_is_read_up_to_there(self, rest: bytes, why: str) -> None:
        segments, capture, _ = read(section() + interface() + b"".join(map(enhanced, PACKETS[:2])) + rest)
        assert times(segments) == expected()[:2]
        assert capture.notes == [f"the file is damaged after packet 2 ({why}); read up to there"]

    def test_with_a_time_beyond_any_clock_leaves_the_packet_out(self) -> None:
        content = section() + interface() + enhanced(PACKETS[0], ticks=2**64 - 1) + enhanced(PACKETS[1])
        assert times(read(content)[0]) == expected()[1:2]


def test_a_torn_compressed_capture_keeps_what_was_read() -> None:
    many = [Packet(index, SYN, sequence=index * 2654435761, peer_port=index % 60000) for index in range(3000)]
    packed = gzip.compress(pcap(many))
    capture = Capture(gzip.GzipFile(fileobj=io.BytesIO(packed[: len(packed) // 2])))  # type: ignore[arg-type]
    packets = sum(len(frames.start) for frames in capture.frames())
    assert capture.packets == packets
    assert capture.notes[0].startswith("reading ended early: ")


@pytest.mark.parametrize("link", [ETHERNET, NULL, RAW, LOOP, COOKED, COOKED_2, 12, 14, 228, 229])
@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
class TestLinks:
    def test_of_every_kind(self, link: int, address: str) -> None:
        client = "2001:db8::7" if ":" in address else "198.51.100.7"
        packets = [
            Packet(0, SYN, sequence=5, server=address, client=client),
            Packet(1, 0x12, to_server=False, sequence=7, acknowledged=6, server=address, client=client),
        ]
        segments, _, seen = read(pcap(packets, link=link))
        assert segments.to_server.tolist() == [True, False]
        assert segments.sequence.tolist() == [5, 7]
        assert segments.acknowledged.tolist() == [0, 6]
        assert (seen.tcp, seen.cut, seen.servers) == (2, 0, {PORT: 1})
        high, low = (2**32 * 0x20010DB8, 7) if ":" in address else (0, 0xFFFF_C633_6407)
        assert set(zip(segments.peer_high.tolist(), segments.peer_low.tolist(), strict=True)) == {(high, low)}

    def test_cut_by_the_snap_length_are_counted_and_never_misread(self, link: int, address: str) -> None:
        client = "2001:db8::7" if ":" in address else "198.51.100.7"
        packet = Packet(0, SYN, server=address, client=client)
        size = len(packet.frame(link))
        # the last six bytes of a TCP header are not looked at
        for snaplen in range(1, size + 1):
            segments, _, seen = read(pcap([packet], link=link, snaplen=snaplen))
            assert (len(segments), seen.cut) == ((1, 0) if snaplen >= size - 6 else (0, 1))


class TestHeaders:
    @pytest.mark.parametrize("link", [ETHERNET, COOKED])
    @pytest.mark.parametrize("tags", [(0x8100,), (0x88A8, 0x8100), (0x9100, 0x8100, 0x8100)])
    def test_with_vlan_tags(self, link: int, tags: tuple[int, ...]) -> None:
        assert times(read(pcap(PACKETS, link=link, vlans=tags))[0]) == expected()

    def test_with_a_vlan_tag_behind_the_cooked_header(self) -> None:
        assert times(read(pcap(PACKETS, link=COOKED_2, vlans=(0x8100,)))[0]) == expected()

    def test_with_ipv6_extension_headers(self) -> None:
        ends = {"server": "2001:db8::1", "client": "2001:db8::7"}
        hop = (0, bytes([0]) + bytes(6))
        routing = (43, bytes([2]) + bytes(22))
        fragment = (44, bytes(7))
        authentication = (51, bytes([4]) + bytes(22))
        packet = Packet(0, SYN, extensions=(hop, routing, fragment, authentication), payload=b"12345", **ends)  # type: ignore[arg-type]
        segments, _, _ = read(pcap([packet]))
        assert (times(segments), segments.payload.tolist()) == ([packet.time_ns], [5])

    def test_of_later_fragments_are_counted_not_read(self) -> None:
        later = Packet(0, SYN, fragment=5)
        later_6 = Packet(0, SYN, server="2001:db8::1", client="2001:db8::7", extensions=((44, b"\0\0\x08" + bytes(4)),))
        segments, _, seen = read(pcap([later, later_6, PACKETS[0]]))
        assert (len(segments), seen.fragments) == (1, 2)

    def test_with_the_dont_fragment_bit(self) -> None:
        assert len(read(pcap([Packet(0, SYN, fragment=0x4000)]))[0]) == 1

    def test_whose_length_field_is_too_small_for_the_packet(self) -> None:
        big = Packet(0, 0x18, payload=bytes(70_000), total_length=0)
        assert read(pcap([big]))[0].payload.tolist() == [70_000]

    def test_of_other_ports_protocols_and_links_are_left_out(self) -> None:
        other = Packet(0, SYN, port=22)
        arp = bytes(12) + b"\x08\x06" + bytes(40)
        content = pcap([other, PACKETS[0]]) + struct.pack("<IIII", 1_750_000_000, 0, len(arp), len(arp)) + arp
        segments, capture, _ = read(content)
        assert (len(segments), capture.packets) == (1, 3)
        _, _, seen = read(pcap(PACKETS, link=127))
        assert seen.other_links == {127: 5}

    def test_between_two_servers_ports_follow_the_handshake(self) -> None:
        syn = Packet(0, SYN, peer_port=6380, port=PORT)
        answer = Packet(1, 0x12, to_server=False, peer_port=6380, port=PORT)
        segments, _, _ = read(pcap([syn, answer]), (PORT, 6380))
        assert segments.to_server.tolist() == [True, False]
        assert segments.port.tolist() == [PORT, PORT]

    def test_the_ports_asked_for_may_be_several(self) -> None:
        packets = [Packet(0, SYN, port=PORT), Packet(1, SYN, port=PORT + 1), Packet(2, SYN, port=PORT + 2)]
        assert np.array_equal(read(pcap(packets), (PORT, PORT + 2))[0].port, [PORT, PORT + 2])
