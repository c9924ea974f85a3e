# SPDX-License-Identifier: Apache-2.0
"""
Custody: where the descriptors of a pool's objects outlive the daemon, whether it is killed,
stopped or upgraded (I7).

systemd's descriptor store where this service has one, else a process of ours that does nothing but
hold them. Both keep open file descriptions, not copies of files: a lock on one stays as it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cenote.shm.paths import check_pool_name

from .custody_base import Custody, CustodyError, NoCustody
from .custody_holder import CUSTODY_SUFFIX, HolderCustody
from .custody_systemd import Environment, SystemdCustody, store_of
from .logs import get_log

log = get_log(__name__)


def open_custody(run_dir: Path, pool: str, environ: Mapping[str, str] | None = None) -> Custody:
    """
    Return the custody of *pool*, whose lock is held: one daemon at a time.

    run_dir: a directory of ours, where the next daemon will look for a holder.

    Raises:
        CustodyError: A holder is there and does not serve us.
        PathError: *pool* is no pool's name.
    """
    check_pool_name(pool)
    environment = Environment.read(os.environ if environ is None else environ)
    if environment.stores(pool):
        _warn_of_holder(run_dir, pool)
        return SystemdCustody(pool, store_of(environment))
    if environment.address:
        log.warning(
            "no_descriptor_store",
            pool=pool,
            remark="systemd ends a holder process together with the service",
            remedy="write FileDescriptorStoreMax=8192 into the unit and, where systemd is older "
            "than 254, Environment=CENOTED_FDSTORE_MAX=8192",
        )
    return HolderCustody(run_dir, pool)


def log_unclaimed(pools: Iterable[str], environ: Mapping[str, str] | None = None) -> list[str]:
    """
    Return, and log, what systemd keeps for pools that are not among *pools*.

    For the daemon when it knows all of its pools: what a pool that is configured no more had is
    memory that nobody can reach.
    """
    environment = Environment.read(os.environ if environ is None else environ)
    served = set(pools)
    names = [n for n in store_of(environment).unclaimed() if n.partition(".")[0] not in served]
    if names:
        log.warning(
            "descriptors_of_other_pools",
            count=len(names),
            pools=sorted({name.partition(".")[0] for name in names}),
            remedy="configure these pools again, or stop the service and "
            "`systemctl clean --what=fdstore` it",
        )
    return names


def _warn_of_holder(run_dir: Path, pool: str) -> None:
    """A daemon that was started without systemd may have left the pool with a holder."""
    path = run_dir / f"{pool}{CUSTODY_SUFFIX}"
    if path.is_socket():
        log.warning(
            "custody_elsewhere",
            pool=pool,
            remark=f"a holder process may have this pool's memory besides: {path}",
            remedy=f"`pkill -f {path}` if it is of no more use",
        )


__all__ = ["Custody", "CustodyError", "NoCustody", "log_unclaimed", "open_custody"]
