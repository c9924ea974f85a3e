# SPDX-License-Identifier: Apache-2.0
"""
A leased chunk's bytes, read by another process of the same engine without a lease of its own.

A lease by key or token is a question that may be answered no: a chunk that somebody deleted, or
whose time is over, is absent, though its bytes stay for as long as somebody holds them (I2). So the
one who holds says where the bytes are, and the other reads them there, in its own mapping of the
same pool, until it has said that it is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cenote.shm.transfer import Pieces

if TYPE_CHECKING:
    from cenote.client import Chunk, Pool
    from cenote.shm.session import Mapping


class Place(NamedTuple):
    """
    Where a chunk lies in its pool. It is there for as long as somebody holds the chunk.

    Attributes:
        region: Number of the region.
        offset: In it.
        nbytes: Of the chunk.
    """

    region: int
    offset: int
    nbytes: int


class Atlas:
    """
    Where one mapping of a pool lies in this process.

    Attributes:
        pool_id: Which pool it is.
        mapping: The memory; it stays mapped while this is kept.
    """

    def __init__(self, pool_id: bytes, mapping: Mapping) -> None:
        self.pool_id: Final = pool_id
        self.mapping: Final = mapping
        self._regions: Final = {
            each.region: each for each in mapping.regions() if not each.writable
        }

    def place(self, chunk: Chunk) -> Place | None:
        """Return where a chunk is; None when it lies in no region of this mapping."""
        for region in self._regions.values():
            offset = chunk.address - region.address
            if offset >= 0 and offset + chunk.nbytes <= region.nbytes:
                return Place(region.region, offset, chunk.nbytes)
        return None

    def borrow(self, place: Place) -> Borrowed | None:
        """Return the bytes at a place; None where nothing is mapped."""
        region = self._regions.get(place.region)
        if region is None or place.offset < 0 or place.offset + place.nbytes > region.nbytes:
            return None
        return Borrowed(self.mapping, region.address + place.offset, place.nbytes)


class Atlases:
    """The atlas of the mapping that a process has now: another one after each reconnect."""

    def __init__(self) -> None:
        self._atlas: Atlas | None = None

    def of(self, pool: Pool) -> Atlas:
        """Return the atlas of a pool's present mapping."""
        atlas = self._atlas
        while atlas is None or atlas.mapping is not pool.mapping:
            before, mapping = pool.pool_id, pool.mapping
            if before == pool.pool_id:  # else it reconnected between the two
                self._atlas = atlas = Atlas(before, mapping)
        return atlas


class Borrowed:
    """
    Bytes that somebody else holds. What a Copier wants of a chunk, but for the checksum.

    Attributes:
        address: Of the first byte, in this process.
        nbytes: How many.
    """

    def __init__(self, mapping: Mapping, address: int, nbytes: int) -> None:
        self._mapping = mapping  # keeps it mapped
        self.address: Final = address
        self.nbytes: Final = nbytes

    def copy_pieces_to(
        self, addresses: Any, lengths: Any, offset: int = 0, *, verify: bool = False
    ) -> bool:
        """See `Chunk.copy_pieces_to`; nothing is ever verified here."""
        pieces = Pieces(addresses, lengths)
        if verify or offset < 0 or offset + pieces.nbytes > self.nbytes:
            raise ValueError(
                f"{pieces.nbytes} bytes at offset {offset} of {self.nbytes} borrowed ones "
                f"({verify=}): ask for those that are there, and compare nothing"
            )
        pieces.copy_from(self.address + offset, None)
        return False
