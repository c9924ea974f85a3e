# SPDX-License-Identifier: Apache-2.0
"""
Sleep and wake-up, which vLLM has on GPUs alone: what its worker calls then (0.33), with real
tensors and a pool. test_connector.py runs this file under the vLLM environment's Python.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.connector_bed import CHUNK_TOKENS, Engine, answer_to
from tests.engine.spec_bed import CHUNK, wait_until
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.v1.kv_offload.base import OffloadingSpec, OffloadingWorker

from cenote.client.adapters.vllm.messages import Load, StepWork

Whole = Callable[..., Engine]
PROMPT = [3 + i % 700 for i in range(2 * CHUNK_TOKENS + 40)]


def planned(engine: Engine, prompt: list[int]) -> StepWork:
    """The first step that has work for the workers."""
    engine.add("p", prompt, max_tokens=1)
    while True:
        work = engine.scheduler.schedule().kv_connector_metadata
        assert isinstance(work, StepWork)
        if work.loads or work.saves:
            return work


def reported(engine: Engine, work: StepWork) -> Any:
    """Do a step as a model runner does; returns what is reported, once something is."""
    engine.worker.bind_connector_metadata(work)
    engine.worker.start_load_kv(None)
    engine.worker.wait_for_save()
    results = engine.worker.get_transfer_results(set())
    engine.worker.clear_connector_metadata()
    return results, engine.worker._ended


def wake(engine: Engine) -> None:
    """Give the memory back at its old place, empty, as vLLM does."""
    for tensor in engine.tensors.values():
        tensor.zero_()
    engine.worker.restore_kv_caches()


def test_an_engine_that_woke_up_loads_and_saves(whole: Whole) -> None:
    """
    Asleep and awake again, twice over and each call twice: what was stored before is loaded, and
    what is computed since is loaded by another engine.
    """
    engine, other = whole(), whole()
    assert engine.ask("a", PROMPT) == answer_to(PROMPT, 4)
    engine.wait_for(PROMPT)
    engine.forget_prefixes()
    for _ in range(2):
        for _ in range(2):
            engine.worker.unregister_kv_caches()
        wake(engine)
        engine.worker.restore_kv_caches()

    assert engine.ask("b", PROMPT) == answer_to(PROMPT, 4)
    assert engine.counts["loads"] == 1
    fresh = PROMPT[::-1]
    assert engine.ask("c", fresh) == answer_to(fresh, 4)
    engine.wait_for(fresh)
    assert other.ask("c", fresh) == answer_to(fresh, 4)

    assert other.counts["loads"] == 1
    for each in (engine, other):
        each.check_nothing_is_left()


@pytest.mark.parametrize("threads", ["_loading", "_saving"])
def test_the_memory_goes_when_no_copy_is_under_way(whole: Whole, threads: str) -> None:
    """
    unregister_kv_caches() returns once a copy that had begun is over.
    """
    engine = whole()
    if threads == "_loading":
        engine.ask("a", PROMPT)
        engine.wait_for(PROMPT)
    engine.forget_prefixes()
    work = planned(engine, PROMPT)
    asleep = threading.Event()

    def sleep() -> None:
        engine.worker.unregister_kv_caches()
        asleep.set()

    with engine.held(threads):
        reported(engine, work)
        assert engine.half._pending
        sleeping = threading.Thread(target=sleep)
        sleeping.start()
        assert not asleep.is_set()
        assert engine.half.registered
    sleeping.join()

    assert engine.half._pending == 0
    assert not engine.half.registered
    done = engine.half.finished(idle=False)
    assert done.loaded if threads == "_loading" else done.step.saved


def test_asleep_a_save_is_reported_as_not_done(whole: Whole) -> None:
    """
    Its blocks would be referenced for ever by an engine that hears nothing of it.
    """
    engine = whole()
    work = planned(engine, PROMPT)
    engine.worker.unregister_kv_caches()

    _, ended = reported(engine, work)

    assert ended.step.unsaved == {save.number: 1 for save in work.saves}
    assert ended.step.saved == {}
    assert engine.half.stats.take()["failed_saves"] == len(work.saves)


def test_asleep_a_load_is_reported_as_failed_and_writes_nothing(whole: Whole) -> None:
    """
    What the pages' addresses lead to is gone: a copy there would end the process.
    """
    engine = whole()
    engine.ask("a", PROMPT)
    engine.wait_for(PROMPT)
    engine.forget_prefixes()
    work = planned(engine, PROMPT)
    (load,) = work.loads
    assert isinstance(load, Load)
    engine.worker.unregister_kv_caches()
    before = {name: tensor.clone() for name, tensor in engine.tensors.items()}

    results, ended = reported(engine, work)
    wait_until(lambda: engine.half._pending == 0)

    assert results.finished_recving == {load.request}
    assert engine.worker.get_block_ids_with_load_errors() == {
        block for pages in load.chunks for block in pages.blocks
    }
    assert len(ended.bad_blocks) == 2 * CHUNK
    for name, tensor in engine.tensors.items():
        assert torch.equal(tensor, before[name])


def test_a_pool_that_comes_while_the_engine_sleeps_is_used_afterwards(whole: Whole) -> None:
    """
    The attachment tells a worker that has forgotten its memory, and nothing comes of it until then.
    """
    engine = whole()
    engine.worker.unregister_kv_caches()
    engine.half.pool_attached(engine.worker._attachment.pool)
    wake(engine)
    assert engine.ask("a", PROMPT) == answer_to(PROMPT, 4)
    engine.check_nothing_is_left()


def test_the_stock_connector_passes_nothing_on() -> None:
    """
    Its copies are over when an engine is paused, and a spec hears nothing of sleep: should that
    change, CenoteOffloadingSpec has something to do.
    """
    hooks = ("unregister_kv_caches", "restore_kv_caches")
    for spec in (OffloadingConnector, OffloadingSpec, OffloadingWorker):
        assert not set(hooks) & set(vars(spec))
