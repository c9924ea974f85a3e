# SPDX-License-Identifier: Apache-2.0
"""What single requests may ask for, and what becomes of loads that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engines import Engine, cenote_connector
from tests.engine.pools import (
    damage,
    region_of,
    store,
    stored,
    wait_for_chunks,
    wait_until,
    watching,
)
from tests.engine.prompts import prompt_of

Engines = Callable[..., Engine]
Models = Callable[..., Path]
Daemons = Callable[..., Any]
MIB = 1 << 20


@pytest.mark.parametrize("transfer", ["chunks", "layers"])
def test_a_damaged_chunk_is_computed_again(
    engines: Engines, model: Models, cenoted: Daemons, transfer: str
) -> None:
    """
    One byte of a chunk differs: what lies before it is used, the rest is computed, the tokens are
    right, it is counted once, and the chunk is stored anew. The request is offered nothing again.
    """
    daemon = cenoted(size="64MiB", medium="memfd")
    connector = cenote_connector(daemon.socket, verify="always", transfer=transfer)
    engine = engines(model(), connector=connector)
    oracle = engines(model())
    prompt = prompt_of(1100)
    with watching(daemon.socket) as pool:
        store(engine, pool, [prompt], 4)
        third = stored(pool)[2]
        damage(pool, third, region_of(daemon.pid, 64 * MIB))
        said = engine.ask(prompt, max_tokens=8)
        stats = engine.stats()
        wait_until(lambda: len(stored(pool)) == 5, lambda: stored(pool))  # stored once more
        assert wait_until(engine.reset)
        again = engine.ask(prompt, max_tokens=8)

    assert said.tokens == again.tokens == oracle.ask(prompt, max_tokens=8).tokens
    assert again.cached == 1024
    assert stats["vllm:cenote_damaged_chunks"] == 1
    assert stats["vllm:cenote_failed_loads"] == 1
    assert "is damaged" in engine.log()


def test_what_was_computed_on_a_failed_load_is_not_stored(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    Layer by layer a load may fail beside the computing that needs it: a chunk that was completed in
    that step, from what was not there, must not get into the pool. Nor what another request
    computed in it on the same blocks.
    """
    daemon = cenoted(size="64MiB", medium="memfd")
    connector = cenote_connector(daemon.socket, verify="always", transfer="layers")
    engine = engines(model(), connector=connector)
    oracle = engines(model())
    head = prompt_of(1024)
    prompts = [[*head, *prompt_of(300, seed=seed)] for seed in (1, 2)]
    with watching(daemon.socket) as pool:
        store(engine, pool, [head], 4)
        damage(pool, stored(pool)[1], region_of(daemon.pid, 64 * MIB))
        engine.generate(prompts, max_tokens=1)
        assert wait_until(engine.reset)
        engine.generate(prompts, max_tokens=4)
        assert wait_until(engine.reset)
        again = engine.generate(prompts, max_tokens=8).answers

    assert [a.cached for a in again] == [1280, 1280]
    assert [a.tokens for a in again] == [oracle.ask(p, max_tokens=8).tokens for p in prompts]


def test_without_verification_nothing_is_compared(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    verify = "never" takes what is there: the damaged byte reaches the engine, and nobody counts it.
    """
    daemon = cenoted(size="64MiB", medium="memfd")
    engine = engines(model(), connector=cenote_connector(daemon.socket, verify="never"))
    prompt = prompt_of(600)
    with watching(daemon.socket) as pool:
        store(engine, pool, [prompt], 2)
        damage(pool, stored(pool)[1], region_of(daemon.pid, 64 * MIB))

    assert engine.ask(prompt, max_tokens=1).cached == 512
    assert engine.stats().get("vllm:cenote_damaged_chunks", 0) == 0


def test_wishes_of_a_request(engines: Engines, model: Models, cenoted: Daemons) -> None:
    """
    skip_save stores nothing, max_load_tokens bounds the load, priority and ttl_s reach the pool; a
    wish that is wrong is left out with a line in the log.
    """
    daemon = cenoted(size="64MiB")
    engine = engines(model(), connector=cenote_connector(daemon.socket))

    def ask(prompt: list[int], **wishes: Any) -> int:
        params = {f"cenote.{name}": value for name, value in wishes.items()}
        answer = engine.ask(prompt, max_tokens=1, kv_transfer_params=params)
        assert wait_until(engine.reset)  # refuses while a save is not known to be over
        return answer.cached

    prompt = prompt_of(1100)
    with watching(daemon.socket) as pool:
        ask(prompt, skip_save=True)
        assert pool.stats().chunks == 0
        ask(prompt)
        wait_for_chunks(pool, 4)
        assert ask(prompt, max_load_tokens=600) == 512
        assert ask(prompt, max_load_tokens=0) == 0
        assert ask(prompt, priority="high", ttl_s=-1, nonsense=1) == 1024
        ask(prompt_of(300, seed=9), ttl_s=1)
        wait_until(lambda: pool.stats().expirations == 1, pool.stats)

    for key in ("cenote.priority", "cenote.ttl_s", "cenote.nonsense"):
        assert f"{key}=" in engine.log()


def test_saving_only_what_is_reused(engines: Engines, model: Models, cenoted: Daemons) -> None:
    """
    save = "reused" stores what a second request asks for, "none" nothing.
    """
    daemon = cenoted(size="64MiB")
    engine = engines(model(), connector=cenote_connector(daemon.socket, save="reused"))
    head = prompt_of(512)
    with watching(daemon.socket) as pool:
        engine.ask([*head, *prompt_of(300, seed=1)], max_tokens=1)
        assert wait_until(engine.reset)
        assert pool.stats().chunks == 0
        store(engine, pool, [[*head, *prompt_of(300, seed=2)]], 2)
        none = engines(model(), connector=cenote_connector(daemon.socket, save="none"))
        none.ask(prompt_of(700, seed=3), max_tokens=1)
        assert wait_until(none.reset)
        assert none.ask([*head, 5, 6, 7], max_tokens=1).cached == 512
        assert pool.stats().chunks == 2


def test_short_hits_are_not_worth_a_load(engines: Engines, model: Models, cenoted: Daemons) -> None:
    """
    Below min_load_tokens nothing is loaded.
    """
    daemon = cenoted(size="64MiB")
    engine = engines(model(), connector=cenote_connector(daemon.socket, min_load_tokens=600))
    with watching(daemon.socket) as pool:
        store(engine, pool, [prompt_of(1100)], 4)

    assert engine.ask(prompt_of(600), max_tokens=1).cached == 0
    assert wait_until(engine.reset)
    assert engine.ask(prompt_of(1000), max_tokens=1).cached == 768


def test_a_reset_of_the_connector_is_a_new_beginning(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    After reset_prefix_cache(reset_connector=True) an engine sees nothing that was stored before,
    as after a change of its weights; the others keep it.
    """
    daemon = cenoted(size="64MiB")
    connector = cenote_connector(daemon.socket)
    one, other = (engines(model(), connector=connector) for _ in range(2))
    prompt = prompt_of(700)
    with watching(daemon.socket) as pool:
        store(one, pool, [prompt], 2)
        assert one.reset(connector=True)
        assert one.ask(prompt, max_tokens=1).cached == 0
        wait_for_chunks(pool, 4)  # stored again, apart
    assert wait_until(one.reset)

    assert one.ask(prompt, max_tokens=1).cached == 512
    assert other.ask(prompt, max_tokens=1).cached == 512


def test_preempted_and_aborted_requests_leave_nothing(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    With a KV cache that holds a few requests, those preempted say what they would have said, those
    aborted end, and no lease, reservation or block stays behind.
    """
    daemon = cenoted(size="128MiB")
    small = {"kv_cache_memory_bytes": 12 * MIB, "max_model_len": 2048}
    engine = engines(model(), connector=cenote_connector(daemon.socket, verify="always"), **small)
    oracle = engines(model())
    prompts = [prompt_of(600, seed=seed) for seed in range(12)]
    tokens = [oracle.ask(prompt, max_tokens=200).tokens for prompt in prompts]
    with watching(daemon.socket) as pool:
        for _ in range(2):
            doomed = engine.begin(prompts[:6], max_tokens=400)
            answers = engine.generate(prompts[6:], max_tokens=200).answers
            engine.abort(doomed)
            assert [a.tokens for a in answers] == tokens[6:]
            wait_until(engine.reset)  # refuses while a block is referenced
        wait_until(lambda: pool.stats().leases == 0, pool.stats)
    assert engine.stats()["vllm:num_preemptions"] > 0
