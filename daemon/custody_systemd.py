# SPDX-License-Identifier: Apache-2.0
"""
Custody by systemd: its descriptor store, which one service has for all of its pools.

FDSTORE=1 in a notification stores descriptors, and the next start of the service gets them as it
gets sockets (sd_listen_fds(3)), by names: ours are <pool>.<name>. Nobody answers a notification.
BARRIER=1 with a pipe's end is how we know that systemd has read all before it: it closes the end
(sd_notify_barrier(3)). What it did with them it does not say, so that we count against its limit
ourselves.

The unit needs FileDescriptorStoreMax=, and FileDescriptorStorePreserve=yes for what is to outlive a
stop besides a restart. Before 254 systemd has a store and does not tell the service: there the unit
does, by $CENOTED_FDSTORE_MAX. Not by systemd's own $FDSTORE, for Environment= wins over that.
"""

from __future__ import annotations

import array
import fcntl
import functools
import os
import select
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from .custody_base import CustodyError, check_keep
from .holder import BATCH_MAX, NAME
from .logs import get_log
from .systemd import notify_address

STORE_MAX_ENV: Final = "CENOTED_FDSTORE_MAX"
FIRST_FD: Final = 3  # SD_LISTEN_FDS_START
LISTEN_FDS_MAX: Final = 65_536
NAMES_LOGGED_MAX: Final = 8
BARRIER_S: Final = 5.0  # as sd_notify_barrier(3) has it in its example
SEND_S: Final = 5.0

log = get_log(__name__)


@dataclass(frozen=True)
class Environment:
    """What systemd told this process, unread."""

    address: str
    store_max: int  # 0: no store, or a systemd before 254 and a unit that do not say
    listen_pid: str
    listen_fds: str
    listen_names: str

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Environment:
        """Take what concerns us from *environ*."""
        store_max = environ.get("FDSTORE") or environ.get(STORE_MAX_ENV, "")
        return cls(
            notify_address(environ),
            int(store_max) if _is_number(store_max) else 0,
            environ.get("LISTEN_PID", ""),
            environ.get("LISTEN_FDS", ""),
            environ.get("LISTEN_FDNAMES", ""),
        )

    def names(self) -> list[str]:
        """Return the names of the descriptors from FIRST_FD on; none where they are not for us."""
        if self.listen_pid != str(os.getpid()) or self.listen_fds in ("", "0"):
            return []
        names = self.listen_names.split(":")
        count = int(self.listen_fds) if _is_number(self.listen_fds) else -1
        if count == len(names) <= LISTEN_FDS_MAX:
            return names
        log.error(
            "listen_fds_unusable",
            listen_fds=self.listen_fds[:20],
            names=len(names),
            remark="they are left alone: the pools begin empty",
        )
        return []

    def stores(self, pool: str) -> bool:
        """Whether systemd keeps descriptors of *pool*."""
        if not self.address:
            return False
        return self.store_max > 0 or any(name.startswith(f"{pool}.") for name in self.names())


class FdStore:
    """The store of this service as we know it, and what it had when we were started."""

    def __init__(self, environment: Environment) -> None:
        self._address = environment.address
        self._max = environment.store_max
        self.names: set[str] = set()  # what is in it, or may be
        self._unclaimed: dict[str, int] = {}
        nobodys, twice = [], set()
        for fd, name in enumerate(environment.names(), FIRST_FD):
            pool, _, rest = name.partition(".")
            if not _keep_to_ourselves(fd) or not pool or not NAME.fullmatch(rest):
                nobodys.append(name)
                continue
            if name in self.names:
                twice.add(name)
            self.names.add(name)
            self._unclaimed[name] = fd
        # Which of two is the older is not known. One that is missing costs the cache (I7); a wrong
        # one could cost a wrong byte.
        for name in twice:
            del self._unclaimed[name]
        _log_left_alone("descriptors_of_nobody", nobodys)
        _log_left_alone("descriptors_twice", sorted(twice))

    def claim(self, pool: str) -> dict[str, int]:
        """Return the descriptors of *pool* that were there, once; they are the caller's."""
        mine = [name for name in self._unclaimed if name.startswith(f"{pool}.")]
        return {name.partition(".")[2]: self._unclaimed.pop(name) for name in mine}

    def unclaimed(self) -> list[str]:
        """Return the names of what nobody claimed so far."""
        return sorted(self._unclaimed)

    def add(self, fds: Mapping[str, int]) -> None:
        """Store all of *fds* under their full names; it is done when this returns."""
        wanted = len(self.names | fds.keys())
        if 0 < self._max < wanted:
            raise CustodyError(
                f"systemd keeps {self._max} descriptors for this service, and {wanted} are to be "
                f"kept: write FileDescriptorStoreMax={2 * wanted} into the unit, then `systemctl "
                "daemon-reload` and restart the service"
            )
        for count, (name, fd) in enumerate(fds.items(), 1):
            if name in self.names:  # it would keep both
                self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")
            self.names.add(name)
            # Without FDPOLL=0 it would drop a pidfd at the death that we want to see.
            self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd)
            if count % BATCH_MAX == 0 or count == len(fds):
                self.barrier()

    def remove(self, names: Iterable[str]) -> None:
        """Forget *names*, unless it forgot them itself."""
        for name in names:
            self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")
            self.names.discard(name)

    def barrier(self) -> None:
        """Return once systemd has done all that was sent before."""
        end, sent = os.pipe()
        try:
            try:
                self._send("BARRIER=1", sent)
            finally:
                os.close(sent)
            poll = select.poll()
            poll.register(end, 0)  # the hang-up is always reported
            if not poll.poll(BARRIER_S * 1000):
                raise self._mute(f"did nothing with our notifications for {BARRIER_S:g} s")
        finally:
            os.close(end)

    def _send(self, state: str, fd: int | None = None) -> None:
        fds = array.array("i", [] if fd is None else [fd])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(SEND_S)
            try:
                sock.sendmsg([state.encode()], rights, 0, self._address)
            except TimeoutError:
                raise self._mute(f"read no notification for {SEND_S:g} s") from None
            except OSError as error:
                what = state.replace("\n", " ")
                raise self._mute(f"does not take {what!r}: {error.strerror}") from error

    def _mute(self, what: str) -> CustodyError:
        return CustodyError(
            f"systemd, at {self._address!r}, {what}: what was to be kept may be lost at the next "
            "restart. See `systemctl status` and its journal, or start the daemon with --ephemeral"
        )


@functools.cache
def store_of(environment: Environment) -> FdStore:
    """Return the one store of this process: descriptors are claimed once, the limit is for all."""
    return FdStore(environment)


class SystemdCustody:
    """The custody of *pool* in *store*."""

    where = "systemd's descriptor store"
    # `cenoted --drop` is no service, and systemd would not listen to it
    freed_by = "`systemctl clean --what=fdstore` of the stopped service"

    def __init__(self, pool: str, store: FdStore) -> None:
        self._pool = pool
        self._prefix = f"{pool}."
        self._store = store

    def keep(self, fds: Mapping[str, int]) -> None:
        """See Custody."""
        check_keep(self._pool, (n.removeprefix(self._prefix) for n in self._names()), fds)
        self._store.add({self._prefix + name: fd for name, fd in fds.items()})

    def drop(self, names: Iterable[str]) -> None:
        """See Custody."""
        full = [self._prefix + name for name in dict.fromkeys(names) if NAME.fullmatch(name)]
        try:
            self._store.remove(full)
        except CustodyError as error:
            log.warning("custody_drop_failed", pool=self._pool, error=str(error))

    def left(self) -> dict[str, int]:
        """See Custody."""
        return self._store.claim(self._pool)

    def close(self) -> None:
        """See Custody."""

    def dissolve(self) -> None:
        """See Custody."""
        for fd in self._store.claim(self._pool).values():
            os.close(fd)
        try:
            self._store.remove(self._names())
            self._store.barrier()
        except CustodyError as error:
            log.warning("custody_not_dissolved", pool=self._pool, error=str(error))

    def _names(self) -> list[str]:
        return [name for name in self._store.names if name.startswith(self._prefix)]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _keep_to_ourselves(fd: int) -> bool:
    """Programs that we start shall not inherit *fd*; False when it is not open."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    except OSError:
        return False
    return True


def _log_left_alone(event: str, names: list[str]) -> None:
    if names:
        shown = [name[:80] for name in names[:NAMES_LOGGED_MAX]]
        remark = "left where they are: stop the service and `systemctl clean --what=fdstore` it"
        log.warning(event, count=len(names), names=shown, remark=remark)
