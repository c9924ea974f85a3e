# SPDX-License-Identifier: Apache-2.0
"""
The daemon's side of a pool: its objects, its keeper, its sessions.

Used by cenoted for each pool, and by cenote.client.testing for a pool inside a test. Nothing here
knows sockets or configuration files.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cenote._native import _core

from . import media
from .errors import ManifestMismatch, PoolGone, check, error_of
from .identity import Peer, boot_id, signals_wait, start_ns
from .manifest import diff, namespace_id, tenant_tag
from .media import MediumObject, MediumSpec, ObjectName
from .messages import NO_LIMIT, ROLES
from .pool_spec import PoolSpec, catalog_bytes, format_of, medium_name
from .session import Mapping as SessionMapping
from .session import Region, Welcome, attach, descriptor_names
from .wire import close_all

if TYPE_CHECKING:
    from _cffi_backend import CData

VERSION: Final = "0.2.0"
SERVER: Final = f"cenote/{VERSION}"
SESSIONS_MAX: Final = _core.lib.CN_SESSIONS_MAX
NOBODY: Final = 2**32 - 1
SPIN_US: Final = 100

Progress = Callable[[int], None]


@dataclass
class SessionOffer:
    """
    A session that the keeper scans already (I3), and what its client must be sent.

    Send fds with the welcome, then close() them here: the liveness lock must have no other holder
    than the client (I6). A session whose descriptors never arrived anywhere is dead at once.
    """

    welcome: Welcome
    fds: dict[str, int] = field(default_factory=dict)

    def close(self) -> None:
        """Close our copies of the descriptors."""
        close_all(self.fds.values())
        self.fds.clear()


class PoolHost:
    """
    A pool in this process: create() it, serve sessions from it, close() it.

    Any thread may call any method; commands to the keeper run one after the other on its thread.
    After close() everything raises PoolGone.
    """

    def __init__(self, spec: PoolSpec, pool_id: bytes) -> None:
        self.spec = spec
        self.pool_id = pool_id
        self.capacity_bytes = 0
        self.catalog_bytes = 0
        self.regions: tuple[Region, ...] = ()
        self._objects: list[MediumObject] = []
        self._idle = threading.Condition()
        self._commands = 0
        self._internal: set[tuple[int, int]] = set()  # our own sessions: nobody else counts them
        self._keeper: CData | None = None
        self._super: CData | None = None
        self._undo = contextlib.ExitStack()

    @classmethod
    def create(
        cls,
        spec: PoolSpec,
        *,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
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
        host = cls(spec, secrets.token_bytes(16))
        try:
            host._make(progress or (lambda _bytes: None), stop)
        except BaseException:
            host._undo.close()
            raise
        return host

    # ---- making ---------------------------------------------------------------------------------

    def _make(self, progress: Progress, stop: threading.Event | None) -> None:
        keep: list[Any] = []
        if any(region.medium.kind != "memfd" for region in self.spec.regions):
            _guard_copies()
        form = format_of(self.spec, keep)
        form.pool_id = self.pool_id
        form.hash_seed = [secrets.randbits(64), secrets.randbits(64)]
        form.created_ns = time.time_ns()
        form.keeper_start_ns = start_ns(os.getpid())
        form.boot_id = boot_id()
        self.catalog_bytes = catalog_bytes(self.spec)
        touched = media.Pretoucher(progress, stop)
        populate = any(region.populate for region in self.spec.regions)
        catalog = self._object(self.spec.catalog_medium, "catalog", self.catalog_bytes)
        catalog_at = self._mapped(catalog, touched if populate else None)
        regions = _core.ffi.new("void *[]", max(1, len(self.spec.regions)))
        for i, region in enumerate(self.spec.regions):
            made = self._object(region.medium, f"r{i}", region.bytes)
            address = self._mapped(made, touched if region.populate else None)
            regions[i] = _core.ffi.cast("void *", address)
        self.capacity_bytes = sum(made.bytes for made in self._objects[1:])
        self.regions = tuple(
            Region(made.bytes, medium_name(made.spec), made.page_bytes)
            for made in self._objects[1:]
        )
        where = _core.ffi.cast("void *", catalog_at)
        status = _core.lib.cn_catalog_format(where, self.catalog_bytes, form)
        check(status, f"format the catalog of pool {self.spec.name!r}")
        self._start_keeper(where, regions)

    def _object(self, medium: MediumSpec, part: str, bytes_: int) -> MediumObject:
        name = ObjectName(self.spec.name, self.pool_id.hex()[:16], part, os.geteuid())
        with signals_wait():  # or a stop in between leaves a name that nobody removes
            made = media.create(medium, name, bytes_)
            self._undo.callback(made.close)
            self._undo.callback(made.unlink)
        self._objects.append(made)
        return made

    def _mapped(self, made: MediumObject, touch: media.Pretoucher | None) -> int:
        address = made.map(writable=True)
        self._undo.callback(media.unmap, address, made.bytes)
        if touch is not None:
            touch(address, made.bytes)
        return address

    def _start_keeper(self, catalog: CData, regions: CData) -> None:
        keep: list[Any] = []
        config = self._keeper_config(keep)
        made = _core.ffi.new("struct cn_keeper **")
        status = _core.lib.cn_keeper_create(catalog, self.catalog_bytes, regions, config, made)
        check(status, f"make the keeper of pool {self.spec.name!r}")
        self._undo.callback(_core.lib.cn_keeper_destroy, made[0])
        check(_core.lib.cn_keeper_start(made[0]), f"start the keeper of {self.spec.name!r}")
        self._undo.callback(_core.lib.cn_keeper_stop, made[0])
        self._keeper = made[0]
        self._super = _core.ffi.cast("struct cn_super *", catalog)

    def _keeper_config(self, keep: list[Any]) -> CData:
        made = _core.ffi.new("struct cn_keeper_config *")
        policy = _core.ffi.new("char[]", self.spec.policy.encode("ascii"))
        keep.append(policy)
        made.high_water = self.spec.high_water
        made.low_water = self.spec.low_water
        made.policy = policy
        made.spin_us = SPIN_US
        return made

    # ---- facts ----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.spec.name

    @property
    def locations(self) -> list[str]:
        """Where the objects are: what a person would look for."""
        return [made.location for made in self._objects]

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
        base = _core.ffi.cast("char *", self._catalog) + self._catalog.registry_off
        entry = _core.ffi.cast("struct cn_session_entry *", base)[info.session]
        if entry.nonce != info.nonce:
            return {"label": "", "attached_ns": 0, "lease_limit_bytes": 0, "over_limit": False}
        return {
            "label": _core.ffi.string(entry.label).decode("utf-8", "replace"),
            "attached_ns": int(entry.attached_ns),
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
            with self._command() as keeper:
                status = _core.lib.cn_keeper_session_open(keeper, args)
                check(status, f"open a session on pool {self.name!r}")
            undo.pop_all()  # the keeper owns segment and descriptors now, the caller the offer
        offer.welcome = self._welcome(role, int(args.ret_session), int(args.ret_nonce))
        if internal:
            self._internal.add((offer.welcome.session, offer.welcome.nonce))
        return offer

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
        offer.fds["catalog"] = self._objects[0].reopen(writable=False)
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
        args.lease_limit_bytes = offer.welcome.lease_limit_bytes
        return args

    def _open_regions(self, offer: SessionOffer) -> None:
        """Open each region anew for each role: a dup would keep write access."""
        for name in descriptor_names(len(self.regions), offer.welcome.role)[3:]:
            part, _, access = name.partition(".")
            made = self._objects[1 + int(part[1:])]
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
                raise self._bound_elsewhere(name, manifest, ident, args.ret_bound_slot)
            check(status, f"open namespace {name!r} of pool {self.name!r}")
        return int(args.ret_slot), ident

    def _bound_elsewhere(
        self, name: str, given: bytes, ident: bytes, slot: int
    ) -> ManifestMismatch:
        base = _core.ffi.cast("char *", self._catalog) + self._catalog.namespaces_off
        bound = _core.ffi.cast("struct cn_namespace *", base)[slot]
        manifest = bytes(_core.ffi.buffer(bound.manifest, bound.manifest_bytes))
        differing = diff(manifest, given)
        if bytes(bound.id) == ident:
            own = _core.ffi.string(bound.name).decode(errors="replace")
            return ManifestMismatch(
                f"this namespace of pool {self.name!r} is named {own!r} already, not {name!r}: "
                f"open it by that name, or without one",
                {},
            )
        if not differing:
            return ManifestMismatch(
                f"the name {name!r} in pool {self.name!r} is another tenant's: choose another one",
                {},
            )
        fields = ", ".join(differing)
        return ManifestMismatch(
            f"the name {name!r} in pool {self.name!r} is bound to a manifest that differs in "
            f"{fields}: use another name, or the manifest that it is bound to",
            differing,
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
            status = _core.lib.cn_keeper_configure(keeper, self._keeper_config(keep))
        if status != _core.lib.CN_OK:
            self.spec = before
            raise error_of(status, f"reconfigure pool {self.name!r}")

    def clear(self) -> int:
        """Drop every chunk that nobody holds; return how many."""
        dropped = _core.ffi.new("uint64_t *")
        with self._command() as keeper:
            check(_core.lib.cn_keeper_clear(keeper, dropped), f"clear pool {self.name!r}")
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

    def close(self) -> None:
        """
        Stop the keeper, unmap, and unlink every name. Idempotent.

        Clients keep what they have mapped: with no keeper nothing changes under them any more.
        """
        with self._idle:
            self._keeper = None
            self._idle.wait_for(lambda: self._commands == 0)
            self._super = None
        self._undo.close()


def _guard_copies() -> None:
    """What is not sealed may be truncated under the keeper's copies: a lost chunk, no SIGBUS."""
    syserr = _core.ffi.new("struct cn_syserr *")
    status = _core.lib.cn_guard_install(syserr)
    check(status, "install the SIGBUS guard", errno=syserr.err)
