# SPDX-License-Identifier: Apache-2.0
"""
KV events: what a router may count on finding in this host's pool, and what has left it.

A block is announced when this engine stored it or found it, with its tokens and its parent, and
withdrawn when its chunk is gone, whoever did it: announced.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)

from .announced import Announced
from .groups import Shape
from .lookup import Lookup

if TYPE_CHECKING:
    from cenote.client import Event, Pool


class Events:
    """
    What was announced, and what is to be said.

    Args:
        shape: How tokens become chunks.
        lookup: The engine's namespaces.
    """

    def __init__(self, shape: Shape, lookup: Lookup) -> None:
        self._shape: Final = shape
        self._lookup: Final = lookup
        # Those that need every chunk; of a window's, a hit needs only the last.
        full = tuple(group for group in shape.groups if not group.window)
        self._needed: Final = full or shape.groups
        self._announced: Final = Announced(
            self._is_there,
            self._key_of,
            lambda hashes: BlockRemoved(block_hashes=list(hashes), medium=MEDIUM_CPU),
        )

    def available(self, request: Any, chunks: Iterable[int]) -> None:
        """Note chunks of a request that can be had; take() says so once they are seen there."""
        for chunk in chunks:
            key = self._lookup.keys.key(request.block_hashes, chunk)
            if not self._announced.knows(key):
                stored = self._stored(request, chunk)
                self._announced.offer(key, stored, tuple(stored.block_hashes))

    def take(self) -> list[BlockStored | BlockRemoved]:
        """Return what is to be published."""
        return self._announced.take()

    def begin_anew(self) -> None:
        """Withdraw all that was announced: the engine was reset."""
        self._announced.begin_anew()

    def follow(self, pool: Pool) -> None:
        """Begin to follow a pool's feed; it ends when the pool is closed."""
        self._announced.follow(pool)

    def _stored(self, request: Any, chunk: int) -> BlockStored:
        shape = self._shape
        first = chunk * shape.chunk_tokens
        end = first + shape.chunk_tokens
        step = shape.hash_tokens
        hashes = request.block_hashes[first // step : end // step]
        extra, mm_index = [], 0
        for start in range(first, end, step):
            keys, mm_index = generate_block_hash_extra_keys(request, start, start + step, mm_index)
            extra.append(keys)
        lora = getattr(request, "lora_request", None)
        parent = request.block_hashes[first // step - 1] if first else None
        return BlockStored(
            block_hashes=[maybe_convert_block_hash(each) for each in hashes],
            parent_block_hash=None if parent is None else maybe_convert_block_hash(parent),
            token_ids=list(request.all_token_ids[first:end]),
            block_size=step,
            lora_id=lora.adapter_id if lora else None,
            medium=MEDIUM_CPU,
            lora_name=lora.name if lora else None,
            extra_keys=to_event_extra_keys(extra) if any(extra) else None,
        )

    def _key_of(self, event: Event) -> bytes | None:
        """Return the key of a chunk that an announcement rests on."""
        group = self._lookup.group_of(event.namespace_id)
        return event.key if any(each.index == group for each in self._needed) else None

    def _is_there(self, key: bytes) -> bool:
        """Have the groups that need every chunk this one?"""
        return all(self._lookup.has(group, key) for group in self._needed)
