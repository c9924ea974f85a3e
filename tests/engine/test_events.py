# SPDX-License-Identifier: Apache-2.0
"""KV events: what a router hears of the pool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engine.engines import Engine, cenote_connector
from tests.engine.pools import store, wait_until, watching
from tests.engine.prompts import prompt_of

Engines = Callable[..., Engine]
Models = Callable[..., Path]
Daemons = Callable[..., Any]


def of_pool(engine: Engine) -> list[dict[str, Any]]:
    """The events that tell of the pool, in their order."""
    return [e["event"] for e in engine.events() if e["event"].get("medium") == "CPU"]


def test_stored_blocks_are_announced_with_tokens_and_parent(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    Every block of a stored chunk is announced once, on medium CPU, with its tokens, its parent and
    its size; an engine that finds chunks of another one announces them, too.
    """
    daemon = cenoted(size="64MiB")
    connector = cenote_connector(daemon.socket)
    prompt = prompt_of(600)
    engine = engines(model(), connector=connector, events=True)
    with watching(daemon.socket) as pool:
        store(engine, pool, [prompt], 2)
    engine.ask(prompt_of(20), max_tokens=1)  # a step takes the events along
    events = wait_until(lambda: len(found := of_pool(engine)) >= 2 and found)
    other = engines(model(), connector=connector, events=True)
    other.ask(prompt, max_tokens=2)
    seen = wait_until(lambda: len(found := of_pool(other)) >= 2 and found)

    for found in (events, seen):
        assert [e["type"] for e in found] == ["BlockStored"] * 2
        assert [t for e in found for t in e["token_ids"]] == prompt[:512]
        assert {e["block_size"] for e in found} == {32}
        assert found[0].get("parent_block_hash") is None
        assert found[1]["parent_block_hash"] == found[0]["block_hashes"][-1]
        assert len({h for e in found for h in e["block_hashes"]}) == 16


def test_what_leaves_the_pool_is_withdrawn(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    Chunks that the pool evicts, whoever filled it, are withdrawn block by block: in the end what
    was announced and not withdrawn is what is there.
    """
    daemon = cenoted(size="16MiB")
    connector = cenote_connector(daemon.socket)
    engine = engines(model(), connector=connector, events=True)
    other = engines(model(), connector=connector)
    for seed in range(6):
        engine.ask(prompt_of(1100, seed=seed), max_tokens=1)
    for seed in range(6, 24):
        other.ask(prompt_of(1100, seed=seed), max_tokens=1)
    with watching(daemon.socket) as pool:
        assert pool.stats().evictions > 24

    def agree() -> bool:
        engine.ask(prompt_of(20), max_tokens=1)  # a step takes the events along
        counted: dict[int, int] = {}
        for event in of_pool(engine):
            for each in event["block_hashes"]:
                counted[each] = counted.get(each, 0) + (1 if event["type"] == "BlockStored" else -1)
        assert set(counted.values()) <= {0, 1}
        return sum(counted.values()) == 0

    wait_until(agree)
