# SPDX-License-Identifier: Apache-2.0
"""
What the offloading spec loads and promises: vLLM's own classes of manager and worker, without an
engine. test_offloading.py runs this file under the vLLM environment's Python.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.spec_bed import (
    BLOCK,
    BLOCKS,
    CHUNK,
    NO_STEP,
    Engine,
    context,
    gpu,
    keys_of,
    wait_until,
)
from vllm.v1.kv_offload.base import LookupResult

from cenote.client.adapters.vllm import attach
from cenote.client.adapters.vllm.groups import Shape
from cenote.client.adapters.vllm.identity import engine_fields, era_of, groups_of
from cenote.client.adapters.vllm.settings import Settings
from cenote.client.errors import PoolGone
from cenote.client.testing import MemoryHost

Engines = Callable[..., Engine]


# ---- what is stored is what is loaded -----------------------------------------------------------


def test_what_one_engine_stored_another_loads(engines: Engines) -> None:
    """
    Two chunks out of one engine's blocks, into other blocks of another engine: equal bytes in every
    layer, and no lease is left.
    """
    one, other = engines(), engines()
    blocks, target = [3, 9, 4, 5, 17, 2, 8, 30], [31, 6, 7, 22, 1, 20, 11, 12]
    one.compute(blocks, seed=1)
    one.store(keys_of(2), blocks)
    wait_until(lambda: all(other.look(key) is LookupResult.HIT for key in keys_of(2)))

    request = context("r")
    spec = other.promise(keys_of(2), request)
    assert other.leases > 0
    assert other.run(lambda job: other.worker.submit_load(job, spec, gpu(target)))
    other.manager.complete_load(set(keys_of(2)), request)

    assert torch.equal(other.pages(target), one.pages(blocks))
    assert (one.leases, other.leases) == (0, 0)


@pytest.mark.parametrize("expedited", [False, True])
def test_pages_that_the_engine_has_are_left_alone(engines: Engines, expedited: bool) -> None:
    """
    A load that begins within its first chunk and ends within its last (vLLM's block_indices)
    writes the pages between, and no other.
    """
    engine = engines()
    blocks = [1, 2, 3, 4, 5, 6, 7, 8]
    engine.compute(blocks, seed=1)
    engine.store(keys_of(2), blocks)
    target, before = [21, 22, 23, 24], engine.pages(range(10, 40))

    request = context("r")
    spec = engine.promise(keys_of(2), request)
    load = gpu(target, first=3)
    more = {"expedited": True} if expedited else {}
    assert engine.run(lambda job: engine.worker.submit_load(job, spec, load, **more))
    engine.manager.complete_load(set(keys_of(2)), request)

    assert torch.equal(engine.pages(target), engine.pages([4, 5, 6, 7]))
    rest = [block - 10 for block in range(10, 40) if block not in target]
    assert torch.equal(engine.pages(range(10, 40))[:, rest], before[:, rest])


def test_groups_are_kept_apart(engines: Engines) -> None:
    """
    The same hash names a chunk of each group; each comes back as its own.
    """
    engine = engines(windows=True)
    blocks = {0: [1, 2, 3, 4], 1: [11, 12, 13, 14]}
    for group, pages in blocks.items():
        engine.compute(pages, seed=group, group=group)
    keys = [keys_of(1, group=group)[0] for group in blocks]
    wait_until(lambda: engine.manager.ready)
    while any(engine.look(key) is LookupResult.MISS for key in keys):
        wanted = engine.manager.prepare_store(keys, context("s")).keys_to_store
        engine.manager.complete_store(set(wanted), context("s"))
        own: list[list[int]] = [blocks[g] if keys[g] in wanted else [] for g in blocks]
        engine.offer(
            wanted, list(itertools.chain(*own)), context("s"), sizes=[len(each) for each in own]
        )
    wait_until(lambda: all(engine.look(key) is LookupResult.HIT for key in keys))

    request, target = context("r"), [21, 22, 23, 24, 31, 32, 33, 34]
    spec = engine.promise(keys, request)
    load = gpu(target, sizes=[4, 4])
    assert engine.run(lambda job: engine.worker.submit_load(job, spec, load))
    engine.manager.complete_load(set(keys), request)

    for group, pages in blocks.items():
        copied = engine.pages(target[4 * group : 4 * group + 4], group)
        assert torch.equal(copied, engine.pages(pages, group))


def test_a_chunk_whose_pages_have_gone_is_not_stored(engines: Engines) -> None:
    """
    What a window let go leaves a chunk in part; others would take it for whole.
    """
    engine = engines()
    blocks = [2, 3, 4, 5, 6, 7, 8]
    engine.store(keys_of(1, seed=9), [1, 2, 3, 4])  # room is there from now on
    engine.compute(blocks, seed=1)

    assert engine.offer(keys_of(2), blocks, context("s"), first=1) == keys_of(2)

    wait_until(lambda: engine.look(keys_of(2)[1]) is LookupResult.HIT)
    assert engine.look(keys_of(2)[0]) is LookupResult.MISS


# ---- who shares with whom -----------------------------------------------------------------------


def test_the_identity_is_the_connectors(engines: Engines) -> None:
    """
    Manifest by manifest, a worker of the spec has the namespaces that CenoteConnector's has.
    """
    from cenote.client.adapters.vllm.identity import manifest_of
    from cenote.client.adapters.vllm.worker import Worker

    engine = engines(windows=True)
    shape = Shape.of(groups_of(engine.cache_config, 1), BLOCK, CHUNK * BLOCK)
    common = engine_fields(engine.vllm_config)
    connector = Worker(Settings(), shape, common, engine.worker._attachment)
    connector.register(engine.cache_config, engine.tensors, engine.layers)
    era = era_of(engine.vllm_config)

    for group in range(2):
        expected = manifest_of(connector.facts[group], era, shape.chunk_tokens)
        assert engine.worker._memory.manifest(era, group) == expected
        (cache,) = engine.lookup.caches(group)
        assert cache.manifest == expected


def test_another_engines_promise_is_refused(engines: Engines) -> None:
    """
    A load of a namespace that is not this worker's own is reported as failed: never a wrong byte.
    """
    engine = engines()
    engine.compute([1, 2, 3, 4], seed=1)
    engine.store(keys_of(1), [1, 2, 3, 4])
    before = engine.pages(range(BLOCKS))
    request = context("r")
    spec = engine.promise(keys_of(1), request)
    spec.names = ((b"x" * 32,),)

    assert not engine.run(lambda job: engine.worker.submit_load(job, spec, gpu([21, 22, 23, 24])))
    assert torch.equal(engine.pages(range(BLOCKS)), before)
    engine.manager.complete_load(set(keys_of(1)), request)
    assert engine.leases == 0


# ---- a promise is kept --------------------------------------------------------------------------


def test_a_promised_chunk_stays_until_it_is_loaded(engines: Engines, host: MemoryHost) -> None:
    """
    Dropped by somebody else between the lookup and the load, it is loaded all the same.
    """
    engine = engines()
    engine.compute([1, 2, 3, 4], seed=1)
    engine.store(keys_of(1), [1, 2, 3, 4])
    request = context("r")
    assert engine.manager.lookup(keys_of(1)[0], request) is LookupResult.HIT
    with host.connect("admin") as admin:
        admin.clear()
        spec = engine.manager.prepare_load(keys_of(1), request)
        engine.manager.on_schedule_end(NO_STEP)
        admin.clear()

        load = gpu([21, 22, 23, 24])
        assert engine.run(lambda job: engine.worker.submit_load(job, spec, load))
        engine.manager.complete_load(set(keys_of(1)), request)

        assert torch.equal(engine.pages([21, 22, 23, 24]), engine.pages([1, 2, 3, 4]))
        assert engine.leases == 0


def test_what_was_looked_up_and_not_loaded_is_let_go(engines: Engines) -> None:
    """
    A request that is not scheduled after all holds nothing beyond its step.
    """
    engine = engines()
    engine.store(keys_of(2), [1, 2, 3, 4, 5, 6, 7, 8])
    for key in keys_of(2):
        assert engine.manager.lookup(key, context("r")) is LookupResult.HIT
    assert engine.leases == 2

    engine.manager.on_schedule_end(NO_STEP)

    assert engine.leases == 0


def test_two_requests_share_a_promise(engines: Engines) -> None:
    """
    Each holds the chunk until its own load is over.
    """
    engine = engines()
    engine.store(keys_of(1), [1, 2, 3, 4])
    first, second = context("a"), context("b")
    for request in (first, second):
        assert engine.manager.lookup(keys_of(1)[0], request) is LookupResult.HIT
        engine.manager.prepare_load(keys_of(1), request)
    engine.manager.on_schedule_end(NO_STEP)

    engine.manager.complete_load(set(keys_of(1)), first)
    assert engine.leases == 1
    engine.manager.complete_load(set(keys_of(1)), second)
    assert engine.leases == 0


@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_damaged_chunk_is_a_miss_before_anybody_is_promised_it(
    engines: Engines, verify: str
) -> None:
    """
    Its checksum is compared beside the scheduler: pending, then a miss, and stored anew.
    """
    engine = engines(verify=verify)
    (cache,) = engine.lookup.caches(0)
    with cache.put(keys_of(1)[0][:-4], engine.worker._memory.layouts[0].nbytes) as put:
        put.copy_from(bytes(put.nbytes))
        spoiler = ctypes.c_uint8.from_address(put.address)
    cache.flush()
    spoiler.value ^= 1  # as a broken device would

    assert engine.look(keys_of(1)[0]) is LookupResult.HIT_PENDING
    wait_until(lambda: engine.look(keys_of(1)[0]) is LookupResult.MISS)

    wait_until(lambda: engine.leases == 0)
    assert engine.offer(keys_of(1), [1, 2, 3, 4], context("s")) == keys_of(1)


def test_a_chunk_of_another_length_is_a_miss(engines: Engines) -> None:
    """
    Bytes that cannot be this model's are not promised.
    """
    engine = engines()
    (cache,) = engine.lookup.caches(0)
    with cache.put(keys_of(1)[0][:-4], 4096) as put:
        put.copy_from(bytes(4096))
    cache.flush()
    assert engine.look(keys_of(1)[0]) is LookupResult.HIT_PENDING
    wait_until(lambda: engine.look(keys_of(1)[0]) is LookupResult.MISS)
    assert engine.leases == 0


def test_verify_never_promises_at_once(engines: Engines) -> None:
    """
    Without comparing, the first lookup is a hit.
    """
    one, other = engines(), engines(verify="never")
    one.store(keys_of(1), [1, 2, 3, 4])
    wait_until(lambda: other.manager.ready)
    assert other.look(keys_of(1)[0]) is LookupResult.HIT


# ---- no pool, and another one -------------------------------------------------------------------


def test_without_a_daemon_everything_is_a_miss_until_one_comes(
    engines: Engines, host: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Nothing is stored and nothing is an error; both halves attach later.
    """
    daemon = threading.Event()

    def connect(*_args: Any, **_kwargs: Any) -> Any:
        if not daemon.is_set():
            raise PoolGone("no daemon yet")
        return host.connect()

    monkeypatch.setattr(attach, "connect", connect)
    engine = engines()
    assert engine.look(keys_of(1)[0]) is LookupResult.MISS
    assert engine.offer(keys_of(1), [1, 2, 3, 4], context("s")) == []

    daemon.set()

    engine.store(keys_of(1), [1, 2, 3, 4])


def test_a_daemon_that_went_is_a_miss(engines: Engines, host: MemoryHost) -> None:
    """
    What is mapped could still be read; but a worker that reconnects just then could not open it.
    """
    engine = engines()
    engine.store(keys_of(1), [1, 2, 3, 4])
    host.stop()
    assert engine.look(keys_of(1)[0]) is LookupResult.MISS
    assert engine.offer(keys_of(2, seed=5), list(range(1, 9)), context("s")) == []
