# SPDX-License-Identifier: Apache-2.0
"""
What the offloading spec stores and announces, and how long a chunk is, without an engine.

test_offloading.py runs this file under the vLLM environment's Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.spec_bed import (
    BLOCK,
    CHUNK,
    Engine,
    context,
    keys_of,
    offloading_config,
    wait_until,
)
from vllm.v1.kv_offload.base import CanonicalKVCaches, CanonicalKVCacheTensor
from vllm.v1.kv_offload.config import OffloadingGroupConfig

from cenote.client.adapters.vllm.offloading import CenoteOffloadingSpec, with_chunks
from cenote.client.adapters.vllm.settings import Settings
from cenote.client.testing import MemoryHost

Engines = Callable[..., Engine]


# ---- what is stored -----------------------------------------------------------------------------


def test_what_is_there_or_on_its_way_is_not_stored_again(engines: Engines) -> None:
    """
    Only chunks that the pool has not, and each by one job at a time.
    """
    engine = engines()
    engine.store(keys_of(1), [1, 2, 3, 4])

    first = engine.manager.prepare_store(keys_of(2), context("a"))
    again = engine.manager.prepare_store(keys_of(2), context("b"))

    assert first.keys_to_store == keys_of(2)[1:]
    assert (again.keys_to_store, again.evicted_keys) == ([], [])


def test_chunks_know_their_place_in_the_prompt(engines: Engines) -> None:
    """
    Position and parent, from what vLLM notes of a request: the pool evicts the end of a prompt
    before its beginning.
    """
    engine, request = engines(), context("r", **{"cenote.priority": 3, "cenote.ttl_s": 60})
    wait_until(lambda: engine.manager.ready)
    engine.manager.on_new_request(request)
    for place, key in enumerate(keys_of(3)):
        request.set_offload_key_position(key, (place + 1) * CHUNK * BLOCK)

    spec = engine.manager.prepare_store(keys_of(3)[1:], request).store_spec

    assert [chunk.position for chunk in spec.chunks] == [1, 2]
    assert [chunk.parent for chunk in spec.chunks] == [key[:-4] for key in keys_of(3)[:2]]
    assert (spec.priority, spec.ttl_s) == (3, 60)


def test_skip_save_stores_nothing_of_a_request(engines: Engines) -> None:
    """
    The wishes of a request are the connector's.
    """
    engine, request = engines(), context("r", **{"cenote.skip_save": True})
    wait_until(lambda: engine.manager.ready)
    engine.manager.on_new_request(request)
    assert engine.manager.prepare_store(keys_of(1), request).keys_to_store == []


def test_save_none_and_save_reused(engines: Engines) -> None:
    """
    Nothing, and what another request has computed before.
    """
    none, reused = engines(save="none"), engines(save="reused")
    for engine in (none, reused):
        wait_until(lambda engine=engine: engine.manager.ready)  # type: ignore[misc]

    assert none.manager.prepare_store(keys_of(1), context("a")).keys_to_store == []
    offered = [
        reused.manager.prepare_store(keys_of(1), context(name)).keys_to_store for name in "aab"
    ]
    assert offered == [[], [], keys_of(1)]


def test_events_say_what_is_there_and_what_went(engines: Engines, host: MemoryHost) -> None:
    """
    A chunk is announced once it can be seen, and withdrawn when the pool says that it went.
    """
    engine = engines(events=True)
    said: list[Any] = []

    def heard() -> list[Any]:
        said.extend(engine.manager.take_events())
        return said

    engine.store(keys_of(1), [1, 2, 3, 4])
    wait_until(heard)
    assert [(event.keys, event.removed) for event in said] == [(keys_of(1), False)]

    said.clear()
    (cache,) = engine.lookup.caches(0)
    cache.delete(keys_of(1)[0][:-4])

    wait_until(heard)
    assert [(event.keys, event.removed) for event in said] == [(keys_of(1), True)]


# ---- how long a chunk is ------------------------------------------------------------------------


def test_a_chunk_is_the_connectors_where_the_operator_says_nothing() -> None:
    """
    256 tokens, and a window is counted in such chunks.
    """
    config = offloading_config()
    del config.extra_config["chunk_tokens"]

    assert with_chunks(config, Settings()).cache.blocks_per_chunk == 256 // BLOCK
    if hasattr(config.groups[0], "sliding_window_size_in_chunks"):
        one = OffloadingGroupConfig(BLOCK, (), 0, sliding_window_size_in_chunks=9)
        object.__setattr__(config, "groups", (one,))
        (group,) = with_chunks(config, Settings()).groups
        assert group.sliding_window_size_in_chunks == 2


def test_the_stock_connectors_own_length_is_kept() -> None:
    """
    block_size and blocks_per_chunk say it, too; two that say it are an error.
    """
    config = offloading_config(blocks_per_chunk=1)
    with pytest.raises(ValueError, match="give one"):
        CenoteOffloadingSpec(config)
    del config.extra_config["chunk_tokens"]
    assert CenoteOffloadingSpec(config).blocks_per_chunk == 1


@pytest.mark.parametrize("setting", ["transfer", "min_load_tokens", "canonical_layout"])
def test_what_means_nothing_here_is_an_error(setting: str) -> None:
    """
    The stock connector decides how and when: what says otherwise is refused by name.
    """
    with pytest.raises(ValueError, match=f"'{setting}'.*chunk_tokens"):
        CenoteOffloadingSpec(offloading_config(**{setting: "layers"}))


def test_answers_are_stored_unless_somebody_says_no() -> None:
    """
    save = "all" is all, as with CenoteConnector; vLLM's own default is prompts.
    """
    assert not CenoteOffloadingSpec(offloading_config()).offload_prompt_only
    assert CenoteOffloadingSpec(offloading_config(offload_prompt_only=True)).offload_prompt_only


def test_blocks_of_several_lengths_are_refused() -> None:
    """
    A chunk has the same tokens in every group.
    """
    config = offloading_config()
    groups = (OffloadingGroupConfig(16, (), 0), OffloadingGroupConfig(32, (), 1))
    object.__setattr__(config, "groups", groups)
    with pytest.raises(ValueError, match="16, 32"):
        CenoteOffloadingSpec(config)


def test_a_layer_that_does_not_say_where_its_cache_is_is_refused(engines: Engines) -> None:
    """
    Bytes of unknown origin are never stored.
    """
    engine = engines()
    engine.layers["layer.1"].kv_cache = torch.zeros(4)
    spec = CenoteOffloadingSpec(offloading_config())
    given = CanonicalKVCaches([CanonicalKVCacheTensor(engine.tensors["layer.0"], 0)], [])
    with pytest.raises(ValueError, match=r"layer\.1"):
        spec.worker_of(engine.vllm_config, engine.cache_config, given)
