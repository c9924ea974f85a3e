# SPDX-License-Identifier: Apache-2.0
"""
One served pool from its lock to its end: what a dead daemon left, the objects, the socket, the
background task, a reload.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cenote.shm import media, takeover
from cenote.shm.custody import name_in
from cenote.shm.errors import CenoteError
from cenote.shm.host import PoolHost
from cenote.shm.objects import Progress
from cenote.shm.paths import closed_to_others, prepare_run_dir
from cenote.shm.pool_spec import PoolSpec, RegionSpec
from cenote.shm.units import format_size, format_size_rounded
from cenote.shm.wire import close_all

from .access import AccessTable
from .config import DaemonConfig, PoolConfig
from .custody import Custody, NoCustody, open_custody
from .lock import PoolLock
from .logs import get_log
from .scrub import Scrubber
from .server import PoolServer
from .service import PoolService

PLACE_BYTES: Final = 4  # of a pool id

log = get_log(__name__)


def spec_of(pool: PoolConfig, place: bytes = b"") -> PoolSpec:
    """Return what the objects of *pool* are made from; *place*: see PoolSpec."""
    return PoolSpec(
        name=pool.name,
        regions=tuple(
            RegionSpec(
                media.parse_medium(
                    f"file:{region.path}" if region.medium == "file" else region.medium,
                    None if region.medium == "file" else region.page_size,
                ),
                region.size_bytes,
                region.populate,
            )
            for region in pool.regions
        ),
        chunk_count=pool.chunk_slots,
        lease_slots=pool.lease_slots,
        event_count=pool.event_slots,
        policy=pool.policy,
        high_water=pool.high_water,
        low_water=pool.low_water,
        checksum=pool.checksum,
        reader_lease_share=pool.reader_lease_share,
        place=place,
    )


@dataclass(frozen=True)
class PoolChange:
    """What a reload makes of one pool."""

    config: PoolConfig
    access: AccessTable
    spec: PoolSpec


class ServedPool:
    """
    A pool of this daemon, step by step: claim(), take_over() or make(), serve(), then apply() and
    close().

    Args:
        config: The daemon's configuration, for its run directory.
        pool: The pool's part of it.
        by_force: Kill a daemon that serves the pool, even if it runs.
    """

    def __init__(self, config: DaemonConfig, pool: PoolConfig, *, by_force: bool = False) -> None:
        self.config = pool
        self.socket_path = config.socket_of(pool)
        # The lock is the socket's, and so is what its daemons leave; not what lies elsewhere.
        place = hashlib.sha256(os.path.abspath(self.socket_path).encode()).digest()
        self.spec = spec_of(pool, place[:PLACE_BYTES])
        self._run_dir = Path(config.run_dir)
        self._lock = PoolLock(pool.name, self.socket_path, take_over=by_force)
        self._custody: Custody = NoCustody()
        self._access = AccessTable(pool)
        self._spared_names: list[str] = []  # what custody has of it
        self._in_doubt = False  # are there chunks to be checked since a dirty start (I9)?
        self._taken_over = False
        self._spared: bytes | None = None  # a pool id that could not be kept, and is left alone
        self._host: PoolHost | None = None
        self._server: PoolServer | None = None
        self._scrubber: Scrubber | None = None

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.config.name

    @property
    def host(self) -> PoolHost:
        """The pool itself, once it is made."""
        assert self._host is not None
        return self._host

    # ---- start ----------------------------------------------------------------------------------

    def claim(self) -> None:
        """
        Take the pool's lock from a daemon that is dead.

        Raises:
            PoolTaken: Another daemon serves it.
            PathError, OSError: The directory of the socket cannot be used.
            SaltError: A tenant's salt cannot be used.
        """
        if self.socket_path.parent == self._run_dir:
            shared = self._access.others_may_connect()
            prepare_run_dir(self._run_dir, os.geteuid(), shared=shared)
        self._warn_of_closed_folder()
        self._lock.acquire()
        self._lock.remove_stale_socket()
        for region in self.spec.regions:
            for note in media.notes(region.medium):
                log.warning("medium_note", pool=self.name, note=note)

    def take_over(self, *, reformat: bool = False) -> bool:
        """
        Go on with what the last daemon of this pool left; return whether there was such a thing.

        Where there is none, or it cannot be kept, make() comes next, and finds its names free.

        Raises:
            OtherLayout: It is another release's, or of other sizes: nothing was touched.
            MediumError: At a file's path lies something that is not ours.
        """
        self._custody = open_custody(self.socket_path.parent, self.name)
        if self.config.ephemeral:
            self._custody.dissolve()
            self._custody.close()
            self._custody = NoCustody()
            self._drop_others(None)
            return False
        kept = self._custody.left()
        place = self.spec.place.hex()
        others = {name: kept.pop(name) for name in list(kept) if not name.startswith(place)}
        close_all(others.values())
        try:
            left = None if reformat else self._found(kept)
            if left is not None and self._adopted(left):
                self._custody.drop(kept.keys() - self.host.names_kept())
                self._drop_others(left.pool_id)
                return True
            if any(region.medium.kind == "file" for region in self.spec.regions):
                self._spared = None  # its place is needed
            if self._spared is not None:
                mark = name_in(self._spared, "")
                self._spared_names = [name for name in kept if name.startswith(mark)]
            self._custody.drop(kept.keys() - set(self._spared_names))
            self._drop_others(self._spared)
            return False
        finally:
            close_all(kept.values())

    def forget_everything(self) -> None:
        """Free all that is left of this pool. The lock is held."""
        self._custody = open_custody(self.socket_path.parent, self.name)
        close_all(self._custody.left().values())
        self._custody.dissolve()
        self._drop_others(None)

    def _found(self, kept: Mapping[str, int]) -> takeover.Left | None:
        try:
            return takeover.find(self.spec, kept)
        except takeover.CannotKeep as error:
            self._spared = error.pool_id
            log.warning("pool_not_kept", pool=self.name, error=str(error))
            return None

    def _adopted(self, left: takeover.Left) -> bool:
        try:
            self._host, found = PoolHost.adopt(self.spec, left, self._custody)
        except takeover.CannotKeep as error:
            self._spared = error.pool_id
            log.warning("pool_not_kept", pool=self.name, error=str(error))
            return False
        self._in_doubt = found["unverified"] > 0
        self._taken_over = True
        log.info(
            "pool_taken_over",
            pool=self.name,
            predecessor_pid=left.keeper_pid,
            clean=left.clean,
            chunks=found["live_chunks"],
            size=format_size_rounded(found["live_bytes"]),
            sessions=found["sessions"],
            repaired=sum(found[n] for n in ("linked", "twins", "returned", "unindexed")),
            unverified=found["unverified"],
        )
        return True

    def _drop_others(self, keep_id: bytes | None) -> None:
        gone = takeover.drop_names(self.spec, keep_id)
        if gone:
            log.warning(
                "leftovers_unlinked",
                pool=self.name,
                predecessor_pid=self._lock.predecessor,
                objects=len(gone),
                size=format_size_rounded(sum(bytes_ for _, bytes_ in gone)),
                remark="pools that nobody goes on with; living readers keep their views",
            )

    def _warn_of_closed_folder(self) -> None:
        """Say that the access lists name users who cannot reach the socket: they see no daemon."""
        folder = self.socket_path.parent
        if not self._access.others_may_connect() or not folder.is_dir():
            return
        problem = closed_to_others(folder)
        if problem:
            log.warning(
                "run_dir_closed",
                pool=self.name,
                path=folder,
                problem=problem,
                remedy=f"`chmod 0755 {folder}` if others that [pool.access] lists are to attach",
            )

    def make(self, progress: Progress, stop: threading.Event | None = None) -> None:
        """Make the objects under a new pool id and start the keeper; see PoolHost.create()."""
        self._host = PoolHost.create(self.spec, progress=progress, stop=stop, custody=self._custody)

    def serve(self, destroyed: Callable[[ServedPool], None]) -> None:
        """Listen. Called in the event loop; *destroyed* is called when an admin says so."""
        service = PoolService(self.host, self.config, self._access, lambda: destroyed(self))
        if self._taken_over:
            service.adopt_sessions()
        self._server = PoolServer(service, self.socket_path)
        self._server.look_for_ends()  # of sessions that ended while no daemon was there
        self._scrub()

    def ready_text(self) -> str:
        """Return this pool's part of the `ready` line."""
        size = format_size(self.host.capacity_bytes)
        return f"pool={self.name} socket={self.socket_path} size={size}"

    def _scrub(self) -> None:
        """Have a background task exactly when the configuration wants one."""
        rate = self.config.scrub_bytes_per_s
        wanted = rate > 0 and (self.config.checksum == "lazy" or self._in_doubt)
        if self._scrubber is not None and not wanted:
            self._scrubber.stop()
            self._scrubber = None
        elif self._scrubber is not None:
            self._scrubber.bytes_per_s = rate
        elif wanted:
            self._scrubber = Scrubber(self.host, rate)
            self._scrubber.start()

    # ---- life -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Have the keeper answer: if it does not, neither do we answer the watchdog."""
        if self._host is not None:  # else it is being closed
            self._host.counters()

    def prepare(self, pool: PoolConfig) -> PoolChange:
        """
        Return what a reload applies here, after everything of it that can fail.

        Raises:
            SaltError: A tenant's salt cannot be used.
        """
        access = AccessTable(pool)
        spec = replace(
            self.spec,
            policy=pool.policy,
            high_water=pool.high_water,
            low_water=pool.low_water,
            checksum=pool.checksum,
            reader_lease_share=pool.reader_lease_share,
        )
        return PoolChange(pool, access, spec)

    def apply(self, change: PoolChange) -> None:
        """Change what can change while clients are attached."""
        assert self._server is not None
        self.host.configure(change.spec)
        self.spec, self.config, self._access = change.spec, change.config, change.access
        self._server.service.reconfigure(change.config, change.access)
        self._server.access_changed()
        self._warn_of_closed_folder()
        self._scrub()

    # ---- end ------------------------------------------------------------------------------------

    async def close(self, reason: str) -> None:
        """
        Stop serving and give the lock back. Idempotent.

        The pool is kept for the next daemon, unless it was destroyed or is ephemeral.
        """
        server, self._server = self._server, None
        if server is not None:
            await server.close(reason)
        self.drop(keep=reason != "destroyed")

    def drop(self, *, keep: bool = False) -> None:
        """The same without a socket. Idempotent."""
        scrubber, self._scrubber = self._scrubber, None
        if scrubber is not None:
            scrubber.stop()
        host, self._host = self._host, None
        if host is not None:
            keep = keep and not self.config.ephemeral and self._in_custody()
            self._say_what_becomes(host, keep)
            if not keep:
                self._custody.dissolve()
            host.close(keep=keep)
        self._custody.close()
        self._lock.release()

    def _in_custody(self) -> bool:
        """Is what has no name kept still? A holder that was killed is replaced here."""
        try:
            self._custody.keep({})
        except CenoteError as error:
            log.error("pool_not_kept", pool=self.name, exc=error)  # noqa: TRY400 - our log
            return False
        return True

    def give_up_spared(self) -> bool:
        """Drop what could not be kept, for want of room; return whether there was something."""
        if self._spared is None:
            return False
        self._custody.drop(self._spared_names)
        self._spared = None
        self._drop_others(None)
        return True

    def _say_what_becomes(self, host: PoolHost, keep: bool) -> None:
        event = "pool_kept" if keep else "pool_dropped"
        try:
            counters = host.counters()
        except CenoteError as error:
            log.warning(event, pool=self.name, exc=error)
            return
        log.info(
            event,
            pool=self.name,
            chunks=counters["live_chunks"],
            size=format_size_rounded(counters["live_bytes"]),
            sessions=counters["sessions"],
            remark="the next daemon goes on with it; until then its memory stays in use, and "
            f"{self._custody.freed_by} frees it"
            if keep
            else "living readers keep their views",
        )
