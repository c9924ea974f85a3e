# SPDX-License-Identifier: Apache-2.0
"""The read-only look at a catalog: that it is right, and that nothing in it can hurt who looks."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenote.client import Cache, Manifest, Pool
from cenote.client.errors import Corrupt, VersionMismatch
from cenote.client.testing import MemoryHost
from cenote.shm.explain import explain
from cenote.shm.facts import ChunkFacts, printable
from cenote.shm.inspect import Catalog

PROD = Manifest("llama", "kv", "bfloat16", 256)
EVENTS = 64
FLAG_PINNED = 1
LAYOUT_VERSION_OFF = 8
NAMESPACE_BYTES = 4096


def key_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


def store(cache: Cache, *numbers: int, nbytes: int = 1000, **options: Any) -> None:
    for i in numbers:
        with cache.put(key_of(i), nbytes, **options) as w:
            w.copy_from(bytes(nbytes))
    cache.flush()


@pytest.fixture
def host() -> Iterator[MemoryHost]:
    with MemoryHost("32MiB", chunk_count=512, event_count=EVENTS) as made:
        yield made


@pytest.fixture
def pool(host: MemoryHost) -> Iterator[Pool]:
    with host.connect("admin", label="engine") as made:
        yield made


@pytest.fixture
def prod(pool: Pool) -> Cache:
    return pool.namespace(PROD, name="prod")


@pytest.fixture
def catalog(pool: Pool) -> Catalog:
    return Catalog.of(pool._attachment.handle.mapping)


# ---- what is there ------------------------------------------------------------------------------


def test_a_chunk_is_listed_as_it_was_stored(prod: Cache, catalog: Catalog) -> None:
    """
    Key, namespace, length, chain, priority, deadline, pin, metadata and checksum are all told.
    """
    store(prod, 1)
    store(prod, 2, nbytes=5000, parent=key_of(1), priority=-3, ttl_s=60, meta=b"four")
    prod.pin(key_of(2))

    table = catalog.chunks()
    first, second = sorted(table, key=lambda chunk: chunk.sequence)

    assert table.nonsense == 0
    assert (first.key, first.nbytes, first.position, first.parent) == (key_of(1), 1000, 0, 0)
    assert (second.key, second.nbytes, second.position) == (key_of(2), 5000, 1)
    assert second.parent == first.ref
    assert (second.priority, second.meta_bytes, second.pinned) == (-3, 4, True)
    assert second.extent_bytes == 8192
    assert 0 < second.expires_ns - second.committed_ns <= 61 * 10**9
    assert second.crc32c is not None
    assert {chunk.namespace_slot for chunk in table} == {1}


def test_lookups_agree_with_the_list(prod: Cache, catalog: Catalog) -> None:
    """
    find() returns the listed record of a present key, None of an absent one, and takes no lease.
    """
    store(prod, *range(20))

    for chunk in catalog.chunks():
        assert catalog.find(chunk.namespace_slot, chunk.key) == chunk
    assert catalog.find(1, key_of(99)) is None
    assert catalog.find(2, key_of(1)) is None
    assert prod.pool.leases == 0
    with pytest.raises(ValueError, match="31 bytes"):
        catalog.find(1, bytes(31))


def test_columns_agree_with_the_rows(prod: Cache, catalog: Catalog) -> None:
    """
    Selecting rows by a column gives the same as looking at each row.
    """
    for i in range(10):
        store(prod, i, nbytes=1000 * (i + 1))
    prod.pin([key_of(3), key_of(4)])

    table = catalog.chunks()
    pinned = table.where((table.flags & np.uint64(FLAG_PINNED)) != 0)
    by_size = table.where(np.argsort(table.nbytes))

    assert {chunk.key for chunk in pinned} == {key_of(3), key_of(4)}
    assert [chunk.nbytes for chunk in by_size] == [1000 * (i + 1) for i in range(10)]


def test_namespaces_sessions_and_the_superblock_are_told(
    host: MemoryHost, pool: Pool, prod: Cache, catalog: Catalog
) -> None:
    """
    A namespace comes with its manifest and bytes, a session with its label and role.
    """
    other = pool.namespace(Manifest("llama", "kv", "float16", 256))
    store(prod, 1, 2)
    with host.connect("reader", label="second\x1b[31m"):
        sessions = catalog.sessions()

    first, second = catalog.namespaces()
    assert (first.name, first.id, first.manifest) == ("prod", prod.id, dict(PROD))
    assert (first.live_chunks, first.live_bytes) == (2, 8192)
    assert (second.label, second.live_chunks) == (other.id.hex()[:16], 0)
    assert [(s.label, s.role) for s in sessions] == [("engine", "admin"), ("second?[31m", "reader")]
    assert {s.pid for s in sessions} == {os.getpid()}
    assert catalog.superblock.pool == "testing"
    assert catalog.superblock.pool_id == pool.pool_id
    assert sum(r.bytes for r in catalog.superblock.regions) == catalog.superblock.capacity_bytes
    assert catalog.now().serving
    assert pool.stats().chunks == catalog.counters()["live_chunks"] == 2
    assert catalog.checksummed() == (2, 2)


def test_an_empty_pool_has_nothing_to_tell(catalog: Catalog) -> None:
    """
    No chunks, no namespaces, no events: empty answers, no errors.
    """
    assert len(catalog.chunks()) == 0
    assert list(catalog.chunks()) == []
    assert catalog.namespaces() == []
    assert list(catalog.event_blocks()) == []
    assert explain(catalog, key_of(1)).feed.events == 0


def test_records_that_change_meanwhile_are_whole_or_left_out(prod: Cache, catalog: Catalog) -> None:
    """
    While chunks come and go, each listed record has the length that belongs to its key.
    """
    stop = threading.Event()
    seen: list[ChunkFacts] = []

    def churn() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            store(prod, i, nbytes=1 + i % 5000)
            if i > 50:
                prod.delete(key_of(i - 50))

    writer = threading.Thread(target=churn)
    writer.start()
    try:
        while writer.is_alive() and len(seen) < 10_000:
            seen += catalog.chunks()
    finally:
        stop.set()
        writer.join()

    assert len(seen) >= 10_000
    assert all(c.nbytes == 1 + int.from_bytes(c.key, "big") % 5000 for c in seen)


# ---- what became of a key -----------------------------------------------------------------------


def test_a_present_chunk_is_explained_with_its_parent(prod: Cache, catalog: Catalog) -> None:
    """
    Where it is, and whom it follows; a parent that has left is none.
    """
    store(prod, 1)
    store(prod, 2, parent=key_of(1))

    found = explain(catalog, key_of(2))
    prod.delete(key_of(1))
    orphan = explain(catalog, key_of(2))

    assert (found.verdict, found.here[0].namespace.name) == ("present", "prod")
    assert found.here[0].parent_key == key_of(1)
    assert [event.kind for event in found.history] == ["stored"]
    assert orphan.verdict == "present"
    assert orphan.here[0].parent_key is None


def test_a_chunk_of_another_namespace_is_explained_by_the_manifests(
    pool: Pool, prod: Cache, catalog: Catalog
) -> None:
    """
    Asked for in one namespace and present in another: the fields that differ are named.
    """
    pool.namespace(Manifest("llama", "kv", "float16", 256, tp_size=2))
    store(prod, 1)
    _, asked = catalog.namespaces()

    found = explain(catalog, key_of(1), asked)

    assert (found.verdict, found.here) == ("elsewhere", ())
    assert found.elsewhere[0].namespace.name == "prod"
    assert found.elsewhere[0].differs == {
        "dtype": ("float16", "bfloat16"),
        "tp_size": (2, None),
    }
    assert explain(catalog, key_of(1)).verdict == "present"


def test_deletion_and_clearing_are_explained(pool: Pool, prod: Cache, catalog: Catalog) -> None:
    """
    Deleted by a client, cleared by an administrator: with the time of it.
    """
    store(prod, 1, 2)
    prod.delete(key_of(1))
    pool.clear()

    deleted, cleared = explain(catalog, key_of(1)), explain(catalog, key_of(2))

    assert (deleted.verdict, deleted.by) == ("deleted", "client")
    assert (cleared.verdict, cleared.by) == ("cleared", "admin")
    assert 0 < deleted.at_ns <= cleared.at_ns
    assert [event.kind for event in deleted.history] == ["stored", "deleted", "cleared"]


def settled(pool: Pool) -> None:
    """Return when the keeper is done: it evicts on after the last commit was linked."""
    before = -1
    while (now := pool.stats().evictions) != before:
        before = now
        pool.namespace(PROD).delete(key_of(9999))  # answered after a round of its own


def test_eviction_is_explained_by_what_caused_it() -> None:
    """
    A chunk that the full pool pushed out was evicted by the policy.
    """
    with MemoryHost("8MiB", chunk_count=256, event_count=512) as host, host.connect() as pool:
        cache = pool.namespace(PROD)
        for i in range(40):
            store(cache, i, nbytes=512 * 1024)
        settled(pool)
        catalog = Catalog.of(pool._attachment.handle.mapping)
        gone = [i for i in range(40) if explain(catalog, key_of(i)).verdict == "evicted"]

        assert len(gone) == pool.stats().evictions > 0
        assert {explain(catalog, key_of(i)).by for i in gone} == {"policy"}


def test_a_key_that_nobody_stored_is_unknown_and_the_feed_says_how_far_it_reaches(
    prod: Cache, catalog: Catalog
) -> None:
    """
    With all events there it was never stored; once some were overwritten, that cannot be said.
    """
    store(prod, 1)
    before = explain(catalog, key_of(1000))
    store(prod, *range(2, 2 * EVENTS))
    prod.delete([key_of(1)])
    after = explain(catalog, key_of(1000))

    assert (before.verdict, before.feed.events, before.feed.complete) == ("unknown", 1, True)
    assert (after.verdict, after.feed.events, after.feed.complete) == ("unknown", EVENTS, False)
    assert after.feed.since_ns >= before.feed.since_ns > 0
    assert after.feed.lost == 0


def test_a_key_needs_32_bytes(catalog: Catalog, prod: Cache) -> None:
    """
    A short key is refused, not padded.
    """
    with pytest.raises(ValueError, match="5 bytes"):
        explain(catalog, b"short")


# ---- hostile bytes ------------------------------------------------------------------------------


class Copy:
    """A catalog in a file that a test may spoil, and the view of somebody who looks at it."""

    def __init__(self, path: Path, source: Catalog) -> None:
        self.path = path
        size = source.superblock.catalog_bytes
        path.write_bytes(bytes(source_bytes(source, size)))
        with path.open("r+b") as file:
            self.bytes = mmap.mmap(file.fileno(), size)

    def open(self) -> Catalog:
        return Catalog.open(self.path)

    def put_u64(self, offset: int, value: int) -> None:
        self.bytes[offset : offset + 8] = (value & (2**64 - 1)).to_bytes(8, "little")


def source_bytes(source: Catalog, size: int) -> memoryview:
    import ctypes

    return memoryview((ctypes.c_ubyte * size).from_address(source.address))


@pytest.fixture
def copy(tmp_path: Path, prod: Cache, catalog: Catalog) -> Iterator[Copy]:
    store(prod, *range(1, 6))
    prod.delete(key_of(5))
    made = Copy(tmp_path / "catalog", catalog)
    yield made
    made.bytes.close()


def look_everywhere(catalog: Catalog) -> None:
    """Everything that the tool does with a catalog."""
    list(catalog.chunks())
    catalog.namespaces()
    catalog.sessions()
    catalog.counters()
    catalog.checksummed()
    catalog.now()
    for i in range(1, 7):
        explain(catalog, key_of(i))


def test_a_catalog_in_a_file_reads_like_the_mapped_one(copy: Copy, catalog: Catalog) -> None:
    """
    What open() shows is what the attached process sees.
    """
    mapped = copy.open()

    assert list(mapped.chunks()) == list(catalog.chunks())
    assert mapped.namespaces() == catalog.namespaces()
    assert explain(mapped, key_of(5)) == explain(catalog, key_of(5))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda copy: copy.put_u64(0, 0),
        lambda copy: copy.put_u64(40, 1),
        lambda copy: copy.put_u64(72, 2**40),
        lambda copy: copy.bytes.resize(4096),
        lambda copy: copy.bytes.resize(100),
    ],
    ids=["magic", "created", "sizes", "superblock alone", "less than a superblock"],
)
def test_what_is_no_catalog_is_refused(copy: Copy, spoil: Callable[[Copy], None]) -> None:
    """
    A wrong magic, a superblock whose CRC does not hold, a truncated file: Corrupt, never a fault.
    """
    spoil(copy)

    with pytest.raises(Corrupt):
        copy.open()


def test_a_catalog_of_another_layout_is_named_as_such(copy: Copy) -> None:
    """
    Another layout version: VersionMismatch, with both versions.
    """
    copy.bytes[LAYOUT_VERSION_OFF] = 99

    with pytest.raises(VersionMismatch, match="layout 99"):
        copy.open()


def test_an_empty_file_is_no_catalog(tmp_path: Path) -> None:
    """
    Nothing to map is an error with a remedy, not one of mmap's.
    """
    (tmp_path / "empty").touch()

    with pytest.raises(Corrupt, match="0 bytes"):
        Catalog.open(tmp_path / "empty")


@pytest.mark.parametrize(
    ("field_off", "value"),
    [(40, 2**63), (40, 32 * 2**20), (48, 0), (48, 2**32 - 1), (56, 200), (56, 0), (56, 0xFFFF0000)],
    ids=["offset", "end", "empty", "length", "region", "namespace 0", "namespace"],
)
def test_a_record_that_points_nowhere_is_left_out_and_counted(
    copy: Copy, field_off: int, value: int
) -> None:
    """
    One bad descriptor costs its own row, and is told.
    """
    catalog = copy.open()
    victim = catalog.find(1, key_of(2))
    assert victim is not None
    copy.put_u64(catalog.superblock.offsets["chunks"] + 64 * victim.descriptor + field_off, value)

    table = catalog.chunks()

    assert table.nonsense == 1
    assert {chunk.key for chunk in table} == {key_of(1), key_of(3), key_of(4)}
    assert catalog.find(1, key_of(2)) is None


def test_a_namespace_record_of_garbage_is_shown_without_its_manifest(copy: Copy) -> None:
    """
    A manifest that is none, a length beyond the record and a name without an end are harmless.
    """
    catalog = copy.open()
    at = catalog.superblock.offsets["namespaces"] + NAMESPACE_BYTES
    copy.bytes[at + 192 : at + 196] = b"\xff\xff\xff\xff"
    copy.bytes[at + 200 : at + 256] = b"\x1b" * 56

    namespace = catalog.namespace(1)

    assert namespace is not None
    assert namespace.manifest is None
    assert namespace.name == "?" * 56
    assert len(namespace.packed) == 3840


def test_a_feed_of_garbage_ends(copy: Copy) -> None:
    """
    An event head at the end of all numbers, and events that are none: no endless loop.
    """
    catalog = copy.open()
    copy.put_u64(2304, 2**64 - 1)

    found = explain(catalog, key_of(5))

    assert (found.verdict, found.feed.events) == ("unknown", 0)
    assert found.feed.lost == EVENTS


def test_a_parent_that_cannot_be_is_no_parent(copy: Copy) -> None:
    """
    A reference to a descriptor beyond the table is not followed.
    """
    catalog = copy.open()
    child = catalog.find(1, key_of(2))
    assert child is not None
    copy.put_u64(catalog.superblock.offsets["cold"] + 64 * child.descriptor, 2**64 - 1)

    assert explain(catalog, key_of(2)).here[0].parent_key is None


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_no_bytes_behind_the_superblock_can_hurt(copy: Copy, data: st.DataObject) -> None:
    """
    Whatever is written behind the immutable half of the superblock: answers, no exceptions.
    """
    catalog = copy.open()
    areas = {**catalog.superblock.offsets, "live": 2048}
    for _ in range(data.draw(st.integers(1, 4))):
        start = areas[data.draw(st.sampled_from(sorted(areas)))] + data.draw(st.integers(0, 2000))
        raw = data.draw(st.binary(min_size=1, max_size=256))
        copy.bytes[start : start + len(raw)] = raw

    look_everywhere(catalog)


def test_text_cannot_steer_a_terminal() -> None:
    """
    Control characters, escapes and invisible ones become question marks; letters stay.
    """
    assert printable("a\x1b[2J\n\u202eé 漢") == "a?[2J??é 漢"
