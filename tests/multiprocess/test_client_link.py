# SPDX-License-Identifier: Apache-2.0
"""The client's link to its daemon: losing it, finding the next one, closing, threads, forks."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenote._native import _core
from cenote.client import (
    Backoff,
    Cache,
    Manifest,
    Pool,
    PoolFull,
    PoolGone,
    Timeout,
    connect,
)
from cenote.client import connection as connections
from cenote.shm import wire

MANIFEST = Manifest("m", "l", "uint8", 16)
NBYTES = 64 * 1024
QUICK = Backoff(first_s=0.001, last_s=0.01)
PATIENCE_S = 30.0  # a limit for a hang, not a claim about speed

Start = Callable[..., Any]


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


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_daemon_killed_and_started_again(cenoted: Start) -> None:
    """After kill -9 of the daemon reads go on, stores are refused, and the next one is adopted."""
    first = cenoted()
    pool = connect(first.socket, reconnect=QUICK)
    cache = pool.namespace(MANIFEST, name="prod")
    other = pool.namespace(Manifest("m2", "l", "uint8", 16))
    store(cache, 1)
    chunk = cache.get(key_of(1))
    assert chunk is not None
    view, old_id = chunk.memory, pool.pool_id
    first.kill()

    wait_until(lambda: not pool.connected)
    assert bytes(view) == b"\x01" * NBYTES
    assert cache.match(key_of(1)) == 1
    assert cache.get(key_of(1)) is not None
    for call in (pool.stats, cache.flush, lambda: cache.put(key_of(2), 10)):
        with pytest.raises(PoolGone, match="gone"):
            call()

    second = cenoted(path=first.socket, pool=first.pool)
    wait_until(lambda: pool.connected)
    assert (pool.reconnects, pool.pool_id != old_id) == (1, True)
    assert cache.get(key_of(1)) is None
    store(cache, 1, 2)
    store(other, 3)
    assert [bytes(c.memory[:1]) for c in cache.get_many([key_of(1), key_of(2)])] == [b"\1", b"\2"]
    assert other.match(key_of(3)) == 1
    assert bytes(view) == b"\x01" * NBYTES
    assert pool.open(chunk.token) is None
    chunk.release()
    view.release()
    pool.close()
    second.stop()


def test_mapping_of_a_dead_daemon_goes_with_its_last_lease(cenoted: Start) -> None:
    """After a reconnect the old pool stays mapped as long as a lease in it lives, and no longer."""
    first = cenoted(pool="mapped-once")
    with connect(first.socket, reconnect=QUICK) as pool:
        cache = pool.namespace(MANIFEST)
        store(cache, 1)
        chunk = cache.get(key_of(1))
        gc.collect()
        before = mappings()
        first.kill()
        cenoted(path=first.socket, pool="mapped-once")
        wait_until(lambda: pool.reconnects == 1)
        gc.collect()
        assert len(mappings()) > len(before)
        assert chunk is not None
        array = chunk.numpy()
        del chunk
        gc.collect()
        assert array[0] == 1
        del array
        gc.collect()
        assert len(mappings()) == len(before)


def mappings() -> list[str]:
    text = Path("/proc/self/maps").read_text()
    return [line for line in text.splitlines() if "cenote." in line]


def test_without_reconnect_the_pool_stays_gone(cenoted: Start) -> None:
    """reconnect=False: once the daemon went, the pool is only good for reading."""
    first = cenoted()
    with connect(first.socket, reconnect=False) as pool:
        cache = pool.namespace(MANIFEST)
        store(cache, 1)
        feed = pool.events()
        first.kill()
        wait_until(lambda: not pool.connected)
        cenoted(path=first.socket, pool=first.pool)

        with pytest.raises(PoolGone, match="connect\\(\\) again"):
            pool.stats()
        with pytest.raises(PoolGone, match="no more events"):
            next(feed)
        assert cache.match(key_of(1)) == 1
        assert pool.reconnects == 0


def test_events_say_that_a_new_pool_began(cenoted: Start) -> None:
    """A follower hears of a new pool as a gap of unknown size, then its events from the first."""
    first = cenoted()
    with connect(first.socket, reconnect=QUICK) as pool:
        cache = pool.namespace(MANIFEST)
        feed = pool.events()
        store(cache, 1)
        assert next(feed).kind == "stored"
        first.kill()
        cenoted(path=first.socket, pool=first.pool)
        wait_until(lambda: pool.reconnects == 1)
        store(cache, 2)

        gap, event = next(feed), next(feed)
        assert (gap.kind, getattr(gap, "lost", 0), gap.sequence) == ("gap", None, 1)
        assert (event.kind, getattr(event, "key", b""), event.sequence) == ("stored", key_of(2), 1)


def deadline_beside_a_patient_call(cache: Cache) -> threading.Thread:
    """A call that waits for ever does not make another wait with it; returns the one that waits."""
    handle: Any = cache._binding.attachment.handle
    head: Any = _core.ffi.cast(
        "struct cn_session_head *", _core.lib.cn_client_session(handle.client)
    )
    before = head.sub_tail
    patient = threading.Thread(target=cache.delete, args=(key_of(1), PATIENCE_S))
    patient.start()
    wait_until(lambda: bool(head.sub_tail >= before + 3))  # it waits for its answer now
    with pytest.raises(Timeout):
        cache.delete(key_of(1), timeout_s=0.05)
    assert patient.is_alive()
    return patient


def test_stopped_daemon_costs_the_deadline(cenoted: Start) -> None:
    """While the daemon is stopped no call takes longer than it was told, and reads go on."""
    daemon = cenoted()
    with connect(daemon.socket) as pool:
        cache = pool.namespace(MANIFEST)
        store(cache, 1)
        os.kill(daemon.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.pid, os.WSTOPPED)  # now every thread of it is
        try:
            assert cache.get(key_of(1)) is not None
            with contextlib.suppress(PoolFull):  # if the stock had none
                store_one(cache, 2)
                with pytest.raises(Timeout):
                    cache.flush(timeout_s=0.05)
            with pytest.raises(Timeout):
                cache.delete(key_of(1), timeout_s=0.05)
            patient = deadline_beside_a_patient_call(cache)
            with pytest.raises(Timeout):
                pool.stats(timeout_s=0.05)
            with pytest.raises(Timeout):
                connect(daemon.socket, timeout_s=0.05)
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        patient.join(PATIENCE_S)
        wait_until(lambda: pool.reconnects == 1)


def test_closed_pool_lets_its_thread_and_descriptors_go(cenoted: Start) -> None:
    """connect() and close() a hundred times leave no descriptor, thread or mapping behind."""
    daemon = cenoted()

    def once(index: int) -> None:
        pool = connect(daemon.socket)
        cache = pool.namespace(MANIFEST)
        if index % 2:
            pool.close()
        del pool, cache

    def state() -> tuple[int, int, int]:
        gc.collect()
        threads = sum(t.name == "cenote-link" for t in threading.enumerate())
        return descriptors(), threads, len(mappings())

    once(0)
    wait_until(lambda: state()[1] == 0)
    before = state()
    for i in range(100):
        once(i)
    wait_until(lambda: state() == before)
    with connect(daemon.socket) as pool:
        wait_until(lambda: pool.stats().sessions == 1)


def test_requests_from_many_threads(cenoted: Start) -> None:
    """Eight threads that ask the daemon over one connection each get their own answers."""
    daemon = cenoted()
    with connect(daemon.socket) as pool:
        wrong: list[str] = []

        def ask(n: int) -> None:
            manifest = Manifest(f"model-{n}", "l", "uint8", 16)
            for _ in range(20):
                if pool.namespace(manifest).id != manifest.namespace_id():
                    wrong.append(f"namespace of model-{n}")
                pool.stats()

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert pool.stats().namespaces == 8


def test_backoff_doubles_and_is_spread() -> None:
    """The waits double up to their bound, and each is drawn between half of it and all of it."""
    low, high = Backoff(draw=lambda: 0.0), Backoff(draw=lambda: 1.0)

    assert [high.delay_s(n) for n in range(9)] == [
        0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0,
    ]  # fmt: skip
    assert [low.delay_s(n) for n in (0, 1, 100)] == [0.025, 0.05, 2.5]


def test_repr_tells_the_state(cenoted: Start) -> None:
    """A pool's repr says whose it is and whether it is connected."""
    daemon = cenoted()
    pool: Pool = connect(daemon.socket, role="reader")
    assert re.fullmatch(r"<Pool '[a-z0-9-]+', reader, connected>", repr(pool))
    pool.close()
    pool.close()
    assert "closed" in repr(pool)


def bare_link() -> connections.Link:
    """A link as its thread leaves it between two daemons: nobody is connected."""
    link = connections.Link.__new__(connections.Link)
    link._stop = threading.Event()
    link._lock = threading.Lock()
    link._bell = connections._Bell()
    link._channel = None
    link._pool = lambda: None  # type: ignore[assignment]  # a dead weak reference
    return link


class Mourner:
    """Stands where the pool is: it is told that the daemon went."""

    def _lost(self) -> None:
        pass

    def _rings(self) -> bool:
        return True

    def _resumable(self) -> None:
        pass

    def _resume(self, *_: object) -> None:
        raise AssertionError("nobody is to be found again")

    def _adopt(self, *_: object) -> None:
        raise AssertionError("nobody is to be found again")


def answer_and_hang_up(sock: socket.socket) -> None:
    with sock:
        sock.recv(4096)
        sock.sendall(wire.encode(wire.success(1, said="goodbye")))


def test_last_words_of_a_daemon_are_heard() -> None:
    """An answer that the daemon gave before it hung up reaches who asked, every time."""
    pool = Mourner()
    for _ in range(200):
        ours, theirs = socket.socketpair()
        daemon = threading.Thread(target=answer_and_hang_up, args=(theirs,))
        daemon.start()
        target = connections.Target(Path("gone.sock"), None, "", 1.0)
        link = connections.Link(target, wire.Channel(ours), pool, backoff=None)
        try:
            assert link.request("destroy", timeout_s=PATIENCE_S)["said"] == "goodbye"
        finally:
            daemon.join(PATIENCE_S)
            link.close()


def test_close_during_a_reconnect_ends_the_thread() -> None:
    """close() after a reconnect's look at the stop, before it clears the wake-up, is not lost."""
    link = bare_link()
    link.close()
    link._bell.silence()  # _reattach() saw no stop, and clears the wake-up now
    left, right = socket.socketpair()
    with left, right:
        link.install(wire.Channel(left))

        thread = threading.Thread(target=link._sleep_until_lost, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)

    assert not thread.is_alive()


def test_fork_while_the_thread_holds_a_lock() -> None:
    """A child forked while the link's thread is inside its stop event goes on (I13)."""
    link = bare_link()
    with link._stop._cond:  # type: ignore[attr-defined]  # as Event.wait() holds it
        pid = os.fork()
        if pid == 0:
            signal.alarm(int(PATIENCE_S))
            link.after_fork_in_child()
            os._exit(0)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
