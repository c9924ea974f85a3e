# SPDX-License-Identifier: Apache-2.0
"""One code base for two releases of vLLM: checked against their own classes, and run on both."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engines import cenote_connector
from tests.engine.nursery import Nursery
from tests.engine.pools import chunks_of, damage, full, region_of, store, stored, watching
from tests.engine.processes import HERE, NEXT, PYTHON, engine_environment
from tests.engine.prompts import prompt_of

Models = Callable[..., Path]
Daemons = Callable[..., Any]
MIB = 1 << 20
needs_next = pytest.mark.skipif(
    not NEXT.exists(), reason=f"no newer vLLM at {NEXT}: run `make setup-vllm` on x86-64"
)


@pytest.mark.parametrize(
    ("newer", "release"), [(False, "0.32"), pytest.param(True, "0.33", marks=needs_next)]
)
def test_what_is_assumed_of_vllm_holds(newer: bool, release: str) -> None:
    """
    No abstract method is left, overrides take what their bases take, every hook is overridden or
    left for a reason, and every field that is read exists.
    """
    done = subprocess.run(
        [str(PYTHON), str(HERE / "check_release.py")],
        env=engine_environment(newer=newer),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["release"].startswith(release)
    assert said["wrong"] == []


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Where engines of the newer release come from."""
    with Nursery(tmp_path_factory.mktemp("newer"), newer=True) as made:
        yield made


@needs_next
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_engines_of_the_newer_release_share(
    newer: Nursery, model: Models, cenoted: Daemons, kind: str
) -> None:
    """
    What one stored the other loads, with the tokens of an engine without cenote; after kill -9 of
    one its successor hits at the first request.
    """
    daemon = cenoted(size="128MiB")
    connector = cenote_connector(daemon.socket, verify="always")
    one, oracle = newer.start(model(kind), connector=connector), newer.start(model(kind))
    prompts = [prompt_of(tokens, seed=tokens) for tokens in (300, 700, 1023, 1500)]
    with watching(daemon.socket) as pool:
        for i, prompt in enumerate(prompts):
            store(one, pool, [prompt], len(one.groups) * chunks_of(prompts[: i + 1]))
    one.kill()
    other = newer.start(model(kind), connector=connector)

    for prompt in prompts:
        said = other.ask(prompt, max_tokens=8)
        assert said.cached == full(prompt)
        assert oracle.reset()
        oracle.ask(prompt[: said.cached], max_tokens=1)
        assert said.tokens == oracle.ask(prompt, max_tokens=8).tokens
    for engine in (other, oracle):
        engine.stop()


@needs_next
@pytest.mark.parametrize("transfer", ["chunks", "layers"])
def test_a_damaged_chunk_on_the_newer_release(
    newer: Nursery, model: Models, cenoted: Daemons, transfer: str
) -> None:
    """
    It is computed again, whichever way it is loaded; a reset of the connector sees nothing.
    """
    daemon = cenoted(size="64MiB", medium="memfd")
    connector = cenote_connector(daemon.socket, verify="always", transfer=transfer)
    engine, oracle = newer.start(model(), connector=connector), newer.start(model())
    prompt = prompt_of(1024)
    with watching(daemon.socket) as pool:
        store(engine, pool, [prompt], 4)
        whole = engine.ask(prompt, max_tokens=8)
        assert engine.reset()
        damage(pool, stored(pool)[2], region_of(daemon.pid, 64 * MIB))
        said = engine.ask(prompt, max_tokens=8)
    expected = oracle.ask(prompt, max_tokens=8).tokens

    assert whole.cached >= 1023
    assert whole.tokens == said.tokens == expected
    assert engine.stats()["vllm:cenote_damaged_chunks"] == 1
    assert engine.reset(connector=True)
    assert engine.ask(prompt, max_tokens=1).cached == 0
    for each in (engine, oracle):
        each.stop()
