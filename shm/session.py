# SPDX-License-Identifier: Apache-2.0
"""
The client's side of attaching: what to say in the hello, what the answer means, and the mappings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from cenote._native import _core, _short

from .errors import Corrupt, ProtocolError, VersionMismatch, check, error_of
from .messages import LABEL_MAX_BYTES, ROLES, Fields, Hello, Resume
from .wire import PROTOCOL_VERSION, Message, WireError, close_all

REGIONS_MAX: Final = _core.lib.CN_REGIONS_MAX
MEDIA: Final = {"shm": 1, "memfd": 2, "file": 3, "devdax": 4}  # enum cn_medium
CHECKSUMS: Final = ("off", "lazy", "commit")  # in the order of cffi_src/lease/lease.h
_SIZE_MAX: Final = 2**63 - 1


@dataclass(frozen=True)
class Region:
    """One region of the pool, as the welcome has it."""

    bytes: int
    medium: str
    page_bytes: int


@dataclass(frozen=True)
class Welcome:
    """What the daemon said to a hello. The descriptors that came with it are not in here."""

    pool: str
    pool_id: bytes
    boot_token: int
    role: str
    session: int
    nonce: int
    catalog_bytes: int
    regions: tuple[Region, ...]
    checksum: str
    lease_limit_bytes: int
    capacity_bytes: int
    server_pid: int
    server_version: str
    resumed: bool = False

    @property
    def as_resume(self) -> Resume:
        """What to say in a hello to go on with this session."""
        return Resume(self.pool_id, self.session, self.nonce, self.role)


class MappedRegion(NamedTuple):
    """
    Where a region lies in this process. Views are in the read-only one, extents in the writable.

    Attributes:
        region: Its number in the pool.
        address: Of the first byte.
        nbytes: Length.
        page_bytes: The medium's page, as the daemon said: 4 KiB, 2 MiB or 1 GiB.
        writable: Is it the writable mapping?
    """

    region: int
    address: int
    nbytes: int
    page_bytes: int
    writable: bool


class Mapping:
    """
    The memory of one session: catalog, regions, the session itself. The `owner` of its leases.

    It is unmapped when nothing refers to it any more, so never under a living lease. What a device
    was told of stays mapped in any case, until the device has forgotten it: see hold().
    """

    __slots__ = ("_held", "catalog", "catalog_bytes", "ptr")

    def __init__(self, ptr: int, catalog: int, catalog_bytes: int) -> None:
        self.ptr = ptr
        self.catalog = catalog
        self.catalog_bytes = catalog_bytes
        self._held: set[object] = set()

    def regions(self) -> Iterator[MappedRegion]:
        """
        Yield where the regions are mapped: all of them for reading, then those for writing, too.

        Raises:
            ForkedChild: This process is a forked child of the one that attached (I13).
        """
        client = _core.ffi.cast("struct cn_client *", self.ptr)
        if _short.lib.cn_client_forked(client):  # the catalog is not mapped either
            raise error_of(_core.lib.CN_EFORKED, "find where the pool is mapped")
        super_ = _core.ffi.cast("struct cn_super *", self.catalog)
        base, nbytes = _core.ffi.new("void **"), _core.ffi.new("uint64_t *")
        for writable in (False, True):
            for i in range(super_.region_count):
                status = _short.lib.cn_client_region(client, i, writable, base, nbytes)
                if status == _core.lib.CN_EMISS:
                    continue
                check(status, f"find where region {i} is mapped")
                address = int(_core.ffi.cast("uintptr_t", base[0]))
                page_bytes = int(super_.regions[i].page_bytes)
                yield MappedRegion(i, address, int(nbytes[0]), page_bytes, writable)

    def hold(self) -> object:
        """
        Keep everything mapped, though nothing refers to it, until let_go() of what is returned.

        For memory that a device was given the addresses of: where the one who asked is forgotten,
        or the interpreter ends, it stays mapped until the process is gone.
        """
        hold = object()
        self._held.add(hold)
        return hold

    def let_go(self, hold: object) -> None:
        """End what hold() began. Idempotent."""
        self._held.discard(hold)

    def __del__(
        self, _detach: Any = _short.lib.cn_client_detach, _cast: Any = _core.ffi.cast
    ) -> None:
        if self._held:
            return
        # In a forked child detach() does nothing: other mappings may have these addresses (I13).
        _detach(_cast("struct cn_client *", self.ptr))


def new_hello(
    client: str, role: str | None = None, label: str = "", resume: Resume | None = None
) -> Hello:
    """
    Return the hello of this build. *label* is for people; what does not fit is cut off.

    Raises:
        ValueError: There is no such role.
    """
    if role is not None and role not in ROLES:
        raise ValueError(f"there is no role {role!r}: choose one of {', '.join(ROLES)}, or None")
    printable = "".join(c if c.isprintable() else "?" for c in label)
    cut = printable.encode("utf-8", "replace")[:LABEL_MAX_BYTES].decode("utf-8", "ignore")
    return Hello(
        client=client,
        protocol=(PROTOCOL_VERSION, PROTOCOL_VERSION),
        layout=_core.lib.CN_LAYOUT_VERSION,
        fingerprint=_short.lib.cn_abi_fingerprint(),
        role=role,
        label=cut,
        resume=resume,
    )


def parse_welcome(reply: Message) -> tuple[Welcome, dict[str, int]]:
    """
    Return the welcome in *reply* and its descriptors by name; the caller owns them.

    Raises:
        ProtocolError: It is no welcome. The descriptors are closed.
    """
    try:
        welcome = _welcome(Fields(reply.body))
        names = _descriptor_names(reply.body, welcome, len(reply.descriptors))
    except WireError as error:
        close_all(reply.descriptors)
        raise ProtocolError(f"the daemon's welcome is wrong: {error}") from error
    return welcome, dict(zip(names, reply.descriptors, strict=True))


def _welcome(fields: Fields) -> Welcome:
    return Welcome(
        pool=fields.text("pool", 32),
        pool_id=fields.blob("pool_id", 16, 16),
        boot_token=fields.integer("boot_token", 0, 2**64 - 1),
        role=fields.one_of("role", ROLES),
        session=fields.integer("session", 0, 2**32 - 1),
        nonce=fields.integer("nonce", 0, 2**64 - 1),
        catalog_bytes=fields.integer("catalog_bytes", 1, _SIZE_MAX),
        regions=tuple(_regions(fields.sequence("regions", REGIONS_MAX))),
        checksum=fields.one_of("checksum", CHECKSUMS),
        lease_limit_bytes=fields.integer("lease_limit_bytes", 0, 2**64 - 1),
        capacity_bytes=fields.integer("capacity_bytes", 1, _SIZE_MAX),
        server_pid=fields.integer("pid", 0, 2**31 - 1),
        server_version=fields.text("server", 64),
        resumed=fields.flag("resumed"),
    )


def _regions(items: list[Any]) -> Iterable[Region]:
    for item in items:
        fields = Fields(item if isinstance(item, dict) else {})
        yield Region(
            bytes=fields.integer("bytes", 1, _SIZE_MAX),
            medium=fields.one_of("medium", MEDIA),
            page_bytes=fields.integer("page_bytes", 1, 2**32 - 1),
        )


def _descriptor_names(body: dict[str, Any], welcome: Welcome, count: int) -> list[str]:
    expected = [] if welcome.resumed else descriptor_names(len(welcome.regions), welcome.role)
    given = body.get("fds")
    if given == expected and count == len(expected):
        return expected
    raise WireError(f"it has {count} descriptors named {given!r}; {expected} were expected")


def descriptor_names(region_count: int, role: str) -> list[str]:
    """Return the names of a welcome's descriptors, in order. A reader gets no writable region."""
    names = ["catalog", "session", "doorbell"]
    for i in range(region_count):
        names += [f"r{i}.ro"] if role == "reader" else [f"r{i}.ro", f"r{i}.rw"]
    return names


def attach(welcome: Welcome, fds: dict[str, int]) -> Mapping:
    """
    Map the pool that *welcome* describes. Closes all of *fds*, whatever happens.

    From here on the session lives as long as the mapping, not the socket (I6).

    Raises:
        VersionMismatch: Daemon and client were built with different layouts.
        Corrupt: The daemon's catalog is not what it should be.
        OSError: The kernel refused a mapping; MemoryError when it had no room.
    """
    ffi, lib = _core.ffi, _core.lib
    request = ffi.new("struct cn_attach *")
    request.catalog_fd = fds["catalog"]
    request.session_fd = fds["session"]
    request.doorbell_fd = fds["doorbell"]
    request.region_count = len(welcome.regions)
    request.catalog_bytes = welcome.catalog_bytes
    for i in range(REGIONS_MAX):
        request.region_ro_fd[i] = fds.get(f"r{i}.ro", -1)
        request.region_rw_fd[i] = fds.get(f"r{i}.rw", -1)
    client, errno = ffi.new("struct cn_client **"), ffi.new("int *")
    try:
        status = lib.cn_client_attach(request, client, errno)
    finally:
        close_all(fds.values())
        fds.clear()
    if status != lib.CN_OK:
        raise _attach_error(status, errno[0], welcome)
    catalog = int(ffi.cast("uintptr_t", lib.cn_client_catalog(client[0])))
    return Mapping(int(ffi.cast("uintptr_t", client[0])), catalog, welcome.catalog_bytes)


def _attach_error(status: int, errno: int, welcome: Welcome) -> Exception:
    lib = _core.lib
    what = f"attach to pool {welcome.pool!r} of {welcome.server_version} (pid {welcome.server_pid})"
    if status == lib.CN_EVERSION:
        return VersionMismatch(
            f"{what}: its memory layout is another one than this build's "
            f"({_short.lib.cn_abi_fingerprint():#x}): install the same cenote for daemon and client"
        )
    if status == lib.CN_ECORRUPT:
        return Corrupt(
            f"{what}: its catalog is damaged, or was truncated: restart the daemon, which begins "
            "with an empty pool"
        )
    return error_of(status, what, errno=errno)
