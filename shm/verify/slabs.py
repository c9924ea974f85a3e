# SPDX-License-Identifier: Apache-2.0
"""The slab table: is each slab one that a keeper makes, and does it have the extents in use?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from cenote.shm.facts import PAGE_BYTES, RegionFacts

from .kinds import Suspects, suspects
from .tables import GRANULE_BYTES, GRANULE_PAGES, Block

_HEAD: Final = 1  # CN_SLAB_HEAD
_EXTENT_PAGES_MAX: Final = 1 << 18  # 1 GiB
_RUN_MIN_CAP: Final = 64  # granules: 128 MiB
_REGION_SHIFT: Final = 56  # of a place in a pool: region and offset in one number


def _granules_of(pages: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return np.asarray((pages + np.uint64(GRANULE_PAGES - 1)) // np.uint64(GRANULE_PAGES))


@dataclass(frozen=True)
class _Region:
    """The slabs of one region that do not contradict each other, by their head granule."""

    bytes: int
    heads: NDArray[np.uint64]
    ends: NDArray[np.uint64]
    pages: NDArray[np.uint64]  # of an extent

    @property
    def waste_pages(self) -> int:
        """What no extent can use at the ends of slabs."""
        run_pages = (self.ends - self.heads) * np.uint64(GRANULE_PAGES)
        return int((run_pages % self.pages).sum())


class SlabMap:
    """
    The slab table, understood.

    Attributes:
        found: What is wrong with it.
        count: Slabs that make sense.
    """

    def __init__(self, slabs: NDArray[np.uint64], regions: tuple[RegionFacts, ...]) -> None:
        self.found: list[Suspects] = []
        self._regions: list[_Region] = []
        first = 0
        for number, region in enumerate(regions):
            count = region.bytes // GRANULE_BYTES
            self._regions.append(self._understood(number, region, slabs[first : first + count]))
            first += count
        self.count = sum(len(region.heads) for region in self._regions)

    def _understood(self, number: int, facts: RegionFacts, words: NDArray[np.uint64]) -> _Region:
        heads = np.flatnonzero(words).astype(np.uint64)
        words = words[heads.astype(np.int64)]
        pages, run = words >> np.uint64(32), words >> np.uint64(8) & np.uint64(0xFFFFFF)
        room = np.uint64(facts.bytes // GRANULE_BYTES) - heads
        cap = np.maximum(_granules_of(np.uint64(4) * pages), np.uint64(_RUN_MIN_CAP))
        sane = (words & np.uint64(0xFF)) == _HEAD
        sane &= (pages > 0) & (pages <= _EXTENT_PAGES_MAX)
        sane &= (run >= _granules_of(pages)) & (run <= cap) & (run <= room)
        self._suspect(number, heads[~sane], words[~sane], 0)
        heads, words, pages, run = heads[sane], words[sane], pages[sane], run[sane]
        before = np.zeros(len(heads), dtype=np.uint64)  # the end of all that begin before it
        before[1:] = np.maximum.accumulate(heads + run)[:-1]
        clear = before <= heads
        self._suspect(number, heads[~clear], words[~clear], before[~clear])
        heads, run, pages = heads[clear], run[clear], pages[clear]
        return _Region(facts.bytes, heads, heads + run, pages)

    def _suspect(
        self,
        number: int,
        heads: NDArray[np.uint64],
        words: NDArray[np.uint64],
        before: NDArray[np.uint64] | int,
    ) -> None:
        if len(heads):
            subject = heads | np.uint64(number << 32)
            self.found.append(suspects("slab", subject, words, before))

    @property
    def waste_bytes(self) -> int:
        """Memory at the ends of slabs that no extent can use."""
        return sum(region.waste_pages for region in self._regions) * PAGE_BYTES

    def have(self, block: Block) -> NDArray[np.bool_]:
        """Is there an extent of exactly its size where each descriptor says?"""
        there = np.zeros(len(block.d), dtype=bool)
        for number, region in enumerate(self._regions):
            if not len(region.heads):
                continue
            mine = np.flatnonzero(block.regions == number)
            page = block.offsets[mine] // np.uint64(PAGE_BYTES)
            granule = page // np.uint64(GRANULE_PAGES)
            slab = np.searchsorted(region.heads, granule, side="right") - 1
            found = slab >= 0
            slab = np.maximum(slab, 0)
            found &= granule < region.ends[slab]
            pages = region.pages[slab]
            inside = page - np.where(found, region.heads[slab], 0) * np.uint64(GRANULE_PAGES)
            fits = (region.ends[slab] - region.heads[slab]) * np.uint64(GRANULE_PAGES) // pages
            found &= (inside % pages == 0) & (inside // pages < fits)
            there[mine] = found & (block.cold["extent_pages"][mine] == pages)
        return there


def places_in_pool(block: Block) -> NDArray[np.uint64]:
    """Return region and offset of each as one number."""
    return np.asarray(block.regions << np.uint64(_REGION_SHIFT) | block.offsets)


def doubles(
    places: NDArray[np.uint64], d: NDArray[np.int64], words: NDArray[np.uint64]
) -> Iterator[Suspects]:
    """Yield descriptors that name an extent which one with a lower number names as well."""
    order = np.lexsort((d, places))
    same = np.flatnonzero(places[order][1:] == places[order][:-1])
    if len(same):
        first, second = order[same], order[same + 1]
        yield suspects("overlap", d[second], words[second], d[first], words[first])
