# SPDX-License-Identifier: Apache-2.0
"""What custody is, for those who ask for it and for those who provide it. See custody.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from cenote.shm.custody import Custody as PoolCustody
from cenote.shm.custody import Nowhere
from cenote.shm.errors import CenoteError

from .holder import KEPT_MAX, NAME


class CustodyError(CenoteError):
    """Descriptors could not be kept or given back; the text has the remedy."""


class Custody(PoolCustody, Protocol):
    """
    Where the descriptors of one pool outlive its daemon (I7). Not for several threads at once.

    A name stands for one descriptor; what is kept under it again replaces it. Give each name an
    open file description of its own: systemd keeps a description once, under its first name.
    """

    @property
    def where(self) -> str:
        """Where it is, for people."""

    @property
    def freed_by(self) -> str:
        """How a person frees what is kept while no daemon runs."""

    def keep(self, fds: Mapping[str, int]) -> None:
        """
        Return when all are kept under their names. The caller keeps its own copies.

        With nothing to keep it makes sure, where that can be known, that what is kept is still so.

        Raises:
            CustodyError: Some are kept and some are not: drop() all of them.
        """

    def drop(self, names: Iterable[str]) -> None:
        """Forget, in the order of the calls; unknown names are no error. Raises nothing."""

    def left(self) -> dict[str, int]:
        """
        Return what a predecessor left: copies that belong to the caller. Kept it stays.

        Called once, before the first keep().

        Raises:
            CustodyError: It is there and cannot be had; nothing of it is changed.
        """

    def close(self) -> None:
        """Close our end only; what is kept stays kept. Idempotent."""

    def dissolve(self) -> None:
        """Forget everything and end the holder, if there is one. Raises nothing."""


class NoCustody(Nowhere):
    """Nothing outlives the daemon (--ephemeral)."""

    where = "nowhere"
    freed_by = "`cenoted --drop`"  # what has names, if anything

    def left(self) -> dict[str, int]:
        """Nothing is."""
        return {}

    def close(self) -> None:
        """Do nothing."""

    def dissolve(self) -> None:
        """Do nothing."""


def check_keep(pool: str, kept: Iterable[str], fds: Mapping[str, int]) -> None:
    """Raise CustodyError unless *fds* have names and fit in besides what is *kept* (I10)."""
    for name in fds:
        if not NAME.fullmatch(name):
            raise CustodyError(
                f"pool {pool!r}: {name[:80]!r} is no name for custody: use 1 to 64 of a-z, 0-9, "
                "'.' and '-'"
            )
    wanted = len(set(kept) | set(fds))
    if wanted > KEPT_MAX:
        raise CustodyError(
            f"pool {pool!r}: {wanted} descriptors would be in custody, and {KEPT_MAX} may be: "
            "end some of the pool's sessions, or serve them with a second pool"
        )
