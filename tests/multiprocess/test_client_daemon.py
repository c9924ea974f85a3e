# SPDX-License-Identifier: Apache-2.0
"""The client against real daemons: attaching, sharing, losing the daemon, dying in the middle."""

from __future__ import annotations

import gc
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenote.client import (
    Backoff,
    Cache,
    InvalidArgument,
    Manifest,
    ManifestMismatch,
    PoolGone,
    Timeout,
    connect,
)

MANIFEST = Manifest("m", "l", "uint8", 16)
NBYTES = 64 * 1024
QUICK = Backoff(first_s=0.001, last_s=0.01)
PATIENCE_S = 30.0  # a limit for a hang, not a claim about speed

Start = Callable[..., Any]

PRELUDE = """
import os, signal, sys, time
from cenote.client import Manifest, connect
MANIFEST = Manifest("m", "l", "uint8", 16)
NBYTES = 64 * 1024
def key_of(i): return i.to_bytes(32, "big")
pool = connect(sys.argv[1])
cache = pool.namespace(MANIFEST)
"""


def key_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


def store(cache: Cache, *numbers: int, nbytes: int = NBYTES) -> None:
    for i in numbers:
        with cache.put(key_of(i), nbytes) as w:
            w.copy_from(bytes([i % 256]) * nbytes)
    cache.flush()


def store_one(cache: Cache, i: int) -> None:
    with cache.put(key_of(i), NBYTES, wait_ms=10) as w:
        w.copy_from(bytes(NBYTES))


def wait_until(true: Callable[[], bool]) -> None:
    """Look again and again, for a state that another process brings about."""
    deadline_s = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not true():
        assert time.monotonic() < deadline_s
        pause.wait(0.002)


class Script:
    """A process of its own that runs a piece of Python, attached to the pool."""

    def __init__(self, path: Path, body: str) -> None:
        code = PRELUDE + textwrap.dedent(body)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, text: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def end(self) -> int:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def script() -> Iterator[Callable[[Path, str], Script]]:
    """Return a function that starts a Script; what still runs at the end is killed."""
    started: list[Script] = []

    def start(path: Path, body: str) -> Script:
        started.append(Script(path, body))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
        one.end()


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# ---- attaching -----------------------------------------------------------------------------------


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a daemon connect() is PoolGone, and names the socket that it was given, no other."""
    monkeypatch.setenv("CENOTE_SOCKET", str(tmp_path / "env.sock"))

    with pytest.raises(PoolGone) as caught:
        connect(tmp_path / "argument.sock")

    text = str(caught.value)
    assert "argument.sock" in text
    assert "env.sock" not in text
    assert "default.sock" not in text


def test_stale_socket_file(tmp_path: Path) -> None:
    """A socket file that nobody listens on is PoolGone, and names the file."""
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))

    with pytest.raises(PoolGone, match=r"nobody listens on .*stale\.sock"):
        connect(path)


def test_silent_daemon_is_a_timeout(tmp_path: Path) -> None:
    """Somebody who accepts and says nothing costs the deadline, and no descriptor afterwards."""
    path = tmp_path / "silent.sock"
    before = descriptors()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with pytest.raises(Timeout, match=r"did not answer within 0\.05 s"):
            connect(path, timeout_s=0.05)

    gc.collect()
    assert descriptors() == before


def test_wrong_arguments(tmp_path: Path) -> None:
    """An unknown role is refused before anybody is asked."""
    with pytest.raises(InvalidArgument, match="no role 'owner'"):
        connect(tmp_path / "x", role="owner")


@pytest.mark.parametrize("medium", ["memfd", "shm"])
def test_two_processes_share_in_place(
    cenoted: Start, script: Callable[[Path, str], Script], medium: str
) -> None:
    """What one process stored another reads, by key and by token, from the very same pages."""
    daemon = cenoted(medium=medium)
    other = script(
        daemon.socket,
        """
        with cache.put(key_of(1), NBYTES, meta=b"from the other") as w:
            w.memory[:] = os.urandom(8) * (NBYTES // 8)
        cache.flush()
        chunk = cache.get(key_of(1))
        print(chunk.token.hex(), bytes(chunk.memory[:8]).hex(), flush=True)
        sys.stdin.readline()
        chunk.release()
        cache.delete(key_of(1))
        print("gone", flush=True)
        sys.stdin.readline()
        """,
    )
    token, head = (bytes.fromhex(text) for text in other.line().split())
    with connect(daemon.socket, role="reader") as pool:
        chunk = pool.open(token)
        assert chunk is not None
        assert bytes(chunk.memory) == head * (NBYTES // 8)
        assert (chunk.meta, chunk.key) == (b"from the other", key_of(1))
        by_key = pool.namespace(MANIFEST).get(key_of(1))
        assert by_key is not None
        assert by_key.ref == chunk.ref
        assert pool.stats().sessions == 2
        other.tell()
        assert other.line() == "gone"
        assert pool.open(token) is None
        assert bytes(chunk.memory) == head * (NBYTES // 8)
    other.tell()
    assert other.end() == 0


def test_name_mismatch_over_the_wire(cenoted: Start) -> None:
    """A name bound to another manifest is refused with its fields, and the connection goes on."""
    daemon = cenoted()
    with connect(daemon.socket) as pool:
        pool.namespace(MANIFEST, name="prod")
        with pytest.raises(ManifestMismatch) as caught:
            pool.namespace(Manifest("m", "l", "uint8", 32), name="prod")
        assert caught.value.fields == {"chunk_tokens": (16, 32)}
        assert pool.connected
        assert pool.stats().namespaces == 1


@pytest.mark.parametrize("medium", ["memfd", "shm"])
@pytest.mark.parametrize("role", ["reader", "writer"])
def test_writing_through_a_view_faults(
    cenoted: Start, script: Callable[[Path, str], Script], medium: str, role: str
) -> None:
    """A store into a chunk's memory is SIGSEGV, for writers too: the view is mapped read-only."""
    daemon = cenoted(medium=medium)
    with connect(daemon.socket) as pool:
        store(pool.namespace(MANIFEST), 1)
        other = script(
            daemon.socket,
            f"""
            import ctypes
            pool = connect(sys.argv[1], role="{role}")
            chunk = pool.namespace(MANIFEST).get(key_of(1))
            ctypes.memset(chunk.address, 0, 1)
            """,
        )
        assert other.end() == -signal.SIGSEGV
        chunk = pool.namespace(MANIFEST).get(key_of(1))
        assert chunk is not None
        assert bytes(chunk.memory) == b"\x01" * NBYTES


def test_touching_an_inherited_view_faults(
    cenoted: Start, script: Callable[[Path, str], Script]
) -> None:
    """In a forked child the pool is not mapped: its memory faults, and the parent keeps its own."""
    daemon = cenoted()
    parent = script(
        daemon.socket,
        """
        with cache.put(key_of(1), NBYTES) as w:
            w.memory[:] = b"z" * NBYTES
        cache.flush()
        chunk = cache.get(key_of(1))
        view = chunk.memory
        pid = os.fork()
        if pid == 0:
            os._exit(view[0] * 0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        pid = os.fork()
        if pid == 0:
            with connect(sys.argv[1]) as again:
                mine = again.namespace(MANIFEST).get(key_of(1))
                os._exit(0 if bytes(mine.memory) == b"z" * NBYTES else 1)
        second = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(status, second, bytes(view) == b"z" * NBYTES, pool.leases, flush=True)
        """,
    )
    assert parent.line() == f"{-signal.SIGSEGV} 0 True 1"
    assert parent.end() == 0


# ---- dying ---------------------------------------------------------------------------------------


def test_killed_reader_gives_its_leases_back(
    cenoted: Start, script: Callable[[Path, str], Script]
) -> None:
    """A reader killed while it holds chunks no longer keeps their memory."""
    daemon = cenoted()
    with connect(daemon.socket) as pool:
        cache = pool.namespace(MANIFEST)
        store(cache, *range(20))
        other = script(
            daemon.socket,
            """
            held = cache.get_many(b"".join(key_of(i) for i in range(20)))
            print(len(held), flush=True)
            sys.stdin.readline()
            """,
        )
        assert other.line() == "20"
        assert cache.delete(b"".join(map(key_of, range(20)))) == 20
        wait_until(lambda: pool.stats().limbo == 20)
        other.process.kill()

        wait_until(lambda: pool.stats().sessions == 1)
        wait_until(lambda: pool.stats().limbo == 0)
        stats = pool.stats()
        assert (stats.leases, stats.bytes_used, stats.chunks) == (0, 0, 0)


def test_killed_writer_leaves_nothing(
    cenoted: Start, script: Callable[[Path, str], Script]
) -> None:
    """A writer killed between reserve and commit leaves no chunk and no memory behind."""
    daemon = cenoted()
    with connect(daemon.socket) as pool:
        cache = pool.namespace(MANIFEST)
        other = script(
            daemon.socket,
            """
            puts = [cache.put(key_of(i), 2**20) for i in range(8)]
            for put in puts:
                put.memory[: 2**19] = bytes(2**19)
            print(len(puts), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """,
        )
        assert other.line() == "8"
        assert other.end() == -signal.SIGKILL

        wait_until(lambda: pool.stats().sessions == 1)
        wait_until(lambda: pool.stats().bytes_granted == 0)
        assert cache.match(key_of(0)) == 0
        assert pool.stats().chunks == 0


def test_stopped_reader_keeps_its_leases(
    cenoted: Start, script: Callable[[Path, str], Script]
) -> None:
    """A reader that is stopped keeps what it holds, and everybody else goes on (I6)."""
    daemon = cenoted()
    with connect(daemon.socket) as pool:
        cache = pool.namespace(MANIFEST)
        store(cache, 1)
        other = script(
            daemon.socket,
            """
            chunk = cache.get(key_of(1))
            print("holding", flush=True)
            sys.stdin.readline()
            print(bytes(chunk.memory) == bytes([1]) * NBYTES, flush=True)
            """,
        )
        assert other.line() == "holding"
        other.process.send_signal(signal.SIGSTOP)
        cache.delete(key_of(1))
        for i in range(2, 200):
            with cache.put(key_of(i), 2**20) as w:
                w.memory[:8] = i.to_bytes(8, "big")
        cache.flush()
        assert pool.stats().limbo == 1
        other.process.send_signal(signal.SIGCONT)
        other.tell()
        assert other.line() == "True"
        assert other.end() == 0
