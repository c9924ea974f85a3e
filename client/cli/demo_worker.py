# SPDX-License-Identifier: Apache-2.0
"""
An engine process of `cenote demo`: a Llama model with random weights, and its shared KV cache.

Started by demo.py with one JSON argument. Reads one JSON request a line from stdin, writes one JSON
answer a line to stdout, and ends with its stdin.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache

    from cenote.client.adapters.transformers import PrefixCache

CHUNK_TOKENS: Final = 256
TAIL_TOKENS: Final = 32  # of a prompt, behind what is shared: another question each time
GREEDY_TOKENS: Final = 24
HEAD_DIM: Final = 64
VOCABULARY: Final = 4096
ELEMENT_BYTES: Final = 4  # float32
PAGES_APART: Final = 4096


@dataclass(frozen=True)
class Size:
    """A model of Llama's architecture; head_dim is 64, element type float32."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int

    @property
    def token_bytes(self) -> int:
        """KV of one token, all layers."""
        return self.layers * 2 * self.kv_heads * HEAD_DIM * ELEMENT_BYTES

    @property
    def parameters(self) -> int:
        """Weights, norms not counted."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * HEAD_DIM
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + (
            2 * VOCABULARY * self.hidden
        )


SIZES: Final = {
    "tiny": Size(hidden=128, layers=4, heads=2, kv_heads=1, intermediate=256),
    "small": Size(hidden=768, layers=12, heads=12, kv_heads=4, intermediate=2048),
    "medium": Size(hidden=1024, layers=20, heads=16, kv_heads=4, intermediate=2816),
}


def prompt_of(seed: int, shared: int, tail: str) -> list[int]:
    """Return a prompt: *shared* tokens that depend on the seed alone, and a tail of its own."""
    common = random.Random(f"{seed}")  # noqa: S311 - a model's input
    own = random.Random(f"{seed} {tail}")  # noqa: S311 - the same
    ids = [common.randrange(VOCABULARY) for _ in range(shared)]
    return ids + [own.randrange(VOCABULARY) for _ in range(TAIL_TOKENS)]


class Engine:
    """
    The model of this process, and what the demo asks of it. Every answer is a flat map.

    Args:
        socket: The pool's.
        size: A name of SIZES.
        seed: Of weights and prompts.
        shared: Tokens that the prompts have in common.
    """

    def __init__(self, socket: str, size: str, seed: int, shared: int) -> None:
        self.seed, self.shared = seed, shared
        self.model = _model(SIZES[size], seed)
        self.cache: PrefixCache = _shared_cache(self.model, socket)

    def ready(self) -> dict[str, Any]:
        """Say which namespace the model's identity led to."""
        cache = self.cache.cache
        assert cache is not None
        return {"namespace": cache.id.hex(), "parameters": self.model.num_parameters()}

    def prefill(self, tail: str) -> dict[str, Any]:
        """Compute a prompt with the shared cache."""
        ids = prompt_of(self.seed, self.shared, tail)
        began_s = time.perf_counter()
        done = self.cache.prefill(ids)
        took_s = time.perf_counter() - began_s
        assert self.cache.cache is not None
        self.cache.cache.flush()
        return {
            "prompt": len(ids),
            "loaded": done.loaded,
            "saved": done.saved,
            "seconds": took_s,
            "digest": self._digest(done.past_key_values),
            "not_cached": dict(self.cache.counters.not_cached),
        }

    def compare(self, tail: str) -> dict[str, Any]:
        """Compute a prompt again without the cache, then go on from both: are they the same?"""
        import torch

        ids = prompt_of(self.seed, self.shared, tail)
        began_s = time.perf_counter()
        with torch.no_grad():
            alone = self.model(input_ids=torch.tensor([ids]), use_cache=True)
        took_s = time.perf_counter() - began_s
        done = self.cache.prefill(ids)
        difference = alone.logits[:, done.loaded :] - done.outputs.logits
        return {
            "seconds": took_s,
            "loaded": done.loaded,
            "logits": int(done.outputs.logits.shape[1]),
            "difference": float(difference.abs().max()),
            "alone": self._greedy(alone.logits, alone.past_key_values),
            "together": self._greedy(done.outputs.logits, done.past_key_values),
        }

    def check(self, tail: str) -> dict[str, Any]:
        """Load what the pool has of a prompt, without computing anything."""
        ids = prompt_of(self.seed, self.shared, tail)
        began_s = time.perf_counter()
        past, loaded = self.cache.load_prefix(ids)
        took_s = time.perf_counter() - began_s
        digest = self._digest(past) if loaded else ""
        return {"loaded": loaded, "seconds": took_s, "digest": digest}

    def read(self, tail: str, announce: Callable[[dict[str, Any]], None]) -> None:
        """Lease every chunk of a prompt and read all of their pages, again and again, for ever."""
        cache, ids = self.cache.cache, prompt_of(self.seed, self.shared, tail)
        assert cache is not None
        from cenote.client import keys

        chunks = cache.get_many(keys.chain(ids, CHUNK_TOKENS, cache.id))
        views = [chunk.numpy() for chunk in chunks]
        passes, sum_ = 0, 0
        while True:
            sum_ ^= sum(int(view[::PAGES_APART].sum()) for view in views)
            passes += 1
            if passes == 1:
                announce({"leases": len(chunks), "bytes": sum(view.nbytes for view in views)})

    def _greedy(self, logits: torch.Tensor, past: DynamicCache) -> list[int]:
        """Return the next tokens, the most probable one each time."""
        import torch

        tokens = [int(logits[0, -1].argmax())]
        with torch.no_grad():
            while len(tokens) < GREEDY_TOKENS:
                following = torch.tensor([[tokens[-1]]])
                out = self.model(input_ids=following, past_key_values=past, use_cache=True)
                tokens.append(int(out.logits[0, -1].argmax()))
        return tokens

    def _digest(self, past: DynamicCache) -> str:
        """Return SHA-256 of the KV of the shared tokens, as many of them as fill chunks."""
        tokens = self.shared // CHUNK_TOKENS * CHUNK_TOKENS
        digest = hashlib.sha256()
        for layer in past.layers:
            for values in (layer.keys, layer.values):
                digest.update(values[0, :, :tokens].contiguous().numpy().tobytes())
        return digest.hexdigest()


def _model(size: Size, seed: int) -> Any:
    """Return the model, with weights that the seed decides."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=1 << 17,
        dtype="float32",
    )
    return transformers.LlamaForCausalLM(config).eval()


def _shared_cache(model: Any, socket: str) -> PrefixCache:
    from cenote.client import connect
    from cenote.client.adapters.transformers import PrefixCache

    return PrefixCache.open(connect(socket, reconnect=False), model, CHUNK_TOKENS)


def main() -> int:
    """Serve the requests of demo.py until stdin ends."""
    options = json.loads(sys.argv[1])
    engine = Engine(**options)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)

    say(engine.ready())
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "read":
            engine.read(request["tail"], say)
        say(getattr(engine, request["do"])(request["tail"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
