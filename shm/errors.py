# SPDX-License-Identifier: Apache-2.0
"""The exceptions of cenote, for everything above the C core."""

from __future__ import annotations

from cenote._native.errors import (
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
    check,
    error_of,
    status_text,
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
    "check",
    "error_of",
    "status_text",
]
