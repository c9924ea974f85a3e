# SPDX-License-Identifier: Apache-2.0
"""A copy of a real pool in files, for damage: words are changed where the layout says they are."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from cenote._native import _core
from cenote.client import Cache, Manifest, Pool
from cenote.client.testing import MemoryHost
from cenote.shm.inspect import Catalog
from cenote.shm.verify import Abandoned, Report, Verifier, open_abandoned

CHUNKS: Final = 60
SIZES: Final = (3000, 9000, 70_000)  # three kinds of slab
PAGE_BYTES: Final = 4096
FREE, GRANTED, LIVE, DYING = range(4)
WORD: Final = struct.Struct("<Q")
MANIFEST: Final = Manifest("llama", "kv", "uint8", 16)
ffi, lib = _core.ffi, _core.lib


def key_of(i: int) -> bytes:
    """Return the key of chunk *i*."""
    return i.to_bytes(32, "big")


def fill(cache: Cache, count: int = CHUNKS) -> None:
    """Store chunks of all sizes, every fourth with metadata, each following the one before."""
    for i in range(count):
        nbytes, meta = SIZES[i % 3] + i, b"four" if i % 4 == 0 else b""
        parent = key_of(i - 1) if i else None
        with cache.put(key_of(i), nbytes, parent=parent, meta=meta) as w:
            w.copy_from((i.to_bytes(4, "big") * (nbytes // 4 + 1))[:nbytes])
    cache.flush()


def store(cache: Cache, i: int, nbytes: int, **options: Any) -> None:
    """Store one chunk."""
    with cache.put(key_of(i), nbytes, **options) as w:
        w.copy_from(bytes([i & 0xFF]) * nbytes)
    cache.flush()


@dataclass(frozen=True)
class Image:
    """The bytes of an object, but for its pages of zeros."""

    size: int
    pages: list[tuple[int, bytes]]

    @classmethod
    def of(cls, address: int, size: int) -> Image:
        """Take them out of memory."""
        memory = np.frombuffer(ffi.buffer(ffi.cast("char *", address), size), dtype=np.uint8)
        rows = memory.reshape(-1, PAGE_BYTES)
        used = np.flatnonzero(rows.any(axis=1)).tolist()
        return cls(size, [(row * PAGE_BYTES, rows[row].tobytes()) for row in used])

    def write(self, path: Path) -> None:
        """Write a file in which they are holes."""
        with path.open("wb") as file:
            file.truncate(self.size)
            for at, page in self.pages:
                os.pwrite(file.fileno(), page, at)


def images_of(pool: Pool) -> tuple[Image, Image]:
    """Return the catalog and the one region of *pool*, of which nothing is going on."""
    pool.stats()  # its counters are those of now
    mapping = pool.mapping
    region = next(iter(mapping.regions()))
    catalog = Image.of(mapping.catalog, mapping.catalog_bytes)
    return catalog, Image.of(region.address, region.nbytes)


@cache
def images() -> tuple[Image, Image]:
    """Return a pool of 60 chunks as its daemon would leave it."""
    host = MemoryHost("16MiB", checksum="commit", chunk_count=512, event_count=256)
    with host as made, made.connect() as pool:
        fill(pool.namespace(MANIFEST, name="prod"))
        return images_of(pool)


@dataclass
class Copy:
    """Catalog and region of a pool in files, and where things are in them."""

    catalog: Path
    region: Path

    def __post_init__(self) -> None:
        self.facts = Catalog.open(self.catalog).superblock

    @classmethod
    def make(cls, folder: Path) -> Self:
        """Write a fresh one."""
        made = folder / "catalog", folder / "r0"
        for image, path in zip(images(), made, strict=True):
            image.write(path)
        return cls(*made)

    def opened(self) -> Abandoned:
        """Open it as `cenote verify --catalog` does."""
        return open_abandoned(self.catalog, [self.region], self.catalog.parent)

    def verified(self, *, counted: bool = False, crc: bool = False) -> Report:
        """Walk its tables, and read its bytes if told so."""
        left = self.opened()
        verifier = Verifier(left.catalog, left.regions)
        verifier.tables(counted=counted)
        if crc:
            verifier.bytes()
        for finding in left.missing:
            verifier.report.add(finding)
        left.tell(verifier.report)
        return verifier.report

    # ---- words --------------------------------------------------------------------------------

    def word(self, at: int) -> int:
        """Return the 8-byte word at an offset of the catalog."""
        with self.catalog.open("rb") as file:
            return int(WORD.unpack(os.pread(file.fileno(), 8, at))[0])

    def put(self, at: int, value: int, nbytes: int = 8) -> None:
        """Overwrite the word there."""
        with self.catalog.open("r+b") as file:
            os.pwrite(file.fileno(), (value % 2 ** (8 * nbytes)).to_bytes(nbytes, "little"), at)

    def chunk_at(self, d: int, field: str = "word") -> int:
        """Return where a field of a descriptor is."""
        return self.facts.offsets["chunks"] + d * 64 + int(ffi.offsetof("struct cn_chunk", field))

    def cold_at(self, d: int, field: str) -> int:
        """Return where a field of a cold record is."""
        return self.facts.offsets["cold"] + d * 64 + int(ffi.offsetof("struct cn_cold", field))

    def super_at(self, field: str) -> int:
        """Return where a field of the superblock is."""
        return int(ffi.offsetof("struct cn_super", field))

    def counter_at(self, field: str) -> int:
        """Return where a counter is."""
        return self.super_at("counters") + int(ffi.offsetof("struct cn_counters", field))

    def namespace_at(self, slot: int, field: str) -> int:
        """Return where a field of a namespace is."""
        at = self.facts.offsets["namespaces"] + slot * int(ffi.sizeof("struct cn_namespace"))
        return at + int(ffi.offsetof("struct cn_namespace", field))

    def session_at(self, index: int, field: str) -> int:
        """Return where a field of the session registry is."""
        at = self.facts.offsets["registry"] + index * int(ffi.sizeof("struct cn_session_entry"))
        return at + int(ffi.offsetof("struct cn_session_entry", field))

    def entry_of(self, d: int) -> int:
        """Return where the index has descriptor *d*."""
        first = self.facts.offsets["index"]
        for at in range(first, first + self.facts.bucket_count * 64, 8):
            word = self.word(at)
            if word and word & 0xFFFFFFFF == d:
                return at
        raise AssertionError(f"no entry of {d}")

    def heads(self) -> list[int]:
        """Return the granules at which a slab begins."""
        first = self.facts.offsets["slabs"]
        count = self.facts.regions[0].bytes >> 21
        return [g for g in range(count) if self.word(first + 8 * g)]

    def slab_at(self, granule: int) -> int:
        """Return where a granule's word is in the slab table."""
        return self.facts.offsets["slabs"] + 8 * granule

    def states(self) -> dict[int, list[int]]:
        """Return the descriptors in each state."""
        found: dict[int, list[int]] = {}
        for d in range(self.facts.chunk_count):
            found.setdefault(self.word(self.chunk_at(d)) >> 24 & 0xFF, []).append(d)
        return found


def kinds(report: Report) -> dict[str, int]:
    """Return what was found, and how often."""
    return {name: found.count for name, found in report.found.items()}
