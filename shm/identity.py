# SPDX-License-Identifier: Apache-2.0
"""
Which process is this? What the kernel says about the other end of a socket and about a pidfd.

Nothing here is a proof of death: that is the liveness lock (I6).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
SO_PEERGROUPS: Final = 59  # Linux 4.13; the socket module has no name for it
GROUPS_MAX: Final = 65_536  # NGROUPS_MAX of the kernel
GROUPS_IN_PYTHON: Final = 256  # socket.getsockopt takes 1,024 bytes at most
_UCRED: Final = struct.Struct("iII")
_GID_BYTES: Final = 4
_STAT_START_TICKS: Final = 22 - 3  # field 22 of proc(5) stat, counted behind the command's name


@dataclass(frozen=True)
class Peer:
    """
    Who connected, as the kernel noted it then.

    pid is 0 when that process is in a pid namespace that we do not see. gids holds its group and
    its supplementary groups.
    """

    pid: int
    uid: int
    gid: int
    gids: frozenset[int]


def peer_of(sock: socket.socket) -> Peer:
    """Return who is at the other end of the connected Unix socket *sock*."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(packed)
    return Peer(pid, uid, gid, frozenset({gid, *_peer_groups(sock)}))


def _peer_groups(sock: socket.socket) -> Iterator[int]:
    """
    Not those of the user data base: asking it may block, and a process can have fewer. Not those
    in /proc either: by now its pid may be another process's.
    """
    size = GROUPS_IN_PYTHON * _GID_BYTES
    try:
        packed = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, size)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        packed = _many_peer_groups(sock)
    for (gid,) in struct.iter_unpack("I", packed):
        yield gid


def _many_peer_groups(sock: socket.socket) -> bytes:
    """Ask past Python, whose getsockopt has no room for more than 256 groups."""
    found = ctypes.create_string_buffer(GROUPS_MAX * _GID_BYTES)
    length = ctypes.c_uint32(len(found))
    libc = ctypes.CDLL(None, use_errno=True)
    status = libc.getsockopt(
        sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, found, ctypes.byref(length)
    )
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"SO_PEERGROUPS: {os.strerror(code)}")
    return found.raw[: length.value]


def start_ns(pid: int, proc: Path = PROC) -> int:
    """
    Return when process *pid* started, in ns since boot; 0 when that cannot be known.

    Since boot and not since 1970: setting the clock must not make another process of it.
    """
    try:
        stat = (proc / str(pid) / "stat").read_bytes()
        ticks = int(stat[stat.rindex(b")") + 2 :].split()[_STAT_START_TICKS])
    except (OSError, ValueError, IndexError):
        return 0
    return ticks * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def groups_of(pid: int, proc: Path = PROC) -> frozenset[int]:
    """Return the supplementary groups of process *pid*; none when that cannot be known."""
    try:
        status = (proc / str(pid) / "status").read_text()
    except OSError:
        return frozenset()
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "Groups":
            return frozenset(int(word) for word in value.split() if word.isdigit())
    return frozenset()


def pid_of_pidfd(fd: int, proc: Path = PROC) -> int | None:
    """
    Return the pid that the pidfd *fd* stands for, or None when it is no pidfd.

    0: a process that our pid namespace does not show. -1: it is dead.
    """
    try:
        info = (proc / "self" / "fdinfo" / str(fd)).read_text()
    except OSError:
        return None
    for line in info.splitlines():
        name, _, value = line.partition(":")
        if name == "Pid":
            return int(value)
    return None


def own_pidfd() -> int:
    """Return a pidfd of this process for its hello, or -1 where the kernel or a filter has none."""
    try:
        return os.pidfd_open(os.getpid())
    except OSError:
        return -1


def boot_id(proc: Path = PROC) -> bytes:
    """Return the 16 bytes that name this boot of the kernel; zeros where it does not say."""
    try:
        return bytes.fromhex((proc / "sys/kernel/random/boot_id").read_text().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Signals to stop come after the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
