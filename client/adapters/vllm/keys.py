# SPDX-License-Identifier: Apache-2.0
"""
What the pool calls this engine's chunks: the one place where a hash of the engine becomes a key.

Until somebody resets, a key is the hash, and all engines of a namespace share. From then on it is
the hash XOR a salt, 32 random bytes that are this engine's alone and gone with it: nothing older
and nobody else's has such a key, and the namespaces stay. Two hashes that do not depend on the salt
meet under it by a chance of 2^-256, as if it were hashed with them; and it takes 0.13 µs a chunk.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

from .groups import HASH_BYTES, Shape, full_hash


class Keys:
    """
    Makes keys of hashes. One thread renews it and asks for keys.

    Args:
        shape: How tokens become chunks.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape: Final = shape
        self._salt = 0  # nobody has reset yet

    def renew(self) -> None:
        """Begin anew: no key is one that there was before."""
        self._salt = int.from_bytes(secrets.token_bytes(HASH_BYTES))

    def of(self, block_hash: bytes) -> bytes:
        """Return the key of the chunk that ends with a block."""
        return self.mixed([full_hash(block_hash)])[0]

    def key(self, hashes: Sequence[bytes], chunk: int) -> bytes:
        """Return the key of chunk number *chunk*, from the request's block hashes."""
        return self.mixed(self._shape.chunk_hashes(hashes, chunk, chunk + 1))[0]

    def keys(self, hashes: Sequence[bytes], first: int, end: int) -> list[bytes]:
        """Return the keys of chunks first .. end - 1."""
        return self.mixed(self._shape.chunk_hashes(hashes, first, end))

    def mixed(self, hashes: list[bytes]) -> list[bytes]:
        """Return the keys of chunks with these hashes of 32 bytes."""
        salt = self._salt
        if not salt:
            return hashes
        return [(int.from_bytes(each) ^ salt).to_bytes(HASH_BYTES) for each in hashes]
