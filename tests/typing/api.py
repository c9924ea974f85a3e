# SPDX-License-Identifier: Apache-2.0
"""The public interface as a type checker sees it. Checked, never run."""

from __future__ import annotations

from array import array
from typing import assert_type

import numpy as np

from cenote.client import (
    Backoff,
    Cache,
    Chunk,
    Event,
    Gap,
    Manifest,
    ManifestMismatch,
    Pool,
    PoolStats,
    Put,
    aio,
    connect,
    cuda,
    keys,
    testing,
)


def attach() -> Pool:
    assert_type(connect("/run/cenote/default.sock", role="reader", timeout_s=0.5), Pool)
    assert_type(connect(label="engine", reconnect=Backoff(last_s=1.0)), Pool)
    assert_type(testing.memory_pool("64MiB", lease_slots=512), Pool)
    with testing.MemoryHost(size=1 << 26) as host:
        return host.connect(role="admin")


def look_up(pool: Pool, key: bytes) -> None:
    manifest = Manifest(
        model="llama-3-8b", layout="kv", dtype="bfloat16", chunk_tokens=256, tp_rank=0, fp8=True
    )
    cache = pool.namespace(manifest, name="prod")
    assert_type(cache, Cache)
    assert_type(cache.id, bytes)
    prompt = keys.chain([1, 2, 3], 256, cache.id)
    assert_type(cache.match(prompt), int)
    assert_type(cache.match([key, bytearray(key)]), int)
    assert_type(cache.get(key), Chunk | None)
    assert_type(cache.get_many(prompt), list[Chunk])
    batch = cache.lease_many(prompt)
    assert_type(batch.addresses, memoryview)
    with batch:
        assert_type(len(batch), int)


def use(pool: Pool, chunk: Chunk) -> None:
    assert_type(chunk.memory, memoryview)
    assert_type(chunk.nbytes, int)
    assert_type(chunk.meta, bytes)
    assert_type(chunk.key, bytes)
    assert_type(chunk.verify(), bool)
    assert_type(chunk.crc32c, int | None)
    places = array("Q", [0])
    assert_type(chunk.copy_pieces_to(places, np.ones(1, np.uint64), 16, verify=False), bool)
    values = chunk.numpy(np.float32, (2, -1))
    assert_type(values.flags.writeable, bool)
    with chunk:
        assert_type(pool.open(chunk.token), Chunk | None)


def store(cache: Cache, key: bytes, parent: Chunk | None) -> None:
    with cache.put(key, 4096, parent=parent, priority=1, ttl_s=60, meta=b"m") as w:
        assert_type(w, Put)
        assert_type(w.memory, memoryview)
        assert_type(w.copy_from(bytes(4096)), int)
        assert_type(w.copy_pieces(array("Q", [0]), np.ones(1, np.uint64), offset=16), int)
    assert_type(cache.put_many([key], [bytes(10)], start=3, parent=w), int)
    assert_type(cache.put_many(key, np.zeros((1, 10))), int)
    assert_type(cache.pin(key, ttl_s=3600), int)
    assert_type(cache.unpin([key]), int)
    assert_type(cache.delete(key), int)
    cache.flush(timeout_s=1.0)


def watch(pool: Pool) -> None:
    stats = pool.stats()
    assert_type(stats, PoolStats)
    assert_type(stats.bytes_used, int)
    for event in pool.events(since=1, timeout_s=1.0, follow=False):
        if isinstance(event, Gap):
            assert_type(event.lost, int | None)
            continue
        assert_type(event, Event)
        assert_type(event.key, bytes)


def pin(pool: Pool, chunk: Chunk) -> None:
    with cuda.register(pool) as pinned:
        assert_type(pinned, cuda.Registration)
        assert_type(pinned.pieces(chunk.address, chunk.nbytes), list[tuple[int, int]])
        assert_type(pinned.current and pinned.covers(chunk.address, 1), bool)
        assert_type(pinned.failed, str | None)


def mismatch(error: ManifestMismatch) -> None:
    assert_type(error.fields, dict[str, tuple[object, object]])


async def asynchronous(key: bytes) -> None:
    async with await aio.connect() as pool:
        cache = await pool.namespace(Manifest("m", "l", "d", 16))
        assert_type(cache, aio.AsyncCache)
        assert_type(await cache.get(key), Chunk | None)
        async with cache.put(key, 4096) as w:
            assert_type(await w.copy_from(bytes(4096)), int)
        async for event in pool.events():
            assert_type(event, Event | Gap)
