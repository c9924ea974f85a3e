# SPDX-License-Identifier: Apache-2.0
"""Sliding windows are shared by their own rule; models with a running state are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engines import Engine, EngineFailed, cenote_connector
from tests.engine.pools import chunks_of, store, wait_until, watching
from tests.engine.prompts import prompt_of

Engines = Callable[..., Engine]
Models = Callable[..., Path]
Daemons = Callable[..., Any]


@pytest.mark.parametrize(
    ("kind", "window"),
    [("gemma3", 256), pytest.param("gemma3", 700, marks=pytest.mark.slow), ("mistral", 300)],
)
def test_windows(engines: Engines, model: Models, cenoted: Daemons, kind: str, window: int) -> None:
    """
    A hybrid of full attention and sliding window, and a model of windows alone: another engine
    loads what one stored, and says what it would have said.
    """
    daemon = cenoted(size="128MiB")
    connector = cenote_connector(daemon.socket, verify="always")
    at = model(kind, window=window)
    one, other, oracle = (
        engines(at, connector=connector),
        engines(at, connector=connector),
        engines(at),
    )
    prompts = [prompt_of(n, seed=n) for n in (300, 700, 1024, 1500, 2100)]
    with watching(daemon.socket) as pool:
        for i, prompt in enumerate(prompts):  # one by one: none is cut within a chunk
            store(one, pool, [prompt], len(one.groups) * chunks_of(prompts[: i + 1]))

    for prompt in prompts:
        assert other.reset()
        said = other.ask(prompt, max_tokens=12)
        assert said.cached == (len(prompt) - 1) // 256 * 256
        held = said.cached
        assert oracle.reset()
        oracle.ask(prompt[:held], max_tokens=1)
        assert said.tokens == oracle.ask(prompt, max_tokens=12).tokens


def test_a_window_whose_pages_are_gone_ends_the_hit(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    A prompt that grew by decoding has no window pages of its middle: the hit ends where a window
    is whole, and the tokens are right.
    """
    daemon = cenoted(size="128MiB")
    connector = cenote_connector(daemon.socket, verify="always")
    at = model("gemma3", window=128)
    one, other, oracle = (
        engines(at, connector=connector),
        engines(at, connector=connector),
        engines(at),
    )
    prompt = prompt_of(600)
    grown = one.generate([prompt], max_tokens=700).one.tokens
    assert wait_until(one.reset)
    longer = [*prompt, *grown]
    said = other.ask(longer, max_tokens=8)
    again = oracle.ask(longer, max_tokens=8)

    assert said.cached % 256 == 0
    assert said.tokens == again.tokens


@pytest.mark.parametrize("kind", ["mamba2", "falcon_h1"])
def test_models_with_a_running_state_are_refused(
    engines: Engines, model: Models, cenoted: Daemons, kind: str
) -> None:
    """
    The engine does not start, and says why, and what to do.
    """
    connector = cenote_connector(cenoted(size="64MiB").socket)

    with pytest.raises(EngineFailed, match=r"cannot share this model's KV cache"):
        engines(model(kind, seed=None), connector=connector)


def test_what_is_stored_of_a_hybrid_is_apart(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    Each group of layers has a namespace and chunks of its own.
    """
    daemon = cenoted(size="64MiB")
    engine = engines(model("gemma3"), connector=cenote_connector(daemon.socket))
    with watching(daemon.socket) as pool:
        store(engine, pool, [prompt_of(600)], 4)
        assert pool.stats().namespaces >= 2
