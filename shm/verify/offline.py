# SPDX-License-Identifier: Apache-2.0
"""
A pool that no daemon serves: where it lies, a private copy of its catalog, and its regions.

Looking takes no lock and writes nothing: a daemon that starts meanwhile must find all as it was.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cenote._native import _core
from cenote.shm.custody import CATALOG
from cenote.shm.errors import CenoteError, Corrupt
from cenote.shm.identity import PROC, boot_id
from cenote.shm.inspect import Catalog
from cenote.shm.media import ObjectName
from cenote.shm.media.posix_shm import SHM_DIR, SHM_NAMES_MAX
from cenote.shm.takeover import DIRTY_STARTS_MAX

from .crc import MappedRegion
from .kinds import Finding
from .report import Report

if TYPE_CHECKING:
    from _cffi_backend import CData

_ffi: Any = _core.ffi
_SUPER_BYTES: Final = _core.lib.CN_SUPER_BYTES
_READ_BYTES: Final = 1 << 24


class Served(CenoteError):
    """A living daemon serves what should be looked at as if none did."""


def abandoned(pool: str, shm_dir: Path = SHM_DIR) -> list[Path]:
    """Return the catalogs of *pool* in named shared memory, the newest first."""
    names = sorted(shm_dir.iterdir())[:SHM_NAMES_MAX] if shm_dir.is_dir() else []
    found = []
    for path in names:
        name = ObjectName.parse(path.name)
        if name is not None and (name.pool, name.part) == (pool, CATALOG):
            with contextlib.suppress(OSError), path.open("rb") as file:
                found.append((_created_ns(file.read(_SUPER_BYTES)), path))
    return [path for _, path in sorted(found, reverse=True)]


def _created_ns(head: bytes) -> int:
    if len(head) != _SUPER_BYTES:
        return 0
    return int(_ffi.from_buffer("struct cn_super[]", head)[0].created_ns)


@dataclass
class Abandoned:
    """
    A pool without a daemon, opened.

    Attributes:
        path: Of its catalog.
        catalog: A private copy.
        regions: Those that were found, by number.
        missing: What is wrong with the others, as findings.
    """

    path: Path
    catalog: Catalog
    regions: dict[int, MappedRegion] = field(default_factory=dict)
    missing: list[Finding] = field(default_factory=list)

    @property
    def _super(self) -> CData:
        return _ffi.cast("struct cn_super *", self.catalog.address)

    @property
    def clean(self) -> bool:
        """Was it left by a daemon that stopped? Its counters are good then."""
        return int(self._super.clean) == 1

    def tell(self, report: Report) -> None:
        """Say how it was left, and what a daemon that takes it over will do; after the walk."""
        head = self._super
        retired = head.pool_state == _core.lib.CN_POOL_RETIRED
        report.left |= {
            "catalog": str(self.path),
            "state": "retired" if retired else "clean" if self.clean else "dirty",
            "keeper_pid": int(head.keeper_pid),
            "this_boot": bytes(head.boot_id) == boot_id(),
            "dirty_starts": sum(ns != 0 for ns in head.dirty_starts_ns),
            "sessions": report.walked["sessions"],
            "granted": report.states["granted"],
            "dying": report.states["dying"],
            "links": report.count("unlinked"),
            "twins": report.count("twin"),
            "unindexes": report.count("dangling") + report.count("entry"),
            "takes_over": not (retired or report.blocked) and bytes(head.boot_id) == boot_id(),
        }
        if report.left["dirty_starts"] >= DIRTY_STARTS_MAX and not self.clean:
            report.notes.append(
                f"its daemons died {report.left['dirty_starts'] + 1} times: one that starts within "
                "a minute of these begins with an empty pool"
            )

    def changed(self) -> bool:
        """Has a daemon begun with it since it was copied?"""
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            now = _ffi.from_buffer("struct cn_super[]", file.read(_SUPER_BYTES))
            copied = self._super
            return any(
                getattr(now[0], name) != getattr(copied, name)
                for name in ("boot_token", "keeper_pid", "clean", "pool_state", "sequence")
            )
        return True


def open_abandoned(path: Path, regions: Sequence[Path] = (), shm_dir: Path = SHM_DIR) -> Abandoned:
    """
    Copy the catalog at *path*, and map its regions for reading.

    Args:
        path: A file, or what /proc/PID/fd shows of a memfd.
        regions: Where the regions are, in their order; those of named shared memory are found.
        shm_dir: Where these are.

    Raises:
        Served: A daemon serves it.
        Corrupt, VersionMismatch: It is no catalog, or none of this release.
        OSError: It cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise Corrupt(f"{path} is no file: name the catalog of a pool")
        made = Abandoned(path, _copied(fd, found.st_size, path))
        _check_abandoned(made, found)
    finally:
        os.close(fd)
    for number, facts in enumerate(made.catalog.superblock.regions):
        named = regions[number] if number < len(regions) else None
        _add_region(made, number, facts.bytes, named, shm_dir)
    return made


def _copied(fd: int, size: int, path: Path) -> Catalog:
    head = mmap.mmap(-1, _SUPER_BYTES)
    os.preadv(fd, [head], 0)
    try:
        declared = _catalog_at(head, size).superblock.catalog_bytes
    except Corrupt as error:
        raise Corrupt(
            f"{path} ({size} bytes) is no catalog, or a damaged or truncated one: {error}"
        ) from None
    private = mmap.mmap(-1, declared)
    for first, last in _written(fd, min(declared, size)):
        view = memoryview(private)[first:last]
        if os.preadv(fd, [view], first) != last - first:
            raise Corrupt(f"{path} became shorter while it was read: start again")
        view.release()
    return _catalog_at(private, declared)


def _catalog_at(memory: mmap.mmap, size: int) -> Catalog:
    held = _ffi.from_buffer(memory)
    return Catalog(int(_ffi.cast("uintptr_t", held)), size, (held, memory))


def _written(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the pieces of a file that are no holes: what is never touched costs no memory."""
    at = 0
    while at < size:
        try:
            begin = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return  # nothing but a hole
        end = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        for first in range(begin, end, _READ_BYTES):
            yield first, min(first + _READ_BYTES, end)
        at = max(end, begin + 1)


def _check_abandoned(made: Abandoned, found: os.stat_result) -> None:
    """Nobody serves it: its keeper has not got this very file open."""
    pid = int(made._super.keeper_pid)
    if not 0 < pid < 2**31 or (PROC / str(pid) / "task" / str(os.getpid())).exists():
        return  # nonsense, or a thread of ours: we have it open ourselves
    with contextlib.suppress(OSError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(link.stat(), found):
                    raise Served(
                        f"process {pid} serves pool {made.catalog.superblock.pool!r}, whose catalog"
                        f" {made.path} is: verify it through its daemon (--socket), or stop that"
                    )


def _add_region(
    made: Abandoned, number: int, nbytes: int, named: Path | None, shm_dir: Path
) -> None:
    """Map a region, or note why not."""
    looked = [named] if named is not None else _likely(made, number, shm_dir)
    problem = "it is in no named shared memory: name its file with --region"
    for path in looked:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                mapped = mmap.mmap(file.fileno(), min(size, nbytes), prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", None) or str(error)
            problem = f"{path} cannot be mapped ({text}): name its file with --region"
            continue
        held = _ffi.from_buffer(mapped)
        at = int(_ffi.cast("uintptr_t", held))
        made.regions[number] = MappedRegion(at, len(mapped), (held, mapped))
        problem = f"{path} has {size} bytes" if size < nbytes else ""
        break
    if problem:
        text = f"region {number} of {nbytes} bytes: {problem}"
        made.missing.append(Finding("region", text, region=number))


def _likely(made: Abandoned, number: int, shm_dir: Path) -> list[Path]:
    """Where the objects of named shared memory are: beside the catalog, or where all are."""
    facts = made.catalog.superblock
    own = ObjectName.parse(made.path.name)
    uid = own.uid if own is not None else os.geteuid()
    with contextlib.suppress(CenoteError, ValueError):
        name = str(ObjectName(facts.pool, facts.pool_id.hex()[:16], f"r{number}", uid))
        return [folder / name for folder in dict.fromkeys((made.path.parent, shm_dir))]
    return []
