# SPDX-License-Identifier: Apache-2.0
"""
The spec's half in a worker: copies that vLLM's stock connector asks for, off the forward path.

A load reads what the manager holds until all workers have said that they are done: it is certain. A
save that fails is a miss later, and reported as done: the connector takes any other answer for the
end of the engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from vllm.v1.kv_offload.base import GPULoadStoreSpec, OffloadingWorker, TransferResult

from . import offload_plan
from .attach import Attachment
from .memory import Memory
from .messages import ChunkPages, Era, Save
from .offload_specs import LoadSpec, StoreSpec, name_of
from .pages import Pieces
from .places import Atlases, Borrowed
from .rendezvous import Answer, Listener
from .saver import Saver
from .settings import LOGGER
from .stats import Stats

log = logging.getLogger(LOGGER)


class CannotLoad(Exception):
    """A load that was promised cannot be done."""


class Worker(OffloadingWorker):
    """
    The pool, as the stock connector's worker sees it.

    Args:
        memory: Where chunks go to and come from.
        attachment: The way to the pool.
        era: What hashes mean.
        engine_id: The engine's.
        rank: This worker's.
    """

    def __init__(
        self, memory: Memory, attachment: Attachment, era: Era, *, engine_id: str, rank: int
    ) -> None:
        self._memory: Final = memory
        self._attachment: Final = attachment
        self._era: Final = era
        self._saver: Final = Saver(memory, Stats())
        self._loading: Final = ThreadPoolExecutor(1, "cenote load")
        self._expediting: Final = ThreadPoolExecutor(1, "cenote load now")
        self._saving: Final = ThreadPoolExecutor(1, "cenote save")
        self._atlases: Final = Atlases()
        self._pending: set[int] = set()
        self._finished: list[TransferResult] = []
        self._changed: Final = threading.Condition()
        groups = range(len(memory.layouts))
        attachment.want([memory.manifest(era, group) for group in groups])
        self._listener: Final = Listener(engine_id, rank, self._answer)

    def _answer(self) -> Answer:
        """Say what this worker's chunks are, and where."""
        pool = self._attachment.pool
        return Answer(
            pool.pool_id if pool is not None else b"",
            (self._era.hash_algorithm, self._era.hash_seed),
            self._memory.chunk_tokens,
            self._memory.fields,
            tuple(layout.nbytes for layout in self._memory.layouts),
        )

    # ---- jobs ------------------------------------------------------------------------------------

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: StoreSpec) -> bool:
        """Begin to store chunks."""
        ready = self._memory.copier.computed()
        self._submit(self._saving, job_id, self._store, src_spec, dst_spec, ready)
        return True

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        """Open chunks, and begin to load them."""
        try:
            opened = self._opened(src_spec, dst_spec)
        except Exception as error:  # what ends the engine must be in its log
            log.critical(
                "cenote: vLLM's OffloadingConnector ends this engine now, for it cannot go on "
                "without a load that it was promised: %s. Serve with CenoteConnector, which "
                "computes instead",
                error,
                exc_info=not isinstance(error, CannotLoad),
            )
            self._report(TransferResult(job_id, success=False))
            return True
        threads = self._expediting if expedited else self._loading
        self._submit(threads, job_id, self._load, opened)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Return the jobs that have ended since the last call."""
        with self._changed:
            finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Return when none of these jobs is under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending.isdisjoint(job_ids))

    def shutdown(self) -> None:
        """Let the copies under way end, then detach."""
        self._listener.close()
        for threads in (self._loading, self._expediting, self._saving):
            threads.shutdown(wait=True, cancel_futures=True)
        self._memory.copier.close()
        self._attachment.close()

    def _submit(
        self, threads: ThreadPoolExecutor, job_id: int, call: Callable[..., int], *args: Any
    ) -> None:
        with self._changed:
            self._pending.add(job_id)
        threads.submit(self._run, job_id, call, *args)

    def _run(self, job_id: int, call: Callable[..., int], *args: Any) -> None:
        started_s = time.perf_counter()
        result = TransferResult(job_id, success=False)
        try:
            nbytes = call(*args)
            spent_s = time.perf_counter() - started_s
            result = TransferResult(job_id, True, nbytes, spent_s)
        except Exception:
            log.critical(
                "cenote: a load failed, and vLLM's OffloadingConnector ends this engine for it. "
                "Serve with CenoteConnector, which computes instead",
                exc_info=True,
            )
        finally:
            self._report(result)

    def _report(self, result: TransferResult) -> None:
        with self._changed:
            self._pending.discard(result.job_id)
            self._finished.append(result)
            self._changed.notify_all()

    # ---- loads -----------------------------------------------------------------------------------

    def _opened(self, source: LoadSpec, target: GPULoadStoreSpec) -> list[tuple[Borrowed, Pieces]]:
        """Find the chunks of a job, and where their pages go."""
        pool = self._attachment.pool
        atlas = self._atlases.of(pool) if pool is not None else None
        if atlas is None or atlas.pool_id != source.pool_id:
            raise CannotLoad(
                "it was planned in a pool that this worker is not attached to: was the daemon "
                "started anew in this very moment?"
            )
        opened: list[tuple[Borrowed, Pieces]] = []
        for group, blocks, first in _groups(target):
            wanted = [each for each in source.chunks if each.group == group]
            layout = self._memory.layouts[group]
            own = self._own_namespace(source, group) if wanted else 0
            targets = offload_plan.loaded(blocks, first, len(wanted), layout.blocks)
            for each, pages in zip(wanted, targets, strict=True):
                chunk = atlas.borrow(each.places[own])
                if chunk is None or chunk.nbytes != layout.nbytes:
                    raise CannotLoad("a chunk is not where the scheduler holds it")
                opened.append((chunk, layout.pieces(pages)))
        return opened

    def _own_namespace(self, source: LoadSpec, group: int) -> int:
        """Return which of a group's namespaces is this worker's."""
        own = name_of(self._memory.manifest(source.era, group))
        if own not in source.names[group]:
            raise CannotLoad(
                "the scheduler promised chunks of other bytes than this worker's: does another "
                "engine on this host have the same engine_id?"
            )
        return source.names[group].index(own)

    def _load(self, opened: Sequence[tuple[Borrowed, Pieces]]) -> int:
        nbytes = 0
        for borrowed, pieces in opened:
            chunk: Any = borrowed  # all that a copier wants of one
            self._memory.copier.load(chunk, pieces, verify=False)
            nbytes += int(pieces.lengths[pieces.addresses != 0].sum())
        return nbytes

    # ---- saves -----------------------------------------------------------------------------------

    def _store(self, source: GPULoadStoreSpec, target: StoreSpec, ready: Any) -> int:
        """Store what is there as a whole. Nothing that goes wrong is more than a miss later."""
        nbytes = 0
        try:
            for group, save in _saves(source, target, self._memory):
                if self._saver.save(target.era, save, ready):
                    nbytes += self._memory.layouts[group].nbytes
        except Exception:
            log.exception("cenote: chunks are not saved, they will be computed again; report this")
        return nbytes


def _groups(spec: GPULoadStoreSpec) -> Iterable[tuple[int, list[int], int]]:
    """Yield each group, its blocks, and the place of the first of them in its request."""
    split = offload_plan.split(spec.block_ids, spec.group_sizes)
    for group, (blocks, first) in enumerate(zip(split, spec.block_indices, strict=True)):
        yield group, blocks, int(first)


def _saves(
    source: GPULoadStoreSpec, target: StoreSpec, memory: Memory
) -> Iterable[tuple[int, Save]]:
    """Yield what is to be stored, as the saver takes it."""
    for group, blocks, first in _groups(source):
        wanted = [each for each in target.chunks if each.group == group]
        places = offload_plan.stored(blocks, first, len(wanted), memory.layouts[group].blocks)
        for number, (each, pages) in enumerate(zip(wanted, places, strict=True)):
            if pages is not None:
                yield (
                    group,
                    Save(
                        number,
                        ChunkPages(each.key, group, pages),
                        each.parent,
                        each.position,
                        target.priority,
                        target.ttl_s,
                    ),
                )
