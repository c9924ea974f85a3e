# SPDX-License-Identifier: Apache-2.0
"""
The C keeper of a pool: made for new objects, or put in the place of one that is dead.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cenote._native import _core

from . import media
from .custody import KeptSession
from .errors import check, status_text
from .identity import start_ns
from .objects import PoolObjects
from .pool_spec import PoolSpec
from .takeover import CannotKeep

if TYPE_CHECKING:
    from _cffi_backend import CData

SESSIONS_MAX: Final = _core.lib.CN_SESSIONS_MAX
SPIN_US: Final = 100


@dataclass(frozen=True)
class Adopted:
    """
    A keeper in the place of a dead one.

    Attributes:
        keeper: Not running yet.
        sessions: Index and nonce of each that goes on.
        found: struct cn_recovery.
    """

    keeper: CData
    sessions: tuple[tuple[int, int], ...]
    found: dict[str, int]


def keeper_config(spec: PoolSpec, keep: list[Any]) -> CData:
    """Return the cn_keeper_config of *spec*; *keep* owns what it points to."""
    made = _core.ffi.new("struct cn_keeper_config *")
    policy = _core.ffi.new("char[]", spec.policy.encode("ascii"))
    keep.append(policy)
    made.high_water = spec.high_water
    made.low_water = spec.low_water
    made.policy = policy
    made.spin_us = SPIN_US
    made.start_ns = start_ns(os.getpid())
    return made


def registry_of(super_: CData) -> CData:
    """Return the session registry of a mapped catalog."""
    base = _core.ffi.cast("char *", super_) + super_.registry_off
    return _core.ffi.cast("struct cn_session_entry *", base)


def new_keeper(objects: PoolObjects) -> CData:
    """
    Return the keeper of objects that were just made.

    Raises:
        CenoteError: The C core refused.
    """
    keep: list[Any] = []
    made = _core.ffi.new("struct cn_keeper **")
    config = keeper_config(objects.spec, keep)
    status = _core.lib.cn_keeper_create(*_memory(objects), config, made)
    check(status, f"make the keeper of pool {objects.spec.name!r}")
    return made[0]


def adopt_keeper(objects: PoolObjects, sessions: Sequence[KeptSession]) -> Adopted:
    """
    Return a keeper for what a dead one left, with every session of its registry (I7).

    Raises:
        CannotKeep: Something is missing or wrong. Nothing was changed.
    """
    keep: list[Any] = []
    made, found = _core.ffi.new("struct cn_keeper **"), _core.ffi.new("struct cn_recovery *")
    with contextlib.ExitStack() as undo:
        living = _in_registry(objects, sessions)
        opened = _core.ffi.new("struct cn_adopt_session[]", max(1, len(living)))
        for i, kept in enumerate(living):
            _open_session(objects, kept, opened[i], undo)
        status = _core.lib.cn_keeper_adopt(
            *_memory(objects),
            keeper_config(objects.spec, keep),
            opened,
            len(living),
            found,
            made,
        )
        if status != _core.lib.CN_OK:
            # What contradicts itself is worth a look; what nobody could take over is not.
            worth = objects.pool_id if status == _core.lib.CN_ECORRUPT else None
            why = f"pool {objects.spec.name!r} cannot be taken over: {_why(status)}"
            raise CannotKeep(why, worth)
        undo.pop_all()  # segments and descriptors are the keeper's
    names = [name for name, _ in _core.ffi.typeof("struct cn_recovery").fields]
    return Adopted(
        made[0],
        tuple((kept.session, kept.nonce) for kept in living),
        {n: int(getattr(found, n)) for n in names if n != "reserved"},
    )


def _why(status: int) -> str:
    if status == _core.lib.CN_EMISS:
        return "a session that may still be read is not in custody"
    return status_text(status)


def _in_registry(objects: PoolObjects, sessions: Sequence[KeptSession]) -> list[KeptSession]:
    """Return those that the registry has; the others were never sent to anybody, or have ended."""
    registry = registry_of(_core.ffi.cast("struct cn_super *", objects.catalog))
    return [
        kept
        for kept in sessions
        if kept.session < SESSIONS_MAX
        and kept.segment >= 0
        and registry[kept.session].nonce == kept.nonce
        and registry[kept.session].word & 0xFF == _core.lib.CN_SESSION_OPEN
    ]


def _open_session(
    objects: PoolObjects, kept: KeptSession, args: CData, undo: contextlib.ExitStack
) -> None:
    """Map the segment of a session and fill its struct cn_adopt_session."""
    slots = _core.ffi.cast("struct cn_super *", objects.catalog).lease_slots
    bytes_ = int(_core.lib.cn_session_segment_bytes(slots))
    media.check_memfd(kept.segment, bytes_, f"session {kept.session}")
    address = media.map_fd(kept.segment, bytes_, writable=True)
    undo.callback(media.unmap, address, bytes_)
    args.segment = _core.ffi.cast("void *", address)
    args.segment_bytes = bytes_
    args.session, args.nonce = kept.session, kept.nonce
    descriptors = {"liveness_fd": kept.segment, "doorbell_fd": kept.bell, "pidfd": kept.pid}
    for name, fd in descriptors.items():
        own = os.dup(fd) if fd >= 0 else -1
        if own >= 0:
            undo.callback(os.close, own)
        setattr(args, name, own)


def _memory(objects: PoolObjects) -> tuple[CData, int, CData]:
    regions = _core.ffi.new("void *[]", max(1, len(objects.regions)))
    for i, address in enumerate(objects.regions):
        regions[i] = _core.ffi.cast("void *", address)
    return _core.ffi.cast("void *", objects.catalog), objects.catalog_bytes, regions
