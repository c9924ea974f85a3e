# SPDX-License-Identifier: Apache-2.0
"""
What a reset means to the offloading spec: new keys, no new namespace, nothing old under a new key.

test_offloading.py runs this file under the vLLM environment's Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.spec_bed import BLOCK, CHUNK, Engine, context, gpu, keys_of, wait_until
from vllm.v1.kv_offload.base import LookupResult, ScheduleEndContext

from cenote.client.adapters.vllm import rendezvous

Engines = Callable[..., Engine]

RESETS = 5000  # a user has 1,024 namespaces, a pool 4,096


def namespaces(engine: Engine) -> int:
    return int(engine.manager._attachment.pool.stats().namespaces)


def test_a_reset_sees_nothing_any_more_and_ends_no_load(engines: Engines) -> None:
    """
    A load that is under way when somebody resets ends well, and its chunk is held until a later job
    says that all workers have opened it; what is stored from then on is found again.
    """
    engine = engines()
    engine.compute([1, 2, 3, 4], seed=1)
    engine.store(keys_of(1), [1, 2, 3, 4])
    spec = engine.promise(keys_of(1), context("r"))

    engine.manager.reset_cache()
    wait_until(lambda: engine.manager.ready)

    assert engine.look(keys_of(1)[0]) is LookupResult.MISS
    assert engine.leases == 1
    assert engine.run(lambda job: engine.worker.submit_load(job, spec, gpu([21, 22, 23, 24])))
    assert torch.equal(engine.pages([21, 22, 23, 24]), engine.pages([1, 2, 3, 4]))
    engine.store(keys_of(1), [1, 2, 3, 4])
    assert engine.leases == 0


def test_a_reset_before_anything_is_known_holds(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Who resets before the workers have answered sees nothing older either.
    """
    engines().store(keys_of(1), [1, 2, 3, 4])
    answered = threading.Event()

    def late(engine_id: str, rank: int) -> Any:
        if not answered.is_set():
            raise rendezvous.Unanswered("not yet")
        return ask(engine_id, rank)

    ask = rendezvous.ask
    monkeypatch.setattr(rendezvous, "ask", late)
    engine = engines()
    engine.manager.reset_cache()
    answered.set()
    wait_until(lambda: engine.manager.ready)
    assert engine.look(keys_of(1)[0]) is LookupResult.MISS


def test_a_reset_that_was_flushed_lets_go(engines: Engines) -> None:
    """
    vLLM 0.33 says when workers are done with what came before.
    """
    engine = engines()
    engine.store(keys_of(1), [1, 2, 3, 4])
    engine.promise(keys_of(1), context("r"))
    engine.manager.reset_cache()
    engine.manager.on_reset_flushed()
    assert engine.leases == 0


def test_resets_open_no_namespace_in_either_half(engines: Engines) -> None:
    """
    5,000 of them, a training step each; what is stored then is found, by this engine alone.
    """
    engine = engines()
    engine.store(keys_of(1), [1, 2, 3, 4])
    before = namespaces(engine)
    for _ in range(RESETS):
        engine.manager.reset_cache()
        assert engine.manager.ready
    assert engine.look(keys_of(1)[0]) is LookupResult.MISS
    engine.store(keys_of(2), list(range(1, 9)))
    assert namespaces(engine) == before

    other = engines()
    wait_until(lambda: other.look(keys_of(1)[0]) is LookupResult.HIT)
    assert other.look(keys_of(2)[1]) is LookupResult.MISS


def test_chunks_follow_each_other_under_their_new_keys(engines: Engines) -> None:
    """
    A parent is named as it is called since the reset.
    """
    engine, request = engines(), context("r")
    wait_until(lambda: engine.manager.ready)
    engine.manager.reset_cache()
    for place, key in enumerate(keys_of(3)):
        request.set_offload_key_position(key, (place + 1) * CHUNK * BLOCK)
    chunks = engine.manager.prepare_store(keys_of(3), request).store_spec.chunks
    assert [chunk.parent for chunk in chunks] == [None, *(chunk.key for chunk in chunks[:2])]
    assert {chunk.key for chunk in chunks}.isdisjoint(key[:-4] for key in keys_of(3))


@pytest.mark.parametrize("anew", ["looked up", "preempted", "scheduled for the first time"])
def test_a_request_that_keeps_its_blocks_stores_nothing_until_it_begins_anew(
    engines: Engines, anew: str
) -> None:
    """
    vLLM offers all of it again after a reset; what it holds was computed before. It begins anew
    where vLLM looks it up, or says that it was preempted, or that it has only now come.
    """
    engine, request = engines(), context("r")
    wait_until(lambda: engine.manager.ready)
    engine.manager.on_new_request(request)
    assert engine.manager.prepare_store(keys_of(1), request).keys_to_store == keys_of(1)
    engine.manager.reset_cache()
    for _ in range(2):
        engine.manager.on_schedule_end(ScheduleEndContext(("other",), ("another",)))
        assert engine.manager.prepare_store(keys_of(1), request).keys_to_store == []
    if anew == "looked up":
        assert engine.manager.lookup(keys_of(1)[0], request) is LookupResult.MISS
    elif anew == "preempted":
        engine.manager.on_schedule_end(ScheduleEndContext((), ("r",)))
    else:
        engine.manager.on_schedule_end(ScheduleEndContext(("r",), ()))
    assert engine.manager.prepare_store(keys_of(1), request).keys_to_store == keys_of(1)


def test_requests_that_are_over_are_not_remembered(engines: Engines) -> None:
    """
    Neither those that lived through a reset.
    """
    engine = engines()
    for name in "ab":
        engine.manager.on_new_request(context(name))
    engine.manager.on_request_finished(context("a"))
    engine.manager.reset_cache()
    assert engine.manager._outdated == {"b"}
    engine.manager.on_request_finished(context("b"))
    assert not engine.manager._known | engine.manager._outdated


def test_what_was_begun_before_a_reset_is_not_announced(engines: Engines) -> None:
    """
    Stored under its old key, or not yet seen there: this engine does not find it any more.
    """
    engine = engines(events=True)
    wait_until(lambda: engine.manager.ready)
    first, second = keys_of(2)
    output = engine.manager.prepare_store(keys_of(2), context("r"))
    source = gpu(list(range(1, 9)))
    assert engine.run(lambda job: engine.worker.submit_store(job, source, output.store_spec))
    engine.manager.complete_store({first}, context("r"))
    engine.manager.reset_cache()
    engine.manager.complete_store({second}, context("r"))
    assert [*engine.manager.take_events()] == []
    assert not engine.manager._announced._unsure

    engine.store([second], [1, 2, 3, 4])
    said: list[Any] = []

    def heard() -> list[Any]:
        said.extend(engine.manager.take_events())
        return said

    wait_until(heard)
    assert [(event.keys, event.removed) for event in said] == [([second], False)]
