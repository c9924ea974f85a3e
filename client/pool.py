# SPDX-License-Identifier: Apache-2.0
"""
A connection to one pool of the daemon on this host.

What is mapped stays readable whatever happens to the daemon; what needs the daemon raises PoolGone
until the link has found the next one. An attachment is one mapping of one pool id: a reconnect
makes a new one, and the old one lives until its last lease has died.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from cenote.shm.handle import Handle
from cenote.shm.session import Mapping as SessionMapping
from cenote.shm.session import Welcome

from . import connection as _connection
from . import events as _events
from .chunk import Chunk, Token
from .errors import CenoteError, ForkedChild, InvalidArgument, PoolGone, ProtocolError, Timeout
from .manifest import Manifest
from .namespace import CALL_TIMEOUT_S, Binding, Cache
from .put import Put

if TYPE_CHECKING:
    from cenote.shm.messages import Resume
    from cenote.shm.wire import Channel

CONNECT_TIMEOUT_S: Final = 2.0
ROLES: Final = ("reader", "writer", "admin")


@dataclass(frozen=True)
class PoolStats:
    """
    A pool's counters, since it was made; all sessions together. Bytes are bytes, the rest counts.

    Attributes:
        chunks: Chunks that can be looked up.
        leases: Leases that sessions hold.
        sessions: Processes attached.
        namespaces: Namespaces opened.
        bytes_used: Memory of chunks, extents included that are being let go.
        bytes_total: Memory of all regions.
        bytes_granted: Memory reserved by writers and not committed.
        bytes_waste: Memory that no extent can use.
        hits: Leases taken.
        misses: Lookups that found nothing, or were refused.
        hit_bytes: Bytes that were leased, as far as the daemon has read the sessions' logs.
        lease_refused: Lookups answered as a miss because of a limit of the session.
        commits: Chunks stored.
        duplicates: Chunks dropped because the key was there.
        refused: Commits dropped: quota, no place in the index, or not allowed.
        evictions: Chunks evicted.
        deletions: Chunks deleted.
        expirations: Chunks whose time-to-live ended.
        lost: Chunks dropped for a bad checksum or a failed medium.
        pinned: Chunks pinned.
        limbo: Chunks that are gone and still leased.
        sessions_died: Sessions that ended with their process, without close().
        raw: Every counter the daemon sent, by its name in the format.
    """

    chunks: int = 0
    leases: int = 0
    sessions: int = 0
    namespaces: int = 0
    bytes_used: int = 0
    bytes_total: int = 0
    bytes_granted: int = 0
    bytes_waste: int = 0
    hits: int = 0
    misses: int = 0
    hit_bytes: int = 0
    lease_refused: int = 0
    commits: int = 0
    duplicates: int = 0
    refused: int = 0
    evictions: int = 0
    deletions: int = 0
    expirations: int = 0
    lost: int = 0
    pinned: int = 0
    limbo: int = 0
    sessions_died: int = 0
    raw: Mapping[str, int] = dataclasses.field(default_factory=dict, repr=False)


_COUNTER_OF: Final = {
    "chunks": "live_chunks",
    "bytes_used": "live_bytes",
    "bytes_granted": "granted_bytes",
    "bytes_waste": "waste_bytes",
    "pinned": "pinned_chunks",
    "limbo": "limbo_chunks",
}


class Attachment:
    """One mapping of one pool. Immutable, but for `connected`."""

    __slots__ = ("_connected", "checksum", "handle", "pool", "pool_id", "role", "welcome")

    def __init__(self, welcome: Welcome, mapping: SessionMapping) -> None:
        self.handle: Handle[Chunk, Put] = Handle(
            mapping, Chunk, Put, welcome.pool, welcome.checksum
        )
        self.welcome = welcome
        self.pool = welcome.pool
        self.pool_id = welcome.pool_id
        self.role = welcome.role
        self.checksum = welcome.checksum
        self.connected = True

    @property
    def connected(self) -> bool:
        """Is its daemon there?"""
        return self._connected

    @connected.setter
    def connected(self, connected: bool) -> None:
        self._connected = connected
        self.handle.calls.accepting = connected and self.role != "reader"

    def namespace_id(self, slot: int) -> bytes:
        """Return the id of the namespace in *slot*."""
        return self.handle.namespace_id(slot)


class ControlLink(Protocol):
    """How a pool asks its daemon for something."""

    def request(
        self, op: str, fields: Mapping[str, Any] | None = None, timeout_s: float = 2.0
    ) -> dict[str, Any]:
        """Ask and return the answer, or raise a CenoteError."""

    def close(self) -> None:
        """Say goodbye. Idempotent."""


class Pool:
    """
    A pool, attached. Made by `connect`; any number of threads may share it.

    Leaving `with pool:` closes it. Views that live stay good; the memory is unmapped with the last.
    """

    def __init__(self, welcome: Welcome, mapping: SessionMapping) -> None:
        self._attachment = Attachment(welcome, mapping)
        self._link: ControlLink | None = None
        self._lock = threading.Lock()  # namespaces and the change of attachments
        self._caches: weakref.WeakSet[Cache] = weakref.WeakSet()
        self._closed = False
        self.reconnecting = False  # does the link look for the next daemon when this one goes?
        self.reconnects = 0

    def _start(self, link: ControlLink, *, reconnecting: bool) -> None:
        self._link = link
        self.reconnecting = reconnecting
        weakref.finalize(self, link.close)

    # ---- facts ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._attachment.pool

    @property
    def pool_id(self) -> bytes:
        """16 bytes that name this making of the pool; another one after it was made anew."""
        return self._attachment.pool_id

    @property
    def role(self) -> str:
        """What the daemon lets this session do: "reader", "writer" or "admin"."""
        return self._attachment.role

    @property
    def connected(self) -> bool:
        """Is a daemon there? Without one only lookups work."""
        return self._attachment.connected and not self._closed

    @property
    def closed(self) -> bool:
        """Was close() called?"""
        return self._closed

    @property
    def mapping(self) -> SessionMapping:
        """
        The memory that new chunks and puts lie in: another object after each reconnect.

        `mapping.regions()` says where it is, for what hands whole regions to a device; older
        chunks lie in the mapping that they were leased in.
        """
        return self._attachment.handle.mapping

    @property
    def leases(self) -> int:
        """How many leases this process holds in the pool it is attached to now."""
        self._check_usable()
        return self._attachment.handle.leases

    # ---- namespaces and chunks -------------------------------------------------------------------

    def namespace(
        self, manifest: Manifest, name: str | None = None, timeout_s: float = CALL_TIMEOUT_S
    ) -> Cache:
        """
        Open exactly the namespace of *manifest*, or make it.

        Args:
            manifest: What the bytes under its keys depend on.
            name: Bind it to a name, so that a process with another manifest learns that it has one.
            timeout_s: Upper bound of the call.

        Raises:
            ManifestMismatch: The name is bound to another manifest; `.fields` has the differences.
            LimitReached: The pool has 4,096 namespaces.
            PoolGone, Timeout.
        """
        deadline_s = time.monotonic() + timeout_s
        self._check_usable()
        if not self._lock.acquire(timeout=timeout_s):
            raise Timeout(f"pool {self.name!r} was busy reconnecting for {timeout_s:g} s")
        try:
            attachment = self._attachment
            if not attachment.connected:
                self.refuse()
            left_s = max(deadline_s - time.monotonic(), 1e-3)
            binding = _opened(self._control, attachment, manifest, name, left_s)
            cache = Cache(self, manifest, name, binding)
            self._caches.add(cache)
            return cache
        finally:
            self._lock.release()

    def open(self, token: bytes) -> Chunk | None:
        """
        Lease the chunk that another process's `chunk.token` names, without a copy.

        Returns:
            The chunk; None when it has left the pool, or the pool was made anew.

        Raises:
            ValueError: *token* is no token.
            ForkedChild, PoolGone.
        """
        parsed = Token.parse(bytes(token))
        attachment = self._attachment
        if parsed.pool_id != attachment.pool_id:
            self._check_usable()
            return None
        head = int.from_bytes(parsed.key_head, "little")
        return attachment.handle.calls.open(parsed.ref, head)

    # ---- about the pool ------------------------------------------------------------------------

    def stats(self, timeout_s: float = CALL_TIMEOUT_S) -> PoolStats:
        """Ask the daemon for the pool's counters. Raises PoolGone, Timeout."""
        deadline_s = time.monotonic() + timeout_s
        reply = self._control("stats", {}, timeout_s)
        if "leases" not in reply:
            left_s = max(deadline_s - time.monotonic(), 1e-3)
            sessions = self._control("sessions", {}, left_s).get("sessions", [])
            for name in ("leases", "lease_refused"):
                reply[name] = sum(int(session.get(name, 0)) for session in sessions)
        return stats_of(reply)

    def clear(self, timeout_s: float = CALL_TIMEOUT_S) -> int:
        """Drop every chunk that nobody holds (admin). Returns how many."""
        return int(self._control("clear", {}, timeout_s).get("dropped", 0))

    def events(
        self,
        since: int | None = None,
        timeout_s: float | None = None,
        follow: bool = True,
    ) -> Iterator[_events.Event | _events.Gap]:
        """
        Follow what happens in the pool. The place is taken at the call, not at the first next().

        Where events were lost, because the reader was slow or the daemon made a new pool, a Gap
        comes in their place. Never silently.

        Args:
            since: First sequence number wanted, 1 for all that is kept; None for from now on.
            timeout_s: End when nothing happened for so long; None to wait for ever.
            follow: False to end at the first pause.

        Raises:
            PoolGone: The pool was closed, or its daemon is gone for good.
        """
        self._check_usable()
        return _events.follow(self, since, timeout_s, forever=follow)

    def close(self) -> None:
        """
        Close the connection. Views that live stay good, all else raises PoolGone. Idempotent.
        """
        if self._attachment.handle.forked:
            return  # the parent's pool is not ours to close (I13)
        self._closed = True
        self._attachment.connected = False
        self._attachment.handle.close()
        if self._link is not None:
            self._link.close()

    def refuse(self) -> None:
        """Raise what explains why this pool cannot do what was asked; return if it can."""
        if self._attachment.handle.forked:
            raise ForkedChild(
                f"this process is a forked child: pool {self.name!r} is its parent's; call "
                "cenote.client.connect() here"
            )
        if self._closed:
            raise PoolGone(f"pool {self.name!r} was closed: connect() again")
        if not self._attachment.connected:
            then = "it is being looked for" if self.reconnecting else "connect() again"
            raise PoolGone(
                f"the daemon of pool {self.name!r} is gone; what is mapped stays readable; {then}"
            )

    def _check_usable(self) -> None:
        """Raise ForkedChild or PoolGone, unless lookups work."""
        if self._closed or self._attachment.handle.forked:
            self.refuse()

    def _control(self, op: str, fields: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        self.refuse()
        if self._link is None:
            raise PoolGone(f"pool {self.name!r} has no connection")
        return self._link.request(op, fields, timeout_s)

    # ---- called by the link --------------------------------------------------------------------

    def _lost(self) -> None:
        self._attachment.connected = False

    def _rings(self) -> bool:
        return self._attachment.handle.rings

    def _resumable(self) -> Resume | None:
        return self._attachment.welcome.as_resume if self._rings() else None

    def _resume(self, channel: Channel) -> None:
        """The next daemon took the pool over, and this session with it: all goes on as it was."""
        link = self._link
        if not isinstance(link, _connection.Link):
            raise ProtocolError("only a socket can reconnect")
        with self._lock:
            if self._closed:
                channel.close()
                return
            link.install(channel)
            self._attachment.connected = True
            self.reconnects += 1

    def _adopt(self, welcome: Welcome, mapping: SessionMapping, channel: Channel) -> None:
        """Change over to a new attachment: namespaces first, so that none is without one."""
        link = self._link
        if not isinstance(link, _connection.Link):
            raise ProtocolError("only a socket can reconnect")
        attachment = Attachment(welcome, mapping)

        def ask(op: str, fields: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
            return link.ask_on(channel, op, fields, timeout_s)

        with self._lock:
            if self._closed:
                channel.close()
                return
            bindings = _reopened(ask, attachment, list(self._caches))
            link.install(channel)
            self._attachment = attachment
            for cache, binding in bindings:
                cache._bind(binding)
            self.reconnects += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected" if self.connected else "daemon gone"
        return f"<Pool {self.name!r}, {self.role}, {state}>"


class _Ask(Protocol):
    def __call__(
        self, op: str, fields: Mapping[str, Any], timeout_s: float, /
    ) -> dict[str, Any]: ...


def _opened(
    ask: _Ask, attachment: Attachment, manifest: Manifest, name: str | None, timeout_s: float
) -> Binding:
    if not isinstance(manifest, Manifest):
        raise TypeError(f"the manifest is a {type(manifest).__name__}: make a Manifest(...)")
    reply = ask("namespace", {"manifest": manifest.canonical, "name": name}, timeout_s)
    slot, namespace_id = reply.get("slot"), reply.get("namespace_id")
    if not isinstance(slot, int) or not isinstance(namespace_id, bytes):
        raise ProtocolError(
            "the daemon's answer to 'namespace' lacks slot or namespace_id: update it"
        )
    return Binding(attachment, slot, namespace_id)


def _reopened(
    ask: _Ask, attachment: Attachment, caches: list[Cache]
) -> list[tuple[Cache, Binding]]:
    """Open every namespace again. One that is refused keeps its old binding, without a daemon."""
    opened: list[tuple[Cache, Binding]] = []
    for cache in caches:
        try:
            binding = _opened(ask, attachment, cache.manifest, cache.name, CALL_TIMEOUT_S)
        except (PoolGone, Timeout, ProtocolError):
            raise  # the connection itself: try the next one
        except CenoteError as error:
            _connection.log.warning("namespace %r was not opened again: %s", cache, error)
            continue
        opened.append((cache, binding))
    return opened


def stats_of(reply: Mapping[str, Any]) -> PoolStats:
    """Return the PoolStats in a daemon's answer to "stats"."""
    raw = {**reply.get("counters", {})}
    names = {field.name for field in dataclasses.fields(PoolStats)} - {"raw"}
    values = {name: int(raw.get(_COUNTER_OF.get(name, name), 0)) for name in names}
    values["bytes_total"] = int(reply.get("capacity_bytes", 0))
    for name in ("leases", "lease_refused"):
        values[name] = int(reply.get(name, values[name]))
    return PoolStats(**values, raw=raw)


def connect(
    socket: str | os.PathLike[str] | None = None,
    *,
    role: str | None = None,
    label: str | None = None,
    timeout_s: float = CONNECT_TIMEOUT_S,
    reconnect: bool | _connection.Backoff = True,
) -> Pool:
    """
    Attach to a pool of the daemon on this host.

    Args:
        socket: Path of the pool's socket, else $CENOTE_SOCKET: one that is named is the only one
            that is tried. Without: the user's own default socket, else /run/cenote/default.sock.
        role: "reader", "writer" or "admin"; by default the best the daemon allows, at most writer.
            A reader's process maps no memory of the pool writable.
        label: What `cenote top` shows for this process; by default the program's name.
        timeout_s: Upper bound of the call, and of each attempt to reconnect.
        reconnect: Look for the next daemon when this one goes; a Backoff says how often.

    Raises:
        PoolGone: Nobody listens; the message names what was looked at.
        Timeout: Somebody listens, and does not answer.
        AccessDenied: This user may not attach, or not in this role.
        VersionMismatch: The daemon is another release.
        InvalidArgument: There is no such role.
    """
    if role is not None and role not in ROLES:
        raise InvalidArgument(f"there is no role {role!r}: give one of {', '.join(ROLES)}, or None")
    path = _connection.candidate_or_raise(socket)
    target = _connection.Target(path, role, _label() if label is None else label, timeout_s)
    channel, welcome, mapping = _connection.dial(target)
    assert mapping is not None  # nothing to resume was named
    pool = Pool(welcome, mapping)
    backoff = _connection.Backoff() if reconnect is True else reconnect or None
    link = _connection.Link(target, channel, pool, backoff)
    pool._start(link, reconnecting=backoff is not None)
    return pool


def _label() -> str:
    import sys

    program = sys.argv[0] if sys.argv else ""
    return Path(program).name or "python"
