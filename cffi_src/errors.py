# SPDX-License-Identifier: Apache-2.0
"""
The exceptions of cenote, and the one place that maps a status of the C core to them.

Public as `cenote.client.errors`; the daemon and the client take them from `cenote.shm.errors`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from . import _core


class CenoteError(Exception):
    """Base of every error that cenote raises on its own account."""


class PoolGone(CenoteError):
    """No daemon listens, or the pool was closed, retired or replaced by another one."""


class PoolFull(CenoteError):
    """No free extent of this size, and none became free within the wait."""


class ChunkTooLarge(CenoteError, ValueError):
    """The chunk can never fit: it is larger than the region, or than 1 GiB."""


class ChunkLost(CenoteError):
    """The chunk's bytes are gone: a poisoned page, a truncated file or a bad checksum."""


class ChunkMissing(CenoteError, LookupError):
    """The chunk is not in the pool, or not any more; calls that may miss return None instead."""


class AccessDenied(CenoteError, PermissionError):
    """The pool does not allow this user, or not in this role."""


class NotWritable(AccessDenied):
    """This session is a reader's: it may look up and lease, but store, pin and delete nothing."""


class ForkedChild(CenoteError):
    """A forked child used the session of its parent; it must connect on its own (I13)."""


class LimitReached(CenoteError):
    """A named limit of the pool or of this session is reached (I10)."""


class LeaseTableFull(LimitReached):
    """This process holds as many chunks, or as many of the pool's bytes, as one session may."""


class VersionMismatch(CenoteError):
    """The other side was built with another layout, ABI fingerprint or protocol version."""


class Timeout(CenoteError, TimeoutError):
    """The deadline of the call passed; what it asked for may still take effect."""


class Corrupt(CenoteError):
    """Shared memory holds what cannot be; nothing was done."""


class InvalidArgument(CenoteError, ValueError):
    """An argument is outside its documented range."""


class ProtocolError(CenoteError):
    """The other side of the control socket sent what the protocol does not allow."""


class ManifestMismatch(CenoteError):
    """
    The namespace's name is bound to another manifest.

    Attributes:
        fields: For each field that differs, (value it is bound to, value that was given); None
            stands for an absent field.
    """

    def __init__(self, message: str, fields: Mapping[str, tuple[object, object]]) -> None:
        super().__init__(message)
        self.fields: Final[dict[str, tuple[object, object]]] = dict(fields)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.fields)


_lib: Final = _core.lib

# What the status alone cannot know (which pool, which key) is the caller's to say; what to do now
# stands here, once.
_BY_STATUS: Final[dict[int, tuple[type[Exception], str]]] = {
    _lib.CN_EMISS: (ChunkMissing, "compute it, or look again later"),
    _lib.CN_EFULL: (PoolFull, "release chunks, wait longer, or give the pool more memory"),
    _lib.CN_ETOOBIG: (ChunkTooLarge, "store smaller chunks, or give the pool a larger region"),
    _lib.CN_EINVAL: (InvalidArgument, "see the documentation of the call"),
    _lib.CN_ECORRUPT: (Corrupt, "restart the daemon; report it with `cenote status --json`"),
    _lib.CN_EFORKED: (ForkedChild, "call cenote.client.connect() in the child"),
    _lib.CN_ECLOSED: (PoolGone, "connect again"),
    _lib.CN_ELEASES: (LeaseTableFull, "release chunks, or raise lease_slots of the pool"),
    _lib.CN_ERING: (Timeout, "the daemon does not keep up; see `cenote status`, wait longer"),
    _lib.CN_ETIME: (Timeout, "see `cenote status`, or wait longer"),
    _lib.CN_EVERSION: (VersionMismatch, "install the same cenote on both sides"),
    _lib.CN_EACCES: (NotWritable, "ask for writers in [pool.access] of the daemon"),
    _lib.CN_ELIMIT: (LimitReached, "see `cenote status` and docs/configuration.md"),
    _lib.CN_ELOST: (ChunkLost, "compute it again; `cenote status` tells how many there are"),
    _lib.CN_ENOMEM: (MemoryError, "give this process more memory"),
}


def status_text(status: int) -> str:
    """Return the C core's one-line meaning of *status*."""
    text = _core.ffi.string(_lib.cn_status_text(status))
    return text.decode() if isinstance(text, bytes) else text


def error_of(status: int, what: str, *, errno: int = 0) -> Exception:
    """
    Return the exception for a *status* below zero, without raising it.

    Args:
        status: A value of `enum cn_status`.
        what: What was being done, to which object: "lease chunk 3f0a… of pool 'default'".
        errno: The errno beside CN_ESYS.
    """
    if status == _lib.CN_ESYS:
        # OSError picks the subclass (FileNotFoundError, PermissionError, ...) by errno
        return OSError(errno, f"{what}: {os.strerror(errno)}")
    kind, remedy = _BY_STATUS.get(status, (CenoteError, "report it"))
    return kind(f"{what}: {status_text(status)}; {remedy}")


def check(status: int, what: str, *, errno: int = 0) -> None:
    """
    Return if *status* is CN_OK, else raise its exception.

    Raises:
        CenoteError: As `error_of` maps it.
        OSError: For CN_ESYS, with *errno*.
        MemoryError: For CN_ENOMEM.
    """
    if status < 0:
        raise error_of(status, what, errno=errno)


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
