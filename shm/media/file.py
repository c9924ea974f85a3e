# SPDX-License-Identifier: Apache-2.0
"""
A file, on tmpfs, on a disk, or on a file system that maps its memory directly (DAX).

The file is the region followed by one page that says whose it is:

    offset            size  field
    region_bytes         8  magic "cenoteF1"
    region_bytes + 8     8  region_bytes, little-endian
    region_bytes + 16  128  the object's name, ASCII, padded with zeros

It is made without a name, filled, and then given its name by link(2), which never replaces: an
existing file is refused unless that page says that a dead daemon of the same user and pool left
it, and then it is unlinked, not truncated, so that living readers keep theirs. As with named shared
memory the creator holds a lock on its description, and files cannot be sealed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cenote.shm.units import format_size_rounded

from .base import FILE_MODE, MediumError, MediumObject, MediumSpec, NoRoom, ObjectName
from .posix_shm import creator_is_dead, stale_at, take_ownership

MAGIC: Final = b"cenoteF1"
TRAILER: Final = struct.Struct("<8sQ128s")
TRAILER_PAGE_BYTES: Final = 4096

# What open(O_TMPFILE) says where the file system cannot make a file without a name.
_NO_TMPFILE: Final = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
# What fallocate(2) says where the file system cannot reserve blocks.
_NO_FALLOCATE: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FileObject(MediumObject):
    """A region in a file, at spec.path."""

    def unlink(self) -> None:
        """Remove the file, if it is still the one that was created here."""
        path = Path(self.location)
        if self.fd < 0 or os.fstat(self.fd).st_nlink == 0:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(path), os.fstat(self.fd)):
                path.unlink()


@dataclass(frozen=True)
class Owner:
    """Whose region an existing file is, by its last page, and whether its daemon is dead."""

    name: ObjectName
    dead: bool


def create_file(spec: MediumSpec, name: ObjectName, bytes_: int) -> FileObject:
    """
    Create the file of *spec*, 0600, with all its blocks reserved.

    Raises:
        MediumError: The file exists, or its folder cannot be used.
        NoRoom: The file system is full.
    """
    path = _path_of(spec)
    bytes_ = spec.round_up(bytes_)
    fd, scratch = _open_nameless(path, name)
    try:
        _lock(fd, path)
        os.fchmod(fd, FILE_MODE)
        _reserve(fd, bytes_ + TRAILER_PAGE_BYTES, spec)
        os.pwrite(fd, TRAILER.pack(MAGIC, bytes_, str(name).encode("ascii")), bytes_)
        _give_name(fd, path)
    except BaseException:
        os.close(fd)
        raise
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)
    return FileObject(spec, name, fd, bytes_, str(path))


def open_file(spec: MediumSpec, name: ObjectName, bytes_: int) -> FileObject:
    """
    Open the file that a dead daemon left for the object *name*, and be its owner from now on.

    Raises:
        MediumError: It is gone, or another one.
    """
    path = _path_of(spec)
    bytes_ = spec.round_up(bytes_)
    try:
        owner = _owner_of(path)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise MediumError(f"{path} cannot be opened again: {error.strerror}") from error
    try:
        if owner is None or owner.name != name:
            raise MediumError(f"{path} is not the file of {name} any more")
        take_ownership(fd, str(path), name.uid, bytes_, TRAILER_PAGE_BYTES)
    except BaseException:
        os.close(fd)
        raise
    return FileObject(spec, name, fd, bytes_, str(path))


def unlink_stale_file(
    spec: MediumSpec, pool: str, uid: int, keep: str = "", *, place: str = ""
) -> Owner | None:
    """
    Unlink what a dead daemon of *pool*, run by *uid*, left at the path; None if nothing is there.

    The caller holds the lock of the pool. What belongs to the pool id *keep* stays; what has a pool
    id that begins with *place* is a dead daemon's, whoever holds a lock on it: see list_stale().

    Raises:
        MediumError: Something else is there: it is named and left alone.
    """
    path = _path_of(spec)
    _unlink_scratch(path, pool, uid)
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    owner = _owner_of(path) if stat.S_ISREG(found.st_mode) else None
    if owner is None or found.st_uid != uid:
        raise MediumError(
            f"{path} exists and is no file that a cenote daemon of uid {uid} made. It is left as "
            "it is: remove it, or name another path"
        )
    if owner.name.pool != pool or owner.name.uid != uid:
        raise MediumError(
            f"{path} belongs to pool {owner.name.pool!r} of uid {owner.name.uid}, not to pool "
            f"{pool!r} of uid {uid}. Name another path, or remove the file if that pool is gone"
        )
    if owner.name.pool_id == keep:
        return None
    if not owner.dead and not (place and owner.name.pool_id.startswith(place)):
        raise MediumError(
            f"{path} is in use by a living daemon of pool {pool!r}. Stop that one, or name "
            "another path"
        )
    path.unlink()
    return owner


def _path_of(spec: MediumSpec) -> Path:
    if spec.path is None:
        raise MediumError(f"{spec} has no path: write file:PATH")
    return spec.path


def _scratch_of(path: Path, name: ObjectName) -> Path:
    return path.with_name(f".{path.name}.{name}.tmp")


def _open_nameless(path: Path, name: ObjectName) -> tuple[int, Path | None]:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path.parent, flags | os.O_TMPFILE, FILE_MODE), None
    except OSError as error:
        if error.errno not in _NO_TMPFILE or not path.parent.is_dir():
            raise _folder_error(path, error) from error
    scratch = _scratch_of(path, name)
    try:
        return os.open(scratch, flags | os.O_CREAT | os.O_EXCL, FILE_MODE), scratch
    except OSError as error:
        raise _folder_error(path, error) from error


def _folder_error(path: Path, error: OSError) -> MediumError:
    return MediumError(
        f"cannot make a file in {path.parent}: {error.strerror}. The folder must exist, on a file "
        "system that is mounted writable, and the daemon's user must be allowed to write to it"
    )


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise MediumError(
            f"{path}: its file system has no file locks ({error.strerror}), by which a daemon in "
            "use is told from a dead one. Use a local file system"
        ) from error


def _reserve(fd: int, bytes_: int, spec: MediumSpec) -> None:
    try:
        os.posix_fallocate(fd, 0, bytes_)
        return
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoRoom(
                f"{spec}: no room for {format_size_rounded(bytes_)} ({error.strerror}). "
                "Free some, choose a smaller size, or name a path elsewhere"
            ) from error
        if error.errno not in _NO_FALLOCATE:
            raise
    os.ftruncate(fd, bytes_)


def _give_name(fd: int, path: Path) -> None:
    try:
        # With a src_dir_fd, so that Python calls linkat(AT_SYMLINK_FOLLOW) and not link(2).
        os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)
    except FileExistsError as error:
        raise MediumError(
            f"{path} exists already. It is left as it is: remove it, or name another path"
        ) from error


def _owner_of(path: Path) -> Owner | None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        at = os.fstat(fd).st_size - TRAILER_PAGE_BYTES
        data = os.pread(fd, TRAILER.size, at) if at > 0 else b""
        if len(data) != TRAILER.size:
            return None
        magic, region_bytes, text = TRAILER.unpack(data)
        name = ObjectName.parse(text.rstrip(b"\0").decode("ascii", "replace"))
        if magic != MAGIC or region_bytes != at or name is None:
            return None
        return Owner(name, creator_is_dead(fd))
    finally:
        os.close(fd)


def _unlink_scratch(path: Path, pool: str, uid: int) -> None:
    """Remove what a daemon that was killed before it gave its file a name left beside *path*."""
    prefix, suffix = f".{path.name}.", ".tmp"
    for entry in path.parent.glob("*.tmp") if path.parent.is_dir() else []:
        if not (entry.name.startswith(prefix) and entry.name.endswith(suffix)):
            continue
        name = ObjectName.parse(entry.name[len(prefix) : -len(suffix)])
        if name is None or (name.pool, name.uid) != (pool, uid):
            continue
        if stale_at(name, entry) is not None:
            entry.unlink(missing_ok=True)
