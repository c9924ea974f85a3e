# SPDX-License-Identifier: Apache-2.0
"""The transformers adapter over a real pool and real, small models with random weights."""

from __future__ import annotations

import copy
import ctypes
import logging
from typing import TYPE_CHECKING, Any

import pytest

from cenote.client import Manifest
from cenote.client.testing import MemoryHost

if TYPE_CHECKING:
    from cenote.client import Pool

pytestmark = pytest.mark.torch

STEP = 16  # tokens a chunk, as in conftest.py
LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY = 3, 2, 16, 256


# ---- what comes back is what was computed ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loaded_bytes_are_the_computed_bytes(
    bed: Any, host: MemoryHost, pool: Pool, dtype: str
) -> None:
    """
    In every element type, the KV that another session loads is bit for bit what was computed.
    """
    model, ids = bed.llama(dtype=dtype), bed.tokens(5 * STEP + 3)
    computed = bed.stored(bed.adapter(pool, model), ids)

    with host.connect("reader") as reader:
        other = bed.adapter(reader, model)
        loaded, count = other.load_prefix(ids)

        assert count == 5 * STEP
        assert loaded.get_seq_length() == count
        assert bed.same_bytes(computed, loaded, count)
        assert other.counters.loaded_bytes == 5 * other.chunk_bytes
        assert other.geometry.chunk_shape(STEP) == (LAYERS, 2, KV_HEADS, STEP, HEAD_DIM)


def test_a_chunk_has_the_documented_layout(bed: Any, pool: Pool) -> None:
    """
    A chunk is [layers, 2, kv_heads, tokens, head_dim], under the chain's key, behind its parent.
    """
    import torch

    from cenote.client import keys

    cache, ids = bed.adapter(pool), bed.tokens(3 * STEP)
    past = bed.stored(cache, ids)
    assert cache.cache is not None
    packed = keys.chain(ids, STEP, cache.cache.id)

    chunks = cache.cache.get_many(packed)
    values = chunks[1].tensor(torch.float32, (LAYERS, 2, KV_HEADS, STEP, HEAD_DIM))

    assert len(chunks) == 3
    assert torch.equal(values[2, 0], past.layers[2].keys[0, :, STEP : 2 * STEP])
    assert torch.equal(values[1, 1], past.layers[1].values[0, :, STEP : 2 * STEP])


def test_logits_and_tokens_are_those_of_an_unshared_run(
    bed: Any, host: MemoryHost, pool: Pool
) -> None:
    """
    With a shared prefix, logits are within 1e-4 and 24 greedy tokens are the same.
    """
    model, common = bed.llama(), bed.tokens(6 * STEP)
    bed.stored(bed.adapter(pool, model), common + bed.tokens(9, seed=2))
    ids = common + bed.tokens(11, seed=3)
    reference = bed.alone(model, ids)

    with host.connect() as other:
        done = bed.adapter(other, model).prefill(ids)

    difference = reference.logits[:, done.loaded :] - done.outputs.logits
    assert done.loaded == 6 * STEP
    assert done.outputs.logits.shape[1] == 11
    assert float(difference.abs().max()) < 1e-4
    assert bed.greedy(model, reference.logits, reference.past_key_values, 24) == bed.greedy(
        model, done.outputs.logits, done.past_key_values, 24
    )


def test_generate_goes_on_from_a_loaded_prefix(bed: Any, pool: Pool) -> None:
    """
    model.generate() takes the loaded cache, and what it generated can be stored as well.
    """
    import torch

    model, ids = bed.llama(), bed.tokens(2 * STEP + 5)
    cache = bed.adapter(pool, model)
    bed.stored(cache, ids)
    prompt = torch.tensor([ids])
    options = {"max_new_tokens": 2 * STEP, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    past, loaded = cache.load_prefix(prompt)
    shared = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=past, **options
    )

    assert loaded == 2 * STEP
    assert plain.tolist() == shared.tolist()
    assert cache.save(shared, past, loaded) == 2 * STEP
    assert cache.cache is not None
    cache.cache.flush()
    assert cache.match(shared) == 4 * STEP


def test_the_loaded_cache_is_private(bed: Any, pool: Pool) -> None:
    """
    Loading holds no lease, and changing the loaded cache changes nothing in the pool.
    """
    cache, ids = bed.adapter(pool), bed.tokens(2 * STEP + 1)
    bed.stored(cache, ids)

    first, _ = cache.load_prefix(ids)
    assert pool.leases == 0
    for layer in first.layers:
        layer.keys.zero_()
    second, _ = cache.load_prefix(ids)

    assert not bed.same_bytes(first, second, 2 * STEP)
    assert second.layers[0].keys.abs().sum() > 0


# ---- what must not be found ----


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"attention": "eager"},
        {"rope_theta": 5000.0},
        {"rms_norm_eps": 1e-5},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_model_finds_nothing(bed: Any, pool: Pool, other: dict[str, Any]) -> None:
    """
    Other weights, element type, attention code or parameters are another namespace: no hit.
    """
    ids = bed.tokens(4 * STEP)
    first = bed.adapter(pool)
    bed.stored(first, ids)

    second = bed.adapter(pool, bed.llama(**other))

    assert first.cache is not None
    assert second.cache is not None
    assert first.cache.id != second.cache.id
    assert second.load_prefix(ids)[1] == 0
    assert second.match(ids) == 0


def test_another_chunk_size_finds_nothing(bed: Any, pool: Pool) -> None:
    """
    Chunks of 16 tokens are not found by who has chunks of 32.
    """
    ids = bed.tokens(4 * STEP)
    bed.stored(bed.adapter(pool), ids)

    assert bed.adapter(pool, chunk_tokens=2 * STEP).load_prefix(ids)[1] == 0


def test_a_revision_names_the_weights(bed: Any, pool: Pool) -> None:
    """
    With a revision nothing is hashed: equal revisions share, others do not.
    """
    ids = bed.tokens(3 * STEP)
    bed.stored(bed.adapter(pool, name="m", revision="a"), ids)

    assert bed.adapter(pool, name="m", revision="a").match(ids) == 2 * STEP
    assert bed.adapter(pool, name="m", revision="b").match(ids) == 0
    assert bed.adapter(pool, name="n", revision="a").match(ids) == 0
    with pytest.raises(ValueError, match="name="):
        bed.adapter(pool, revision="a")


def test_the_identity_is_the_same_for_equal_models(bed: Any, pool: Pool) -> None:
    """
    A model made again from the same seed is the same namespace; one changed weight is another.
    """
    import torch

    from cenote.client.adapters.transformers import manifest_for

    model = copy.deepcopy(bed.llama())
    before = manifest_for(model, STEP)
    with torch.no_grad():
        model.model.norm.weight[3] += 1.0

    assert before == manifest_for(bed.llama(), STEP)
    assert before != manifest_for(model, STEP)


# ---- how much is loaded and saved ----


def test_a_partial_prefix_is_loaded_as_far_as_it_goes(bed: Any, pool: Pool) -> None:
    """
    Where prompts part in the middle of a chunk, the chunks before it are loaded, the rest computed.
    """
    model, common = bed.llama(), bed.tokens(2 * STEP + 7)
    cache = bed.adapter(pool, model)
    bed.stored(cache, common + bed.tokens(3 * STEP, seed=2))
    ids = common + bed.tokens(3 * STEP, seed=3)

    done = cache.prefill(ids)

    assert done.loaded == 2 * STEP
    assert done.saved == 3 * STEP
    difference = bed.alone(model, ids).logits[:, done.loaded :] - done.outputs.logits
    assert float(difference.abs().max()) < 1e-4


def test_the_last_token_is_always_computed(bed: Any, pool: Pool) -> None:
    """
    Of a prompt that is stored whole, the last chunk is computed: there is something to go on from.
    """
    cache, ids = bed.adapter(pool), bed.tokens(3 * STEP)
    bed.stored(cache, ids)

    done = cache.prefill(ids)

    assert done.loaded == 2 * STEP
    assert done.outputs.logits.shape[1] == STEP
    assert done.saved == 0  # its last chunk was there


@pytest.mark.parametrize("count", [1, STEP - 1])
def test_a_prompt_shorter_than_a_chunk_is_computed(bed: Any, pool: Pool, count: int) -> None:
    """
    Nothing is loaded and nothing stored; the outputs are the model's.
    """
    import torch

    cache, ids = bed.adapter(pool), bed.tokens(count)

    done = cache.prefill(ids)

    assert (done.loaded, done.saved) == (0, 0)
    assert torch.equal(done.outputs.logits, bed.alone(bed.llama(), ids).logits)
    assert pool.stats().chunks == 0


def test_a_prompt_of_exactly_one_chunk_is_stored_and_not_loaded(bed: Any, pool: Pool) -> None:
    """
    One full chunk is stored for longer prompts; its own prompt has no token beside it.
    """
    cache, ids = bed.adapter(pool), bed.tokens(STEP)

    done = cache.prefill(ids)
    assert cache.cache is not None
    cache.cache.flush()

    assert (done.loaded, done.saved) == (0, STEP)
    assert cache.load_prefix(ids)[1] == 0
    assert cache.load_prefix([*ids, 5])[1] == STEP


def test_inputs_may_be_tensors_or_lists(bed: Any, pool: Pool) -> None:
    """
    [n], [1, n] and lists of int are the same prompt; several prompts go as a list.
    """
    import torch

    cache, ids = bed.adapter(pool), bed.tokens(2 * STEP + 1)
    bed.stored(cache, ids)

    assert cache.load_prefix(torch.tensor(ids))[1] == 2 * STEP
    assert cache.load_prefix(torch.tensor([ids]))[1] == 2 * STEP
    found = cache.load_many([ids, bed.tokens(40, seed=9)])
    assert [count for _, count in found] == [2 * STEP, 0]
    assert [done.loaded for done in cache.prefill_many([ids, ids])] == [2 * STEP, 2 * STEP]


# ---- bad luck ----


def test_eviction_between_match_and_load(bed: Any, pool: Pool) -> None:
    """
    What was matched and then left the pool is computed again; the answer is the same.
    """
    from cenote.client import keys

    model, ids = bed.llama(), bed.tokens(5 * STEP)
    cache = bed.adapter(pool, model)
    bed.stored(cache, ids)
    assert cache.match(ids) == 4 * STEP
    assert cache.cache is not None
    packed = keys.chain(ids, STEP, cache.cache.id)
    cache.cache.delete(packed[2 * 32 : 3 * 32])

    done = cache.prefill(ids)

    assert done.loaded == 2 * STEP
    difference = bed.alone(model, ids).logits[:, done.loaded :] - done.outputs.logits
    assert float(difference.abs().max()) < 1e-4
    cache.cache.flush()
    assert cache.match(ids) == 4 * STEP


def test_a_small_pool_evicts_and_answers_stay_right(bed: Any) -> None:
    """
    Prompts through a pool with room for a few: chunks are evicted, no answer changes.
    """
    model = bed.llama()
    with MemoryHost("4MiB") as host, host.connect() as pool:
        cache = bed.adapter(pool, model)
        prompts = [bed.tokens(6 * STEP, seed=i) for i in range(120)]
        for ids in [*prompts, *prompts[-3:], *prompts[:3]]:
            done = cache.prefill(ids)
            reference = bed.alone(model, ids).logits[:, done.loaded :]
            assert float((reference - done.outputs.logits).abs().max()) < 1e-4

        assert pool.stats().evictions > 0
        assert pool.leases == 0
        assert host.audit() == 0


def test_a_full_pool_is_counted_and_logged_once(
    bed: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Where nothing can be evicted, what was computed is not cached, and the engine does not notice.
    """
    with MemoryHost("4MiB") as host, host.connect() as pool:
        cache = bed.adapter(pool)
        held = []
        ns = pool.namespace(Manifest("filler", "bytes", "uint8", 1))
        for i in range(64):
            key = i.to_bytes(32, "little")
            with ns.put(key, 1 << 17, wait_ms=200) as put:
                put.memory[:4] = b"full"
            ns.flush()
            held.append(ns.get(key))
            if cache.prefill(bed.tokens(4 * STEP, seed=i)).saved == 0:
                break
        with caplog.at_level(logging.WARNING, "cenote"):
            for i in range(100, 103):
                done = cache.prefill(bed.tokens(4 * STEP, seed=i))
                assert done.outputs.logits.shape[1] == 4 * STEP

        assert cache.counters.not_cached["PoolFull"] >= 3
        assert len([r for r in caplog.records if "PoolFull" in r.getMessage()]) <= 1
        held.clear()


def test_a_chunk_larger_than_the_pool_is_not_cached(bed: Any) -> None:
    """
    A chunk that can never fit is counted, and the prompt is computed.
    """
    with MemoryHost("4MiB") as host, host.connect() as pool:
        big = bed.llama(num_hidden_layers=8, num_key_value_heads=4, head_dim=128)
        cache = bed.adapter(pool, big, chunk_tokens=256)
        assert cache.chunk_bytes > 4 << 20

        done = cache.prefill(bed.tokens(300))

        assert done.saved == 0
        assert cache.counters.not_cached["ChunkTooLarge"] == 1


def test_the_daemon_goes_in_the_middle(bed: Any, caplog: pytest.LogCaptureFixture) -> None:
    """
    After the daemon's death loads still hit, saves are counted, outputs are right, one line said.
    """
    model, ids = bed.llama(), bed.tokens(3 * STEP + 1)
    with MemoryHost("32MiB") as host:
        pool = host.connect()
        cache = bed.adapter(pool, model)
        bed.stored(cache, ids)
        host.stop()

        with caplog.at_level(logging.WARNING, "cenote"):
            for seed in (2, 3):
                longer = ids + bed.tokens(2 * STEP, seed=seed)
                done = cache.prefill(longer)
                difference = bed.alone(model, longer).logits[:, done.loaded :] - done.outputs.logits
                assert float(difference.abs().max()) < 1e-4
                assert (done.loaded, done.saved) == (3 * STEP, 0)

        assert cache.counters.not_cached["PoolGone"] == 2
        assert len([r for r in caplog.records if r.name.endswith("adapters.transformers")]) == 1
        pool.close()


def test_a_closed_pool_is_no_cache(bed: Any, pool: Pool) -> None:
    """
    After close() everything is computed, and counted.
    """
    cache, ids = bed.adapter(pool), bed.tokens(3 * STEP)
    bed.stored(cache, ids)
    pool.close()

    done = cache.prefill(ids)

    assert (done.loaded, done.saved) == (0, 0)
    assert cache.counters.not_cached["PoolGone"] >= 2


def test_a_reader_loads_and_does_not_save(bed: Any, host: MemoryHost, pool: Pool) -> None:
    """
    A session that may only read loads; what it computed is counted as not cached.
    """
    ids = bed.tokens(2 * STEP + 1)
    bed.stored(bed.adapter(pool), ids)

    with host.connect("reader") as reader:
        cache = bed.adapter(reader)
        done = cache.prefill(ids + bed.tokens(2 * STEP, seed=2))

    assert (done.loaded, done.saved) == (2 * STEP, 0)
    assert cache.counters.not_cached["NotWritable"] == 1


def test_a_chunk_of_the_wrong_length_is_a_miss(bed: Any, pool: Pool) -> None:
    """
    Bytes that cannot be this model's KV are not used, and hold no lease.
    """
    from cenote.client import keys

    cache, ids = bed.adapter(pool), bed.tokens(3 * STEP)
    assert cache.cache is not None
    with cache.cache.put(keys.chain(ids, STEP, cache.cache.id)[:32], 4096) as put:
        put.memory[:] = bytes(4096)
    cache.cache.flush()

    assert cache.load_prefix(ids)[1] == 0
    assert pool.leases == 0


def test_verify_refuses_changed_bytes(bed: Any) -> None:
    """
    With verify=True a chunk whose bytes differ from its checksum is computed again.
    """
    from cenote.client import keys

    ids = bed.tokens(3 * STEP)
    with MemoryHost("64MiB", checksum="commit") as host, host.connect() as pool:
        cache = bed.adapter(pool, verify=True)
        assert cache.cache is not None
        key = keys.chain(ids, STEP, cache.cache.id)[:32]
        with cache.cache.put(key, cache.chunk_bytes) as put:
            put.copy_from(bytes(cache.chunk_bytes))
            spoiler = (ctypes.c_uint8 * cache.chunk_bytes).from_address(put.address)
        cache.cache.flush()
        assert cache.load_prefix(ids)[1] == STEP

        spoiler[100] ^= 1  # what a broken device, or a hostile writer, would do

        assert cache.load_prefix(ids)[1] == 0
        assert cache.counters.not_cached["ChunkLost"] == 1
        assert pool.leases == 0


def test_no_daemon_at_first(bed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """
    connect() without a daemon makes an adapter that computes, and tries again only after a while.
    """
    from cenote.client.adapters import transformers as module

    monkeypatch.setenv("CENOTE_SOCKET", str(tmp_path / "nobody.sock"))
    monkeypatch.setattr(module, "RETRY_S", 3600.0)
    cache = module.PrefixCache.connect(bed.llama(), tmp_path / "none.sock", STEP)

    if cache.cache is not None:
        pytest.skip("a daemon of this machine answers at the default socket")
    done = cache.prefill(bed.tokens(2 * STEP))

    assert (done.loaded, done.saved) == (0, 0)
    assert cache.counters.not_cached["PoolGone"] == 1
