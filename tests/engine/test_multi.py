# SPDX-License-Identifier: Apache-2.0
"""CenoteConnector as the child of vLLM's own MultiConnector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.engine.engines import Connector, Engine, cenote_connector
from tests.engine.nursery import Nursery
from tests.engine.pools import damage, region_of, store, stored, watching
from tests.engine.processes import NEXT
from tests.engine.prompts import prompt_of

Engines = Callable[..., Engine]
Models = Callable[..., Path]
Daemons = Callable[..., Any]
MIB = 1 << 20


def multi_connector(*children: Connector, **more: Any) -> Connector:
    """kv_transfer_config of vLLM's MultiConnector."""
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [dict(child) for child in children]},
        **more,
    }


def check_shares(first: Engine, second: Engine, daemon: Any) -> None:
    """What one stores the other loads, and vLLM is told what was counted."""
    prompt = prompt_of(700)
    with watching(daemon.socket) as pool:
        store(first, pool, [prompt], 2)
    said = second.ask(prompt, max_tokens=4)
    first.ask(prompt_of(20), max_tokens=2)  # a step takes the counters along

    assert said.cached == 512
    assert first.stats()["vllm:cenote_saves"] == 2
    assert second.stats()["vllm:cenote_loads"] == 1


def test_engines_below_a_multi_connector_share(
    engines: Engines, model: Models, cenoted: Daemons
) -> None:
    """
    With counters: vLLM makes them of what the scheduler's process sent by the name of the class.
    """
    daemon = cenoted(size="64MiB")
    connector = multi_connector(cenote_connector(daemon.socket))
    check_shares(
        engines(model(), connector=connector), engines(model(), connector=connector), daemon
    )


@pytest.mark.skipif(not NEXT.exists(), reason=f"no newer vLLM at {NEXT}")
def test_engines_of_the_newer_release_share(
    tmp_path: Path, model: Models, cenoted: Daemons
) -> None:
    """
    The same.
    """
    daemon = cenoted(size="64MiB")
    connector = multi_connector(cenote_connector(daemon.socket))
    with Nursery(tmp_path, newer=True) as newer:
        first, second = (newer.start(model(), connector=connector) for _ in range(2))
        check_shares(first, second, daemon)
        for engine in (first, second):
            engine.stop()


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_the_outer_policy_counts_and_is_warned_of(
    engines: Engines, model: Models, cenoted: Daemons, policy: str
) -> None:
    """
    A damaged chunk is computed only if the MultiConnector itself says so; an engine whose requests
    may fail says at its start how to prevent it.
    """
    daemon = cenoted(size="64MiB", medium="memfd")
    child = cenote_connector(daemon.socket, verify="always")
    engine = engines(model(), connector=multi_connector(child, kv_load_failure_policy=policy))
    warned = "kv_load_failure_policy of the MultiConnector" in engine.log()
    prompt = prompt_of(1024)
    with watching(daemon.socket) as pool:
        store(engine, pool, [prompt], 4)
        damage(pool, stored(pool)[2], region_of(daemon.pid, 64 * MIB))
    said = engine.ask(prompt, max_tokens=4)

    assert warned == (policy == "fail")
    assert said.finish == ("length" if policy == "recompute" else "error")
    assert engine.ask(prompt_of(300, seed=1), max_tokens=4).finish == "length"
