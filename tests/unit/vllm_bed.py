# SPDX-License-Identifier: Apache-2.0
"""An engine without vLLM: what the connector's scheduler half reads of it, over a real pool."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cenote.client import Cache, Manifest, Pool
from cenote.client.adapters.vllm.groups import Group, Shape
from cenote.client.adapters.vllm.identity import manifest_of
from cenote.client.adapters.vllm.lookup import Lookup
from cenote.client.adapters.vllm.messages import Era, StepDone, StepWork
from cenote.client.adapters.vllm.scheduler import Scheduler
from cenote.client.adapters.vllm.settings import Settings

BLOCK = 4
CHUNK = 8
NBYTES = 512
ERA = Era("sha256", "seed")
FULL = Group(0, BLOCK, 0, ("a",))
WINDOW = Group(1, BLOCK, CHUNK, ("b",))


@dataclass(eq=False)
class Block:
    """vLLM's KVCacheBlock."""

    block_id: int
    ref_cnt: int = 0
    is_null: bool = False


class BlockPool:
    """vLLM's, with its counts checked."""

    def __init__(self, count: int) -> None:
        self.blocks = [Block(i, is_null=i == 0) for i in range(count)]

    def touch(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            assert block.ref_cnt > 0, "a block is let go that nobody holds"
            block.ref_cnt -= 1

    def take(self) -> Block:
        found = next(each for each in self.blocks if not each.ref_cnt and not each.is_null)
        found.ref_cnt = 1
        return found

    @property
    def references(self) -> int:
        return sum(block.ref_cnt for block in self.blocks)


@dataclass(eq=False)
class Request:
    """vLLM's, with a prompt that begins as every one of the same name."""

    request_id: str
    num_tokens: int
    block_hashes: Sequence[bytes]
    kv_transfer_params: Any = None
    skip_reading_prefix_cache: bool = False


class Blocks(NamedTuple):
    """vLLM's KVCacheBlocks."""

    blocks: Sequence[Sequence[Block]]


@dataclass
class New:
    req_id: str
    num_computed_tokens: int


@dataclass
class Cached:
    req_ids: list[str] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)


@dataclass
class Tables:
    """Resolves a request's blocks as they are in this step."""

    of: Mapping[str, Sequence[Sequence[int]]]

    def get_block_ids(self, name: str) -> Sequence[Sequence[int]] | None:
        return self.of.get(name)


@dataclass
class Step:
    """vLLM's SchedulerOutput."""

    num_scheduled_tokens: Mapping[str, int]
    scheduled_new_reqs: list[New]
    scheduled_cached_reqs: Cached
    kv_connector_block_state: Tables | None

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


class Attached:
    """A way to a pool that is there already."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.caches: dict[Manifest, Cache] = {}

    @property
    def storing(self) -> bool:
        return self.pool.connected and self.pool.role != "reader"

    def want(self, manifests: Sequence[Manifest]) -> None:
        for manifest in manifests:
            self.open(manifest)

    def open(self, manifest: Manifest) -> Cache:
        if manifest not in self.caches:
            self.caches[manifest] = self.pool.namespace(manifest)
        return self.caches[manifest]

    def cache(self, manifest: Manifest) -> Cache | None:
        return self.caches.get(manifest)


def hash_of(prompt: str, block: int) -> bytes:
    return hashlib.sha256(f"{prompt}/{block}".encode()).digest()


class Bed:
    """
    An engine's scheduler around ours.

    Args:
        pool: The connector's session; what others store is stored by it, too.
        groups: KV cache groups.
        workers: Each has a namespace for every group.
        given: Settings.
        options: Of Scheduler.
    """

    def __init__(
        self,
        pool: Pool,
        groups: Sequence[Group] = (FULL,),
        *,
        workers: int = 2,
        given: Mapping[str, Any] | None = None,
        blocks: int = 400,
        **options: Any,
    ) -> None:
        self.pool = pool
        self.shape = Shape.of(groups, BLOCK, CHUNK)
        self.attached = Attached(pool)
        way: Any = self.attached
        settings = Settings.parse(dict(given or {}))
        self.lookup = Lookup(self.shape, way)
        self.scheduler = Scheduler(
            settings, self.shape, self.lookup, ERA, workers=workers, **options
        )
        self.facts = {(0, rank): tuple(map(self._fields, groups, [rank] * 9)) for rank in range(2)}
        self.facts = {place: self.facts[place] for place in list(self.facts)[:workers]}
        self.scheduler.know_workers(self.facts)  # type: ignore[arg-type]
        self.blocks = BlockPool(blocks)
        self.scheduler.know_blocks(self.blocks)
        self.tables: dict[str, list[list[Block]]] = {}
        self.computed: dict[str, int] = {}
        self._stepped: set[str] = set()

    def _fields(self, group: Group, rank: int) -> dict[str, str | int]:
        return {
            "model": "m",
            "layout": "l",
            "dtype": "uint8",
            "group": group.index,
            "tp_rank": rank,
        }

    # ---- the pool ------------------------------------------------------------------------------

    def caches(self, group: int = 0) -> list[Cache]:
        """Return a group's, of all ranks."""
        return [
            self.attached.open(manifest_of(fields[group], ERA, CHUNK))
            for fields in self.facts.values()
        ]

    def key(self, prompt: str, chunk: int) -> bytes:
        return hash_of(prompt, (chunk + 1) * (CHUNK // BLOCK) - 1)

    def own_key(self, prompt: str, chunk: int) -> bytes:
        """Return what this engine calls a chunk, since somebody reset it."""
        return self.lookup.keys.of(self.key(prompt, chunk))

    def store(
        self, prompt: str, chunks: Iterable[int], group: int | None = None, *, own: bool = False
    ) -> None:
        """Have chunks stored by others or under this engine's own keys, of all ranks and groups."""
        name = self.own_key if own else self.key
        chosen = range(len(self.shape.groups)) if group is None else (group,)
        wanted = list(chunks)
        for cache in (each for index in chosen for each in self.caches(index)):
            for chunk in wanted:
                with cache.put(name(prompt, chunk), NBYTES) as put:
                    put.copy_from(bytes(NBYTES))
            cache.flush()

    # ---- requests ------------------------------------------------------------------------------

    def request(
        self,
        name: str,
        tokens: int,
        prompt: str = "p",
        *,
        skip_reading: bool = False,
        **wishes: Any,
    ) -> Request:
        hashes = [hash_of(prompt, i) for i in range(tokens // BLOCK)]
        params = {f"cenote.{key}": value for key, value in wishes.items()} or None
        return Request(name, tokens, hashes, params, skip_reading)

    def place(self, request: Request, computed: int, loaded: int) -> None:
        """Give a request blocks for what it has and loads, as vLLM does, and say so."""
        self._grow(request.request_id, computed + loaded)
        self.computed[request.request_id] = computed + loaded
        table = Blocks(self.tables[request.request_id])
        self.scheduler.placed(request, table, loaded)

    def _grow(self, name: str, tokens: int) -> None:
        tables = self.tables.setdefault(name, [[] for _ in self.shape.groups])
        for table in tables:
            while len(table) * BLOCK < tokens:
                table.append(self.blocks.take())

    def matched_and_placed(self, request: Request, computed: int = 0) -> int:
        tokens = self.scheduler.matched(request, computed)
        self.place(request, computed, tokens)
        return tokens

    def forget(self, request: Request) -> None:
        """The request is over: its blocks go, but for those that others hold."""
        self.scheduler.finished(request)
        for table in self.tables.pop(request.request_id, []):
            self.blocks.free_blocks(reversed([each for each in table if not each.is_null]))
        self.computed.pop(request.request_id, None)
        self._stepped.discard(request.request_id)

    def null(self, request: Request, group: int, places: Iterable[int]) -> None:
        """Let go of blocks that a window has left behind."""
        table = self.tables[request.request_id][group]
        for place in places:
            self.blocks.free_blocks([table[place]])
            table[place] = self.blocks.blocks[0]

    # ---- steps ---------------------------------------------------------------------------------

    def work(self, scheduled: Mapping[str, int] | None = None, *, state: bool = True) -> StepWork:
        """Compute so many tokens of each request in a step."""
        scheduled = scheduled or {}
        new, cached = [], Cached()
        for name, tokens in scheduled.items():
            before = self.computed.get(name, 0)
            if name in self._stepped:
                cached.req_ids.append(name)
                cached.num_computed_tokens.append(before)
            else:
                new.append(New(name, before))
                self._stepped.add(name)
            self._grow(name, before + tokens)
            self.computed[name] = before + tokens
        resolved = {
            name: [[block.block_id for block in table] for table in tables]
            for name, tables in self.tables.items()
        }
        tables = Tables(resolved) if state else None
        return self.scheduler.work(Step(scheduled, new, cached, tables))

    def saved(self, work: StepWork, workers: int = 2, failed: int = 0) -> None:
        """All of a step's saves are over."""
        numbers = [save.number for save in work.saves]
        self.scheduler.done(
            (),
            StepDone(
                saved=dict.fromkeys(numbers, workers - failed),
                unsaved=dict.fromkeys(numbers, failed),
            ),
        )

    @property
    def saving_references(self) -> int:
        """References to blocks beyond those of the requests."""
        held = sum(
            not block.is_null for tables in self.tables.values() for t in tables for block in t
        )
        return self.blocks.references - held
