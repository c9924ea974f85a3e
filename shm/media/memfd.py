# SPDX-License-Identifier: Apache-2.0
"""
Anonymous memory files: no name to leak, and the only medium that can be sealed.

Sealed against shrinking and growing, never against future writes: that would lock the next daemon
out. Every memfd is 0600 before anything else happens to it; the kernel's default lets each reader
open it again for writing.

Session segments are always memfds. The lock functions below are the proof of death (I6): a lock on
an open file description that only the client's mapping keeps alive is free when the last process
that maps the session is gone, and not before.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from .base import (
    BASE_PAGE_BYTES,
    FILE_MODE,
    MediumError,
    MediumObject,
    MediumSpec,
    NoRoom,
    ObjectName,
    reopen_fd,
)
from .posix_shm import truncate

MFD_NOEXEC_SEAL: Final = 0x0008  # Linux 6.3; with vm.memfd_noexec = 2 nothing else is allowed
MFD_HUGE_SHIFT: Final = 26
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class MemfdObject(MediumObject):
    """A sealed memfd."""

    @property
    def named(self) -> bool:
        """No: it survives its daemon in custody only."""
        return False

    def unlink(self) -> None:
        """Do nothing: it has no name and goes with its last descriptor and mapping."""


def create_memfd(spec: MediumSpec, name: ObjectName, bytes_: int) -> MemfdObject:
    """
    Create a sealed memfd of *bytes_* in whole pages of *spec*.

    Raises:
        NoRoom: The size is beyond a limit.
        MediumError: This kernel lacks the page size.
    """
    bytes_ = spec.round_up(bytes_)
    fd = _new_memfd(str(name), spec)
    try:
        _finish(fd, bytes_, str(spec))
    except BaseException:
        os.close(fd)
        raise
    return MemfdObject(spec, name, fd, bytes_, f"memfd:{name}")


def adopt_memfd(spec: MediumSpec, name: ObjectName, bytes_: int, fd: int) -> MemfdObject:
    """
    Be the owner of the memfd *fd* that custody kept. On an error it stays the caller's.

    Raises:
        MediumError: It is no sealed memfd of this user and size.
    """
    check_memfd(fd, spec.round_up(bytes_), str(name))
    return MemfdObject(spec, name, fd, spec.round_up(bytes_), f"memfd:{name}")


def check_memfd(fd: int, bytes_: int, what: str) -> None:
    """Raise MediumError unless *fd* is a memfd of ours, sealed and *bytes_* long."""
    found = os.fstat(fd)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & SEALS != SEALS or found.st_uid != os.geteuid() or found.st_size != bytes_:
        raise MediumError(
            f"what was kept as {what} is not the sealed memory of {bytes_} bytes that uid "
            f"{os.geteuid()} left there"
        )


def create_session_memfd(bytes_: int, label: str = "session") -> int:
    """
    Return the descriptor of a new, zeroed, sealed session segment of *bytes_* in whole pages.

    It is the keeper's own description: is_dead() asks it, and it is never sent to anybody.
    """
    spec = MediumSpec("memfd", BASE_PAGE_BYTES)
    fd = _new_memfd(f"cenote.{label}", spec)
    try:
        _finish(fd, spec.round_up(bytes_), "session segment")
    except BaseException:
        os.close(fd)
        raise
    return fd


def liveness_fd(session_fd: int) -> int:
    """
    Return a new, writable, locked description of the segment *session_fd*, for the client.

    Send it, then close it here. The client maps it and closes it too: from then on the lock lives
    exactly as long as a mapping of the segment in any process.
    """
    fd = reopen_fd(session_fd, writable=True)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise MediumError(
            "this session segment is locked for a client already: make a new one for each client"
        ) from error
    return fd


def is_dead(session_fd: int) -> bool:
    """Whether the client of the segment is proved dead, by the keeper's own description (I6)."""
    try:
        fcntl.flock(session_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(session_fd, fcntl.LOCK_UN)
    return True


def _new_memfd(label: str, spec: MediumSpec) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if spec.hugetlb:
        flags |= os.MFD_HUGETLB | ((spec.page_bytes.bit_length() - 1) << MFD_HUGE_SHIFT)
    try:
        return os.memfd_create(label, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise _create_error(error, spec) from error
    try:
        return os.memfd_create(label, flags)
    except OSError as error:
        raise _create_error(error, spec) from error


def _create_error(error: OSError, spec: MediumSpec) -> MediumError:
    if spec.hugetlb and error.errno in (errno.ENODEV, errno.EINVAL, errno.ENOSYS, errno.ENOENT):
        sizes = Path("/sys/kernel/mm/hugepages")
        present = ", ".join(sorted(p.name for p in sizes.glob("*"))) if sizes.is_dir() else "none"
        return MediumError(
            f"{spec}: this kernel does not have that page size ({sizes} has {present}). "
            "Choose another page_size"
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return NoRoom(f"{spec}: no descriptor is left. Raise `ulimit -n`")
    return MediumError(f"{spec}: memfd_create: {error.strerror}")


def _finish(fd: int, bytes_: int, what: str) -> None:
    os.fchmod(fd, FILE_MODE)
    truncate(fd, bytes_, what)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
