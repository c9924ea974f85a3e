# SPDX-License-Identifier: Apache-2.0
"""Clients that are in each other's way, or write nonsense: everybody else goes on."""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from cenote.client import Cache, PoolFull, Put, Timeout, connect

MISCHIEF: Final = runpy.run_path(str(Path(__file__).with_name("mischief.py")))
MANIFEST, NBYTES = MISCHIEF["MANIFEST"], MISCHIEF["NBYTES"]
key_of, bytes_of = MISCHIEF["key_of"], MISCHIEF["bytes_of"]
ffi, lib = MISCHIEF["ffi"], MISCHIEF["lib"]

RIVALS: Final = 4
CONTESTED: Final = 8


@pytest.fixture
def daemon(cenoted: Callable[..., Any]) -> Any:
    """A small pool."""
    return cenoted("--checksum", "commit", size="16MiB")


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


def work_and_check(cache: Cache, first: int, count: int) -> None:
    """Store chunks, and verify those stored a moment ago: what a good client does meanwhile."""
    for i in range(first, first + count):
        with cache.put(key_of(i), NBYTES, wait_ms=30_000) as put:
            put.copy_from(bytes_of(i))
        cache.flush(timeout_s=30.0)
        for j in range(max(first, i - 8), i + 1):
            chunk = cache.get(key_of(j))
            assert chunk is not None or j < i
            assert chunk is None or bytes(chunk.memory) == bytes_of(j)


# ---- two writers of one key ----------------------------------------------------------------


def test_rivals_for_one_key(
    daemon: Any, books: Any, spawn: Callable[..., Any], wait: Callable[..., Any]
) -> None:
    """
    Four processes store, delete and read the same eight keys: what a reader finds is always one
    writer's version whole, and in the end each key is there at most once.
    """
    rivals = [spawn("rival", daemon.socket, version, CONTESTED) for version in range(1, RIVALS + 1)]
    for rival in rivals:
        assert rival.line() == "working"
    wait(lambda: books.counters()["duplicates"] > 500, books.state)
    wait(lambda: books.counters()["deletions"] > 100, books.state)
    for rival in rivals:
        assert rival.kill() == -signal.SIGKILL
    wait(lambda: not books.sessions(), books.state)

    check_contested(daemon, books)


def check_contested(daemon: Any, books: Any) -> None:
    cache = connect(daemon.socket).namespace(MANIFEST)
    versions = {}
    for i in range(CONTESTED):
        chunk = cache.get(key_of(i))
        if chunk is not None:
            versions[i] = MISCHIEF["check_version"](chunk)
    assert books.counters()["live_chunks"] == len(versions)  # one LIVE descriptor a key
    assert set(versions.values()) <= set(range(1, RIVALS + 1))
    assert cache.delete([key_of(i) for i in range(CONTESTED)]) == len(versions)


# ---- nonsense in a session ----------------------------------------------------------------


def test_garbage_in_a_session(
    daemon: Any, books: Any, spawn: Callable[..., Any], wait: Callable[..., Any]
) -> None:
    """
    A client that fills its own session with noise harms itself: others store and read as ever, no
    table contradicts another, and its death brings everything back.
    """
    scribblers = [spawn("scribbler", daemon.socket, seed) for seed in (1, 2, 3)]
    for scribbler in scribblers:
        assert scribbler.line() == "working"
    good = connect(daemon.socket).namespace(MANIFEST)
    work_and_check(good, 0, 300)
    assert len(books.sessions()) == 4  # the administrator still sees all of them
    wait(lambda: books.counters()["bad_records"] > 0, books.state)
    assert books.audit() == 0
    for scribbler in scribblers:
        assert scribbler.kill() == -signal.SIGKILL
    work_and_check(good, 300, 20)


def test_forged_records(
    daemon: Any, books: Any, spawn: Callable[..., Any], wait: Callable[..., Any]
) -> None:
    """
    Records with the grants, chunks, namespaces and operations of others, by the thousand: none of
    it takes effect on anybody else, and the good client's bytes stay right.
    """
    forgers = [spawn("forger", daemon.socket, seed) for seed in (1, 2)]
    for forger in forgers:
        assert forger.line() == "working"
    good = connect(daemon.socket).namespace(MANIFEST)
    work_and_check(good, 0, 300)
    wait(lambda: books.counters()["bad_records"] > 5000, books.state)
    assert books.audit() == 0
    counters = books.counters()
    assert counters["lost"] == 0  # CN_OP_LOST is the daemon's own
    assert counters["namespaces"] == 1
    for forger in forgers:
        assert forger.kill() == -signal.SIGKILL
    work_and_check(good, 300, 20)


def test_who_never_drains_gets_no_more(daemon: Any, books: Any, spawn: Callable[..., Any]) -> None:
    """
    A client that reads none of its completions gets as many as fit; the keeper waits for nobody.
    """
    child = spawn("never_drains", daemon.socket)
    assert child.line() == str(lib.CN_COMPLETIONS)
    good = connect(daemon.socket).namespace(MANIFEST)
    work_and_check(good, 0, 20)
    assert good.delete([key_of(i) for i in range(20)], timeout_s=30.0) > 0
    assert child.kill() == -signal.SIGKILL


# ---- the ring is full ----------------------------------------------------------------


def stock_bytes(cache: Cache) -> int:
    """How many bytes lie in this session's stock, ready to be taken."""
    binding: Any = cache._binding
    session = ffi.cast("char *", lib.cn_client_session(binding.attachment.handle.client))
    rows = ffi.cast("struct cn_stock_row *", session + ffi.sizeof("struct cn_session_head"))
    return sum(
        rows[r].extent_bytes * sum(rows[r].slot[i] != 0 for i in range(lib.CN_STOCK_SLOTS))
        for r in range(lib.CN_STOCK_ROWS)
    )


def granted_here(books: Any) -> int:
    """How many bytes the keeper has granted to the session of this process."""
    return int(books.session_of(os.getpid())["granted_bytes"])


def use_up_the_stock(cache: Cache) -> None:
    """Put until there is nothing to put into."""
    for i in range(lib.CN_STOCK_SLOTS + 1):
        with cache.put(key_of(i), NBYTES, wait_ms=10) as put:
            put.memory[:1] = b"x"


def with_a_full_ring(
    daemon: Any, cache: Cache, puts: list[Put], freeze: Callable[[int], None]
) -> None:
    """Everything that a client may try while the keeper takes nothing out of its full ring."""
    freeze(daemon.pid)
    try:
        with pytest.raises(Timeout):  # more than the ring takes; the first three keys are there
            cache.delete([key_of(i) for i in range(17, 17 + 2 * lib.CN_RING_RECORDS)], timeout_s=0)
        for put in puts[:3]:
            with pytest.raises(Timeout):
                put.commit()
        for put in puts[3:6]:
            put.abort()
        del puts[:6]
        with pytest.raises((PoolFull, Timeout)):
            use_up_the_stock(cache)
        with pytest.raises((PoolFull, Timeout)):
            cache.put(key_of(0), 3 * NBYTES, wait_ms=10)  # there is no stock of this size
        with pytest.raises(Timeout):
            cache.flush(timeout_s=0.01)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)


def test_a_full_ring(
    daemon: Any, books: Any, wait: Callable[..., Any], freeze: Callable[[int], None]
) -> None:
    """
    While the daemon is stopped puts, commits and deletes end in errors at their deadlines; when it
    goes on so do they, and this session has no more memory than lies in its stock.
    """
    full_ring(daemon, books, wait, freeze)


def full_ring(
    daemon: Any, books: Any, wait: Callable[..., Any], freeze: Callable[[int], None]
) -> None:
    cache = connect(daemon.socket).namespace(MANIFEST)
    work_and_check(cache, 0, 20)
    puts = [cache.put(key_of(100 + i), NBYTES, wait_ms=20) for i in range(8)]
    with_a_full_ring(daemon, cache, puts, freeze)

    assert cache.delete(key_of(99_999), timeout_s=30.0) == 0  # not those of the call that gave up
    for put in puts:  # the two that nothing was tried with
        with put:
            put.copy_from(bytes_of(0))
    work_and_check(cache, 1000, 40)
    assert cache.match(key_of(100)) == 0  # a commit that raised never happens later
    assert cache.match(key_of(106)) == cache.match(key_of(107)) == 1
    wait(lambda: granted_here(books) == stock_bytes(cache), books.state)
    assert books.audit() == 0


def test_a_stock_row_that_changed_its_size(
    daemon: Any, books: Any, wait: Callable[..., Any]
) -> None:
    """
    A thread finds the row of its size, the keeper empties that row and gives it to another size,
    then the thread takes an extent out of it: never one that is too small, and none is lost.
    """
    row_changes(daemon, books, wait)


def row_changes(daemon: Any, books: Any, wait: Callable[..., Any]) -> None:
    cache = connect(daemon.socket).namespace(MANIFEST)
    work_and_check(cache, 0, 4)
    handle: Any = cache._binding.attachment.handle
    session = ffi.cast("char *", lib.cn_client_session(handle.client))
    rows = ffi.cast("struct cn_stock_row *", session + ffi.sizeof("struct cn_session_head"))
    row = next(rows[r] for r in range(lib.CN_STOCK_ROWS) if rows[r].extent_bytes == NBYTES)
    assert stock_bytes(cache) >= NBYTES
    grant = ffi.new("struct cn_grant *")
    row.extent_bytes = 4 * NBYTES  # as the thread saw it; what lies in it is NBYTES each
    status = lib.cn_reserve(handle.client, 4 * NBYTES, 0, 0, grant)
    row.extent_bytes = NBYTES
    if status == lib.CN_OK:
        cold = ffi.cast("char *", handle.catalog) + handle.catalog.cold_off
        extent = ffi.cast("struct cn_cold *", cold)[grant.ref & 0xFFFFFFFF].extent_pages * 4096
        assert extent >= 4 * NBYTES
        assert lib.cn_abort(handle.client, grant.ref) == lib.CN_OK
    work_and_check(cache, 4, 4)
    wait(lambda: granted_here(books) == stock_bytes(cache), books.state)
