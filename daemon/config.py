# SPDX-License-Identifier: Apache-2.0
"""
The daemon's configuration: frozen, validated, and the source of docs/configuration.md.

The model only. config_sources.load() makes it from flags, environment, file and defaults;
config_build checks it; config_reload compares two of them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from cenote.shm.paths import DEFAULT_POOL

from . import config_kinds as kinds
from .config_kinds import Kind, Principal

__all__ = [
    "AccessConfig",
    "ConfigError",
    "DaemonConfig",
    "PoolConfig",
    "Principal",
    "RegionConfig",
    "Role",
    "TenantConfig",
]

KIB: Final = 2**10
MIB: Final = 2**20
GIB: Final = 2**30
GRANULE_BYTES: Final = 2 * MIB  # slabs are whole granules
REGION_MAX_BYTES: Final = 2**47  # the user half of a 48-bit address space
POOLS_MAX: Final = 32
REGIONS_MAX: Final = 16
TENANTS_MAX: Final = 1024
LEASE_SLOTS_MAX: Final = 65_536
CHUNKS_MIN: Final = 64
CHUNKS_MAX: Final = 2**26
CHUNKS_DERIVED_MIN: Final = 4096
BYTES_PER_CHUNK_DERIVED: Final = 16 * KIB
PAGE_BYTES: Final = {"4KiB": 4 * KIB, "thp": 2 * MIB, "2MiB": 2 * MIB, "1GiB": GIB}
# Media whose memory has a name: who may write may truncate (design: they serve a single uid).
NAMED_MEDIA: Final = ("shm", "file")
PAGE_SIZES: Final = {
    "shm": ("4KiB",),
    "memfd": ("4KiB", "thp", "2MiB", "1GiB"),
    "hugepages": ("2MiB", "1GiB"),
    "file": ("4KiB",),
}

_LATER: Final = "it comes in a later release"
_MEDIUM_REMEDIES: Final = {
    "devdax": f'{_LATER}; until then choose "shm", "memfd", "hugepages" or "file"',
    "file": 'in a file write medium = "file" and path = "/absolute/path"',
    "thp": 'write medium = "memfd" and page_size = "thp"',
    "hugetlb": 'choose "hugepages"',
}


class ConfigError(Exception):
    """
    A configuration that cannot be used.

    problems has one text per mistake, each with its origin (file and line, flag or variable), the
    key, what is wrong and the remedy.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__("\n".join(self.problems))


class Role(enum.IntEnum):
    """What a client may do. Each role includes those below it."""

    READER = 1
    WRITER = 2
    ADMIN = 3


def option(
    doc: str,
    kind: Kind,
    default: Any = None,
    *,
    key: str = "",
    live: bool = False,
    at_attach: bool = False,
    required: bool = False,
    default_text: str = "",
) -> Any:
    """
    Return a dataclass field with what the loader, the reload and the documentation must know.

    key: its name in TOML, when it is not the field's. live: SIGHUP can change it. at_attach: a
    session is told once, when it attaches, so that the change is for those that come later.
    """
    metadata = {
        "doc": doc,
        "kind": kind,
        "key": key,
        "live": live or at_attach,
        "at_attach": at_attach,
        "required": required,
        "default_text": default_text,
    }
    return field(default=default, metadata=metadata)


def options(cls: type) -> dict[str, Field[Any]]:
    """Return the options of the section *cls*: TOML key -> field. Sub-sections are no options."""
    found = (f for f in fields(cls) if "kind" in f.metadata)
    return {f.metadata["key"] or f.name: f for f in found}


@dataclass(frozen=True)
class RegionConfig:
    """Memory of one medium. A pool without one gets the default region."""

    medium: str = option(
        "Where the memory comes from: named shared memory, an anonymous memfd, a memfd on huge "
        "pages, or a file. Other users may write to a pool only on memfd and hugepages.",
        kinds.choice("shm", "memfd", "hugepages", "file", instead=_MEDIUM_REMEDIES),
        "shm",
    )
    path: str | None = option('The file; only with medium "file".', kinds.path())
    size_bytes: int = option(
        "How much memory.",
        kinds.size(GRANULE_BYTES, REGION_MAX_BYTES, granule=GRANULE_BYTES),
        0,
        key="size",
        required=True,
        default_text="required; the default region has min(4GiB, a quarter of the memory limit)",
    )
    page_size: str = option(
        'Size of the pages. shm and file: "4KiB". memfd: any. hugepages: "2MiB" or "1GiB". '
        '"thp" asks the kernel for transparent 2 MiB pages.',
        kinds.choice("4KiB", "thp", "2MiB", "1GiB"),
        "4KiB",
        default_text='"4KiB"; "2MiB" for hugepages',
    )
    numa: None = option(
        "Binds the region to a NUMA node. Refused for now.",
        kinds.unsupported("binding a region to a NUMA node", "leave numa out until then"),
    )
    populate: bool = option(
        "Touch all pages at start, so that a lack of memory is found there and then.",
        kinds.flag(),
        True,
    )

    @property
    def page_bytes(self) -> int:
        """The size of a page in bytes; of "thp" the size hoped for, 2 MiB."""
        return PAGE_BYTES[self.page_size]


@dataclass(frozen=True)
class AccessConfig:
    """
    Who may attach, and as what. Whoever is in no list is refused.

    Users are compared with the credentials that the kernel gives for the socket.
    """

    readers: tuple[Principal, ...] = option(
        "May look up and read; never get a writable descriptor of the memory.",
        kinds.principals(),
        (),
        live=True,
        default_text="nobody",
    )
    writers: tuple[Principal, ...] = option(
        "May store, pin and delete chunks, too.",
        kinds.principals(),
        (),
        live=True,
        default_text="nobody",
    )
    admins: tuple[Principal, ...] = option(
        "May do everything, destroying the pool included.",
        kinds.principals(),
        (),
        live=True,
        default_text="the user who runs the daemon",
    )

    def role_of(self, uid: int, gids: Iterable[int]) -> Role | None:
        """Return the highest role of a process of *uid* and *gids*, or None: refuse it."""
        groups = frozenset(gids)
        for role, listed in (
            (Role.ADMIN, self.admins),
            (Role.WRITER, self.writers),
            (Role.READER, self.readers),
        ):
            if any(principal.matches(uid, groups) for principal in listed):
                return role
        return None


@dataclass(frozen=True)
class TenantConfig:
    """
    Users whose namespaces are kept apart by a salt, or limited by a quota.

    The salt keeps tenants from each other's chunks by name, not by force: tenants that distrust
    each other get pools of their own.

    Tenants without a salt share the namespaces of equal manifests, and so do users of no tenant. A
    shared namespace has the quota of whoever opened it first since the daemon started, and a reload
    gives it that tenant's new one: give tenants whose quotas differ a salt each.
    """

    users: tuple[Principal, ...] = option(
        "Who belongs to it. An entry may occur in one tenant only; a client that is in several "
        "belongs to the first that names its user, then to the first that names its group.",
        kinds.principals(required=True),
        (),
        live=True,
        required=True,
        default_text="required",
    )
    salt_file: str | None = option(
        "A file of 16 to 1,024 random bytes, mode 0600, equal on all nodes. Without it the salt "
        "is empty, and equal manifests mean the same namespace.",
        kinds.path(),
        live=True,
    )
    quota: int | None = option(
        "At most so many bytes in each namespace of this tenant; 0 lifts the pool's default.",
        kinds.size(4 * KIB, REGION_MAX_BYTES, zero="no limit"),
        live=True,
        default_text="default_quota of the pool",
    )


@dataclass(frozen=True)
class PoolConfig:
    """One trust domain with memory, a catalog and a socket of its own."""

    name: str = option("Its name.", kinds.pool_name(), DEFAULT_POOL)
    socket: str | None = option(
        "Its Unix socket; at most 107 bytes long.",
        kinds.path(),
        default_text="`<run_dir>/<name>.sock`",
    )
    policy: str = option(
        "Which unleased chunk leaves first.",
        kinds.choice("use-count", "lru", "lfu", "s3-fifo"),
        "use-count",
        live=True,
    )
    high_water: float = option(
        "Eviction begins when this share of the pool is in use.", kinds.share(), 0.95, live=True
    )
    low_water: float = option(
        "Eviction ends at this share of the high-water mark.", kinds.share(), 0.98, live=True
    )
    lease_slots: int = option(
        "Leases that one session may hold.", kinds.count(64, LEASE_SLOTS_MAX), 8192
    )
    checksum: str = option(
        "When bytes that were written in place get their CRC-32C: never, by a background task "
        '("lazy"), or before they become visible ("commit"). Copies get theirs in passing. '
        "A reload starts or ends the task at once.",
        kinds.choice("off", "lazy", "commit"),
        "lazy",
        at_attach=True,
    )
    max_chunks: int = option(
        "Chunks that the catalog can name; each costs about 150 bytes of memory.",
        kinds.count(CHUNKS_MIN, CHUNKS_MAX, zero="one per 16 KiB, at least 4096, at most 2**26"),
        0,
    )
    reader_lease_share: float = option(
        "Share of the pool's bytes that one reader may hold in leases.",
        kinds.share(),
        0.25,
        at_attach=True,
    )
    default_quota: int = option(
        "At most so many bytes in each namespace; beyond it the namespace evicts its own chunks.",
        kinds.size(4 * KIB, REGION_MAX_BYTES, zero="no limit"),
        0,
        live=True,
    )
    scrub_bytes_per_s: int = option(
        "How fast the background task checks and makes checksums, a second.",
        kinds.size(64 * KIB, 1024 * GIB, zero="never"),
        256 * MIB,
        live=True,
    )
    event_slots: int = option(
        "Events that a slow follower may be behind before it finds a gap.",
        kinds.count(1024, 2**24, power_of_two=True),
        65_536,
    )
    ephemeral: bool = option("Drop the pool when the daemon stops.", kinds.flag(), False, live=True)
    regions: tuple[RegionConfig, ...] = ()
    access: AccessConfig = field(default_factory=AccessConfig)
    tenants: tuple[TenantConfig, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all its regions."""
        return sum(region.size_bytes for region in self.regions)

    @property
    def high_water_bytes(self) -> int:
        """Eviction begins when more bytes than this are in use."""
        return int(self.size_bytes * self.high_water)

    @property
    def low_water_bytes(self) -> int:
        """Eviction ends when no more bytes than this are in use; never above high_water_bytes."""
        return int(self.size_bytes * self.high_water * self.low_water)

    @property
    def chunk_slots(self) -> int:
        """Descriptors in the catalog: max_chunks, or derived from the size when that is 0."""
        derived = max(self.size_bytes // BYTES_PER_CHUNK_DERIVED, CHUNKS_DERIVED_MIN)
        return self.max_chunks or min(derived, CHUNKS_MAX)

    def tenant_of(self, uid: int, gids: Iterable[int]) -> TenantConfig | None:
        """Return the tenant of a client: by its user before by its groups, in the file's order."""
        groups = frozenset(gids)
        for kind in ("user", "group"):
            for tenant in self.tenants:
                named = (p for p in tenant.users if p.kind == kind)
                if any(principal.matches(uid, groups) for principal in named):
                    return tenant
        return None

    def quota_of(self, tenant: TenantConfig | None) -> int:
        """Return the bytes that each namespace of *tenant* may hold, 0 = no limit."""
        if tenant is None or tenant.quota is None:
            return self.default_quota
        return tenant.quota


@dataclass(frozen=True)
class DaemonConfig:
    """What concerns the process as a whole, and its pools."""

    run_dir: str = option(
        "Where the sockets are.",
        kinds.path(),
        "",
        default_text="$RUNTIME_DIRECTORY of a service, /run/cenote for root, "
        "$XDG_RUNTIME_DIR/cenote, `/tmp/cenote-<uid>`",
    )
    log_level: str = option(
        "Less important lines are not written.",
        kinds.choice("DEBUG", "INFO", "WARNING", "ERROR", fold=True),
        "INFO",
        live=True,
    )
    log_format: str = option(
        'Lines for people ("text"), or one JSON object a line; "auto": text on a terminal.',
        kinds.choice("auto", "text", "json"),
        "auto",
        live=True,
    )
    pools: tuple[PoolConfig, ...] = ()

    def socket_of(self, pool: PoolConfig) -> Path:
        """Return the path of the socket of *pool*, checked when the configuration was made."""
        return Path(pool.socket or f"{self.run_dir}/{pool.name}.sock")
