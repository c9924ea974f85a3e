# SPDX-License-Identifier: Apache-2.0
"""What the other tests of engines rest on: equal tokens at every start, deaths that are seen."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tests.engine.engines import Engine, EngineFailed, example_connector
from tests.engine.processes import wait_gone
from tests.engine.prompts import prompt_of

SLOW = pytest.mark.slow  # by hand: an engine more each
Engines = Callable[..., Engine]
Models = Callable[..., Path]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
@pytest.mark.parametrize("kind", ["llama", "gemma3", pytest.param("mistral", marks=SLOW)])
def test_tokens_are_those_of_every_start(
    engines: Engines, model: Models, kind: str, dtype: str
) -> None:
    """
    Two engines give the same tokens, each before and after its prefix cache was reset, and from it.
    """
    prompt, found = prompt_of(700), []
    for _ in range(2):
        engine = engines(model(kind), dtype=dtype)
        cold = engine.ask(prompt, max_tokens=12)
        hit = engine.ask(prompt, max_tokens=12)
        assert engine.reset()
        again = engine.ask(prompt, max_tokens=12)
        assert (cold.cached, hit.cached, again.cached) == (0, 672, 0)
        found += [cold.tokens, hit.tokens, again.tokens]
        engine.stop()

    assert len(set(found)) == 1, found


@pytest.mark.parametrize(
    "kind",
    ["llama", pytest.param("qwen2", marks=SLOW), "gemma3", pytest.param("mistral", marks=SLOW)],
)
def test_tokens_depend_on_what_lies_far_behind(engines: Engines, model: Models, kind: str) -> None:
    """
    Another block of 32 tokens anywhere within reach of the model changes what it says: so a block
    of KV with wrong bytes would show.
    """
    engine = engines(model(kind))
    prompt = prompt_of(400)
    expected = engine.ask(prompt, max_tokens=16).tokens
    in_reach = range(0, 384, 64) if kind != "mistral" else range(192, 384, 64)

    same = [
        at
        for at in in_reach
        if engine.ask(
            [*prompt[:at], *prompt_of(32, seed=9), *prompt[at + 32 :]], max_tokens=16
        ).tokens
        == expected
    ]

    assert not same


def test_a_start_as_vllm_does_it_gives_the_same_tokens(
    engines: Engines, model: Models, tmp_path: Path
) -> None:
    """
    An engine out of the nursery and one whose three processes vLLM itself starts say the same.
    """
    prompt = prompt_of(700)
    forked = engines(model()).ask(prompt, max_tokens=12)
    with Engine.start(model(), folder=tmp_path) as engine:
        spawned = engine.ask(prompt, max_tokens=12)
        engine.stop()

    assert forked.tokens == spawned.tokens


def test_groups_of_a_hybrid_are_apart(engines: Engines, model: Models) -> None:
    """
    Sliding window and full attention in one model make two groups of the KV cache.
    """
    groups = engines(model("gemma3", window=128)).groups

    assert {(g.kind, len(g.layers), g.window) for g in groups} == {
        ("SlidingWindowSpec", 2, 128),
        ("FullAttentionSpec", 2, None),
    }


@pytest.mark.parametrize("who", ["worker", "core"])
def test_a_killed_process_of_an_engine_is_an_error(
    engines: Engines, model: Models, who: str
) -> None:
    """
    When worker or scheduler dies, the request fails and says so; nothing of the engine stays.
    """
    engine = engines(model())
    engine.ask(prompt_of(64), max_tokens=1)
    engine.kill(who)

    with pytest.raises(EngineFailed, match="EngineDeadError"):
        engine.ask(prompt_of(64), max_tokens=1)
    engine.close()
    assert all(engine.wait_dead(name) for name in engine.pids)


def names_mapped(pids: Iterable[int]) -> set[Path]:
    """The names in /dev/shm that processes of vLLM have mapped."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {Path(found[1]) for line in lines if (found := re.search(r"(/dev/shm/psm_\S+)", line))}


def test_a_killed_engine_leaves_nothing(engines: Engines, model: Models) -> None:
    """
    After kill() no process and no name in /dev/shm is left of an engine.
    """
    engine = engines(model())
    names = names_mapped(engine.pids.values())
    assert names
    engine.kill()

    assert all(engine.wait_dead(name) for name in engine.pids)
    assert not [name for name in names if name.exists()]


@pytest.mark.parametrize("busy", [False, True])
def test_an_engine_ends_with_whoever_started_it(
    model: Models, tmp_path: Path, project_root: Path, busy: bool
) -> None:
    """
    SIGKILL of the process that uses an engine ends all of the engine, also within a request.
    """
    script = f"""
import sys
sys.path.append({str(project_root)!r})
from pathlib import Path
from tests.engine.nursery import Nursery
engine = Nursery(Path({str(tmp_path)!r})).start(Path({str(model())!r}))
if {busy}:
    engine.begin([[5] * 100], max_tokens=3000)
print(*engine.pids.values(), flush=True)
engine.collect(["r1"]) if {busy} else sys.stdin.read()
"""
    argv = [sys.executable, "-c", script]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        process.kill()

    assert wait_gone(pids)


def test_requests_can_be_begun_aborted_and_batched(engines: Engines, model: Models) -> None:
    """
    Prompts handed over together give what each gives alone; an aborted one ends as such.
    """
    engine = engines(model())
    prompts = [prompt_of(200, seed=seed) for seed in range(4)]
    alone = [engine.ask(prompt, max_tokens=8).tokens for prompt in prompts]
    assert engine.reset()
    together = engine.generate(prompts, max_tokens=8)
    (name,) = engine.begin([prompt_of(300)], max_tokens=2000)
    engine.abort([name])

    assert [answer.tokens for answer in together.answers] == alone
    assert engine.collect([name])[0].finish == "abort"
    assert engine.ask(prompts[0], max_tokens=8).tokens == alone[0]


def test_events_and_metrics_are_the_engines_own(engines: Engines, model: Models) -> None:
    """
    KV events say which blocks were stored, and the metrics count prompts and cache hits.
    """
    engine = engines(model(), events=True)
    engine.ask(prompt_of(96), max_tokens=1)
    engine.ask(prompt_of(96), max_tokens=1)
    events = engine.events(at_least=1)
    stats = engine.stats()

    assert {e["event"]["type"] for e in events} == {"BlockStored"}
    assert len(events[0]["event"]["block_hashes"]) == 3
    assert stats["vllm:prompt_tokens"] == 192
    assert stats["vllm:prefix_cache_hits"] == 64


def test_a_connector_of_vllms_own_loads_what_another_engine_saved(
    engines: Engines, model: Models, tmp_path: Path
) -> None:
    """
    The harness carries a connector: what one engine saved, another one has cached and says alike.
    """
    connector = example_connector(tmp_path)
    prompt = prompt_of(700)
    first = engines(model(), connector=connector)
    cold = first.ask(prompt, max_tokens=12)
    first.kill()
    second = engines(model(), connector=connector)
    warm = second.ask(prompt, max_tokens=12)

    assert cold.cached == 0
    assert warm.cached > 600
    assert warm.tokens == cold.tokens
