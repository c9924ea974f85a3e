# SPDX-License-Identifier: Apache-2.0
"""
One served pool from its lock to its end: what a dead daemon left, the objects, the socket, the
background task, a reload.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cenote.shm import media
from cenote.shm.errors import CenoteError
from cenote.shm.host import PoolHost, Progress
from cenote.shm.paths import closed_to_others, prepare_run_dir
from cenote.shm.pool_spec import PoolSpec, RegionSpec
from cenote.shm.units import format_size, format_size_rounded

from .access import AccessTable
from .config import DaemonConfig, PoolConfig
from .lock import PoolLock
from .logs import get_log
from .scrub import Scrubber
from .server import PoolServer
from .service import PoolService

log = get_log(__name__)


def spec_of(pool: PoolConfig) -> PoolSpec:
    """Return what the objects of *pool* are made from."""
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
    )


@dataclass(frozen=True)
class PoolChange:
    """What a reload makes of one pool."""

    config: PoolConfig
    access: AccessTable
    spec: PoolSpec


class ServedPool:
    """
    A pool of this daemon, step by step: claim(), make(), serve(), then apply() and close().

    Args:
        config: The daemon's configuration, for its run directory.
        pool: The pool's part of it.
    """

    def __init__(self, config: DaemonConfig, pool: PoolConfig) -> None:
        self.config = pool
        self.socket_path = config.socket_of(pool)
        self.spec = spec_of(pool)
        self._run_dir = Path(config.run_dir)
        self._lock = PoolLock(pool.name, self.socket_path)
        self._access = AccessTable(pool)
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
        Take the pool's lock and clear away what a dead daemon left.

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
        stale_socket = self._lock.remove_stale_socket()
        left = [(str(o.name), o.bytes) for o in media.unlink_stale(self.name, os.geteuid())]
        for region in self.spec.regions:
            if region.medium.kind == "file":
                owner = media.unlink_stale_file(region.medium, self.name, os.geteuid())
                left += [(str(region.medium.path), region.bytes)] if owner else []
        if left or stale_socket:
            log.warning(
                "leftovers_unlinked",
                pool=self.name,
                predecessor_pid=self._lock.predecessor,
                objects=len(left),
                size=format_size_rounded(sum(bytes_ for _, bytes_ in left)),
                socket=stale_socket,
                remark="a daemon died; its cache is dropped, readers that live keep their views",
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
        for region in self.spec.regions:
            for note in media.notes(region.medium):
                log.warning("medium_note", pool=self.name, note=note)
        self._host = PoolHost.create(self.spec, progress=progress, stop=stop)

    def serve(self, destroyed: Callable[[ServedPool], None]) -> None:
        """Listen. Called in the event loop; *destroyed* is called when an admin says so."""
        service = PoolService(self.host, self.config, self._access, lambda: destroyed(self))
        self._server = PoolServer(service, self.socket_path)
        self._scrub()

    def ready_text(self) -> str:
        """Return this pool's part of the `ready` line."""
        size = format_size(self.host.capacity_bytes)
        return f"pool={self.name} socket={self.socket_path} size={size}"

    def _scrub(self) -> None:
        """Have a background task exactly when the configuration wants one."""
        rate = self.config.scrub_bytes_per_s
        wanted = self.config.checksum == "lazy" and rate > 0
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
        """Stop serving, unlink every name, and give the lock back. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.close(reason)
        self.drop()

    def drop(self) -> None:
        """The same without a socket: for a start that failed."""
        scrubber, self._scrubber = self._scrubber, None
        if scrubber is not None:
            scrubber.stop()
        host, self._host = self._host, None
        if host is not None:
            self._say_what_goes(host)
            host.close()
        self._lock.release()

    def _say_what_goes(self, host: PoolHost) -> None:
        try:
            counters = host.counters()
        except CenoteError as error:
            log.warning("pool_dropped", pool=self.name, exc=error)
            return
        log.info(
            "pool_dropped",
            pool=self.name,
            chunks=counters["live_chunks"],
            size=format_size_rounded(counters["live_bytes"]),
            sessions=counters["sessions"],
            remark="this release cannot keep a pool beyond its daemon; living readers keep theirs",
        )
