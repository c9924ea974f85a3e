# SPDX-License-Identifier: Apache-2.0
"""
A read-only look at a pool's catalog, while its keeper changes it.

What lies in shared memory is hostile input (I4): the superblock is copied and checked once, every
index is bounded by that copy, records are copied before they are judged, loops end by counts of the
copy, and text loses what a terminal could take for a command. Nothing here needs the daemon.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from cenote._native import _core, _short

from . import manifest as _manifest
from .errors import Corrupt, VersionMismatch
from .facts import (
    ChunkFacts,
    ChunkTable,
    Namespace,
    Now,
    RegionFacts,
    Session,
    Superblock,
    printable,
)
from .session import MEDIA

if TYPE_CHECKING:
    from _cffi_backend import CData
    from numpy.typing import NDArray

    from .session import Mapping

ROLE_NAMES: Final = {1: "reader", 2: "writer", 3: "admin"}  # enum cn_role
SESSION_STATES: Final = {1: "open", 2: "dying"}  # enum cn_session_state
CHUNKS_A_BLOCK: Final = 65_536
EVENTS_A_BLOCK: Final = 4096
FREE_SLOTS_SEEN: Final = 16
EVENT_READS_MAX: Final = 8  # reads a block, when the keeper is faster than we are

_MEDIUM_NAMES: Final = {number: name for name, number in MEDIA.items()}
_ffi, _lib = _core.ffi, _core.lib
_call: Final = _short.lib  # the same functions with the GIL kept: cheaper for short calls


def dtype_of(struct: str) -> np.dtype[Any]:
    """Return the numpy type of a C struct of fixed-size integers, from its compiled layout."""
    ctype = _ffi.typeof(f"struct {struct}")
    names, formats, offsets = [], [], []
    for name, field in ctype.fields:
        is_array = field.type.kind == "array"
        item = field.type.item if is_array else field.type
        names.append(name)
        formats.append((item.cname.removesuffix("_t"), field.type.length if is_array else ()))
        offsets.append(field.offset)
    size = _ffi.sizeof(ctype)
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})


_CHUNK: Final = dtype_of("cn_chunk")
_COLD: Final = dtype_of("cn_cold")
_EVENT: Final = dtype_of("cn_event")
_NAMESPACE_BYTES: Final = _ffi.sizeof("struct cn_namespace")


class Catalog:
    """
    A catalog that this process has mapped, for reading.

    Args:
        address: Where it is mapped.
        bytes_: How much is mapped.
        owner: Kept alive as long as this object: it unmaps.

    Raises:
        Corrupt: The bytes are no catalog.
        VersionMismatch: It was made by a build with another layout.
    """

    def __init__(self, address: int, bytes_: int, owner: object) -> None:
        self.address = address
        self._owner = owner
        self._at: CData = _ffi.cast("uint8_t *", address)
        self.superblock = _checked(self._at, bytes_)

    @classmethod
    def of(cls, mapping: Mapping) -> Self:
        """Return the catalog of an attached session; see `shm.session.attach`."""
        return cls(mapping.catalog, mapping.catalog_bytes, mapping)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Return the catalog at *path*, mapped for reading. Raises OSError when that fails."""
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _lib.CN_SUPER_BYTES:
                raise Corrupt(f"{path}: {size} bytes are no catalog: name the catalog of a pool")
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        held = _ffi.from_buffer(mapped)
        return cls(int(_ffi.cast("uintptr_t", held)), size, (held, mapped))

    # ---- what changes ---------------------------------------------------------------------------

    @cached_property
    def _super(self) -> CData:
        return _ffi.cast("struct cn_super *", self.address)

    def now(self) -> Now:
        """Return the state of the pool and its keeper."""
        live = self._super
        return Now(
            serving=live.pool_state == _lib.CN_POOL_SERVING,
            boot_token=int(live.boot_token),
            keeper_pid=int(live.keeper_pid),
            keeper_asleep=bool(live.sleeping),
            sequence=int(live.sequence),
            event_head=max(int(live.event_head), 1),
        )

    def counters(self) -> dict[str, int]:
        """Return struct cn_counters; hits and misses as of the keeper's last fold."""
        counters = self._super.counters
        names = [name for name, _ in _ffi.typeof("struct cn_counters").fields]
        return {name: int(getattr(counters, name)) for name in names if name != "reserved"}

    # ---- namespaces and sessions ----------------------------------------------------------------

    def namespace(self, slot: int) -> Namespace | None:
        """Return the namespace in *slot*, or None when there is none."""
        if not 0 < slot < self.superblock.namespace_count:
            return None
        at = self._at + self.superblock.offsets["namespaces"] + slot * _NAMESPACE_BYTES
        record = _ffi.new("struct cn_namespace *")
        _ffi.memmove(record, at, _NAMESPACE_BYTES)  # one read, then checked, then used (I4)
        if record.word != 1:
            return None
        packed = bytes(_ffi.buffer(record.manifest))
        packed = packed[: min(int(record.manifest_bytes), _lib.CN_MANIFEST_BYTES_MAX)]
        return Namespace(
            slot=slot,
            id=bytes(_ffi.buffer(record.id)),
            name=_text(record.name),
            manifest=_fields(packed),
            packed=packed,
            tenant=int(record.tenant),
            quota_bytes=int(record.quota_bytes),
            live_bytes=int(record.live_bytes),
            live_chunks=int(record.live_chunks),
            evictions=int(record.evictions),
            created_ns=int(record.created_ns),
        )

    def namespaces(self) -> list[Namespace]:
        """Return all namespaces, by slot."""
        found: list[Namespace] = []
        free = 0
        for slot in range(1, self.superblock.namespace_count):
            one = self.namespace(slot)
            free = 0 if one else free + 1
            if one is not None:
                found.append(one)
            # The keeper takes the first free slot: reading on would give memory to pages that
            # nobody used. Its counter is a little late, and cannot say alone where the end is.
            elif free > FREE_SLOTS_SEEN and len(found) >= self._super.counters.namespaces:
                break
        return found

    def sessions(self) -> list[Session]:
        """Return who is attached, by index. A row that changes meanwhile may mix old and new."""
        at = self._at + self.superblock.offsets["registry"]
        size = self.superblock.session_count * _ffi.sizeof("struct cn_session_entry")
        rows = _ffi.new("struct cn_session_entry[]", self.superblock.session_count)
        _ffi.memmove(rows, at, size)
        return [
            _session(index, rows[index])
            for index in range(self.superblock.session_count)
            if rows[index].word & 0xFF in SESSION_STATES
        ]

    # ---- chunks ---------------------------------------------------------------------------------

    def _words(self, first: int, count: int) -> NDArray[np.uint64]:
        at = self._at + self.superblock.offsets["chunks"] + first * _CHUNK.itemsize
        block = np.frombuffer(_ffi.buffer(at, count * _CHUNK.itemsize), dtype=_CHUNK)
        return np.array(block["word"])

    def _word_blocks(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """
        Yield (first descriptor, copies of the words) until a block that was never granted.

        The keeper takes descriptors in ascending order when it takes one for the first time:
        reading on would give memory to pages that nobody used.
        """
        total = self.superblock.chunk_count
        for first in range(0, total, CHUNKS_A_BLOCK):
            words = self._words(first, min(CHUNKS_A_BLOCK, total - first))
            if not words.any():
                return
            yield first, words

    def checksummed(self) -> tuple[int, int]:
        """Return (LIVE chunks whose CRC-32C is recorded, LIVE chunks)."""
        recorded = live = 0
        for _, words in self._word_blocks():
            is_live = _state(words) == _lib.CN_LIVE
            live += int(is_live.sum())
            recorded += int((is_live & ((words & np.uint64(_lib.CN_CF_CRC)) != 0)).sum())
        return recorded, live

    def chunks(self) -> ChunkTable:
        """Return all LIVE chunks; about a second for a million."""
        blocks = [
            self._read_block(np.flatnonzero(_state(words) == _lib.CN_LIVE) + first)
            for first, words in self._word_blocks()
        ]
        if not blocks:
            nothing = np.zeros(0, dtype=np.uint32)
            return ChunkTable(nothing, np.zeros(0, dtype=_CHUNK), np.zeros(0, dtype=_COLD))
        descriptors, chunks, cold = (np.concatenate(part) for part in zip(*blocks, strict=True))
        table = ChunkTable(descriptors, chunks, cold)
        sane = self._sane(table)
        table.nonsense = int((~sane).sum())
        return table.where(sane)

    def _read_block(
        self, wanted: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint32], NDArray[Any], NDArray[Any]]:
        """Copy those descriptors that are still LIVE, each consistent in itself (I3)."""
        chunks = _ffi.new("struct cn_chunk[]", max(len(wanted), 1))
        cold = _ffi.new("struct cn_cold[]", max(len(wanted), 1))
        read, catalog = _call.cn_chunk_read, self._at
        kept: list[int] = []
        for descriptor in wanted.tolist():
            if read(catalog, descriptor, chunks + len(kept), cold + len(kept)) == 0:
                kept.append(descriptor)
        count = len(kept)
        return (
            np.array(kept, dtype=np.uint32),
            np.frombuffer(_ffi.buffer(chunks), dtype=_CHUNK)[:count],
            np.frombuffer(_ffi.buffer(cold), dtype=_COLD)[:count],
        )

    def _sane(self, table: ChunkTable) -> NDArray[np.bool_]:
        """Do the records lie in their regions and name namespaces that can be?"""
        sizes = np.zeros(256, dtype=np.uint64)
        for i, region in enumerate(self.superblock.regions):
            sizes[i] = region.bytes
        region_bytes = sizes[table.regions]
        offset, nbytes = table.chunks["data_off"], table.nbytes
        room = region_bytes - np.minimum(offset, region_bytes)
        known = (table.namespaces > 0) & (table.namespaces < self.superblock.namespace_count)
        return np.asarray((nbytes <= room) & (nbytes > 0) & known)

    def chunk(self, descriptor: int) -> ChunkFacts | None:
        """Return the chunk in *descriptor* when it is LIVE and makes sense."""
        if not 0 <= descriptor < self.superblock.chunk_count:
            return None
        table = ChunkTable(*self._read_block(np.array([descriptor], dtype=np.int64)))
        return table[0] if len(table) and bool(self._sane(table)[0]) else None

    def find(self, slot: int, key: bytes) -> ChunkFacts | None:
        """Return the chunk under *key* in the namespace in *slot*, or None. Takes no lease."""
        if len(key) != _lib.CN_KEY_BYTES:
            raise ValueError(f"the key has {len(key)} bytes: a key has {_lib.CN_KEY_BYTES}")
        found = _ffi.new("uint32_t *")
        if _call.cn_find(self._at, slot, key, found) != _lib.CN_OK:
            return None
        chunk = self.chunk(int(found[0]))
        return chunk if chunk and chunk.key == key and chunk.namespace_slot == slot else None

    # ---- the event feed -------------------------------------------------------------------------

    def event_blocks(self) -> Iterator[tuple[NDArray[Any], int]]:
        """
        Yield (rows of struct cn_event, how many were overwritten just before them), oldest first.

        Ends at what was the newest event when it began. What had been overwritten before is not
        counted.
        """
        head = self.now().event_head
        sequence = _ffi.new("uint64_t *", max(1, head - self.superblock.event_count))
        count, lost = _ffi.new("uint32_t *"), _ffi.new("uint64_t *")
        for _ in range(EVENT_READS_MAX * (self.superblock.event_count // EVENTS_A_BLOCK + 1)):
            if sequence[0] >= head:
                return
            rows = _ffi.new("struct cn_event[]", EVENTS_A_BLOCK)
            _call.cn_events_read(self._at, sequence, EVENTS_A_BLOCK, rows, count, lost)
            yield np.frombuffer(_ffi.buffer(rows), dtype=_EVENT)[: count[0]], int(lost[0])
        if sequence[0] < head:  # the keeper overtook us again and again: a gap, never silently
            yield np.zeros(0, dtype=_EVENT), head - int(sequence[0])


def _state(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return words >> np.uint64(24) & np.uint64(0xFF)


def _text(field: CData) -> str:
    raw = _ffi.string(field)  # ends with the array
    return printable(raw.decode("utf-8", "replace") if isinstance(raw, bytes) else raw)


def _fields(packed: bytes) -> dict[str, _manifest.Value] | None:
    try:
        return _manifest.parse(packed)
    except ValueError:
        return None


def _session(index: int, row: CData) -> Session:
    word = int(row.word)
    return Session(
        index=index,
        state=SESSION_STATES[word & 0xFF],
        role=ROLE_NAMES.get(word >> 8 & 0xFF, "?"),
        nonce=int(row.nonce),
        attached_ns=int(row.attached_ns),
        pid=int(row.pid),
        uid=int(row.uid),
        gid=int(row.gid),
        leases=int(row.leases),
        leased_bytes=int(row.leased_bytes),
        granted_bytes=int(row.granted_bytes),
        lease_limit_bytes=int(row.lease_limit_bytes),
        label=_text(row.label),
    )


def _checked(at: CData, bytes_: int) -> Superblock:
    """Copy the superblock, check the copy, return what it says."""
    if bytes_ < _lib.CN_SUPER_BYTES:
        raise Corrupt(f"{bytes_} bytes are no catalog: it has {_lib.CN_SUPER_BYTES} at least")
    copy = _ffi.new("struct cn_super *")
    _ffi.memmove(copy, at, _lib.CN_SUPER_BYTES)
    status = _lib.cn_catalog_check(copy, bytes_)
    if status == _lib.CN_EVERSION:
        raise VersionMismatch(
            f"this catalog has layout {int(copy.layout_version)} and ABI fingerprint "
            f"{int(copy.abi_fingerprint):#x}, this build {_lib.CN_LAYOUT_VERSION} and "
            f"{_call.cn_abi_fingerprint():#x}: use the cenote of the daemon that serves it"
        )
    if status != _lib.CN_OK:
        raise Corrupt("these bytes are no catalog, or a damaged one: restart its daemon")
    return _superblock(copy)


def _superblock(copy: CData) -> Superblock:
    areas = ("chunks", "cold", "index", "slabs", "namespaces", "registry", "events")
    return Superblock(
        pool=_text(copy.pool_name),
        pool_id=bytes(_ffi.buffer(copy.pool_id)),
        created_ns=int(copy.created_ns),
        capacity_bytes=int(copy.capacity_bytes),
        catalog_bytes=int(copy.catalog_bytes),
        chunk_count=int(copy.chunk_count),
        bucket_count=int(copy.bucket_count),
        namespace_count=int(copy.namespace_count),
        session_count=int(copy.session_count),
        event_count=int(copy.event_count),
        lease_slots=int(copy.lease_slots),
        layout_version=int(copy.layout_version),
        fingerprint=int(copy.abi_fingerprint),
        regions=tuple(
            RegionFacts(
                bytes=int(info.bytes),
                medium=_MEDIUM_NAMES.get(int(info.medium), "?"),
                page_bytes=int(info.page_bytes),
                node=int(info.node),
            )
            for info in copy.regions[0 : copy.region_count]
        ),
        offsets={name: int(getattr(copy, f"{name}_off")) for name in areas},
    )
