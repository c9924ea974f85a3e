# SPDX-License-Identifier: Apache-2.0
"""
The processes of test_kill_storm.py: they work until they are killed, and check every byte.

The bytes of a chunk are a function of its key, so anybody can tell a wrong one. A process that sees
one ends with an exception, which the test finds; it never ends otherwise.
"""

from __future__ import annotations

import random
from typing import Any, Final

import numpy as np

from cenote.client import Cache, Chunk, ChunkTooLarge, Manifest, PoolFull, Timeout, connect

MANIFEST: Final = Manifest("storm", "l", "uint8", 16)
KEYS: Final = 3000  # three times what the pool holds, so that something is always leaving
CHAIN: Final = 6
SIZES: Final = (1, 4096, 5000, 20_000, 65_536, 65_537, 131_072, 300_001)
_NOISE: Final = np.random.default_rng(42).bytes(1 << 20)
PERIOD: Final = len(_NOISE) - max(SIZES)


def key_of(i: int) -> bytes:
    """The i-th key."""
    return i.to_bytes(32, "little")


def bytes_of(key: bytes) -> bytes:
    """What must be stored under *key*: its length too is a function of the key."""
    i = int.from_bytes(key, "little")
    at = i * 7919 % PERIOD
    return _NOISE[at : at + SIZES[i % len(SIZES)]]


def check(key: bytes, memory: Any) -> None:
    """Raise if a single byte under *key* is wrong."""
    expected = bytes_of(key)
    if bytes(memory) == expected:
        return
    got = bytes(memory)
    first = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    raise AssertionError(
        f"key {int.from_bytes(key, 'little')}: {len(got)} bytes, {len(expected)} expected; "
        f"the first wrong one is at {first}"
    )


def open_cache(path: str, role: str) -> Cache:
    """Attach as any engine would."""
    return connect(path, role=role, timeout_s=30.0).namespace(MANIFEST, timeout_s=30.0)


# ---- writers -------------------------------------------------------------------------------------


def put_in_place(cache: Cache, rng: random.Random) -> None:
    """Fill the extent in two halves, so that a kill may come between them."""
    key = key_of(rng.randrange(KEYS))
    data = bytes_of(key)
    half = len(data) // 2
    with cache.put(key, len(data), wait_ms=50, meta=key[: rng.randrange(9)]) as put:
        put.memory[:half] = data[:half]
        put.memory[half:] = data[half:]


def put_copied(cache: Cache, rng: random.Random) -> None:
    """Copy with the checksum of the same pass, several puts being open at once."""
    keys = [key_of(rng.randrange(KEYS)) for _ in range(rng.randrange(1, 5))]
    ttl_s = rng.choice([None, 2])
    puts = [cache.put(key, len(bytes_of(key)), wait_ms=50, ttl_s=ttl_s) for key in keys]
    for put in puts:
        put.copy_from(bytes_of(put.key))
        put.commit()


def put_chain(cache: Cache, rng: random.Random) -> None:
    """Store a prompt by one call."""
    first = rng.randrange(KEYS - CHAIN)
    keys = [key_of(first + i) for i in range(CHAIN)]
    cache.put_many(keys, [bytes_of(key) for key in keys], wait_ms=50)


def put_and_abort(cache: Cache, rng: random.Random) -> None:
    """Reserve, write rubbish, and think better of it."""
    put = cache.put(key_of(rng.randrange(KEYS)), rng.choice(SIZES), wait_ms=50)
    put.memory[:1] = b"x"
    put.abort()


def change(cache: Cache, rng: random.Random) -> None:
    """Delete, pin, unpin: each is a request that the keeper answers."""
    keys = [key_of(rng.randrange(KEYS)) for _ in range(8)]
    verb = rng.choice(["delete", "pin", "unpin"])
    if verb == "pin":
        cache.pin(keys, ttl_s=1, timeout_s=30.0)
    else:
        getattr(cache, verb)(keys, timeout_s=30.0)


def writer(path: str, seed: int) -> None:
    """Store and change chunks, and now and then look one up."""
    rng = random.Random(seed)
    cache = open_cache(path, "writer")
    print("working", flush=True)
    verbs = [put_in_place] * 4 + [put_copied] * 4 + [put_chain] * 2 + [put_and_abort, change]
    while True:
        try:
            rng.choice(verbs)(cache, rng)
        except (PoolFull, Timeout) as error:
            if isinstance(error, ChunkTooLarge):
                raise
        found = cache.get(key_of(rng.randrange(KEYS)))
        if found is not None:
            check(found.key, found.memory)


# ---- readers -------------------------------------------------------------------------------------


def take(cache: Cache, rng: random.Random) -> list[tuple[bytes, Chunk]]:
    """Lease some chunks: one, or the beginning of a chain."""
    if rng.random() < 0.5:
        key = key_of(rng.randrange(KEYS))
        found = cache.get(key)
        return [] if found is None else [(key, found)]
    first = rng.randrange(KEYS - CHAIN)
    keys = [key_of(first + i) for i in range(CHAIN)]
    cache.match(keys)
    return list(zip(keys, cache.get_many(keys), strict=False))


def batch(cache: Cache, rng: random.Random) -> None:
    """Lease a batch and let it go: its lengths must be right."""
    first = rng.randrange(KEYS - CHAIN)
    keys = [key_of(first + i) for i in range(CHAIN)]
    with cache.lease_many(keys) as leases:
        lengths = list(leases.lengths)
    wrong = [(n, k) for n, k in zip(lengths, keys, strict=False) if n != len(bytes_of(k))]
    assert not wrong, f"wrong lengths: {wrong}"


def reader(path: str, seed: int) -> None:
    """Hold up to 40 chunks, and look at each when it is taken and again when it is let go (I2)."""
    rng = random.Random(seed)
    cache = open_cache(path, "reader")
    print("working", flush=True)
    held: list[tuple[bytes, Chunk]] = []
    while True:
        for key, chunk in take(cache, rng):
            check(key, chunk.memory)
            held.append((key, chunk))
        batch(cache, rng)
        while len(held) > rng.randrange(40):
            key, chunk = held.pop(rng.randrange(len(held)))
            check(key, chunk.memory)
            if rng.random() < 0.5:
                chunk.release()
