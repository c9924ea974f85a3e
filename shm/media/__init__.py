# SPDX-License-Identifier: Apache-2.0
"""
The media that a pool can lie on, behind one interface.

    spec = parse_medium("memfd", "2MiB")
    check_room(spec, bytes_)                    # before anything is created
    made = create(spec, ObjectName(pool, pool_id, "r0", uid), bytes_)
    address = made.map(writable=True)
    pretouch(address, made.bytes)
    fd = made.reopen(writable=False)            # for a reader: send it, then close it here
"""

from __future__ import annotations

from .base import (
    Kind,
    MediumError,
    MediumObject,
    MediumRefused,
    MediumSpec,
    NoRoom,
    ObjectName,
    map_fd,
    parse_medium,
    reopen_fd,
    unmap,
)
from .file import create_file, open_file, unlink_stale_file
from .limits import Host, check_room, check_rooms, notes, shortages
from .memfd import (
    adopt_memfd,
    check_memfd,
    create_memfd,
    create_session_memfd,
    is_dead,
    liveness_fd,
)
from .posix_shm import StaleObject, create_shm, list_stale, open_shm, unlink_stale
from .pretouch import Pretoucher, PretouchStopped, pretouch, terminal_progress

__all__ = [
    "Host",
    "Kind",
    "MediumError",
    "MediumObject",
    "MediumRefused",
    "MediumSpec",
    "NoRoom",
    "ObjectName",
    "PretouchStopped",
    "Pretoucher",
    "StaleObject",
    "check_memfd",
    "check_room",
    "check_rooms",
    "create",
    "create_session_memfd",
    "is_dead",
    "list_stale",
    "liveness_fd",
    "map_fd",
    "notes",
    "open_again",
    "parse_medium",
    "pretouch",
    "reopen_fd",
    "shortages",
    "terminal_progress",
    "unlink_stale",
    "unlink_stale_file",
    "unmap",
]


def create(spec: MediumSpec, name: ObjectName, bytes_: int) -> MediumObject:
    """
    Create a new, zeroed object of *bytes_*, in whole pages, on the medium *spec*.

    Never opens, truncates or reuses what exists already.

    Raises:
        NoRoom: There is not enough of what the medium consists of.
        MediumError: It exists, or the medium cannot be used here.
    """
    makers = {
        "shm": create_shm,
        "memfd": create_memfd,
        "hugepages": create_memfd,
        "file": create_file,
    }
    return makers[spec.kind](spec, name, bytes_)


def open_again(spec: MediumSpec, name: ObjectName, bytes_: int, kept: int = -1) -> MediumObject:
    """
    Return the object *name* that a dead daemon left on the medium *spec*.

    Args:
        spec: The medium.
        name: The object.
        bytes_: Its size.
        kept: A memfd's descriptor, from custody. It belongs to the object, unless this raises.

    Raises:
        MediumError: It is not there any more, or not what it was.
    """
    if spec.kind == "shm":
        return open_shm(spec, name, bytes_)
    if spec.kind == "file":
        return open_file(spec, name, bytes_)
    if kept < 0:
        raise MediumError(f"{name} had no name, and was kept nowhere")
    return adopt_memfd(spec, name, bytes_, kept)
