# SPDX-License-Identifier: Apache-2.0
"""
The engine's KV cache groups, and which chunks of each a hit needs.

Pure: what vLLM's classes say is read by identity.py. A chunk covers the same tokens in every group
and is named by the hash of its last block, which the engine chains from the first token on; what
the pool calls it says keys.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from .settings import CHUNK_TOKENS

HASH_BYTES: Final = 32
SKIP: Final = -1  # in a list of block ids: this page is not wanted


@dataclass(frozen=True)
class Group:
    """
    Layers that share one block table.

    Attributes:
        index: Its place among the engine's groups.
        block_tokens: Tokens of a block, over all ranks that share the context.
        window: The last so many tokens are all that attention sees; 0: it sees all.
        layers: Their names, in the order of the engine.
        replicated: Every tensor-parallel rank holds the same bytes (MLA).
    """

    index: int
    block_tokens: int
    window: int
    layers: tuple[str, ...]
    replicated: bool = False

    def trailing(self, chunk_tokens: int) -> int:
        """Chunks before the end of a hit that it needs; 0: all of them."""
        # A token at position p sees p - window + 1 .. p, and the first that is computed is p = end.
        return math.ceil((self.window - 1) / chunk_tokens) if self.window else 0


@dataclass(frozen=True)
class Shape:
    """
    How the engine's tokens become chunks.

    Attributes:
        groups: All of them.
        chunk_tokens: Tokens of a chunk.
        hash_tokens: Tokens that each of the engine's block hashes covers.
    """

    groups: tuple[Group, ...]
    chunk_tokens: int
    hash_tokens: int

    @classmethod
    def of(cls, groups: Sequence[Group], hash_tokens: int, chunk_tokens: int | None) -> Shape:
        """
        Choose or check the chunk's length.

        Raises:
            ValueError: *chunk_tokens* is no multiple of every group's block.
        """
        step = math.lcm(hash_tokens, *(group.block_tokens for group in groups))
        if chunk_tokens is None:
            chunk_tokens = step * max(1, -(-CHUNK_TOKENS // step))
        if chunk_tokens % step:
            raise ValueError(
                f"chunk_tokens is {chunk_tokens}, and this engine's blocks need a multiple of "
                f"{step}: leave it out, or give {step * max(1, round(chunk_tokens / step))}"
            )
        return cls(tuple(groups), chunk_tokens, hash_tokens)

    def chunk_hashes(self, hashes: Sequence[bytes], first: int, end: int) -> list[bytes]:
        """Return the hashes of chunks first .. end - 1, from the request's block hashes."""
        step = self.chunk_tokens // self.hash_tokens
        return [full_hash(each) for each in hashes[(first + 1) * step - 1 : end * step : step]]

    def hashed_chunks(self, hashes: Sequence[bytes]) -> int:
        """How many chunks have a hash yet."""
        return len(hashes) * self.hash_tokens // self.chunk_tokens

    def blocks_of(self, group: Group, chunk: int) -> range:
        """Return which of the group's blocks make up a chunk."""
        per_chunk = self.chunk_tokens // group.block_tokens
        return range(chunk * per_chunk, (chunk + 1) * per_chunk)


def full_hash(block_hash: bytes) -> bytes:
    """Return a block hash of 32 bytes; one that has another length is hashed once more."""
    if len(block_hash) == HASH_BYTES:
        return bytes(block_hash)
    return hashlib.sha256(block_hash).digest()


def longest_hit(
    shape: Shape,
    keys: Sequence[bytes],
    prefix_of: Callable[[Group, Sequence[bytes]], int],
) -> int:
    """
    Return how many of the chunks *keys* can be loaded: all groups agree, each by its own rule.

    A group that sees everything needs every chunk from the first on; one with a window only those
    that the window before the hit's end touches.

    Args:
        shape: The engine's.
        keys: Of the chunks that the engine does not hold, in order.
        prefix_of: How many of the keys given to it are there, before the first that is not.
    """
    end = len(keys)
    for group in shape.groups:
        if not group.window:
            end = min(end, prefix_of(group, keys[:end]))
    windows = [group for group in shape.groups if group.window]
    while end > 0 and windows:
        shorter = _window_end(windows, shape.chunk_tokens, keys, end, prefix_of)
        if shorter == end:
            break
        end = shorter
    return end


def _window_end(
    windows: Sequence[Group],
    chunk_tokens: int,
    keys: Sequence[bytes],
    end: int,
    prefix_of: Callable[[Group, Sequence[bytes]], int],
) -> int:
    """Return *end*, if every window before it is there, else the longest that may still be."""
    for group in windows:
        first = max(0, end - group.trailing(chunk_tokens))
        found = prefix_of(group, keys[first:end])
        if found < end - first:
            # The chunk after those found is absent: no window may touch it.
            return first + found
    return end
