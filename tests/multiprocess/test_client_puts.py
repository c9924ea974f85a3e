# SPDX-License-Identifier: Apache-2.0
"""Storing: reservations, commits, aborts, prompts, pins, deletions, events."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import numpy as np
import pytest

from cenote.client import (
    Cache,
    Chunk,
    ChunkTooLarge,
    Event,
    Gap,
    Manifest,
    ManifestMismatch,
    NotWritable,
    Pool,
    PoolFull,
    Put,
    keys,
    testing,
)
from cenote.client.testing import MemoryHost

MANIFEST = Manifest("m", "l", "uint8", 16)


def key_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


def stored(cache: Cache, key: bytes) -> bytes | None:
    cache.flush()
    chunk = cache.get(key)
    return None if chunk is None else bytes(chunk.memory)


@pytest.mark.parametrize("nbytes", [1, 63, 4096, 4097, 100_000, 2**21, 5_000_001])
def test_any_size_comes_back(cache: Cache, nbytes: int) -> None:
    """A chunk of any size comes back as it was written, in place or copied."""
    data = np.random.default_rng(nbytes).bytes(nbytes)
    with cache.put(key_of(1), nbytes) as w:
        w.memory[:] = data
    with cache.put(key_of(2), nbytes) as w:
        assert w.copy_from(data) == nbytes

    assert stored(cache, key_of(1)) == data
    assert stored(cache, key_of(2)) == data


def test_meta_comes_back(cache: Cache) -> None:
    """Up to 4 KiB of the caller's own bytes travel with a chunk; more is refused."""
    for i, meta in enumerate([b"", b"x", bytes(range(256)) * 16]):
        with cache.put(key_of(i), 1000, meta=meta) as w:
            w.copy_from(bytes([i]) * 1000)
        assert stored(cache, key_of(i)) == bytes([i]) * 1000
        chunk = cache.get(key_of(i))
        assert chunk is not None
        assert chunk.meta == meta
    with pytest.raises(ValueError, match="4097 bytes"):
        cache.put(key_of(9), 10, meta=bytes(4097))


def test_exception_aborts(pool: Pool, cache: Cache) -> None:
    """An exception in the block leaves the key absent and gives the memory back."""
    w = cache.put(key_of(1), 4096)

    def fill() -> None:
        with w:
            w.memory[:4] = b"half"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fill()

    assert stored(cache, key_of(1)) is None
    assert w.state == "aborted"
    assert pool.stats().bytes_used == 0


def test_dropped_put_aborts(cache: Cache) -> None:
    """A put that nobody commits gives its memory back when it is collected."""
    for i in range(200):
        cache.put(key_of(i), 2**20, wait_ms=2000)  # 200 MiB through a pool of 64

    assert stored(cache, key_of(0)) is None


@pytest.mark.parametrize("mode", ["off", "lazy", "commit"])
def test_checksums(mode: str) -> None:
    """A recorded CRC always agrees, also where bytes changed after a copy; "off" records none."""
    with testing.memory_pool("64MiB", checksum=mode) as pool:
        cache = pool.namespace(MANIFEST)
        with cache.put(key_of(1), 5000) as w:
            w.copy_from(bytes(5000))
        with cache.put(key_of(2), 5000) as w:
            w.copy_from(bytes(5000))
            w.memory[17] = 9
        with cache.put(key_of(3), 5000) as w:
            w.memory[:] = bytes([3]) * 5000
        cache.put_many(key_of(4), [bytes(5000)])
        cache.flush()
        found = [cache.get(key_of(i)) for i in (1, 2, 3, 4)]

        verified = [chunk.verify() for chunk in found if chunk is not None]
        assert (
            verified
            == {
                "off": [False] * 4,
                "lazy": [True, False, False, True],
                "commit": [True] * 4,
            }[mode]
        )
        del found


def test_too_large_and_full(host: MemoryHost, cache: Cache) -> None:
    """What can never fit is said at once; what does not fit now after the wait."""
    with pytest.raises(ChunkTooLarge):
        cache.put(key_of(1), 2**63)
    with pytest.raises(ChunkTooLarge, match="larger"):
        cache.put(key_of(1), 65 * 2**20)
    with pytest.raises(ChunkTooLarge):
        cache.put(key_of(1), 2**30 + 1)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="1 at least"):
            cache.put(key_of(1), wrong)
    held: list[Put] = []
    with pytest.raises(PoolFull, match="waiting at most 20 ms"):
        held.extend(cache.put(key_of(i), 8 * 2**20, wait_ms=20) for i in range(20))
    held.clear()
    gc.collect()
    with cache.put(key_of(3), 8 * 2**20) as w:
        w.copy_from(bytes(8 * 2**20))
    assert stored(cache, key_of(3)) is not None


def test_leased_chunks_fill_the_pool(cache: Cache) -> None:
    """Chunks that somebody reads are not evicted: then the pool is full, and afterwards not."""
    size = 4 * 2**20
    held: dict[int, Chunk] = {}

    def fill() -> None:
        for i in range(64):
            with cache.put(key_of(i), size, wait_ms=50) as w:
                w.memory[:4] = i.to_bytes(4, "big")
            cache.flush()
            chunk = cache.get(key_of(i))
            if chunk is not None:  # above the high-water mark it is the only one that can go
                held[i] = chunk

    with contextlib.suppress(PoolFull):
        fill()
    assert 8 < len(held) <= 16
    for i, chunk in held.items():
        assert bytes(chunk.memory[:4]) == i.to_bytes(4, "big")
    del chunk
    held.clear()

    with cache.put(key_of(1000), size) as w:
        w.copy_from(bytes(size))


def test_two_writers_of_one_key(host: MemoryHost, cache: Cache) -> None:
    """Of two writers of a key the first to be linked stays; the other is dropped silently."""
    with host.connect() as second_pool:
        second = second_pool.namespace(MANIFEST)
        one, two = cache.put(key_of(1), 4096), second.put(key_of(1), 4096)
        one.copy_from(b"1" * 4096)
        two.copy_from(b"2" * 4096)
        two.commit()
        second.flush()
        one.commit()
        assert stored(cache, key_of(1)) == b"2" * 4096
        assert stored(second, key_of(1)) == b"2" * 4096
        stats = second_pool.stats()
        assert (stats.chunks, stats.duplicates) == (1, 1)


def test_put_many(pool: Pool, cache: Cache) -> None:
    """A prompt is stored by one call, from a list or from the rows of an array."""
    rows = np.random.default_rng(1).integers(0, 2**32, (20, 4, 256), np.uint32)
    chain = keys.chain(list(range(40)), 2, cache.id)

    assert cache.put_many(chain, rows) == 20
    assert cache.put_many([key_of(1), key_of(2)], [b"one", bytearray(b"other")], start=20) == 2
    assert cache.put_many(b"", []) == 0
    cache.flush()
    assert cache.match(chain) == 20
    assert [bytes(c.memory) for c in cache.get_many(chain)] == [row.tobytes() for row in rows]
    assert stored(cache, key_of(2)) == b"other"
    assert cache.put_many(chain[:64], rows[::10]) == 2  # rows apart, and keys that are there
    with pytest.raises(ValueError, match="2 keys and 1 buffers"):
        cache.put_many(chain[:64], [b"x"])
    with pytest.raises(ChunkTooLarge) as caught:
        cache.put_many(b"".join(map(key_of, (5, 6))), [b"x", np.zeros(2**27, np.uint8)])
    assert caught.value.committed == 1  # type: ignore[attr-defined]  # documented


def test_put_many_ends_where_the_pool_is_full(cache: Cache) -> None:
    """put_many says how many went in when there is no room for all."""
    rows = np.zeros((40, 2**21), np.uint8)
    kept = [cache.put(key_of(1000 + i), 2**21) for i in range(8)]  # a quarter of the pool

    assert cache.put_many(b"".join(map(key_of, range(40))), rows, wait_ms=0) == 0
    del kept[:2]
    assert cache.put_many(b"".join(map(key_of, range(40))), rows) == 40
    cache.flush()
    assert 0 < cache.match(b"".join(map(key_of, range(40)))) <= 26


def test_positions_follow_the_chain(pool: Pool, cache: Cache) -> None:
    """A chunk lies one behind its parent, however the parent is named."""
    with cache.put(key_of(1), 10) as first:
        first.copy_from(bytes(10))
    cache.flush()
    parent = cache.get(key_of(1))

    assert first.position == 0
    for given in (key_of(1), parent, first):
        put = cache.put(key_of(2), 10, parent=given)
        assert put.position == 1
        put.abort()
    assert cache.put(key_of(3), 10, parent=key_of(99)).position == 2**32 - 1
    assert cache.put(key_of(3), 10, position=5).position == 5


@pytest.mark.parametrize(
    "options",
    [{"priority": 128}, {"priority": -129}, {"ttl_s": 0}, {"ttl_s": -1}, {"position": -1}],
)
def test_options_out_of_range(cache: Cache, options: dict[str, Any]) -> None:
    """Numbers that cannot be recorded are refused, not cut off."""
    with pytest.raises(ValueError, match=next(iter(options))):
        cache.put(key_of(1), 10, **options)


def test_delete_pin_unpin(pool: Pool, cache: Cache) -> None:
    """delete, pin and unpin count what they found."""
    cache.put_many(b"".join(map(key_of, range(4))), [bytes(100)] * 4)
    cache.flush()

    assert cache.pin([key_of(0), key_of(1), key_of(77)], ttl_s=60) == 2
    assert pool.stats().pinned == 2
    assert cache.unpin([key_of(0), key_of(1), key_of(77)]) == 2
    assert cache.pin(key_of(2)) == 1
    assert cache.delete(b"".join(map(key_of, (0, 1, 2, 88)))) == 3
    assert cache.get(key_of(0)) is None
    assert cache.match(key_of(3)) == 1
    with pytest.raises(ValueError, match="ttl_s"):
        cache.pin(key_of(3), ttl_s=0)


def test_pinned_chunks_stay(cache: Cache) -> None:
    """What is pinned is there after the pool was filled several times over."""
    cache.put_many(key_of(0), [b"p" * 1000])
    cache.flush()
    assert cache.pin(key_of(0)) == 1

    for i in range(1, 200):
        with cache.put(key_of(i), 2**20) as w:
            w.memory[0] = 1

    assert stored(cache, key_of(0)) == b"p" * 1000
    assert stored(cache, key_of(1)) is None


def test_readers_may_not_store(host: MemoryHost, cache: Cache) -> None:
    """A reader looks up what a writer stored, and is refused everything that changes the pool."""
    cache.put_many(key_of(1), [b"x" * 100])
    cache.flush()
    with host.connect("reader") as pool:
        mine = pool.namespace(MANIFEST)
        assert stored_by(mine, key_of(1)) == b"x" * 100
        for call in (
            lambda: mine.put(key_of(2), 10),
            lambda: mine.put_many(key_of(2), [b"x"]),
            lambda: mine.delete(key_of(1)),
            lambda: mine.pin(key_of(1)),
        ):
            with pytest.raises(NotWritable, match="role='writer'"):
                call()


def stored_by(cache: Cache, key: bytes) -> bytes | None:
    chunk = cache.get(key)
    return None if chunk is None else bytes(chunk.memory)


def test_namespaces_are_apart(pool: Pool, cache: Cache) -> None:
    """The same key in two namespaces is two chunks (I8)."""
    other = pool.namespace(Manifest("m", "l", "uint8", 16, tp_rank=1))
    same = pool.namespace(Manifest("m", "l", "uint8", 16))
    cache.put_many(key_of(1), [b"a"])
    other.put_many(key_of(1), [b"b"])

    assert (stored(cache, key_of(1)), stored(other, key_of(1))) == (b"a", b"b")
    assert stored(same, key_of(1)) == b"a"
    assert cache.id == same.id == MANIFEST.namespace_id() != other.id


def test_a_name_is_bound_to_one_manifest(pool: Pool) -> None:
    """Another manifest under a bound name is refused with the fields that differ."""
    pool.namespace(MANIFEST, name="prod")
    pool.namespace(MANIFEST, name="prod")

    with pytest.raises(ManifestMismatch) as caught:
        pool.namespace(Manifest("m2", "l", "uint8", 16, extra=True), name="prod")
    assert caught.value.fields == {"model": ("m", "m2"), "extra": (None, True)}


def test_events_tell_what_happened(pool: Pool, cache: Cache) -> None:
    """Stores, deletions and evictions come in order, each with its key and reason."""
    feed = pool.events(timeout_s=0.2)
    cache.put_many(b"".join(map(key_of, (1, 2))), [bytes(10), bytes(20)])
    cache.flush()
    cache.delete(key_of(1))

    found = [event for event in feed if isinstance(event, Event)]

    assert [(e.kind, e.key, e.nbytes, e.reason) for e in found] == [
        ("stored", key_of(1), 10, ""),
        ("stored", key_of(2), 20, ""),
        ("deleted", key_of(1), 10, "client"),
    ]
    assert [e.sequence for e in found] == list(range(found[0].sequence, found[0].sequence + 3))
    assert {e.namespace_id for e in found} == {cache.id}
    again = list(pool.events(since=found[1].sequence, follow=False))
    assert again == found[1:]


def test_lost_events_leave_a_gap(pool: Pool, cache: Cache) -> None:
    """A follower that was too slow is told how many events it missed; then none is missing."""
    feed = pool.events(follow=False)
    for i in range(30):
        cache.put_many(b"".join(key_of(100 * i + j) for j in range(100)), [bytes(8)] * 100)
    cache.flush()

    found = list(feed)
    gap = found[0]

    assert isinstance(gap, Gap)
    assert gap.lost is not None
    assert found[1].sequence == gap.sequence == 1 + gap.lost
    rest = [e.sequence for e in found[1:]]
    assert rest == list(range(rest[0], rest[0] + len(rest)))


def test_stats_count(pool: Pool, cache: Cache) -> None:
    """The statistics are what was done."""
    cache.put_many(b"".join(map(key_of, range(3))), [bytes(4096)] * 3)
    cache.flush()
    held = cache.get_many(b"".join(map(key_of, range(3))))
    assert cache.get(key_of(99)) is None

    stats = pool.stats()

    assert (stats.chunks, stats.leases, stats.sessions, stats.commits) == (3, 3, 1, 3)
    assert (stats.hits, stats.misses) == (3, 1)
    assert stats.bytes_used == 3 * 4096
    assert stats.bytes_total == 64 * 2**20
    assert stats.raw["live_chunks"] == 3
    del held


def test_token_within_a_process(host: MemoryHost, cache: Cache) -> None:
    """A token opens the same bytes in another session, and is a miss when they have gone."""
    cache.put_many(key_of(1), [b"hello"])
    cache.flush()
    chunk = cache.get(key_of(1))
    assert chunk is not None
    token = chunk.token
    with host.connect("reader") as pool:
        opened = pool.open(token)
        assert opened is not None
        assert (bytes(opened.memory), opened.key, opened.token) == (b"hello", key_of(1), token)
        del opened
        cache.delete(key_of(1))
        assert pool.open(token) is None
        assert pool.open(token[:4] + bytes(16) + token[20:]) is None
        for wrong in (b"", token[:-1], b"xxx" + token[3:], token[:3] + b"\x02" + token[4:]):
            with pytest.raises(ValueError, match="token"):
                pool.open(wrong)
    assert bytes(chunk.memory) == b"hello"
