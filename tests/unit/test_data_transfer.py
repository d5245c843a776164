"""The reader of C-STORE requests, over real sockets, judged by the library's own encoder and decoder."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import CTImageStorage
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_ECHO_RQ, C_STORE_RQ, DIMSEMessage
from pynetdicom.dimse_primitives import C_ECHO, C_STORE
from pynetdicom.pdu import P_DATA_TF
from pynetdicom.transport import AssociationSocket

from osteo_daemon.dicom.buffers import BufferBudget
from osteo_daemon.dicom.data_transfer import MessageReader
from osteo_daemon.dicom.store_messages import StoreRequest, read_store_request, store_response

INSTANCE = "1.2.826.0.1.3680043.8.498.1"
CONTEXT = 3
ABORTED, CLOSED, P_DATA, A_ABORT = "Evt19", "Evt17", "Evt10", "Evt16"


@dataclass
class Recorder:
    """A data set's way, written down."""

    request: StoreRequest
    answer: tuple[int, str] = (0, "")
    fragments: list[bytes] = field(default_factory=list)
    data_set: bytes | None = None
    abandoned: bool = False

    def write(self, fragment: memoryview) -> None:
        self.fragments.append(bytes(fragment))

    def finish(self, data_set: memoryview) -> tuple[int, str]:
        self.data_set = bytes(data_set)
        return self.answer

    def abandon(self) -> None:
        self.abandoned = True


@dataclass
class Line:
    """Both ends of a connection: the reader's association, and the peer's socket."""

    peer: socket.socket
    reader: MessageReader
    association: Any
    arrivals: list[Recorder]
    refused: list[str]

    def answer(self) -> DIMSEMessage:
        """The next response, as the library reads it."""
        message = DIMSEMessage()
        while True:
            header = self._exactly(6)
            pdu = P_DATA_TF()
            pdu.decode(header + self._exactly(struct.unpack(">I", header[2:])[0]))
            if message.decode_msg(pdu.to_primitive()):
                return message

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            step = self.peer.recv(size - len(data))
            assert step
            data += step
        return data


@contextmanager
def line(*, pdu_seconds: float = 5.0, object_bytes: int = 1 << 20) -> Iterator[Line]:
    ours, peer = socket.socketpair()
    association = Association(AE(), "acceptor")
    association.set_socket(AssociationSocket(association, client_socket=ours))
    arrivals: list[Recorder] = []
    refused: list[str] = []

    def begin(_association: Any, request: StoreRequest) -> Recorder | None:
        if request.context_id != CONTEXT:
            return None
        arrivals.append(Recorder(request, (0xA700, "no room") if request.message_id % 2 else (0, "")))
        return arrivals[-1]

    reader = MessageReader(
        association,
        begin,
        pdu_seconds=pdu_seconds,
        maximum_pdu_bytes=16384,
        maximum_object_bytes=object_bytes,
        budget=BufferBudget(1 << 30),
        refuse=refused.append,
    )
    peer.settimeout(5)
    try:
        yield Line(peer, reader, association, arrivals, refused)
    finally:
        ours.close()
        peer.close()


def command(message_id: int = 2, instance: str = INSTANCE) -> bytes:
    """A C-STORE-RQ's command set, as the library encodes it."""
    primitive = C_STORE()
    primitive.MessageID, primitive.Priority = message_id, 2
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = CTImageStorage, instance
    primitive.DataSet = BytesIO(b"x")
    message = C_STORE_RQ()
    message.primitive_to_message(primitive)
    return _command_of(message)


def echo() -> bytes:
    primitive = C_ECHO()
    primitive.MessageID, primitive.AffectedSOPClassUID = 7, "1.2.840.10008.1.1"
    message = C_ECHO_RQ()
    message.primitive_to_message(primitive)
    return _command_of(message)


def _command_of(message: Any) -> bytes:
    first = next(iter(message.encode_msg(CONTEXT, 0)))
    return bytes(first.presentation_data_value_list[0][1][1:])


def item(control: int, value: bytes, context: int = CONTEXT) -> bytes:
    return struct.pack(">IBB", len(value) + 2, context, control) + value


def pdu(*items: bytes, kind: int = 4) -> bytes:
    body = b"".join(items)
    return struct.pack(">BxI", kind, len(body)) + body


def pieces(value: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(value)) for cut in cuts), len(value)]
    return [value[one:other] for one, other in pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.binary(max_size=3000),
            st.lists(st.integers(0, 3000), max_size=6),
            st.lists(st.integers(0, 140), max_size=3),
            st.integers(1, 4),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_messages_in_fragments_of_every_size(messages: list[tuple[bytes, list[int], list[int], int]]) -> None:
    with line() as peer:
        for number, (data, cuts, command_cuts, in_one) in enumerate(messages):
            commands, fragments = pieces(command(number), command_cuts), pieces(data, cuts)
            items = [item(3 if n == len(commands) - 1 else 1, piece) for n, piece in enumerate(commands)]
            items += [item(2 if n == len(fragments) - 1 else 0, piece) for n, piece in enumerate(fragments)]
            pdus = [pdu(*items[begin : begin + in_one]) for begin in range(0, len(items), in_one)]
            peer.peer.sendall(b"".join(pdus))
            assert [peer.reader.read_pdu() for _ in pdus] == [None] * len(pdus)
            arrival = peer.arrivals[number]
            assert arrival.data_set == data == b"".join(arrival.fragments)
            assert arrival.request == StoreRequest(number, CONTEXT, CTImageStorage, INSTANCE)
            answered = peer.answer()
            assert answered.context_id == CONTEXT
            response = answered.command_set
            assert (response.CommandField, response.CommandDataSetType) == (0x8001, 0x0101)
            assert (response.MessageIDBeingRespondedTo, response.Status) == (number, arrival.answer[0])
            assert (response.AffectedSOPClassUID, response.AffectedSOPInstanceUID) == (CTImageStorage, INSTANCE)
            assert response.get("ErrorComment", "") == arrival.answer[1]
            assert not peer.reader.busy


def test_large_objects_grow_the_buffer_and_small_ones_follow() -> None:
    with line(object_bytes=16 << 20) as peer:
        for size in (9_000_000, 10):
            data = bytes(range(256)) * (size // 256 + 1)
            peer.peer.setblocking(True)
            peer.peer.sendall(pdu(item(3, command())))
            assert peer.reader.read_pdu() is None
            for begin in range(0, len(data), 16000):
                last = begin + 16000 >= len(data)
                peer.peer.sendall(pdu(item(2 if last else 0, data[begin : begin + 16000])))
                assert peer.reader.read_pdu() is None
            assert peer.arrivals[-1].data_set == data == b"".join(peer.arrivals[-1].fragments)
            peer.answer()


@pytest.mark.parametrize("maximum", [0, 1, 7, 8, 20, 100, 4096])
def test_answers_fit_the_peers_pdus(maximum: int) -> None:
    request = StoreRequest(65535, 255, "1.2.3", INSTANCE)
    sent = store_response(request, 0xC000, "x" * 70, maximum)
    message, position, longest = DIMSEMessage(), 0, 0
    done = False
    while not done:
        (length,) = struct.unpack_from(">I", sent, position + 2)
        part = P_DATA_TF()
        part.decode(sent[position : position + 6 + length])
        done = message.decode_msg(part.to_primitive())
        position, longest = position + 6 + length, max(longest, length)
    assert position == len(sent)
    assert not maximum or longest <= max(maximum, 7)  # one byte in an item of six: less cannot be said
    assert (message.context_id, message.command_set.Status) == (255, 0xC000)
    assert message.command_set.ErrorComment == "x" * 64
    assert message.command_set.MessageIDBeingRespondedTo == 65535


def test_commands_that_are_no_readable_store_request_are_left_to_the_library() -> None:
    good = command()
    assert read_store_request(good, 1) == StoreRequest(2, 1, CTImageStorage, INSTANCE)
    assert read_store_request(echo(), 1) is None
    assert read_store_request(b"", 1) is None
    for cut in range(1, len(good)):
        assert read_store_request(good[:cut], 1) is None
    assert read_store_request(good + b"\x00", 1) is None
    assert read_store_request(command(instance="1." + "2" * 62), 1) is not None
    long = command(instance="1." + "2" * 62)
    head = struct.pack("<HHI", 0, 0x1000, 64)
    oversized = long.replace(head, struct.pack("<HHI", 0, 0x1000, 66)).replace(b"2" * 62, b"2" * 64)
    assert len(oversized) == len(long) + 2
    assert read_store_request(oversized, 1) is None


@pytest.mark.parametrize(
    ("sent", "event", "reason"),
    [
        (pdu(item(3, command())), ABORTED, "a command in the middle of a data set"),
        (pdu(item(0, b"abc", context=5)), ABORTED, "a data set without its command"),  # another presentation context
        (pdu(struct.pack(">IBB", 1, CONTEXT, 0)), ABORTED, "items that do not fit"),  # without control header
        (pdu(struct.pack(">IBB", 100, CONTEXT, 0) + b"abc"), ABORTED, "items that do not fit"),  # leaves its PDU
        (pdu(b"\x00\x00\x00"), ABORTED, "items that do not fit"),  # half an item's header
        (b"\x09\x00\x00\x00\x00\x04abcd", ABORTED, "a PDU of no known type"),
        (struct.pack(">BxI", 4, 1 << 31), CLOSED, "the announced PDU is too long"),  # longer than negotiated
        (pdu(item(0, b"x" * 1001)), CLOSED, "the data set is too long"),  # longer than an object may be
        (pdu(item(0, b"abcdefgh"))[:-3], CLOSED, ""),  # then the peer is gone
        (pdu(b"\x00\x00\x00\x00", kind=7), A_ABORT, ""),
        (pdu(b"", kind=7), ABORTED, "a PDU that cannot be read"),  # an abort
    ],
)
def test_what_breaks_off_a_data_set_and_whose_doing_it_is(sent: bytes, event: str, reason: str) -> None:
    with line(object_bytes=1000) as peer:
        peer.peer.sendall(pdu(item(3, command())) + pdu(item(0, b"begun")))
        assert [peer.reader.read_pdu(), peer.reader.read_pdu()] == [None, None]
        peer.peer.sendall(sent)
        peer.peer.shutdown(socket.SHUT_WR)
        assert peer.reader.read_pdu() == event
        (arrival,) = peer.arrivals
        assert arrival.abandoned
        assert arrival.data_set is None
        assert not peer.reader.busy
        assert len(peer.refused) == bool(reason)
        assert "".join(peer.refused).startswith(reason)


def test_data_without_command_is_refused() -> None:
    with line() as peer:
        peer.peer.sendall(pdu(item(2, b"abc")))
        assert peer.reader.read_pdu() == ABORTED


def test_a_command_set_that_never_ends_is_refused() -> None:
    with line() as peer:
        event = None
        for _ in range(200):
            peer.peer.sendall(pdu(item(1, b"x" * 16000)))
            event = event or peer.reader.read_pdu()
            if event:
                break
        assert event == CLOSED
        assert peer.refused == ["the command set is too long"]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_other_commands_reach_the_library_whole(parts: int) -> None:
    whole = echo()
    step = -(-len(whole) // parts)
    with line() as peer:
        events = []
        for begin in range(0, len(whole), step):
            last = begin + step >= len(whole)
            peer.peer.sendall(pdu(item(3 if last else 1, whole[begin : begin + step])))
            events.append(peer.reader.read_pdu())
        assert events == [None] * (parts - 1) + [P_DATA]
        decoded = peer.association.dul._recv_pdu.get_nowait()
        message = DIMSEMessage()
        assert message.decode_msg(decoded.to_primitive())
        assert message.command_set.MessageID == 7
        assert peer.reader.lent


def test_a_request_under_an_unknown_context_reaches_the_library_with_what_follows_it() -> None:
    with line() as peer:
        peer.peer.sendall(pdu(item(3, command(), context=9), item(2, b"abc", context=9)))
        assert peer.reader.read_pdu() == P_DATA
        decoded = peer.association.dul._recv_pdu.get_nowait()
        values = [(value[0], value[1][:1]) for value in decoded.to_primitive().presentation_data_value_list]
        assert values == [(9, b"\x03"), (9, b"\x02")]
        assert peer.arrivals == []


def test_a_dripping_peer_holds_the_thread_for_a_bounded_time() -> None:
    with line(pdu_seconds=0.2) as peer:
        peer.peer.sendall(pdu(item(3, command())) + pdu(item(2, b"x" * 50))[:20])
        assert peer.reader.read_pdu() is None
        begun = time.monotonic()
        assert peer.reader.read_pdu() == CLOSED
        assert time.monotonic() - begun < 2
        assert peer.arrivals[0].abandoned
        assert peer.refused == ["a PDU did not come in time"]
