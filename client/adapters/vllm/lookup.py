# SPDX-License-Identifier: Apache-2.0
"""
Which chunks of a request the pool has, over all namespaces of an engine, and holding them.

A lookup is one call into C for each namespace (one, without tensor or pipeline parallelism and with
one kind of layer): no message, no wait.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cenote.client import Cache, Manifest

from .attach import Attachment
from .groups import Group, Shape, longest_hit
from .identity import manifest_of
from .keys import Keys
from .messages import Era, Fields


@dataclass
class Held:
    """
    Chunks leased for a request, until its load is over.

    Attributes:
        first: Number of the first chunk.
        end: One behind the last.
        keys: Of the chunks first .. end - 1.
        batches: The leases.
    """

    first: int
    end: int
    keys: list[bytes]
    batches: list[Any]

    def release(self) -> None:
        """End the leases."""
        for batch in self.batches:
            batch.release()
        self.batches.clear()


class Lookup:
    """
    The namespaces of all groups and ranks of an engine.

    Args:
        shape: How tokens become chunks.
        attachment: The way to the pool.

    Attributes:
        keys: What chunks are called in them.
    """

    def __init__(self, shape: Shape, attachment: Attachment) -> None:
        self.keys: Final = Keys(shape)
        self._shape: Final = shape
        self._attachment: Final = attachment
        self._manifests: dict[int, list[Manifest]] = {}
        self._open: dict[int, list[Cache]] = {}

    def know(self, workers: Iterable[Sequence[Fields]], era: Era) -> None:
        """
        Have the namespaces opened that the workers will use.

        Args:
            workers: Of each worker, the fields of each group.
            era: What hashes mean.
        """
        found: dict[int, list[Manifest]] = {}
        for groups in workers:
            for index, fields in enumerate(groups):
                manifest = manifest_of(fields, era, self._shape.chunk_tokens)
                ranks = found.setdefault(index, [])
                if manifest not in ranks:  # replicated: all ranks share one
                    ranks.append(manifest)
        self._manifests, self._open = found, {}
        self._attachment.want([each for ranks in found.values() for each in ranks])

    @property
    def ready(self) -> bool:
        """Are all namespaces open?"""
        if self._open:
            return True
        opened = {
            index: [self._attachment.cache(each) for each in ranks]
            for index, ranks in self._manifests.items()
        }
        if not opened or any(cache is None for ranks in opened.values() for cache in ranks):
            return False
        self._open = {i: [each for each in ranks if each] for i, ranks in opened.items()}
        return True

    @property
    def storing(self) -> bool:
        """Would the pool take a chunk now?"""
        return self.ready and self._attachment.storing

    def group_of(self, namespace_id: bytes) -> int | None:
        """Return which group's namespace it is; None: no namespace of this engine."""
        for group, caches in self._open.items():
            if any(cache.id == namespace_id for cache in caches):
                return group
        return None

    def caches(self, group: int) -> Sequence[Cache]:
        """Return a group's namespaces, one for each rank whose bytes differ; () until ready."""
        return self._open.get(group, ())

    def hit(self, hashes: Sequence[bytes], first: int, end: int) -> Held | None:
        """
        Find and lease what can be loaded of the chunks first .. end - 1.

        Returns:
            What is held, at least one chunk; None when there is nothing.

        Raises:
            CenoteError: The pool cannot be looked at.
        """
        keys = self.keys.keys(hashes, first, end)
        found = longest_hit(self._shape, keys, self.prefix)
        while found:
            held = Held(first, first + found, keys[:found], [])
            if self._lease(held):
                return held
            held.release()
            found = longest_hit(self._shape, keys[: found - 1], self.prefix)
        return None

    def has(self, group: Group, key: bytes) -> bool:
        """Is a chunk there, in all ranks' namespaces?"""
        caches = self._open.get(group.index, ())
        return bool(caches) and all(cache.match(key) for cache in caches)

    def first_needed(self, group: Group, held: Held) -> int:
        """Return the number of the first chunk that a load needs of a group."""
        trailing = group.trailing(self._shape.chunk_tokens)
        return max(held.first, held.end - trailing) if group.window else held.first

    def prefix(self, group: Group, keys: Sequence[bytes]) -> int:
        """Return how many of the keys are there before the first that is not, in all ranks'."""
        packed = b"".join(keys)
        return min(cache.match(packed) for cache in self._open[group.index]) if packed else 0

    def _lease(self, held: Held) -> bool:
        """Lease all that a load needs; False when something went meanwhile, or is refused."""
        for group in self._shape.groups:
            wanted = held.keys[self.first_needed(group, held) - held.first :]
            for cache in self._open[group.index]:
                batch = cache.lease_many(b"".join(wanted))
                held.batches.append(batch)
                if len(batch.refs) < len(wanted):
                    return False
        return True
