# SPDX-License-Identifier: Apache-2.0
"""
KV events: what a router may count on finding in this host's pool, and what has left it.

A block is announced when this engine stored it or found it, with its tokens and its parent. It is
withdrawn when the pool's own feed says that its chunk is gone, whoever did it; where the feed was
overwritten before it was read, what was announced is looked up again.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    maybe_convert_block_hash,
    to_event_extra_keys,
)

from cenote.client import Gap
from cenote.client.errors import CenoteError

from .groups import Shape
from .lookup import Lookup
from .settings import LOGGER

if TYPE_CHECKING:
    from cenote.client import Event, Pool

log = logging.getLogger(LOGGER)

ANNOUNCED_MAX: Final = 1 << 18  # chunks
LOOKS_MAX: Final = 64  # for a chunk that was stored and cannot be seen


@dataclass
class Unsure:
    """What is to be announced once it is seen in the pool."""

    event: BlockStored
    looks: int = 0


class Events:
    """
    What was announced, and what is to be said. The scheduler's thread and the follower's share it.

    Args:
        shape: How tokens become chunks.
        lookup: The engine's namespaces.
    """

    def __init__(self, shape: Shape, lookup: Lookup) -> None:
        self._shape: Final = shape
        self._lookup: Final = lookup
        self._announced: OrderedDict[bytes, tuple[Any, ...]] = OrderedDict()
        self._unsure: dict[bytes, Unsure] = {}
        self._said: list[BlockStored | BlockRemoved] = []
        self._lock: Final = threading.Lock()

    # ---- the scheduler's thread ------------------------------------------------------------------

    def available(self, request: Any, chunks: Iterable[int]) -> None:
        """Note chunks of a request that can be had; take() says so once they are seen there."""
        for chunk in chunks:
            key = self._shape.key(request.block_hashes, chunk)
            if key in self._announced:
                self._announced.move_to_end(key)
            elif key not in self._unsure:
                self._unsure[key] = Unsure(self._stored(request, chunk))

    def take(self) -> list[BlockStored | BlockRemoved]:
        """Return what is to be published."""
        for key, unsure in list(self._unsure.items()):
            self._confirm(key, unsure)
        if not self._said:
            return []
        with self._lock:
            said, self._said = self._said, []
        return said

    def _confirm(self, key: bytes, unsure: Unsure) -> None:
        """
        Announce a chunk that is there.

        First announced, then looked for: what leaves before the look is seen by the look, what
        leaves after it by the follower, which finds it announced.
        """
        with self._lock:
            self._announced[key] = tuple(unsure.event.block_hashes)
        if self._is_there(key):
            with self._lock:
                self._said.append(unsure.event)
                while len(self._announced) > ANNOUNCED_MAX:
                    self._withdraw(next(iter(self._announced)))
            del self._unsure[key]
            return
        with self._lock:
            self._announced.pop(key, None)
        unsure.looks += 1  # the daemon links what was committed a moment later
        if unsure.looks >= LOOKS_MAX:
            del self._unsure[key]

    def forget(self) -> None:
        """Withdraw all that was announced."""
        with self._lock:
            for key in list(self._announced):
                self._withdraw(key)

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

    def _withdraw(self, key: bytes) -> None:
        """Say that a chunk is gone; the lock is held."""
        hashes = self._announced.pop(key, None)
        if hashes is not None:
            self._said.append(BlockRemoved(block_hashes=list(hashes), medium=MEDIUM_CPU))

    # ---- the follower's thread -------------------------------------------------------------------

    def follow(self, pool: Pool) -> None:
        """Begin to follow a pool's feed; it ends when the pool is closed."""
        threading.Thread(
            target=self._follow, args=(pool,), name="cenote events", daemon=True
        ).start()

    def _follow(self, pool: Pool) -> None:
        try:
            for event in pool.events():
                self._take_in(event)
        except CenoteError as error:
            log.info("cenote: the pool's events end: %s", error)
            self.forget()

    def _take_in(self, event: Event | Gap) -> None:
        if isinstance(event, Gap) or event.kind == "cleared":
            self._look_again()
        elif event.kind in {"evicted", "deleted"} and self._lookup.is_ours(event.namespace_id):
            with self._lock:
                self._withdraw(event.key)

    def _look_again(self) -> None:
        """Withdraw every chunk that is not there any more."""
        with self._lock:
            keys = list(self._announced)
        gone = [key for key in keys if not self._is_there(key)]
        with self._lock:
            for key in gone:
                self._withdraw(key)

    def _is_there(self, key: bytes) -> bool:
        """Have the groups that need every chunk this one?"""
        full = [group for group in self._shape.groups if not group.window]
        try:
            return all(self._lookup.has(group, key) for group in full or self._shape.groups)
        except CenoteError:
            return False
