# SPDX-License-Identifier: Apache-2.0
"""
Named POSIX shared memory: the laptop's default, for pools of a single uid.

It survives the daemon by its name. It cannot be sealed: whoever may write it may truncate it, so
copies of our own run under the SIGBUS guard. The creator holds a file lock on its own description,
which tells the names of a dead daemon from those of a living one with another run directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import posix_ipc

from .base import FILE_MODE, MediumError, MediumObject, MediumSpec, NoRoom, ObjectName

SHM_DIR: Final = Path("/dev/shm")
SHM_NAMES_MAX: Final = 65_536


class ShmObject(MediumObject):
    """A named shared memory object."""

    def unlink(self) -> None:
        """Remove the name. It holds the pool id, so it can only be ours."""
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_shared_memory(self.name.shm_name)


def create_shm(spec: MediumSpec, name: ObjectName, bytes_: int) -> ShmObject:
    """
    Create the named object *name*, 0600, of *bytes_* in whole pages.

    Raises:
        MediumError: The name exists, or was removed while it was made.
        NoRoom: The size is beyond a limit of this process.
    """
    bytes_ = spec.round_up(bytes_)
    try:
        memory = posix_ipc.SharedMemory(name.shm_name, flags=posix_ipc.O_CREX, mode=FILE_MODE)
    except posix_ipc.ExistentialError as error:
        raise MediumError(
            f"shared memory {name.shm_name} exists already, and is never used again. "
            f"Start once more, or remove /dev/shm/{name} if nobody uses it"
        ) from error
    made = ShmObject(spec, name, memory.fd, bytes_, str(SHM_DIR / str(name)))
    try:
        os.set_inheritable(made.fd, False)
        os.fchmod(made.fd, FILE_MODE)
        fcntl.flock(made.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(made.fd).st_nlink == 0:
            raise MediumError(
                f"shared memory {name.shm_name} was removed while it was made: two daemons of pool "
                f"{name.pool!r} start at once. Keep one of them"
            )
        truncate(made.fd, bytes_, str(spec))
    except BaseException:
        made.unlink()
        made.close()
        raise
    return made


def open_shm(spec: MediumSpec, name: ObjectName, bytes_: int) -> ShmObject:
    """
    Open the object *name* that a dead daemon left, and be its owner from now on.

    Raises:
        MediumError: It is gone, another user's or of another size, or its daemon lives.
    """
    path = SHM_DIR / str(name)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise MediumError(f"{path} cannot be opened again: {error.strerror}") from error
    try:
        take_ownership(fd, str(path), name.uid, spec.round_up(bytes_))
    except BaseException:
        os.close(fd)
        raise
    return ShmObject(spec, name, fd, spec.round_up(bytes_), str(path))


def take_ownership(fd: int, what: str, uid: int, bytes_: int, more: int = 0) -> None:
    """
    Check what a dead daemon left; MediumError when it is not ours, or not *bytes_* and *more* long.

    Clients have descriptors of it, so that a lock on it says nothing (the pool's own lock does);
    it is taken where it is free, for daemons that look for it.
    """
    found = os.fstat(fd)
    if found.st_uid != uid:
        raise MediumError(f"{what} belongs to uid {found.st_uid}, not to {uid}")
    if found.st_size != bytes_ + more:
        raise MediumError(f"{what} has {found.st_size} bytes, and {bytes_ + more} were expected")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def truncate(fd: int, bytes_: int, what: str) -> None:
    """Give the new object behind *fd* its size; NoRoom where a limit forbids it."""
    try:
        os.ftruncate(fd, bytes_)
    except OSError as error:
        if error.errno not in (errno.EFBIG, errno.ENOSPC, errno.ENOMEM, errno.EINVAL):
            raise
        raise NoRoom(
            f"{what}: the kernel refuses {bytes_} bytes ({error.strerror}). Ask for less, "
            "or raise the file size limit (`ulimit -f unlimited`)"
        ) from error


@dataclass(frozen=True)
class StaleObject:
    """A named object whose daemon is dead. bytes is its size; living readers may still map it."""

    name: ObjectName
    path: Path
    bytes: int


def list_stale(
    pool: str, uid: int, shm_dir: Path = SHM_DIR, *, place: str = ""
) -> list[StaleObject]:
    """
    Return the named objects that dead daemons of *pool*, run by *uid*, left behind.

    Args:
        pool: Its name. The caller holds its lock.
        uid: Whose.
        shm_dir: Where.
        place: With how many and which hex digits the pool ids of that lock's daemons begin: these
            are all dead, whatever lock a client holds on what it was given. Without, an object
            whose creator lives, by its lock, is not in the list.
    """
    prefix = f"cenote.{uid}.{pool}.{place}"
    found = (path.name for path in shm_dir.iterdir()) if shm_dir.is_dir() else ()
    names = sorted(name for name in found if name.startswith(prefix))[:SHM_NAMES_MAX]
    parsed = (ObjectName.parse(text) for text in names)
    mine = [name for name in parsed if name is not None and (name.pool, name.uid) == (pool, uid)]
    stale = (stale_at(name, shm_dir / str(name), dead=bool(place)) for name in mine)
    return [each for each in stale if each is not None]


def unlink_stale(pool: str, uid: int, shm_dir: Path = SHM_DIR) -> list[StaleObject]:
    """
    Remove the names of list_stale() and return what was removed.

    Unlinked only, never truncated and never used again, so that living readers keep theirs.
    """
    removed = []
    for stale in list_stale(pool, uid, shm_dir):
        with contextlib.suppress(FileNotFoundError):
            stale.path.unlink()
            removed.append(stale)
    return removed


def stale_at(name: ObjectName, path: Path, *, dead: bool = False) -> StaleObject | None:
    """Return what is at *path* when its creator is *dead* and its owner is the one in *name*."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None  # gone, or not ours to open
    try:
        found = os.fstat(fd)
        if found.st_uid == name.uid and (dead or creator_is_dead(fd)):
            return StaleObject(name, path, found.st_size)
        return None
    finally:
        os.close(fd)


def creator_is_dead(fd: int) -> bool:
    """Whether nobody holds the creator's lock on what *fd*, a description of its own, shows."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True
