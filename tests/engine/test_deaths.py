# SPDX-License-Identifier: Apache-2.0
"""Engines and daemons that die, come late, or never come: nobody's client notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engines import Engine, cenote_connector
from tests.engine.pools import chunk_of, chunks_of, store, stored, wait_until, watching
from tests.engine.prompts import prompt_of

from cenote.client import Pool

Engines = Callable[..., Engine]
Models = Callable[..., Path]
Daemons = Callable[..., Any]


def check_every_chunk(pool: Pool) -> int:
    """Compare the checksum of all that is stored; return how many chunks there are."""
    chunks = [chunk for event in stored(pool) if (chunk := chunk_of(pool, event)) is not None]
    for chunk in chunks:
        chunk.verify()
        chunk.release()
    return len(chunks)


@pytest.mark.parametrize(
    "chunks",
    [pytest.param(1, marks=pytest.mark.slow), 7, pytest.param(20, marks=pytest.mark.slow)],
)
def test_an_engine_killed_while_it_saves(
    engines: Engines, model: Models, cenoted: Daemons, chunks: int
) -> None:
    """
    kill -9 of an engine that is storing: no chunk is torn, its memory returns, and a new engine
    hits what was stored at its first request.
    """
    daemon = cenoted(size="256MiB")
    connector = cenote_connector(daemon.socket, verify="always")
    prompts = [prompt_of(1100, seed=seed) for seed in range(16)]
    first = engines(model(), connector=connector)
    with watching(daemon.socket) as pool:
        first.begin(prompts, max_tokens=1)
        wait_until(lambda: pool.stats().chunks >= chunks)
        first.kill()
        wait_until(lambda: pool.stats().sessions == 1, pool.stats)  # ours
        stats = pool.stats()
        assert (stats.bytes_granted, stats.leases) == (0, 0)
        assert check_every_chunk(pool) == stats.chunks < chunks_of(prompts)
        head = next(event for event in stored(pool))
        assert head.nbytes > 0
    second = engines(model(), connector=connector)
    said = second.generate(prompts, max_tokens=8).answers
    oracle = engines(model())

    assert sum(answer.cached for answer in said) >= 256
    alone = [oracle.ask(prompt, max_tokens=8).tokens for prompt in prompts]
    assert [a.tokens for a in said] == alone


def test_an_engine_killed_while_it_loads(engines: Engines, model: Models, cenoted: Daemons) -> None:
    """
    kill -9 of an engine that is loading: its leases are gone, and a new one loads all of it.
    """
    daemon = cenoted(size="256MiB")
    connector = cenote_connector(daemon.socket, verify="always")
    prompts = [prompt_of(1100, seed=seed) for seed in range(16)]
    first = engines(model(), connector=connector)
    with watching(daemon.socket) as pool:
        store(first, pool, prompts, chunks_of(prompts))
        first.begin(prompts, max_tokens=4)
        wait_until(lambda: pool.stats().hits > 0)
        first.kill()
        wait_until(lambda: (pool.stats().sessions, pool.stats().leases) == (1, 0), pool.stats)
        assert check_every_chunk(pool) == chunks_of(prompts)
    second = engines(model(), connector=connector)

    assert second.ask(prompts[0], max_tokens=1).cached == 1024


def test_an_engine_without_a_daemon_serves_and_attaches_when_one_comes(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    The daemon may come after the engine: until then everything is computed.
    """
    early = cenoted(size="64MiB", medium="memfd")
    early.stop()
    engine = engines(model(), connector=cenote_connector(early.socket))
    prompt = prompt_of(700)
    assert engine.ask(prompt, max_tokens=1).cached == 0
    assert engine.reset()
    assert engine.ask(prompt, max_tokens=1).cached == 0
    assert "everything is computed until there is one" in engine.log()
    late = cenoted(size="64MiB", medium="memfd", path=early.socket)
    with watching(late.socket) as pool:
        wait_until(lambda: pool.stats().sessions == 3)  # scheduler, worker and we
        wait_until(lambda: _asked(engine, prompt_of(700, seed=1)) and pool.stats().chunks)
        wait_until(lambda: engine.reset() and engine.ask(prompt, max_tokens=1).cached == 512)


def _asked(engine: Engine, prompt: list[int]) -> bool:
    assert engine.reset()
    engine.ask(prompt, max_tokens=1)
    return True


def test_an_engine_outlives_its_daemon_and_finds_the_next(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    kill -9 of the daemon: requests go on without an error, from what is mapped or computed. A new
    daemon on the same socket is used without a word.
    """
    first = cenoted(size="128MiB", medium="memfd")
    engine = engines(model(), connector=cenote_connector(first.socket))
    oracle = engines(model())
    prompts = [prompt_of(700, seed=seed) for seed in range(6)]
    tokens = [oracle.ask(prompt, max_tokens=6).tokens for prompt in prompts]
    with watching(first.socket) as pool:
        store(engine, pool, prompts[:2], 4)
    first.kill()
    orphaned = [engine.ask(prompt, max_tokens=6).tokens for prompt in prompts]
    assert orphaned == tokens
    second = cenoted(size="128MiB", medium="memfd", path=first.socket)
    with watching(second.socket) as pool:
        wait_until(lambda: pool.stats().sessions == 3)
        wait_until(lambda: _asked(engine, prompts[5]) and pool.stats().chunks >= 2)
    assert engine.reset()
    again = engine.ask(prompts[5], max_tokens=6)

    assert again.cached == 512
    assert again.tokens == tokens[5]


def test_an_engine_goes_on_with_its_pool_when_the_daemon_was_killed(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    kill -9 of the daemon, then another one: what was stored before is loaded, and stored no more.
    """
    first = cenoted(size="128MiB", medium="memfd", keep=True)
    engine = engines(model(), connector=cenote_connector(first.socket))
    prompt = prompt_of(700)
    with watching(first.socket) as pool:
        store(engine, pool, [prompt], 2)
    first.kill()
    second = cenoted(size="128MiB", medium="memfd", path=first.socket, pool=first.pool, keep=True)
    with watching(second.socket) as pool:
        assert pool.stats().chunks == 2
        assert engine.reset()
        assert engine.ask(prompt, max_tokens=1).cached == 512
        assert pool.stats().commits == 2
    assert second.events("pool_taken_over")[0]["chunks"] == 2
