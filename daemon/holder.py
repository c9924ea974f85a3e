# SPDX-License-Identifier: Apache-2.0
"""
The holder: a process that keeps a pool's descriptors by name, and gives them back (I7).

    python -m cenote.daemon.holder <run_dir>/<pool>.custody

It outlives the daemon that needed it, kill -9 and upgrade included, and so it is small, imports
the standard library alone, and does nothing by itself. It ends when told to, when it keeps nothing
and nobody is connected, and when its socket's name is gone so that nobody can ever come.

The socket is SOCK_SEQPACKET: a message arrives whole with its descriptors or not at all, and there
is no middle of a message in which a peer could stall. Requests and replies alternate, lines of
ASCII; <n> descriptors ride on a message that names them, in the order of its names.

    hello                           ok <pid> <random text of this holder>
    keep <names>  with descriptors  ok
    drop <names>                    ok
    left <from>                     ok <kept in all> <names>  with descriptors
    dissolve                        ok, and it ends

`no <why>` answers everything else, and the connection is closed. A peer is hostile input (I4): of
another uid it is closed unread, and whatever it sends ends its connection at most.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import re
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Final

KEPT_MAX: Final = 4096  # 1,024 sessions of three descriptors, and the objects of a pool
BATCH_MAX: Final = 64  # descriptors, and so names, a message
NAME: Final = re.compile(r"[a-z0-9.-]{1,64}", re.ASCII)
MESSAGE_MAX_BYTES: Final = 8192  # a verb and BATCH_MAX names
SILENT_S: Final = 2.0  # until a connection has said something: it keeps others away
UNCLAIMED_S: Final = 10.0  # until somebody wants anything of a new holder
ALONE_S: Final = 60.0  # between looks, without a daemon, whether the socket has its name still
DESCRIPTORS_SPARE: Final = BATCH_MAX + 32  # a message above the limit, and our own
ATTEMPTS: Final = 16  # each lost to a holder that removed its lock file as it ended
BACKLOG: Final = 8
PR_SET_DUMPABLE: Final = 4
LOCK_SUFFIX: Final = ".lock"
EXIT_SERVING: Final = 0
EXIT_WRONG: Final = 1
EXIT_TAKEN: Final = 3
RIGHTS_BYTES: Final = socket.CMSG_SPACE(BATCH_MAX * array.array("i").itemsize)
_UCRED: Final = struct.Struct("iII")


class Refused(Exception):
    """What a peer sent cannot be done; its connection ends."""


# ---- messages, for both ends ---------------------------------------------------------------------


def send(sock: socket.socket, lines: Iterable[str], fds: Sequence[int] = ()) -> None:
    """Send one message. The descriptors stay the caller's."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg(["\n".join(lines).encode("ascii")], rights, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[list[str], list[int]]:
    """
    Return the lines of one message and its descriptors, now the caller's; no lines at the end.

    Raises:
        Refused: It is too large, has too many descriptors or is no text; all of them are closed.
        OSError: The socket's own.
    """
    data, ancillary, flags, _ = sock.recvmsg(
        MESSAGE_MAX_BYTES, RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, packed in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(packed[: len(packed) - len(packed) % fds.itemsize])
    try:
        if flags & socket.MSG_TRUNC:
            raise Refused(f"a message has more than {MESSAGE_MAX_BYTES} bytes")
        if flags & socket.MSG_CTRUNC:
            raise Refused(f"over {BATCH_MAX} descriptors came, or no more may be open (ulimit -n)")
        if not data and not fds:
            return [], []
        return data.decode("ascii").split("\n"), list(fds)
    except (Refused, UnicodeDecodeError) as error:
        close_all(fds)
        raise Refused(str(error)) from None


def peer_uid(sock: socket.socket) -> int:
    """Return whose process is at the other end."""
    return int(_UCRED.unpack(_peer(sock))[1])


def _peer(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors, whatever happens to each."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


# ---- the process ---------------------------------------------------------------------------------


class Holder:
    """What is kept, and the one daemon that is connected."""

    def __init__(self, path: str, listener: socket.socket) -> None:
        self._path = path
        self._listener = listener
        self._found = os.lstat(path)
        self._me = os.urandom(8).hex()  # pids are used again
        self._kept: dict[str, int] = {}
        self._kept_max = min(KEPT_MAX, _descriptor_limit() - DESCRIPTORS_SPARE)
        self._peer: socket.socket | None = None
        self._peer_pid = 0
        self._spoke = False  # did the peer say anything?
        self._wanted = False  # did any peer?
        self._since_s = time.monotonic()  # the peer's arrival or its end
        self._over = False

    def run(self) -> None:
        """Serve until it is over."""
        while not self._over:
            ready = self._wait()
            # First the peer: the end of one daemon makes room for the next.
            if self._peer is not None and self._peer.fileno() in ready:
                self._serve()
            if self._listener.fileno() in ready:
                self._accept()
            self._look_at_clock()

    def _wait(self) -> set[int]:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        if self._peer is not None:
            poll.register(self._peer, select.POLLIN)
        due_s = self._due_s()
        left_ms = None if due_s is None else max(0, int((due_s - time.monotonic()) * 1000) + 1)
        return {fd for fd, _ in poll.poll(left_ms)}

    def _due_s(self) -> float | None:
        """When there is something to decide although nobody says anything."""
        if self._peer is not None:
            return None if self._spoke else self._since_s + SILENT_S
        if self._kept:
            return self._since_s + ALONE_S
        return self._since_s if self._wanted else self._since_s + UNCLAIMED_S

    def _look_at_clock(self) -> None:
        due_s = self._due_s()
        if due_s is None or time.monotonic() < due_s:
            return
        if self._peer is not None:
            self._part()
        elif not self._kept or not self._reachable():
            self._over = True
        self._since_s = time.monotonic()

    def _reachable(self) -> bool:
        try:
            return os.path.samestat(os.lstat(self._path), self._found)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # not proved

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        pid, uid, _gid = _UCRED.unpack(_peer(sock))
        self._finish_dead_peer()
        if uid == os.geteuid() and self._peer is None:
            sock.setblocking(False)
            self._peer, self._peer_pid, self._spoke = sock, pid, False
            self._since_s = time.monotonic()
            return
        with sock, contextlib.suppress(OSError):
            if uid == os.geteuid():
                sock.setblocking(False)
                send(sock, [f"no process {self._peer_pid} is connected: stop it first"])

    def _finish_dead_peer(self) -> None:
        """What a daemon sent before its death is done before its successor is heard."""
        while self._peer is not None:
            poll = select.poll()
            poll.register(self._peer, 0)
            if not any(event & select.POLLHUP for _, event in poll.poll(0)):
                return
            self._serve()

    def _serve(self) -> None:
        """Do one request. Nothing here waits: a peer that does not read its replies is dropped."""
        assert self._peer is not None
        try:
            lines, fds = receive(self._peer)
            if not lines:
                self._part()
                return
            self._spoke = self._wanted = True
            self._answer(self._peer, lines, fds)
        except Refused as error:
            with contextlib.suppress(OSError):
                send(self._peer, [f"no {error}"])
            self._part()
        except OSError:
            self._part()

    def _part(self) -> None:
        assert self._peer is not None
        self._peer.close()
        self._peer = None
        self._since_s = time.monotonic()

    def _answer(self, peer: socket.socket, lines: list[str], fds: list[int]) -> None:
        verb, *words = lines
        if verb == "keep":
            self._keep(words, fds)
            send(peer, ["ok"])
            return
        if fds:
            close_all(fds)
            raise Refused("descriptors came with something else than keep")
        if verb == "hello":
            send(peer, ["ok", str(os.getpid()), self._me])
        elif verb == "drop":
            gone = [self._kept.pop(name) for name in words if name in self._kept]
            try:
                send(peer, ["ok"])
            finally:  # after the reply: the last reference to a large object takes a while
                close_all(gone)
        elif verb == "left":
            names = self._page(words)
            send(peer, ["ok", str(len(self._kept)), *names], [self._kept[name] for name in names])
        elif verb == "dissolve":
            self._over = True
            send(peer, ["ok"])
        else:
            raise Refused("no such request")

    def _keep(self, names: list[str], fds: list[int]) -> None:
        """All of a message or nothing of it."""
        problem = ""
        if not 1 <= len(names) == len(set(names)) == len(fds):
            problem = f"{len(fds)} descriptors came with {len(names)} names"
        elif not all(NAME.fullmatch(name) for name in names):
            problem = "a name is none"
        elif len(self._kept.keys() | set(names)) > self._kept_max:
            problem = f"it can keep {self._kept_max} descriptors here: raise `ulimit -Hn`"
        if problem:
            close_all(fds)
            raise Refused(problem)
        replaced = [self._kept[name] for name in names if name in self._kept]
        self._kept.update(zip(names, fds, strict=True))
        close_all(replaced)

    def _page(self, words: list[str]) -> list[str]:
        if len(words) != 1 or not words[0].isdigit() or len(words[0]) > 4:
            raise Refused("left takes a number")
        return list(self._kept)[int(words[0]) :][:BATCH_MAX]


def _descriptor_limit() -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = KEPT_MAX + DESCRIPTORS_SPARE
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else soft


# ---- its start -----------------------------------------------------------------------------------


def take_lock(path: str) -> int | None:
    """Return the descriptor of the lock file *path*, locked until we end; None: it is taken."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    for _ in range(ATTEMPTS):
        fd = os.open(path, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.lstat(path)):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except FileNotFoundError:
            pass  # its last holder removed it before we had it
        os.close(fd)
    return None


def listen(path: str) -> socket.socket:
    """Listen at *path*, in the place of a dead holder's socket. The lock is held."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(f"{path} is no socket: remove it")
        os.unlink(path)  # noqa: PTH108 - pathlib would cost memory
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    os.umask(0o177)
    listener.bind(path)
    listener.listen(BACKLOG)
    return listener


def _protect() -> None:
    """Nobody of our uid may take what we keep with a debugger, and no core dump holds the pool."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(0)


def _set_signals() -> None:
    """
    A person's `kill` ends us. What is meant for the daemon does not come here: a process group and
    a session of our own keep away the signals of its terminal, its shell and its supervisor's
    `kill -- -GROUP`; HUP and INT are ignored besides, for nobody means us with them.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGTERM, _end)
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _detach() -> None:
    """Keep nothing of whoever started us: no session, no folder, no standard streams."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)


def main(argv: Sequence[str]) -> int:
    """
    Listen, then serve in a child: our own end tells who started us that it may connect.

    The child has no parent that would have to wait for it.
    """
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    path = os.path.abspath(argv[0])  # we go elsewhere
    lock_path = path + LOCK_SUFFIX
    try:
        _set_signals()
        if take_lock(lock_path) is None:
            return EXIT_TAKEN
        holder = Holder(path, listen(path))
        _protect()
    except OSError as error:
        print(error, file=sys.stderr)
        return EXIT_WRONG
    if os.fork():
        return EXIT_SERVING
    try:
        _detach()
        holder.run()
    finally:
        # The lock is held, so that both names are ours, unless the whole folder was replaced.
        if holder._reachable():
            for name in (path, lock_path):
                with contextlib.suppress(OSError):
                    os.unlink(name)  # noqa: PTH108 - as above
    return EXIT_SERVING


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
