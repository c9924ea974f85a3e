# SPDX-License-Identifier: Apache-2.0
"""The asyncio client: the same verbs, and a loop that goes on meanwhile."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from cenote.client import ForkedChild, Manifest, PoolFull, PoolGone, aio
from cenote.client.testing import MemoryHost

MANIFEST = Manifest("m", "l", "uint8", 16)
LARGE = 2 * 2**20


def key_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


@pytest.fixture
async def pool() -> AsyncIterator[aio.AsyncPool]:
    with MemoryHost("64MiB") as host:
        async with aio.AsyncPool(host.connect()) as made:
            yield made
        gc.collect()
        assert host.audit() == 0


async def test_every_verb(pool: aio.AsyncPool) -> None:
    """What is stored by one coroutine is found by another, small or large."""
    cache = await pool.namespace(MANIFEST, name="prod")
    for i, nbytes in enumerate((100, LARGE)):
        async with cache.put(key_of(i), nbytes, meta=b"m") as w:
            assert await w.copy_from(bytes([i]) * nbytes) == nbytes
    async with cache.put(key_of(2), 10, parent=w) as w:
        w.memory[:] = b"0123456789"
    assert await cache.put_many(key_of(3), np.zeros((1, 100), np.uint8)) == 1
    await cache.flush()

    assert await cache.match(b"".join(map(key_of, range(5)))) == 4
    chunk = await cache.get(key_of(1))
    assert chunk is not None
    assert bytes(chunk.memory) == b"\x01" * LARGE
    opened = await pool.open(chunk.token)
    assert opened is not None
    assert len(await cache.get_many([key_of(0), key_of(9)])) == 1
    with await cache.lease_many(key_of(0)) as batch:
        assert len(batch) == 1
    assert await cache.pin(key_of(0)) == await cache.unpin(key_of(0)) == 1
    assert await cache.delete([key_of(0), key_of(9)]) == 1
    assert (await pool.stats()).chunks == 3


async def test_commit_in_a_forked_child_is_refused(pool: aio.AsyncPool) -> None:
    """A put that a child inherited is ForkedChild there, small or large, and no crash (I13)."""
    cache = await pool.namespace(MANIFEST)
    puts = [cache.put(key_of(i), nbytes) for i, nbytes in enumerate((100, LARGE))]
    for put in puts:
        await put.__aenter__()

    pid = os.fork()
    if pid == 0:
        refused = 0
        for put in puts:
            try:
                put.commit().send(None)  # without a loop: the child has none
            except ForkedChild:
                refused += 1
            except BaseException:  # noqa: BLE001 - whatever else it was, the child must end
                os._exit(70)
        os._exit(refused)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2  # noqa: ASYNC222 - it is short
    for put in puts:
        put.abort()


async def test_pieces_are_gathered(pool: aio.AsyncPool) -> None:
    """Pieces of memory are stored as by a plain put, small in place or large in a thread."""
    cache = await pool.namespace(MANIFEST)
    for i, nbytes in enumerate((100, LARGE)):
        pages = np.random.default_rng(i).integers(0, 256, nbytes, dtype=np.uint8)
        half, base = nbytes // 2, pages.ctypes.data
        lengths = np.array([nbytes - half, half], np.uint64)
        async with cache.put(key_of(i), nbytes) as w:
            there = np.array([base + half, base], np.uint64)
            assert await w.copy_pieces(there, lengths) == nbytes
        await cache.flush()
        chunk = await cache.get(key_of(i))
        assert chunk is not None
        assert bytes(chunk.memory) == pages[half:].tobytes() + pages[:half].tobytes()
        assert chunk.verify()


async def test_exception_aborts(pool: aio.AsyncPool) -> None:
    """An exception in the block leaves the key absent."""
    cache = await pool.namespace(MANIFEST)

    async def fill() -> None:
        async with cache.put(key_of(1), LARGE) as w:
            await w.copy_from(bytes(LARGE))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fill()
    await cache.flush()
    assert await cache.get(key_of(1)) is None
    with pytest.raises(ValueError, match="not entered"):
        _ = cache.put(key_of(1), 10).memory


async def test_the_loop_goes_on_while_a_put_waits(pool: aio.AsyncPool) -> None:
    """A put that waits for memory does not keep other coroutines from running."""
    cache = await pool.namespace(MANIFEST)
    held = [cache.sync.put(key_of(i), LARGE) for i in range(8)]
    turns = 0

    async def wait() -> None:
        async with cache.put(key_of(99), LARGE, wait_ms=200):
            pass

    waiting = asyncio.create_task(wait())
    while not waiting.done():
        turns += 1
        await asyncio.sleep(0)

    assert turns > 1
    with pytest.raises(PoolFull):
        await waiting
    del held


async def test_cancelled_copy_leaves_nothing(pool: aio.AsyncPool) -> None:
    """A put that is cancelled in the middle is aborted when its copy has ended, not before."""
    cache = await pool.namespace(MANIFEST)
    data = bytes(16 * 2**20)

    async def fill() -> None:
        async with cache.put(key_of(1), len(data)) as w:
            started.set()
            await w.copy_from(data)

    started = asyncio.Event()
    filling = asyncio.create_task(fill())
    await started.wait()
    await asyncio.sleep(0)
    filling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await filling

    await cache.flush()
    assert await cache.get(key_of(1)) is None
    async with cache.put(key_of(2), len(data)) as w:
        await w.copy_from(data)


async def test_events(pool: aio.AsyncPool) -> None:
    """The feed is an async iterator; it wakes up for what another task stores."""
    cache = await pool.namespace(MANIFEST)
    found: list[Any] = []

    async def follow() -> None:
        async for event in pool.events(since=1):
            found.append(event)
            if len(found) == 3:
                return

    following = asyncio.create_task(follow())
    for i in range(3):
        await cache.put_many(key_of(i), [b"x"])
    await following

    assert [(e.kind, e.key) for e in found] == [("stored", key_of(i)) for i in range(3)]
    assert [e async for e in pool.events(timeout_s=0.01)] == []
    assert [e async for e in pool.events(since=2, follow=False)] == found[1:]


async def test_real_daemon(cenoted: Callable[..., Any]) -> None:
    """connect() attaches to a daemon, and a closed pool says so."""
    daemon = cenoted()
    pool = await aio.connect(daemon.socket, label="aio")
    cache = await pool.namespace(MANIFEST)
    async with cache.put(key_of(1), 100) as w:
        await w.copy_from(bytes(100))
    await cache.flush()
    results = await asyncio.gather(*(cache.get(key_of(1)) for _ in range(50)))
    assert all(chunk is not None for chunk in results)
    assert (await pool.stats()).sessions == 1
    await pool.close()
    with pytest.raises(PoolGone, match="closed"):
        await cache.get(key_of(1))
