# SPDX-License-Identifier: Apache-2.0
"""
What the tests of the spec without an engine work with: both of its halves, real tensors, a pool.

A plugin of pytest, for the environment that has vLLM.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    GPULoadStoreSpec,
    LookupResult,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.worker.utils import allocate_kv_cache

from cenote.client.adapters.vllm import attach
from cenote.client.adapters.vllm.offloading import CenoteOffloadingSpec
from cenote.client.testing import MemoryHost

BLOCK: Final = 32  # tokens
BLOCKS: Final = 40
CHUNK: Final = 4  # blocks
WINDOW: Final = 64
NO_STEP: Final = ScheduleEndContext((), ())


class Layer:
    """What the spec asks of an attention layer."""

    isa = "test"

    def __init__(self, tensor: Any) -> None:
        self.kv_cache = tensor

    def get_attn_backend(self) -> Any:
        return SimpleNamespace(get_name=lambda: "TEST")


def wait_until(true: Callable[[], object]) -> None:
    """Look again and again, for what another thread brings about."""
    pause = threading.Event()
    while not true():
        pause.wait(0.002)


def cache_config(*, windows: bool = False) -> Any:
    """One group of two layers, or another with a window over the same memory, as vLLM does it."""
    kind = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16}
    full = FullAttentionSpec(**kind)
    groups = [KVCacheGroupSpec(["layer.0", "layer.1"], full)]
    names = [["layer.0", "layer.1"]]
    if windows:
        window = SlidingWindowSpec(sliding_window=WINDOW, **kind)
        groups.append(KVCacheGroupSpec(["layer.2", "layer.3"], window))
        names.append(["layer.2", "layer.3"])
    page = full.page_size_bytes
    tensors = [
        KVCacheTensor(
            size=2 * BLOCKS * page, layers=layers, layer_stride=BLOCKS * page, block_stride=page
        )
        for layers in names
    ]
    return KVCacheConfig(
        num_blocks=BLOCKS,
        kv_cache_tensors=tensors,
        kv_cache_groups=groups,
        kv_cache_layout="LBHNC",
    )


def vllm_config(layers: dict[str, Any]) -> Any:
    """What is read of a VllmConfig."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model="m",
            hf_config=SimpleNamespace(to_dict=lambda: {"hidden_size": 64}),
            dtype=torch.bfloat16,
            revision=None,
            quantization=None,
            runner_type="generate",
        ),
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_caching_hash_algo="sha256"),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1, pipeline_parallel_size=1, decode_context_parallel_size=1
        ),
        load_config=SimpleNamespace(load_format="dummy"),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )


def offloading_config(**extra: Any) -> Any:
    """What vLLM gives a spec."""
    count = 1 + bool(extra.pop("windows", False))
    names = [("layer.0", "layer.1"), ("layer.2", "layer.3")][:count]
    return OffloadingConfig(
        groups=tuple(OffloadingGroupConfig(BLOCK, layers, i) for i, layers in enumerate(names)),
        worker_kv_bytes_per_block=0,
        enable_kv_cache_events=bool(extra.pop("events", False)),
        extra_config={"chunk_tokens": CHUNK * BLOCK, "spec_name": "CenoteOffloadingSpec", **extra},
        engine_id=str(uuid.uuid4()),
        model=OffloadingModelConfig("m", "bfloat16"),
        cache=OffloadingCacheConfig(tokens_per_hash=BLOCK, blocks_per_chunk=1),
        parallel=OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
        kv_cache_layout="LBHNC",
    )


class Engine:
    """Both halves of the spec in one process, and the tensors that they copy from and to."""

    def __init__(self, *, windows: bool = False, **extra: Any) -> None:
        self.cache_config = cache_config(windows=windows)
        self.tensors = allocate_kv_cache(
            self.cache_config, torch.device("cpu"), KVCacheLayout.LBHNC
        )
        self.layers = {name: Layer(tensor) for name, tensor in self.tensors.items()}
        self.vllm_config = vllm_config(self.layers)
        given = next(iter(self.tensors.values()))
        canonical = CanonicalKVCaches([CanonicalKVCacheTensor(given, 0)], [])
        config = offloading_config(windows=windows, **extra)
        spec = CenoteOffloadingSpec(config)
        self.worker = spec.worker_of(self.vllm_config, self.cache_config, canonical)
        self.manager: Any = CenoteOffloadingSpec(config).get_manager()
        self.jobs = 0

    def pages(self, blocks: Sequence[int], group: int = 0) -> Any:
        """The bytes of some blocks, of all layers of a group."""
        names = self.cache_config.kv_cache_groups[group].layer_names
        return torch.stack([self.tensors[name][list(blocks)].clone() for name in names])

    def compute(self, blocks: Sequence[int], seed: int, group: int = 0) -> None:
        """Fill blocks with what a model would."""
        noise = torch.Generator().manual_seed(seed)
        for name in self.cache_config.kv_cache_groups[group].layer_names:
            shape = self.tensors[name][list(blocks)].shape
            self.tensors[name][list(blocks)] = torch.rand(shape, generator=noise).bfloat16()

    def offer(
        self, keys: Sequence[Any], blocks: Sequence[int], request: ReqContext, **spec: Any
    ) -> Any:
        """Have chunks stored that the manager wants; returns those."""
        for place, key in enumerate(keys):
            request.set_offload_key_position(key, (place + 1) * CHUNK * BLOCK)
        output = self.manager.prepare_store(keys, request)
        if output.keys_to_store:
            source = gpu(blocks, **spec)
            assert self.run(lambda job: self.worker.submit_store(job, source, output.store_spec))
            self.manager.complete_store(set(output.keys_to_store), request)
        return output.keys_to_store

    def store(self, keys: Sequence[Any], blocks: Sequence[int], name: str = "store") -> None:
        """Store chunks, until they are there: nobody waits for room, and a pool makes it late."""
        wait_until(lambda: self.manager.ready)
        while any(self.look(key) is LookupResult.MISS for key in keys):
            self.offer(keys, blocks, context(name))
        wait_until(lambda: all(self.look(key) is LookupResult.HIT for key in keys))

    def look(self, key: Any, name: str = "look") -> Any:
        """Look a chunk up in a step of its own."""
        found = self.manager.lookup(key, context(name))
        self.manager.on_schedule_end(NO_STEP)
        return found

    def run(self, submit: Callable[[int], bool]) -> bool:
        """Do one job of the worker; returns what it reports."""
        self.jobs += 1
        assert submit(self.jobs)
        self.worker.wait({self.jobs})
        (result,) = self.worker.get_finished()
        assert result.job_id == self.jobs
        return bool(result.success)

    def promise(self, keys: Sequence[Any], request: ReqContext) -> Any:
        """Look chunks up and plan their load, as one step does."""
        assert [self.manager.lookup(key, request) for key in keys] == [LookupResult.HIT] * len(keys)
        spec = self.manager.prepare_load(keys, request)
        self.manager.on_schedule_end(NO_STEP)
        return spec

    @property
    def lookup(self) -> Any:
        """The manager's namespaces, once they are open."""
        wait_until(lambda: self.manager.ready)
        return self.manager._lookup

    @property
    def leases(self) -> int:
        """What both halves hold in the pool."""
        pools = [self.manager._attachment.pool, self.worker._attachment.pool]
        return sum(pool.leases for pool in pools if pool is not None)

    def close(self) -> None:
        self.worker.shutdown()
        self.manager.shutdown()


def gpu(blocks: Sequence[int], first: int = 0, sizes: Sequence[int] | None = None) -> Any:
    """vLLM's list of blocks; of one group if nothing else is said."""
    sizes = sizes or [len(blocks)]
    return GPULoadStoreSpec(list(blocks), group_sizes=sizes, block_indices=[first] * len(sizes))


def context(name: str, **params: Any) -> ReqContext:
    return ReqContext(name, kv_transfer_params=params or None)


def keys_of(count: int, seed: int = 0, group: int = 0) -> list[Any]:
    """Keys of a prompt's first chunks."""
    hashed = [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(count)]
    return [make_offload_key(each, group) for each in hashed]


@pytest.fixture
def host() -> Iterator[MemoryHost]:
    with MemoryHost("64MiB", checksum="commit") as host:
        yield host


@pytest.fixture
def engines(host: MemoryHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """Make engines that are attached to the host's pool."""
    from vllm.distributed import parallel_state

    alone = SimpleNamespace(rank_in_group=0)
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: alone)
    monkeypatch.setattr(parallel_state, "get_pp_group", lambda: alone)
    monkeypatch.setattr(attach, "connect", lambda *_args, **_kwargs: host.connect())
    made: list[Engine] = []

    def make(**extra: Any) -> Engine:
        made.append(Engine(**extra))
        return made[-1]

    yield make
    for engine in made:
        engine.close()
