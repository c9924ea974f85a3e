# SPDX-License-Identifier: Apache-2.0
"""
What CenoteConnector's KV events say of vLLM's own requests, without an engine.

test_offloading.py runs this file under the vLLM environment's Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from tests.unit.vllm_bed import BLOCK, CHUNK, ERA, FULL, NBYTES, WINDOW, Bed
from vllm import SamplingParams
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    maybe_convert_block_hash,
)
from vllm.v1.request import Request

from cenote.client import Cache, Event
from cenote.client.adapters.vllm.events import Events
from cenote.client.adapters.vllm.identity import manifest_of
from cenote.client.adapters.vllm.messages import Fields
from cenote.client.testing import MemoryHost

TOKENS = 4 * CHUNK + BLOCK + 1


def request_of(name: str = "r", salt: str | None = None) -> Request:
    init_none_hash(sha256)
    return Request(
        name,
        list(range(100, 100 + TOKENS)),
        SamplingParams(max_tokens=1),
        None,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


class Bench:
    """Two ranks, full attention beside a window; events of the pool are handed on by hand."""

    def __init__(self, host: MemoryHost) -> None:
        self.pool = host.connect()
        self.bed = Bed(self.pool, (FULL, WINDOW))
        self.events = Events(self.bed.shape, self.bed.lookup)
        self.feed = self.pool.events(timeout_s=0)
        assert self.bed.lookup.ready

    def key(self, request: Request, chunk: int) -> bytes:
        return self.bed.lookup.keys.key(request.block_hashes, chunk)

    def store(self, request: Request, chunks: Iterable[int]) -> None:
        for cache in (*self.bed.caches(0), *self.bed.caches(1)):
            put_all(cache, [self.key(request, chunk) for chunk in chunks])

    def hear(self) -> None:
        """As the follower does."""
        self.events._announced._follow(self.pool.events(since=1, follow=False))


def put_all(cache: Cache, keys: Iterable[bytes]) -> None:
    for key in keys:
        with cache.put(key, NBYTES) as put:
            put.copy_from(bytes(NBYTES))
    cache.flush()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with MemoryHost("16MiB") as host:
        yield Bench(host)


def hashes_of(request: Request, chunks: Iterable[int]) -> list[Any]:
    step = CHUNK // BLOCK
    return [
        maybe_convert_block_hash(each)
        for chunk in chunks
        for each in request.block_hashes[chunk * step : (chunk + 1) * step]
    ]


def test_a_chunk_is_announced_with_all_that_a_router_needs(bench: Bench) -> None:
    """
    Tokens, hashes and extra keys of each block, and the hash of the block before; once.
    """
    request = request_of(salt="s")
    bench.store(request, range(4))
    for _ in range(2):
        bench.events.available(request, range(4))
    said = bench.events.take()

    assert all(isinstance(each, BlockStored) for each in said)
    assert [t for each in said for t in each.token_ids] == request.prompt_token_ids[: 4 * CHUNK]
    assert [h for each in said for h in each.block_hashes] == hashes_of(request, range(4))
    assert [each.parent_block_hash for each in said] == [
        None,
        *(hashes_of(request, [chunk])[-1] for chunk in range(3)),
    ]
    assert {(each.block_size, each.medium) for each in said} == {(BLOCK, "CPU")}
    assert [each.extra_keys for each in said] == [[("s",), None], None, None, None]
    bench.events.available(request_of("again", salt="s"), range(4))
    assert bench.events.take() == []


def test_what_only_one_rank_has_is_not_announced(bench: Bench) -> None:
    """
    Until the other has it, too.
    """
    request = request_of()
    put_all(bench.bed.caches(0)[0], [bench.key(request, 0)])
    bench.events.available(request, [0])
    assert bench.events.take() == []
    put_all(bench.bed.caches(0)[1], [bench.key(request, 0)])
    (said,) = bench.events.take()
    assert said.block_hashes == hashes_of(request, [0])


def test_what_leaves_one_rank_is_withdrawn_once(bench: Bench) -> None:
    """
    All blocks of the chunk, by their hashes; the other rank's chunk may follow.
    """
    request = request_of()
    bench.store(request, range(2))
    bench.events.available(request, range(2))
    bench.events.take()
    for cache in bench.bed.caches(0):
        cache.delete(bench.key(request, 0))
    bench.hear()
    (said,) = bench.events.take()
    assert isinstance(said, BlockRemoved)
    assert (said.block_hashes, said.medium) == (hashes_of(request, [0]), "CPU")


def test_a_windows_chunk_that_leaves_withdraws_nothing(bench: Bench) -> None:
    """
    What is announced is what every hit needs; of a window only the hit's end is needed.
    """
    request = request_of()
    bench.store(request, range(2))
    bench.events.available(request, range(2))
    bench.events.take()
    for cache in bench.bed.caches(1):
        cache.delete(bench.key(request, 0))
    bench.hear()
    assert bench.events.take() == []


def test_a_reset_withdraws_all_and_what_is_stored_then_is_announced(bench: Bench) -> None:
    """
    What becomes of the old keys is nothing to the engine from then on, nor is what was offered
    under them and is stored only now.
    """
    request = request_of()
    old = [bench.key(request, chunk) for chunk in range(3)]
    bench.store(request, range(2))
    bench.events.available(request, range(3))
    bench.events.take()
    bench.bed.scheduler.reset()
    bench.events.begin_anew()
    for cache in bench.bed.caches(0):
        put_all(cache, old[2:])
    gone = bench.events.take()
    assert [h for each in gone for h in each.block_hashes] == hashes_of(request, range(2))

    bench.events.available(request, [0])
    assert bench.events.take() == []
    bench.store(request, [0])
    (said,) = bench.events.take()
    assert said.block_hashes == hashes_of(request, [0])
    for cache in bench.bed.caches(0):
        cache.delete(old)
    bench.hear()
    assert bench.events.take() == []
    bench.bed.caches(0)[0].delete(bench.key(request, 0))
    bench.hear()
    (gone,) = bench.events.take()
    assert isinstance(gone, BlockRemoved)


def test_events_of_others_are_not_ours(bench: Bench) -> None:
    """
    The same key in a namespace of another model.
    """
    request = request_of()
    bench.store(request, [0])
    bench.events.available(request, [0])
    bench.events.take()
    fields: Fields = {"model": "other", "layout": "l", "dtype": "uint8", "group": 0, "tp_rank": 0}
    other = bench.pool.namespace(manifest_of(fields, ERA, CHUNK))
    put_all(other, [bench.key(request, 0)])
    other.delete(bench.key(request, 0))
    heard = [each.kind for each in bench.feed if isinstance(each, Event)]
    assert heard[-1] == "deleted"
    bench.hear()
    assert bench.events.take() == []
