# SPDX-License-Identifier: Apache-2.0
"""Errors that nobody thought of, in copies: all is answered, nothing is torn, nobody waits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.unit.test_vllm_copies import (
    ERA,
    LAYERS,
    LOADED,
    STORED,
    Memory,
    key,
    load_of,
    save_all,
    save_of,
)
from tests.unit.vllm_bed import FULL

from cenote.client import Pool
from cenote.client.adapters.vllm.copier import CudaCopier
from cenote.client.adapters.vllm.groups import Shape
from cenote.client.adapters.vllm.loader import Loader
from cenote.client.adapters.vllm.messages import StepDone, StepWork
from cenote.client.adapters.vllm.saver import Saver
from cenote.client.adapters.vllm.settings import Settings
from cenote.client.adapters.vllm.stats import Stats
from cenote.client.adapters.vllm.worker import Finished, Worker
from cenote.client.testing import MemoryHost

ERRORS = [RuntimeError("CUDA error"), ValueError("priority"), MemoryError(), OSError(5, "EIO")]


@pytest.fixture
def pool() -> Iterator[Pool]:
    """At the end nothing is granted, leased or contradictory."""
    with MemoryHost("16MiB", checksum="commit") as host:
        pool = host.connect()
        yield pool
        assert pool.leases == 0
        assert host.audit() == 0


@pytest.fixture
def memory(pool: Pool) -> Memory:
    return Memory(pool)


class Fails:
    """In place of a function: raises at its n-th call, and does what it did at the others."""

    def __init__(self, usual: Any, error: Exception, at: int) -> None:
        self.usual, self.error, self.left = usual, error, at

    def __call__(self, *args: Any, **more: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise self.error
        return self.usual(*args, **more)


class Way:
    """An attachment that nobody asks."""

    pool = None

    def close(self) -> None:
        """Nothing is to be done."""


def worker_of(memory: Memory | None, transfer: str = "chunks") -> Worker:
    """A worker whose engine has registered its pages; None: not yet, or not any more."""
    way: Any = Way()
    known: Any = memory
    settings = Settings.parse({"transfer": transfer})
    worker = Worker(settings, Shape.of((FULL,), 4, 8), {}, way)
    worker._layers = LAYERS if transfer == "layers" else ()
    if memory is not None:
        worker._memory = known
        worker._loader = Loader(known, "first", worker.stats)
        worker._saver = Saver(known, worker.stats)
    return worker


def ended(worker: Worker) -> Finished:
    """What it reports once nothing is copied any more."""
    with worker._changed:
        worker._changed.wait_for(lambda: worker._pending == 0)
    return worker.finished(idle=False)


def step(worker: Worker, work: StepWork) -> Finished:
    """What vLLM calls in one step."""
    worker.begin(work)
    worker.start_loads(work)
    for layer in LAYERS:
        worker.wait_for_layer(layer)
        worker.save_layer(layer, work)
    worker.start_saves(work)
    return ended(worker)


# ---- saves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("transfer", ["chunks", "layers"])
@pytest.mark.parametrize("where", ["match", "put", "copy"])
def test_a_save_that_fails_is_answered_like_any_other(
    memory: Memory,
    monkeypatch: pytest.MonkeyPatch,
    transfer: str,
    where: str,
    error: Exception,
) -> None:
    """
    The second of three: its blocks are let go, the others are stored, and it is not torn.
    """
    saves = [save_of(i, blocks) for i, blocks in STORED]
    cache = memory.only()
    failing = {"match": "match", "put": "put"}.get(where)
    if failing is not None:
        at = Fails(getattr(cache, failing), error, 2)
        stand_in = type("Stand", (), {"match": cache.match, "put": cache.put, failing: at})
        memory.caches[0] = stand_in()
    else:
        monkeypatch.setattr(memory.copier, "save", Fails(memory.copier.save, error, 2))
    worker = worker_of(memory, transfer)
    said = step(worker, StepWork(ERA, [], saves)).step

    cache.flush()
    assert said.saved == {saves[0].number: 1, saves[2].number: 1}
    assert said.unsaved == {saves[1].number: 1}
    assert [cache.match(key(i)) for i in range(3)] == [1, 0, 1]
    assert worker.stats.take()["failed_saves"] == 1
    worker.close()


def test_a_commit_that_fails_leaves_the_others_answered(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Layer by layer, where all chunks are committed together.
    """
    saves = [save_of(i, blocks) for i, blocks in STORED]
    saver: Any = Saver(memory, Stats())  # type: ignore[arg-type]
    saver.begin(ERA, saves)
    for layer in LAYERS:
        saver.layer(layer, None)
    put = saver._open[1].put

    class Broken:
        nbytes = put.nbytes
        abort = put.abort

        def commit(self) -> None:
            raise RuntimeError("nobody knows")

    saver._open[1].put = Broken()
    assert [stored for _, stored in saver.end()] == [True, False, True]
    memory.only().flush()
    assert [memory.only().match(key(i)) for i in range(3)] == [1, 0, 1]


@pytest.mark.parametrize("transfer", ["chunks", "layers"])
def test_an_engine_that_has_forgotten_its_pages_is_answered(transfer: str) -> None:
    """
    Work that comes all the same: nothing is stored, all loads are computed, nobody waits.
    """
    worker = worker_of(None, transfer)
    save, load = save_of(0), load_of((0, (8, 9)), in_step=transfer == "layers")
    said = step(worker, StepWork(ERA, [load], [save]))

    assert said.step.unsaved == {save.number: 1}
    assert (said.failed, said.bad_blocks) == ({"r"}, {8, 9})
    assert said.step.failed == {"r"}
    assert (said.loaded or said.step.in_step) == {"r"}
    worker.close()


# ---- loads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [1, 2, 5, 9])
@pytest.mark.parametrize("transfer", ["chunks", "layers"])
def test_a_load_that_fails_is_computed_and_nobody_waits_for_a_layer(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, transfer: str, at: int, error: Exception
) -> None:
    """
    Wherever it fails, in the middle of a layer, too: the step goes on.
    """
    save_all(memory, *STORED)
    calls = 9 if transfer == "layers" else 3
    at = min(at, calls)
    monkeypatch.setattr(memory.copier, "load", Fails(memory.copier.load, error, at))
    worker = worker_of(memory, transfer)
    load = LOADED._replace(in_step=transfer == "layers")
    said = step(worker, StepWork(ERA, [load], []))

    assert said.bad_blocks == set(range(8, 14))
    assert said.step.failed == {"r"}
    assert (said.loaded or said.step.in_step) == {"r"}
    assert step(worker, StepWork(ERA)).step == StepDone()
    worker.close()


def test_every_layer_is_told_once_where_one_fails(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The engine waits for the very layer that failed.
    """
    save_all(memory, *STORED)
    fails = Fails(memory.copier.load, RuntimeError("CUDA error"), 4)
    monkeypatch.setattr(memory.copier, "load", fails)
    told: list[str] = []
    loader = Loader(memory, "never", Stats())  # type: ignore[arg-type]
    assert loader.load_layers(ERA, LOADED, LAYERS, told.append) == set(range(8, 14))
    assert told == list(LAYERS)


# ---- a GPU ---------------------------------------------------------------------------------------


def test_a_submission_that_fails_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A part of it may have been submitted: it must not run into memory that others have by then.
    """
    said: list[str] = []

    class Stream:
        def __init__(self, *_args: Any, **_options: Any) -> None:
            """A stream that only notes who waits for it."""

        @staticmethod
        def priority_range() -> tuple[int, int]:
            return 0, -1

        def synchronize(self) -> None:
            said.append("waited")

    def submit(*_tensors: Any) -> None:
        said.append("submitted")
        raise RuntimeError("CUDA error")

    def anything(*_args: Any) -> Any:
        return contextlib.nullcontext()

    cuda = SimpleNamespace(Stream=Stream, device=anything, stream=anything)
    torch = SimpleNamespace(cuda=cuda, from_numpy=lambda array: array)
    monkeypatch.setitem(sys.modules, "torch", torch)
    vllm = SimpleNamespace(_custom_ops=SimpleNamespace(swap_blocks_batch=submit))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    copier = CudaCopier("cuda:0")
    one = np.ones(1, np.int64)
    with pytest.raises(RuntimeError, match="CUDA"):
        copier._copy(copier._loads, one, one, one, one)
    assert said == ["submitted", "waited"]
