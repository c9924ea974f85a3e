# SPDX-License-Identifier: Apache-2.0
"""
What a pool is made of, and how large its catalog becomes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cenote._native import _core

from . import media
from .errors import InvalidArgument
from .media import MediumSpec
from .session import MEDIA

if TYPE_CHECKING:
    from _cffi_backend import CData

LEASE_SLOTS_STEP: Final = 512
CATALOG_MEDIUM: Final = media.parse_medium("memfd")


@dataclass(frozen=True)
class RegionSpec:
    """One region to make: its medium, its size, and whether its pages are touched at start."""

    medium: MediumSpec
    bytes: int
    populate: bool = True


@dataclass(frozen=True)
class PoolSpec:
    """
    What a pool is made of. Sizes are bytes.

    place begins the pool id: daemons of one lock, and of no other, have the same.
    policy, high_water, low_water, checksum and reader_lease_share can be changed later.
    """

    name: str
    regions: tuple[RegionSpec, ...]
    chunk_count: int = 4096
    lease_slots: int = 8192
    event_count: int = 65_536
    policy: str = "use-count"
    high_water: float = 0.95
    low_water: float = 0.98
    checksum: str = "lazy"
    reader_lease_share: float = 0.25
    place: bytes = b""

    @property
    def catalog_medium(self) -> MediumSpec:
        """Named shared memory beside named regions; a sealed memfd everywhere else."""
        named = [region.medium for region in self.regions if region.medium.kind == "shm"]
        return MediumSpec("shm", named[0].page_bytes) if named else CATALOG_MEDIUM

    def wants(self) -> list[tuple[MediumSpec, int]]:
        """Return what media.check_rooms() must know before anything is made."""
        regions = [(region.medium, region.bytes) for region in self.regions]
        return [(self.catalog_medium, catalog_bytes(self)), *regions]


def format_of(spec: PoolSpec, keep: list[Any]) -> CData:
    """Return the cn_format of *spec*; *keep* owns what it points to."""
    made = _core.ffi.new("struct cn_format *")
    name = _core.ffi.new("char[]", spec.name.encode("ascii"))
    keep.append(name)
    made.pool_name = name
    made.chunk_count = spec.chunk_count
    made.lease_slots = -(-spec.lease_slots // LEASE_SLOTS_STEP) * LEASE_SLOTS_STEP
    made.event_count = spec.event_count
    made.region_count = len(spec.regions)
    for info, region in zip(made.regions, spec.regions, strict=False):
        info.bytes = region.medium.round_up(region.bytes)
        info.page_bytes = region.medium.page_bytes
        info.medium = MEDIA[medium_name(region.medium)]
        info.node = -1
    return made


def medium_name(medium: MediumSpec) -> str:
    """Return what clients call the medium: what it is on, not how it was asked for."""
    return "memfd" if medium.kind == "hugepages" else medium.kind


def catalog_bytes(spec: PoolSpec) -> int:
    """
    Return the size of the catalog of *spec*.

    Raises:
        InvalidArgument: A number in it is out of range.
    """
    keep: list[Any] = []
    bytes_ = int(_core.lib.cn_catalog_bytes(format_of(spec, keep)))
    if bytes_:
        return bytes_
    raise InvalidArgument(
        f"pool {spec.name!r}: {spec.chunk_count} chunks, {spec.lease_slots} lease slots, "
        f"{spec.event_count} events and {len(spec.regions)} regions make no catalog: each region "
        "needs 2 MiB at least; see docs/configuration.md for the other limits"
    )
