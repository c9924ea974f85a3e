# SPDX-License-Identifier: Apache-2.0
"""
One look at the tables of a catalog: copies, each row consistent in itself, of what a keeper may be
changing meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cenote._native import _core
from cenote.shm.inspect import CHUNKS_A_BLOCK, FREE_SLOTS_SEEN, Catalog, dtype_of

if TYPE_CHECKING:
    from _cffi_backend import CData

GRANULE_BYTES: Final = 2 << 20
GRANULE_PAGES: Final = GRANULE_BYTES // 4096
BUCKET_ENTRIES: Final = _core.lib.CN_BUCKET_ENTRIES
NAMESPACE_BYTES: Final = _core.ffi.sizeof("struct cn_namespace")
FREE: Final = _core.lib.CN_FREE
GRANTED: Final = _core.lib.CN_GRANTED
LIVE: Final = _core.lib.CN_LIVE
DYING: Final = _core.lib.CN_DYING

_ffi, _lib = _core.ffi, _core.lib
_WORD, _KEY, _OFF, _SIZE, _PLACE = 0, slice(1, 5), 5, 6, 7  # words of a struct cn_chunk
_CHUNK_WORDS: Final = _ffi.sizeof("struct cn_chunk") // 8
_COLD: Final = dtype_of("cn_cold")
_EVENT: Final = dtype_of("cn_event")
_SESSION_WORDS: Final = _ffi.sizeof("struct cn_session_entry") // 8
_NONCE_WORD: Final = _ffi.offsetof("struct cn_session_entry", "nonce") // 8
_LEASES_WORD: Final = _ffi.offsetof("struct cn_session_entry", "leases") // 8


def state_of(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the states in words of descriptors."""
    return words >> np.uint64(24) & np.uint64(0xFF)


@dataclass(frozen=True)
class Block:
    """
    Descriptors that are not FREE, as columns.

    Attributes:
        d: Their numbers.
        rows: The words of their records.
        cold: Their cold records.
    """

    d: NDArray[np.int64]
    rows: NDArray[np.uint64]
    cold: NDArray[Any]

    @property
    def words(self) -> NDArray[np.uint64]:
        """Generation, state and flags."""
        return self.rows[:, _WORD]

    @property
    def states(self) -> NDArray[np.uint64]:
        """States."""
        return state_of(self.words)

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Keys, four words each."""
        return self.rows[:, _KEY]

    @property
    def offsets(self) -> NDArray[np.uint64]:
        """Where in their region."""
        return self.rows[:, _OFF]

    @property
    def nbytes(self) -> NDArray[np.uint64]:
        """Lengths of the data."""
        return self.rows[:, _SIZE] & np.uint64(0xFFFFFFFF)

    @property
    def places(self) -> NDArray[np.uint64]:
        """Region, namespace and owner in one."""
        return self.rows[:, _PLACE]

    @property
    def regions(self) -> NDArray[np.uint64]:
        """Region numbers."""
        return self.places & np.uint64(0xFF)

    @property
    def namespaces(self) -> NDArray[np.uint64]:
        """Namespace slots."""
        return self.places >> np.uint64(16) & np.uint64(0xFFFF)

    @property
    def owners(self) -> NDArray[np.uint64]:
        """Sessions they are granted to."""
        return self.places >> np.uint64(32)

    def where(self, mask: NDArray[Any]) -> Block:
        """Return some of them; where it is all of them, nothing is copied."""
        if mask.all():
            return self
        return Block(self.d[mask], self.rows[mask], self.cold[mask])


@dataclass(frozen=True)
class Registry:
    """The session registry, as columns: by session index."""

    words: NDArray[np.uint64]
    nonces: NDArray[np.uint64]
    leases: NDArray[np.uint64]

    @property
    def states(self) -> NDArray[np.uint64]:
        """States of sessions, 0 for none."""
        return self.words & np.uint64(0xFF)

    @property
    def roles(self) -> NDArray[np.uint64]:
        """Roles of sessions."""
        return self.words >> np.uint64(8) & np.uint64(0xFF)

    @property
    def count(self) -> int:
        """How many sessions there are."""
        return int((self.states != 0).sum())


class Tables:
    """
    The tables of a catalog, copied once.

    Args:
        catalog: Checked; its address is good as long as this object.
        whole: Read pages that nobody used, too. Of shared memory that gives them memory, so it is
            for private copies; otherwise reading ends where the keeper has never been.
    """

    def __init__(self, catalog: Catalog, *, whole: bool) -> None:
        self.catalog = catalog
        self.whole = whole
        facts = catalog.superblock
        self.count = facts.chunk_count
        self._rows = self._view("chunks", np.dtype(np.uint64), self.count * _CHUNK_WORDS)
        self._rows = self._rows.reshape(self.count, _CHUNK_WORDS)
        self._cold = self._view("cold", _COLD, self.count)
        entries = self._view("index", np.dtype(np.uint64), facts.bucket_count * BUCKET_ENTRIES)
        self.entries = entries.reshape(facts.bucket_count, BUCKET_ENTRIES).copy()
        granules = sum(region.bytes // GRANULE_BYTES for region in facts.regions)
        self.slabs = self._view("slabs", np.dtype(np.uint64), granules).copy()
        self.words = np.zeros(self.count, dtype=np.uint64)
        self.unsettled = np.zeros(self.count, dtype=bool)  # they changed while they were read
        self.namespace_words = self._namespace_words()
        super_: CData = _ffi.cast("struct cn_super *", catalog.address)
        self.third_bucket = int(super_.index_third) != 0

    def _view(self, area: str, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        at = _ffi.cast("char *", self.catalog.address + self.catalog.superblock.offsets[area])
        return np.frombuffer(_ffi.buffer(at, count * dtype.itemsize), dtype=dtype)

    def _namespace_words(self) -> NDArray[np.uint64]:
        """Return the word of each namespace slot; 0 of those that were not read."""
        count = self.catalog.superblock.namespace_count
        last = count
        if not self.whole:
            last = min(count, self.catalog.counters()["namespaces"] + 1 + FREE_SLOTS_SEEN)
        step = NAMESPACE_BYTES // 8
        words = np.zeros(count, dtype=np.uint64)
        words[:last] = self._view("namespaces", np.dtype(np.uint64), last * step)[::step]
        return words

    def blocks(self) -> Iterator[Block]:
        """Yield all descriptors that are not FREE; afterwards `words` has the words of all."""
        for first in range(0, self.count, CHUNKS_A_BLOCK):
            last = min(first + CHUNKS_A_BLOCK, self.count)
            words = self._rows[first:last, _WORD].copy()
            if not self.whole and not words.any():
                return  # the keeper takes a descriptor for the first time in ascending order
            self.words[first:last] = words
            d = np.flatnonzero(state_of(words) != FREE) + first
            block = Block(d, self._rows[d], self._cold[d])
            again = self._rows[d, _WORD]
            settled = (block.words == self.words[d]) & (again == self.words[d])
            self.unsettled[d[~settled]] = True
            yield block.where(settled)

    def rows_at(self, d: NDArray[Any]) -> NDArray[np.uint64]:
        """Return the records of descriptors as they are now."""
        return np.asarray(self._rows[d])

    def lookups(self, block: Block) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """Return what the index should have for each chunk, and the three buckets of each."""
        count = len(block.d)
        tags = np.zeros(count, dtype=np.uint32)
        buckets = np.zeros((count, 3), dtype=np.uint32)
        rows = np.ascontiguousarray(block.rows)
        status = _lib.cn_look_places(
            look_of(self.catalog),
            _ffi.from_buffer("struct cn_chunk[]", rows),
            count,
            _ffi.from_buffer("uint32_t[]", tags),
            _ffi.from_buffer("uint32_t[]", buckets),
        )
        assert status == _lib.CN_OK  # the catalog was checked, and this part never changes
        return tags.astype(np.uint64) << np.uint64(32) | block.d.astype(np.uint64), buckets

    def registry(self) -> Registry:
        """Return a copy of the session registry."""
        count = self.catalog.superblock.session_count
        words = self._view("registry", np.dtype(np.uint64), count * _SESSION_WORDS)
        rows = words.reshape(count, _SESSION_WORDS).copy()
        return Registry(rows[:, 0], rows[:, _NONCE_WORD], rows[:, _LEASES_WORD])

    def events(self) -> NDArray[Any]:
        """Return a copy of the event feed."""
        return self._view("events", _EVENT, self.catalog.superblock.event_count).copy()


def look_of(catalog: Catalog) -> CData:
    """Return the struct cn_look of a catalog, without regions."""
    look = _ffi.new("struct cn_look *")
    look.catalog = _ffi.cast("void *", catalog.address)
    look.catalog_bytes = catalog.superblock.catalog_bytes
    return look
