# SPDX-License-Identifier: Apache-2.0
"""
Custody without systemd: a holder process, which the first keep() starts. See holder.py.

We have a copy of each descriptor that is kept. When the holder dies before us (somebody killed it)
the next keep() starts another one, which gets all of them: otherwise the next restart would find
half a pool. The copies double the daemon's descriptors; numbers of the caller's would be cheaper,
and wrong as soon as one is closed and used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from cenote.shm.paths import PathError, check_socket_path

from . import holder
from .custody_base import CustodyError, check_keep
from .holder import BATCH_MAX, KEPT_MAX, NAME, close_all
from .logs import get_log

CUSTODY_SUFFIX: Final = ".custody"
REPLY_S: Final = 5.0
START_S: Final = 15.0
# What the interpreter needs. Anything else of our environment would be in memory for months.
ENVIRONMENT_KEPT: Final = ("LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")

log = get_log(__name__)


class _Gone(CustodyError):
    """The holder ended, or ended our connection."""


class HolderCustody:
    """
    The custody of *pool* by the holder at <run_dir>/<pool>.custody, a directory that is ours alone.

    A living holder of a predecessor is found here; none is started.

    Raises:
        CustodyError: There is one that does not serve us.
    """

    freed_by = "`cenoted --drop`"

    def __init__(self, run_dir: Path, pool: str) -> None:
        self._pool = pool
        self._path = Path(os.path.abspath(run_dir)) / f"{pool}{CUSTODY_SUFFIX}"
        self._sock: socket.socket | None = None
        self._pid = 0
        self._me = ""  # which holder we are connected to, or were
        self._has_all = ""  # which one has everything in _kept
        self._kept: dict[str, int] = {}
        self._owed: dict[str, None] = {}  # drops that it did not get, in order
        try:
            check_socket_path(self._path)
        except PathError as error:
            raise CustodyError(f"pool {pool!r}: {error}") from None
        self._reach(start=False)

    @property
    def where(self) -> str:
        """Which process it is."""
        return f"holder process {self._pid}" if self._pid else "a holder process, not yet started"

    # ---- what a daemon asks for -----------------------------------------------------------------

    def keep(self, fds: Mapping[str, int]) -> None:
        """See Custody."""
        check_keep(self._pool, self._kept, fds)
        if not fds and not self._kept:
            return
        copies = self._copies_of(fds)
        try:
            self._hand_over(copies)
        except BaseException:
            close_all(copies.values())
            raise
        self._record(copies)

    def drop(self, names: Iterable[str]) -> None:
        """See Custody."""
        names = [name for name in dict.fromkeys(names) if NAME.fullmatch(name)]
        close_all(self._kept.pop(name) for name in names if name in self._kept)
        if not self._me:
            return  # there was none so far
        self._owed.update(dict.fromkeys(names))
        while len(self._owed) > KEPT_MAX:  # unknown names: it has no more than that
            del self._owed[next(iter(self._owed))]
        if self._sock is None:
            return  # whoever connects next tells it
        try:
            self._pay()
        except CustodyError as error:
            log.warning("custody_drop_failed", pool=self._pool, error=str(error))

    def left(self) -> dict[str, int]:
        """See Custody."""
        found: dict[str, int] = {}
        try:
            if self._reach(start=False):
                self._pay()
                self._fetch(found)
            self._record(self._copies_of(found))
        except BaseException:
            close_all(found.values())
            raise
        self._has_all = self._me
        return found

    def close(self) -> None:
        """See Custody."""
        self._disconnect()
        close_all(self._kept.values())
        self._kept.clear()

    def dissolve(self) -> None:
        """See Custody."""
        try:
            if self._reach(start=False):
                self._request(["dissolve"])
                self._await_end()
        except _Gone:
            pass
        except CustodyError as error:
            log.warning("custody_not_dissolved", pool=self._pool, error=str(error))
        self._owed.clear()
        self._me = self._has_all = ""
        self._pid = 0
        self.close()

    # ---- the record -----------------------------------------------------------------------------

    def _copies_of(self, fds: Mapping[str, int]) -> dict[str, int]:
        copies: dict[str, int] = {}
        try:
            for name, fd in fds.items():
                copies[name] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        except OSError as error:
            close_all(copies.values())
            raise CustodyError(
                f"pool {self._pool!r}: descriptor {fd} ({name}) cannot be copied for custody: "
                f"{error.strerror}. If no more may be open, raise LimitNOFILE= or `ulimit -n`"
            ) from error
        return copies

    def _record(self, copies: Mapping[str, int]) -> None:
        close_all(self._kept[name] for name in copies if name in self._kept)
        self._kept.update(copies)

    # ---- talking to a holder --------------------------------------------------------------------

    def _hand_over(self, copies: Mapping[str, int]) -> None:
        """Bring *copies* to a living holder that has all the rest, once again if it dies of it."""
        for attempt in range(2):
            try:
                self._reach(start=True)
                self._pay()
                if self._has_all != self._me:
                    self._send_all(self._kept)
                    self._has_all = self._me
                    kept = len(self._kept)
                    log.warning("holder_replaced", pool=self._pool, pid=self._pid, kept=kept)
                if not copies:
                    self._greet()  # is it there?
                self._send_all(copies)
            except _Gone:
                if attempt:
                    raise
            else:
                return

    def _send_all(self, fds: Mapping[str, int]) -> None:
        for names in _batches(fds):
            self._request(["keep", *names], [fds[name] for name in names])

    def _pay(self) -> None:
        """Tell the holder what it was to drop."""
        for names in _batches(self._owed):
            self._request(["drop", *names])
            for name in names:
                del self._owed[name]

    def _fetch(self, found: dict[str, int]) -> None:
        total = 1
        while len(found) < total:
            words, fds = self._request(["left", str(len(found))])
            names = words[1:]
            total = int(words[0]) if words and words[0].isdigit() and len(words[0]) < 5 else -1
            fresh = all(NAME.fullmatch(name) and name not in found for name in names)
            known = 0 <= total <= KEPT_MAX and len(names) == len(set(names)) == len(fds)
            if not known or not fresh or (not names and len(found) < total):
                close_all(fds)
                raise self._broken("its list of what is kept makes no sense")
            found.update(zip(names, fds, strict=True))

    def _request(
        self, lines: Sequence[str], fds: Sequence[int] = ()
    ) -> tuple[list[str], list[int]]:
        """Send one request; return the words of its `ok` and the descriptors, now the caller's."""
        assert self._sock is not None
        got: list[int] = []
        try:
            with contextlib.suppress(BrokenPipeError):  # perhaps it said why, before it closed
                holder.send(self._sock, lines, fds)
            words, got = holder.receive(self._sock)
        except TimeoutError:
            raise self._broken(f"it gave no answer within {REPLY_S:g} s") from None
        except ConnectionResetError:
            raise self._gone() from None
        except (OSError, holder.Refused) as error:
            raise self._broken(str(error)) from error
        except BaseException:  # a signal to stop: the reply is still to come, and is not the next
            self._disconnect()
            raise
        if words and words[0] == "ok":
            return words[1:], got
        close_all(got)
        if not words:
            raise self._gone()
        self._disconnect()
        raise CustodyError(
            f"pool {self._pool!r}: the holder process at {self._path} refused: "
            f"{words[0].removeprefix('no ')}"
        )

    def _gone(self) -> _Gone:
        self._disconnect()
        return _Gone(
            f"pool {self._pool!r}: the holder process {self._pid or ''} at {self._path} ended, or "
            "ended the connection: nothing of the pool is in custody now. The next session that "
            "attaches starts another one"
        )

    def _broken(self, why: str) -> CustodyError:
        self._disconnect()
        pid = self._pid
        kill = f"`kill {pid}`" if pid else f"`pkill -f {self._path}`"
        return CustodyError(
            f"pool {self._pool!r}: the holder process {pid or ''} at {self._path} is of no use: "
            f"{why}. If it stays so, end it with {kill} (the cache is then lost at the daemon's "
            "next restart), or start the daemon with --ephemeral"
        )

    def _disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _await_end(self) -> None:
        """It has removed its files once the connection ends."""
        assert self._sock is not None
        with contextlib.suppress(OSError, holder.Refused):
            close_all(holder.receive(self._sock)[1])
        self._disconnect()

    # ---- finding and starting one ---------------------------------------------------------------

    def _reach(self, *, start: bool) -> bool:
        """Be connected to a living holder; False if there is none and none is to be started."""
        if self._sock is not None:
            return True
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            with contextlib.suppress(_Gone):  # it was just ending: look again, it may be another
                if self._connect():
                    return True
                if not start:
                    return False
                self._start()
        raise CustodyError(
            f"pool {self._pool!r}: for {START_S:g} s each holder process at {self._path} ended at "
            f"once: is the folder replaced, or {self._path}{holder.LOCK_SUFFIX} locked by "
            "something else (see `fuser`)?"
        )

    def _connect(self) -> bool:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(REPLY_S)
        try:
            sock.connect(str(self._path))
            uid = holder.peer_uid(sock)
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            return False
        except OSError as error:
            sock.close()
            raise self._broken(f"connect: {error.strerror or 'no answer'}") from error
        self._sock = sock
        if uid != os.geteuid():
            raise self._broken(f"it belongs to uid {uid}, and would have our descriptors")
        self._greet()
        return True

    def _greet(self) -> None:
        words, fds = self._request(["hello"])
        if fds or len(words) != 2 or not words[0].isdigit():
            close_all(fds)
            raise self._broken("its greeting makes no sense: it is of another release")
        self._pid = int(words[0])
        if words[1] != self._me:
            self._owed.clear()  # they were for another one, which is dead
        self._me = words[1]
        if not self._kept:
            self._has_all = self._me

    def _start(self) -> None:
        """Start a holder; it listens when this returns, unless another one does or will."""
        argv = [sys.executable, "-P", "-m", holder.__name__, str(self._path)]
        kept = {k: os.environ[k] for k in ENVIRONMENT_KEPT if k in os.environ}
        try:
            ran = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=kept,
                start_new_session=True,
                timeout=START_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise self._not_started(str(error)) from error
        if ran.returncode == holder.EXIT_SERVING:
            log.info("holder_started", pool=self._pool, path=self._path)
        elif ran.returncode != holder.EXIT_TAKEN:
            said = ran.stderr.decode(errors="replace").strip().splitlines()
            raise self._not_started(said[-1] if said else f"exit status {ran.returncode}")

    def _not_started(self, why: str) -> CustodyError:
        return CustodyError(
            f"pool {self._pool!r}: no holder process could be started at {self._path} ({why}), so "
            "that the cache would not outlive the daemon: mend that, or start the daemon with "
            "--ephemeral"
        )


def _batches(names: Iterable[str]) -> list[list[str]]:
    """Cut *names* into messages, before anything changes them."""
    left = iter(list(names))
    return list(iter(lambda: list(itertools.islice(left, BATCH_MAX)), []))
