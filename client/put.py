# SPDX-License-Identifier: Apache-2.0
"""One chunk on its way into the pool: reserved, filled in place, committed or aborted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from cenote.shm import handle as _handle
from cenote.shm.transfer import as_buffer

from . import tensors
from .chunk import Token

if TYPE_CHECKING:
    import torch
    from numpy.typing import DTypeLike, NDArray

CHECKSUM_OFF: Final = "off"


class Put(_handle.Put):
    """
    An extent of the pool to be filled: `with cache.put(key, nbytes) as w:`.

    Leaving the block commits, an exception aborts. A Put that is dropped without either is
    aborted. Fill it through `memory`, `copy_from` or, by a device, through `address`; one thread
    at a time. Where a device fills it, commit after the copy's event. Never call the constructor:
    puts come from `Cache.put`.

    Methods:
        copy_from(source, offset=0): Copy a buffer, array or CPU tensor to *offset*, making its CRC
            in the same pass. Large copies release the GIL. Returns the number of bytes. ValueError:
            it does not fit, or is not contiguous, or the put is over. Several copies make the CRC
            together when each begins where the one before ended, from 0 to the end.
        copy_pieces(addresses, lengths, offset=0): Copy pieces of memory to *offset*, one behind the
            other, in one call. Both are an array('Q'), or another buffer of unsigned 64-bit
            numbers. Otherwise as copy_from. ValueError also: an address is 0.
        commit(): Hand the chunk over. The daemon links it soon; `flush()` waits until it has. If
            the key is there already, the newcomer is dropped without an error. BufferError: a view
            of the memory (an array, a tensor, a slice) is still alive; nothing is committed, and
            the extent returns when the last view has died. PoolGone: the daemon is gone, or the
            pool was closed. Timeout: the submission ring stayed full. ValueError: the put is over.
        abort(): Give the extent back: the key stays absent. Does nothing when the put is over.

    Attributes:
        memory: The extent as writable memory of `nbytes` bytes, undefined until it is written.
            Ends with the put (ValueError afterwards). For a tensor use `tensor()`: one made with
            torch.frombuffer(w.memory) is a view that commit() cannot see.
        address: Where it lies in this process, for adapters that hand pointers to C.
        nbytes: Length in bytes.
        key: The key that the chunk will have.
        position: Its place in its chain, 0xffffffff when that is unknown.
        reference: Descriptor and generation.
        state: "open", "committing" (the ring is full), "committed" or "aborted".
    """

    __slots__ = ()

    def numpy(
        self, dtype: DTypeLike = "uint8", shape: int | Sequence[int] | None = None
    ) -> NDArray[Any]:
        """Return a writable array over the extent; it must be gone before commit()."""
        return tensors.array_over(self.memory, self.nbytes, dtype, shape)

    def tensor(
        self, dtype: torch.dtype | str = "uint8", shape: int | Sequence[int] | None = None
    ) -> torch.Tensor:
        """Return a tensor over the extent, without a copy; it must be gone before commit()."""
        # The face holds a view: torch would let the buffer of `memory` go, unseen by commit().
        face = _handle.Span(self.address, self.nbytes, memoryview(self.memory))
        return tensors.tensor_over(face, self.nbytes, dtype, shape)

    @property
    def token(self) -> bytes:
        """36 bytes for `pool.open()` elsewhere; a miss until the daemon has linked the chunk."""
        return Token(_handle.pool_id_of(self.owner), self.reference, self.key[:8]).pack()

    @property
    def forked(self) -> bool:
        """Is this process a forked child of the one that reserved? Then commit() says so (I13)."""
        return _handle.is_forked(self.owner)

    def ring_is_roomy(self) -> bool:
        """Can commit() be expected not to wait?"""
        return _handle.ring_is_roomy(self.owner)

    def _buffer_of(self, source: Any) -> Any:
        """copy_from() for what exports no plain buffer: tensors, bfloat16 arrays."""
        return as_buffer(source)

    def __repr__(self) -> str:
        return f"<Put of {self.nbytes} bytes under {self.key.hex()[:16]}…, {self.state}>"
