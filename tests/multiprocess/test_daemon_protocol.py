# SPDX-License-Identifier: Apache-2.0
"""Whoever connects to a daemon, and with whatever: roles, versions, limits, nonsense, hostility."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenote._native import _core
from cenote.shm.session import attach, new_hello, parse_welcome
from cenote.shm.wire import (
    HEADER,
    Channel,
    Decoder,
    Refusal,
    WireError,
    close_all,
    encode,
    receive,
    send_message,
)

SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
F_SEAL_FUTURE_WRITE = 0x10
ACCESS = """
[[pool]]
name = "{pool}"
socket = "{socket}"
[[pool.region]]
medium = "memfd"
size = "16MiB"
[pool.access]
"""


def replies_until_closed(sock: socket.socket) -> list[dict[str, Any]]:
    """Everything that the daemon says before it closes the connection."""
    decoder, found = Decoder(descriptors_max=40), []
    with contextlib.suppress(ConnectionError):
        while receive(sock, decoder):
            while message := decoder.next():
                close_all(message.descriptors)
                found.append(message.body)
    return found


def writable(fd: int) -> bool:
    """Whether the descriptor was opened for writing."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


# ---- roles -------------------------------------------------------------------------------------


def test_each_role_gets_its_descriptors(cenoted: Callable[..., Any]) -> None:
    """
    A reader never gets a writable region; nobody gets a writable catalog; every descriptor is an
    open of its own; without a wish one becomes a writer.
    """
    daemon = cenoted()
    wanted = {"reader": ["r0.ro"], "writer": ["r0.ro", "r0.rw"], "admin": ["r0.ro", "r0.rw"]}
    for role, regions in wanted.items():
        _channel, welcome, fds = daemon.hello(role)
        assert (welcome.role, list(fds)[3:]) == (role, regions)
        assert [name for name, fd in fds.items() if writable(fd)] == [
            name for name in fds if name in ("session", "doorbell", "r0.rw")
        ]
        limited = welcome.lease_limit_bytes < welcome.capacity_bytes
        assert limited == (role == "reader")

    assert daemon.hello(None)[1].role == "writer"


def test_memfds_are_sealed_and_private(cenoted: Callable[..., Any]) -> None:
    """No client can truncate what others map, and none but the daemon's uid can open it again."""
    _channel, _welcome, fds = cenoted().hello("writer")

    for name in ("catalog", "session", "r0.ro", "r0.rw"):
        assert os.fstat(fds[name]).st_mode & 0o777 == 0o600
        seals = fcntl.fcntl(fds[name], fcntl.F_GET_SEALS)
        assert seals & SIZE_SEALS == SIZE_SEALS
        assert not seals & F_SEAL_FUTURE_WRITE  # it would lock the next daemon out
    with pytest.raises(PermissionError):
        os.ftruncate(fds["r0.rw"], 4096)


def test_the_session_lock_is_held_by_the_client_alone(cenoted: Callable[..., Any]) -> None:
    """The liveness lock is on the description that the client got, so only it can drop it."""
    _channel, _welcome, fds = cenoted().hello("reader")
    again = os.open(f"/proc/self/fd/{fds['session']}", os.O_RDWR)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(again)


def test_unknown_users_are_refused(cenoted: Callable[..., Any]) -> None:
    """A uid in no list gets `access`, with what to do; nothing else happens."""
    daemon = cenoted(config=ACCESS + f"admins = [{os.geteuid() + 4242}]\n")

    with pytest.raises(Refusal, match=r"readers or writers in its \[pool.access\]") as refused:
        daemon.hello()

    assert refused.value.code == "access"


def test_a_reader_may_not_be_more(cenoted: Callable[..., Any]) -> None:
    """Asking for more than the lists give is refused; asking for nothing gives what there is."""
    me, other = os.geteuid(), os.geteuid() + 4242
    daemon = cenoted(config=ACCESS + f"readers = [{me}]\nadmins = [{other}]\n")

    assert daemon.hello(None)[1].role == "reader"
    for role in ("writer", "admin"):
        with pytest.raises(Refusal, match=f"may be reader of pool .*, not {role}"):
            daemon.hello(role)


def test_admin_operations_need_an_admin(cenoted: Callable[..., Any]) -> None:
    """A writer can neither clear nor destroy, though its user could be an admin."""
    daemon = cenoted()
    channel, _welcome, _fds = daemon.hello("writer")
    for op in ("clear", "destroy"):
        with pytest.raises(Refusal, match="only an admin") as refused:
            channel.request(op)
        assert refused.value.code == "access"

    admin, _welcome, _fds = daemon.hello("admin")
    assert admin.request("clear").body["dropped"] == 0
    assert "access" in admin.request("config").body["config"]
    assert "access" not in channel.request("config").body["config"]


# ---- versions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"protocol": [2, 3]}, "update the daemon"),
        ({"layout": 999}, "memory layout 999"),
        ({"fingerprint": 7}, "fingerprint 0x7"),
    ],
)
def test_other_versions_are_told_which(
    cenoted: Callable[..., Any], change: dict[str, Any], told: str
) -> None:
    """A client of another protocol or layout gets `version` and what to install."""
    with pytest.raises(Refusal, match=told) as refused:
        cenoted().hello(**change)

    assert refused.value.code == "version"
    assert refused.value.fields


def test_another_frame_version_is_told_so(cenoted: Callable[..., Any]) -> None:
    """A header with another version is answered, and the connection closed."""
    sock = cenoted().connect()
    sock.sendall(struct.pack("<IHH", 1, 9, 0) + b"\x80")

    (reply,) = replies_until_closed(sock)

    assert (reply["error"], reply["id"]) == ("version", 0)


# ---- nonsense ----------------------------------------------------------------------------------

BAD_FRAMES = {
    "giant": HEADER.pack(2**31, 1, 0),
    "larger than a hello": HEADER.pack(4097, 1, 0),
    "empty": HEADER.pack(0, 1, 0),
    "reserved": HEADER.pack(1, 1, 5) + b"\x80",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no msgpack": HEADER.pack(1, 1, 0) + b"\xc1",
    "truncated msgpack": HEADER.pack(2, 1, 0) + b"\x82\xa1",
    "no map": HEADER.pack(1, 1, 0) + b"\x01",
    "a lying array": HEADER.pack(5, 1, 0) + b"\xdd\xff\xff\xff\xff",
    "extension": HEADER.pack(9, 1, 0) + b"\x82\xa2op\xd4\x01\x01\xa1x",
    "bytes as keys": encode({})[:0] + HEADER.pack(5, 1, 0) + b"\x81\xc4\x01a\x01",
    "no op": encode({"id": 1}),
    "unknown op": encode({"op": "format", "id": 1}),
    "id of the wrong type": encode({"op": "ping", "id": "1"}),
    "id out of range": encode({"op": "ping", "id": 2**40}),
    "no hello first": encode({"op": "stats", "id": 1}),
    "hello without fields": encode({"op": "hello", "id": 1}),
    "label too long": encode(
        {"op": "hello", "id": 1, **new_hello("x").fields(), "label": "x" * 40}
    ),
    "label with a line end": encode(
        {"op": "hello", "id": 1, **new_hello("x").fields(), "label": "x\ny"}
    ),
    "role of the wrong type": encode(
        {"op": "hello", "id": 1, **new_hello("x").fields(), "role": 3}
    ),
    "deep": HEADER.pack(4000, 1, 0) + b"\x91" * 4000,
}


def test_nonsense_ends_its_connection_only(cenoted: Callable[..., Any]) -> None:
    """
    Every kind of malformed message closes the connection that it came on, with one reason; others
    go on, no session is left, and the log has few lines.
    """
    daemon = cenoted("--checksum", "off")
    bystander, _welcome, _fds = daemon.hello()
    for name, frame in BAD_FRAMES.items():
        for _ in range(3):
            sock = daemon.connect()
            sock.sendall(frame)
            (reply,) = replies_until_closed(sock)
            assert reply["ok"] is False, name
            assert reply["error"] in ("bad_request", "version"), name
            assert reply["message"], name

    assert bystander.request("ping").body["ok"] is True
    assert bystander.request("stats").body["counters"]["sessions"] == 1
    malformed = [line for line in daemon.log().splitlines() if "client_malformed" in line]
    assert len(malformed) == 1


def test_the_wrong_field_is_named(cenoted: Callable[..., Any]) -> None:
    """A wrong type is a bad_request that names the field; an unknown field is ignored."""
    daemon = cenoted()
    with pytest.raises(Refusal, match="field 'fingerprint' is 'x'") as refused:
        daemon.hello(fingerprint="x")
    assert refused.value.code == "bad_request"

    assert daemon.hello(surprise={"a": [1, 2]})[1].pool == daemon.pool


def test_a_truncated_message_waits_for_its_rest(cenoted: Callable[..., Any]) -> None:
    """A message may come byte by byte; one that never ends is closed with its connection."""
    daemon = cenoted()
    sock = daemon.connect()
    for byte in encode({"op": "hello", "id": 1, **new_hello("slow").fields()}):
        sock.sendall(bytes([byte]))
    decoder = Decoder(descriptors_max=40)
    while (message := decoder.next()) is None:
        assert receive(sock, decoder)
    close_all(message.descriptors)
    assert message.body["ok"] is True

    half = daemon.connect()
    half.sendall(encode({"op": "ping", "id": 1})[:5])
    half.close()
    assert daemon.hello()[0].request("ping").body["ok"] is True


def test_who_says_nothing_is_closed(cenoted: Callable[..., Any]) -> None:
    """A connection without a hello ends after its deadline, with a reason."""
    daemon = cenoted()
    sock = daemon.connect()

    (reply,) = replies_until_closed(sock)

    assert (reply["error"], "no hello" in reply["message"]) == ("limit", True)


# ---- descriptors -------------------------------------------------------------------------------


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    """Fifty descriptors that are no pidfds."""
    ends = [end for _ in range(25) for end in os.pipe()]
    yield ends
    close_all(ends)


def open_descriptors(daemon: Any) -> int:
    """How many descriptors the daemon has open."""
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


@pytest.mark.skipif(os.geteuid() != 0, reason="the daemon hides /proc/pid/fd from its own user")
def test_unwanted_descriptors_are_closed(cenoted: Callable[..., Any], pipes: list[int]) -> None:
    """Too many descriptors, or of the wrong kind, or with a ping: refused, and none is kept."""
    daemon = cenoted()
    channel, _welcome, _fds = daemon.hello()
    channel.request("ping")  # by now it has closed its copies of what it sent us
    before = open_descriptors(daemon)
    hello = {"op": "hello", "id": 1, **new_hello("x").fields()}
    for count in (1, 2, 40):
        sock = daemon.connect()
        send_message(sock, hello, pipes[:count])
        (reply,) = replies_until_closed(sock)
        assert reply["error"] == "bad_request"
        sock.close()
    with pytest.raises(Refusal, match="carries no descriptors"):
        channel.request("ping", descriptors=pipes[:1])
    behind = daemon.connect()
    behind.sendall(encode(hello)[:9])
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", pipes[0]))
    behind.sendmsg([encode(hello)[9:]], [rights])
    assert all(reply["error"] == "bad_request" for reply in replies_until_closed(behind))
    behind.close()
    channel.request("ping")

    assert open_descriptors(daemon) == before


def test_a_pidfd_of_another_process_is_refused(cenoted: Callable[..., Any]) -> None:
    """A pidfd that would outlive its client would keep the client's leases alive."""
    daemon = cenoted()
    pidfd = os.pidfd_open(os.getppid())
    try:
        with pytest.raises(Refusal, match="the pidfd is of process"):
            daemon.channel().request("hello", new_hello("x").fields(), descriptors=[pidfd])
    finally:
        os.close(pidfd)


# ---- many, fast, slow --------------------------------------------------------------------------


def test_two_hundred_clients_at_once(cenoted: Callable[..., Any]) -> None:
    """200 connections say hello before any is answered; all become sessions, then all end."""
    daemon = cenoted("--checksum", "off")
    socks = [daemon.connect() for _ in range(200)]
    for sock in socks:
        send_message(sock, {"op": "hello", "id": 1, **new_hello("x", "reader").fields()})
    welcomes = []
    for sock in socks:
        decoder = Decoder(descriptors_max=40)
        while (message := decoder.next()) is None:
            assert receive(sock, decoder)
        welcome, fds = parse_welcome(message)
        close_all(fds.values())
        welcomes.append(welcome)
    channel, _welcome, _fds = daemon.hello()

    assert len({(w.session, w.nonce) for w in welcomes}) == 200
    for sock in socks:
        sock.close()
    pause = threading.Event()
    while channel.request("stats").body["counters"]["sessions"] > 1:
        pause.wait(0.02)


def test_sessions_have_a_limit(cenoted: Callable[..., Any]) -> None:
    """The 1,025th session is refused, costs nothing, and is possible again once others ended."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("needs 4,096 descriptors (`ulimit -Hn`)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    daemon = cenoted("--checksum", "off", "--max-chunks", "64", size="2MiB")
    held: list[int] = []
    try:
        held += [lasting_session(daemon) for _ in range(1024)]
        with pytest.raises(Refusal, match="limit") as refused:
            lasting_session(daemon)
        assert refused.value.code == "limit"
    finally:
        close_all(held)
    pause = threading.Event()
    while True:
        with contextlib.suppress(Refusal):
            channel, _welcome, _fds = daemon.hello()
            break
        pause.wait(0.02)
    while channel.request("stats").body["counters"]["sessions"] > 1:
        pause.wait(0.02)


def lasting_session(daemon: Any) -> int:
    """Open a session whose socket is closed; it lives with the descriptor that is returned."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(daemon.socket))
        reply = Channel(sock).request("hello", new_hello("x", "reader").fields(), timeout_s=60)
        _welcome, fds = parse_welcome(reply)
    kept = fds.pop("session")
    close_all(fds.values())
    return kept


def test_who_does_not_read_is_held_and_others_go_on(cenoted: Callable[..., Any]) -> None:
    """
    A client that sends and never reads gets no further: the daemon keeps one answer for it, reads
    no more from it, and serves everybody else.
    """
    daemon = cenoted()
    channel, _welcome, _fds = daemon.hello()
    deaf = daemon.connect()
    send_message(deaf, {"op": "hello", "id": 1, **new_hello("deaf").fields()})
    deaf.setblocking(False)
    sent = 0
    request = encode({"op": "config", "id": 2})
    ready = select.poll()
    ready.register(deaf, select.POLLOUT)
    while ready.poll(500):
        with contextlib.suppress(BlockingIOError):
            sent += deaf.send(request * 64)

    assert sent > 0
    assert channel.request("ping").body["ok"] is True


def test_stop_while_a_client_holds_memory(cenoted: Callable[..., Any]) -> None:
    """A client keeps reading what it mapped after the daemon has gone."""
    daemon = cenoted()
    _channel, welcome, fds = daemon.hello("writer")
    mapping = attach(welcome, fds)

    assert daemon.stop() == 0

    head = _core.ffi.cast("struct cn_super *", mapping.catalog)
    assert bytes(_core.ffi.buffer(head.pool_id)) == welcome.pool_id


def test_wire_errors_close_the_clients_end(cenoted: Callable[..., Any]) -> None:
    """A server that talks nonsense is a WireError for the client, and its socket is closed."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    theirs.sendall(b"\x01\x00\x00\x00\x01\x00\x00\x00\xc1")

    with pytest.raises(WireError):
        channel.request("ping", timeout_s=5)

    assert channel.fileno() == -1
    theirs.close()
