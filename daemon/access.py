# SPDX-License-Identifier: Apache-2.0
"""
Who may do what in a pool, and as which tenant: from the kernel's credentials to a role (I8).

Pure but for the salt files, which are read once when the table is made.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from cenote.shm.identity import Peer
from cenote.shm.messages import ROLES
from cenote.shm.wire import Refusal

from .config import PoolConfig, Role, TenantConfig
from .config_host import SaltError, read_salt


@dataclass(frozen=True)
class Tenant:
    """What a client's namespaces are made with. An empty salt means shared with everybody."""

    salt: bytes
    quota_bytes: int


class AccessTable:
    """
    The access rules of one pool.

    Raises:
        SaltError: A salt file cannot be used; the text names it.
    """

    def __init__(self, pool: PoolConfig) -> None:
        self._pool = pool
        self._salts = {tenant: _salt_of(tenant) for tenant in pool.tenants}

    def role_of(self, peer: Peer, asked: str | None) -> str:
        """
        Return the role that *peer* gets: what it *asked* for, or the best it may have up to writer.

        Raises:
            Refusal: "access", with who it is and where that is configured.
        """
        best = self._pool.access.role_of(peer.uid, peer.gids)
        if best is None:
            raise Refusal(
                "access",
                f"uid {peer.uid} may not attach to pool {self._pool.name!r}: add the user to "
                "readers or writers in its [pool.access] and reload the daemon (SIGHUP)",
                {"uid": peer.uid},
            )
        granted = min(int(best), ROLES["writer"]) if asked is None else ROLES[asked]
        if granted <= best:
            return next(name for name, number in ROLES.items() if number == granted)
        raise Refusal(
            "access",
            f"uid {peer.uid} may be {best.name.lower()} of pool {self._pool.name!r}, not {asked}: "
            f"ask for less, or have the user added to {asked}s in [pool.access]",
            {"uid": peer.uid, "allowed": best.name.lower()},
        )

    def still_allows(self, peer: Peer, role: str) -> bool:
        """Whether *peer* could have *role* by these rules."""
        try:
            self.role_of(peer, role)
        except Refusal:
            return False
        return True

    def remaining(self, peer: Peer, role: str) -> str:
        """Return what is left of *role* by these rules; whoever may nothing still reads (I6)."""
        best = self._pool.access.role_of(peer.uid, peer.gids) or Role.READER
        number = min(ROLES[role], int(best))
        return next(name for name in ROLES if ROLES[name] == number)

    def tenant_of(self, peer: Peer) -> Tenant:
        """Return with which salt and quota the namespaces of *peer* are made."""
        tenant = self._pool.tenant_of(peer.uid, peer.gids)
        salt = b"" if tenant is None else self._salts[tenant]
        return Tenant(salt, self._pool.quota_of(tenant))

    def others_may_connect(self) -> bool:
        """Whether anybody but the daemon's own user is named: then the socket must admit them."""
        access = self._pool.access
        named = (*access.readers, *access.writers, *access.admins)
        return any(p.kind == "group" or p.number != os.geteuid() for p in named)


def _salt_of(tenant: TenantConfig) -> bytes:
    return read_salt(tenant.salt_file, os.geteuid()) if tenant.salt_file else b""


__all__ = ["AccessTable", "SaltError", "Tenant"]
