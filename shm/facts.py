# SPDX-License-Identifier: Apache-2.0
"""The records of a catalog as values: what `shm.inspect` found, copied and checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from cenote._native import _core

from . import manifest as _manifest

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLAG_NAMES: Final = {1: "pinned", 2: "unverified", 4: "crc", 8: "meta", 16: "copy"}
PAGE_BYTES: Final = 4096

_POSITION_UNKNOWN: Final = _core.lib.CN_POSITION_UNKNOWN


def printable(text: str) -> str:
    """Return *text* without characters that could steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


@dataclass(frozen=True)
class RegionFacts:
    """One region of a pool: its bytes, its medium, its pages, its NUMA node (-1: not bound)."""

    bytes: int
    medium: str
    page_bytes: int
    node: int


@dataclass(frozen=True)
class Superblock:
    """What a catalog says about itself. Times are CLOCK_REALTIME nanoseconds, sizes bytes."""

    pool: str
    pool_id: bytes
    created_ns: int
    capacity_bytes: int
    catalog_bytes: int
    chunk_count: int
    bucket_count: int
    namespace_count: int
    session_count: int
    event_count: int
    lease_slots: int
    layout_version: int
    fingerprint: int
    regions: tuple[RegionFacts, ...]
    offsets: dict[str, int]


@dataclass(frozen=True)
class Now:
    """What changes in a superblock. Each field was read whole, not the set of them."""

    serving: bool
    boot_token: int
    keeper_pid: int
    keeper_asleep: bool
    sequence: int
    event_head: int


@dataclass(frozen=True)
class Namespace:
    """
    A namespace, as the catalog has it.

    Attributes:
        slot: Its number in this pool.
        id: 32 bytes: SHA-256 over manifest and tenant's salt.
        name: What it was opened as, "" when it has no name.
        manifest: Its fields; None when the record holds no manifest.
        packed: The canonical bytes of the manifest.
        tenant: Tag of the tenant's salt, 0 for none.
        quota_bytes: 0 for none.
        live_bytes: Extents of its chunks.
        live_chunks: Chunks.
        evictions: Chunks it lost to its quota or to the pool's policy.
        created_ns: CLOCK_REALTIME.
    """

    slot: int
    id: bytes
    name: str
    manifest: dict[str, _manifest.Value] | None
    packed: bytes
    tenant: int
    quota_bytes: int
    live_bytes: int
    live_chunks: int
    evictions: int
    created_ns: int

    @property
    def label(self) -> str:
        """The name, or the beginning of the id."""
        return self.name or self.id.hex()[:16]


@dataclass(frozen=True)
class Session:
    """A row of the session registry; leases and bytes as of the keeper's last look."""

    index: int
    state: str
    role: str
    nonce: int
    attached_ns: int
    pid: int
    uid: int
    gid: int
    leases: int
    leased_bytes: int
    granted_bytes: int
    lease_limit_bytes: int
    label: str


@dataclass(frozen=True, slots=True)
class ChunkFacts:
    """
    One LIVE chunk. Times are CLOCK_REALTIME nanoseconds, 0 for never; position None is unknown.

    parent is the reference (descriptor, generation) of what it follows, 0 for none.
    """

    descriptor: int
    generation: int
    key: bytes
    namespace_slot: int
    nbytes: int
    extent_bytes: int
    meta_bytes: int
    region: int
    data_off: int
    crc32c: int | None
    flags: tuple[str, ...]
    sequence: int
    committed_ns: int
    last_use_s: int
    expires_ns: int
    pinned_ns: int
    position: int | None
    priority: int
    uses: int
    parent: int

    @property
    def pinned(self) -> bool:
        """Is it kept from eviction?"""
        return "pinned" in self.flags

    @property
    def ref(self) -> int:
        """Descriptor and generation in one number, as `chunk.ref` of a client."""
        return self.generation << 32 | self.descriptor


class ChunkTable:
    """
    Consistent copies of all chunks that were LIVE when each was read, as columns.

    Attributes:
        descriptors: Their numbers.
        chunks: Rows of struct cn_chunk.
        cold: Rows of struct cn_cold.
        nonsense: How many records contradict the superblock, and were left out.
    """

    def __init__(
        self,
        descriptors: NDArray[np.uint32],
        chunks: NDArray[Any],
        cold: NDArray[Any],
        nonsense: int = 0,
    ) -> None:
        self.descriptors = descriptors
        self.chunks = chunks
        self.cold = cold
        self.nonsense = nonsense

    def __len__(self) -> int:
        return len(self.descriptors)

    @property
    def flags(self) -> NDArray[np.uint64]:
        """Bits of enum cn_chunk_flag."""
        return np.asarray(self.chunks["word"] & 0xFFFFFF)

    @property
    def namespaces(self) -> NDArray[np.uint64]:
        """Namespace slots."""
        return np.asarray(self.chunks["place"] >> np.uint64(16) & np.uint64(0xFFFF))

    @property
    def regions(self) -> NDArray[np.uint64]:
        """Region numbers."""
        return np.asarray(self.chunks["place"] & np.uint64(0xFF))

    @property
    def nbytes(self) -> NDArray[np.uint64]:
        """Lengths of the data."""
        return np.asarray(self.chunks["size_crc"] & np.uint64(0xFFFFFFFF))

    def where(self, selected: NDArray[Any]) -> Self:
        """Return the rows that *selected* names: a mask, or indices in the order wanted."""
        rows = (self.descriptors[selected], self.chunks[selected], self.cold[selected])
        return type(self)(*rows, self.nonsense)

    def __getitem__(self, row: int) -> ChunkFacts:
        return _facts(int(self.descriptors[row]), self.chunks[row], self.cold[row])

    def __iter__(self) -> Iterator[ChunkFacts]:
        return (self[row] for row in range(len(self)))


def _facts(descriptor: int, chunk: Any, cold: Any) -> ChunkFacts:
    word, place, size_crc = int(chunk["word"]), int(chunk["place"]), int(chunk["size_crc"])
    flags = tuple(name for bit, name in FLAG_NAMES.items() if word & bit)
    position = int(cold["position"])
    return ChunkFacts(
        descriptor=descriptor,
        generation=word >> 32,
        key=np.asarray(chunk["key"]).tobytes(),
        namespace_slot=place >> 16 & 0xFFFF,
        nbytes=size_crc & 0xFFFFFFFF,
        extent_bytes=int(cold["extent_pages"]) * PAGE_BYTES,
        meta_bytes=int(cold["meta_bytes"]),
        region=place & 0xFF,
        data_off=int(chunk["data_off"]),
        crc32c=size_crc >> 32 if "crc" in flags else None,
        flags=flags,
        sequence=int(cold["sequence"]),
        committed_ns=int(cold["committed_ns"]),
        last_use_s=int(cold["last_use_s"]),
        expires_ns=int(cold["expires_ns"]),
        pinned_ns=int(cold["pinned_ns"]),
        position=None if position == _POSITION_UNKNOWN else position,
        priority=int(cold["priority"]),
        uses=int(cold["uses"]),
        parent=int(cold["parent"]),
    )
