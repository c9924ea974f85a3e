# SPDX-License-Identifier: Apache-2.0
"""
The daemon's side of a pool: its objects, its keeper, its sessions.

Used by cenoted for each pool, and by cenote.client.testing for a pool inside a test. Nothing here
knows sockets or configuration files.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from cenote._native import _core

from . import media
from .custody import Custody, KeptSession, Nowhere, session_names
from .errors import CenoteError, PoolGone, check, error_of
from .identity import Peer
from .keeper import SESSIONS_MAX, adopt_keeper, keeper_config, new_keeper, registry_of
from .manifest import BoundNamespace, bound_elsewhere, namespace_id, tenant_tag
from .messages import NO_LIMIT, ROLES
from .objects import PoolObjects, Progress
from .offer import SessionOffer
from .pool_spec import PoolSpec
from .session import Mapping as SessionMapping
from .session import Region, Welcome, attach, descriptor_names
from .takeover import CannotKeep, Left

if TYPE_CHECKING:
    from _cffi_backend import CData

VERSION: Final = "0.2.0"
SERVER: Final = f"cenote/{VERSION}"
NOBODY: Final = 2**32 - 1
ROLE_NAMES: Final = {number: name for name, number in ROLES.items()}


class PoolHost:
    """
    A pool in this process: create() or adopt() it, serve sessions from it, close() it.

    Any thread may call any method; commands to the keeper run one after the other on its thread.
    After close() everything raises PoolGone.
    """

    def __init__(self, objects: PoolObjects, custody: Custody) -> None:
        self.spec = objects.spec
        self.pool_id = objects.pool_id
        self.capacity_bytes = objects.capacity_bytes
        self.catalog_bytes = objects.catalog_bytes
        self.regions: tuple[Region, ...] = objects.facts
        self._objects = objects
        self._custody = custody
        self._kept: set[tuple[int, int]] = set()  # sessions in custody
        self._keeping = threading.Lock()  # custody is one thread's at a time
        self._idle = threading.Condition()
        self._commands = 0
        self._internal: set[tuple[int, int]] = set()  # our own sessions: nobody else counts them
        self._keeper: CData | None = None
        self._super: CData | None = None

    @classmethod
    def create(
        cls,
        spec: PoolSpec,
        *,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
        custody: Custody | None = None,
    ) -> PoolHost:
        """
        Make new objects under a new pool id, give them their memory, and start the keeper.

        progress gets the bytes touched so far, of spec.wants() in all. Nothing is left behind when
        this raises.

        Raises:
            NoRoom: There is not enough memory.
            MediumError: A medium cannot be used here.
            CenoteError, OSError: The C core or the kernel refused.
        """
        objects = PoolObjects.make(spec, progress or (lambda _bytes: None), stop)
        host = cls(objects, custody or Nowhere())
        try:
            host._keep_objects()
            host._start(new_keeper(objects))
        except BaseException:
            host._end_keeper()
            objects.close(unlink=True)
            raise
        return host

    @classmethod
    def adopt(cls, spec: PoolSpec, left: Left, custody: Custody) -> tuple[PoolHost, dict[str, int]]:
        """
        Take over the pool that a dead daemon left, with every session of it (I7).

        Args:
            spec: Of the same sizes.
            left: What shm.takeover.find() found; its descriptors stay the caller's.
            custody: Where they are.

        Returns:
            The host, and what the takeover found: struct cn_recovery.

        Raises:
            CannotKeep: Something is missing or wrong. Nothing was changed.
        """
        try:
            objects = PoolObjects.open(spec, left.pool_id, left.parts)
        except (CenoteError, OSError) as error:
            raise CannotKeep(f"pool {spec.name!r} cannot be taken over: {error}") from error
        host = cls(objects, custody)
        try:
            adopted = adopt_keeper(objects, left.sessions)
            host._kept |= set(adopted.sessions)
            host._start(adopted.keeper)
        except BaseException:
            host._end_keeper()
            objects.close(unlink=False)
            raise
        return host, adopted.found

    def _keep_objects(self) -> None:
        nameless = self._objects.to_keep()
        if nameless:
            self._custody.keep(nameless)

    def _start(self, keeper: CData) -> None:
        self._keeper = keeper  # before it runs: whoever interrupts us stops it by close()
        self._super = _core.ffi.cast("struct cn_super *", self._objects.catalog)
        check(_core.lib.cn_keeper_start(keeper), f"start the keeper of {self.spec.name!r}")

    # ---- facts ----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.spec.name

    @property
    def boot_token(self) -> int:
        """The number that tells clients one keeper from its successor."""
        return int(self._catalog.boot_token)

    @property
    def _catalog(self) -> CData:
        if self._super is None:
            raise PoolGone(f"pool {self.spec.name!r} is closed")
        return self._super

    @contextlib.contextmanager
    def _command(self) -> Iterator[CData]:
        """Yield the keeper, which is not destroyed meanwhile. It takes commands from any thread."""
        with self._idle:
            if self._keeper is None:
                raise PoolGone(f"pool {self.spec.name!r} is closed")
            self._commands += 1
            keeper = self._keeper
        try:
            yield keeper
        finally:
            with self._idle:
                self._commands -= 1
                self._idle.notify_all()

    @property
    def session_count(self) -> int:
        """How many sessions are open, as the keeper noted last."""
        return int(self._catalog.counters.sessions)

    def counters(self) -> dict[str, int]:
        """Return struct cn_counters, with the sessions' own counts folded in."""
        with self._command() as keeper:
            check(_core.lib.cn_keeper_fold(keeper), f"read the counters of pool {self.name!r}")
            counters = self._catalog.counters
            fields = _core.ffi.typeof(counters).fields
            found = {n: int(getattr(counters, n)) for n, _ in fields if n != "reserved"}
        for name in ("sessions", "sessions_opened"):
            found[name] = max(found[name] - len(self._internal), 0)
        return found

    def sessions(self) -> list[dict[str, Any]]:
        """Return struct cn_session_info of each session, and what the registry has beyond it."""
        infos = _core.ffi.new("struct cn_session_info[]", SESSIONS_MAX)
        count = _core.ffi.new("uint32_t *")
        with self._command() as keeper:
            status = _core.lib.cn_keeper_session_info(keeper, infos, SESSIONS_MAX, count)
            check(status, f"list the sessions of pool {self.name!r}")
            names = [n for n, _ in _core.ffi.typeof("struct cn_session_info").fields]
            return [
                {**{n: int(getattr(infos[i], n)) for n in names}, **self._registered(infos[i])}
                for i in range(count[0])
                if (infos[i].session, infos[i].nonce) not in self._internal
            ]

    def _registered(self, info: CData) -> dict[str, Any]:
        """Return what the registry has about a session beyond cn_session_info."""
        entry = registry_of(self._catalog)[info.session]
        if entry.nonce != info.nonce:
            nothing = {"attached_ns": 0, "start_ns": 0, "lease_limit_bytes": 0, "over_limit": False}
            return {"label": "", **nothing}
        return {
            "label": _core.ffi.string(entry.label).decode("utf-8", "replace"),
            "attached_ns": int(entry.attached_ns),
            "start_ns": int(entry.start_ns),
            "lease_limit_bytes": int(entry.lease_limit_bytes),
            # Our client library keeps the limit: this client is another one.
            "over_limit": bool(info.leased_bytes > entry.lease_limit_bytes),
        }

    # ---- sessions -------------------------------------------------------------------------------

    def open_session(
        self,
        role: str,
        *,
        peer: Peer | None = None,
        label: str = "",
        pidfd: int = -1,
        start_ns: int = 0,
        internal: bool = False,
    ) -> SessionOffer:
        """
        Open a session and return what its client needs. *pidfd* stays the caller's.

        Raises:
            LimitReached: 1,024 sessions are open.
            PoolGone: The pool is closed or retired.
            NoRoom, OSError: No memory or no descriptors.
        """
        peer = peer or Peer(os.getpid(), os.geteuid(), os.getegid(), frozenset())
        offer = SessionOffer(self._welcome(role))
        with contextlib.ExitStack() as undo:
            undo.callback(offer.close)
            args = self._session_args(undo, offer, role, pidfd)
            text = _core.ffi.new("char[]", label.encode())
            args.label, args.internal, args.start_ns = text, internal, start_ns
            args.pid, args.uid, args.gid = max(peer.pid, 0), peer.uid, peer.gid
            self._open_regions(offer)
            held = KeptSession(0, 0, int(args.liveness_fd), int(args.doorbell_fd), int(args.pidfd))
            with self._command() as keeper:
                status = _core.lib.cn_keeper_session_open(keeper, args)
                check(status, f"open a session on pool {self.name!r}")
            held.session, held.nonce = int(args.ret_session), int(args.ret_nonce)
            undo.pop_all()  # the keeper owns segment and descriptors now, the caller the offer
        try:
            if internal:  # it ends with us: a successor need not have it
                self._internal.add((held.session, held.nonce))
            else:
                self._keep(held)
        except BaseException:
            offer.close()  # it was sent to nobody: its lock is free
            self.hint(held.session, held.nonce)
            raise
        offer.welcome = self._welcome(role, held.session, held.nonce)
        return offer

    def _keep(self, held: KeptSession) -> None:
        """Into custody before anybody has its descriptor (I7)."""
        self.forget_dead()
        with self._keeping:
            self._kept.add((held.session, held.nonce))  # kept in part, it is forgotten as well
            self._custody.keep(held.names(self.pool_id))
        with self._command() as keeper:
            status = _core.lib.cn_keeper_session_confirm(keeper, held.session, held.nonce)
            check(status, f"open a session on pool {self.name!r}")

    def forget_dead(self) -> bool:
        """Take sessions that have ended out of custody; return whether any is left there."""
        registry = registry_of(self._catalog)
        with self._keeping:
            gone = {
                (session, nonce)
                for session, nonce in self._kept
                if registry[session].nonce != nonce
                or registry[session].word & 0xFF == _core.lib.CN_SESSION_FREE
            }
            if gone:
                self._custody.drop(self._names_of(gone))
                self._kept -= gone
            return bool(self._kept)

    def names_kept(self) -> set[str]:
        """Return the names in custody that are of use to this pool."""
        return {*self._names_of(self._kept), *self._objects.to_keep()}

    def _names_of(self, sessions: Iterable[tuple[int, int]]) -> list[str]:
        return [name for each in sorted(sessions) for name in session_names(self.pool_id, *each)]

    def resume(self, session: int, nonce: int, peer: Peer) -> Welcome | None:
        """
        Return the welcome of a session that outlived its connection; None when there is none.

        What it may do and what it holds is unchanged. Only a process of the same user gets it.
        """
        if not 0 <= session < SESSIONS_MAX:
            return None
        entry = registry_of(self._catalog)[session]
        if entry.nonce != nonce or entry.word & 0xFF != _core.lib.CN_SESSION_OPEN:
            return None
        if int(entry.uid) != peer.uid:
            return None
        role = ROLE_NAMES[int(entry.word) >> 8 & 0xFF]
        with self._command() as keeper:  # it is not suspected any more
            _core.lib.cn_keeper_session_confirm(keeper, session, nonce)
        return replace(self._welcome(role, session, nonce), resumed=True)

    def _session_args(
        self, undo: contextlib.ExitStack, offer: SessionOffer, role: str, pidfd: int
    ) -> CData:
        bytes_ = int(_core.lib.cn_session_segment_bytes(self._catalog.lease_slots))
        segment_fd = media.create_session_memfd(bytes_)
        undo.callback(os.close, segment_fd)
        address = media.map_fd(segment_fd, bytes_, writable=True)
        undo.callback(media.unmap, address, bytes_)
        doorbell_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        undo.callback(os.close, doorbell_fd)
        offer.fds["catalog"] = self._objects.made[0].reopen(writable=False)
        offer.fds["session"] = media.liveness_fd(segment_fd)
        offer.fds["doorbell"] = os.dup(doorbell_fd)
        args = _core.ffi.new("struct cn_session_open *")
        args.segment = _core.ffi.cast("void *", address)
        args.segment_bytes = bytes_
        args.liveness_fd = segment_fd
        args.doorbell_fd = doorbell_fd
        args.pidfd = -1
        if pidfd >= 0:
            args.pidfd = os.dup(pidfd)
            undo.callback(os.close, args.pidfd)
        args.role = ROLES[role]
        args.opening = 1
        args.lease_limit_bytes = offer.welcome.lease_limit_bytes
        return args

    def _open_regions(self, offer: SessionOffer) -> None:
        """Open each region anew for each role: a dup would keep write access."""
        for name in descriptor_names(len(self.regions), offer.welcome.role)[3:]:
            part, _, access = name.partition(".")
            made = self._objects.made[1 + int(part[1:])]
            offer.fds[name] = made.reopen(writable=access == "rw")

    def _welcome(self, role: str, session: int = 0, nonce: int = 0) -> Welcome:
        limit = int(self.capacity_bytes * self.spec.reader_lease_share)
        return Welcome(
            pool=self.name,
            pool_id=self.pool_id,
            boot_token=self.boot_token,
            role=role,
            session=session,
            nonce=nonce,
            catalog_bytes=self.catalog_bytes,
            regions=self.regions,
            checksum=self.spec.checksum,
            lease_limit_bytes=limit if role == "reader" else NO_LIMIT,
            capacity_bytes=self.capacity_bytes,
            server_pid=os.getpid(),
            server_version=SERVER,
        )

    def attach(
        self, role: str = "writer", label: str = "", *, internal: bool = False
    ) -> tuple[Welcome, SessionMapping]:
        """Open a session and attach to it in this very process, as the daemon's own tasks do."""
        offer = self.open_session(role, label=label, internal=internal)
        return offer.welcome, attach(offer.welcome, offer.fds)

    def hint(self, session: int, nonce: int) -> None:
        """Tell the keeper that a session's socket closed: a reason to look, no proof (I6)."""
        self._internal.discard((session, nonce))
        with contextlib.suppress(PoolGone), self._command() as keeper:
            _core.lib.cn_keeper_session_hint(keeper, session, nonce)

    def demote(self, session: int, nonce: int, role: str) -> bool:
        """
        Let a session have *role* at most from now on; return whether it is still there.

        Below writer its ring changes nothing any more; what it leases or was granted it keeps (I6).
        """
        with self._command() as keeper:
            status = _core.lib.cn_keeper_session_demote(keeper, session, nonce, ROLES[role])
        if status != _core.lib.CN_EMISS:
            check(status, f"make session {session} of pool {self.name!r} a {role}'s")
        return bool(status == _core.lib.CN_OK)

    # ---- namespaces -----------------------------------------------------------------------------

    def open_namespace(
        self,
        manifest: bytes,
        name: str = "",
        *,
        salt: bytes = b"",
        quota_bytes: int = 0,
        session: int | None = None,
        nonce: int = 0,
    ) -> tuple[int, bytes]:
        """
        Open or make the namespace of a canonical manifest; return its slot and its id.

        The session, if it still is the one of that nonce, may commit to it from now on.

        Raises:
            ManifestMismatch: *name* is bound to another manifest, or by another tenant (no fields).
            LimitReached: There are 4,096 namespaces.
        """
        args = _core.ffi.new("struct cn_namespace_open *")
        text = _core.ffi.new("char[]", name.encode())
        packed = _core.ffi.new("uint8_t[]", manifest)
        ident = namespace_id(manifest, salt)
        args.id = ident
        args.tenant = tenant_tag(salt)
        args.quota_bytes = quota_bytes
        args.name, args.manifest, args.manifest_bytes = text, packed, len(manifest)
        args.session = NOBODY if session is None else session
        args.session_nonce = nonce
        with self._command() as keeper:
            status = _core.lib.cn_keeper_namespace_open(keeper, args)
            if status == _core.lib.CN_EINVAL and name and args.ret_bound_slot:
                bound = self._namespace_at(int(args.ret_bound_slot))
                raise bound_elsewhere(self.name, bound, name, manifest, ident)
            check(status, f"open namespace {name!r} of pool {self.name!r}")
        return int(args.ret_slot), ident

    def _namespace_at(self, slot: int) -> BoundNamespace:
        base = _core.ffi.cast("char *", self._catalog) + self._catalog.namespaces_off
        found = _core.ffi.cast("struct cn_namespace *", base)[slot]
        return BoundNamespace(
            bytes(found.id),
            _core.ffi.string(found.name).decode(errors="replace"),
            bytes(_core.ffi.buffer(found.manifest, found.manifest_bytes)),
        )

    def set_quota(self, slot: int, quota_bytes: int) -> None:
        """Change how many bytes the namespace in *slot* may hold; 0 is no limit."""
        with self._command() as keeper:
            status = _core.lib.cn_keeper_namespace_quota(keeper, slot, quota_bytes)
            check(status, f"set the quota of namespace {slot} of pool {self.name!r}")

    # ---- changes --------------------------------------------------------------------------------

    def configure(self, spec: PoolSpec) -> None:
        """Take over what *spec* can change while clients are attached; see PoolSpec."""
        before, self.spec = self.spec, spec
        keep: list[Any] = []
        with self._command() as keeper:
            status = _core.lib.cn_keeper_configure(keeper, keeper_config(self.spec, keep))
        if status != _core.lib.CN_OK:
            self.spec = before
            raise error_of(status, f"reconfigure pool {self.name!r}")

    def clear(self) -> int:
        """Drop every chunk that nobody holds; return how many."""
        dropped = _core.ffi.new("uint64_t *")
        with self._command() as keeper:
            check(_core.lib.cn_keeper_clear(keeper, dropped), f"clear pool {self.name!r}")
        return int(dropped[0])

    def lose(self, refs: Sequence[int]) -> int:
        """Drop the chunks that *refs* name, as lost; return how many were still there."""
        dropped, packed = _core.ffi.new("uint64_t *"), _core.ffi.new("uint64_t[]", refs)
        with self._command() as keeper:
            status = _core.lib.cn_keeper_lose(keeper, packed, len(refs), dropped)
            check(status, f"drop lost chunks of pool {self.name!r}")
        return int(dropped[0])

    def retire(self) -> None:
        """No more hits, for ever: clients see misses and connect again."""
        with self._command() as keeper:
            check(_core.lib.cn_keeper_retire(keeper), f"retire pool {self.name!r}")

    def audit(self) -> int:
        """Walk every table and return the number of contradictions; 0 is right."""
        wrong = _core.ffi.new("uint64_t *")
        with self._command() as keeper:
            check(_core.lib.cn_keeper_audit(keeper, wrong), f"audit pool {self.name!r}")
        return int(wrong[0])

    def close(self, *, keep: bool = False) -> None:
        """
        Stop the keeper and unmap. Unlink every name, unless the pool is to be kept. Idempotent.

        Clients keep what they have mapped: with no keeper nothing changes under them any more.
        """
        self._end_keeper()
        self._objects.close(unlink=not keep)

    def _end_keeper(self) -> None:
        with self._idle:
            keeper, self._keeper = self._keeper, None
            self._idle.wait_for(lambda: self._commands == 0)
            self._super = None
        if keeper is not None:
            _core.lib.cn_keeper_stop(keeper)
            _core.lib.cn_keeper_destroy(keeper)
