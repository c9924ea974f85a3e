# SPDX-License-Identifier: Apache-2.0
"""
What decides the bytes of a model's KV cache: its shape, its manifest, and which models are refused.

A chunk may be shared when its keys and values depend on nothing but the token ids before its end.
Where anything else has a say (images, a window, the length of the whole prompt), the model is
refused here instead of serving wrong bytes later.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cenote.client.manifest import Manifest

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedModel

LAYOUT: Final = "layer,key-value,head,token,dim"
ADAPTER: Final = "transformers/1"  # another number where the same fields come to mean other bytes
DTYPES: Final = ("float32", "bfloat16", "float16")
# Rotations that depend on the length of the whole prompt: a prefix alone does not decide its keys.
LENGTH_DEPENDENT_ROPE: Final = frozenset({"dynamic", "longrope"})
# Fields of a configuration that say how a model is used or named, not what it computes.
_NOT_COMPUTED: Final = frozenset(
    {
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "label2id",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


class NotCacheable(ValueError):
    """This model, cache or input cannot be shared; the message says why."""


@dataclass(frozen=True)
class Geometry:
    """
    The shape of a model's KV cache, as one real forward pass left it.

    Attributes:
        layers: Decoder layers.
        kv_heads: Key/value heads of each.
        head_dim: Width of a head.
        dtype: Element type, a torch.dtype.
        devices: Where each layer has its cache.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]

    def chunk_shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Return the shape of a chunk: [layers, 2, kv_heads, tokens, head_dim]."""
        return (self.layers, 2, self.kv_heads, tokens, self.head_dim)

    def chunk_bytes(self, tokens: int) -> int:
        """Return the bytes of a chunk of *tokens* tokens."""
        return math.prod(self.chunk_shape(tokens)) * int(self.dtype.itemsize)

    @property
    def dtype_name(self) -> str:
        """The element type as the manifest has it ("bfloat16")."""
        return str(self.dtype).removeprefix("torch.")


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """Return a cache without tokens, with the layers that the model's configuration asks for."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def geometry_of(model: PreTrainedModel) -> Geometry:
    """
    Return the shape of the model's cache. Computes one token, so as not to trust names of fields.

    Raises:
        NotCacheable: The model cannot be shared; see check_supported().
    """
    import torch

    check_supported(model)
    past = empty_cache(model)
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=past, use_cache=True)
    layers = plain_layers(past)
    if not layers or any(layer.keys is None for layer in layers):
        raise NotCacheable(f"{_name(model)} left layers of its cache empty: they share others'")
    keys = layers[0].keys
    geometry = Geometry(
        layers=len(layers),
        kv_heads=int(keys.shape[1]),
        head_dim=int(keys.shape[3]),
        dtype=keys.dtype,
        devices=tuple(layer.keys.device for layer in layers),
    )
    check_layers(layers, geometry)
    if geometry.dtype_name not in DTYPES:
        raise NotCacheable(
            f"the cache of {_name(model)} is in {geometry.dtype_name}: load the model in "
            f"{', '.join(DTYPES)}"
        )
    return geometry


def plain_layers(past: Any) -> list[Any]:
    """
    Return the layers of a cache that holds every token of every layer, as it was computed.

    Raises:
        NotCacheable: The cache is quantised, offloaded, static, has a window, or is no cache.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if type(past) is not DynamicCache:
        raise NotCacheable(
            f"past_key_values is a {type(past).__name__}: only a plain DynamicCache can be shared "
            "(no static, quantised or encoder-decoder cache)"
        )
    if getattr(past, "offloading", False):
        raise NotCacheable("past_key_values is offloaded: make it without offloading=True")
    odd = sorted({type(layer).__name__ for layer in past.layers if type(layer) is not DynamicLayer})
    if odd:
        raise NotCacheable(
            f"past_key_values has layers of type {', '.join(odd)}: only full attention keeps every "
            "token as it was computed"
        )
    return list(past.layers)


def check_layers(layers: list[Any], geometry: Geometry) -> int:
    """
    Return how many tokens *layers* hold.

    Raises:
        NotCacheable: They have not the shape of *geometry*, or hold several sequences.
    """
    if len(layers) != geometry.layers or layers[0].keys is None:
        held = sum(layer.keys is not None for layer in layers)
        raise NotCacheable(
            f"past_key_values has {held} filled layers, and the model {geometry.layers}"
        )
    tokens = int(layers[0].keys.shape[2])
    wanted = (1, geometry.kv_heads, tokens, geometry.head_dim)
    for i, layer in enumerate(layers):
        for what, values in (("keys", layer.keys), ("values", layer.values)):
            if tuple(values.shape) != wanted or values.dtype != geometry.dtype:
                raise NotCacheable(
                    f"the {what} of layer {i} are {tuple(values.shape)} of {values.dtype}, and "
                    f"{wanted} of {geometry.dtype} can be shared: one sequence, every layer alike"
                )
    return tokens


def check_supported(model: PreTrainedModel) -> None:
    """
    Check that the model's KV depends on nothing but the token ids before it.

    Raises:
        NotCacheable: Something else has a say, or the cache holds something else than KV.
    """
    name, config = _name(model), model.config
    if getattr(config, "is_encoder_decoder", False):
        raise NotCacheable(f"{name} has an encoder: its cache depends on the encoder's input too")
    if config.get_text_config(decoder=True) is not config:
        raise NotCacheable(
            f"{name} takes more than text: token ids do not tell one image from another. Use its "
            "language model alone"
        )
    if model.training:
        raise NotCacheable(f"{name} is in training mode, where dropout has a say: call eval()")
    if getattr(model, "_is_stateful", False):
        raise NotCacheable(f"{name} keeps a running state, not one entry a token")
    if getattr(config, "kv_lora_rank", None) is not None:
        raise NotCacheable(f"{name} has latent attention (MLA): this adapter knows keys and values")
    _check_attention(name, config)
    rope = _rope_type(config)
    if rope in LENGTH_DEPENDENT_ROPE:
        raise NotCacheable(
            f"{name} has {rope!r} rotary embeddings: its keys depend on the length of the whole "
            "prompt, so that a prefix alone does not decide them"
        )
    plain_layers(empty_cache(model))


def _check_attention(name: str, config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise NotCacheable(
            f"{name} has layers of type {', '.join(sorted(kinds))}: only full attention keeps "
            "every token"
        )
    causal = getattr(config, "is_causal", True)
    if not causal or getattr(config, "use_bidirectional_attention", None):
        raise NotCacheable(f"{name} looks ahead: the KV of a prefix depends on what follows it")


def manifest_for(
    model: PreTrainedModel,
    chunk_tokens: int = 256,
    *,
    name: str | None = None,
    revision: str | None = None,
    geometry: Geometry | None = None,
) -> Manifest:
    """
    Return the identity of a model's KV cache: everything that decides the bytes of a chunk.

    Args:
        model: The model, in eval mode.
        chunk_tokens: Tokens a chunk covers.
        name: The model's name; by default the one it was loaded by.
        revision: What names its weights for certain (a commit, a digest). Without one they are
            hashed: about one second per GB, once.
        geometry: What geometry_of() returned, if it was called already.

    Raises:
        NotCacheable: The model cannot be shared, or its weights cannot be hashed.
        ValueError: chunk_tokens is below 1, or the model has no name and a revision was given.
    """
    shape = geometry or geometry_of(model)
    config = model.config
    known = name or str(getattr(config, "name_or_path", ""))
    if revision is not None and not (known and revision):
        raise ValueError("a revision names weights of a model: give name= as well, neither empty")
    # Without a revision the weights say who it is, and the folder it was loaded from does not.
    weights = f"revision:{revision}" if revision else f"sha256:{weights_digest(model)}"
    return Manifest(
        model=known if revision else (name or str(config.model_type)),
        layout=LAYOUT,
        dtype=shape.dtype_name,
        chunk_tokens=chunk_tokens,
        adapter=ADAPTER,
        weights=weights,
        config=config_digest(config),
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        rope=_text(_rope(config)),
        attention=str(getattr(config, "_attn_implementation", None)),
    )


def weights_digest(model: PreTrainedModel) -> str:
    """
    Return SHA-256, in hex, over names, types, shapes and bytes of all weights.

    Raises:
        NotCacheable: A weight has no plain bytes (quantised, or on the meta device).
    """
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}:{weight.dtype}:{tuple(weight.shape)};".encode())
        try:
            raw = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise NotCacheable(
                f"weight {name!r} cannot be hashed ({error}): give revision= instead"
            ) from error
        digest.update(memoryview(raw))
    return digest.hexdigest()


def config_digest(config: Any) -> str:
    """Return SHA-256, in hex, over what the configuration says about the computation."""
    fields = {
        key: value
        for key, value in config.to_dict().items()
        if key not in _NOT_COMPUTED and not key.startswith(("_", "output_"))
    }
    return hashlib.sha256(_text(fields).encode()).hexdigest()


def _text(fields: Mapping[str, Any]) -> str:
    """Return the same text for the same fields in every process."""
    return json.dumps(fields, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """A set has another order in every process."""
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def _rope(config: Any) -> Mapping[str, Any]:
    """Return the parameters of the rotary embeddings; empty where there are none."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = getattr(config, "rope_theta", None)
    return {**found, **({} if theta is None else {"rope_theta": theta})}


def _rope_type(config: Any) -> str:
    rope = _rope(config)
    return str(rope.get("rope_type", rope.get("type", "default")))


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__
