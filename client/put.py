# SPDX-License-Identifier: Apache-2.0
"""One chunk on its way into the pool: reserved, filled in place, committed or aborted."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from cenote.shm.grant import Record, Reservation, Source
from cenote.shm.handle import Grant

from .chunk import Token
from .errors import PoolGone

if TYPE_CHECKING:
    from .pool import Attachment

CHECKSUM_AT_COMMIT: Final = "commit"
CHECKSUM_OFF: Final = "off"


class Put:
    """
    An extent of the pool to be filled: `with cache.put(key, nbytes) as w:`.

    Leaving the block commits, an exception aborts. A Put that is dropped without either is
    aborted. Fill it through `memory` or `copy_from`; one thread at a time. Where a device fills
    it, commit after the copy's event.
    """

    __slots__ = (
        "_attachment",
        "_crc",
        "_grant",
        "_memory",
        "_record",
        "_reservation",
        "_touched",
        "_wait_ms",
        "nbytes",
        "reference",
        "state",
    )

    def __init__(
        self,
        attachment: Attachment,
        nbytes: int,
        record: Record,
        meta: bytes,
        wait_ms: int,
    ) -> None:
        self.state = "failed"  # while the reservation is not there
        self._attachment = attachment
        self._reservation = Reservation(attachment.handle, nbytes, meta, wait_ms)
        self._grant: Grant | None = None
        self._memory: memoryview | None = None
        self._record = record
        self._crc: int | None = None
        self._touched = False
        self._wait_ms = wait_ms
        self.nbytes: Final = nbytes
        self.reference: Final = self._reservation.ref
        self.state = "open"

    @property
    def key(self) -> bytes:
        """The key that the chunk will have."""
        return self._record.key

    @property
    def position(self) -> int:
        """Its place in its chain, 0xffffffff when that is unknown."""
        return self._record.position

    @property
    def memory(self) -> memoryview:
        """
        The extent as writable memory of `nbytes` bytes. Ends with the put (ValueError afterwards).

        Its contents are undefined until they are written.
        """
        if self.state != "open":
            raise ValueError(f"this put is {self.state}: its memory is not yours any more")
        if self._memory is None:
            self._grant = self._reservation.grant()
            self._memory = self._grant.memory
        self._touched = True  # whoever has it may write at any time: a CRC of ours would not hold
        return self._memory

    @property
    def token(self) -> bytes:
        """36 bytes for `pool.open()` elsewhere; a miss until the daemon has linked the chunk."""
        return Token(self._attachment.pool_id, self.reference, self._record.key[:8]).pack()

    def copy_from(self, source: Any, offset: int = 0) -> int:
        """
        Copy a buffer, array or CPU tensor to *offset*, making its CRC in the same pass.

        Large copies release the GIL. Returns the number of bytes.

        Raises:
            ValueError: It does not fit, or is not contiguous, or the put is over.
        """
        if self.state != "open":
            raise ValueError(f"this put is {self.state}: nothing can be copied into it any more")
        data = Source(source)
        if not 0 <= offset <= self.nbytes - data.nbytes:
            raise ValueError(
                f"{data.nbytes} bytes at offset {offset} do not fit into the {self.nbytes} bytes "
                "of this put: reserve as many as you have"
            )
        whole = data.nbytes == self.nbytes and self._attachment.checksum != CHECKSUM_OFF
        self._crc = self._reservation.copy_in(data.at, data.nbytes, offset, crc=whole)
        return data.nbytes

    def commit(self) -> None:
        """
        Hand the chunk over. The daemon links it soon; `flush()` waits until it has.

        If the key is there already, the newcomer is dropped without an error.

        Raises:
            BufferError: A view of `memory` (an array, a slice) is still alive. Nothing is
                committed; the extent returns when the last view has died.
            PoolGone: The daemon is gone, or the pool was closed.
            ValueError: The put is over.
        """
        if self.state != "open":
            raise ValueError(f"this put is {self.state}: it cannot be committed any more")
        if not self._attachment.connected:
            self.abort()
            raise PoolGone(
                f"the daemon of pool {self._attachment.pool!r} is gone: nothing was committed"
            )
        self._end_memory()
        crc = self._crc if not self._touched else None
        if crc is None and self._attachment.checksum == CHECKSUM_AT_COMMIT:
            crc = self._reservation.checksum()
        self.state = "committed"
        self._reservation.commit(self._record, crc, self._wait_ms)

    @property
    def forked(self) -> bool:
        """Is this process a forked child of the one that reserved? Then commit() says so (I13)."""
        return self._attachment.handle.forked

    def ring_is_roomy(self) -> bool:
        """Can commit() be expected not to wait?"""
        return self._attachment.handle.ring_is_roomy()

    def abort(self) -> None:
        """Give the extent back: the key stays absent. Does nothing when the put is over."""
        if self.state != "open":
            return
        self.state = "aborted"
        try:
            self._release_memory()
        except BufferError:
            return  # a view lives: the reservation goes with it
        self._reservation.abort()

    def _end_memory(self) -> None:
        try:
            self._release_memory()
        except BufferError as error:
            self.state = "aborted"
            self._grant = self._memory = None
            raise BufferError(
                f"a view of this put's memory is still alive, so that its {self.nbytes} bytes "
                "could change after the commit: delete arrays and slices first. Nothing was "
                "committed"
            ) from error

    def _release_memory(self) -> None:
        """Take the memory back, or raise BufferError when somebody still looks at it."""
        if self._memory is None or self._grant is None:
            return
        self._memory.release()
        self._grant.close()
        self._grant = self._memory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
        elif self.state == "open":
            self.commit()

    def __repr__(self) -> str:
        return f"<Put of {self.nbytes} bytes under {self._record.key.hex()[:16]}…, {self.state}>"
