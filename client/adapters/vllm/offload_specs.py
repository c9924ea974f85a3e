# SPDX-License-Identifier: Apache-2.0
"""What the spec's manager sends to its workers, by way of vLLM's stock OffloadingConnector."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from vllm.v1.kv_offload.base import LoadStoreSpec

from cenote.client import Manifest

from .messages import Era
from .places import Place


@dataclass(frozen=True)
class ToLoad:
    """
    A chunk to be loaded.

    Attributes:
        group: KV cache group.
        places: Where it is in the pool, one for each namespace of the group; it stays there while
            the manager holds it.
    """

    group: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class ToStore:
    """
    A chunk to be stored.

    Attributes:
        group: KV cache group.
        key: 32 bytes.
        parent: The key that it follows.
        position: Its place in the chain; None: unknown.
    """

    group: int
    key: bytes
    parent: bytes | None
    position: int | None


@dataclass
class LoadSpec(LoadStoreSpec):
    """
    Chunks that the manager holds for a request.

    Attributes:
        pool_id: The pool that they are in.
        era: What hashes mean.
        names: Of each group's namespaces, in the order of ToLoad.places. A worker loads only what
            has the name of its own: a manager that mistook another engine's workers for its own
            would else have it load their bytes.
        chunks: Group by group.
    """

    pool_id: bytes
    era: Era
    names: tuple[tuple[bytes, ...], ...]
    chunks: tuple[ToLoad, ...]


@dataclass
class StoreSpec(LoadStoreSpec):
    """
    Chunks that the pool has not.

    Attributes:
        era: What hashes mean.
        chunks: Group by group.
        priority: As for `Cache.put`.
        ttl_s: As for `Cache.put`.
    """

    era: Era
    chunks: tuple[ToStore, ...]
    priority: int
    ttl_s: int | None


def name_of(manifest: Manifest) -> bytes:
    """Return what a namespace is called between the two halves."""
    return hashlib.sha256(manifest.canonical).digest()
