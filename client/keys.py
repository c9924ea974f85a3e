# SPDX-License-Identifier: Apache-2.0
"""
Keys for engines that have no hashes of their own: a chain of SHA-256 over token ids.

The key of a chunk is SHA-256(parent key ‖ its token ids as unsigned 32-bit little-endian), so that
it names the whole prefix up to the chunk's end. The parent of the first chunk is the root, by
default the namespace's id. An engine whose own block hashes are chained takes the hash of the
chunk's last block instead and has no need of this module.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tokens = Sequence[int] | bytes | bytearray | memoryview | NDArray[np.integer]

KEY_BYTES: Final = 32
TOKEN_BYTES: Final = 4
TOKEN_MAX: Final = (1 << 32) - 1


def chain(tokens: Tokens, chunk_tokens: int, root: bytes) -> bytes:
    """
    Return the keys of all *full* chunks of a prompt, 32 bytes each, as one bytes object.

    A last chunk that is not full has no key: what follows it would change it.

    Args:
        tokens: Token ids: a sequence of int, a one-dimensional integer array, or bytes that hold
            unsigned 32-bit little-endian ids.
        chunk_tokens: Tokens a chunk covers, at least 1.
        root: 32 bytes, the parent of the first chunk: the namespace's id, or the key of the chunk
            that the tokens follow.

    Raises:
        ValueError: root has not 32 bytes, chunk_tokens is below 1, a token id is negative or above
            2^32-1, or the array has more than one dimension.
        TypeError: The tokens are no integers.
    """
    if len(root) != KEY_BYTES:
        raise ValueError(f"the root has {len(root)} bytes: give {KEY_BYTES}, the namespace's id")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}: give 1 or more")
    raw = memoryview(_token_bytes(tokens))
    step = chunk_tokens * TOKEN_BYTES
    parent = bytes(root)
    keys: list[bytes] = []
    for at in range(0, raw.nbytes // step * step, step):
        digest = hashlib.sha256(parent)
        digest.update(raw[at : at + step])
        parent = digest.digest()
        keys.append(parent)
    return b"".join(keys)


def split(keys: bytes) -> list[bytes]:
    """Return the single keys of a bytes object of 32*n; ValueError when the rest is not 0."""
    if len(keys) % KEY_BYTES:
        raise ValueError(f"{len(keys)} bytes are no whole number of {KEY_BYTES}-byte keys")
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def _token_bytes(tokens: Tokens) -> bytes | bytearray | memoryview:
    """Return token ids as packed unsigned 32-bit little-endian integers."""
    if isinstance(tokens, bytes | bytearray | memoryview):
        return _raw_bytes(tokens)
    if hasattr(tokens, "__array_interface__"):
        return _array_bytes(tokens)
    try:
        packed = array("I", tokens)
    except OverflowError as error:
        raise ValueError(_range_message(tokens)) from error
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _raw_bytes(tokens: bytes | bytearray | memoryview) -> memoryview:
    raw = memoryview(tokens)
    if raw.format not in {"B", "I"} or raw.ndim != 1 or not raw.contiguous:
        raise TypeError(
            f"a memoryview of format {raw.format!r} and {raw.ndim} dimensions: give contiguous "
            "unsigned 32-bit ids"
        )
    raw = raw.cast("B")
    if raw.nbytes % TOKEN_BYTES:
        raise ValueError(f"{raw.nbytes} bytes are no whole number of {TOKEN_BYTES}-byte token ids")
    return raw


def _array_bytes(tokens: Tokens) -> bytes:
    import numpy as np

    ids = np.asarray(tokens)
    if ids.ndim != 1:
        raise ValueError(f"the token ids have shape {ids.shape}: give one dimension")
    if ids.dtype.kind not in "iu":
        raise TypeError(f"the token ids have dtype {ids.dtype}: give integers")
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > TOKEN_MAX):
        raise ValueError(_range_message(ids.tolist()))
    return ids.astype("<u4", copy=False).tobytes()


def _range_message(tokens: Sequence[int]) -> str:
    wrong = next((i for i, t in enumerate(tokens) if not 0 <= int(t) <= TOKEN_MAX), -1)
    which = f"token {wrong} is {int(tokens[wrong])}" if wrong >= 0 else "a token id is out of range"
    return f"{which}: ids are 0 .. 2^32-1"
