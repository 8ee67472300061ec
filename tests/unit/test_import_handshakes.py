"""What each packet is to its connection, against packets written by hand."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

import numpy as np
from captures import ACK, FIN, PORT, PSH, Connection, Packet, in_order, pcap
from hypothesis import given, settings
from hypothesis import strategies as st

from stallscope.tracer.imports.handshakes import Labelled, label
from stallscope.tracer.imports.pcap import Capture
from stallscope.tracer.imports.segments import Seen, decode, joined
from stallscope.tracer.packet_events import EVENTS


def labelled(packets: Sequence[Packet]) -> Labelled:
    capture, seen = Capture(io.BytesIO(pcap(packets))), Seen()
    return label(joined([decode(frames, (PORT,), seen) for frames in capture.frames()]))


def events(*connections: Connection) -> list[str]:
    return [EVENTS[code] for code in labelled(in_order(*connections)).event]


def normal(port: int = 40000, start_ms: float = 0, isn: int = 1000) -> Connection:
    made = Connection(peer_port=port, isn=isn).syn(start_ms).syn_ack(start_ms + 0.1).ack(start_ms + 0.2)
    made.send(start_ms + 1, b"PING\r\n").reply(start_ms + 2, b"+PONG\r\n")
    made.send(start_ms + 3, b"", offset=6, flags=FIN | ACK)
    return made.reply(start_ms + 4, b"", offset=7, flags=FIN | ACK)


class TestEvents:
    def test_of_a_normal_connection_are_its_handshake(self) -> None:
        assert events(normal()) == ["SYN", "SYN-ACK", "third ACK"]

    def test_of_a_client_that_is_refused_until_the_queue_has_room(self) -> None:
        client = Connection().syn(0).syn(1000).syn(3000).syn_ack(3000.1).ack(3000.2)
        assert events(client) == ["SYN", "SYN retransmitted", "SYN retransmitted", "SYN-ACK", "third ACK"]

    def test_of_a_third_ack_that_was_refused(self) -> None:
        client = Connection().syn(0).syn_ack(1).ack(2).syn_ack(1001).ack(1002).syn_ack(3001).ack(3002)
        assert events(client) == [
            "SYN", "SYN-ACK", "third ACK",
            "SYN-ACK retransmitted", "third ACK repeated", "SYN-ACK retransmitted", "third ACK repeated",
        ]  # fmt: skip

    def test_of_data_sent_into_a_connection_only_the_client_knows(self) -> None:
        client = Connection().syn(0).syn_ack(1).ack(2)
        for at_ms in (3, 210, 640):
            client.send(at_ms, b"PING\r\n")
        assert events(client)[3:] == ["data or FIN retransmitted by client"] * 2

    def test_of_a_fin_sent_again(self) -> None:
        client = normal().send(300, b"", offset=6, flags=FIN | ACK)
        assert events(client)[3:] == ["data or FIN retransmitted by client"]

    def test_of_data_the_server_sent_again_in_part(self) -> None:
        client = Connection().syn(0).syn_ack(1).ack(2)
        client.reply(3, b"a" * 100).reply(4, b"b" * 100, offset=100).reply(210, b"b" * 100, offset=100)
        # half of this one is new
        client.reply(230, b"c" * 100, offset=150)
        assert events(client)[3:] == ["data or FIN retransmitted by server"]

    def test_of_keep_alive_probes_are_none(self) -> None:
        client = normal()
        client.send(500, b"x", offset=5).send(900, b"x", offset=5)
        assert events(client)[3:] == []

    def test_of_resets(self) -> None:
        closed = Connection(peer_port=1).syn(0).rst(1)
        gone = Connection(peer_port=2).syn(10).syn_ack(11).ack(12).rst(13, to_server=True)
        assert events(closed, gone) == ["SYN", "RST from server", "SYN", "SYN-ACK", "third ACK", "RST from client"]

    def test_of_a_handshake_of_which_only_the_client_was_captured(self) -> None:
        client = Connection().syn(0).ack(2).send(3, b"PING\r\n")
        assert events(client) == ["SYN", "third ACK"]

    def test_of_a_connection_that_began_before_the_capture(self) -> None:
        old = Connection().send(0, b"PING\r\n").reply(1, b"+PONG\r\n").send(250, b"PING\r\n")
        assert events(old) == ["data or FIN retransmitted by client"]

    def test_do_not_depend_on_where_sequence_numbers_wrap(self) -> None:
        for isn in (2**32 - 1, 2**32 - 4, 2**31 - 3):
            client = Connection(isn=isn, server_isn=isn).syn(0).syn_ack(1).ack(2)
            client.send(3, b"x" * 10).send(4, b"y" * 10, offset=10).send(300, b"x" * 10)
            assert events(client) == ["SYN", "SYN-ACK", "third ACK", "data or FIN retransmitted by client"]


class TestConnections:
    def test_of_one_port_used_again_are_two(self) -> None:
        first, second = normal(isn=1000), normal(start_ms=50, isn=777_000)
        found = labelled(in_order(first, second))
        assert found.connection.tolist() == [0, 0, 0, 1, 1, 1]

    def test_of_a_port_used_again_while_the_first_was_unanswered_are_two(self) -> None:
        first, second = Connection(isn=5).syn(0).syn(1000), Connection(isn=6).syn(2000).syn(3000)
        found = labelled(in_order(first, second))
        assert found.connection.tolist() == [0, 0, 1, 1]
        assert [EVENTS[code] for code in found.event] == ["SYN", "SYN retransmitted"] * 2

    def test_of_the_same_sequence_number_much_later_are_two(self) -> None:
        assert events(Connection().syn(0).syn(122_000)) == ["SYN", "SYN"]
        assert events(Connection().syn(0).syn(120_000)) == ["SYN", "SYN retransmitted"]

    def test_are_numbered_by_their_first_packets(self) -> None:
        found = labelled(in_order(*(normal(port=50000 - index, start_ms=index) for index in range(20))))
        _, first = np.unique(found.connection, return_index=True)
        assert (np.diff(first) > 0).all()
        assert found.connection.max() == 19

    def test_of_two_servers_with_one_port_are_two(self) -> None:
        found = labelled(in_order(Connection(server="192.0.2.1").syn(0), Connection(server="192.0.2.2").syn(5)))
        assert found.connection.tolist() == [0, 1]


class TestCopies:
    """tcpdump -i any sees a packet at the bridge, at the container's end of it, and at the network card."""

    def test_at_once_without_an_identification_are_one_packet(self) -> None:
        found = labelled(Connection().syn(0).syn(0.02).syn(0.05).syn(1000).syn(1000.03).packets)
        assert [EVENTS[code] for code in found.event] == ["SYN", "SYN retransmitted"]
        assert found.twice == 3

    def test_with_the_same_identification_are_one_packet_even_later(self) -> None:
        found = labelled(Connection().syn(0, ident=7).syn(100, ident=7).syn(1000, ident=8).syn(1100, ident=8).packets)
        assert [EVENTS[code] for code in found.event] == ["SYN", "SYN retransmitted"]

    def test_with_different_identifications_are_two_packets_however_fast(self) -> None:
        client = Connection().syn(0, ident=1).syn_ack(1).ack(2, ident=2)
        client.send(3, b"PING\r\n", ident=3).send(3.2, b"PING\r\n", ident=4)
        assert labelled(client.packets).twice == 0
        assert events(client)[3:] == ["data or FIN retransmitted by client"]

    def test_of_one_identification_a_retransmission_apart_are_two(self) -> None:
        assert events(Connection().syn(0, ident=9).syn(1000, ident=9)) == ["SYN", "SYN retransmitted"]


def test_packets_out_of_order_in_the_file_are_sorted() -> None:
    packets = in_order(normal(), normal(port=41000, start_ms=5))
    found = labelled(packets[::-1])
    assert (np.diff(found.segments.time_ns) >= 0).all()
    assert found.event.tolist() == labelled(packets).event.tolist()


def test_nothing_is_nothing() -> None:
    assert len(label(joined([])).event) == 0


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[Connection, Counter[str]]]:
    made = []
    for index in range(draw(st.integers(1, 12))):
        start_ms = draw(st.floats(0, 5000))
        tries = draw(st.integers(1, 4))
        client = Connection(peer_port=30000 + index % 3, isn=draw(st.integers(0, 2**32 - 1)), server_isn=index)
        # ports are used again, one after the other
        start_ms += 200_000 * (index // 3)
        truth: Counter[str] = Counter()
        for number in range(tries):
            client.syn(start_ms + 1000 * number)
        truth["SYN"] += 1
        truth["SYN retransmitted"] += tries - 1
        outcome = draw(st.sampled_from(["none", "open", "reset"]))
        end_ms = start_ms + 1000 * (tries - 1)
        if outcome == "open":
            client.syn_ack(end_ms + 0.1).ack(end_ms + 0.2)
            truth.update({"SYN-ACK": 1, "third ACK": 1})
            sends = draw(st.integers(0, 3))
            for number in range(sends):
                client.send(end_ms + 1 + 300 * number, b"PING\r\n", flags=PSH | ACK)
            truth["data or FIN retransmitted by client"] += max(sends - 1, 0)
        elif outcome == "reset":
            client.rst(end_ms + 0.1)
            truth["RST from server"] += 1
        made.append((client, truth))
    return made


@settings(deadline=None, max_examples=60)
@given(traffic())
def test_whatever_is_interleaved_is_told_apart(made: list[tuple[Connection, Counter[str]]]) -> None:
    isns = [(client.peer_port, client.isn) for client, _ in made]
    if len(set(isns)) < len(isns):
        return
    found = labelled(in_order(*(client for client, _ in made)))
    counts = Counter(EVENTS[code] for code in found.event)
    assert counts == sum((truth for _, truth in made), Counter())
    assert len(set(found.connection.tolist())) == len(made)
    peers = {(int(number), int(port)) for number, port in zip(found.connection, found.segments.peer_port, strict=True)}
    assert len(peers) == len(made)
