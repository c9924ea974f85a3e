# SPDX-License-Identifier: Apache-2.0
"""
What the connector's two halves tell each other, by way of the engine.

Scheduler and workers are processes of one engine; the engine pickles these. Nothing here comes
from anybody else. vLLM's base classes for them are marks without content that it never looks for:
these do without, so that the two halves can be tested without vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from cenote.client.manifest import Value

from .groups import SKIP

Fields: TypeAlias = dict[str, Value]


@dataclass(frozen=True)
class Era:
    """
    What a hash means in this engine: how it is made of tokens.

    Attributes:
        hash_algorithm: The engine's own name for it.
        hash_seed: A digest of what the first block's hash began with.
    """

    hash_algorithm: str
    hash_seed: str

    def fields(self) -> Fields:
        """Return its part of the manifest."""
        return {"hash": self.hash_algorithm, "hash_seed": self.hash_seed}


@dataclass
class WorkerFacts:
    """
    A worker's share of the identity, once its KV cache exists.

    Attributes:
        groups: For each KV cache group the fields of its manifest, but for the era's.
    """

    groups: tuple[Fields, ...]


class ChunkPages(NamedTuple):
    """
    A chunk and where its pages are in the engine.

    Attributes:
        key: 32 bytes.
        group: KV cache group.
        blocks: The engine's block of each of its pages; SKIP for one that is not wanted.
    """

    key: bytes
    group: int
    blocks: tuple[int, ...]


class Load(NamedTuple):
    """
    Chunks to be copied into the engine's blocks for one request.

    Attributes:
        request: Its id.
        chunks: In the order of the prompt, group by group.
        in_step: The forward pass of this very step needs it (layer by layer).
    """

    request: str
    chunks: tuple[ChunkPages, ...]
    in_step: bool

    def blocks(self, first: int = 0) -> set[int]:
        """Return the engine's blocks that its chunks from *first* on are to fill."""
        return {block for pages in self.chunks[first:] for block in pages.blocks if block != SKIP}


class Save(NamedTuple):
    """
    One chunk to be stored.

    Attributes:
        number: Names it in the answer.
        pages: What to store, from where.
        parent: The key that it follows.
        position: Its place in the chain; None: unknown.
        priority: As for `Cache.put`.
        ttl_s: As for `Cache.put`.
    """

    number: int
    pages: ChunkPages
    parent: bytes | None
    position: int | None
    priority: int
    ttl_s: int | None


@dataclass
class StepWork:
    """What the workers have to do with one step of the engine."""

    era: Era
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    idle: bool = False  # nothing is computed in this step


@dataclass
class StepDone:
    """
    What workers have done since they said so last.

    Attributes:
        saved: Saves that are over, by number: how many workers stored their part.
        unsaved: The same for workers that could not.
        failed: Requests whose load failed on some worker.
        in_step: Requests whose load was over with the step that needed it.
    """

    saved: dict[int, int] = field(default_factory=dict)
    unsaved: dict[int, int] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    in_step: set[str] = field(default_factory=set)

    def aggregate(self, other: StepDone) -> StepDone:
        """Return what both say together. vLLM calls it, with one worker's after the other's."""
        return StepDone(
            _summed(self.saved, other.saved),
            _summed(self.unsaved, other.unsaved),
            self.failed | other.failed,
            self.in_step | other.in_step,
        )

    def finished(self) -> Iterable[tuple[int, int, int]]:
        """Yield (number, workers that stored, workers that could not)."""
        for number in self.saved.keys() | self.unsaved.keys():
            yield number, self.saved.get(number, 0), self.unsaved.get(number, 0)

    def __bool__(self) -> bool:
        return bool(self.saved or self.unsaved or self.failed or self.in_step)


def _summed(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    return {number: one.get(number, 0) + other.get(number, 0) for number in one.keys() | other}
