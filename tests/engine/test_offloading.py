# SPDX-License-Identifier: Apache-2.0
"""CenoteOffloadingSpec behind vLLM's stock OffloadingConnector, beside CenoteConnector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engines import Connector, Engine, EngineFailed, cenote_connector
from tests.engine.inside import run_inside
from tests.engine.pools import CHUNK, wait_for_chunks, wait_until, watching
from tests.engine.prompts import prompt_of

Engines = Callable[..., Engine]
Models = Callable[..., Path]
Daemons = Callable[..., Any]


def offloading_connector(socket_path: Path, **extra: Any) -> Connector:
    """kv_transfer_config of vLLM's own connector with our spec."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CenoteOffloadingSpec",
            "spec_module_path": "cenote.client.adapters.vllm",
            "socket": str(socket_path),
            **extra,
        },
    }


def test_manager_and_worker_without_an_engine(tmp_path: Path) -> None:
    """
    The tests of spec_*.py, in the environment that has vLLM, with the pytest of this one.
    """
    files = ["loads", "stores", "events", "refused", "resets"]
    run_inside(tmp_path, [f"spec_{name}.py" for name in files], ["spec_bed"])


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_both_connectors_share_chunks_both_ways(
    engines: Engines, model: Models, cenoted: Daemons, kind: str
) -> None:
    """
    What an engine with CenoteConnector stored, one with the stock connector and our spec loads, and
    the other way round; the tokens are those of an engine without either.
    """
    daemon = cenoted(size="256MiB")
    at = model(kind)
    ours = engines(at, connector=cenote_connector(daemon.socket))
    stock = engines(at, connector=offloading_connector(daemon.socket))
    plain = engines(at)
    groups = len(ours.groups)
    prompts = [prompt_of(3 * CHUNK + 90, seed=seed) for seed in (1, 2)]
    with watching(daemon.socket) as pool:
        for number, (writer, prompt) in enumerate(zip((ours, stock), prompts, strict=True)):
            writer.ask(prompt, max_tokens=1)
            writer.wait_until_idle()
            if groups == 1:
                wait_for_chunks(pool, 3 * (number + 1))

    for reader, prompt in zip((stock, ours), prompts, strict=True):
        said = reader.ask(prompt, max_tokens=8)
        assert said.cached == 3 * CHUNK
        assert plain.reset()
        plain.ask(prompt[: 3 * CHUNK], max_tokens=1)
        assert said.tokens == plain.ask(prompt, max_tokens=8).tokens


def test_an_engine_without_a_daemon_serves_and_attaches_later(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    Everything is computed until a daemon comes, and again when it has died, and shared again with
    the next one: the answers are the same throughout.
    """
    daemon = cenoted(size="64MiB")
    daemon.kill()
    engine = engines(model(), connector=offloading_connector(daemon.socket))
    prompt = prompt_of(2 * CHUNK + 40)
    tokens = engine.ask(prompt, max_tokens=4).tokens

    def cached() -> int:
        assert engine.reset()
        said = engine.ask(prompt, max_tokens=4)
        assert said.tokens == tokens
        return said.cached

    for _ in range(2):
        daemon = cenoted(size="64MiB", path=daemon.socket)
        wait_until(lambda: cached() == 2 * CHUNK)
        daemon.kill()
        wait_until(lambda: cached() == 0)


def test_after_a_reset_nothing_older_is_seen(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    Who resets the connector's cache computes anew, and finds what was stored since.
    """
    daemon = cenoted(size="64MiB")
    engine = engines(model(), connector=offloading_connector(daemon.socket))
    prompt = prompt_of(2 * CHUNK + 40)

    def cached(*, connector: bool = False) -> int:
        assert engine.reset(connector=connector)
        return engine.ask(prompt, max_tokens=4).cached

    wait_until(lambda: cached() == 2 * CHUNK)
    assert cached(connector=True) == 0
    wait_until(lambda: cached() == 2 * CHUNK)


def test_a_setting_that_means_nothing_here_ends_the_start(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    The engine does not start, and its log names the settings that there are.
    """
    daemon = cenoted(size="64MiB")
    connector = offloading_connector(daemon.socket, transfer="layers")
    with pytest.raises(EngineFailed, match=r"'transfer'.*blocks_per_chunk"):
        engines(model(), connector=connector)
