# SPDX-License-Identifier: Apache-2.0
"""
A session that was opened for a client, until its descriptors are sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .session import Welcome
from .wire import close_all


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
