# SPDX-License-Identifier: Apache-2.0
"""A pool of two regions: chunks of all sizes lie in both, and none larger than either fits."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import pytest

from cenote.client import Cache, ChunkTooLarge, Manifest, connect
from cenote.shm.inspect import Catalog

KIB: Final = 2**10
MIB: Final = 2**20
PUTS: Final = 400
SIZES: Final = (1, 4 * KIB, 5000, 64 * KIB, 300 * KIB, MIB, 2 * MIB + 1)
TWO_REGIONS: Final = """
[[pool]]
name = "{pool}"
socket = "{socket}"
[[pool.region]]
medium = "memfd"
size = "8MiB"
[[pool.region]]
medium = "memfd"
size = "12MiB"
"""


def key_of(i: int) -> bytes:
    """The i-th key."""
    return i.to_bytes(32, "big")


def bytes_of(i: int, nbytes: int) -> bytes:
    """What belongs under it."""
    return random.Random(i).randbytes(min(nbytes, 4096)) * (nbytes // 4096) + bytes(nbytes % 4096)


def store(cache: Cache, i: int, nbytes: int) -> bytes:
    """Store one chunk and return its bytes."""
    data = bytes_of(i, nbytes)[:nbytes]
    with cache.put(key_of(i), nbytes) as put:
        put.memory[:] = data
    return data


def test_chunks_of_all_sizes_lie_in_both_regions(cenoted: Callable[..., Any]) -> None:
    """
    Hundreds of chunks of many sizes, far more than fit: what is there has its bytes, both regions
    are in use, no extent leaves its region, and no table contradicts another.
    """
    daemon = cenoted(config=TWO_REGIONS)
    assert daemon.ready.endswith("size=20MiB")
    rng, stored = random.Random(7), {}
    with connect(daemon.socket, role="admin") as pool:
        cache = pool.namespace(Manifest("m", "l", "uint8", 16))
        for i in range(PUTS):
            stored[i] = store(cache, i, rng.choice(SIZES))
        cache.flush()

        found = {i: cache.get(key_of(i)) for i in stored}
        there = {i: chunk for i, chunk in found.items() if chunk is not None}
        assert all(bytes(chunk.memory) == stored[i] for i, chunk in there.items())
        assert len({len(chunk.memory) for chunk in there.values()}) > 2
        facts = list(Catalog.of(pool._attachment.handle.mapping).chunks())
        assert set(Counter(one.region for one in facts)) == {0, 1}
        ends = [(one.region, one.data_off + one.extent_bytes) for one in facts]
        assert all(end <= (8, 12)[region] * MIB for region, end in ends)
        assert pool.stats().evictions > 0
        assert pool._control("audit", {}, 5.0)["wrong"] == 0


def test_a_chunk_needs_one_region(cenoted: Callable[..., Any]) -> None:
    """
    What fits in the larger region alone goes there; what fits only in both together is refused at
    once, and the pool goes on.
    """
    daemon = cenoted(config=TWO_REGIONS)
    with connect(daemon.socket, role="admin") as pool:
        cache = pool.namespace(Manifest("m", "l", "uint8", 16))
        with pytest.raises(ChunkTooLarge, match="larger"):
            cache.put(key_of(1), 12 * MIB + 1)
        data = store(cache, 2, 10 * MIB)
        cache.flush()

        chunk = cache.get(key_of(2))
        assert chunk is not None
        assert bytes(chunk.memory) == data
        (facts,) = Catalog.of(pool._attachment.handle.mapping).chunks()
        assert facts.region == 1
        assert pool._control("audit", {}, 5.0)["wrong"] == 0
