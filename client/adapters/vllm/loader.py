# SPDX-License-Identifier: Apache-2.0
"""
From the pool into the engine's pages: one request's chunks, whole or layer by layer.

A chunk is leased while it is copied. One that is absent, damaged or of another length ends the
load: what came before it is good, the rest is computed.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cenote.client.errors import CenoteError, ChunkLost

from .memory import Memory
from .messages import ChunkPages, Era, Load
from .settings import LOGGER
from .stats import Stats

if TYPE_CHECKING:
    from cenote.client import Cache, Chunk

log = logging.getLogger(LOGGER)

VERIFIED_MAX: Final = 1 << 16  # chunks remembered as compared


class LoadFailed(Exception):
    """A load ended early; `done` chunks of it are in place."""

    def __init__(self, done: int, why: str) -> None:
        super().__init__(why)
        self.done = done


@dataclass(frozen=True)
class Leased:
    """A chunk of a load, held, and where it goes."""

    number: int  # in the load
    cache: Cache
    chunk: Chunk
    pages: ChunkPages


class Loader:
    """
    Loads for one worker, from one thread.

    Args:
        memory: Where from and where to.
        verify: "never", "first" or "always".
        stats: What is counted.
    """

    def __init__(self, memory: Memory, verify: str, stats: Stats) -> None:
        self._memory: Final = memory
        self._verify: Final = verify
        self._stats: Final = stats
        self._verified: Final[OrderedDict[bytes, None]] = OrderedDict()

    def load(self, era: Era, load: Load) -> set[int]:
        """Copy whole chunks. Returns the engine's blocks that hold nothing: none if all is well."""
        return self._counted(load, lambda: self._chunks(era, load))

    def load_layers(
        self, era: Era, load: Load, layers: Sequence[str], loaded: Callable[[str], None]
    ) -> set[int]:
        """
        Copy the layers one after the other, calling *loaded* after each.

        Returns:
            As load(); layers after a failure are not copied, and *loaded* is called all the same.
        """
        left = dict.fromkeys(layers)

        def tell(layer: str) -> None:
            del left[layer]
            loaded(layer)

        try:
            return self._counted(load, lambda: self._layers(era, load, layers, tell))
        finally:
            for layer in left:  # the one that failed, too: the engine waits for each
                loaded(layer)

    def _counted(self, load: Load, copy: Callable[[], int]) -> set[int]:
        started_s = time.perf_counter()
        done = 0
        try:
            nbytes = copy()
            spent_s = time.perf_counter() - started_s
            self._stats.add(loads=1, loaded_bytes=nbytes, load_seconds=spent_s)
            return set()
        except LoadFailed as failed:
            log.warning("cenote: request %s is computed instead: %s", load.request, failed)
            done = failed.done
        except Exception:  # a load that is not reported would hold its request for ever
            log.exception("cenote: request %s is computed instead; please report", load.request)
        self._stats.add(failed_loads=1)
        return load.blocks(done)

    # ---- whole chunks ----------------------------------------------------------------------------

    def _chunks(self, era: Era, load: Load) -> int:
        nbytes = 0
        with self._leased(era, load) as held:
            for one in held:
                layout = self._memory.layouts[one.pages.group]
                verify = self._is_to_verify(one.chunk)
                with _lost(self, one):
                    compared = self._memory.copier.load(
                        one.chunk, layout.pieces(one.pages.blocks), verify=verify
                    )
                if compared:
                    self._remember(one.chunk)
                nbytes += layout.nbytes
            _check_complete(held, load)
        return nbytes

    # ---- layer by layer --------------------------------------------------------------------------

    def _layers(
        self, era: Era, load: Load, layers: Sequence[str], loaded: Callable[[str], None]
    ) -> int:
        with self._leased(era, load) as held:
            _check_complete(held, load, done=0)
            for one in held:
                if self._is_to_verify(one.chunk):
                    with _lost(self, one, done=0):  # nothing has been copied yet
                        if one.chunk.verify():
                            self._remember(one.chunk)
            for layer in layers:
                for one in held:
                    self._layer(one, layer)
                loaded(layer)
        return sum(self._memory.layouts[one.pages.group].nbytes for one in held)

    def _layer(self, one: Leased, layer: str) -> None:
        layout = self._memory.layouts[one.pages.group]
        runs = (layout.by_layer or {}).get(layer)
        if runs is not None:
            with _lost(self, one, done=0):
                pieces = layout.pieces(one.pages.blocks, runs)
                self._memory.copier.load(one.chunk, pieces, verify=False)

    # ---- leases ----------------------------------------------------------------------------------

    @contextmanager
    def _leased(self, era: Era, load: Load) -> Iterator[list[Leased]]:
        """Hold a load's chunks, as many as are there and have the right length."""
        held: list[Leased] = []
        try:
            while len(held) < len(load.chunks):
                group = load.chunks[len(held)].group
                same = [pages for pages in load.chunks[len(held) :] if pages.group == group]
                before = len(held)
                held += self._lease(era, group, same, before)
                if len(held) < before + len(same):
                    break
            yield held
        finally:
            for one in held:
                one.chunk.release()

    def _lease(
        self, era: Era, group: int, wanted: Sequence[ChunkPages], before: int
    ) -> list[Leased]:
        cache = self._memory.cache(era, group)
        if cache is None:
            raise LoadFailed(before, "no pool is attached")
        try:
            chunks = cache.get_many(b"".join(pages.key for pages in wanted))
        except CenoteError as error:
            raise LoadFailed(before, str(error)) from error
        nbytes = self._memory.layouts[group].nbytes
        right = next((i for i, c in enumerate(chunks) if c.nbytes != nbytes), len(chunks))
        for chunk in chunks[right:]:
            chunk.release()
        if right < len(chunks):  # a chunk of another length: who stored it was not one of us
            self._delete(cache, wanted[right].key)
        return [
            Leased(before + i, cache, chunk, pages)
            for i, (chunk, pages) in enumerate(zip(chunks[:right], wanted, strict=False))
        ]

    # ---- checksums -------------------------------------------------------------------------------

    def _is_to_verify(self, chunk: Chunk) -> bool:
        if self._verify == "first":
            return chunk.token not in self._verified
        return self._verify == "always"

    def _remember(self, chunk: Chunk) -> None:
        """Keep in mind that it was compared: its token names these very bytes for ever (I2)."""
        if self._verify == "first":
            self._verified[chunk.token] = None
            if len(self._verified) > VERIFIED_MAX:
                self._verified.popitem(last=False)

    def drop(self, one: Leased) -> None:
        """Make a damaged chunk absent, so that it is stored again once it is computed."""
        self._delete(one.cache, one.pages.key)

    def _delete(self, cache: Cache, key: bytes) -> None:
        self._stats.add(damaged_chunks=1)
        try:
            cache.delete(key)
        except CenoteError as error:
            log.warning("cenote: bad chunk %s stays in the pool: %s", key.hex()[:16], error)


@contextmanager
def _lost(loader: Loader, one: Leased, done: int | None = None) -> Iterator[None]:
    try:
        yield
    except ChunkLost as error:
        loader.drop(one)
        head = one.pages.key.hex()[:16]
        good = one.number if done is None else done
        raise LoadFailed(good, f"chunk {head} is damaged: {error}") from error


def _check_complete(held: Sequence[Leased], load: Load, done: int | None = None) -> None:
    if len(held) < len(load.chunks):
        good = len(held) if done is None else done
        raise LoadFailed(good, "a chunk has left the pool, or has another length")
