# SPDX-License-Identifier: Apache-2.0
"""
Makes model folders for engines without downloading anything: configuration, tokenizer, weights.

    make_model(folder, "llama")                       small, with weights from a seed
    make_model(folder, "gemma3", window=256)          sliding window and full attention in turn
    make_model(folder, "llama", Shape(...), seed=None)    without weights: load_format="dummy"
    python tests/engine/model.py FOLDER KIND          for a person

With weights of its own a model's tokens depend on all of its prompt, so that a wrong byte of KV
shows; vLLM's dummy weights are so small that the next token follows from the last one alone. They
are written here as safetensors, which are a JSON header and bytes: torch need not be installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
SPECIAL: Final = ("<unk>", "<s>", "</s>")
ATTENTION_GAIN: Final = 2.0  # of queries and keys: attention picks some tokens, not all alike
TIED_GAIN: Final = 0.2
LAYERS_A_PERIOD: Final = 2  # of a hybrid: every second layer attends to everything


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; a head has hidden // heads dimensions."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 256
    vocabulary: int = 1024
    max_tokens: int = 4096

    @property
    def head_dim(self) -> int:
        """Dimensions of a head."""
        return self.hidden // self.heads


def _common(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.max_tokens,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _layer_types(shape: Shape, other: str) -> list[str]:
    full = LAYERS_A_PERIOD - 1
    return ["full_attention" if i % LAYERS_A_PERIOD == full else other for i in range(shape.layers)]


def _llama(shape: Shape, window: int) -> dict[str, Any]:
    del window
    return {**_common(shape), "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def _qwen2(shape: Shape, window: int) -> dict[str, Any]:
    del window
    return {**_common(shape), "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}


def _mistral(shape: Shape, window: int) -> dict[str, Any]:
    return {
        **_common(shape),
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": window,
    }


def _gemma3(shape: Shape, window: int) -> dict[str, Any]:
    return {
        **_common(shape),
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": shape.head_dim,
        "sliding_window": window,
        "layer_types": _layer_types(shape, "sliding_attention"),
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
    }


def _mamba2(shape: Shape, window: int) -> dict[str, Any]:
    del window
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "vocab_size": shape.vocabulary,
        "state_size": 16,
        "expand": 2,
        "head_dim": 32,
        "num_heads": shape.hidden * 2 // 32,
        "n_groups": 1,
        "conv_kernel": 4,
        "chunk_size": 32,
        "rms_norm": True,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _falcon_h1(shape: Shape, window: int) -> dict[str, Any]:
    del window
    return {
        **_common(shape),
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "mamba_d_ssm": shape.hidden * 2,
        "mamba_n_heads": shape.hidden * 2 // 32,
        "mamba_d_head": 32,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 32,
        "mamba_expand": 2,
    }


KINDS: Final = {
    "llama": _llama,
    "qwen2": _qwen2,
    "mistral": _mistral,
    "gemma3": _gemma3,
    "mamba2": _mamba2,
    "falcon_h1": _falcon_h1,
}
WITH_WEIGHTS: Final = frozenset({"llama", "qwen2", "mistral", "gemma3"})


def make_model(
    folder: Path,
    kind: str = "llama",
    shape: Shape | None = None,
    *,
    dtype: str = "float32",
    window: int = 256,
    seed: int | None = 0,
) -> Path:
    """
    Write a model to *folder* and return it.

    Args:
        folder: Made where it is missing.
        kind: One of KINDS.
        shape: Its sizes.
        dtype: What the configuration asks for; an engine may be told another one.
        window: Tokens that layers with a sliding window see, in kinds that have such layers.
        seed: Of the weights. None writes none, for load_format="dummy"; so it must be for kinds
            that are not in WITH_WEIGHTS.
    """
    if seed is not None and kind not in WITH_WEIGHTS:
        known = ", ".join(sorted(WITH_WEIGHTS))
        raise ValueError(f"no weights are made for {kind!r}, only for {known}: give seed=None")
    shape = shape or Shape()
    folder.mkdir(parents=True, exist_ok=True)
    config = {**KINDS[kind](shape, window), "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    _write_tokenizer(folder, shape)
    if seed is not None:
        _write_safetensors(folder / "model.safetensors", dict(_weights(kind, shape, seed)))
    return folder


def _write_tokenizer(folder: Path, shape: Shape) -> None:
    """A word a token: "w7 w8" are the tokens 7 and 8."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), shape.vocabulary))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": SPECIAL[0],
        },
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
        "model_max_length": shape.max_tokens,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


# ---- weights ------------------------------------------------------------------------------------


def _weights(kind: str, shape: Shape, seed: int) -> Iterator[tuple[str, Array]]:
    """Yield name and values of each tensor, as the architecture's checkpoints call them."""
    rng = np.random.default_rng(seed)
    gemma = kind == "gemma3"
    hidden, kv_dim = shape.hidden, shape.kv_heads * shape.head_dim

    def matrix(outputs: int, inputs: int, gain: float = 1.0) -> Array:
        values = rng.standard_normal((outputs, inputs), np.float32)
        return values * np.float32(gain / inputs**0.5)

    def norm(size: int = hidden) -> Array:
        # Gemma multiplies by one plus what is stored
        return np.zeros(size, np.float32) if gemma else np.ones(size, np.float32)

    # Gemma scales its embeddings by sqrt(hidden), and uses them as its head: larger ones would make
    # every token follow itself
    embedding_gain = TIED_GAIN if gemma else hidden**0.5
    yield "model.embed_tokens.weight", matrix(shape.vocabulary, hidden, embedding_gain)
    if not gemma:
        yield "lm_head.weight", matrix(shape.vocabulary, hidden)
    yield "model.norm.weight", norm()
    for layer in range(shape.layers):
        at = f"model.layers.{layer}."
        yield f"{at}self_attn.q_proj.weight", matrix(hidden, hidden, ATTENTION_GAIN)
        yield f"{at}self_attn.k_proj.weight", matrix(kv_dim, hidden, ATTENTION_GAIN)
        yield f"{at}self_attn.v_proj.weight", matrix(kv_dim, hidden)
        yield f"{at}self_attn.o_proj.weight", matrix(hidden, hidden)
        yield f"{at}mlp.gate_proj.weight", matrix(shape.intermediate, hidden)
        yield f"{at}mlp.up_proj.weight", matrix(shape.intermediate, hidden)
        yield f"{at}mlp.down_proj.weight", matrix(hidden, shape.intermediate)
        yield f"{at}input_layernorm.weight", norm()
        yield f"{at}post_attention_layernorm.weight", norm()
        if kind == "qwen2":
            for part, size in (("q", hidden), ("k", kv_dim), ("v", kv_dim)):
                yield f"{at}self_attn.{part}_proj.bias", matrix(1, size)[0]
        if gemma:
            for part in ("pre_feedforward", "post_feedforward"):
                yield f"{at}{part}_layernorm.weight", norm()
            for part in ("q", "k"):
                gain = np.float32(ATTENTION_GAIN - 1)
                yield f"{at}self_attn.{part}_norm.weight", norm(shape.head_dim) + gain


def _write_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    """8 bytes with the header's length, the header as JSON, then the bytes of all tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        begin, end = end, end + values.nbytes
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values, "<f4").tobytes())


def main() -> None:
    """Make one model."""
    parser = argparse.ArgumentParser(description="Make a small model without downloading one.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()
    seed = 0 if options.kind in WITH_WEIGHTS else None
    print(
        make_model(
            options.folder, options.kind, dtype=options.dtype, window=options.window, seed=seed
        )
    )


if __name__ == "__main__":
    main()
