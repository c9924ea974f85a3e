# SPDX-License-Identifier: Apache-2.0
"""A bed for adapters of engines: small real models, prompts, a real pool in this process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import pytest

from cenote.client.testing import MemoryHost

if TYPE_CHECKING:
    from cenote.client import Pool
    from cenote.client.adapters.transformers import PrefixCache

STEP: Final = 16  # tokens a chunk
LAYERS: Final = 3
KV_HEADS: Final = 2
HEAD_DIM: Final = 16
VOCABULARY: Final = 256


class Bed:
    """What the tests of the transformers adapter stand on."""

    STEP, LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY = STEP, LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY

    def llama(
        self, seed: int = 0, dtype: str = "float32", attention: str = "sdpa", **fields: Any
    ) -> Any:
        """Return a Llama with weights from *seed*."""
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": KV_HEADS,
                "max_position_embeddings": 512,
                "attn_implementation": attention,
                **fields,
            }
        )
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()

    def tokens(self, count: int, seed: int = 1) -> list[int]:
        """Return a prompt."""

        return [random.Random(f"{seed} {i}").randrange(VOCABULARY) for i in range(count)]

    def adapter(
        self, pool: Pool, model: Any = None, chunk_tokens: int = STEP, **options: Any
    ) -> PrefixCache:
        """Return a new adapter, as another process would make it."""
        from cenote.client.adapters.transformers import PrefixCache

        return PrefixCache.open(pool, model or self.llama(), chunk_tokens, **options)

    def stored(self, cache: PrefixCache, ids: list[int]) -> Any:
        """Compute and store a prompt; return its KV."""
        done = cache.prefill(ids)
        assert cache.cache is not None
        cache.cache.flush()
        return done.past_key_values

    def alone(self, model: Any, ids: list[int]) -> Any:
        """Return the model's outputs for a prompt, without any sharing."""
        import torch

        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=True)

    def greedy(self, model: Any, logits: Any, past: Any, count: int) -> list[int]:
        """Return the *count* most probable next tokens."""
        import torch

        found = [int(logits[0, -1].argmax())]
        with torch.no_grad():
            while len(found) < count:
                following = torch.tensor([[found[-1]]])
                out = model(input_ids=following, past_key_values=past, use_cache=True)
                found.append(int(out.logits[0, -1].argmax()))
        return found

    def same_bytes(self, left: Any, right: Any, count: int) -> bool:
        """Are the first *count* tokens of two caches the same, bit for bit?"""
        import torch

        def raw(values: Any) -> Any:
            return values[:, :, :count].contiguous().view(torch.uint8)

        return len(left.layers) == len(right.layers) and all(
            torch.equal(raw(a.keys), raw(b.keys)) and torch.equal(raw(a.values), raw(b.values))
            for a, b in zip(left.layers, right.layers, strict=True)
        )

    def refused(self, pool: Pool, model: Any) -> str:
        """Return the reason why a model is refused."""
        from cenote.client.adapters.transformers import NotCacheable

        with pytest.raises(NotCacheable) as caught:
            self.adapter(pool, model)
        return str(caught.value)

    def small(self, kind: str, **fields: Any) -> Any:
        """Return another architecture with few weights."""
        transformers = pytest.importorskip("transformers")
        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        }
        config = getattr(transformers, f"{kind}Config")(**{**shape, **fields})
        return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture(scope="session")
def bed() -> Bed:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    return Bed()


@pytest.fixture
def host() -> Iterator[MemoryHost]:
    with MemoryHost("32MiB") as host:
        yield host
        assert host.audit() == 0


@pytest.fixture
def pool(host: MemoryHost) -> Iterator[Pool]:
    with host.connect() as pool:
        yield pool
