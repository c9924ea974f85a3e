# SPDX-License-Identifier: Apache-2.0
"""
CenoteOffloadingSpec: the pool behind vLLM's stock OffloadingConnector.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "OffloadingConnector",
        "kv_role": "kv_both", "kv_connector_extra_config": {"spec_name": "CenoteOffloadingSpec",
        "spec_module_path": "cenote.client.adapters.vllm"}}'

It shares chunks with CenoteConnector where chunk_tokens and the layout of the KV cache are the
same. Prefer CenoteConnector: here a load that fails ends the engine. docs/engines.md has the rest.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Final

from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig

from .attach import Attachment
from .groups import Group, Shape
from .identity import Refused, engine_fields, era_of, shared_groups
from .memory import Memory
from .offload_manager import Manager
from .offload_worker import Worker
from .settings import LOGGER, NOT_OFFLOADING, OFFLOADING_KEYS, Settings

log = logging.getLogger(LOGGER)


class CenoteOffloadingSpec(OffloadingSpec):
    """
    One spec for both processes: get_manager() in the scheduler's, get_worker() in each worker's.

    Raises:
        ValueError: `kv_connector_extra_config` is wrong, or the model's KV cache cannot be shared.
    """

    def __init__(self, config: OffloadingConfig) -> None:
        self._settings: Final = Settings.parse(
            config.extra_config, OFFLOADING_KEYS, without=NOT_OFFLOADING
        )
        super().__init__(with_chunks(config, self._settings))
        # save = "all" is all: as in CenoteConnector, answers too.
        self.offload_prompt_only = bool(self.extra_config.get("offload_prompt_only", False))
        self._chunk_tokens: Final = self.tokens_per_block[0] * self.blocks_per_chunk
        self._manager: Manager | None = None
        self._worker: Worker | None = None

    def get_manager(self) -> OffloadingManager:
        """Return the scheduler's half."""
        if self._manager is None:
            groups = [
                Group(i, group.tokens_per_block, 0, tuple(group.layer_names))
                for i, group in enumerate(self.config.groups)
            ]
            self._manager = Manager(
                self._settings,
                Shape.of(groups, self.tokens_per_hash, self._chunk_tokens),
                engine_id=self.config.engine_id,
                workers=self.config.parallel.world_size,
                announcing=self.kv_events_config.enable_kv_cache_events,
            )
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """
        Return a worker's half.

        Raises:
            ValueError: The model's KV cache cannot be shared, or vLLM does not say what it is.
        """
        if self._worker is None:
            vllm_config, cache_config = _engine()
            self._worker = self.worker_of(vllm_config, cache_config, kv_caches)
        return self._worker

    def worker_of(
        self, vllm_config: Any, cache_config: Any, kv_caches: CanonicalKVCaches
    ) -> Worker:
        """
        Return a worker's half of an engine.

        Args:
            vllm_config: The engine's VllmConfig.
            cache_config: Its KVCacheConfig.
            kv_caches: The memory that the connector was given.

        Raises:
            ValueError: As for get_worker().
        """
        groups = shared_groups(vllm_config, cache_config)
        shape = Shape.of(groups, self.tokens_per_hash, self._chunk_tokens)
        layers = vllm_config.compilation_config.static_forward_context
        tensors = layer_tensors(shape, layers, kv_caches)
        copiers: list[Memory] = []
        attachment = Attachment(
            self._settings.socket,
            "vllm worker",
            lambda pool: copiers[0].copier.attached(pool) if copiers else None,
        )
        memory = Memory(
            cache_config,
            tensors,
            layers,
            shape=shape,
            common=engine_fields(vllm_config),
            attachment=attachment,
        )
        copiers.append(memory)
        attachment.start()
        return Worker(
            memory,
            attachment,
            era_of(vllm_config),
            engine_id=self.config.engine_id,
            rank=self.config.parallel.rank,
        )


def with_chunks(config: OffloadingConfig, settings: Settings) -> OffloadingConfig:
    """
    Return the configuration with chunks of cenote's length, where the operator said none.

    The stock connector's default is one block; CenoteConnector's is what has 256 tokens.

    Raises:
        ValueError: Two lengths are given, one that does not fit, or the groups' blocks differ.
    """
    lengths = {group.tokens_per_block for group in config.groups}
    if len(lengths) > 1:
        raise Refused(
            f"this model's KV cache groups have blocks of {', '.join(map(str, sorted(lengths)))} "
            "tokens, and a chunk of cenote has the same tokens in all of them: serve with "
            "CenoteConnector"
        )
    theirs = [key for key in ("block_size", "blocks_per_chunk") if key in config.extra_config]
    if theirs and settings.chunk_tokens is not None:
        raise ValueError(f"chunk_tokens and {theirs[0]} both say how long a chunk is: give one")
    if theirs:
        return config
    (tokens,) = lengths
    groups = [Group(i, tokens, 0, ()) for i in range(len(config.groups))]
    shape = Shape.of(groups, config.cache.tokens_per_hash, settings.chunk_tokens)
    blocks = shape.chunk_tokens // tokens
    cache = dataclasses.replace(config.cache, blocks_per_chunk=blocks)
    longer = tuple(_with_window(group, blocks) for group in config.groups)
    return dataclasses.replace(config, cache=cache, groups=longer)


def _with_window(group: Any, blocks: int) -> Any:
    """Count a window in chunks of so many blocks; vLLM 0.33 counted it in those of one."""
    window = getattr(group, "sliding_window_size_in_chunks", None)
    if window is None:
        return group
    return dataclasses.replace(group, sliding_window_size_in_chunks=-(-window // blocks))


def layer_tensors(
    shape: Shape, layers: Mapping[str, Any], kv_caches: CanonicalKVCaches
) -> dict[str, Any]:
    """
    Return the KV cache tensor of each layer, as the layer has it.

    A spec is given the memory, and not which layer's it is.

    Raises:
        ValueError: A layer has none, or none in the memory that the connector was given.
    """
    given = {each.tensor.untyped_storage().data_ptr() for each in kv_caches.tensors}
    found = {}
    for name in (name for group in shape.groups for name in group.layers):
        tensor = getattr(layers.get(name), "kv_cache", None)
        storage = getattr(tensor, "untyped_storage", None)
        if storage is None or storage().data_ptr() not in given:
            raise Refused(
                f"layer {name!r} does not say where its KV cache is: cenote cannot share it by "
                "way of vLLM's OffloadingConnector. Serve with CenoteConnector"
            )
        found[name] = tensor
    return found


def _engine() -> tuple[Any, Any]:
    """
    Return the configurations of the engine that this process is a worker of.

    A spec is not given them; the connector, which has both, is set up before its spec's worker is.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    connector = get_kv_transfer_group() if has_kv_transfer_group() else None
    found = (getattr(connector, "_vllm_config", None), getattr(connector, "_kv_cache_config", None))
    if None in found:
        raise Refused(
            "vLLM does not say what this worker's KV cache is: this release is not supported, see "
            "docs/engines.md; serve with CenoteConnector"
        )
    return found
