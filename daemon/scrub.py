# SPDX-License-Identifier: Apache-2.0
"""
Checksums in the background (checksum = "lazy"): chunks that were written in place get theirs here.

One thread a pool. It sleeps in the kernel until something is stored, and reads no faster than it
is told to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeVar

from cenote.shm.checksum import ChecksumSession
from cenote.shm.errors import PoolGone
from cenote.shm.host import PoolHost

from .logs import get_log

SETTLE_S: Final = 0.05  # several commits at once: one look at them all
Item = TypeVar("Item")

log = get_log(__name__)


class Source(Protocol[Item]):
    """Where work comes from; cenote.shm.checksum.ChecksumSession is the real one."""

    def wait(self) -> None:
        """Sleep until there may be work."""

    def unchecked(self) -> Iterable[Item]:
        """Return what came since the last call."""

    def make(self, item: Item, /) -> int:
        """Make one checksum; return how many bytes were read for it."""


def scrub(
    source: Source[Item], bytes_per_s: Callable[[], int], pause: Callable[[float], bool]
) -> None:
    """
    Make checksums until told to stop.

    Args:
        source: The chunks.
        bytes_per_s: How fast to read, asked again for each chunk.
        pause: Wait so many seconds, and return whether to stop.
    """
    while not pause(0):
        source.wait()
        if pause(SETTLE_S):
            return
        for item in source.unchecked():
            read_bytes = source.make(item)
            if pause(read_bytes / bytes_per_s()):
                return


class Scrubber:
    """The thread for one pool: start() it, stop() it before the pool is closed."""

    def __init__(self, host: PoolHost, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._host = host
        self._session: ChecksumSession | None = ChecksumSession(host)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(self._session,), name=f"scrub-{host.name}", daemon=True
        )

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def _run(self, session: ChecksumSession) -> None:
        try:
            scrub(session, lambda: self.bytes_per_s, self._paused)
        except PoolGone:
            log.debug("scrubber_ended", pool=self._host.name)
        except Exception as error:  # noqa: BLE001 - the pool serves on without it
            log.error("scrubber_failed", pool=self._host.name, exc=error)  # noqa: TRY400 - our log

    def _paused(self, seconds: float) -> bool:
        return self._stop.wait(seconds) if seconds > 0 else self._stop.is_set()

    def stop(self) -> None:
        """End the thread and its session. Idempotent."""
        session, self._session = self._session, None
        if session is None:
            return
        self._stop.set()
        session.close()
        if self._thread.ident is not None:
            self._thread.join()
        number, nonce = session.session, session.nonce
        del session, self._thread  # the last references: now it is unmapped
        self._host.hint(number, nonce)
