# SPDX-License-Identifier: Apache-2.0
"""What verifying a pool came to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .kinds import EXAMPLES_MAX, KINDS, Finding


@dataclass
class Found:
    """All findings of one kind: how many, and the first of them."""

    kind: str
    count: int = 0
    examples: list[Finding] = field(default_factory=list)


@dataclass
class Report:
    """
    Attributes:
        pool, pool_id: Which pool.
        serving: A daemon serves it; False: nobody does.
        walked: How much was looked at: of each table, of the bytes, and for how long.
        states: Descriptors by state.
        found: What is wrong, by kind.
        left: What can be said of a pool without a daemon only, by name.
        notes: What a reader of this should know besides.
        repaired: Chunks that were dropped because of it; None: that was not asked for.
    """

    pool: str
    pool_id: bytes
    serving: bool
    walked: dict[str, int | float | None] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    found: dict[str, Found] = field(default_factory=dict)
    left: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    repaired: int | None = None

    def add(self, finding: Finding, count: int = 1) -> None:
        """Count a finding, and keep it as an example while there are few."""
        found = self.found.setdefault(finding.kind, Found(finding.kind))
        found.count += count
        if len(found.examples) < EXAMPLES_MAX:
            found.examples.append(finding)

    def count(self, kind: str) -> int:
        """How often was a kind of thing found?"""
        return self.found[kind].count if kind in self.found else 0

    def heals(self, kind: str) -> bool:
        """Is it what a daemon leaves that dies, and the next one puts right?"""
        return not self.serving and KINDS[kind].healed

    @property
    def wrong(self) -> int:
        """How many things are wrong with the pool; what the next daemon heals is not."""
        return sum(found.count for found in self.found.values() if not self.heals(found.kind))

    @property
    def blocked(self) -> bool:
        """Would the next daemon refuse to take this pool over?"""
        return any(KINDS[kind].blocks for kind in self.found)
