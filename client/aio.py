# SPDX-License-Identifier: Apache-2.0
"""
The client for asyncio: the same verbs, awaited.

    pool = await aio.connect()
    cache = await pool.namespace(manifest)
    chunk = await cache.get(key)                 # no thread, no wait: as fast as the plain call
    async with cache.put(key, n) as w:
        await w.copy_from(kv)

Lookups run where they are awaited, for they take less than a microsecond. What copies, waits for
memory or asks the daemon runs in a small pool of threads, so that the loop goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from cenote.shm.handle import Batch

from . import connection as _connection
from . import pool as _pool
from .chunk import Chunk
from .events import Event, Follower, Gap
from .manifest import Manifest
from .namespace import CALL_TIMEOUT_S, PUT_WAIT_MS, Cache, Key, Keys
from .pool import CONNECT_TIMEOUT_S, Pool, PoolStats
from .put import Put

THREADS: Final = 4
# A copy shorter than this is done before a thread has been woken.
INLINE_COPY_BYTES: Final = 256 * 1024

T = TypeVar("T")


class _Threads:
    """The threads of one pool; made when first needed."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """
        Run *call* in a thread. A cancelled waiter still waits until it is over: a copy into an
        extent that was given back meanwhile would spoil somebody's chunk.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="cenote-aio")
        future = asyncio.get_running_loop().run_in_executor(self._executor, call)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await _settled(future)
            raise

    def close(self) -> None:
        """Let the threads end when they have nothing to do."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)


async def _settled(future: asyncio.Future[Any]) -> None:
    """Wait until *future* is over, however often this task is cancelled meanwhile."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()  # somebody has looked


class AsyncPut:
    """A Put for asyncio: `async with cache.put(key, nbytes) as w:`. See `cenote.client.Put`."""

    def __init__(self, reserve: Callable[[], Put], threads: _Threads) -> None:
        self._reserve = reserve
        self._threads = threads
        self._put: Put | None = None

    @property
    def put(self) -> Put:
        """The Put itself, once the block was entered."""
        if self._put is None:
            raise ValueError("this put was not entered: use `async with`")
        return self._put

    @property
    def memory(self) -> memoryview:
        """As `Put.memory`."""
        return self.put.memory

    @property
    def nbytes(self) -> int:
        """Length of the chunk."""
        return self.put.nbytes

    @property
    def token(self) -> bytes:
        """As `Put.token`."""
        return self.put.token

    async def copy_from(self, source: Any, offset: int = 0) -> int:
        """As `Put.copy_from`; large copies run in a thread."""
        put = self.put
        if put.nbytes <= INLINE_COPY_BYTES:
            return put.copy_from(source, offset)
        return await self._threads.run(partial(put.copy_from, source, offset))

    async def copy_pieces(self, addresses: Any, lengths: Any, offset: int = 0) -> int:
        """As `Put.copy_pieces`; large copies run in a thread."""
        put = self.put
        if put.nbytes <= INLINE_COPY_BYTES:
            return put.copy_pieces(addresses, lengths, offset)
        return await self._threads.run(partial(put.copy_pieces, addresses, lengths, offset))

    async def commit(self) -> None:
        """As `Put.commit`."""
        put = self.put
        # In a forked child the ring is not mapped, and the threads are not there (I13).
        if put.forked or (put.nbytes <= INLINE_COPY_BYTES and put.ring_is_roomy()):
            put.commit()
        else:
            await self._threads.run(put.commit)

    def abort(self) -> None:
        """As `Put.abort`."""
        if self._put is not None:
            self._put.abort()

    async def __aenter__(self) -> Self:
        self._put = await self._threads.run(self._reserve)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
        elif self.put.state == "open":
            await self.commit()


class AsyncCache:
    """A namespace for asyncio; see `cenote.client.Cache` for every verb."""

    def __init__(self, cache: Cache, threads: _Threads) -> None:
        self.sync: Final = cache
        self._threads = threads

    @property
    def id(self) -> bytes:
        """The namespace's 32-byte id."""
        return self.sync.id

    @property
    def manifest(self) -> Manifest:
        """What the namespace is for."""
        return self.sync.manifest

    async def match(self, keys: Keys) -> int:
        """As `Cache.match`."""
        return self.sync.match(keys)

    async def get(self, key: Key) -> Chunk | None:
        """As `Cache.get`."""
        return self.sync.get(key)

    async def get_many(self, keys: Keys) -> list[Chunk]:
        """As `Cache.get_many`."""
        return self.sync.get_many(keys)

    async def lease_many(self, keys: Keys) -> Batch:
        """As `Cache.lease_many`."""
        return self.sync.lease_many(keys)

    def put(
        self,
        key: Key,
        nbytes: int,
        parent: Key | Chunk | Put | AsyncPut | None = None,
        *,
        priority: int = 0,
        ttl_s: int | None = None,
        meta: Key = b"",
        position: int | None = None,
        wait_ms: int = PUT_WAIT_MS,
    ) -> AsyncPut:
        """As `Cache.put`; the extent is reserved on entering the block."""
        before = parent.put if isinstance(parent, AsyncPut) else parent
        reserve = partial(
            self.sync.put,
            key,
            nbytes,
            before,
            priority=priority,
            ttl_s=ttl_s,
            meta=meta,
            position=position,
            wait_ms=wait_ms,
        )
        return AsyncPut(reserve, self._threads)

    async def put_many(
        self,
        keys: Keys,
        buffers: Sequence[Any] | Any,
        start: int = 0,
        parent: Key | Chunk | Put | None = None,
        *,
        priority: int = 0,
        ttl_s: int | None = None,
        wait_ms: int = PUT_WAIT_MS,
    ) -> int:
        """As `Cache.put_many`."""
        call = partial(
            self.sync.put_many,
            keys,
            buffers,
            start,
            parent,
            priority=priority,
            ttl_s=ttl_s,
            wait_ms=wait_ms,
        )
        return await self._threads.run(call)

    async def flush(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """As `Cache.flush`."""
        await self._threads.run(partial(self.sync.flush, timeout_s))

    async def pin(
        self, keys: Keys, ttl_s: int | None = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> int:
        """As `Cache.pin`."""
        return await self._threads.run(partial(self.sync.pin, keys, ttl_s, timeout_s))

    async def unpin(self, keys: Keys, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """As `Cache.unpin`."""
        return await self._threads.run(partial(self.sync.unpin, keys, timeout_s))

    async def delete(self, keys: Keys, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """As `Cache.delete`."""
        return await self._threads.run(partial(self.sync.delete, keys, timeout_s))


class AsyncPool:
    """A pool for asyncio; see `cenote.client.Pool`. Made by `connect`, or from a plain Pool."""

    def __init__(self, pool: Pool) -> None:
        self.sync: Final = pool
        self._threads = _Threads()

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.sync.name

    @property
    def connected(self) -> bool:
        """Is a daemon there?"""
        return self.sync.connected

    @property
    def reconnects(self) -> int:
        """How often a daemon was found again."""
        return self.sync.reconnects

    async def namespace(
        self, manifest: Manifest, name: str | None = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> AsyncCache:
        """As `Pool.namespace`."""
        cache = await self._threads.run(partial(self.sync.namespace, manifest, name, timeout_s))
        return AsyncCache(cache, self._threads)

    async def open(self, token: bytes) -> Chunk | None:
        """As `Pool.open`."""
        return self.sync.open(token)

    async def stats(self, timeout_s: float = CALL_TIMEOUT_S) -> PoolStats:
        """As `Pool.stats`."""
        return await self._threads.run(partial(self.sync.stats, timeout_s))

    async def clear(self, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """As `Pool.clear`."""
        return await self._threads.run(partial(self.sync.clear, timeout_s))

    def events(
        self,
        since: int | None = None,
        timeout_s: float | None = None,
        follow: bool = True,
    ) -> AsyncIterator[Event | Gap]:
        """As `Pool.events`: `async for event in pool.events():`. Each follower has a thread."""
        return self._events(Follower(self.sync, since), timeout_s, forever=follow)

    async def _events(
        self, follower: Follower, timeout_s: float | None, *, forever: bool
    ) -> AsyncIterator[Event | Gap]:
        loop = asyncio.get_running_loop()
        quiet_since_s = loop.time()
        # Not the pool's threads: four followers would keep them all.
        with ThreadPoolExecutor(1, thread_name_prefix="cenote-events") as waiting:
            while True:
                found = follower.read()
                for event in found:
                    yield event
                if found:
                    quiet_since_s = loop.time()
                    continue
                left_s = None if timeout_s is None else quiet_since_s + timeout_s - loop.time()
                if not forever or (left_s is not None and left_s <= 0):
                    return
                await loop.run_in_executor(waiting, follower.wait, left_s)

    async def close(self) -> None:
        """As `Pool.close`."""
        self.sync.close()
        self._threads.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


async def connect(
    socket: str | os.PathLike[str] | None = None,
    *,
    role: str | None = None,
    label: str | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    reconnect: bool | _connection.Backoff = True,
) -> AsyncPool:
    """As `cenote.client.connect`."""
    call = partial(
        _pool.connect, socket, role=role, label=label, timeout_s=timeout_s, reconnect=reconnect
    )
    return AsyncPool(await asyncio.to_thread(call))
