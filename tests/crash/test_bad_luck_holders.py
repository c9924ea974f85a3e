# SPDX-License-Identifier: Apache-2.0
"""Processes that hold chunks and do something unusual: stopped, forked, closed, or greedy."""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from cenote.client import Cache, Chunk, connect

MISCHIEF: Final = runpy.run_path(str(Path(__file__).with_name("mischief.py")))
MANIFEST, NBYTES = MISCHIEF["MANIFEST"], MISCHIEF["NBYTES"]
key_of, bytes_of = MISCHIEF["key_of"], MISCHIEF["bytes_of"]

HELD: Final = 12
POOL_BYTES: Final = 16 * 2**20

TABLE: Final = """
[[pool]]
name = "{pool}"
socket = "{socket}"
lease_slots = SLOTS
[[pool.region]]
medium = "memfd"
size = "32MiB"
"""


@pytest.fixture
def daemon(cenoted: Callable[..., Any]) -> Any:
    """A small pool whose oldest chunks leave first."""
    return cenoted("--policy", "lru", size=str(POOL_BYTES))


@pytest.fixture
def books(daemon: Any, open_books: Callable[..., Any]) -> Iterator[Any]:
    """Books that must balance when the test is over."""
    made = open_books(daemon)
    yield made
    made.settle()


@pytest.fixture
def spawn(books: Any, zygote: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that starts one of the processes of mischief.py."""
    return zygote("mischief.py").spawn  # type: ignore[no-any-return]  # a fixture of conftest.py


def store(cache: Cache, numbers: range) -> None:
    """Store what belongs under the keys *numbers*."""
    for i in numbers:
        with cache.put(key_of(i), NBYTES, wait_ms=30_000) as put:
            put.copy_from(bytes_of(i))
    cache.flush(timeout_s=30.0)


def fill_twice(cache: Cache) -> None:
    """Put twice the pool through it: every extent that nobody holds is written over."""
    store(cache, range(1000, 1000 + 2 * POOL_BYTES // NBYTES))


def filled_around(daemon: Any, child: Any, books: Any) -> None:
    """Evict everything that can be; what *child* holds is the rest."""
    with connect(daemon.socket) as pool:
        cache = pool.namespace(MANIFEST)
        before = pool.stats().evictions
        assert cache.delete([key_of(i) for i in range(HELD)]) == HELD
        fill_twice(cache)
        stats = pool.stats()
        assert stats.evictions > before
        assert stats.limbo == HELD
        info = books.session_of(child.pid)
        assert (info["leases"], info["limbo_chunks"]) == (HELD, HELD)
        assert info["leased_bytes"] == HELD * NBYTES


def prepare(daemon: Any) -> None:
    """Store the chunks that a process will hold."""
    with connect(daemon.socket) as pool:
        store(pool.namespace(MANIFEST), range(HELD))


def test_a_stopped_reader_keeps_its_chunks_until_it_is_killed(
    daemon: Any, books: Any, spawn: Callable[..., Any], wait: Callable[..., Any]
) -> None:
    """
    SIGSTOP: its chunks stay, the pool evicts all others, `sessions` shows what it holds. SIGKILL
    while stopped: they go.
    """
    prepare(daemon)
    child = spawn("holder", daemon.socket, "reader", HELD)
    assert child.line() == str(HELD)
    child.freeze()

    filled_around(daemon, child, books)

    child.signal(signal.SIGCONT)
    child.tell()
    assert child.line() == "True"
    child.freeze()
    assert child.kill() == -signal.SIGKILL
    wait(lambda: books.counters()["limbo_chunks"] == 0, books.state)
    assert books.audit() == 0


def test_a_stopped_writer_commits_when_it_goes_on(
    daemon: Any, books: Any, spawn: Callable[..., Any]
) -> None:
    """
    SIGSTOP between reserve and commit: the half-filled extent is nobody else's, however full the
    pool gets, and the chunk is whole in the end.
    """
    child = spawn("stopped_writer", daemon.socket)
    assert child.line() == "half"
    child.freeze()
    with connect(daemon.socket) as pool:
        fill_twice(pool.namespace(MANIFEST))
    assert books.session_of(child.pid)["granted_bytes"] >= NBYTES
    child.signal(signal.SIGCONT)
    child.tell()
    assert child.line() == "done"
    with connect(daemon.socket, role="reader") as pool:
        chunk = pool.namespace(MANIFEST).get(key_of(1))
        assert chunk is not None
        assert bytes(chunk.memory) == bytes_of(1)
        del chunk
    child.tell()
    assert child.wait() == 0


def test_closing_all_descriptors_keeps_everything(
    daemon: Any, books: Any, spawn: Callable[..., Any], tmp_path: Path
) -> None:
    """
    os.closerange: the leases stay, the bytes stay, while the pool is filled twice over. Not a byte
    is written to the files that got the numbers.
    """
    prepare(daemon)
    child = spawn("closer_of_everything", daemon.socket, HELD, tmp_path)
    assert child.line() == str(HELD)
    assert child.line() == "0"
    child.tell()
    assert child.line() == "1 1"
    filled_around(daemon, child, books)
    child.tell()
    assert child.line() == "True 0"  # the bytes are right; the keys were deleted meanwhile
    assert child.kill() == -signal.SIGKILL


def test_views_outlive_a_closed_pool(daemon: Any, books: Any, spawn: Callable[..., Any]) -> None:
    """
    pool.close() with live views: the leases stay until the views go, then the session goes too,
    though its process lives.
    """
    prepare(daemon)
    child = spawn("holder_after_close", daemon.socket, HELD)
    assert child.line() == str(HELD)
    filled_around(daemon, child, books)
    child.tell()
    assert child.line() == "True"
    books.settle()
    child.tell()
    assert child.wait() == 0


def test_a_childs_views_hold_nothing(
    daemon: Any, books: Any, spawn: Callable[..., Any], wait: Callable[..., Any]
) -> None:
    """
    Fork with live views on both sides: the child's release nothing of the parent's, and hold
    nothing once the parent has died, though the child lives on (I13).
    """
    prepare(daemon)
    child = spawn("parent_of_a_child", daemon.socket, HELD)
    assert child.line() == str(HELD)
    grandchild = int(child.line())
    filled_around(daemon, child, books)
    child.tell()
    assert child.line() == "True"
    pidfd = os.pidfd_open(grandchild)
    try:
        child.signal(signal.SIGKILL)
        wait(lambda: not books.sessions(), books.state)
        books.settle()
        signal.pidfd_send_signal(pidfd, 0)  # it lives
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
    assert child.wait() == -signal.SIGKILL


def test_a_reader_may_lease_a_quarter(daemon: Any, books: Any, spawn: Callable[..., Any]) -> None:
    """
    A reader that leases all it can get holds a quarter of the pool; others go on storing into the
    rest, and what it was refused is counted.
    """
    quarter = POOL_BYTES // 4 // NBYTES
    with connect(daemon.socket) as pool:
        cache = pool.namespace(MANIFEST)
        store(cache, range(quarter + 20))
        child = spawn("holder", daemon.socket, "reader", quarter + 20)
        assert child.line() == str(quarter)
        info = books.session_of(child.pid)
        assert (info["leases"], info["leased_bytes"]) == (quarter, POOL_BYTES // 4)
        assert cache.delete([key_of(i) for i in range(quarter + 20)]) == quarter + 20
        fill_twice(cache)
        assert pool.stats().limbo == quarter
    child.tell()
    assert child.line() == "True"
    assert child.kill() == -signal.SIGKILL


@pytest.mark.parametrize("slots", [8192, 512])
def test_a_full_lease_table(
    cenoted: Callable[..., Any], open_books: Callable[..., Any], slots: int
) -> None:
    """
    A session holds as many leases as its table has slots, by default 8,192; more are misses, and
    counted. What is let go can be had again, and nobody else notices.
    """
    daemon = cenoted(config=TABLE.replace("SLOTS", str(slots)))
    books = open_books(daemon)
    full_lease_table(daemon, books, slots)
    books.settle()


def full_lease_table(daemon: Any, books: Any, slots: int) -> None:
    cache = connect(daemon.socket).namespace(MANIFEST)
    store(cache, range(1))
    held: list[Chunk] = cache.get_many(key_of(0) * (slots + 500))
    while (one := cache.get(key_of(0))) is not None:
        held.append(one)
    assert len(held) == slots
    refused = books.session_of(os.getpid())
    assert refused["leases"] == slots
    assert refused["lease_refused"] >= 1
    assert cache.get_many(key_of(0)) == []
    assert len(cache.lease_many(key_of(0))) == 0
    assert cache.match(key_of(0)) == 1  # it takes no lease
    other = connect(daemon.socket, role="reader").namespace(MANIFEST).get(key_of(0))
    assert other is not None
    assert bytes(other.memory) == bytes_of(0)
    held.pop().release()
    assert bytes(held[-1].memory) == bytes_of(0)
    again = cache.get(key_of(0))
    assert again is not None
    assert cache.get(key_of(0)) is None
