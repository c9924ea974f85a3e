# SPDX-License-Identifier: Apache-2.0
"""The parts of the daemon that need no pool: lock, rate limit, checksums' pace, systemd."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cenote.client.testing import MemoryHost
from cenote.daemon import config_sources
from cenote.daemon.access import AccessTable
from cenote.daemon.config import PoolConfig, Principal, TenantConfig
from cenote.daemon.lock import PoolLock, PoolTaken
from cenote.daemon.main import Daemon
from cenote.daemon.scrub import SETTLE_S, scrub
from cenote.daemon.server import TokenBucket
from cenote.daemon.service import NAMESPACES_PER_UID_MAX, Caller, PoolService
from cenote.daemon.systemd import notify, watchdog_period_s
from cenote.shm.identity import Peer
from cenote.shm.inspect import Catalog
from cenote.shm.manifest import canonical
from cenote.shm.wire import Refusal

HOLD = """
import sys, pathlib
from cenote.daemon.lock import PoolLock
PoolLock("p", pathlib.Path(sys.argv[1])).acquire()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the pool's socket would be."""
    return tmp_path / "p.sock"


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the pool's lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_lock_has_one_holder(path: Path, holder: subprocess.Popen[str]) -> None:
    """The second is told the pid of the first; after a kill it gets the lock, and knows of it."""
    lock = PoolLock("p", path)
    with pytest.raises(PoolTaken, match=f"pid {holder.pid}: stop it first"):
        lock.acquire()
    holder.kill()
    holder.wait()

    lock.acquire()

    assert lock.predecessor == holder.pid
    lock.release()
    lock.release()
    assert not lock.path.exists()


def test_a_released_lock_tells_of_no_predecessor(path: Path) -> None:
    """A clean stop is no death."""
    first, second = PoolLock("p", path), PoolLock("p", path)
    first.acquire()
    first.release()
    second.acquire()

    assert second.predecessor == 0
    second.release()


def test_somebody_elses_file_is_no_lock(path: Path, tmp_path: Path) -> None:
    """A symbolic link or a pipe in the lock's place is refused, not followed or waited for."""
    lock = PoolLock("p", path)
    lock.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PoolTaken, match="symbolic link"):
        lock.acquire()
    lock.path.unlink()
    os.mkfifo(lock.path)
    with pytest.raises(PoolTaken, match="is no file of uid"):
        lock.acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_a_living_socket_is_never_removed(path: Path) -> None:
    """A stale socket goes; one on which somebody listens, and anything else, stays."""
    lock = PoolLock("p", path)
    lock.acquire()
    assert lock.remove_stale_socket() is False
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(PoolTaken, match="another server listens"):
            lock.remove_stale_socket()
    assert lock.remove_stale_socket() is True
    path.mkdir()
    with pytest.raises(PoolTaken, match="is no socket"):
        lock.remove_stale_socket()
    lock.release()


def test_the_bucket_allows_a_burst_and_then_a_rate() -> None:
    """Tokens come back with time, never beyond the burst."""
    bucket = TokenBucket(rate_per_s=10, burst=3, now_s=100)

    assert [bucket.take(100) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(100) == pytest.approx(0.1)
    assert bucket.take(100.1) == pytest.approx(0, abs=1e-9)
    assert [bucket.take(1000) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(1000) > 0


class Chunks:
    """A source of three rounds of work, which writes down what was done to it."""

    def __init__(self) -> None:
        self.rounds = [[100, 300], [], [50]]
        self.made: list[int] = []

    def wait(self) -> None:
        """There is always more, here."""

    def unchecked(self) -> list[int]:
        return self.rounds.pop(0)

    def make(self, item: int) -> int:
        self.made.append(item)
        return item


def test_checksums_are_made_at_the_pace_asked_for() -> None:
    """Between chunks it pauses as long as their bytes are worth, before each look it settles."""
    chunks, pauses = Chunks(), []

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        return chunks.made == [100, 300, 50]

    scrub(chunks, lambda: 100, pause)

    assert chunks.made == [100, 300, 50]
    assert pauses == [0, SETTLE_S, 1, 3, 0, SETTLE_S, 0, SETTLE_S, 0.5]


def test_checksums_stop_at_once() -> None:
    """A stop between two chunks is heeded before the next is read."""
    chunks = Chunks()

    scrub(chunks, lambda: 1, lambda _seconds: bool(chunks.made))

    assert chunks.made == [100]


def test_without_systemd_nothing_is_sent() -> None:
    """No $NOTIFY_SOCKET, or nobody there: False, and no exception."""
    assert notify("READY=1", {}) is False
    assert notify("READY=1", {"NOTIFY_SOCKET": "/nowhere/at/all"}) is False


def test_abstract_notify_sockets_are_reached() -> None:
    """A name that begins with @ is in the abstract name space."""
    name = f"cenote-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        assert notify("READY=1", {"NOTIFY_SOCKET": f"@{name}"}) is True
        assert sock.recv(64) == b"READY=1"


@pytest.mark.parametrize(
    ("environ", "period_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_for_the_process_named(
    environ: dict[str, str], period_s: float | None
) -> None:
    """Half of what systemd says, when it means us."""
    assert watchdog_period_s(7, environ) == period_s


async def test_the_watchdog_ticks_on_after_a_failed_look(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that does not answer costs its WATCHDOG=1, and the ticks go on: the next is sent."""
    argv = ["--socket", str(path), "--name", f"tick{os.getpid()}", "--size", "16MiB"]
    daemon = Daemon(argv, config_sources.load([*argv, "--medium", "memfd"]))
    daemon.make()
    (served,) = daemon._pools
    looks = iter([OSError("once")])

    def check() -> None:
        for error in looks:
            raise error

    monkeypatch.setattr(served, "check", check)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    loop = asyncio.get_running_loop()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notices:
            notices.bind(str(tmp_path / "notify"))
            daemon._watch(loop)
            assert await loop.sock_recv(notices, 64) == b"WATCHDOG=1"
    finally:
        daemon.drop()
    assert next(looks, None) is None  # the failed look was before


def test_a_user_with_all_its_namespaces_opens_them_again() -> None:
    """The limit of 1,024 a user is for new namespaces; those it has stay open to it."""
    with MemoryHost("16MiB") as host:
        config = PoolConfig()
        service = PoolService(host._running(), config, AccessTable(config), lambda: None)
        caller = Caller(Peer(1, 4242, 4242, frozenset({4242})), role="reader")

        def open_namespace(i: int) -> int:
            body = {"manifest": canonical({"model": i})}
            return int(service.answer(caller, "namespace", 1, body, ()).body["slot"])

        slots = [open_namespace(i) for i in range(NAMESPACES_PER_UID_MAX)]
        assert open_namespace(7) == slots[7]
        with pytest.raises(Refusal, match="as many as one user may"):
            open_namespace(NAMESPACES_PER_UID_MAX)


def test_the_first_opener_gives_a_shared_namespace_its_quota() -> None:
    """Tenants without salt share a namespace: the first one's quota holds, after a reload too."""
    tenants = [
        TenantConfig((Principal("user", uid, str(uid)),), quota=uid * 2**20) for uid in (3, 4)
    ]
    with MemoryHost("16MiB") as host, host.connect() as pool:
        config = PoolConfig(tenants=tuple(tenants))
        service = PoolService(host._running(), config, AccessTable(config), lambda: None)
        for uid in (4, 3):
            caller = Caller(Peer(1, uid, uid, frozenset()), role="reader")
            service.answer(caller, "namespace", 1, {"manifest": canonical({"model": 1})}, ())
        catalog = Catalog.of(pool._attachment.handle.mapping)

        assert [one.quota_bytes for one in catalog.namespaces()] == [4 * 2**20]
        grown = PoolConfig(tenants=(tenants[0], replace(tenants[1], quota=5 * 2**20)))
        service.reconfigure(grown, AccessTable(grown))
        assert [one.quota_bytes for one in catalog.namespaces()] == [5 * 2**20]
