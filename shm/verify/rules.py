# SPDX-License-Identifier: Apache-2.0
"""
What must hold between descriptors, index, slabs, namespaces and sessions (I5), as one look at them
shows it. Pure: what a look suspects another one confirms.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenote._native import _core
from cenote.shm.facts import FLAG_NAMES, PAGE_BYTES

from .kinds import DOUBLE, NO_DESCRIPTOR, Suspects, suspects
from .slabs import SlabMap, doubles, places_in_pool
from .tables import BUCKET_ENTRIES, DYING, FREE, GRANTED, LIVE, Block, Tables, state_of

_PINNED, _CRC, _META = np.uint64(1), np.uint64(4), np.uint64(8)
_KNOWN_FLAGS: Final = np.uint64(sum(FLAG_NAMES))
_FLAGS: Final = np.uint64(0xFFFFFF)
_STATE_MAX: Final = _core.lib.CN_POISONED
_SESSION_MAX: Final = _core.lib.CN_SESSION_OPENING
_META_MAX: Final = _core.lib.CN_META_BYTES_MAX
_LINE: Final = np.uint64(63)
_LOW: Final = np.uint64(0xFFFFFFFF)
_HIGH: Final = np.uint64(32)


def _pick(kind: str, block: Block, wrong: NDArray[Any], other: Any = 0, more: Any = 0) -> Suspects:
    """Return the rows of *block* that are wrong, each with two of its numbers."""
    at = np.flatnonzero(wrong)
    columns = [value[at] if isinstance(value, np.ndarray) else value for value in (other, more)]
    return suspects(kind, block.d[at], block.words[at], *columns)


class Walk:
    """
    All tables, walked once.

    Attributes:
        found: What looks wrong.
        states: How many descriptors are in each state.
        sums: What the descriptors add up to, by the name of the counter.
        per_namespace: Chunks and bytes by namespace slot.
        refs, sizes, places: Of the chunks whose bytes can be checked.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.found: list[Suspects] = []
        self.states = np.zeros(_STATE_MAX + 1, dtype=np.int64)
        self.sums: dict[str, int] = dict.fromkeys(
            ("live_chunks", "live_bytes", "granted_bytes", "limbo_chunks", "pinned_chunks"), 0
        )
        self.extent_bytes = 0
        self.unrecorded = 0  # chunks without a checksum
        self.unverified = 0
        slots = tables.catalog.superblock.namespace_count
        self.per_namespace = np.zeros((slots, 2), dtype=np.uint64)
        self.slabs = SlabMap(tables.slabs, tables.catalog.superblock.regions)
        self.found += self.slabs.found
        self._good = np.zeros(tables.entries.size, dtype=bool)  # entries that a lookup arrives at
        self._leaving = np.zeros(tables.entries.size, dtype=bool)
        states = tables.registry().states
        self._sessions = np.append((states > 0) & (states <= _SESSION_MAX), False)
        self._arrived = 0  # chunks at which a lookup arrives
        self._kept: list[tuple[NDArray[Any], ...]] = []
        self._in_use: list[tuple[NDArray[Any], ...]] = []
        for block in tables.blocks():
            self._look_at(block)
        self._finish()

    # ---- descriptors ----------------------------------------------------------------------------

    def _look_at(self, block: Block) -> None:
        known = block.states <= _STATE_MAX
        known &= block.words >> _HIGH != 0
        self._add(_pick("state", block, ~known))
        block = block.where(known)
        self._add(_pick("flags", block, block.words & _FLAGS & ~_KNOWN_FLAGS))
        self.states += np.bincount(block.states.astype(np.int64), minlength=_STATE_MAX + 1)
        outside = self._outside(block)
        self._add(_pick("place", block, outside, block.places, block.offsets))
        homeless = ~outside & ~self.slabs.have(block)
        pages = block.cold["extent_pages"]
        self._add(_pick("extent", block, homeless, pages, block.offsets))
        granted = block.states == GRANTED
        gone = granted & ~self._sessions[np.minimum(block.owners, len(self._sessions) - 1)]
        self._add(_pick("owner", block, gone, block.owners))
        housed = block.where(~outside & ~homeless)
        self._in_use.append((places_in_pool(housed), housed.d, housed.words))
        self._add_up(block, block.states == LIVE)
        live = block.where(block.states == LIVE)
        self._records(live)
        self._checkable(live, ~outside[block.states == LIVE])
        self._index_of(block.where((block.states == LIVE) | (block.states == DYING)))

    def _add(self, found: Suspects) -> None:
        if len(found.rows):
            self.found.append(found)

    def _outside(self, block: Block) -> NDArray[np.bool_]:
        regions = self.tables.catalog.superblock.regions
        sizes = np.zeros(256, dtype=np.uint64)
        sizes[: len(regions)] = [region.bytes for region in regions]
        size = sizes[block.regions.astype(np.int64)]
        extent = block.cold["extent_pages"].astype(np.uint64) * np.uint64(PAGE_BYTES)
        room = size - np.minimum(block.offsets, size)
        wrong = (block.places >> np.uint64(8) & np.uint64(0xFF)) != 0
        wrong |= (block.offsets % np.uint64(PAGE_BYTES)) != 0
        return np.asarray(wrong | (room == 0) | (block.nbytes > room) | (extent > room))

    def _records(self, live: Block) -> None:
        """What a chunk says of itself."""
        cold, data = live.cold, live.nbytes
        extent = cold["extent_pages"].astype(np.uint64) * np.uint64(PAGE_BYTES)
        self._add(_pick("length", live, data > extent, data, extent))
        meta = cold["meta_bytes"].astype(np.uint64)
        end = np.where(meta > 0, ((data + _LINE) & ~_LINE) + meta, data)
        flagged = (live.words & _META) != 0
        wrong = (data == 0) | (meta > _META_MAX) | (flagged != (meta > 0))
        wrong |= (end > extent) & (data <= extent)
        self._add(_pick("metadata", live, wrong, data, meta))
        slots = live.namespaces
        there = self.tables.namespace_words != 0
        nowhere = slots >= len(there)
        nowhere |= ~there[np.minimum(slots, len(there) - 1)] | (slots == 0)
        self._add(_pick("namespace", live, nowhere, slots))
        parent = cold["parent"]
        own = live.words & ~_LOW | live.d.astype(np.uint64)
        strange = (parent != 0) & ((parent & _LOW >= self.tables.count) | (parent >> _HIGH == 0))
        self._add(_pick("parent", live, strange | (parent == own), parent))
        pinned, until = (live.words & _PINNED) != 0, cold["pinned_ns"]
        self._add(_pick("pin", live, pinned != (until != 0), until))
        last = self.tables.catalog.now().sequence  # read behind the records
        ahead = (cold["sequence"] > last) | (cold["sequence"] == 0)
        self._add(_pick("sequence", live, ahead, cold["sequence"], last))

    def _add_up(self, block: Block, live: NDArray[np.bool_]) -> None:
        pages = block.cold["extent_pages"].astype(np.int64)
        states, sums = block.states, self.sums
        sums["live_chunks"] += int(live.sum())
        sums["live_bytes"] += int(pages[live].sum()) * PAGE_BYTES
        sums["granted_bytes"] += int(pages[states == GRANTED].sum()) * PAGE_BYTES
        sums["limbo_chunks"] += int((states == DYING).sum())
        sums["pinned_chunks"] += int((live & ((block.words & _PINNED) != 0)).sum())
        self.extent_bytes += int(pages.sum()) * PAGE_BYTES
        slots = np.minimum(block.namespaces[live], len(self.per_namespace) - 1).astype(np.int64)
        np.add.at(self.per_namespace[:, 0], slots, np.uint64(1))
        np.add.at(self.per_namespace[:, 1], slots, (pages[live] * PAGE_BYTES).astype(np.uint64))

    def _checkable(self, live: Block, inside: NDArray[np.bool_]) -> None:
        recorded = (live.words & _CRC) != 0
        self.unrecorded += int((~recorded).sum())
        self.unverified += int(((live.words & np.uint64(2)) != 0).sum())
        chosen = live.where(recorded & inside)
        refs = chosen.words >> _HIGH << _HIGH | chosen.d.astype(np.uint64)
        self._kept.append((refs, chosen.nbytes, places_in_pool(chosen)))

    # ---- index ----------------------------------------------------------------------------------

    def _index_of(self, block: Block) -> None:
        """Does a lookup of its key arrive at each chunk?"""
        if not len(block.d):
            return
        wanted, buckets = self.tables.lookups(block)
        buckets = buckets[:, : 3 if self.tables.third_bucket else 2].astype(np.int64)
        live = block.states == LIVE
        todo = np.arange(len(block.d))
        for which in range(buckets.shape[1]):  # nearly all are in their first
            bucket = buckets[todo, which]
            row, slot = np.nonzero(self.tables.entries[bucket] == wanted[todo, None])
            at, here = bucket[row] * BUCKET_ENTRIES + slot, live[todo[row]]
            self._good[at[here]] = True
            self._leaving[at[~here]] = True
            todo = np.delete(todo, row)
        self._arrived += int(live.sum() - live[todo].sum())
        todo = todo[live[todo]]
        if len(todo):
            there = self.tables.entries[buckets[todo]]
            self._missing(block.where(_mask(todo, len(live))), wanted[todo], there)

    def _missing(self, block: Block, wanted: NDArray[np.uint64], there: NDArray[np.uint64]) -> None:
        """Chunks that no lookup arrives at: does it arrive at another one of the same key?"""
        twin = np.full(len(block.d), -1, dtype=np.int64)
        row, which, slot = np.nonzero(there >> _HIGH == (wanted >> _HIGH)[:, None, None])
        other = (there[row, which, slot] & _LOW).astype(np.int64)
        row, other = row[other < self.tables.count], other[other < self.tables.count]
        rows = self.tables.rows_at(other)
        same = (rows[:, 1:5] == block.keys[row]).all(axis=1) & (state_of(rows[:, 0]) == LIVE)
        same &= (rows[:, 7] >> np.uint64(16) & np.uint64(0xFFFF)) == block.namespaces[row]
        twin[row[same]] = other[same]
        self._add(_pick("unlinked", block, twin < 0))
        self._add(_pick("twin", block, twin >= 0, twin.astype(np.uint64)))

    def _finish(self) -> None:
        words = self.tables.words
        self.states[0] = int((state_of(words) == FREE).sum())
        spoiled = np.flatnonzero((state_of(words) == FREE) & ((words & _FLAGS) != 0))
        if len(spoiled):
            self.found.append(suspects("flags", spoiled, words[spoiled]))
        self.found += list(doubles(*_joined(self._in_use, 3)))
        self.refs, self.sizes, self.places = _joined(self._kept, 3)
        self._entries()

    def _entries(self) -> None:
        """Entries at which no lookup arrives, and second ones."""
        entries, words = self.tables.entries.ravel(), self.tables.words
        lost = np.flatnonzero((entries != 0) & ~self._good)
        named = (entries[lost] & _LOW).astype(np.int64)
        there = named < self.tables.count
        named = np.minimum(named, self.tables.count - 1)
        settled = ~(there & self.tables.unsettled[named])
        lost, named, there = lost[settled], named[settled], there[settled]
        other = np.where(there, words[named], np.uint64(NO_DESCRIPTOR))
        leaving = self._leaving[lost]
        for kind, rows in (("dangling", leaving), ("entry", ~leaving)):
            self._add(suspects(kind, lost[rows], entries[lost[rows]], other[rows]))
        good = np.flatnonzero(self._good)
        if len(good) == self._arrived:  # one each
            return
        order = good[np.argsort(entries[good], kind="stable")]
        again = order[1:][entries[order][1:] == entries[order][:-1]]
        self._add(suspects("entry", again, entries[again], np.uint64(DOUBLE)))


def _mask(at: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    mask = np.zeros(count, dtype=bool)
    mask[at] = True
    return mask


def _joined(parts: list[tuple[NDArray[Any], ...]], columns: int) -> list[NDArray[Any]]:
    if not parts:
        return [np.zeros(0, dtype=np.uint64) for _ in range(columns)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]
