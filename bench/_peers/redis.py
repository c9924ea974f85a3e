# SPDX-License-Identifier: Apache-2.0
"""
Redis and memcached over a Unix socket, each spoken by the few lines that it takes.

A socket that sends the caller's array and receives into the caller's buffer is the best that these
servers can do: their Python clients build the value in memory of their own first.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .base import MIB, POOL_BYTES, Array, Need, Peer, leading

if TYPE_CHECKING:
    from .processes import Servers

LINE_BYTES_MAX = 512


class Wire:
    """A Unix socket that speaks in lines and in values of known length."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._socket.setsockopt(socket.SOL_SOCKET, option, 4 * MIB)

    def send(self, *parts: Any) -> None:
        """Send the parts one after another, gathered."""
        left = [memoryview(part).cast("B") for part in parts]
        while left:
            sent = self._socket.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def line(self) -> bytes:
        """Receive a line, without what follows it; its end is cut off."""
        seen = b""
        while b"\r\n" not in seen:
            seen = self._socket.recv(LINE_BYTES_MAX, socket.MSG_PEEK)
            if not seen or (len(seen) == LINE_BYTES_MAX and b"\r\n" not in seen):
                raise ConnectionError("the server closed, or answered with no line")
        text = seen[: seen.index(b"\r\n")]
        self._socket.recv(len(text) + 2)
        return text

    def into(self, target: Any) -> None:
        """Receive exactly as many bytes as *target* has."""
        left = memoryview(target)
        while left:
            got = self._socket.recv_into(left)
            if not got:
                raise ConnectionError("the server closed in the middle of a value")
            left = left[got:]

    def expect(self, wanted: bytes, count: int = 1) -> None:
        """Receive *count* answers that must all be *wanted*."""
        answer = bytearray(len(wanted))
        for _ in range(count):
            self.into(answer)
            if answer != wanted:
                raise ValueError(f"the server answered {bytes(answer)!r}, not {wanted!r}")

    def close(self) -> None:
        """Close."""
        self._socket.close()


class _Server(Peer):
    """What both have in common."""

    in_place = False
    file: ClassVar[str]

    def _socket(self) -> str:
        return str(self.folder / self.file)

    def connect(self, role: str) -> None:
        """Connect."""
        del role
        self._wire = Wire(self._socket())

    def key(self, nbytes: int, index: int) -> bytes:
        """Bytes without a blank."""
        return f"chunk-{nbytes}-{index}".encode()

    def view(self, key: Any) -> int:
        """A private copy in memory of its own: there is no other view."""
        return len(self._received(key, None))

    def copy(self, key: Any, target: Array) -> None:
        """Receive into the caller's buffer."""
        self._received(key, target)

    def _received(self, key: Any, target: Array | None) -> Array:
        """Receive the value into *target*, or into a new array."""
        nbytes = self._asked(key)
        into = np.empty(nbytes, np.uint8) if target is None else target
        if len(into) != nbytes:
            raise ValueError(f"{key!r} has {nbytes} bytes, not {len(into)}")
        self._wire.into(into)
        self._wire.expect(b"\r\n")
        return into

    def _asked(self, key: Any) -> int:
        """Ask for a value; return its length, with the socket where it begins."""
        raise NotImplementedError

    def close(self) -> None:
        """Disconnect."""
        self._wire.close()


class Redis(_Server):
    """redis-server: one thread, values in its own memory, persistence off."""

    name = "redis"
    title = "Redis, Unix socket"
    how = "GET; GET into the buffer; SET; 512 EXISTS in one pipeline; raw socket"
    needs = (Need("redis-server", program="redis-server"),)
    file = "redis.sock"

    def start(self, servers: Servers) -> None:
        """Without TCP."""
        options = ["--port", "0", "--unixsocket", self._socket(), "--dir", str(self.folder)]
        options += ["--save", "", "--appendonly", "no", "--maxmemory", str(POOL_BYTES)]
        servers.start("redis", ["redis-server", *options])
        servers.wait_for_socket(self._socket())

    def put(self, key: Any, source: Array) -> None:
        """SET."""
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(source))
        self._wire.send(head, source, b"\r\n")
        self._wire.expect(b"+OK\r\n")

    def _asked(self, key: Any) -> int:
        self._wire.send(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))
        nbytes = int(self._wire.line()[1:])
        if nbytes < 0:
            raise KeyError(key)
        return nbytes

    def batch(self, keys: Sequence[Any]) -> tuple[int, bytes]:
        """The pipeline as it goes over the wire."""
        each = (b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys)
        return len(keys), b"".join(each)

    def lookup(self, batch: Any) -> int:
        """One pipeline; each answer is `:0` or `:1`."""
        count, request = batch
        self._wire.send(request)
        answers = bytearray(4 * count)
        self._wire.into(answers)
        return leading([digit == ord("1") for digit in answers[1::4]])

    def delete(self, keys: Sequence[Any]) -> None:
        """DEL, and memory given back at once."""
        for key in keys:
            self._wire.send(b"*2\r\n$3\r\nDEL\r\n$%d\r\n%b\r\n" % (len(key), key))
            self._wire.line()


class Memcached(_Server):
    """memcached: slabs; items of up to 64 MiB allowed, two threads."""

    name = "memcached"
    title = "memcached, Unix socket"
    how = "get; get into the buffer; set; 512 meta gets in one pipeline; raw socket"
    needs = (Need("memcached", program="memcached"),)
    file = "memcached.sock"

    def start(self, servers: Servers) -> None:
        """Without TCP and UDP."""
        command = ["memcached", "-s", self._socket(), "-m", str(POOL_BYTES // MIB), "-I", "64m"]
        if os.geteuid() == 0:
            command += ["-u", "root"]  # it refuses to run as root unless told
        servers.start("memcached", [*command, "-t", "2"])
        servers.wait_for_socket(self._socket())

    def put(self, key: Any, source: Array) -> None:
        """Set."""
        self._wire.send(b"set %b 0 0 %d\r\n" % (key, len(source)), source, b"\r\n")
        self._wire.expect(b"STORED\r\n")

    def _asked(self, key: Any) -> int:
        self._wire.send(b"mg %b v\r\n" % key)
        line = self._wire.line()
        if not line.startswith(b"VA "):
            raise KeyError(key)
        return int(line.split()[1])

    def batch(self, keys: Sequence[Any]) -> tuple[int, bytes]:
        """The pipeline as it goes over the wire."""
        return len(keys), b"".join(b"mg %b\r\n" % key for key in keys)

    def lookup(self, batch: Any) -> int:
        """One pipeline; each answer is `HD` or `EN`."""
        count, request = batch
        self._wire.send(request)
        answers = bytearray(4 * count)
        self._wire.into(answers)
        return leading([answers[4 * i : 4 * i + 2] == b"HD" for i in range(count)])

    def delete(self, keys: Sequence[Any]) -> None:
        """Delete."""
        for key in keys:
            self._wire.send(b"md %b\r\n" % key)
            self._wire.line()
