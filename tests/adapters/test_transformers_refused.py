# SPDX-License-Identifier: Apache-2.0
"""What the transformers adapter refuses, with its reason, and other models that it takes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from cenote.client import Manifest

if TYPE_CHECKING:
    from cenote.client import Pool

pytestmark = pytest.mark.torch

STEP = 16  # tokens a chunk, as in conftest.py
LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY = 3, 2, 16, 256


def test_models_whose_kv_is_not_decided_by_a_prefix_are_refused(bed: Any, pool: Pool) -> None:
    """
    Sliding windows, latent attention, states and length-dependent rotations, each with its reason.
    """
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    mla = bed.small(
        "DeepseekV3", v_head_dim=16, n_routed_experts=2, num_experts_per_tok=1, **latent
    )
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}

    assert "sliding_attention" in bed.refused(
        pool, bed.small("Gemma2", head_dim=16, sliding_window=32)
    )
    assert "DynamicSlidingWindowLayer" in bed.refused(pool, bed.small("Mistral", sliding_window=32))
    assert "MLA" in bed.refused(pool, mla)
    assert "'dynamic' rotary" in bed.refused(pool, bed.llama(rope_scaling=dynamic))


def test_encoders_states_and_training_are_refused(bed: Any, pool: Pool) -> None:
    """
    An encoder's input, a running state and dropout have a say in the cache: refused.
    """
    transformers = pytest.importorskip("transformers")
    t5 = transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=64)
    mamba = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64)
    training = copy.deepcopy(bed.llama()).train()

    assert "encoder" in bed.refused(pool, transformers.T5ForConditionalGeneration(t5).eval())
    assert "state" in bed.refused(pool, transformers.MambaForCausalLM(mamba).eval())
    assert "training mode" in bed.refused(pool, training)


def test_other_architectures_with_full_attention_are_shared(bed: Any, pool: Pool) -> None:
    """
    Qwen3 (norms on keys), GPT-2 (no rotation, learned positions): the same round trip.
    """
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    ids = bed.tokens(3 * STEP + 2)
    for model in (bed.small("Qwen3", head_dim=16), transformers.GPT2LMHeadModel(gpt2).eval()):
        bed.stored(bed.adapter(pool, model), ids)

        done = bed.adapter(pool, model).prefill(ids)

        difference = bed.alone(model, ids).logits[:, done.loaded :] - done.outputs.logits
        assert done.loaded == 3 * STEP
        assert float(difference.abs().max()) < 1e-4


def test_inputs_that_cannot_be_shared_are_refused(bed: Any, pool: Pool) -> None:
    """
    Batches, empty prompts, caches of another kind, shape or type: an error that says why.
    """
    import torch
    from transformers import DynamicCache, StaticCache

    from cenote.client.adapters.transformers import NotCacheable, PrefixCache

    cache, ids = bed.adapter(pool), bed.tokens(2 * STEP)
    batch = torch.tensor([ids, ids])
    with torch.no_grad():
        several = bed.llama()(input_ids=batch, use_cache=True).past_key_values
    halves = bed.alone(bed.llama(dtype="bfloat16"), ids).past_key_values

    with pytest.raises(NotCacheable, match="one prompt"):
        cache.load_prefix(batch)
    with pytest.raises(ValueError, match="empty"):
        cache.prefill([])
    with pytest.raises(ValueError, match="start is -1"):
        cache.save(ids, bed.alone(bed.llama(), ids).past_key_values, -1)
    with pytest.raises(NotCacheable, match="one sequence"):
        cache.save(ids, several)
    with pytest.raises(NotCacheable, match="bfloat16"):
        cache.save(ids, halves)
    with pytest.raises(NotCacheable, match="filled layers"):
        cache.save(ids, DynamicCache(config=bed.llama().config))
    with pytest.raises(NotCacheable, match="StaticCache"):
        cache.save(ids, StaticCache(config=bed.llama().config, max_cache_len=64))
    with pytest.raises(NotCacheable, match="layers"):
        PrefixCache(pool.namespace(Manifest("m", "l", "float32", STEP)), bed.llama())
    assert pool.stats().chunks == 0


def test_a_model_put_into_training_later_is_refused(bed: Any, pool: Pool) -> None:
    """
    The check is made at each prefill, not only at the start.
    """
    from cenote.client.adapters.transformers import NotCacheable

    model = copy.deepcopy(bed.llama())
    cache = bed.adapter(pool, model)
    model.train()

    with pytest.raises(NotCacheable, match="training mode"):
        cache.prefill(bed.tokens(STEP))
