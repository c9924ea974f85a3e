# SPDX-License-Identifier: Apache-2.0
"""Verifying a pool whose keeper runs, and reading its bytes: what is wrong is found, no more."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from tests.unit.verify_bed import (
    MANIFEST,
    SIZES,
    Copy,
    fill,
    key_of,
    kinds,
    store,
)

from cenote.client import Cache, Pool
from cenote.client.errors import PoolFull
from cenote.client.testing import MemoryHost
from cenote.shm.inspect import Catalog
from cenote.shm.verify import Verifier, regions_of

CHURN_LOOKS: Final = 40


@pytest.fixture
def host() -> Iterator[MemoryHost]:
    with MemoryHost("32MiB", chunk_count=512, event_count=256, checksum="commit") as made:
        yield made


@pytest.fixture
def pool(host: MemoryHost) -> Iterator[Pool]:
    with host.connect("writer") as made:
        yield made


@pytest.fixture
def cache(pool: Pool) -> Cache:
    made = pool.namespace(MANIFEST, name="prod")
    fill(made)
    return made


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A pool as its daemon left it, in files."""
    return Copy.make(tmp_path)


def online(pool: Pool) -> Verifier:
    """A verifier beside the keeper of *pool*."""
    return Verifier(Catalog.of(pool.mapping), regions_of(pool.mapping), settle=pool.stats)


# ---- nothing is wrong ---------------------------------------------------------------------------


def test_nothing_is_found_where_nothing_is_wrong(cache: Cache) -> None:
    """
    Chunks of several sizes, pinned ones, deleted ones, grants: all tables agree, sums too.
    """
    cache.pin([key_of(1), key_of(2)], ttl_s=60)
    held = cache.get(key_of(3))
    cache.delete([key_of(3), key_of(4)])

    verifier = online(cache.pool)
    verifier.tables()
    done = verifier.bytes()

    assert kinds(verifier.report) == {}
    assert verifier.report.notes == []
    assert verifier.report.states["dying"] == 1
    assert (done.checked, done.left, done.unread, len(done.wrong)) == (58, 0, 0, 0)
    assert held is not None


def test_an_empty_pool_is_all_right(pool: Pool) -> None:
    """
    No chunk, no namespace, no slab.
    """
    verifier = online(pool)
    verifier.tables()

    assert verifier.bytes().checked == 0
    assert verifier.report.wrong == 0


def test_a_copy_is_all_right_as_well(copy: Copy) -> None:
    """
    Without a daemon the same holds, counters included: nothing was going on.
    """
    report = copy.verified(counted=True, crc=True)

    assert kinds(report) == {}
    assert report.walked["checked"] == 60
    assert report.left["takes_over"]


def test_verifying_leases_nothing_and_is_no_use_of_a_chunk(cache: Cache) -> None:
    """
    Hits, misses, leases and uses are what they were.
    """
    catalog = Catalog.of(cache.pool.mapping)
    before, rows = cache.pool.stats(), list(catalog.chunks())

    verifier = online(cache.pool)
    verifier.tables()
    verifier.bytes()

    after = cache.pool.stats()
    assert (after.hits, after.misses, after.leases) == (before.hits, before.misses, before.leases)
    assert list(catalog.chunks()) == rows


def test_what_a_keeper_is_changing_is_no_finding(host: MemoryHost, pool: Pool) -> None:
    """
    Three writers store, pin and delete chunks of changing sizes, so that the keeper evicts and
    empties slabs all the time: look after look finds nothing.
    """
    stop = threading.Event()

    def churn(seed: int) -> None:
        rng = random.Random(seed)
        with host.connect("writer") as own:
            cache = own.namespace(MANIFEST)
            while not stop.is_set():
                i, nbytes = rng.randrange(2000), rng.choice((3000, 40_000, 300_000, 2_500_000))
                try:
                    with cache.put(key_of(i), nbytes, wait_ms=0) as w:
                        w.copy_from(bytes([i & 0xFF]) * nbytes)
                except PoolFull:
                    cache.flush()
                if i % 7 == 0:
                    cache.delete([key_of(rng.randrange(2000))])
                if i % 11 == 0:
                    cache.pin([key_of(i)], ttl_s=1)

    crew = [threading.Thread(target=churn, args=(seed,)) for seed in range(3)]
    for thread in crew:
        thread.start()
    try:
        left = looks = 0
        while looks < CHURN_LOOKS or not left:  # something must have left while it was read
            looks += 1
            verifier = online(pool)
            verifier.tables()
            left += verifier.bytes().left
            assert kinds(verifier.report) == {}, verifier.report.found
    finally:
        stop.set()
        for thread in crew:
            thread.join()
    stats = pool.stats()
    assert stats.evictions > 0


def test_damage_beside_a_running_keeper_is_found(host: MemoryHost, cache: Cache) -> None:
    """
    What stays wrong look after look counts, once.
    """
    verifier = online(cache.pool)
    writable = host._running()._objects.catalog
    at = verifier.catalog.superblock.offsets["cold"] + 64 * 3
    parent = np.frombuffer(_memory(writable + at, 8), dtype=np.uint64)
    kept = int(parent[0])

    parent[0] = 7 << 32 | 3 << 20
    verifier.tables()
    parent[0] = kept

    assert kinds(verifier.report) == {"parent": 1}
    assert verifier.report.wrong == 1


def _memory(address: int, nbytes: int) -> memoryview:
    import ctypes

    return memoryview((ctypes.c_ubyte * nbytes).from_address(address))


def test_a_generation_later_is_another_chunk(cache: Cache) -> None:
    """
    A chunk that was replaced after the walk is left out of the bytes: it is another one.
    """
    verifier = online(cache.pool)
    verifier.tables()
    cache.delete([key_of(0)])
    store(cache, 0, SIZES[0])

    done = verifier.bytes()

    assert (done.checked, done.left, len(done.wrong)) == (59, 1, 0)


# ---- bytes --------------------------------------------------------------------------------------


def test_every_spoiled_chunk_is_found(copy: Copy) -> None:
    """
    A bit in each of seven chunks: those seven, by reference, whatever their size.
    """
    facts = {chunk.key: chunk for chunk in Catalog.open(copy.catalog).chunks()}
    spoiled = [facts[key_of(i)] for i in (0, 1, 2, 20, 33, 58, 59)]
    with copy.region.open("r+b") as file:
        for chunk in spoiled:
            at = chunk.data_off + chunk.nbytes - 1
            byte = os.pread(file.fileno(), 1, at)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 0x10]), at)

    report = copy.verified(crc=True)

    assert kinds(report) == {"crc": 7}
    found = {(f.descriptor, f.generation, f.key) for f in report.found["crc"].examples}
    assert found == {(c.descriptor, c.generation, c.key) for c in spoiled}
    assert report.walked["checked_bytes"] == sum(chunk.nbytes for chunk in facts.values())


def test_metadata_and_what_lies_between_chunks_is_nobodys_byte(copy: Copy) -> None:
    """
    The checksum is that of the data.
    """
    chunk = next(c for c in Catalog.open(copy.catalog).chunks() if c.nbytes == SIZES[0])
    with copy.region.open("r+b") as file:
        os.pwrite(file.fileno(), b"\xff" * 8, chunk.data_off + chunk.nbytes)

    assert kinds(copy.verified(crc=True)) == {}


def test_a_short_region_is_named_and_harmless(copy: Copy) -> None:
    """
    Chunks beyond the end of the file cannot be read, and are counted.
    """
    os.truncate(copy.region, 4096)

    report = copy.verified(crc=True)

    assert kinds(report) == {"region": 1}
    assert "4096 bytes" in report.found["region"].examples[0].text
    assert 0 < int(report.walked["unread"] or 0) < 60
    assert not report.left["takes_over"]


def test_a_region_that_shrinks_meanwhile_is_no_fault(copy: Copy) -> None:
    """
    SIGBUS becomes a finding: those bytes are gone.
    """
    left = copy.opened()
    os.truncate(copy.region, 0)

    verifier = Verifier(left.catalog, left.regions)
    verifier.tables(counted=False)

    assert len(verifier.bytes().wrong) == 60


def test_chunks_without_a_checksum_are_counted(pool: Pool) -> None:
    """
    With checksums off nothing can be said of the bytes, and that is said.
    """
    with MemoryHost("16MiB", chunk_count=128, checksum="off") as other, other.connect() as made:
        cache = made.namespace(MANIFEST)
        for i in range(5):
            with cache.put(key_of(i), 4096) as w:
                w.memory[:] = bytes(4096)
        cache.flush()
        verifier = online(made)
        verifier.tables()
        done = verifier.bytes()

    assert (done.checked, verifier.report.walked["unrecorded"]) == (0, 5)
    assert verifier.report.wrong == 0


def test_a_rate_is_kept_and_changes_nothing_else(copy: Copy) -> None:
    """
    Half a second's worth of bytes takes at least nearly so long.
    """
    left = copy.opened()
    total = sum(chunk.nbytes for chunk in left.catalog.chunks())
    verifier = Verifier(left.catalog, left.regions, bytes_per_s=2 * total)
    verifier.tables(counted=False)
    seen: list[int] = []
    done = verifier.bytes(seen.append)

    assert (done.checked, done.nbytes, seen[-1]) == (60, total, total)
    assert seen == sorted(seen)
    assert done.seconds > 0.25
