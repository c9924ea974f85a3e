# SPDX-License-Identifier: Apache-2.0
"""
Asynchronous scheduling, which vLLM switches off on CPUs: its AsyncScheduler plans a step before it
knows how the last one went. Under both orders in which its model runners call a connector's worker.
test_connector.py runs this file under the vLLM environment's Python.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from tests.engine.connector_bed import CHUNK_TOKENS, VOCABULARY, Engine, answer_to
from tests.engine.spec_bed import BLOCK, BLOCKS, CHUNK

Whole = Callable[..., Engine]

runners = pytest.mark.parametrize("second", [False, True], ids=["first runner", "second runner"])
kinds = pytest.mark.parametrize("windows", [False, True], ids=["full", "windows"])


def prompt_of(tokens: int, seed: int = 0) -> list[int]:
    """So many tokens that no other seed begins with."""
    return random.Random(seed).choices(VOCABULARY, k=tokens)


def blocks_being_saved(engine: Engine) -> set[int]:
    """What the scheduler's half holds of the engine's blocks."""
    return {block.block_id for saving in engine.planner._saving.values() for block in saving.blocks}


@runners
@kinds
def test_what_one_engine_stored_another_loads(whole: Whole, second: bool, windows: bool) -> None:
    """
    Tokens are those of an engine without a pool, every page that attention reads is right, steps
    did overlap, and nothing is held afterwards.
    """
    one, other = (whole(second=second, windows=windows) for _ in range(2))
    prompts = [prompt_of(tokens, tokens) for tokens in (130, 300, 2 * CHUNK_TOKENS, 420)]
    for number, prompt in enumerate(prompts):
        assert one.ask(f"{number}", prompt, 6) == answer_to(prompt, 6)
        one.wait_for(prompt)
    for number, prompt in enumerate(prompts):
        other.add(f"{number}", prompt, 6)
    other.run()

    for number, prompt in enumerate(prompts):
        assert other.answers[f"{number}"] == answer_to(prompt, 6)
    assert other.counts["loads"] == len(prompts)
    for engine in (one, other):
        assert engine.overlaps > 0
        engine.check_nothing_is_left()


@runners
def test_an_answer_is_stored_although_its_tokens_come_late(whole: Whole, second: bool) -> None:
    """
    A chunk of tokens that the engine generated has no key until a step later; it is stored then.
    """
    one, other = whole(second=second), whole(second=second)
    prompt = prompt_of(CHUNK_TOKENS - 20)
    said = one.ask("a", prompt, CHUNK_TOKENS + 40)
    assert said == answer_to(prompt, CHUNK_TOKENS + 40)
    longer = prompt + said[: CHUNK_TOKENS + 30]
    one.wait_for(longer[: 2 * CHUNK_TOKENS])

    assert other.ask("b", longer) == answer_to(longer, 4)
    assert other.counts["loaded_bytes"] == 2 * one.counts["saved_bytes"] / one.counts["saves"]
    for engine in (one, other):
        engine.check_nothing_is_left()


@runners
def test_saves_outlive_their_request(whole: Whole, second: bool) -> None:
    """
    A request ends while its chunks wait to be stored, and others want every block there is: those
    are not given away, and what is stored is what was computed.
    """
    engine, other = whole(second=second), whole(second=second)
    prompt = prompt_of(3 * CHUNK_TOKENS + 5)
    with engine.held("_saving"):
        engine.add("a", prompt, 2)
        engine.answered("a", 2)
        saved = blocks_being_saved(engine)
        assert len(saved) == 3 * CHUNK
        for number in range(3):
            engine.add(f"b{number}", prompt_of(BLOCK * (BLOCKS // 2 - CHUNK - 3), number + 1), 2)
            engine.answered(f"b{number}", 2)
            assert saved <= blocks_being_saved(engine)
        assert engine.planner.saving
    engine.run()

    engine.wait_for(prompt)
    assert other.ask("a", prompt) == answer_to(prompt, 4)
    assert other.counts["loads"] == 1
    for each in (engine, other):
        each.check_nothing_is_left()


@runners
def test_an_abort_while_a_load_is_under_way(whole: Whole, second: bool) -> None:
    """
    Blocks and leases stay until the worker has reported the load; then both go.
    """
    engine = whole(second=second)
    prompt, after = prompt_of(2 * CHUNK_TOKENS + 5), prompt_of(30 * BLOCK, 9)
    engine.ask("a", prompt)
    engine.wait_for(prompt)
    engine.forget_prefixes()
    with engine.held("_loading"):
        engine.add("b", prompt)
        engine.until(lambda: engine.half._pending)
        engine.abort("b")
        for _ in range(4):
            engine.step()
        assert engine.leases >= 2
        assert engine.free_blocks <= BLOCKS - 1 - 2 * CHUNK
        engine.add("c", after, 2)
        engine.answered("c", 2)
    engine.run()

    assert engine.answers["c"] == answer_to(after, 2)
    assert engine.ask("d", prompt) == answer_to(prompt, 4)
    engine.check_nothing_is_left()


@runners
@kinds
def test_a_load_that_fails_is_computed(whole: Whole, second: bool, windows: bool) -> None:
    """
    With a chunk damaged in the middle the answer is right, others go on meanwhile, and what was
    computed instead is stored.
    """
    engine = whole(second=second, windows=windows, verify="always")
    prompt, beside = prompt_of(3 * CHUNK_TOKENS + 5), prompt_of(70, 5)
    engine.ask("a", prompt)
    engine.wait_for(prompt)
    engine.forget_prefixes()
    engine.spoil(prompt, chunk=2)

    engine.add("beside", beside, 40)
    engine.answered("beside", 1)
    engine.add("b", prompt)
    engine.run()

    assert engine.answers["b"] == answer_to(prompt, 4)
    assert engine.answers["beside"] == answer_to(beside, 40)
    assert (engine.counts["failed_loads"], engine.counts["damaged_chunks"]) == (1, 1)
    engine.wait_for(prompt)
    engine.check_nothing_is_left()


@runners
def test_preempted_requests_come_back(whole: Whole, second: bool) -> None:
    """
    More requests than blocks: some lose theirs while steps of them and saves are under way, load or
    compute again, and answer as if nothing had been.
    """
    engine = whole(second=second)
    prompts = [prompt_of(9 * BLOCK - 3, seed) for seed in range(4)]
    for seed, prompt in enumerate(prompts):
        engine.add(f"{seed}", prompt, 3 * BLOCK)
    preempted = 0
    while engine.busy:
        engine.step()
        preempted += sum(r.num_preemptions > 0 for r in engine.scheduler.waiting)

    assert preempted
    for seed, prompt in enumerate(prompts):
        assert engine.answers[f"{seed}"] == answer_to(prompt, 3 * BLOCK)
    engine.check_nothing_is_left()


@runners
@kinds
@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens(whole: Whole, second: bool, windows: bool, seed: int) -> None:
    """
    Two engines, requests that share prefixes, aborts, damage, copies that are late, few blocks: in
    any order every page that is read is right, every answer too, and nothing is held at the end.
    """
    chance = random.Random(seed)
    engines = [whole(second=second, windows=windows, verify="always") for _ in range(2)]
    roots = [prompt_of(chance.randrange(140, 500), 50 + i) for i in range(3)]
    wanted: dict[str, list[int]] = {}
    with ExitStack() as held:
        for number in range(24):
            engine, name = chance.choice(engines), f"{number}"
            root = chance.choice(roots)
            prompt = root[: chance.randrange(60, len(root))] + prompt_of(chance.randrange(90))
            count = chance.randrange(1, 60)
            engine.add(name, prompt, count)
            wanted[name] = answer_to(prompt, count)
            what = chance.randrange(8)
            if what == 0:
                held.enter_context(engine.held(chance.choice(["_loading", "_saving"])))
            elif what == 1:
                held.close()
            elif what == 2 and not any(each.half._pending for each in engines):
                engine.spoil(root, chunk=0)
            elif what == 3:
                name = chance.choice(sorted(wanted))
                for each in engines:
                    each.abort(name)
            for _ in range(chance.randrange(12)):
                chance.choice(engines).step()
    for engine in engines:
        engine.run()
        for name, said in engine.answers.items():
            assert said == wanted[name][: len(said)]
            assert len(said) == len(wanted[name]) or name in engine.aborted
        engine.check_nothing_is_left()
