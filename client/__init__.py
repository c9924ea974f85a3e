# SPDX-License-Identifier: Apache-2.0
"""
cenote for engines: attach to a pool on this host, read KV chunks in place, store new ones.

    from cenote.client import Manifest, connect

    pool = connect()
    cache = pool.namespace(Manifest("llama-3-8b", "kv-layer-head-dim", "bfloat16", 256))
    chunk = cache.get(key)

The caveats and the whole interface are in docs/client.md. `cenote.client.aio` has the same verbs
for asyncio, `cenote.client.testing` a pool for tests without a daemon, `cenote.client.errors` what
is raised.
"""

from __future__ import annotations

from cenote.shm.transfer import guard_copies

from . import errors, keys
from .chunk import Chunk
from .connection import Backoff
from .errors import (
    AccessDenied,
    CenoteError,
    ChunkLost,
    ChunkTooLarge,
    ForkedChild,
    InvalidArgument,
    LimitReached,
    ManifestMismatch,
    NotWritable,
    PoolFull,
    PoolGone,
    Timeout,
    VersionMismatch,
)
from .events import Event, Gap
from .manifest import Manifest
from .namespace import Cache
from .pool import Pool, PoolStats, connect
from .put import Put

__all__ = [
    "AccessDenied",
    "Backoff",
    "Cache",
    "CenoteError",
    "Chunk",
    "ChunkLost",
    "ChunkTooLarge",
    "Event",
    "ForkedChild",
    "Gap",
    "InvalidArgument",
    "LimitReached",
    "Manifest",
    "ManifestMismatch",
    "NotWritable",
    "Pool",
    "PoolFull",
    "PoolGone",
    "PoolStats",
    "Put",
    "Timeout",
    "VersionMismatch",
    "connect",
    "errors",
    "guard_copies",
    "keys",
]
