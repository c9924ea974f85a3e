# SPDX-License-Identifier: Apache-2.0
"""
Where descriptors survive the daemon: what a pool asks of it, and how a pool names what it keeps.

    <16 hex digits of the pool id>.catalog, .r0, .r1 ...      objects that have no name elsewhere
    <16 hex digits of the pool id>.s<index>.<nonce>           a session: its segment
    ....bell, ....pid                                         its doorbell, and its process

The custody itself (systemd's descriptor store, or a holder process) is the daemon's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

CATALOG: Final = "catalog"
_SESSION: Final = re.compile(r"s([0-9]{1,4})\.([0-9]{1,20})(?:\.(bell|pid))?", re.ASCII)


class Custody(Protocol):
    """Keeps descriptors under names for the next daemon of this pool."""

    def keep(self, fds: Mapping[str, int], /) -> None:
        """Return when they are kept; the caller has its own still. Raises CenoteError, OSError."""

    def drop(self, names: Iterable[str], /) -> None:
        """Forget some. Unknown names are no error."""


class Nowhere:
    """For a pool that ends with its process."""

    def keep(self, fds: Mapping[str, int], /) -> None:
        """Keep nothing."""

    def drop(self, names: Iterable[str], /) -> None:
        """Have nothing to forget."""


@dataclass
class KeptSession:
    """The descriptors of one session. -1: there is none."""

    session: int
    nonce: int
    segment: int = -1
    bell: int = -1
    pid: int = -1

    def names(self, pool_id: bytes) -> dict[str, int]:
        """Return each descriptor that is there, under its name."""
        base = name_in(pool_id, f"s{self.session}.{self.nonce}")
        named = {base: self.segment, f"{base}.bell": self.bell, f"{base}.pid": self.pid}
        return {name: fd for name, fd in named.items() if fd >= 0}


def name_in(pool_id: bytes, part: str) -> str:
    """Return the name of a part of a pool."""
    return f"{pool_id.hex()[:16]}.{part}"


def parts_of(kept: Mapping[str, int], pool_id: bytes) -> dict[str, int]:
    """Return what is kept of one pool, by part."""
    prefix = name_in(pool_id, "")
    return {name[len(prefix) :]: fd for name, fd in kept.items() if name.startswith(prefix)}


def session_names(pool_id: bytes, session: int, nonce: int) -> list[str]:
    """Return all names that a session's descriptors may have."""
    return list(KeptSession(session, nonce, 0, 0, 0).names(pool_id))


def sessions_in(parts: Mapping[str, int]) -> list[KeptSession]:
    """Return the sessions among the parts of one pool."""
    found: dict[tuple[int, int], KeptSession] = {}
    for name, fd in parts.items():
        parsed = _SESSION.fullmatch(name)
        if parsed is None:
            continue
        key = int(parsed[1]), int(parsed[2])
        one = found.setdefault(key, KeptSession(*key))
        setattr(one, parsed[3] or "segment", fd)
    return list(found.values())
