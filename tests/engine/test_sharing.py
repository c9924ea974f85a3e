# SPDX-License-Identifier: Apache-2.0
"""
Engines that live on one pool: what one computed the others load, and say what they would have said.

The oracle is an engine without cenote whose own prefix cache holds just what was loaded, so that it
splits the prompt as the loading engine does; float32, one request at a time.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from tests.engine.engines import Answer, Engine, EngineFailed, cenote_connector
from tests.engine.pools import chunks_of, full, store, wait_for_chunks, wait_until, watching
from tests.engine.prompts import prompt_of

Engines = Callable[..., Engine]
Models = Callable[..., Path]
Daemons = Callable[..., Any]

PROMPTS: Final = 50
SAMPLING: Final = {"temperature": 0.8, "top_p": 0.9}


def shared_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of 260 to 1,200 tokens; most begin as one of four others do."""
    rng = random.Random(seed)
    heads = [prompt_of(rng.choice((256, 512, 768)), seed=seed + i) for i in range(4)]
    found = []
    for i in range(count):
        head = rng.choice(heads) if rng.random() < 0.8 else []
        tail = prompt_of(rng.randrange(260 if not head else 5, 430), seed=seed + 100 + i)
        found.append([*head, *tail])
    return found


def expected(oracle: Engine, prompt: Sequence[int], held: int, params: Mapping[str, Any]) -> Answer:
    """What an engine says that holds the first *held* tokens of a prompt, and nothing else."""
    assert oracle.reset()
    if held:
        oracle.ask(prompt[:held], max_tokens=1)
    answer = oracle.ask(prompt, **params)
    assert answer.cached == held
    return answer


def test_what_one_engine_computed_the_other_loads(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    Fifty prompts with shared beginnings, greedy and with seeds: all full chunks come out of the
    pool, every checksum agrees, and the tokens are those of an engine without cenote.
    """
    daemon = cenoted(size="256MiB")
    connector = cenote_connector(daemon.socket, verify="always")
    one, other = (engines(model(), connector=connector) for _ in range(2))
    oracle = engines(model())
    prompts = shared_prompts(PROMPTS, seed=3)
    with watching(daemon.socket) as pool:
        store(one, pool, prompts, chunks_of(prompts))

    wrong = []
    for i, prompt in enumerate(prompts):
        params = {"max_tokens": 8, **({"seed": i, **SAMPLING} if i % 2 else {})}
        assert other.reset()
        said = other.ask(prompt, **params)
        assert said.cached == full(prompt)
        if said.tokens != expected(oracle, prompt, said.cached, params).tokens:
            wrong.append(i)

    stats = other.stats()
    assert wrong == []
    assert stats["vllm:cenote_loads"] == PROMPTS
    assert stats.get("vllm:cenote_damaged_chunks", 0) == 0
    assert stats["vllm:external_prefix_cache_hits"] == sum(map(full, prompts))


def test_what_many_requests_load_at_once_is_what_each_would(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    Batches of prompts, loaded beside decoding, give what the same batches give without cenote,
    wherever two runs without it agree.
    """
    daemon = cenoted(size="256MiB")
    engine = engines(model(), connector=cenote_connector(daemon.socket, verify="always"))
    plain = engines(model())
    prompts = shared_prompts(32, seed=11)
    runs = []
    for _ in range(2):
        assert plain.reset()
        runs.append([a.tokens for a in plain.generate(prompts, max_tokens=12).answers])
    with watching(daemon.socket) as pool:
        store(engine, pool, prompts, chunks_of(prompts))
    loaded = engine.generate(prompts, max_tokens=12).answers

    sure = [i for i in range(len(prompts)) if runs[0][i] == runs[1][i]]
    print(f"{len(prompts) - len(sure)} of {len(prompts)} requests excluded: they differ by chance")
    assert sum(answer.cached for answer in loaded) >= sum(map(full, prompts)) // 2
    assert [i for i in sure if loaded[i].tokens != runs[0][i]] == []


@pytest.mark.parametrize("transfer", ["chunks", "layers"])
def test_a_prompt_that_is_all_there(
    engines: Engines, model: Models, cenoted: Daemons, transfer: str
) -> None:
    """
    A prompt of whole chunks is loaded whole: one token is computed, whichever way it is loaded.
    """
    daemon = cenoted(size="64MiB")
    connector = cenote_connector(daemon.socket, verify="always", transfer=transfer)
    engine = engines(model(), connector=connector)
    oracle = engines(model())
    prompt = prompt_of(1024)
    with watching(daemon.socket) as pool:
        store(engine, pool, [prompt], 4)
    warm = engine.ask(prompt, max_tokens=8)

    assert warm.cached == (1024 if transfer == "chunks" else 1023)
    assert warm.tokens == oracle.ask(prompt, max_tokens=8).tokens


def test_only_what_the_engine_lacks_is_loaded(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    An engine that holds the first blocks of a chunk itself loads the rest of the chunk.
    """
    daemon = cenoted(size="64MiB")
    engine = engines(model(), connector=cenote_connector(daemon.socket, verify="always"))
    oracle = engines(model())
    prompt = prompt_of(1100)
    with watching(daemon.socket) as pool:
        store(engine, pool, [prompt], 4)
    params: dict[str, Any] = {"kv_transfer_params": {"cenote.max_load_tokens": 0}}
    engine.ask(prompt[:350], max_tokens=1, **params)  # 10 blocks of 32 in its own cache
    warm = engine.ask(prompt, max_tokens=8)

    assert warm.cached == 1024
    assert engine.stats()["vllm:prefix_cache_hits"] == 320
    assert engine.stats()["vllm:external_prefix_cache_hits"] == 704
    assert warm.tokens == expected(oracle, prompt, 1024, {"max_tokens": 8}).tokens


OTHERS: Final[dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, str]]]] = {
    "weights": ({"seed": 1}, {}, {}),
    "dtype": ({}, {"dtype": "bfloat16"}, {}),
    "block size": ({}, {"block_size": 64}, {}),
    "hash seed": ({}, {}, {"PYTHONHASHSEED": "1"}),
    "hash": ({}, {"prefix_caching_hash_algo": "sha256_cbor"}, {}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_engine_hits_nothing(
    engines: Engines, model: Models, cenoted: Daemons, tmp_path: Path, what: str
) -> None:
    """
    Other weights under the same name, another dtype, block size or hash: no hit, and the log says
    in which field the two differ (I8).
    """
    changes, arguments, environment = OTHERS[what]
    daemon = cenoted(size="128MiB")
    connector = cenote_connector(daemon.socket)
    prompt = prompt_of(700)
    first = engines(model(), connector=connector)
    with watching(daemon.socket) as pool:
        store(first, pool, [prompt], 2)
    first.stop()
    at = model(**changes)
    if changes:  # under the same name
        at = shutil.copytree(at, tmp_path / "other" / model().name)
    second = engines(at, connector=connector, environment=environment, **arguments)
    said = second.ask(prompt, max_tokens=1)

    fields = {"weights": "weights", "block size": "block_tokens", "hash seed": "hash_seed"}
    assert said.cached == 0
    assert "shares nothing with the one that came first" in second.log()
    assert fields.get(what, what) in second.log()


def test_a_salt_keeps_prompts_apart(engines: Engines, model: Models, cenoted: Daemons) -> None:
    """
    The same tokens under another cache salt are another prompt; under the same they hit.
    """
    daemon = cenoted(size="64MiB")
    engine = engines(model(), connector=cenote_connector(daemon.socket))
    prompt = prompt_of(700)
    engine.ask(prompt, max_tokens=1, cache_salt="a")
    with watching(daemon.socket) as pool:
        wait_for_chunks(pool, 2)
    assert wait_until(engine.reset)

    assert engine.ask(prompt, max_tokens=1, cache_salt="b").cached == 0
    assert engine.reset()
    assert engine.ask(prompt, max_tokens=1, cache_salt="a").cached == 512


def test_a_setting_that_is_unknown_is_refused(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    The engine does not start, and says which settings there are.
    """
    connector = cenote_connector(cenoted(size="64MiB").socket, chunk_token=256)

    with pytest.raises(EngineFailed, match=r"'chunk_token', which cenote does not know"):
        engines(model(), connector=connector)
