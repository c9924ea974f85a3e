# SPDX-License-Identifier: Apache-2.0
"""
What our classes for vLLM assume of it, checked against the release that this Python imports.

Run by test_compatibility.py in vLLM's environment; prints one JSON list of what does not fit.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Iterator
from typing import Any, Final

V1: Final = "vllm.distributed.kv_transfer.kv_connector.v1"
OURS: Final = "cenote.client.adapters.vllm"

# our class: the classes of vLLM that it derives from
CLASSES: Final = {
    f"{OURS}.connector:CenoteConnector": (
        f"{V1}.base:KVConnectorBase_V1",
        f"{V1}.base:SupportsHMA",
    ),
    f"{OURS}.metrics:ConnectorStats": (f"{V1}.metrics:KVConnectorStats",),
    f"{OURS}.metrics:PromMetrics": (f"{V1}.metrics:KVConnectorPromMetrics",),
    f"{OURS}.offloading:CenoteOffloadingSpec": ("vllm.v1.kv_offload.base:OffloadingSpec",),
    f"{OURS}.offload_manager:Manager": ("vllm.v1.kv_offload.base:OffloadingManager",),
    f"{OURS}.offload_worker:Worker": ("vllm.v1.kv_offload.base:OffloadingWorker",),
}

# hooks of the connector that are left as vLLM has them, and why. One that is in neither is new.
LEFT: Final = {
    "role": "vLLM's own",
    "has_connector_metadata": "vLLM's own",
    "clear_connector_metadata": "what it clears is all that there is",
    "supports_divergent_local_hybrid_hits": "for recurrent states, which are refused",
    "supports_sleep_mode": "true: unregister_kv_caches and restore_kv_caches follow it",
    "get_mem_pool_context": "the engine's KV cache lies where vLLM wants it",
    "set_host_xfer_buffer_ops": "for devices that neither CPU nor CUDA are",
    "finish_forward": "nothing is read of a forward pass after it",
    "reset_capture_state": "no state is made while graphs are captured",
    "get_finished": "get_transfer_results says it",
    "get_kv_connector_kv_cache_events": "the scheduler's half announces, once for all ranks",
    "bind_kv_cache_manager": "calls bind_gpu_block_pool",
    "get_loaded_kv_cache_group_ids": "those that are prefix-cacheable: all, or it is refused",
    "get_external_cache_hit_sources": "all from the host's memory: _cache_hit_source",
    "on_new_request": "a request is looked at when it is scheduled",
    "register_finished_partial_tail": "chunks are whole",
    "get_required_kvcache_layout": "any",
    "get_finished_count": "all workers",
    "set_xfer_handshake_metadata": "the one that knows of pipeline ranks is overridden",
}

# fields of vLLM's structures that are read
FIELDS: Final = {
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens total_num_scheduled_tokens "
        "kv_connector_block_state"
    ),
    "vllm.v1.core.sched.output:NewRequestData": "req_id num_computed_tokens",
    "vllm.v1.core.sched.output:CachedRequestData": "req_ids num_computed_tokens",
    "vllm.v1.kv_cache_interface:KVCacheConfig": (
        "num_blocks kv_cache_tensors kv_cache_groups kv_cache_layout hash_block_size kv_tp_replicas"
    ),
    "vllm.v1.kv_cache_interface:KVCacheTensor": "layers layer_stride block_stride offset",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "layer_names kv_cache_spec enable_kv_transfer",
    "vllm.v1.outputs:KVConnectorOutput": "finished_recving kv_connector_worker_meta",
    f"{V1}.base:KVConnectorTransferResults": "finished_recving failed_recving",
    "vllm.distributed.kv_events:BlockStored": (
        "block_hashes parent_block_hash token_ids block_size lora_id medium lora_name extra_keys"
    ),
    "vllm.distributed.kv_events:BlockRemoved": "block_hashes medium",
}
METHODS: Final = {
    "vllm.v1.core.block_pool:BlockPool": "touch free_blocks",
    "vllm.v1.core.sched.output:KVConnectorBlockState": "get_block_ids",
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks": "get_block_ids",
}
# set in a constructor: looked for in its source
ATTRIBUTES: Final = {
    "vllm.v1.request:Request": (
        "request_id block_hashes kv_transfer_params skip_reading_prefix_cache lora_request"
    ),
    "vllm.v1.core.block_pool:BlockPool": "blocks",
}


def found(name: str) -> Any:
    """Import module:Class."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def classes() -> Iterator[str]:
    """Is nothing abstract left, does every override take what the base takes?"""
    for name, bases in CLASSES.items():
        ours = found(name)
        if left := getattr(ours, "__abstractmethods__", None):
            yield f"{name}: abstract: {sorted(left)}"
        for base in map(found, bases):
            for method in vars(base):
                mine = inspect.getattr_static(ours, method, None)
                theirs = inspect.getattr_static(base, method)
                if method.startswith("__") or mine is theirs:
                    continue
                if inspect.isfunction(theirs) and inspect.isfunction(mine):
                    yield from takes_all(f"{name}.{method}", theirs, mine)


def takes_all(name: str, theirs: Any, mine: Any) -> Iterator[str]:
    """Can everything be passed to *mine* that *theirs* takes, by name and by place?"""
    wanted = list(inspect.signature(theirs).parameters.values())
    given = inspect.signature(mine).parameters
    rest = any(p.kind is p.VAR_KEYWORD for p in given.values())
    for place, parameter in enumerate(wanted):
        if parameter.kind in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}:
            continue
        if parameter.name not in given and not rest:
            yield f"{name}: does not take {parameter.name!r}"
        elif parameter.name in given and list(given)[place] != parameter.name:
            yield f"{name}: has {parameter.name!r} in another place"
    for parameter in given.values():
        needed = parameter.default is parameter.empty and parameter.kind not in {
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        }
        if needed and parameter.name not in {p.name for p in wanted}:
            yield f"{name}: wants {parameter.name!r}, which nobody passes"


def hooks() -> Iterator[str]:
    """Is every public hook of a connector overridden, or left for a reason?"""
    ours = found(f"{OURS}.connector:CenoteConnector")
    base = found(f"{V1}.base:KVConnectorBase_V1")
    for name in vars(base):
        if not name.startswith("_") and name not in vars(ours) and name not in LEFT:
            yield f"KVConnectorBase_V1.{name} is new: override it, or say in LEFT why not"


def structures() -> Iterator[str]:
    """Has vLLM what is read of it?"""
    for name, wanted in FIELDS.items():
        where = found(name)
        known = getattr(where, "__struct_fields__", None)
        if known is None:
            known = [field.name for field in dataclasses.fields(where)]
        yield from (f"{name} has no {field}" for field in wanted.split() if field not in known)
    for name, wanted in METHODS.items():
        where = found(name)
        yield from (f"{name} has no {m}()" for m in wanted.split() if not hasattr(where, m))
    for name, wanted in ATTRIBUTES.items():
        source = inspect.getsource(found(name).__init__)
        for attribute in wanted.split():
            if f"self.{attribute}" not in source:
                yield f"{name} has no {attribute}"


def main() -> None:
    """Print what does not fit, and which release it was."""
    import vllm

    wrong = [*classes(), *hooks(), *structures()]
    print(json.dumps({"release": vllm.__version__, "wrong": wrong}))


if __name__ == "__main__":
    main()
