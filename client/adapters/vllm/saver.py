# SPDX-License-Identifier: Apache-2.0
"""
From the engine's pages into the pool: a chunk at a time, whole or layer by layer.

A copying thread waits for room, no request does, and only for a moment: a session's first extents
come when it first asks for one. What does not fit is not cached, and is counted. So is what meets
an error of any kind: a save that is not answered would keep the engine's blocks for ever.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cenote.client.errors import CenoteError

from .memory import Memory
from .messages import Era, Save
from .settings import LOGGER
from .stats import Stats

if TYPE_CHECKING:
    from cenote.client import Put

log = logging.getLogger(LOGGER)

SAVE_WAIT_MS: Final = 1000  # on a busy host the keeper runs late; after a failure none waits


@dataclass
class Open:
    """A chunk that is being stored layer by layer."""

    save: Save
    put: Put | None  # None: there is nothing to store, or nowhere
    stored: bool  # what to report when nothing was to be stored
    filled: set[str] = field(default_factory=set)  # layers


class Saver:
    """
    Saves for one worker, from one thread.

    Args:
        memory: Where from and where to.
        stats: What is counted.
    """

    def __init__(self, memory: Memory, stats: Stats) -> None:
        self._memory: Final = memory
        self._stats: Final = stats
        self._told: Final[set[str]] = set()
        self._open: list[Open] = []
        self._wait_ms = SAVE_WAIT_MS

    def save(self, era: Era, save: Save, ready: Any) -> bool:
        """
        Store a chunk whose pages are good once *ready* has come to pass.

        Returns:
            Is it in the pool now? Also when somebody else had stored it.
        """
        layout = self._memory.layouts[save.pages.group]
        started_s = time.perf_counter()
        try:
            put, stored = self._reserved(era, save)
            if put is None:
                return stored
            with put:
                self._memory.copier.save(put, layout.pieces(save.pages.blocks), ready)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is answered
            return self._not_saved(error)
        self._stats.add(
            saves=1, saved_bytes=layout.nbytes, save_seconds=time.perf_counter() - started_s
        )
        return True

    # ---- layer by layer --------------------------------------------------------------------------

    def begin(self, era: Era, saves: Sequence[Save]) -> None:
        """Reserve what a step's layers will fill."""
        for save in saves:
            try:
                put, stored = self._reserved(era, save)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is answered
                put, stored = None, self._not_saved(error)
            self._open.append(Open(save, put, stored))

    def layer(self, layer: str, ready: Any) -> None:
        """Copy a layer's pages into the open chunks."""
        for one in self._open:
            if one.put is None:
                continue
            layout = self._memory.layouts[one.save.pages.group]
            runs = (layout.by_layer or {}).get(layer)
            if runs is None:
                continue
            started_s = time.perf_counter()
            try:
                pieces = layout.pieces(one.save.pages.blocks, runs)
                self._memory.copier.save(one.put, pieces, ready)
                one.filled.add(layer)
            except Exception as error:  # noqa: BLE001  # whatever it is, it is answered
                one.put.abort()
                one.put, one.stored = None, self._not_saved(error)
            self._stats.add(save_seconds=time.perf_counter() - started_s)

    def end(self) -> list[tuple[Save, bool]]:
        """Commit what begin() reserved. Returns each save, and whether it is in the pool."""
        opened, self._open = self._open, []
        return [(one.save, self._committed(one)) for one in opened]

    def _committed(self, one: Open) -> bool:
        if one.put is None:
            return one.stored
        try:
            by_layer = self._memory.layouts[one.save.pages.group].by_layer or {}
            missing = [layer for layer in by_layer if layer not in one.filled]
            if missing or not by_layer:  # the engine skipped them: no byte may be stale
                raise CenoteError(f"of {len(by_layer)} layers {', '.join(missing)} were not given")
            one.put.commit()
        except Exception as error:  # noqa: BLE001  # whatever it is, it is answered
            one.put.abort()  # nothing is to be done where commit() has done it
            return self._not_saved(error)
        self._stats.add(saves=1, saved_bytes=one.put.nbytes)
        return True

    # ---- both ------------------------------------------------------------------------------------

    def _reserved(self, era: Era, save: Save) -> tuple[Put | None, bool]:
        """Return (memory for a chunk, None) or (None, is it in the pool already?)."""
        group = save.pages.group
        if not self._memory.stores[group]:
            return None, True
        cache = self._memory.cache(era, group)
        if cache is None:
            return None, False
        if cache.match(save.pages.key):
            self._stats.add(duplicate_saves=1)
            return None, True
        put = cache.put(
            save.pages.key,
            self._memory.layouts[group].nbytes,
            save.parent,
            position=save.position,
            priority=save.priority,
            ttl_s=save.ttl_s,
            wait_ms=self._wait_ms,
        )
        self._wait_ms = SAVE_WAIT_MS
        return put, False

    def _not_saved(self, error: Exception) -> bool:
        self._wait_ms = 0  # until there is room: saves that wait hold the engine's blocks
        self._stats.add(failed_saves=1)
        name = type(error).__name__
        if name not in self._told:
            self._told.add(name)
            log.warning("cenote: a chunk is not saved, it will be computed again: %s", error)
            if not isinstance(error, (CenoteError, OSError)):
                log.warning("cenote: please report this", exc_info=error)
        return False
