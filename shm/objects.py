# SPDX-License-Identifier: Apache-2.0
"""
The memory of one pool in the daemon: catalog and regions, made new or taken over, and mapped.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from cenote._native import _core

from . import media
from .custody import CATALOG, name_in
from .errors import check
from .identity import boot_id, signals_wait, start_ns
from .media import MediumObject, MediumSpec, ObjectName
from .pool_spec import PoolSpec, catalog_bytes, format_of, medium_name
from .session import Region

Progress = Callable[[int], None]
POOL_ID_BYTES: Final = 16


class PoolObjects:
    """
    Catalog and regions, mapped writable. make() or open(), then close().

    Attributes:
        pool_id: 16 bytes that name this making of the pool.
        catalog: Address of the mapped catalog.
        regions: Addresses of the mapped regions.
        made: The objects themselves, the catalog first.
    """

    def __init__(self, spec: PoolSpec, pool_id: bytes) -> None:
        self.spec = spec
        self.pool_id = pool_id
        self.catalog = 0
        self.catalog_bytes = catalog_bytes(spec)
        self.regions: list[int] = []
        self.made: list[MediumObject] = []
        self._undo = contextlib.ExitStack()

    @classmethod
    def make(cls, spec: PoolSpec, progress: Progress, stop: threading.Event | None) -> PoolObjects:
        """
        Make new objects under a new pool id, give them their memory, and format the catalog.

        Nothing is left behind when this raises: see PoolHost.create().
        """
        _guard_copies(spec)
        made = cls(spec, spec.place + secrets.token_bytes(POOL_ID_BYTES - len(spec.place)))
        try:
            made._make(progress, stop)
        except BaseException:
            made.close(unlink=True)
            raise
        return made

    @classmethod
    def open(cls, spec: PoolSpec, pool_id: bytes, parts: Mapping[str, int]) -> PoolObjects:
        """
        Map what a dead daemon left. *parts*: descriptors from custody; they stay the caller's.

        Raises:
            MediumError: An object is missing, or not what it was. Nothing was changed.
            OSError: The kernel refused.
        """
        _guard_copies(spec)
        made = cls(spec, pool_id)
        try:
            for part, medium, bytes_ in made._parts():
                fd = os.dup(parts[part]) if part in parts else -1
                made._map(made._opened(medium, part, bytes_, fd))
        except BaseException:
            made.close(unlink=False)
            raise
        return made

    def _opened(self, medium: MediumSpec, part: str, bytes_: int, fd: int) -> MediumObject:
        try:
            return media.open_again(medium, self.name_of(part), bytes_, fd)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise

    def name_of(self, part: str) -> ObjectName:
        """Return the name of an object of this pool."""
        return ObjectName(self.spec.name, self.pool_id.hex()[:16], part, os.geteuid())

    def _parts(self) -> list[tuple[str, MediumSpec, int]]:
        regions = [(f"r{i}", r.medium, r.bytes) for i, r in enumerate(self.spec.regions)]
        return [(CATALOG, self.spec.catalog_medium, self.catalog_bytes), *regions]

    def _make(self, progress: Progress, stop: threading.Event | None) -> None:
        touched = media.Pretoucher(progress, stop)
        populate = [region.populate for region in self.spec.regions]
        for (part, medium, bytes_), touch in zip(
            self._parts(), [any(populate), *populate], strict=True
        ):
            with signals_wait():  # or a stop in between leaves a name that nobody removes
                one = media.create(medium, self.name_of(part), bytes_)
                self.made.append(one)
            address = self._map(one)
            if touch:
                touched(address, one.bytes)
        self._format()

    def _map(self, one: MediumObject) -> int:
        if one not in self.made:
            self.made.append(one)
        address = one.map(writable=True)
        self._undo.callback(media.unmap, address, one.bytes)
        if self.catalog:
            self.regions.append(address)
        else:
            self.catalog = address
        return address

    def _format(self) -> None:
        keep: list[Any] = []
        form = format_of(self.spec, keep)
        form.pool_id = self.pool_id
        form.hash_seed = [secrets.randbits(64), secrets.randbits(64)]
        form.created_ns = time.time_ns()
        form.keeper_start_ns = start_ns(os.getpid())
        form.boot_id = boot_id()
        where = _core.ffi.cast("void *", self.catalog)
        status = _core.lib.cn_catalog_format(where, self.catalog_bytes, form)
        check(status, f"format the catalog of pool {self.spec.name!r}")

    @property
    def capacity_bytes(self) -> int:
        """The memory of all regions."""
        return sum(one.bytes for one in self.made[1:])

    @property
    def facts(self) -> tuple[Region, ...]:
        """What a client is told of the regions."""
        return tuple(
            Region(one.bytes, medium_name(one.spec), one.page_bytes) for one in self.made[1:]
        )

    def to_keep(self) -> dict[str, int]:
        """Return the descriptors that have no name by which they could be found again."""
        return {
            name_in(self.pool_id, part): one.fd
            for (part, _, _), one in zip(self._parts(), self.made, strict=True)
            if not one.named
        }

    def close(self, *, unlink: bool) -> None:
        """Unmap, close, and remove the names if told so. Idempotent."""
        self._undo.close()
        for one in self.made:
            if unlink:
                one.unlink()
            one.close()
        self.made = []


def _guard_copies(spec: PoolSpec) -> None:
    """What is not sealed may be truncated under the keeper's copies: a lost chunk, no SIGBUS."""
    if all(region.medium.kind == "memfd" for region in spec.regions):
        return
    syserr = _core.ffi.new("struct cn_syserr *")
    status = _core.lib.cn_guard_install(syserr)
    check(status, "install the SIGBUS guard", errno=syserr.err)
