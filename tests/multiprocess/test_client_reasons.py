# SPDX-License-Identifier: Apache-2.0
"""Why a chunk left: the feed, the counters and `explain` say the same, whatever the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cenote._native import _core
from cenote.client import Cache, Event, Pool
from cenote.client.testing import MemoryHost
from cenote.shm.explain import explain
from cenote.shm.inspect import Catalog

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_S = 30.0  # a limit for a hang, not a claim about speed
WANTED = (0).to_bytes(32, "big")


def key_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


def store(cache: Cache, numbers: range, nbytes: int, **options: Any) -> None:
    for i in numbers:
        with cache.put(key_of(i), nbytes, wait_ms=2000, **options) as w:
            w.copy_from(bytes(nbytes))
    cache.flush()


def by_policy(_host: MemoryHost, cache: Cache) -> None:
    store(cache, range(1), MIB)
    store(cache, range(1, 100), MIB)


def by_ttl(_host: MemoryHost, cache: Cache) -> None:
    store(cache, range(1), KIB, ttl_s=1)


def by_client(_host: MemoryHost, cache: Cache) -> None:
    store(cache, range(1), KIB)
    assert cache.delete(WANTED) == 1


def by_loss(host: MemoryHost, cache: Cache) -> None:
    """As the daemon's own session reports bytes that do not match their checksum."""
    store(cache, range(1), KIB)
    assert host._host is not None
    chunk = cache.get(WANTED)
    assert chunk is not None
    _welcome, mapping = host._host.attach("writer", "scrubber", internal=True)
    client = _core.ffi.cast("struct cn_client *", mapping.ptr)
    assert _core.lib.cn_report(client, _core.lib.CN_OP_LOST, chunk.ref, 0) == _core.lib.CN_OK


def by_admin(host: MemoryHost, cache: Cache) -> None:
    store(cache, range(1), KIB)
    with host.connect(role="admin") as admin:
        assert admin.clear() == 1


@pytest.mark.parametrize(
    ("leave", "kind", "reason", "counter"),
    [
        (by_policy, "evicted", "policy", "evictions"),
        (by_ttl, "evicted", "ttl", "expirations"),
        (by_loss, "evicted", "loss", "lost"),
        (by_client, "deleted", "client", "deletions"),
        (by_admin, "cleared", "admin", None),
    ],
)
def test_reason(  # noqa: PLR0917 - pytest passes them by name
    host: MemoryHost,
    pool: Pool,
    cache: Cache,
    leave: Callable[[MemoryHost, Cache], None],
    kind: str,
    reason: str,
    counter: str | None,
) -> None:
    """Events, stats and explain agree on what became of a chunk."""
    feed = pool.events(timeout_s=PATIENCE_S)
    leave(host, cache)

    event = next(e for e in feed if isinstance(e, Event) and e.kind != "stored")
    found = explain(Catalog.of(pool._attachment.handle.mapping), WANTED)

    assert (event.kind, event.reason) == (kind, reason)
    assert event.key == (WANTED if kind != "cleared" else bytes(32))
    assert (found.verdict, found.by) == (kind, reason)
    assert cache.get(WANTED) is None
    if counter is not None:
        assert getattr(pool.stats(), counter) >= 1
