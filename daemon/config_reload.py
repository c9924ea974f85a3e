# SPDX-License-Identifier: Apache-2.0
"""
What a reload (SIGHUP) changes: diff() compares, the server applies.

Pure: two configurations in, a list of changes out. Whether an option can change while clients are
attached is a mark on the option (live=True in config.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .config import DaemonConfig, PoolConfig, TenantConfig, options
from .config_kinds import Kind


@dataclass(frozen=True)
class Change:
    """
    One difference.

    pool: the name of the pool, "" for the daemon. key: as in TOML, such as "access.writers".
    old, new: as one would write them, "-" for absent. at_attach: sessions that are attached
    already keep the old value.
    """

    pool: str
    key: str
    old: str
    new: str
    at_attach: bool = False

    def __str__(self) -> str:
        where = f"pool {self.pool!r}: " if self.pool else ""
        whom = ", for sessions attached from then on" if self.at_attach else ""
        return f"{where}{self.key}: {self.old} -> {self.new}{whom}"


@dataclass(frozen=True)
class Reload:
    """
    The outcome of a comparison.

    live: apply these now. restart: these take effect at the next start only.
    config: what is in force after the live changes, the old configuration with these applied.
    """

    live: tuple[Change, ...]
    restart: tuple[Change, ...]
    config: DaemonConfig


@dataclass
class _Found:
    live: list[Change] = field(default_factory=list)
    restart: list[Change] = field(default_factory=list)


def diff(old: DaemonConfig, new: DaemonConfig) -> Reload:
    """
    Return what can change from *old* to *new* while clients are attached, and what cannot.

    Pools are matched by name. One that is new, or gone, needs a restart.
    """
    found = _Found()
    config = _merge(old, new, "", "", found)
    after = {pool.name: pool for pool in new.pools}
    pools = []
    for pool in old.pools:
        if pool.name in after:
            pools.append(_pool(pool, after.pop(pool.name), found))
        else:
            found.restart.append(Change(pool.name, "pool", "served", "-"))
            pools.append(pool)
    found.restart += [Change(name, "pool", "-", "to be served") for name in after]
    return Reload(tuple(found.live), tuple(found.restart), _replaced(config, pools=tuple(pools)))


def _pool(old: PoolConfig, new: PoolConfig, found: _Found) -> PoolConfig:
    merged = _merge(old, new, old.name, "", found)
    access = _merge(old.access, new.access, old.name, "access.", found)
    if len(old.regions) == len(new.regions):
        for i, (region, other) in enumerate(zip(old.regions, new.regions, strict=True)):
            _merge(region, other, old.name, f"region[{i}].", found)
    else:
        counts = (str(len(old.regions)), str(len(new.regions)))
        found.restart.append(Change(old.name, "regions", *counts))
    tenants_before, tenants_after = _tenants(old), _tenants(new)
    if tenants_before != tenants_after:
        found.live.append(Change(old.name, "tenants", tenants_before, tenants_after))
    pool: PoolConfig = _replaced(merged, access=access, tenants=new.tenants)
    return pool


def _merge(old: Any, new: Any, pool: str, prefix: str, found: _Found) -> Any:
    """Return section *old* with the live options of *new*, and note all differences."""
    taken: dict[str, object] = {}
    for key, option in options(type(old)).items():
        before, after = getattr(old, option.name), getattr(new, option.name)
        if before == after:
            continue
        show = option.metadata["kind"]
        shown = _shown(before, show), _shown(after, show)
        change = Change(pool, prefix + key, *shown, option.metadata["at_attach"])
        if option.metadata["live"]:
            found.live.append(change)
            taken[option.name] = after
        else:
            found.restart.append(change)
    return _replaced(old, **taken)


def _replaced(section: Any, **changes: object) -> Any:
    """Return a copy of *section* with *changes*; like dataclasses.replace() for any of ours."""
    return type(section)(**{**vars(section), **changes})


def _shown(value: object, kind: Kind) -> str:
    return "-" if value is None else kind.show(value)


def _tenants(pool: PoolConfig) -> str:
    return "; ".join(" ".join(_tenant(tenant)) for tenant in pool.tenants) or "-"


def _tenant(tenant: TenantConfig) -> Iterator[str]:
    for key, option in options(TenantConfig).items():
        value = getattr(tenant, option.name)
        if value is not None:
            yield f"{key}={option.metadata['kind'].show(value)}"
