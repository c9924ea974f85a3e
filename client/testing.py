# SPDX-License-Identifier: Apache-2.0
"""
A real pool inside this process, for tests that want no daemon.

The keeper, the catalog and the memory are the daemon's own; only the socket is missing.

    @pytest.fixture
    def pool():
        with cenote.client.testing.memory_pool(size="64MiB") as pool:
            yield pool
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

from cenote.shm import media
from cenote.shm.host import PoolHost
from cenote.shm.pool_spec import PoolSpec, RegionSpec
from cenote.shm.units import parse_size

from .errors import AccessDenied, InvalidArgument, PoolGone
from .pool import ROLES, Attachment, Pool

DEFAULT_SIZE: Final = "64MiB"


class MemoryHost:
    """
    A pool in this process that several sessions attach to: `host.connect()`.

    Leaving `with host:` stops it. Views that live stay good.

    Args:
        size: Bytes of the pool ("64MiB", or a number), on a memfd that is not touched beforehand.
        name: The pool's name.
        chunk_count: Most chunks it can hold at once; 0: one for 16 KiB, at least 4,096.
        lease_slots: Leases a session may hold, rounded up to 512.
        event_count: Events the feed keeps.
        policy: Eviction policy.
        checksum: "off", "lazy" or "commit".
        high_water: Share of the memory at which eviction begins.
        low_water: Share of that at which it ends.
        reader_lease_share: Share of the memory that one reader may hold leased.

    Raises:
        InvalidArgument: A number is out of range.
        NoRoom: This machine has not so much memory.
    """

    def __init__(
        self,
        size: str | int = DEFAULT_SIZE,
        *,
        name: str = "testing",
        chunk_count: int = 0,
        lease_slots: int = 8192,
        event_count: int = 4096,
        policy: str = "use-count",
        checksum: str = "lazy",
        high_water: float = 0.95,
        low_water: float = 0.98,
        reader_lease_share: float = 0.25,
    ) -> None:
        bytes_ = size if isinstance(size, int) else parse_size(size)
        region = RegionSpec(media.parse_medium("memfd"), bytes_, populate=False)
        spec = PoolSpec(
            name=name,
            regions=(region,),
            chunk_count=chunk_count or max(4096, bytes_ // 16384),
            lease_slots=lease_slots,
            event_count=event_count,
            policy=policy,
            high_water=high_water,
            low_water=low_water,
            checksum=checksum,
            reader_lease_share=reader_lease_share,
        )
        self._lock = threading.Lock()
        self._host: PoolHost | None = PoolHost.create(spec)
        self._pools: list[Pool] = []

    def connect(self, role: str = "writer", label: str = "test") -> Pool:
        """
        Attach another session, as another process would have it.

        Raises:
            InvalidArgument: There is no such role.
            PoolGone: The host was stopped.
        """
        if role not in ROLES:
            raise InvalidArgument(f"there is no role {role!r}: give one of {', '.join(ROLES)}")
        host = self._running()
        welcome, mapping = host.attach(role, label)
        pool = Pool(welcome, mapping)
        pool._start(_InProcess(self, pool._attachment), reconnecting=False)
        with self._lock:
            self._pools.append(pool)
        return pool

    @property
    def running(self) -> bool:
        """Was it not stopped yet?"""
        return self._host is not None

    def audit(self) -> int:
        """Walk every table of the pool and count contradictions; 0 is right."""
        return self._running().audit()

    def stop(self) -> None:
        """End the pool as if its daemon had been killed: views stay good, the rest is PoolGone."""
        with self._lock:
            host, self._host = self._host, None
            pools, self._pools = self._pools, []
        for pool in pools:
            pool._lost()
        if host is not None:
            host.close()

    def _running(self) -> PoolHost:
        host = self._host
        if host is None:
            raise PoolGone("the pool of this test was stopped: make another MemoryHost")
        return host

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class _InProcess:
    """The control operations of a session, without a socket."""

    def __init__(self, owner: MemoryHost, attachment: Attachment, *, stops: bool = False) -> None:
        self._owner = owner
        self._session = attachment.welcome.session
        self._nonce = attachment.welcome.nonce
        self._role = attachment.role
        self.stops = stops

    def request(
        self, op: str, fields: Mapping[str, Any] | None = None, timeout_s: float = 2.0
    ) -> dict[str, Any]:
        """Do what the daemon's server would do; never waits for long."""
        del timeout_s
        host = self._owner._running()
        given = dict(fields or {})
        if op == "namespace":
            slot, namespace_id = host.open_namespace(
                given["manifest"], given.get("name") or "", session=self._session, nonce=self._nonce
            )
            return {"slot": slot, "namespace_id": namespace_id}
        if op == "stats":
            return _stats(host)
        if op == "clear":
            self._admin_only(op)
            return {"dropped": host.clear()}
        raise InvalidArgument(f"a pool in memory does not know the request {op!r}")

    def _admin_only(self, op: str) -> None:
        if self._role != "admin":
            raise AccessDenied(f"{op}: this session's role is {self._role}, and admin is needed")

    def close(self) -> None:
        """The session ends when its last lease has gone; the keeper is told to look (I6)."""
        host = self._owner._host
        if host is not None:
            host.hint(self._session, self._nonce)
        if self.stops:
            self._owner.stop()


def _stats(host: PoolHost) -> dict[str, Any]:
    counters, sessions = host.counters(), host.sessions()
    return {
        "counters": counters,
        "capacity_bytes": host.capacity_bytes,
        "leases": sum(session["leases"] for session in sessions),
        "lease_refused": sum(session["lease_refused"] for session in sessions),
    }


def memory_pool(size: str | int = DEFAULT_SIZE, *, role: str = "writer", **options: Any) -> Pool:
    """
    Return a pool of its own in this process; it ends with pool.close().

    Args:
        size: Bytes of the pool.
        role: "reader", "writer" or "admin".
        **options: As for MemoryHost.
    """
    host = MemoryHost(size, **options)
    try:
        pool = host.connect(role)
    except BaseException:
        host.stop()
        raise
    link = pool._link
    if isinstance(link, _InProcess):
        link.stops = True
    return pool
