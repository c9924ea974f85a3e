# SPDX-License-Identifier: Apache-2.0
"""
One daemon a pool: the lock, a file beside the pool's socket.

A pool is taken over only from a dead daemon: no token in shared memory could stop a store that is
already decided. One that is stopped (SIGSTOP, a debugger) is killed through its pidfd; one that
runs is left alone, and we refuse, unless we were told to take its place.

The lock is never the catalog or anything that a client has a descriptor of: any reader could hold
a lock on that. The kernel drops it with the process, so it cannot be stale; the socket file can,
and is removed only by who holds the lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import socket
import stat
from pathlib import Path
from typing import Final

from cenote.shm.errors import CenoteError
from cenote.shm.identity import start_ns

from .logs import get_log

LOCK_SUFFIX: Final = ".lock"
NOTE_MAX_BYTES: Final = 64
ATTEMPTS: Final = 16  # each lost to a daemon that removed its lock file as it stopped
PROBE_S: Final = 1.0
EXIT_S: Final = 30.0  # the exit of a process with 64 GiB mapped takes a second

log = get_log(__name__)


class PoolTaken(CenoteError):
    """Another daemon serves this pool, or something else is in its place."""


class PoolLock:
    """
    The lock of the pool whose socket is at *socket_path*; held from acquire() to release().

    Raises, from acquire():
        PoolTaken: A living process holds it; the message names its pid.
        OSError: The directory cannot be written to.
    """

    def __init__(self, pool: str, socket_path: Path, *, take_over: bool = False) -> None:
        self._pool = pool
        self._take_over = take_over
        self._socket_path = socket_path
        self.path = socket_path.with_name(socket_path.name + LOCK_SUFFIX)
        self._fd = -1
        self.predecessor = 0  # pid of a daemon that died without releasing the lock, or 0

    def acquire(self) -> None:
        """Take the lock, or raise; then note who we are in the file, for others."""
        for _ in range(ATTEMPTS):
            fd = self._open()
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                try:
                    self._fence(fd)
                finally:
                    os.close(fd)
                continue
            if self._is_current(fd):
                break
            os.close(fd)
        else:
            raise PoolTaken(
                f"pool {self._pool!r}: {self.path} is replaced again and again: several daemons "
                "start and stop at once. Start one of them"
            )
        self._fd = fd
        self.predecessor = _noted(fd)[0]
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {start_ns(os.getpid())}\n".encode(), 0)

    def _fence(self, fd: int) -> None:
        """
        See to it that the holder of the lock is dead when this returns.

        Raises:
            PoolTaken: It runs, or it may not be killed.
        """
        pid, started_ns = _noted(fd)
        if pid <= 0 or not (self._take_over or _is_stopped(pid)):
            raise self._taken(pid)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return  # it ended meanwhile
        try:
            # Its number before the pidfd was opened, and still: it is the same process.
            if start_ns(pid) != started_ns or _noted(fd) != (pid, started_ns):
                raise self._taken(pid)
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            log.warning("predecessor_killed", pool=self._pool, pid=pid)
            if not select.select([pidfd], [], [], EXIT_S)[0]:
                raise self._taken(pid)
        except PermissionError as error:
            raise self._taken(pid) from error
        except ProcessLookupError:
            return
        finally:
            os.close(pidfd)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            fd = os.open(self.path, flags, 0o600)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise self._foreign("is a symbolic link") from error
        found = os.fstat(fd)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            return fd
        os.close(fd)
        raise self._foreign(f"is no file of uid {os.geteuid()}")

    def _foreign(self, what: str) -> PoolTaken:
        return PoolTaken(
            f"pool {self._pool!r}: the lock {self.path} {what}: remove it, or put the socket "
            "into a directory that nobody else may write to (--run-dir, --socket)"
        )

    def _taken(self, holder: int) -> PoolTaken:
        who = f"the daemon with pid {holder}" if holder else "another daemon"
        stop = f"`kill {holder}`" if holder else f"see `fuser {self.path}`"
        return PoolTaken(
            f"pool {self._pool!r} at {self._socket_path} is served by {who}: stop it first "
            f"({stop}), take its place with --take-over, or choose another --socket"
        )

    def _is_current(self, fd: int) -> bool:
        """Whether the locked file is still at the path: its last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def remove_stale_socket(self) -> bool:
        """
        Remove the socket file of a dead daemon; return whether there was one. The lock is held.

        Raises:
            PoolTaken: There is something else, or a server that knows no lock listens there.
        """
        try:
            found = os.lstat(self._socket_path)
        except FileNotFoundError:
            return False
        if not stat.S_ISSOCK(found.st_mode):
            raise PoolTaken(
                f"{self._socket_path} is no socket: remove it, or choose another --socket"
            )
        if _somebody_listens(self._socket_path):
            raise PoolTaken(
                f"{self._socket_path}: another server listens there: stop it, or choose another "
                "--socket"
            )
        self._socket_path.unlink(missing_ok=True)
        return True

    def release(self) -> None:
        """Remove the lock file and the lock. Idempotent."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        if self._is_current(fd):
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(fd)


def _noted(fd: int) -> tuple[int, int]:
    """Return pid and start time of who wrote the note; zeros when it says neither."""
    words = os.pread(fd, NOTE_MAX_BYTES, 0).split()
    if len(words) != 2 or not all(word.isdigit() for word in words) or len(words[0]) > 9:
        return 0, 0
    return int(words[0]), int(words[1])


def _is_stopped(pid: int, proc: Path = Path("/proc")) -> bool:
    """Is it stopped, so that it does nothing more until somebody lets it?"""
    try:
        stat_line = (proc / str(pid) / "stat").read_bytes()
        return stat_line[stat_line.rindex(b")") + 2 :][:1] in (b"T", b"t")
    except (OSError, ValueError):
        return False


def _somebody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_S)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # full, or of another type: in any case not ours to remove
    return True
