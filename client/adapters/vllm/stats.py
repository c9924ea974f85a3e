# SPDX-License-Identifier: Apache-2.0
"""What the connector counts, in both of its halves."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Final, TypeAlias

Counts: TypeAlias = dict[str, float]

# name of a counter: what it counts. The names are those of the Prometheus metrics, too.
COUNTERS: Final = {
    "lookups": "Requests that were looked up in the pool",
    "asked_tokens": "Tokens of these requests that the engine did not hold itself",
    "hit_tokens": "Of them, tokens that were offered to the engine from the pool",
    "unattached_lookups": "Requests that were not looked up, for no pool was attached yet",
    "scheduler_seconds": "Time that lookups and plans took in the engine's scheduler",
    "loads": "Requests for which something was loaded",
    "loaded_bytes": "Bytes copied from the pool into the engine's KV cache",
    "load_seconds": "Time that a copying thread spent loading",
    "failed_loads": "Requests that were computed because their load failed",
    "damaged_chunks": "Chunks whose bytes differed from their checksum, dropped from the pool",
    "saves": "Chunks stored in the pool",
    "saved_bytes": "Bytes copied from the engine's KV cache into the pool",
    "save_seconds": "Time that a copying thread spent storing",
    "duplicate_saves": "Chunks that somebody else had stored already",
    "failed_saves": "Chunks that were to be stored and could not be: pool full, or lost on the way",
}


class Stats:
    """Counters that any thread adds to, and one takes."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        """Add to counters of COUNTERS."""
        with self._lock:
            self._counts.update(amounts)

    def take(self) -> Counts:
        """Return what was added since the last call; empty when nothing was."""
        if not self._counts:
            return {}
        with self._lock:
            taken, self._counts = self._counts, Counter()
        return {name: float(amount) for name, amount in taken.items()}
