# SPDX-License-Identifier: Apache-2.0
"""
What the daemon answers: one method an operation of the control protocol, without any socket.

An answer is a body and descriptors; a no is a Refusal. The transport is in server.py.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from cenote.shm.errors import CenoteError, LimitReached, ManifestMismatch, PoolGone
from cenote.shm.host import SERVER, PoolHost
from cenote.shm.identity import Peer, groups_of, pid_of_pidfd, start_ns
from cenote.shm.manifest import namespace_id
from cenote.shm.manifest import parse as parse_manifest
from cenote.shm.messages import ROLES, Hello, parse_hello, parse_lost, parse_namespace
from cenote.shm.offer import SessionOffer
from cenote.shm.session import Welcome, descriptor_names, new_hello
from cenote.shm.wire import PROTOCOL_VERSION, Refusal, close_all, success

from .access import AccessTable
from .config import PoolConfig, options
from .custody_base import CustodyError
from .logs import get_log

SESSIONS_BUSY: Final = 512  # from here on a uid's share of the sessions is looked at
SESSIONS_PER_UID_MAX: Final = 896  # of 1,024: no other user takes them all
NAMESPACES_PER_UID_MAX: Final = 1024  # of 4,096: they are never given back

log = get_log(__name__)


@dataclass
class Caller:
    """One connection as the service sees it; role is "" until its hello."""

    peer: Peer
    role: str = ""
    session: int = 0
    nonce: int = 0


@dataclass
class Answer:
    """What to send; `sent` must be called once the descriptors are sent or never will be."""

    body: dict[str, Any]
    descriptors: tuple[int, ...] = ()
    sent: Callable[[], None] = field(default=lambda: None)
    last: bool = False  # close the connection behind it


class PoolService:
    """
    The operations of one pool.

    Args:
        host: The pool.
        config: Its configuration; reconfigure() replaces it.
        access: Who may do what; reconfigure() replaces it.
        destroyed: Called when an administrator destroyed the pool.
    """

    def __init__(
        self,
        host: PoolHost,
        config: PoolConfig,
        access: AccessTable,
        destroyed: Callable[[], None],
    ) -> None:
        self.host = host
        self.config = config
        self.access = access
        self._destroyed = destroyed
        self._started_s = time.monotonic()
        self._ours = new_hello(SERVER)
        self._namespaces_of: dict[int, set[bytes]] = {}  # ids by uid
        self._quota_of: dict[int, Peer] = {}  # who opened the namespace in a slot first
        self._holders: dict[int, Caller] = {}  # of each session, by index; it outlives its socket
        self._hogs: set[tuple[int, int]] = set()  # sessions over their limit, last seen
        self._answers: Mapping[str, Callable[[Caller, Mapping[str, Any]], dict[str, Any]]] = {
            "namespace": self._namespace,
            "stats": self._stats,
            "sessions": self._sessions,
            "config": self._config,
            "audit": self._audit,
            "clear": self._clear,
            "destroy": self._destroy,
            "lost": self._lost,
            "ping": lambda _caller, _body: {},
            "bye": lambda _caller, _body: {},
        }

    def answer(
        self,
        caller: Caller,
        op: str,
        request_id: int,
        body: Mapping[str, Any],
        descriptors: tuple[int, ...],
    ) -> Answer:
        """
        Return the answer to a request. Owns *descriptors*.

        Raises:
            Refusal: The answer is no.
        """
        try:
            if op == "hello":
                return self._hello(caller, request_id, body, descriptors)
            if not caller.role:
                raise Refusal("bad_request", f"the first request must be a hello, and is {op!r}")
            if descriptors:
                raise Refusal("bad_request", f"a {op} carries no descriptors")
            return Answer(success(request_id, **self._do(caller, op, body)), last=op == "bye")
        finally:
            close_all(descriptors)

    def _do(self, caller: Caller, op: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._answers[op](caller, body)
        except PoolGone as error:
            raise Refusal("retired", str(error)) from error
        except LimitReached as error:
            raise Refusal("limit", str(error)) from error

    # ---- hello ----------------------------------------------------------------------------------

    def _hello(
        self,
        caller: Caller,
        request_id: int,
        body: Mapping[str, Any],
        descriptors: tuple[int, ...],
    ) -> Answer:
        if caller.role:
            raise Refusal("bad_request", "this connection had its hello: open another one")
        hello = parse_hello(body)
        role = self.access.role_of(caller.peer, hello.role)
        self._check_version(hello)
        pidfd = _checked_pidfd(caller.peer, descriptors)
        resumed = self._resumed(caller.peer, role, hello)
        if resumed is not None:
            self._attached(caller, resumed)
            return Answer(welcome_fields(request_id, resumed, []))
        offer = self._open_session(caller.peer, role, hello.label, pidfd)
        welcome = offer.welcome
        self._attached(caller, welcome)
        names = descriptor_names(len(welcome.regions), role)
        fields = welcome_fields(request_id, welcome, names)
        return Answer(fields, tuple(offer.fds[name] for name in names), offer.close)

    def _attached(self, caller: Caller, welcome: Welcome) -> None:
        caller.role, caller.session, caller.nonce = welcome.role, welcome.session, welcome.nonce
        self._holders[welcome.session] = replace(caller)
        event = "session_resumed" if welcome.resumed else "session_opened"
        log.debug(event, pool=self.host.name, session=welcome.session, role=welcome.role)

    def _resumed(self, peer: Peer, role: str, hello: Hello) -> Welcome | None:
        """Return the session that this client has still, if it may have it still."""
        wanted = hello.resume
        if wanted is None or wanted.pool_id != self.host.pool_id:
            return None
        welcome = self.host.resume(wanted.session, wanted.nonce, peer)
        if welcome is None:
            return None
        left = self.access.remaining(peer, welcome.role)
        if left != welcome.role:
            self.host.demote(wanted.session, wanted.nonce, left)
            return None  # it attaches anew
        return welcome if welcome.role == wanted.role and ROLES[role] >= ROLES[left] else None

    def adopt_sessions(self) -> None:
        """Whoever was attached before this daemon may do what its user may do now, no more."""
        for found in self.host.sessions():
            role = next(name for name, number in ROLES.items() if number == found["role"])
            peer = peer_of(found)
            self._holders[found["session"]] = Caller(
                peer, role, int(found["session"]), int(found["nonce"])
            )
        self._demote()

    def _check_version(self, hello: Hello) -> None:
        low, high = hello.protocol
        if not low <= PROTOCOL_VERSION <= high:
            older = "client" if high < PROTOCOL_VERSION else "daemon"
            raise Refusal(
                "version",
                f"{hello.client} speaks control protocol {low} to {high}, and {SERVER} speaks "
                f"{PROTOCOL_VERSION}: update the {older}",
                {"protocol": [PROTOCOL_VERSION, PROTOCOL_VERSION]},
            )
        ours = self._ours
        if (hello.layout, hello.fingerprint) == (ours.layout, ours.fingerprint):
            return
        raise Refusal(
            "version",
            f"{hello.client} was built for memory layout {hello.layout} (fingerprint "
            f"{hello.fingerprint:#x}), and {SERVER} for {ours.layout} ({ours.fingerprint:#x}): "
            "install the same release of cenote for daemon and clients",
            {"layout": ours.layout, "fingerprint": ours.fingerprint},
        )

    def _open_session(self, peer: Peer, role: str, label: str, pidfd: int) -> SessionOffer:
        name = self.host.name
        try:
            self._check_share(peer)
            started_ns = start_ns(peer.pid) if peer.pid > 0 else 0
            return self.host.open_session(
                role, peer=peer, label=label, pidfd=pidfd, start_ns=started_ns
            )
        except PoolGone as error:
            raise Refusal("retired", str(error)) from error
        except CustodyError as error:  # the log has the remedy, which is none of the client's
            log.warning("session_refused", pool=name, error=str(error))
            raise Refusal(
                "limit",
                f"pool {name!r} can open no session now: what keeps sessions over a restart of the "
                "daemon takes no more; see its log",
            ) from error
        except (CenoteError, MemoryError) as error:  # a limit, no room
            raise Refusal("limit", f"pool {name!r}: {error}") from error
        except OSError as error:
            log.warning("session_refused", pool=name, exc=error)
            raise Refusal(
                "limit", f"pool {name!r} can open no session now: {error.strerror}; try again later"
            ) from error

    def _check_share(self, peer: Peer) -> None:
        """One user must not take all sessions; they outlive their connections."""
        if peer.uid == os.geteuid() or self.host.session_count < SESSIONS_BUSY:
            return
        own = sum(1 for info in self.host.sessions() if info["uid"] == peer.uid)
        if own >= SESSIONS_PER_UID_MAX:
            raise Refusal(
                "limit",
                f"uid {peer.uid} has {own} sessions on pool {self.host.name!r}, and "
                f"{SESSIONS_PER_UID_MAX} are allowed: end processes that you no longer need",
            )

    # ---- the other operations -------------------------------------------------------------------

    def _namespace(self, caller: Caller, body: Mapping[str, Any]) -> dict[str, Any]:
        packed, name = parse_namespace(body)
        try:
            parse_manifest(packed)
        except ValueError as error:
            raise Refusal("bad_request", f"the field 'manifest': {error}") from error
        uid = caller.peer.uid
        tenant = self.access.tenant_of(caller.peer)
        own = self._namespaces_of.setdefault(uid, set())
        if len(own) >= NAMESPACES_PER_UID_MAX and namespace_id(packed, tenant.salt) not in own:
            raise Refusal(
                "limit",
                f"uid {uid} opened {len(own)} namespaces of pool {self.host.name!r}, as many as "
                "one user may until the daemon restarts: use one of those, or fewer manifests",
            )
        writes = caller.role != "reader"
        try:
            slot, ident = self.host.open_namespace(
                packed,
                name,
                salt=tenant.salt,
                quota_bytes=tenant.quota_bytes,
                session=caller.session if writes else None,
                nonce=caller.nonce,
            )
        except ManifestMismatch as error:
            fields = {key: list(pair) for key, pair in error.fields.items()}
            raise Refusal("manifest_mismatch", str(error), fields) from error
        own.add(ident)
        if slot not in self._quota_of:  # it may be older than this daemon's configuration
            self._quota_of[slot] = caller.peer
            self.host.set_quota(slot, tenant.quota_bytes)
        return {"slot": slot, "namespace_id": ident}

    def _stats(self, _caller: Caller, _body: Mapping[str, Any]) -> dict[str, Any]:
        spec = self.host.spec
        return {
            "counters": self.host.counters(),
            "pool": self.host.name,
            "pool_id": self.host.pool_id,
            "capacity_bytes": self.host.capacity_bytes,
            "catalog_bytes": self.host.catalog_bytes,
            "policy": spec.policy,
            "high_water": spec.high_water,
            "low_water": spec.low_water,
            "checksum": spec.checksum,
            "uptime_s": time.monotonic() - self._started_s,
            "server": SERVER,
            "pid": os.getpid(),
        }

    def _sessions(self, _caller: Caller, _body: Mapping[str, Any]) -> dict[str, Any]:
        sessions = self.host.sessions()
        self._look_for_hogs(sessions)
        return {"sessions": sessions}

    def _look_for_hogs(self, sessions: list[dict[str, Any]]) -> None:
        """Log each session that leases more than it may once, when it is seen first."""
        hogs = {(s["session"], s["nonce"]): s for s in sessions if s["over_limit"]}
        for key in hogs.keys() - self._hogs:
            hog = hogs[key]
            log.warning(
                "reader_over_limit",
                pool=self.host.name,
                pid=hog["pid"],
                uid=hog["uid"],
                leased_bytes=hog["leased_bytes"],
                limit_bytes=hog["lease_limit_bytes"],
                remedy="its client does not keep the limit: end the process to free what it holds",
            )
        self._hogs = set(hogs)

    def _config(self, caller: Caller, _body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings in force, as one would write them; who may attach for admins only."""
        pool = self.config
        settings = _section(pool)
        settings["regions"] = [_section(region) for region in pool.regions]
        if ROLES[caller.role] == ROLES["admin"]:
            settings["access"] = _section(pool.access)
            settings["tenants"] = [_section(tenant) for tenant in pool.tenants]
        return {"config": settings}

    def _audit(self, caller: Caller, _body: Mapping[str, Any]) -> dict[str, Any]:
        """Let the keeper compare its tables; it does nothing else meanwhile, hits go on."""
        self._require_admin(caller, "audit")
        wrong = self.host.audit()
        if wrong:
            log.error("audit_failed", pool=self.host.name, wrong=wrong)
        return {"wrong": wrong}

    def _clear(self, caller: Caller, _body: Mapping[str, Any]) -> dict[str, Any]:
        self._require_admin(caller, "clear")
        dropped = self.host.clear()
        log.info("pool_cleared", pool=self.host.name, chunks=dropped, uid=caller.peer.uid)
        return {"dropped": dropped}

    def _lost(self, caller: Caller, body: Mapping[str, Any]) -> dict[str, Any]:
        """Drop chunks whose bytes an admin found to be wrong; one that has left is no error."""
        self._require_admin(caller, "drop chunks of")
        dropped = self.host.lose(parse_lost(body))
        if dropped:
            log.warning("chunks_lost", pool=self.host.name, chunks=dropped, uid=caller.peer.uid)
        return {"dropped": dropped}

    def _destroy(self, caller: Caller, _body: Mapping[str, Any]) -> dict[str, Any]:
        self._require_admin(caller, "destroy")
        self.host.retire()
        log.info("pool_destroyed", pool=self.host.name, uid=caller.peer.uid, pid=caller.peer.pid)
        self._destroyed()
        return {}

    def _require_admin(self, caller: Caller, op: str) -> None:
        if caller.role != "admin":
            raise Refusal(
                "access",
                f"only an admin may {op} pool {self.host.name!r}, and this session is a "
                f"{caller.role}'s: connect with role admin; [pool.access] admins lists who may",
            )

    def closed(self, caller: Caller) -> None:
        """The connection of *caller* ended: a reason to look whether its session did (I6)."""
        if caller.role:
            self.host.hint(caller.session, caller.nonce)

    def forget_dead(self) -> None:
        """Take sessions that have ended out of custody."""
        with contextlib.suppress(PoolGone):
            self.host.forget_dead()

    # ---- reload ---------------------------------------------------------------------------------

    def reconfigure(self, config: PoolConfig, access: AccessTable) -> None:
        """Take over a new configuration: its roles and its quotas hold for what is there, too."""
        self.config, self.access = config, access
        self._demote()
        for slot, peer in self._quota_of.items():
            self.host.set_quota(slot, access.tenant_of(peer).quota_bytes)

    def _demote(self) -> None:
        """
        Take from each session what its user may no longer do.

        Closing its connection is not enough: a session stores and deletes through its ring.
        """
        pids = []
        for holder in self._holders.values():
            role = self.access.remaining(holder.peer, holder.role)
            if role == holder.role:
                continue
            if self.host.demote(holder.session, holder.nonce, role):
                pids.append(holder.peer.pid)
            holder.role = role  # for good: who gets the right back attaches anew
        if pids:
            log.info("sessions_demoted", pool=self.host.name, sessions=len(pids), pids=pids)


def welcome_fields(request_id: int, welcome: Welcome, names: list[str]) -> dict[str, Any]:
    """Return the answer to a hello; *names* are those of its descriptors, in their order."""
    return success(
        request_id,
        pool=welcome.pool,
        pool_id=welcome.pool_id,
        boot_token=welcome.boot_token,
        role=welcome.role,
        session=welcome.session,
        nonce=welcome.nonce,
        catalog_bytes=welcome.catalog_bytes,
        regions=[vars(region) for region in welcome.regions],
        fds=names,
        checksum=welcome.checksum,
        lease_limit_bytes=welcome.lease_limit_bytes,
        capacity_bytes=welcome.capacity_bytes,
        server=welcome.server_version,
        pid=welcome.server_pid,
        **({"resumed": True} if welcome.resumed else {}),
    )


def peer_of(session: Mapping[str, Any]) -> Peer:
    """
    Return who has a session that is older than this daemon.

    Its further groups are those of the process, where it is still the one that attached; else it
    has none, and a session that had its role by one of them becomes a reader's until it says hello.
    """
    pid, gid = int(session["pid"]), int(session["gid"])
    same = pid > 0 and start_ns(pid) == session["start_ns"] != 0
    groups = groups_of(pid) if same else frozenset()
    return Peer(pid, int(session["uid"]), gid, groups | {gid})


def _checked_pidfd(peer: Peer, descriptors: tuple[int, ...]) -> int:
    """Return the pidfd of a hello, or -1; refuse one of another process, which would outlive it."""
    if not descriptors:
        return -1
    if len(descriptors) > 1:
        raise Refusal("bad_request", "a hello carries at most one descriptor, a pidfd")
    pid = pid_of_pidfd(descriptors[0])
    if pid is None:
        raise Refusal("bad_request", "the descriptor with the hello is no pidfd")
    if pid < 0 or (pid > 0 and peer.pid > 0 and pid != peer.pid):
        raise Refusal("bad_request", f"the pidfd is of process {pid}, and {peer.pid} connected")
    return descriptors[0]


def _section(section: Any) -> dict[str, Any]:
    """Return the options of a section of the configuration with values that msgpack knows."""
    found = {key: getattr(section, option.name) for key, option in options(type(section)).items()}
    return {key: _plain(value) for key, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return value
