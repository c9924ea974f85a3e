# SPDX-License-Identifier: Apache-2.0
"""
The control protocol: frames, the descriptors that ride on them, replies, and the client's channel.

What the fields of a message may be is in messages.py. Specified in docs/control-protocol.md, with
golden vectors in tests/protocol/. Everything that a peer sent is hostile input (I4, I11): sizes are
checked before bytes are kept, types before they are used.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack

PROTOCOL_VERSION: Final = 1
HEADER: Final = struct.Struct("<IHH")  # body bytes, protocol version, reserved
BODY_MAX_BYTES: Final = 2**20
HELLO_BODY_MAX_BYTES: Final = 4096  # what a server reads from somebody it does not know yet
REQUEST_BODY_MAX_BYTES: Final = 2**16
DESCRIPTORS_MAX: Final = 40
RECEIVE_BYTES: Final = 2**16
MAP_MAX: Final = 1024
ARRAY_MAX: Final = 4096
ID_MAX: Final = 2**32 - 1
TEXT_SHOWN_MAX: Final = 80

ERRORS: Final = frozenset(
    {
        "bad_request",
        "version",
        "access",
        "limit",
        "manifest_mismatch",
        "not_found",
        "internal",
        "retired",
    }
)
_INT_FD: Final = struct.calcsize("i")


class Refusal(Exception):
    """An answer that is no: *code* is one of ERRORS, *fields* has details for programs."""

    def __init__(self, code: str, message: str, fields: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fields: dict[str, Any] = dict(fields or {})


class WireError(Refusal):
    """The peer broke the protocol. The connection is of no more use."""

    def __init__(self, message: str, code: str = "bad_request") -> None:
        super().__init__(code, message)


class Closed(ConnectionError):
    """The peer closed the connection, or said that it is about to."""


# ---- frames ------------------------------------------------------------------------------------


def encode(body: Mapping[str, Any]) -> bytes:
    """
    Return the frame of *body*.

    Raises:
        ValueError: It is larger than BODY_MAX_BYTES.
    """
    packed: bytes = msgpack.packb(body, use_bin_type=True)
    if len(packed) <= BODY_MAX_BYTES:
        return HEADER.pack(len(packed), PROTOCOL_VERSION, 0) + packed
    raise ValueError(f"a message of {len(packed)} bytes: at most {BODY_MAX_BYTES} can be sent")


def decode_body(packed: bytes | bytearray | memoryview) -> dict[str, Any]:
    """
    Return the map in *packed*.

    Raises:
        WireError: It is no msgpack map with str keys, or holds a type that the protocol lacks.
    """
    limit = len(packed)
    try:
        body = msgpack.unpackb(
            packed,
            raw=False,
            strict_map_key=True,
            max_str_len=limit,
            max_bin_len=limit,
            max_array_len=ARRAY_MAX,
            max_map_len=MAP_MAX,
            max_ext_len=0,
            ext_hook=_no_ext,
        )
    except (ValueError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"the message is no valid msgpack: {str(error)[:TEXT_SHOWN_MAX]}") from None
    if not isinstance(body, dict):
        raise WireError(f"the message is a {type(body).__name__}, and must be a map")
    if all(isinstance(key, str) for key in body):
        return body
    raise WireError("the message has a key that is no text")


def _no_ext(code: int, _data: bytes) -> None:
    raise ValueError(f"extension type {code} is not allowed")


@dataclass(frozen=True)
class Message:
    """A decoded message; whoever takes it owns its descriptors."""

    body: dict[str, Any]
    descriptors: tuple[int, ...] = ()


class Decoder:
    """
    Cut a byte stream into messages. No input or output, except that close() closes descriptors.

    feed() what one recvmsg(2) returned, then take messages with next() until it returns None.
    Descriptors of one recvmsg belong to the last message that begins in its bytes: the kernel ends
    a read behind the bytes that carried descriptors, and a sender puts them on a message's first.
    """

    def __init__(self, body_max_bytes: int = BODY_MAX_BYTES, descriptors_max: int = 0) -> None:
        self.body_max_bytes = body_max_bytes
        self.descriptors_max = descriptors_max
        self._buffer = bytearray()
        self._origin = 0  # position in the stream of the buffer's first byte
        self._walked = 0  # position in the stream where the next unseen message begins
        self._riding: dict[int, tuple[int, ...]] = {}  # by the position where the message begins
        self._broken: WireError | None = None

    @property
    def pending_bytes(self) -> int:
        """Bytes of messages that were not taken yet."""
        return len(self._buffer)

    def feed(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Add what was read. Owns *descriptors* from now on."""
        fed_from = self._origin + len(self._buffer)
        self._buffer += data
        last_begin = self._walk()
        if not descriptors:
            return
        if len(descriptors) <= self.descriptors_max and last_begin >= fed_from:
            self._riding[last_begin] = tuple(descriptors)
            return
        close_all(descriptors)
        self._broken = WireError(
            f"{len(descriptors)} descriptors came; {self.descriptors_max} are allowed here, "
            "and on the first byte of a message only"
        )

    def _walk(self) -> int:
        """Step over the headers that are here; return where the last message begins, or -1."""
        end = self._origin + len(self._buffer)
        last_begin = -1
        while self._walked < end:
            last_begin = self._walked
            at = self._walked - self._origin
            if end - self._walked < HEADER.size:
                break
            body_bytes, _version, _reserved = HEADER.unpack_from(self._buffer, at)
            if body_bytes > BODY_MAX_BYTES:
                break  # next() refuses it
            self._walked += HEADER.size + body_bytes
        return last_begin

    def next(self) -> Message | None:
        """
        Return the next whole message, or None until more is fed.

        Raises:
            WireError: The peer broke the protocol; call close() and close the connection.
        """
        if self._broken is not None:
            raise self._broken
        if len(self._buffer) < HEADER.size:
            return None
        body_bytes, version, reserved = HEADER.unpack_from(self._buffer)
        self._check_header(body_bytes, version, reserved)
        end = HEADER.size + body_bytes
        if len(self._buffer) < end:
            return None
        body = decode_body(bytes(memoryview(self._buffer)[HEADER.size : end]))
        descriptors = self._riding.pop(self._origin, ())
        del self._buffer[:end]
        self._origin += end
        return Message(body, descriptors)

    def _check_header(self, body_bytes: int, version: int, reserved: int) -> None:
        if version != PROTOCOL_VERSION:
            raise WireError(
                f"the message has protocol version {version}, and this side speaks "
                f"{PROTOCOL_VERSION}: install the same release of cenote on both sides",
                "version",
            )
        if reserved:
            raise WireError(f"the reserved header field is {reserved}, and must be 0")
        if not 1 <= body_bytes <= self.body_max_bytes:
            raise WireError(
                f"the message announces {body_bytes} bytes; 1 to {self.body_max_bytes} are allowed"
            )

    def close(self) -> None:
        """Close the descriptors of messages that nobody took."""
        for descriptors in self._riding.values():
            close_all(descriptors)
        self._riding.clear()


# ---- sockets -----------------------------------------------------------------------------------


def close_all(descriptors: Iterable[int]) -> None:
    """Close descriptors, whatever happens to each."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def send_some(sock: socket.socket, data: memoryview, descriptors: Sequence[int]) -> int:
    """Send once and return how many bytes went; the descriptors go with the first of them."""
    if not descriptors:
        return sock.send(data, socket.MSG_NOSIGNAL)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    return sock.sendmsg([data], [rights], socket.MSG_NOSIGNAL)


def send_message(
    sock: socket.socket, body: Mapping[str, Any], descriptors: Sequence[int] = ()
) -> None:
    """
    Send one message over a blocking socket. The descriptors stay the caller's.

    Raises:
        ValueError: Too large, or more than DESCRIPTORS_MAX descriptors.
        OSError: The socket's own; TimeoutError by its timeout.
    """
    if len(descriptors) > DESCRIPTORS_MAX:
        raise ValueError(f"{len(descriptors)} descriptors: at most {DESCRIPTORS_MAX} can be sent")
    left = memoryview(encode(body))
    while left:
        left = left[send_some(sock, left, descriptors) :]
        descriptors = ()


def receive(sock: socket.socket, decoder: Decoder) -> bool:
    """
    Read once into *decoder*; False at the end of the stream.

    Raises:
        WireError: More descriptors came than allowed; all of them are closed.
        OSError: The socket's own, BlockingIOError among them.
    """
    room = socket.CMSG_SPACE(_INT_FD * decoder.descriptors_max) if decoder.descriptors_max else 0
    data, ancillary, flags, _ = sock.recvmsg(RECEIVE_BYTES, room, socket.MSG_CMSG_CLOEXEC)
    descriptors = _rights_in(ancillary)
    if flags & socket.MSG_CTRUNC:
        close_all(descriptors)
        raise WireError(
            f"more descriptors came than allowed here ({decoder.descriptors_max}), or this process "
            "may open no more files (ulimit -n)"
        )
    if not data:
        close_all(descriptors)
        return False
    decoder.feed(data, descriptors)
    return True


def _rights_in(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            whole = len(data) - len(data) % _INT_FD
            found.extend(item[0] for item in struct.iter_unpack("i", data[:whole]))
    return found


# ---- replies -----------------------------------------------------------------------------------


def success(request_id: int, **fields: Any) -> dict[str, Any]:
    """Return the body of a reply that says yes."""
    return {"id": request_id, "ok": True, **fields}


def failure(request_id: int, refusal: Refusal) -> dict[str, Any]:
    """Return the body of a reply that says no; id 0 concerns the connection as a whole."""
    return {
        "id": request_id,
        "ok": False,
        "error": refusal.code,
        "message": refusal.message,
        "fields": refusal.fields,
    }


def checked_reply(message: Message) -> Message:
    """Return *message* when it says yes; raise the Refusal that it carries, or a WireError."""
    body = message.body
    if body.get("ok") is True:
        return message
    close_all(message.descriptors)
    code, text, fields = body.get("error"), body.get("message"), body.get("fields")
    known = isinstance(code, str) and isinstance(text, str) and isinstance(fields, dict)
    if body.get("ok") is not False or not known:
        raise WireError("the daemon's reply says neither yes nor no: install the same cenote")
    raise Refusal(str(code), str(text), fields)  # the code of a newer daemon is passed on as it is


class OwnSocket:
    """
    A socket that knows itself again: after os.closerange() its number may be a file of somebody
    else's, which we neither write to nor close.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._found = os.fstat(sock.fileno())

    @property
    def intact(self) -> bool:
        """Is it open, and still the same?"""
        try:
            return os.path.samestat(os.fstat(self.sock.fileno()), self._found)
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        """Close it, or forget its number when that is not ours any more. Idempotent."""
        if self.intact:
            self.sock.close()
        else:
            self.sock.detach()


class Channel:
    """
    The client's end of a connection: one request at a time, each with a deadline. Owns *sock*.

    Not for several threads at once. After an OSError or a WireError it is closed.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._own = OwnSocket(sock)
        self._sock = sock
        self._decoder = Decoder(descriptors_max=DESCRIPTORS_MAX)
        self._next_id = 1
        self.notices: deque[dict[str, Any]] = deque(maxlen=16)  # events that the server sent

    def fileno(self) -> int:
        """The socket's descriptor, for poll(2); -1 once closed, by us or under us."""
        return self._sock.fileno() if self._own.intact else -1

    def request(
        self,
        op: str,
        fields: Mapping[str, Any] | None = None,
        *,
        descriptors: Sequence[int] = (),
        timeout_s: float = 2.0,
    ) -> Message:
        """
        Send a request and return its reply; the caller owns the reply's descriptors.

        Raises:
            Refusal: The server's no.
            WireError: The server broke the protocol.
            Closed: It closed the connection first.
            TimeoutError: No reply within *timeout_s*.
        """
        request_id = self._next_id
        self._next_id = request_id % ID_MAX + 1
        deadline_s = time.monotonic() + timeout_s
        try:
            if not self._own.intact:
                raise Closed("this process closed the descriptor of its connection")
            self._sock.settimeout(timeout_s)
            send_message(self._sock, {**(fields or {}), "op": op, "id": request_id}, descriptors)
            reply = self._await_reply(request_id, deadline_s)
        except BrokenPipeError:
            reply = self._last_words(request_id)
        except (OSError, WireError):
            self.close()
            raise
        return checked_reply(reply)

    def _last_words(self, request_id: int) -> Message:
        """The server closed before it read: what it had said is still there."""
        try:
            return self._await_reply(request_id, time.monotonic())
        finally:
            self.close()

    def _await_reply(self, request_id: int, deadline_s: float) -> Message:
        while True:
            message = self._decoder.next()
            if message is None:
                self._sock.settimeout(max(deadline_s - time.monotonic(), 1e-3))
                if not receive(self._sock, self._decoder):
                    raise Closed("the daemon closed the connection")
                continue
            if message.body.get("id") in (request_id, 0):  # 0: about the connection as a whole
                return message
            close_all(message.descriptors)
            if "event" in message.body:
                self.notices.append(message.body)

    def close(self) -> None:
        """Close the socket and what was received but not taken. Idempotent."""
        self._decoder.close()
        self._own.close()
