# SPDX-License-Identifier: Apache-2.0
"""A cached chunk, leased: its bytes in place, and the forms in which they are wanted."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cenote.shm import handle as _handle
from cenote.shm.transfer import Pieces, copy_out

from . import tensors
from .errors import ChunkLost, ForkedChild

if TYPE_CHECKING:
    import torch
    from numpy.typing import DTypeLike, NDArray

# "cnt" and the version; pool id; descriptor and generation; first 8 bytes of the key
_TOKEN: Final = struct.Struct("<3sB16sQ8s")
_TOKEN_MAGIC: Final = b"cnt"
_TOKEN_VERSION: Final = 1
TOKEN_BYTES: Final = _TOKEN.size


@dataclass(frozen=True, slots=True)
class Token:
    """What a token says: which chunk of which pool, and how to know it again."""

    pool_id: bytes
    ref: int
    key_head: bytes

    def pack(self) -> bytes:
        """Return the 36 bytes that travel to another process."""
        return _TOKEN.pack(_TOKEN_MAGIC, _TOKEN_VERSION, self.pool_id, self.ref, self.key_head)

    @classmethod
    def parse(cls, raw: bytes) -> Token:
        """Return what *raw* says; ValueError when it is no token of this version."""
        if len(raw) != TOKEN_BYTES:
            raise ValueError(f"a token has {TOKEN_BYTES} bytes, and {len(raw)} were given")
        magic, version, pool_id, ref, key_head = _TOKEN.unpack(raw)
        if magic != _TOKEN_MAGIC:
            raise ValueError(f"these bytes are no token: they begin with {magic!r}")
        if version != _TOKEN_VERSION:
            raise ValueError(
                f"the token has version {version}, and this build knows {_TOKEN_VERSION}: install "
                "the same cenote on both sides"
            )
        return cls(pool_id, ref, key_head)


class Chunk(_handle.Lease):
    """
    A lease on a chunk: while it, or anything made from it, lives, its bytes do not change or move.

    `release()`, or leaving `with chunk:`, drops the chunk's own reference; the lease itself ends
    when the last view (memoryview, slice, array, tensor) has died. Never call the constructor:
    chunks come from `Cache.get`, `Cache.get_many` and `Pool.open`.

    Attributes:
        memory: Read-only memoryview of the bytes; ValueError after release.
        nbytes: Length in bytes; also len(chunk).
        meta: What the writer stored beside it, b"" when nothing.
        address: Where the bytes lie in this process, for adapters that hand pointers to C.
        ref: Descriptor and generation: names these bytes in this pool, never others.
        crc32c: The recorded CRC-32C of the bytes; None when none is recorded (yet).
    """

    __slots__ = ()

    @property
    def key(self) -> bytes:
        """The 32 bytes under which the chunk was stored. ValueError after release."""
        if _handle.is_forked(self.owner):
            raise ForkedChild("this chunk belongs to the parent process: connect in the child")
        key = _handle.key_of(self.owner, self.ref)
        if key is None:
            raise ValueError("the chunk was released and has left the pool: keep it while you ask")
        return key

    @property
    def token(self) -> bytes:
        """
        36 bytes that let another process on this host open the chunk: `pool.open(token)`.

        Keep the chunk until the other side has opened it: once nobody holds a lease, it may be
        evicted, and the token is a miss. ValueError after release.
        """
        key = self.key
        return Token(_handle.pool_id_of(self.owner), self.ref, key[:8]).pack()

    def numpy(
        self, dtype: DTypeLike = "uint8", shape: int | Sequence[int] | None = None
    ) -> NDArray[Any]:
        """
        Return a read-only array over the chunk, without a copy.

        Args:
            dtype: Element type; "bfloat16" and the float8 types need ml_dtypes.
            shape: Shape; one dimension by default. One extent may be -1.

        Raises:
            ValueError: Type and shape do not take exactly the chunk's bytes, or it was released.
        """
        return tensors.array_over(self, self.nbytes, dtype, shape)

    def tensor(
        self,
        dtype: torch.dtype | str,
        shape: int | Sequence[int] | None = None,
        copy: bool = False,
    ) -> torch.Tensor:
        """
        Return a CPU tensor over the chunk.

        torch has no read-only tensors: an in-place operation on it ends this process with SIGSEGV,
        as the pool is mapped read-only. Ask for a copy where something may write.

        Args:
            dtype: torch.bfloat16, torch.float8_e4m3fn ... or its name.
            shape: Shape; one dimension by default. One extent may be -1.
            copy: Make a private, writable copy instead; it holds no lease.

        Raises:
            ValueError: Type and shape do not take exactly the chunk's bytes, or it was released.
        """
        return tensors.tensor_of(self, dtype, shape, copy=copy)

    # copy_to(target) is the C method: copies the bytes into writable, contiguous memory of exactly
    # that length; ValueError otherwise, or when the chunk was released. Large copies let other
    # threads run.

    def _copy_to_other(self, target: Any) -> None:
        """copy_to() for what exports no plain buffer: tensors, bfloat16 arrays."""
        with self.memory:
            copy_out(self.address, self.nbytes, target)

    def copy_pieces_to(
        self, addresses: Any, lengths: Any, offset: int = 0, *, verify: bool = False
    ) -> bool:
        """
        Copy the pieces that stand one behind the other in the chunk to where they belong.

        One call into C for all of them; large copies let other threads run. The addresses are
        taken on trust, as everywhere in C.

        Args:
            addresses: Where each piece goes, 0 for one that is not wanted: an array('Q'), or
                another buffer of unsigned 64-bit numbers.
            lengths: How long each piece is, the unwanted ones too.
            offset: Where in the chunk the first of them begins.
            verify: Make the CRC-32C in the same pass and compare it; the pieces must be the whole
                chunk.

        Returns:
            True when a checksum was compared, False when none was: not asked for, or not recorded.

        Raises:
            ChunkLost: The checksums differ: what was copied is not what was stored. Or the medium
                failed.
            ValueError: The pieces do not fit into the chunk, or with *verify* are not all of it;
                the arrays are no such numbers; the chunk was released.
        """
        if _handle.is_forked(self.owner):
            raise ForkedChild("this chunk belongs to the parent process: connect in the child")
        pieces = Pieces(addresses, lengths)
        if offset < 0 or offset + pieces.nbytes > self.nbytes:
            raise ValueError(
                f"{pieces.nbytes} bytes at offset {offset} do not lie within the {self.nbytes} "
                "bytes of this chunk: ask for those that it has"
            )
        if verify and pieces.nbytes != self.nbytes:
            raise ValueError(
                f"the pieces have {pieces.nbytes} of the chunk's {self.nbytes} bytes, and its "
                "checksum is that of all: give all pieces (address 0: not wanted), or no verify"
            )
        with self.memory:  # the lease, for as long as it takes
            recorded = self.crc32c if verify else None
            crc = pieces.copy_from(self.address + offset, None if recorded is None else 0)
        if crc != recorded:
            raise self._lost()
        return recorded is not None

    def verify(self) -> bool:
        """
        Compare the bytes with the recorded CRC-32C.

        Returns:
            True when they agree; False when no checksum is recorded (`checksum = "off"`, or "lazy"
            and the background task has not come by).

        Raises:
            ChunkLost: They differ.
            ValueError: The chunk was released.
        """
        agree = super().verify()
        if agree is False:
            raise self._lost()
        return agree is True

    def _lost(self) -> ChunkLost:
        return ChunkLost(
            f"chunk {self.ref:#x} does not have the bytes that were stored: compute it again, "
            "see with `cenote status` how many there are, and report it"
        )

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """
        Return a DLPack capsule of the bytes (uint8, one dimension, CPU).

        It is marked read-only where both sides know DLPack 1.0. Older consumers take it for
        writable; writing then faults.
        """
        if stream is not None:
            raise BufferError("a chunk lies in CPU memory: stream must be None")
        if dl_device not in (None, tensors.DLPACK_CPU):
            raise BufferError(f"a chunk lies in CPU memory, not on DLPack device {dl_device}")
        if copy and max_version is None:
            raise BufferError("a copy needs a consumer that knows DLPack 1.0: use copy_to()")
        return tensors.dlpack_of(self, max_version=max_version, copy=copy)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return (kDLCPU, 0)."""
        return tensors.DLPACK_CPU

    def __repr__(self) -> str:
        try:
            self.memory.release()
        except ValueError:
            return "<Chunk released>"
        return f"<Chunk of {self.nbytes} bytes, ref {self.ref:#x}>"
