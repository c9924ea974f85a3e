# SPDX-License-Identifier: Apache-2.0
"""Frames, descriptors and the client's channel: cenote.shm.wire, cenote.shm.messages."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.shm.errors import ProtocolError
from cenote.shm.messages import Fields
from cenote.shm.session import new_hello, parse_welcome
from cenote.shm.wire import (
    BODY_MAX_BYTES,
    HEADER,
    Channel,
    Closed,
    Decoder,
    Message,
    Refusal,
    WireError,
    close_all,
    decode_body,
    encode,
    failure,
    receive,
    send_message,
    success,
)

SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary()
BODIES = st.dictionaries(st.text(), SCALARS | st.lists(SCALARS), max_size=8)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def null() -> Iterator[int]:
    """A descriptor to send."""
    fd = os.open("/dev/null", os.O_RDONLY)
    yield fd
    os.close(fd)


def open_count() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def is_open(fd: int) -> bool:
    """Whether the descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def taken(decoder: Decoder) -> list[Message]:
    """Every message that is whole."""
    return list(iter(decoder.next, None))


# ---- frames ------------------------------------------------------------------------------------


@given(st.lists(BODIES, max_size=4), st.lists(st.integers(1, 40), max_size=50))
def test_any_cutting_gives_the_same_messages(bodies: list[dict[str, Any]], cuts: list[int]) -> None:
    """However the stream is cut into reads, the same messages come out, in order."""
    stream = b"".join(encode(body) for body in bodies)
    decoder, found, at = Decoder(), [], 0
    for step in [*cuts, len(stream) + 1]:
        decoder.feed(stream[at : at + step])
        found += taken(decoder)
        at += step
        if at >= len(stream):
            break

    assert [message.body for message in found] == bodies
    assert decoder.pending_bytes == 0


@given(st.binary(max_size=200))
def test_any_bytes_give_a_map_or_a_wire_error(packed: bytes) -> None:
    """Whatever a peer sends, the answer is a map with text keys, or a WireError."""
    try:
        body = decode_body(packed)
    except WireError:
        return
    assert all(isinstance(key, str) for key in body)


def test_too_large_a_message_is_not_sent() -> None:
    """What the other side would refuse is a ValueError here."""
    with pytest.raises(ValueError, match="at most 1048576"):
        encode({"x": bytes(BODY_MAX_BYTES)})


def test_the_limit_of_a_decoder_holds_before_the_body_is_there() -> None:
    """A header that announces too much is refused at once, so that nothing piles up."""
    decoder = Decoder(body_max_bytes=100)
    decoder.feed(HEADER.pack(101, 1, 0))

    with pytest.raises(WireError, match="announces 101 bytes; 1 to 100"):
        decoder.next()


# ---- descriptors -------------------------------------------------------------------------------


def test_descriptors_belong_to_their_message(
    pair: tuple[socket.socket, socket.socket], null: int
) -> None:
    """Of several messages in the socket, the one that was sent with descriptors has them."""
    ours, theirs = pair
    send_message(ours, {"n": 1})
    send_message(ours, {"n": 2}, [null, null])
    send_message(ours, {"n": 3})
    decoder = Decoder(descriptors_max=2)
    found: list[Message] = []
    while len(found) < 3:
        assert receive(theirs, decoder)
        found += taken(decoder)

    assert [(m.body["n"], len(m.descriptors)) for m in found] == [(1, 0), (2, 2), (3, 0)]
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in found[1].descriptors)
    close_all(found[1].descriptors)


def test_a_message_larger_than_a_read_keeps_its_descriptors(
    pair: tuple[socket.socket, socket.socket], null: int
) -> None:
    """Descriptors come with the first byte and wait for the last."""
    ours, theirs = pair
    body = {"x": os.urandom(900_000)}
    sender = threading.Thread(target=send_message, args=(ours, body, [null]))
    sender.start()
    decoder = Decoder(descriptors_max=1)
    message = None
    while message is None:
        assert receive(theirs, decoder)
        message = decoder.next()
    sender.join()

    assert message.body == body
    assert len(message.descriptors) == 1
    close_all(message.descriptors)


def test_descriptors_in_the_middle_of_a_message_are_refused(null: int) -> None:
    """They have no message to belong to: closed, and the connection is of no more use."""
    copy, frame = os.dup(null), encode({"op": "ping", "id": 1})
    decoder = Decoder(descriptors_max=4)
    decoder.feed(frame[:4])
    decoder.feed(frame[4:], [copy])

    assert not is_open(copy)
    with pytest.raises(WireError, match="first byte"):
        decoder.next()


def test_more_descriptors_than_allowed_are_all_closed(
    pair: tuple[socket.socket, socket.socket], null: int
) -> None:
    """The kernel's cut (MSG_CTRUNC) is a refusal, and what came through is closed."""
    ours, theirs = pair
    for allowed in (0, 1, 2):
        before = open_count()
        send_message(ours, {"n": 1}, [null] * 30)
        with pytest.raises(WireError, match="descriptors came"):
            receive(theirs, decoder := Decoder(descriptors_max=allowed)) and decoder.next()
        assert open_count() == before


def test_untaken_descriptors_are_closed(
    pair: tuple[socket.socket, socket.socket], null: int
) -> None:
    """A decoder that is given up closes what it holds."""
    ours, theirs = pair
    before = open_count()
    send_message(ours, {"n": 1}, [null])
    decoder = Decoder(descriptors_max=1)
    receive(theirs, decoder)
    decoder.close()

    assert open_count() == before


def test_at_most_forty_descriptors_are_sent(
    pair: tuple[socket.socket, socket.socket], null: int
) -> None:
    """The limit is the sender's, too."""
    with pytest.raises(ValueError, match="41 descriptors"):
        send_message(pair[0], {"n": 1}, [null] * 41)


# ---- the channel -------------------------------------------------------------------------------


def serve(sock: socket.socket, *bodies: dict[str, Any]) -> None:
    """Read one request, then send *bodies*."""
    decoder = Decoder()
    while decoder.next() is None:
        assert receive(sock, decoder)
    for body in bodies:
        send_message(sock, body)


def test_a_request_gets_its_own_reply(pair: tuple[socket.socket, socket.socket]) -> None:
    """Events and replies to other requests are passed over; events are kept."""
    ours, theirs = pair
    channel = Channel(ours)
    event = {"event": "closing", "reason": "stopping"}
    thread = threading.Thread(target=serve, args=(theirs, event, success(9), success(1, x=1)))
    thread.start()

    assert channel.request("ping", timeout_s=10).body["x"] == 1
    assert list(channel.notices) == [event]
    thread.join()


def test_a_no_is_a_refusal(pair: tuple[socket.socket, socket.socket]) -> None:
    """Code, message and fields arrive, and the channel lives on; one of a newer daemon, too."""
    ours, theirs = pair
    no = failure(1, Refusal("teapot", "short and stout", {"a": 1}))
    thread = threading.Thread(target=serve, args=(theirs, no))
    thread.start()
    channel = Channel(ours)

    with pytest.raises(Refusal, match="short and stout") as refused:
        channel.request("ping", timeout_s=10)

    assert (refused.value.code, refused.value.fields) == ("teapot", {"a": 1})
    assert channel.fileno() >= 0
    thread.join()


def test_what_the_server_said_before_it_closed_is_heard(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    """A refusal that was sent before our request could be is the answer to it."""
    ours, theirs = pair
    send_message(theirs, failure(0, Refusal("limit", "too many")))
    theirs.close()

    with pytest.raises(Refusal, match="too many"):
        Channel(ours).request("ping", timeout_s=5)


def test_a_closed_or_silent_server_is_no_hang(pair: tuple[socket.socket, socket.socket]) -> None:
    """Silence ends at the deadline, an end of the stream at once; the socket is closed then."""
    ours, theirs = pair
    channel = Channel(ours)
    with pytest.raises(TimeoutError):
        channel.request("ping", timeout_s=0.05)
    assert channel.fileno() == -1

    left, right = socket.socketpair()

    def hang_up() -> None:
        right.recv(1000)
        right.close()

    threading.Thread(target=hang_up).start()
    with pytest.raises(Closed):
        Channel(left).request("ping", timeout_s=10)
    theirs.close()


# ---- fields ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is None"),
        (True, "is True"),
        (-1, "is -1"),
        (11, "is 11"),
        ("5", "is '5'"),
        (5.0, "is 5.0"),
        ([5] * 1000, "is [5, 5"),
    ],
)
def test_integers_are_integers(value: object, message: str) -> None:
    """A truth value or a float is no whole number; the text names the field and is short."""
    with pytest.raises(WireError) as refused:
        Fields({"n": value}).integer("n", 0, 10)

    assert f"the field 'n' {message}" in refused.value.message
    assert len(refused.value.message) < 300


def test_a_missing_field_is_said_to_be_missing() -> None:
    """Not "is None"."""
    with pytest.raises(WireError, match="'x' is missing; it must be"):
        Fields({}).text("x", 3)


def test_labels_are_made_to_fit() -> None:
    """What a user names a session is cut at a character's border and loses control characters."""
    assert new_hello("x", None, "é" * 30).label == "é" * 19
    assert new_hello("x", None, "a\nb\x1b[2J").label == "a?b?[2J"
    with pytest.raises(ValueError, match="there is no role"):
        new_hello("x", "root")


def test_a_wrong_welcome_closes_its_descriptors(null: int) -> None:
    """A reply that is no welcome costs no descriptors."""
    copy = os.dup(null)

    with pytest.raises(ProtocolError, match="'pool' is missing"):
        parse_welcome(Message({"id": 1, "ok": True}, (copy,)))

    assert not is_open(copy)


def test_headers_are_eight_bytes_little_endian() -> None:
    """The header is what the document says, on every host."""
    assert encode({})[:8] == struct.pack("<IHH", 1, 1, 0) == b"\x01\0\0\0\x01\0\0\0"
