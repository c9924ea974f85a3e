# SPDX-License-Identifier: Apache-2.0
"""
What was said to be in the pool, and is taken back when the pool's own feed says that it went.

Where the feed was overwritten before it was read, what was announced is looked up again.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cenote.client import Gap
from cenote.client.errors import CenoteError

from .settings import LOGGER

if TYPE_CHECKING:
    from cenote.client import Event, Pool

log = logging.getLogger(LOGGER)

ANNOUNCED_MAX: Final = 1 << 18  # chunks
LOOKS_MAX: Final = 64  # for a chunk that was stored and cannot be seen


@dataclass
class Unsure:
    """What is to be announced once it is seen in the pool."""

    saying: Any
    kept: Any
    looks: int = 0


class Announced:
    """
    What was announced, and what is to be said. The scheduler's thread and the follower's share it.

    Args:
        is_there: Is what a tag names in the pool? May raise a CenoteError: then it is not.
        tag_of: The tag of what an event of the pool is about; None: of nothing of ours.
        withdrawal: Makes of what was kept with a tag what says that it is gone.
    """

    def __init__(
        self,
        is_there: Callable[[Any], bool],
        tag_of: Callable[[Event], Hashable | None],
        withdrawal: Callable[[Any], Any],
    ) -> None:
        self._looked_for: Final = is_there
        self._tag_of: Final = tag_of
        self._withdrawal: Final = withdrawal
        self._announced: Final[OrderedDict[Hashable, Any]] = OrderedDict()
        self._unsure: dict[Hashable, Unsure] = {}
        self._said: list[Any] = []
        self._lock: Final = threading.Lock()

    # ---- the scheduler's thread ------------------------------------------------------------------

    def knows(self, tag: Hashable) -> bool:
        """Was it announced, or is it about to be?"""
        with self._lock:  # the follower may withdraw it between the look and the move
            if tag in self._announced:
                self._announced.move_to_end(tag)
                return True
        return tag in self._unsure

    def offer(self, tag: Hashable, saying: Any, kept: Any) -> None:
        """
        Note what can be had; take() says so once it is seen there.

        Args:
            tag: What names it.
            saying: What is said then.
            kept: What its withdrawal is made of.
        """
        self._unsure[tag] = Unsure(saying, kept)

    def take(self) -> list[Any]:
        """Return what is to be published."""
        for tag, unsure in list(self._unsure.items()):
            self._confirm(tag, unsure)
        if not self._said:
            return []
        with self._lock:
            said, self._said = self._said, []
        return said

    def _confirm(self, tag: Hashable, unsure: Unsure) -> None:
        """
        Announce what is there.

        First announced, then looked for: what leaves before the look is seen by the look, what
        leaves after it by the follower, which finds it announced. What the follower took back in
        between is looked for again: it may have been told of an earlier chunk of that key.
        """
        with self._lock:
            self._announced[tag] = unsure.kept
        there = self._is_there(tag)
        with self._lock:
            if there and tag in self._announced:
                del self._unsure[tag]
                self._said.append(unsure.saying)
                while len(self._announced) > ANNOUNCED_MAX:
                    self._withdraw(next(iter(self._announced)))
                return
            self._announced.pop(tag, None)
        unsure.looks += 1  # the daemon links what was committed a moment later
        if unsure.looks >= LOOKS_MAX:
            del self._unsure[tag]

    def begin_anew(self) -> None:
        """Withdraw all that was announced, and announce nothing that was offered before."""
        self._unsure.clear()
        self.forget()

    # ---- both threads ----------------------------------------------------------------------------

    def forget(self) -> None:
        """Withdraw all that was announced."""
        with self._lock:
            for tag in list(self._announced):
                self._withdraw(tag)

    def _withdraw(self, tag: Hashable) -> None:
        """Say that it is gone, if it was said to be there; the lock is held."""
        kept = self._announced.pop(tag, None)
        if kept is not None and tag not in self._unsure:
            self._said.append(self._withdrawal(kept))

    # ---- the follower's thread -------------------------------------------------------------------

    def follow(self, pool: Pool) -> None:
        """
        Follow a pool's feed from this call on; it ends when the pool is closed.

        The place is taken here: what leaves before the thread runs may be announced already.
        """
        feed = pool.events()
        threading.Thread(
            target=self._follow, args=(feed,), name="cenote events", daemon=True
        ).start()

    def _follow(self, feed: Iterable[Event | Gap]) -> None:
        try:
            for event in feed:
                self._take_in(event)
        except CenoteError as error:
            log.info("cenote: the pool's events end: %s", error)
            self.forget()

    def _take_in(self, event: Event | Gap) -> None:
        if isinstance(event, Gap) or event.kind == "cleared":
            self._look_again()
        elif event.kind in {"evicted", "deleted"}:
            tag = self._tag_of(event)
            with self._lock:
                self._withdraw(tag)

    def _look_again(self) -> None:
        """Withdraw everything that is not there any more."""
        with self._lock:
            tags = list(self._announced)
        gone = [tag for tag in tags if not self._is_there(tag)]
        with self._lock:
            for tag in gone:
                self._withdraw(tag)

    def _is_there(self, tag: Hashable) -> bool:
        try:
            return self._looked_for(tag)
        except CenoteError:
            return False
