# SPDX-License-Identifier: Apache-2.0
"""A tenant's quota in a real daemon: whose chunks go, what the feed says, what a reload changes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

from cenote.client import Cache, Event, Manifest, connect
from cenote.shm.inspect import Catalog

CHUNK_BYTES: Final = 64 * 1024
FITS: Final = 2**20 // CHUNK_BYTES  # in the quota
QUOTA: Final = """
[[pool]]
name = "{pool}"
socket = "{socket}"
[[pool.region]]
medium = "memfd"
size = "16MiB"
[[pool.tenant]]
users = [UID]
quota = "1MiB"
""".replace("UID", str(os.geteuid()))


def key_of(i: int) -> bytes:
    """The i-th key."""
    return i.to_bytes(32, "big")


def bytes_of(i: int) -> bytes:
    """What belongs under it."""
    return i.to_bytes(8, "big") * (CHUNK_BYTES // 8)


def store(cache: Cache, numbers: Iterable[int]) -> None:
    """Store these chunks one after the other; all are linked, or dropped, on return."""
    for i in numbers:
        with cache.put(key_of(i), CHUNK_BYTES) as put:
            put.memory[:] = bytes_of(i)
    cache.flush()


def there(cache: Cache, numbers: Iterable[int]) -> list[int]:
    """Which of them are there; each has its bytes."""
    found = [(i, cache.get(key_of(i))) for i in numbers]
    assert all(bytes(chunk.memory) == bytes_of(i) for i, chunk in found if chunk is not None)
    return [i for i, chunk in found if chunk is not None]


def quota_becomes(daemon: Any, cache: Cache, old: str, new: str, nbytes: int) -> None:
    """Change the quota by SIGHUP and wait until the catalog has it; pytest's time limit ends it."""
    daemon.rewrite(lambda text: text.replace(f'quota = "{old}"', f'quota = "{new}"'))
    daemon.hang_up()
    catalog = Catalog.of(cache.pool._attachment.handle.mapping)
    pause = threading.Event()
    while {one.quota_bytes for one in catalog.namespaces()} != {nbytes}:
        pause.wait(0.01)


def test_a_quota_costs_its_own_namespace_alone(cenoted: Callable[..., Any]) -> None:
    """
    A tenant that stores three times its quota evicts its own chunks, with the reason in the feed;
    the pool is almost empty, a neighbour within its quota loses nothing, the tables agree.
    """
    daemon = cenoted(config=QUOTA)
    with connect(daemon.socket, role="admin") as pool:
        neighbour = pool.namespace(Manifest("neighbour", "l", "uint8", 16))
        greedy = pool.namespace(Manifest("greedy", "l", "uint8", 16))
        store(neighbour, range(FITS // 2))
        feed = pool.events(follow=False)

        store(greedy, range(3 * FITS))

        assert there(neighbour, range(FITS // 2)) == list(range(FITS // 2))
        kept = there(greedy, range(3 * FITS))
        assert FITS // 2 <= len(kept) <= FITS
        left = [e for e in feed if isinstance(e, Event) and e.kind == "evicted"]
        assert {(e.namespace_id, e.reason) for e in left} == {(greedy.id, "quota")}
        assert len(left) == 3 * FITS - len(kept)
        catalog = Catalog.of(pool._attachment.handle.mapping)
        evicted = {one.id: one.evictions for one in catalog.namespaces()}
        assert evicted == {neighbour.id: 0, greedy.id: len(left)}
        assert pool.stats().refused == 0
        assert pool._control("audit", {}, 5.0)["wrong"] == 0


def test_a_reload_lowers_and_lifts_a_quota(cenoted: Callable[..., Any]) -> None:
    """
    SIGHUP with half the quota: nothing goes at once, the next chunk makes the namespace fit; with
    none it grows beyond what it had.
    """
    daemon = cenoted(config=QUOTA)
    with connect(daemon.socket, role="admin") as pool:
        cache = pool.namespace(Manifest("m", "l", "uint8", 16))
        store(cache, range(FITS))
        assert len(there(cache, range(FITS))) == FITS

        quota_becomes(daemon, cache, "1MiB", "512KiB", 2**19)
        assert len(there(cache, range(FITS))) == FITS
        store(cache, [FITS])
        assert 1 <= len(there(cache, range(FITS + 1))) <= FITS // 2

        quota_becomes(daemon, cache, "512KiB", "0", 0)
        before = there(cache, range(FITS + 1))
        store(cache, range(100, 100 + 3 * FITS))
        assert there(cache, range(FITS + 1)) == before
        assert len(there(cache, range(100, 100 + 3 * FITS))) == 3 * FITS
        assert pool._control("audit", {}, 5.0)["wrong"] == 0
