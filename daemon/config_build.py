# SPDX-License-Identifier: Apache-2.0
"""
From a tree of plain values to the validated configuration, with every mistake at once.

Pure but for the look-ups of Host and for resolving symbolic links where paths are compared.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from cenote.shm.paths import PathError, check_socket_path
from cenote.shm.units import format_size

from .config import (
    NAMED_MEDIA,
    PAGE_SIZES,
    POOLS_MAX,
    REGIONS_MAX,
    TENANTS_MAX,
    AccessConfig,
    ConfigError,
    DaemonConfig,
    PoolConfig,
    RegionConfig,
    TenantConfig,
    options,
)
from .config_host import Host
from .config_kinds import Principal

# Where a value is in the tree: ("pool", 0, "region", 1, "size").
KeyPath = tuple[str | int, ...]
Section = TypeVar("Section")

PROBLEMS_MAX: Final = 100
SUB_SECTIONS: Final[Mapping[type, tuple[str, ...]]] = {
    DaemonConfig: (),
    PoolConfig: ("region", "access", "tenant"),
    RegionConfig: (),
    AccessConfig: (),
    TenantConfig: (),
}
LATER_SECTIONS: Final = ("peers", "metrics")


@dataclass
class Tree:
    """
    Plain values as TOML gives them, and where each comes from.

    origins maps a path to text such as "/etc/cenote/cenoted.toml:12" or "--size"; a value without
    an origin of its own has that of the section around it.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin_of(self, path: KeyPath) -> str:
        """Return where the value at *path* comes from."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return "configuration"


def build(tree: Tree, host: Host, default_run_dir: str) -> DaemonConfig:
    """
    Return the configuration that *tree* describes.

    Raises:
        ConfigError: With all mistakes found, in the order of the file.
    """
    builder = _Builder(tree, host)
    config = builder.daemon(default_run_dir)
    if not builder.problems:
        builder.cross_check(config)
    if builder.problems:
        raise ConfigError(builder.problems[:PROBLEMS_MAX])
    return config


class _Builder:
    def __init__(self, tree: Tree, host: Host) -> None:
        self.tree = tree
        self.host = host
        self.problems: list[str] = []

    def problem(self, path: KeyPath, text: str) -> None:
        """Note a mistake at *path*."""
        key = ".".join(part for part in path if isinstance(part, str))
        origin = self.tree.origin_of(path)
        self.problems.append(f"{origin}: {key}: {text}" if key else f"{origin}: {text}")

    # -- sections -------------------------------------------------------------------------------

    def daemon(self, default_run_dir: str) -> DaemonConfig:
        self._unknown_sections()
        table = self._table(self.tree.values.get("daemon", {}), ("daemon",))
        values = self._values(DaemonConfig, table, ("daemon",))
        values.setdefault("run_dir", default_run_dir)
        pools = self._list("pool", self.tree.values, (), POOLS_MAX)
        values["pools"] = tuple(self._pool(pool, path) for path, pool in pools)
        return DaemonConfig(**values)

    def _unknown_sections(self) -> None:
        for name in self.tree.values:
            if name in LATER_SECTIONS:
                self.problem((name,), "this section comes in a later release; remove it until then")
            elif name in options(PoolConfig) or name in SUB_SECTIONS[PoolConfig]:
                home = f"this belongs to a pool: write it below [[pool]]{_below(name)}"
                self.problem((name,), home)
            elif name in options(DaemonConfig):
                self.problem((name,), "this belongs to the daemon: put it below [daemon]")
            elif name not in ("daemon", "pool"):
                self.problem((name,), _unknown(name, ("daemon", "pool"), "section"))

    def _pool(self, table: dict[str, Any], path: KeyPath) -> PoolConfig:
        values = self._values(PoolConfig, table, path)
        regions = self._list("region", table, path, REGIONS_MAX)
        tenants = self._list("tenant", table, path, TENANTS_MAX)
        values["regions"] = tuple(self._region(region, p) for p, region in regions)
        values["access"] = self._access(table.get("access", {}), (*path, "access"))
        values["tenants"] = tuple(self._section(TenantConfig, tenant, p) for p, tenant in tenants)
        return PoolConfig(**values)

    def _region(self, table: dict[str, Any], path: KeyPath) -> RegionConfig:
        if table.get("medium") == "hugepages":
            table = {"page_size": "2MiB", **table}
        region = self._section(RegionConfig, table, path)
        allowed = PAGE_SIZES[region.medium]
        if region.page_size not in allowed:
            others = " or ".join(f'"{size}"' for size in allowed)
            self.problem(
                (*path, "page_size"),
                f"{region.page_size!r} is not possible on {region.medium!r}: choose {others}, or "
                'medium = "memfd"',
            )
        if region.page_size in ("2MiB", "1GiB") and region.size_bytes % region.page_bytes:
            self._no_whole_pages(region, path)
        if (region.medium == "file") == (region.path is None):
            self.problem((*path, "path"), f"medium {region.medium!r} {_path_rule(region)}")
        return region

    def _no_whole_pages(self, region: RegionConfig, path: KeyPath) -> None:
        lower = region.size_bytes - region.size_bytes % region.page_bytes
        choices = [format_size(n) for n in (lower, lower + region.page_bytes) if n]
        self.problem(
            (*path, "size"),
            f"{format_size(region.size_bytes)} is no multiple of the page size "
            f"{region.page_size}: write {' or '.join(choices)}",
        )

    def _access(self, value: object, path: KeyPath) -> AccessConfig:
        table = self._table(value, path)
        values = self._values(AccessConfig, table, path)
        uid = self.host.uid
        values.setdefault("admins", (Principal("user", uid, str(uid)),))
        return AccessConfig(**values)

    # -- one section ----------------------------------------------------------------------------

    def _section(self, cls: type[Section], table: dict[str, Any], path: KeyPath) -> Section:
        return cls(**self._values(cls, table, path))

    def _values(self, cls: type, table: dict[str, Any], path: KeyPath) -> dict[str, Any]:
        known = options(cls)
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key in SUB_SECTIONS[cls]:
                continue
            if key not in known:
                allowed = (*known, *SUB_SECTIONS[cls])
                self.problem((*path, key), _unknown(key, allowed, "key"))
                continue
            try:
                values[known[key].name] = known[key].metadata["kind"].parse(value, self.host)
            except ValueError as error:
                self.problem((*path, key), str(error))
        for key, option in known.items():
            if option.metadata["required"] and key not in table:
                example = option.metadata["kind"].allowed
                self.problem((*path, key), f"this is missing: write {example}")
        return values

    def _table(self, value: object, path: KeyPath) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        self.problem(path, f"{value!r} is no section: write [{'.'.join(_words(path))}]")
        return {}

    def _list(
        self, name: str, table: Mapping[str, Any], path: KeyPath, entries_max: int
    ) -> list[tuple[KeyPath, dict[str, Any]]]:
        value = table.get(name, [])
        here: KeyPath = (*path, name)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            self.problem(here, f"write it with double brackets: [[{'.'.join(_words(here))}]]")
            return []
        if len(value) > entries_max:
            self.problem(here, f"{len(value)} of them, and at most {entries_max} are allowed")
        return [((*here, i), entry) for i, entry in enumerate(value[:entries_max])]

    # -- what concerns several values -----------------------------------------------------------

    def cross_check(self, config: DaemonConfig) -> None:
        """Note what is right by itself but not together."""
        for i, pool in enumerate(config.pools):
            self._check_socket(config, pool, ("pool", i))
            self._check_single_uid(pool, ("pool", i))
            self._check_quotas(pool, ("pool", i))
            self._check_tenants(pool, ("pool", i))
        self._check_names(config)
        self._check_paths(config)

    def _check_socket(self, config: DaemonConfig, pool: PoolConfig, path: KeyPath) -> None:
        try:
            check_socket_path(config.socket_of(pool))
        except PathError as error:
            self.problem((*path, "socket"), str(error))

    def _check_single_uid(self, pool: PoolConfig, path: KeyPath) -> None:
        """Who may write to named memory may truncate it under the others (design: Memory)."""
        named = next((r.medium for r in pool.regions if r.medium in NAMED_MEDIA), None)
        if named is None:
            return
        # Root is in the daemon's trust domain anyway.
        own = (("user", self.host.uid), ("user", 0))
        for key in ("writers", "admins"):
            others = [str(p) for p in getattr(pool.access, key) if (p.kind, p.number) not in own]
            if others:
                self.problem(
                    (*path, "access", key),
                    f"{', '.join(others)} may write, but medium {named!r} serves only the user "
                    f"who runs the daemon (uid {self.host.uid}), as a writer could truncate it "
                    'under everybody else: write medium = "memfd" (or "hugepages"), or make them '
                    "readers",
                )

    def _check_quotas(self, pool: PoolConfig, path: KeyPath) -> None:
        quotas: list[tuple[KeyPath, int]] = [((*path, "default_quota"), pool.default_quota)]
        for i, tenant in enumerate(pool.tenants):
            quotas.append(((*path, "tenant", i, "quota"), tenant.quota or 0))
        for where, quota in quotas:
            if quota > pool.size_bytes:
                self.problem(
                    where,
                    f"{format_size(quota)} is more than the pool {pool.name!r} has "
                    f"({format_size(pool.size_bytes)}): lower it, or write 0 for no limit",
                )

    def _check_tenants(self, pool: PoolConfig, path: KeyPath) -> None:
        seen: dict[tuple[str, int], int] = {}
        for i, tenant in enumerate(pool.tenants):
            for principal in tenant.users:
                first = seen.setdefault((principal.kind, principal.number), i)
                if first != i:
                    self.problem(
                        (*path, "tenant", i, "users"),
                        f"{principal} is already in tenant {first + 1} of the pool "
                        f"{pool.name!r}: name it in one tenant only",
                    )

    def _check_names(self, config: DaemonConfig) -> None:
        seen: dict[str, KeyPath] = {}
        for i, pool in enumerate(config.pools):
            path: KeyPath = ("pool", i, "name")
            first = seen.setdefault(pool.name, path)
            if first != path:
                self.problem(
                    path,
                    f"a second pool is called {pool.name!r} (the first: "
                    f"{self.tree.origin_of(first)}): give each pool a name of its own",
                )

    def _check_paths(self, config: DaemonConfig) -> None:
        seen: list[tuple[Path, KeyPath]] = []
        for path, key in _paths(config):
            real = Path(os.path.realpath(path))
            for other, other_key in seen:
                relation = _overlap(real, other)
                if relation and not _same_name(config, key, other_key):
                    self.problem(
                        key,
                        f"{str(path)!r} {relation} {str(other)!r} of "
                        f"{_owner(config, other_key)} ({self.tree.origin_of(other_key)}): give "
                        "each a path of its own",
                    )
            seen.append((real, key))


def _paths(config: DaemonConfig) -> Iterator[tuple[Path, KeyPath]]:
    """Yield each socket and file with its place in the tree."""
    for i, pool in enumerate(config.pools):
        yield config.socket_of(pool), ("pool", i, "socket")
        for j, region in enumerate(pool.regions):
            if region.path is not None:
                yield Path(region.path), ("pool", i, "region", j, "path")


def _overlap(path: Path, other: Path) -> str:
    if path == other:
        return "is the same as"
    if other in path.parents:
        return "lies inside"
    return "contains" if path in other.parents else ""


def _same_name(config: DaemonConfig, key: KeyPath, other: KeyPath) -> bool:
    """Return whether both are the default sockets of pools of one name, which is said already."""
    pools = [config.pools[k[1]] for k in (key, other) if isinstance(k[1], int)]
    return pools[0] is not pools[1] and all(
        pool.name == pools[0].name and k[2] == "socket" and pool.socket is None
        for pool, k in zip(pools, (key, other), strict=True)
    )


def _owner(config: DaemonConfig, key: KeyPath) -> str:
    assert isinstance(key[1], int)
    return f"pool {config.pools[key[1]].name!r}"


def _path_rule(region: RegionConfig) -> str:
    if region.medium == "file":
        return "needs a path: name the file (--medium file:PATH, or path = in the file)"
    return 'takes no path: remove it, or write medium = "file"'


def _below(name: str) -> str:
    if name in ("region", "tenant"):
        return f", as [[pool.{name}]]"
    return ", as [pool.access]" if name == "access" else ""


def _words(path: KeyPath) -> list[str]:
    return [part for part in path if isinstance(part, str)]


def _unknown(name: str, known: tuple[str, ...], what: str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    return f"unknown {what} {name[:64]!r}: {hint}"
