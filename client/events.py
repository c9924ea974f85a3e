# SPDX-License-Identifier: Apache-2.0
"""The feed of a pool: what was stored, evicted (and by what), deleted, cleared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from cenote.shm.handle import RawEvent

from .errors import PoolGone

if TYPE_CHECKING:
    from .pool import Attachment, Pool

Kind = Literal["stored", "evicted", "deleted", "cleared"]
Reason = Literal["", "policy", "quota", "ttl", "client", "loss", "reclaim", "admin"]

KINDS: Final[dict[int, Kind]] = {1: "stored", 2: "evicted", 3: "deleted", 4: "cleared"}
REASONS: Final[dict[int, Reason]] = {
    1: "policy",
    2: "quota",
    3: "ttl",
    4: "client",
    5: "loss",
    6: "reclaim",
    7: "admin",
}
# A wait is cut into slices so that Ctrl-C, close() and a reconnect are noticed in the middle of it.
WAIT_SLICE_MS: Final = 500


@dataclass(frozen=True, slots=True)
class Event:
    """
    Something that happened to one chunk, or to all ("cleared").

    Attributes:
        sequence: Number of the event in its pool, without holes; a new pool id begins at 1 again.
        kind: "stored", "evicted", "deleted" or "cleared".
        reason: Why it left: "policy" (pool full), "quota", "ttl", "client", "loss", "reclaim" (its
            slab went to another size), "admin"; "" for stored.
        key: The chunk's 32 bytes.
        namespace_id: The namespace's 32 bytes; zeroes for "cleared".
        nbytes: Length of the chunk.
        time_ns: When, CLOCK_REALTIME.
        ref: Descriptor and generation, as in `chunk.ref`.
    """

    sequence: int
    kind: Kind
    reason: Reason
    key: bytes
    namespace_id: bytes
    nbytes: int
    time_ns: int
    ref: int


@dataclass(frozen=True, slots=True)
class Gap:
    """
    Events were lost here: the reader was too slow, or another pool came after a restart.

    What is known about the pool's contents from earlier events is not to be trusted any more.

    Attributes:
        sequence: Number of the next event that is there.
        lost: How many were lost; None when a new pool began, whose numbers start again.
        pool_id: The pool that the next event belongs to.
    """

    sequence: int
    lost: int | None
    pool_id: bytes
    kind: Literal["gap"] = "gap"


class Follower:
    """
    Reads the feed from a place on. Not for several threads at once.

    Args:
        pool: The pool.
        since: The first sequence number wanted; None for what happens from now on.
    """

    def __init__(self, pool: Pool, since: int | None) -> None:
        self._pool = pool
        self._attachment = pool._attachment
        self.sequence = self._attachment.handle.event_head if since is None else max(since, 1)

    def read(self) -> list[Event | Gap]:
        """Return what is there, at most a few hundred; empty when there is nothing new."""
        attachment = self._attachment
        if self._pool.closed or attachment.handle.forked:
            self._pool.refuse()
        raw, following, lost = attachment.handle.read_events(self.sequence)
        found: list[Event | Gap] = []
        if lost:
            first = raw[0].sequence if raw else following
            found.append(Gap(first, lost, attachment.pool_id))
        found.extend(_event(attachment, item) for item in raw if item.kind in KINDS)
        self.sequence = following
        return found or self._change_over()

    def _change_over(self) -> list[Event | Gap]:
        """At the end of a pool that a restarted daemon replaced: go on with the next one."""
        if self._pool._attachment is self._attachment:
            return []
        self._attachment = self._pool._attachment
        self.sequence = 1
        return [Gap(1, None, self._attachment.pool_id)]

    def wait(self, timeout_s: float | None) -> None:
        """
        Sleep until there may be something to read, at most *timeout_s*, at most a slice.

        Raises:
            PoolGone: The daemon is gone and nobody reconnects: nothing will ever come.
        """
        if not self._attachment.connected and not self._pool.reconnecting:
            raise PoolGone(f"the daemon of pool {self._pool.name!r} is gone: no more events come")
        wait_ms = WAIT_SLICE_MS if timeout_s is None else min(int(timeout_s * 1000), WAIT_SLICE_MS)
        self._attachment.handle.wait_events(self.sequence, max(wait_ms, 0))


def follow(
    pool: Pool, since: int | None, timeout_s: float | None, *, forever: bool
) -> Iterator[Event | Gap]:
    """Yield events; see `Pool.events`."""
    follower = Follower(pool, since)
    return _follow(follower, timeout_s, forever=forever)


def _follow(follower: Follower, timeout_s: float | None, *, forever: bool) -> Iterator[Event | Gap]:
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        found = follower.read()
        yield from found
        if found:
            deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
            continue
        if not forever:
            return
        left_s = None if deadline_s is None else deadline_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            return
        follower.wait(left_s)


def _event(attachment: Attachment, raw: RawEvent) -> Event:
    return Event(
        sequence=raw.sequence,
        kind=KINDS[raw.kind],
        reason=REASONS.get(raw.reason, ""),
        key=raw.key,
        namespace_id=attachment.namespace_id(raw.namespace_slot),
        nbytes=raw.data_bytes,
        time_ns=raw.time_ns,
        ref=raw.ref,
    )
