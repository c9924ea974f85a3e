# SPDX-License-Identifier: Apache-2.0
"""What cenote raises.  All are `CenoteError`; some are a built-in exception as well."""

from __future__ import annotations

from cenote.shm.errors import (
    AccessDenied,
    CenoteError,
    ChunkLost,
    ChunkMissing,
    ChunkTooLarge,
    Corrupt,
    ForkedChild,
    InvalidArgument,
    LeaseTableFull,
    LimitReached,
    ManifestMismatch,
    NotWritable,
    PoolFull,
    PoolGone,
    ProtocolError,
    Timeout,
    VersionMismatch,
)

__all__ = [
    "AccessDenied",
    "CenoteError",
    "ChunkLost",
    "ChunkMissing",
    "ChunkTooLarge",
    "Corrupt",
    "ForkedChild",
    "InvalidArgument",
    "LeaseTableFull",
    "LimitReached",
    "ManifestMismatch",
    "NotWritable",
    "PoolFull",
    "PoolGone",
    "ProtocolError",
    "Timeout",
    "VersionMismatch",
]
