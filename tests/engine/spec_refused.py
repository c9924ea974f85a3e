# SPDX-License-Identifier: Apache-2.0
"""
Engines that must not share, by way of CenoteConnector or of CenoteOffloadingSpec: both refuse the
same ones. test_offloading.py runs this file under the vLLM environment's Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.engine.spec_bed import (
    BLOCK,
    CHUNK,
    Engine,
    cache_config,
    offloading_config,
    vllm_config,
)
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, KVCacheGroupSpec, MambaSpec
from vllm.v1.kv_offload.base import CanonicalKVCaches

from cenote.client.adapters.vllm.connector import shape_of
from cenote.client.adapters.vllm.identity import Refused, shared_groups
from cenote.client.adapters.vllm.offloading import CenoteOffloadingSpec
from cenote.client.adapters.vllm.settings import Settings

Engines = Callable[..., Engine]
KIND = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16, "block_size": BLOCK}


def by_connector(config: Any, cache: Any) -> None:
    """What CenoteConnector does first, in either process."""
    shape_of(config, cache, Settings(chunk_tokens=CHUNK * BLOCK))


def by_spec(config: Any, cache: Any) -> None:
    """What the stock connector has a worker do with our spec when the KV cache is there."""
    windows = len(cache.kv_cache_groups) > 1
    spec = CenoteOffloadingSpec(offloading_config(windows=windows))
    spec.worker_of(config, cache, CanonicalKVCaches([], []))


both = pytest.mark.parametrize("refuse", [by_connector, by_spec])


def of_kind(spec: Any, **more: Any) -> Any:
    """A KV cache whose only group is of this kind."""
    group = KVCacheGroupSpec(["layer.0", "layer.1"], spec, **more)
    return dataclasses.replace(cache_config(), kv_cache_groups=[group])


@both
@pytest.mark.parametrize(
    ("place", "changes", "why"),
    [
        ("parallel_config", {"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        (
            "parallel_config",
            {"distributed_executor_backend": "external_launcher", "world_size": 2},
            "external_launcher",
        ),
        ("model_config", {"runner_type": "pooling"}, "pooling model"),
    ],
)
def test_an_engine_that_would_get_wrong_tokens_or_none(
    refuse: Any, place: str, changes: dict[str, Any], why: str
) -> None:
    """
    With the reason, before anything is copied.
    """
    config = vllm_config({})
    vars(getattr(config, place)).update(changes)

    with pytest.raises(Refused, match=why):
        refuse(config, cache_config())


@both
def test_a_draft_head_over_windows(refuse: Any) -> None:
    """
    Which pages of a window it computes again is not known; over full attention it is.
    """
    config = vllm_config({})
    config.speculative_config = SimpleNamespace(method="eagle", draft_model_config=None)

    with pytest.raises(Refused, match="sliding window"):
        refuse(config, cache_config(windows=True))


@both
@pytest.mark.parametrize(
    "spec",
    [
        ChunkedLocalAttentionSpec(attention_chunk_size=64, **KIND),
        MambaSpec(block_size=BLOCK, shapes=((2, 8),), dtypes=(torch.float32,)),
    ],
)
def test_a_layer_whose_state_is_no_sum_of_pages(refuse: Any, spec: Any) -> None:
    """
    No chunk of it can be stored.
    """
    with pytest.raises(Refused, match="is of kind"):
        refuse(vllm_config({}), of_kind(spec))


@both
def test_a_group_that_is_not_to_be_transferred(refuse: Any) -> None:
    """
    What the engine keeps to itself is not shared.
    """
    (group,) = cache_config().kv_cache_groups
    with pytest.raises(Refused, match="keeps group 0 out"):
        refuse(vllm_config({}), of_kind(group.kv_cache_spec, enable_kv_transfer=False))


def test_others_are_served(engines: Engines) -> None:
    """
    The configuration that the cases above begin with is refused by neither.
    """
    engine = engines(windows=True)
    assert len(shared_groups(engine.vllm_config, engine.cache_config)) == 2
