# SPDX-License-Identifier: Apache-2.0
"""
What the bytes of an engine's chunks depend on: the manifest of each of its namespaces (I8).

Whatever may change a byte or its meaning is a field. A field too many costs a miss; one too few
would cost wrong tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from cenote.client import Manifest

from .groups import Group
from .messages import Era, Fields
from .pages import ChunkLayout
from .settings import LOGGER

if TYPE_CHECKING:
    from cenote.client.manifest import Value

log = logging.getLogger(LOGGER)

FORMAT: Final = "pages-1"  # of a chunk's bytes: see pages.py
SAMPLE_BYTES: Final = 1 << 12  # of each tensor, or piece, of a weights file
SAMPLES: Final = 1024  # pieces of a file whose tensors are not known
HEADER_MAX_BYTES: Final = 100 << 20  # of safetensors
WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.tensors")
# What says where a configuration came from, and not what it is.
NOT_IDENTITY: Final = ("_name_or_path", "transformers_version", "_commit_hash", "architectures")


class Refused(ValueError):
    """A model whose KV cache cenote cannot share; says why, and what to do."""


def digest(value: Any) -> str:
    """Return 16 bytes of SHA-256, in hex, over the JSON of a value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# ---- groups -------------------------------------------------------------------------------------


def groups_of(config: Any, context_ranks: int, tensor_ranks: int = 1) -> list[Group]:
    """
    Read vLLM's KVCacheConfig.

    Args:
        config: It.
        context_ranks: Ranks that share a sequence's KV (decode context parallelism).
        tensor_ranks: Ranks that share the model's heads.

    Raises:
        Refused: A group's state cannot be taken apart by tokens, or is not a model's layer's.
    """
    from vllm.v1.core.kv_cache_utils import resolve_dcp_kv_block_size
    from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind, get_kv_cache_spec_sliding_window

    # vLLM knows whether all tensor-parallel ranks hold the same: MLA does, unless its context is
    # spread over the ranks.
    replicated = tensor_ranks > 1 and getattr(config, "kv_tp_replicas", 1) == tensor_ranks
    groups = []
    for index, group in enumerate(config.kv_cache_groups):
        spec = group.kv_cache_spec
        kind = str(get_kv_cache_spec_kind(spec).value)
        if kind not in {"full_attention", "mla_attention", "sliding_window", "sliding_window_mla"}:
            raise Refused(
                f"cenote cannot share this model's KV cache: group {index} (layers "
                f"{', '.join(group.layer_names[:2])} …) is of kind {kind}. Its state after a "
                "token is not the sum of pages that tokens wrote, so that no chunk of it can be "
                "stored. Serve the model without cenote; docs/engines.md lists the kinds"
            )
        if not getattr(group, "enable_kv_transfer", True) or not spec.prefix_cacheable:
            raise Refused(
                f"cenote cannot share this model's KV cache: the engine keeps group {index} out of "
                "its own prefix cache. Serve the model without cenote"
            )
        window = (get_kv_cache_spec_sliding_window(spec) or 0) if "sliding" in kind else 0
        groups.append(
            Group(
                index,
                resolve_dcp_kv_block_size(spec, context_ranks),
                window,
                tuple(group.layer_names),
                replicated=replicated,
            )
        )
    if not groups:
        raise Refused("this model has no KV cache: there is nothing to share")
    return groups


def shared_groups(vllm_config: Any, config: Any, *, in_step: bool = False) -> list[Group]:
    """
    Return the groups of an engine whose KV cache can be shared, by way of whichever connector.

    Args:
        vllm_config: The engine's.
        config: Its KVCacheConfig.
        in_step: Are loads to run within the step that needs them?

    Raises:
        Refused: It cannot; says why, and what to do.
    """
    check_engine(vllm_config, in_step=in_step)
    parallel = vllm_config.parallel_config
    groups = groups_of(config, parallel.decode_context_parallel_size, parallel.tensor_parallel_size)
    if vllm_config.speculative_config is not None and any(group.window for group in groups):
        raise Refused(
            "cenote does not know which pages of a sliding window a draft head computes again: "
            "serve without speculative decoding, or without cenote"
        )
    return groups


def page_bytes_of(config: Any, group: Group) -> dict[str, int]:
    """Return the bytes of a block of each of a group's layers."""
    spec = config.kv_cache_groups[group.index].kv_cache_spec
    by_layer = getattr(spec, "kv_cache_specs", None)
    return {
        layer: int((by_layer[layer] if by_layer else spec).page_size_bytes)
        for layer in group.layers
    }


def check_engine(vllm_config: Any, *, in_step: bool) -> None:
    """
    Refuse what would give wrong tokens, or none.

    Args:
        vllm_config: The engine's.
        in_step: Are loads to run within the step that needs them?

    Raises:
        Refused: Says what, and what to do.
    """
    parallel = vllm_config.parallel_config
    without = "or without cenote"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        raise Refused(
            "cenote does not know how prefill context parallelism spreads a prompt over ranks: "
            f"serve with prefill_context_parallel_size=1, {without}"
        )
    backend = getattr(parallel, "distributed_executor_backend", None)
    if backend == "external_launcher" and parallel.world_size > 1:
        raise Refused(
            "with external_launcher each rank has a scheduler of its own, and their hits could "
            f"differ: serve with another distributed_executor_backend, {without}"
        )
    if vllm_config.model_config.runner_type == "pooling":
        raise Refused(
            "a pooling model wants the hidden states of a whole prompt, which no KV cache holds: "
            "serve it without cenote"
        )
    if in_step and vllm_config.max_concurrent_batches > 1:
        raise Refused(
            "transfer is 'layers', and this engine plans a step before it knows how the last one "
            "went: what a failed load spoiled would be answered. Leave transfer out, or give "
            "--no-async-scheduling"
        )


# ---- fields -------------------------------------------------------------------------------------


def engine_fields(vllm_config: Any) -> Fields:
    """Return what all groups and ranks of an engine have in common."""
    import vllm

    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    text = model.hf_config.to_dict() if hasattr(model.hf_config, "to_dict") else {}
    known = {name: value for name, value in text.items() if name not in NOT_IDENTITY}
    place = Path(model.model)
    return {
        "model": place.name if place.is_dir() else str(model.model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_dtype": str(cache.cache_dtype),
        "revision": str(model.revision or getattr(model.hf_config, "_commit_hash", None) or ""),
        "weights": weights_digest(place, str(vllm_config.load_config.load_format)),
        "config": digest(known),
        "rope": digest({n: v for n, v in known.items() if "rope" in n or "position" in n}),
        "rope_for": _rope_for(model, known),
        "multimodal": _multimodal(model, cache),
        "quantization": str(model.quantization or ""),
        # Scales that an engine finds out as it runs are its own: nobody else can read its KV.
        "kv_scales": uuid.uuid4().hex if getattr(cache, "calculate_kv_scales", False) else "",
        "window_off": bool(getattr(model, "disable_sliding_window", False)),
        "speculative": _speculative(vllm_config),
        "engine": "vllm " + ".".join(vllm.__version__.split(".")[:2]),
        "tp_size": int(parallel.tensor_parallel_size),
        "pp_size": int(parallel.pipeline_parallel_size),
        "dcp_size": int(parallel.decode_context_parallel_size),
        "dcp_interleave": int(getattr(parallel, "cp_kv_cache_interleave_size", 1) or 1),
    }


def _rope_for(model: Any, known: Mapping[str, Any]) -> int:
    """LongRoPE turns by whether the engine may go beyond the original length; others do not."""
    text = json.dumps({n: v for n, v in known.items() if "rope" in n}, default=str)
    return int(model.max_model_len) if "longrope" in text or '"su"' in text else 0


def _multimodal(model: Any, cache: Any) -> str:
    """What the engine does to images beyond what their hashes in the request say."""
    config = getattr(model, "multimodal_config", None)
    if config is None:
        return ""
    if not getattr(config, "mm_processor_cache_gb", 1) and not cache.enable_prefix_caching:
        return uuid.uuid4().hex  # vLLM numbers images then, instead of hashing them
    told = ("mm_processor_kwargs", "media_io_kwargs", "video_pruning_rate")
    return digest([str(getattr(config, name, None)) for name in told])


def _speculative(vllm_config: Any) -> str:
    """A draft model's layers lie in the same cache."""
    spec = vllm_config.speculative_config
    if spec is None:
        return ""
    draft = getattr(spec, "draft_model_config", None)
    return digest([str(getattr(spec, "method", "")), str(getattr(draft, "model", ""))])


def weights_digest(place: Path, load_format: str) -> str:
    """
    Return what tells a model's weights from others of the same name.

    Name and size of every file, and samples: of each tensor of a safetensors file its beginning,
    of other files pieces spread over them. Reading all would take as long as loading the model. ""
    for a model that is no path: its name and revision say which weights it has.
    """
    if load_format == "dummy":
        return "dummy"
    if not place.exists():
        return ""
    files = [place] if place.is_file() else sorted(f for p in WEIGHTS for f in place.glob(p))
    if not files:
        return uuid.uuid4().hex  # of a format that is not known: shared with nobody
    seen = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        seen.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset in _samples(file, path, size):
                file.seek(offset)
                seen.update(file.read(SAMPLE_BYTES))
    return seen.hexdigest()[:32]


def _samples(file: BinaryIO, path: Path, size: int) -> list[int]:
    """Return where to look into a file of weights."""
    spread = [size * i // SAMPLES for i in range(SAMPLES)]
    if path.suffix != ".safetensors":
        return spread
    # https://github.com/huggingface/safetensors#format: length of the header, header, tensors
    length = int.from_bytes(file.read(8), "little")
    if length > min(size, HEADER_MAX_BYTES):
        return spread
    try:
        tensors = json.loads(file.read(length))
        return [
            0,
            *(
                8 + length + int(t["data_offsets"][0])
                for t in tensors.values()
                if "data_offsets" in t
            ),
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        return spread


def group_fields(
    config: Any, group: Group, layout: ChunkLayout, kv_caches: Mapping[str, Any], layers: Any
) -> Fields:
    """
    Return what a group's bytes depend on in this worker.

    Args:
        config: vLLM's KVCacheConfig.
        group: The group.
        layout: Its chunks.
        kv_caches: The engine's tensor of each layer.
        layers: The engine's attention layers by name (static_forward_context).

    Raises:
        Refused: CPU attention does not say how it packs keys.
    """
    backend = ",".join(sorted({_backend(layers.get(name)) for name in group.layers}))
    isa = ",".join(sorted({_isa(layers.get(name)) for name in group.layers}))
    if "CPU_ATTN" in backend and not isa:
        raise Refused(
            "cenote cannot tell how this release of vLLM packs the KV cache on CPUs: its attention "
            "layers have no `isa`. Serve without cenote; docs/engines.md has the releases"
        )
    return {
        "layout": f"{FORMAT} {config.kv_cache_layout or 'as the tensors say'}",
        "group": group.index,
        "window": group.window,
        "block_tokens": group.block_tokens,
        "page_bytes": layout.nbytes // layout.blocks,
        "pages": digest([[run.layers, run.nbytes] for run in layout.runs]),
        "tensors": digest([_tensor(kv_caches[layer]) for layer in group.layers]),
        "backend": backend,
        # CPU attention packs keys for the instruction set that it found (vec, amx, neon …).
        "isa": isa,
    }


def _tensor(tensor: Any) -> list[Any]:
    """
    Shape and strides within a block, and the element's type.

    Without axes of one element: an MLA layer holds the engine's tensor without its axis of heads,
    and the stride of such an axis moves no byte.
    """
    inner = zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    axes = [(size, stride) for size, stride in inner if size != 1]
    return [[size for size, _ in axes], [stride for _, stride in axes], str(tensor.dtype)]


def _backend(layer: Any) -> str:
    return str(layer.get_attn_backend().get_name()) if layer is not None else "unknown"


def _isa(layer: Any) -> str:
    return str(getattr(layer, "isa", ""))


def rank_fields(group: Group) -> Fields:
    """Return which share of the model this worker holds."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    # MLA: all ranks have the same, and share one namespace.
    tp = 0 if group.replicated else int(get_tp_group().rank_in_group)
    return {"tp_rank": tp, "pp_rank": int(get_pp_group().rank_in_group)}


def era_of(vllm_config: Any) -> Era:
    """
    Return how this engine makes keys of tokens.

    Cryptographic hashes begin with a seed that all processes share, unless PYTHONHASHSEED says
    otherwise; the others with one that nobody else has, so that nothing is shared by them.
    """
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if algorithm.startswith("sha256"):
        seed = resolve_none_hash_seed(get_hash_fn_by_name(algorithm))
    else:
        seed = os.environ.get("PYTHONHASHSEED") or uuid.uuid4().hex
    return Era(algorithm, digest(seed))


def manifest_of(fields: Mapping[str, Value], era: Era, chunk_tokens: int) -> Manifest:
    """Return the manifest of one group of one rank."""
    known: dict[str, Any] = {**fields, **era.fields(), "chunk_tokens": chunk_tokens}
    return Manifest(**known)
