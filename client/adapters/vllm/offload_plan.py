# SPDX-License-Identifier: Apache-2.0
"""
Which of the engine's blocks are which chunk's pages, as vLLM's GPULoadStoreSpec says it.

It lists the blocks of each KV cache group one behind the other, and the place of a group's first
block in its request; the chunks are those of the other spec, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from .groups import SKIP

NULL_BLOCK: Final = 0  # the engine's block that holds nothing


def split(blocks: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield the blocks of each group."""
    at = 0
    for size in sizes:
        yield [int(block) for block in blocks[at : at + size]]
        at += size


def loaded(blocks: Sequence[int], first: int, chunks: int, per_chunk: int) -> list[tuple[int, ...]]:
    """
    Return for each chunk of a group where its pages go; SKIP where the engine has them or no block.

    Args:
        blocks: Of the group.
        first: Place of the first of them in its request: the chunk may begin before it.
        chunks: How many are loaded.
        per_chunk: Blocks of a chunk.

    Raises:
        ValueError: So many chunks do not have so many blocks.
    """
    if not blocks and not chunks:
        return []
    places = [SKIP] * (first % per_chunk)
    places += [SKIP if block == NULL_BLOCK else block for block in blocks]
    if -(-len(places) // per_chunk) != chunks or (chunks and not blocks):
        raise ValueError(
            f"{len(blocks)} blocks from place {first} on are not those of {chunks} chunks of "
            f"{per_chunk} blocks: this release of vLLM is not supported, see docs/engines.md"
        )
    places += [SKIP] * (chunks * per_chunk - len(places))
    return _cut(places, chunks, per_chunk)


def stored(
    blocks: Sequence[int], first: int, chunks: int, per_chunk: int
) -> list[tuple[int, ...] | None]:
    """
    Return for each chunk of a group where its pages come from; None: it is not there as a whole.

    A window lets blocks go, and the connector leaves those out that are gone: such a chunk is of
    use to this request alone, and others would take it for complete. Where more are missing than
    stand before the first, nobody can say which chunk misses them.

    Args:
        blocks: Of the group.
        first: Place of the first of them in its request.
        chunks: How many are to be stored.
        per_chunk: Blocks of a chunk.
    """
    before = first % per_chunk
    if NULL_BLOCK in blocks or len(blocks) + before != chunks * per_chunk:
        return [None] * chunks
    if not before:
        return list(_cut(blocks, chunks, per_chunk))
    return [None, *_cut(blocks[per_chunk - before :], chunks - 1, per_chunk)]


def _cut(blocks: Sequence[int], chunks: int, per_chunk: int) -> list[tuple[int, ...]]:
    return [tuple(blocks[i * per_chunk : (i + 1) * per_chunk]) for i in range(chunks)]
