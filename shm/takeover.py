# SPDX-License-Identifier: Apache-2.0
"""
What a dead daemon left of a pool, and whether the next one may take it over (I7).

Looking changes nothing. The lock of the pool is held, so its last daemon is dead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cenote._native import _core, _short

from . import media
from .custody import CATALOG, KeptSession, name_in, parts_of, sessions_in
from .errors import CenoteError
from .identity import boot_id
from .pool_spec import PoolSpec, catalog_bytes, format_of

if TYPE_CHECKING:
    from _cffi_backend import CData

DIRTY_STARTS_MAX: Final = 3  # so many within DIRTY_STARTS_S, and it begins with an empty pool
DIRTY_STARTS_S: Final = 60
_SUPER_BYTES: Final = _core.lib.CN_SUPER_BYTES


class CannotKeep(CenoteError):
    """
    What is there cannot be taken over; a new pool is made, and it is left alone.

    Attributes:
        pool_id: Of what is there, or None when it is of no use to anybody.
    """

    def __init__(self, message: str, pool_id: bytes | None = None) -> None:
        super().__init__(message)
        self.pool_id = pool_id


class OtherLayout(CenoteError):
    """What is there was made by another release or configuration; only --reformat drops it."""


@dataclass(frozen=True)
class Left:
    """
    A pool that a dead daemon left.

    Attributes:
        pool_id: Of that pool.
        created_ns: When it was made (CLOCK_REALTIME).
        keeper_pid: Of the dead daemon, as it noted it.
        clean: It was stopped, not killed.
        live_chunks: Chunks in it, as counted last.
        live_bytes: Their memory.
        parts: What custody has of it, by part; the descriptors are whoever's called find().
        sessions: The sessions among these.
    """

    pool_id: bytes
    created_ns: int
    keeper_pid: int
    clean: bool
    live_chunks: int
    live_bytes: int
    parts: Mapping[str, int]
    sessions: tuple[KeptSession, ...]


def find(spec: PoolSpec, kept: Mapping[str, int]) -> Left | None:
    """
    Return the pool of *spec* that can be taken over, or None when there is none.

    Args:
        spec: What the configuration wants.
        kept: What custody has of it, by name.

    Raises:
        OtherLayout: There is one that this build, or this configuration, cannot use.
        CannotKeep: There is one, and something of it is missing, or it crashes ever again.
    """
    newest: CData | None = None
    foreign = ""
    for superblock, where in _superblocks(spec, kept):
        problem = _foreign(superblock)
        if problem:
            foreign = foreign or f"{where} {problem}"
        elif newest is None or superblock.created_ns > newest.created_ns:
            newest = superblock
    if newest is None:
        if foreign:
            raise OtherLayout(
                f"pool {spec.name!r}: {foreign}. Nothing was touched. Start the release that made "
                "it, or drop it with --reformat"
            )
        return None
    if newest.pool_state == _core.lib.CN_POOL_RETIRED:
        return None
    _check_spec(spec, newest)
    _check_history(spec, newest)
    return _left(newest, kept)


def _superblocks(spec: PoolSpec, kept: Mapping[str, int]) -> Iterator[tuple[CData, str]]:
    """Yield a copy of each superblock that may be this pool's, and where it is."""
    for name, fd in kept.items():
        found = _read(fd) if name.endswith(f".{CATALOG}") else None
        if found is not None and name == name_in(bytes(found.pool_id), CATALOG):
            yield found, "the catalog in custody"
    if spec.catalog_medium.kind != "shm":
        return
    for stale in media.list_stale(spec.name, os.geteuid(), place=spec.place.hex()):
        if stale.name.part != CATALOG:
            continue
        found = _read_path(stale.path)
        if found is not None and bytes(found.pool_id)[:8].hex() == stale.name.pool_id:
            yield found, str(stale.path)


def _read_path(path: Path) -> CData | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        return _read(fd)
    finally:
        os.close(fd)


def _read(fd: int) -> CData | None:
    """Copy the superblock behind *fd* (I4); None when it is none of any release."""
    try:
        raw = os.pread(fd, _SUPER_BYTES, 0)
    except OSError:
        return None
    superblock = _core.ffi.new("struct cn_super *")
    if len(raw) != _SUPER_BYTES:
        return None
    _core.ffi.memmove(superblock, raw, _SUPER_BYTES)
    return superblock if superblock.magic == _core.lib.CN_MAGIC else None


def _foreign(superblock: CData) -> str:
    """Say what keeps this build from reading it; "" when nothing does."""
    ours = _core.lib.CN_LAYOUT_VERSION, _short.lib.cn_abi_fingerprint()
    theirs = int(superblock.layout_version), int(superblock.abi_fingerprint)
    if theirs != ours:
        return (
            f"has memory layout {theirs[0]} (fingerprint {theirs[1]:#x}), and this release has "
            f"{ours[0]} ({ours[1]:#x})"
        )
    return ""


def _check_spec(spec: PoolSpec, superblock: CData) -> None:
    """Other sizes are another pool."""
    want = format_of(spec, [])
    differing = [
        f"{name}: {int(getattr(superblock, name))}, configured {int(getattr(want, name))}"
        for name in ("lease_slots", "region_count")
        if int(getattr(superblock, name)) != int(getattr(want, name))
    ]
    if int(superblock.catalog_bytes) != catalog_bytes(spec):
        differing.append("the number of chunks or events, or the size of a region")
    for i in range(min(int(superblock.region_count), int(want.region_count))):
        there, wanted = superblock.regions[i], want.regions[i]
        differing += [
            f"region {i}, {name}: {int(getattr(there, name))}, configured "
            f"{int(getattr(wanted, name))}"
            for name in ("bytes", "medium", "page_bytes")
            if int(getattr(there, name)) != int(getattr(wanted, name))
        ]
    if differing:
        raise OtherLayout(
            f"pool {spec.name!r} is there with {int(superblock.counters.live_chunks)} chunks, and "
            f"is another one than the configuration has ({'; '.join(differing)}). Nothing was "
            "touched. Give the old sizes, or drop it with --reformat"
        )


def _check_history(spec: PoolSpec, superblock: CData) -> None:
    if bytes(superblock.boot_id) != boot_id():
        raise CannotKeep(f"pool {spec.name!r} was left before this host was started again")
    since_ns = time.time_ns() - DIRTY_STARTS_S * 10**9
    recent = [ns for ns in superblock.dirty_starts_ns if int(ns) > since_ns]
    if not superblock.clean and len(recent) >= DIRTY_STARTS_MAX:
        raise CannotKeep(
            f"the daemon of pool {spec.name!r} died {len(recent) + 1} times within "
            f"{DIRTY_STARTS_S} s: the old pool is kept for `cenote verify`",
            bytes(superblock.pool_id),
        )


def _left(superblock: CData, kept: Mapping[str, int]) -> Left:
    pool_id = bytes(superblock.pool_id)
    parts = parts_of(kept, pool_id)
    return Left(
        pool_id=pool_id,
        created_ns=int(superblock.created_ns),
        keeper_pid=int(superblock.keeper_pid),
        clean=bool(superblock.clean),
        live_chunks=int(superblock.counters.live_chunks),
        live_bytes=int(superblock.counters.live_bytes),
        parts=parts,
        sessions=tuple(sessions_in(parts)),
    )


def drop_names(spec: PoolSpec, keep_id: bytes | None) -> list[tuple[str, int]]:
    """
    Unlink what dead daemons of this pool left, but for the pool *keep_id*.

    Returns:
        Name and bytes of each. Living readers keep what they have mapped.

    Raises:
        MediumError: At a file's path lies something that is not ours.
    """
    uid = os.geteuid()
    keep = keep_id.hex()[:16] if keep_id is not None else ""
    gone = []
    for stale in media.list_stale(spec.name, uid, place=spec.place.hex()):
        if stale.name.pool_id != keep:
            stale.path.unlink(missing_ok=True)
            gone.append((str(stale.name), stale.bytes))
    for region in spec.regions:
        if region.medium.kind == "file":
            place = spec.place.hex()
            owner = media.unlink_stale_file(region.medium, spec.name, uid, keep, place=place)
            gone += [(str(region.medium.path), region.bytes)] if owner else []
    return gone
