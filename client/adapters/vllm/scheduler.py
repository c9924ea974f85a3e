# SPDX-License-Identifier: Apache-2.0
"""
The scheduler's half: what is loaded for which request, what is stored, and what that keeps alive.

Order of one request: matched() leases what the pool has beyond the engine's own prefix; placed()
knows the blocks and plans the load; work() hands plans to the workers, once a step, and plans the
chunks that this step completes; done() hears how it ended and lets go. Blocks that are being stored
are referenced like those of a request, so that the engine cannot use them again before.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from cenote.client.errors import CenoteError

from .groups import SKIP, Group, Shape
from .lookup import Held, Lookup
from .messages import ChunkPages, Era, Fields, Load, Save, StepDone, StepWork
from .settings import LOGGER, Settings, Wishes
from .stats import Stats

log = logging.getLogger(LOGGER)

ASKED_MAX: Final = 1 << 16  # hashes remembered for save = "reused"
SAVING_SHARE: Final = 2  # at most one block in so many waits to be stored


class Request(Protocol):
    """What is used of vLLM's Request."""

    request_id: str
    num_tokens: int
    block_hashes: Sequence[bytes]
    kv_transfer_params: Any
    skip_reading_prefix_cache: bool


class Announcer(Protocol):
    """Who tells routers what the pool has; see events.py."""

    def available(self, request: Any, chunks: Iterable[int]) -> None:
        """Chunks of a request can be had from the pool now."""


@dataclass
class Tracked:
    """A request that the engine has not finished."""

    request: Request
    wishes: Wishes
    reused: frozenset[bytes]  # hashes of chunks that an earlier one asked for (save = "reused")
    held: Held | None = None
    computed: int = 0  # tokens that the engine held when the pool was asked
    loading: bool = False  # its load was handed to the workers
    failed: bool = False  # a load of it failed: nothing is offered to it again
    next_save: int = 0  # number of the first chunk not looked at for saving
    due: int = 0  # below so many computed tokens there is nothing to look at for saving
    outdated: bool = False  # its blocks may be from before a reset: what rests on them is not saved


class ChunkAt(NamedTuple):
    """One group's share of a chunk."""

    group: Group
    number: int
    key: bytes
    parent: bytes | None


@dataclass
class Saving:
    """A chunk on its way into the pool, and what the workers have answered."""

    request: Request
    chunk: int
    group: int
    key: bytes
    blocks: list[Any]
    stored: int = 0
    failed: int = 0
    outdated: bool = False  # somebody reset since it was begun: nobody here finds it any more


class Scheduler:
    """
    The connector in the engine's scheduler. One thread calls it.

    Args:
        settings: The operator's.
        shape: How tokens become chunks.
        lookup: The engine's namespaces.
        era: What hashes mean.
        workers: How many there are.
        drop_tokens: Tokens before a hit's end that are computed again (speculative decoding).
        loads: Is this engine to load (kv_role)?
        saves: Is it to store?
    """

    def __init__(
        self,
        settings: Settings,
        shape: Shape,
        lookup: Lookup,
        era: Era,
        *,
        workers: int,
        drop_tokens: int = 0,
        loads: bool = True,
        saves: bool = True,
    ) -> None:
        self._settings: Final = settings
        self._shape: Final = shape
        self._lookup: Final = lookup
        self._era: Final = era
        self._workers: Final = workers
        self._drop_tokens: Final = drop_tokens
        self._loads_at_all: Final = loads
        self._saves_at_all: Final = saves and settings.save != "none"
        self._blocks: Any = None  # vLLM's BlockPool
        self._announcer: Announcer | None = None
        self._tracked: dict[str, Tracked] = {}
        self._unplaced: dict[str, Tracked] = {}  # matched in this step, not placed yet
        self._loads: list[Load] = []
        self._loading_in_step: set[str] = set()
        self._orphans: dict[str, Held] = {}  # of requests that finished while they were loaded
        self._saving: dict[int, Saving] = {}
        self._saving_keys: set[tuple[int, bytes]] = set()
        self._saves = 0
        self._saving_blocks = 0
        self._asked: OrderedDict[bytes, None] = OrderedDict()
        self.stats: Final = Stats()

    # ---- the engine's parts ----------------------------------------------------------------------

    def know_workers(self, facts: dict[tuple[int, int], Sequence[Fields]]) -> None:
        """Be told what each worker's bytes depend on."""
        self._lookup.know(facts.values(), self._era)

    def know_blocks(self, blocks: Any) -> None:
        """Be given the engine's block pool."""
        self._blocks = blocks

    def announce_by(self, announcer: Announcer) -> None:
        """Tell somebody what becomes available."""
        self._announcer = announcer

    # ---- loading ---------------------------------------------------------------------------------

    def matched(self, request: Request, computed: int) -> int:
        """
        Return how many tokens beyond the first *computed* can be loaded, and lease them.

        Asked again for the same request, it looks again.
        """
        tracked = self._track(request)
        self._let_go(tracked)
        if tracked.loading:
            return 0
        tracked.outdated = False  # it has no blocks but those that the engine's own cache gives it
        if tracked.failed or request.skip_reading_prefix_cache:
            return 0
        if not self._loads_at_all or not self._lookup.ready:
            if self._loads_at_all:
                self.stats.add(unattached_lookups=1)
            return 0
        started_s = time.perf_counter()
        tokens = self._hit(tracked, computed)
        self.stats.add(
            lookups=1,
            asked_tokens=max(0, request.num_tokens - computed),
            hit_tokens=tokens,
            scheduler_seconds=time.perf_counter() - started_s,
        )
        return tokens

    def _hit(self, tracked: Tracked, computed: int) -> int:
        request, shape = tracked.request, self._shape
        first = computed // shape.chunk_tokens
        end = self._loadable(tracked, computed)
        if end <= first:
            return 0
        try:
            held = self._lookup.hit(request.block_hashes, first, end)
        except CenoteError as error:
            log.warning("cenote: the pool cannot be looked at: %s", error)
            return 0
        if held is None:
            return 0
        tokens = self._offered(request, held) - computed
        if tokens < (self._settings.min_load_tokens or shape.chunk_tokens - self._drop_tokens):
            held.release()
            return 0
        tracked.held, tracked.computed = held, computed
        self._unplaced[request.request_id] = tracked
        return tokens

    def _loadable(self, tracked: Tracked, computed: int) -> int:
        """Return one behind the last chunk that may be loaded."""
        request, shape = tracked.request, self._shape
        tokens = request.num_tokens
        if any(group.window for group in shape.groups):
            # The engine drops blocks by where computing goes on: were that one token before the
            # hit's end, the first block of that token's window could be gone already.
            tokens -= 1
        if tracked.wishes.max_load_tokens is not None:
            tokens = min(tokens, computed + tracked.wishes.max_load_tokens)
        return min(tokens // shape.chunk_tokens, shape.hashed_chunks(request.block_hashes))

    def _offered(self, request: Request, held: Held) -> int:
        """Return where a hit ends, in tokens. A load within a step leaves one to be computed."""
        end = held.end * self._shape.chunk_tokens - self._drop_tokens
        return min(end, request.num_tokens - 1) if self._in_step else end

    @property
    def _in_step(self) -> bool:
        return self._settings.transfer == "layers"

    def placed(self, request: Request, blocks: Any, tokens: int) -> None:
        """
        Be told in which blocks a request lies, and plan its load.

        Args:
            request: It.
            blocks: vLLM's KVCacheBlocks, all of the request.
            tokens: How many are to be loaded; 0: none.
        """
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.held is None or tracked.loading:
            return
        self._unplaced.pop(request.request_id, None)
        if tokens == 0:
            self._let_go(tracked)
            return
        started_s = time.perf_counter()
        span = range(tracked.computed, tracked.computed + tokens)
        chunks = tuple(self._planned(tracked.held, blocks.blocks, span))
        self._loads.append(Load(request.request_id, chunks, self._in_step))
        tracked.loading = True
        if self._in_step:
            self._loading_in_step.add(request.request_id)
        if self._announcer is not None:
            self._announcer.available(request, range(tracked.held.first, tracked.held.end))
        self.stats.add(scheduler_seconds=time.perf_counter() - started_s)

    def _planned(self, held: Held, tables: Any, span: range) -> Iterable[ChunkPages]:
        """Yield the chunks of a load with their blocks; those outside of *span* tokens are SKIP."""
        for group in self._shape.groups:
            for number in range(self._lookup.first_needed(group, held), held.end):
                places = self._shape.blocks_of(group, number)
                wanted = tuple(_block(tables[group.index], i, group, span) for i in places)
                if any(each != SKIP for each in wanted):
                    yield ChunkPages(held.keys[number - held.first], group.index, wanted)

    # ---- one step --------------------------------------------------------------------------------

    def work(self, step: Any) -> StepWork:
        """Return what the workers have to do with a step: vLLM's SchedulerOutput."""
        for tracked in self._unplaced.values():
            self._let_go(tracked)  # not scheduled after all: it is looked up again when it is
        self._unplaced.clear()
        work = StepWork(self._era, self._loads, [], idle=step.total_num_scheduled_tokens == 0)
        self._loads = []
        if not self._saves_at_all or self._blocks is None or not self._lookup.storing:
            return work
        if self._loading_in_step:
            # Until such a load is known to have gone well, this request and whoever shares its
            # blocks may be computing on nothing: what comes of that must not be stored.
            return work
        started_s = time.perf_counter()
        for name, computed in _computed_by(step):
            known = self._tracked.get(name)
            if known is not None and computed >= known.due:  # rarely: hundreds may decode
                self._plan_saves(work.saves, known, computed, step)
        if work.saves or work.loads:
            self.stats.add(scheduler_seconds=time.perf_counter() - started_s)
        return work

    def _plan_saves(self, saves: list[Save], tracked: Tracked, computed: int, step: Any) -> None:
        if tracked.wishes.skip_save or tracked.outdated:
            return
        request, shape = tracked.request, self._shape
        known = min(computed, request.num_tokens) // shape.chunk_tokens
        first, end = tracked.next_save, min(known, shape.hashed_chunks(request.block_hashes))
        if end <= first or step.kv_connector_block_state is None:
            return
        tables = step.kv_connector_block_state.get_block_ids(request.request_id)
        if tables is None:
            return
        hashes = shape.chunk_hashes(request.block_hashes, first, end)
        keys = self._lookup.keys.mixed(hashes)
        there = min(self._lookup.prefix(group, keys) for group in shape.groups)
        before = len(self._saving)
        for number in range(first + there, end):
            key = keys[number - first]
            if self._settings.save == "reused" and hashes[number - first] not in tracked.reused:
                continue
            parent = keys[number - first - 1] if number > first else self._parent(request, number)
            for group in shape.groups:
                at = ChunkAt(group, number, key, parent)
                save = self._plan_save(tracked, at, tables[group.index])
                if save is not None:
                    saves.append(save)
        tracked.next_save, tracked.due = end, (end + 1) * shape.chunk_tokens
        if len(self._saving) > before:
            planned = list(self._saving.values())[before:]
            self._blocks.touch([page for saving in planned for page in saving.blocks])

    def _parent(self, request: Request, number: int) -> bytes | None:
        return self._lookup.keys.key(request.block_hashes, number - 1) if number else None

    def _plan_save(self, tracked: Tracked, at: ChunkAt, table: Sequence[int]) -> Save | None:
        """Plan to store a group's share of a chunk; None when it is not, or cannot be."""
        places = self._shape.blocks_of(at.group, at.number)
        index = at.group.index
        if places.stop > len(table) or (index, at.key) in self._saving_keys:
            return None
        pages = [self._blocks.blocks[block] for block in table[places.start : places.stop]]
        # A window's pages go as soon as it has moved on: such a chunk is not stored.
        if any(page.is_null for page in pages) or self._too_many():
            return None
        if self._lookup.has(at.group, at.key):
            return None
        self._saves += 1
        self._saving_blocks += len(pages)
        self._saving[self._saves] = Saving(tracked.request, at.number, index, at.key, pages)
        self._saving_keys.add((index, at.key))
        return Save(
            self._saves,
            ChunkPages(at.key, index, tuple(page.block_id for page in pages)),
            at.parent,
            at.number,
            tracked.wishes.priority,
            tracked.wishes.ttl_s,
        )

    def _too_many(self) -> bool:
        return self._saving_blocks * SAVING_SHARE > len(self._blocks.blocks)

    # ---- what came of it -------------------------------------------------------------------------

    def done(self, loaded: Iterable[str], step: StepDone | None) -> None:
        """Be told which requests' loads are over, and what the workers did."""
        for name in step.failed if step is not None else ():
            if name in self._tracked:
                self._tracked[name].failed = True
        for name in (*loaded, *(step.in_step if step is not None else ())):
            self._loaded(name)
        for number, stored, failed in step.finished() if step is not None else ():
            self._count(number, stored, failed)

    def _loaded(self, name: str) -> None:
        self._loading_in_step.discard(name)
        orphan = self._orphans.pop(name, None)
        if orphan is not None:
            orphan.release()
        tracked = self._tracked.get(name)
        if tracked is not None:
            tracked.loading = False
            self._let_go(tracked)
            if tracked.failed:
                tracked.next_save = tracked.due = 0

    def _count(self, number: int, stored: int, failed: int) -> None:
        """Workers answer in one step or in several: the chunk's blocks wait for the last."""
        saving = self._saving[number]
        saving.stored += stored
        saving.failed += failed
        if saving.stored + saving.failed < self._workers:
            return
        del self._saving[number]
        self._saving_keys.discard((saving.group, saving.key))
        self._saving_blocks -= len(saving.blocks)
        self._blocks.free_blocks(reversed(saving.blocks))
        if not saving.failed and not saving.outdated and self._announcer is not None:
            self._announcer.available(saving.request, (saving.chunk,))

    def forget_blocks(self, blocks: set[int]) -> None:
        """Take blocks that hold nothing out of the engine's prefix cache."""
        if self._blocks is not None:
            self._blocks.evict_blocks(blocks)

    def holds_back_blocks(self) -> bool:
        """Would the end of a save give the engine a block back, that nobody else holds?"""
        return any(page.ref_cnt == 1 for saving in self._saving.values() for page in saving.blocks)

    @property
    def saving(self) -> bool:
        """Is something on its way into the pool?"""
        return bool(self._saving)

    @property
    def only_saving(self) -> bool:
        """Is something on its way into the pool, and no request known?"""
        return bool(self._saving) and not self._tracked

    # ---- ends ------------------------------------------------------------------------------------

    def finished(self, request: Request) -> None:
        """Be told that a request is over."""
        tracked = self._tracked.pop(request.request_id, None)
        self._unplaced.pop(request.request_id, None)
        if tracked is None or tracked.held is None:
            return
        if tracked.loading:
            self._orphans[request.request_id] = tracked.held  # its workers copy still
        else:
            tracked.held.release()

    def reset(self) -> None:
        """
        Begin anew: nothing that was stored until now is seen again by this engine.

        Whoever resets has new weights, or wants none of the old answers. The chunks belong to
        other engines, too, and stay; this one turns to keys that nobody else has. Loads and saves
        under way end under the keys that they began with. A request that keeps its blocks stores
        nothing more: what it computes rests on what was computed before. One that begins anew
        stores all of it, from its first chunk on.
        """
        self._lookup.keys.renew()
        for tracked in self._tracked.values():
            self._let_go(tracked)
            tracked.outdated = True
            tracked.next_save = tracked.due = 0
        for saving in self._saving.values():
            saving.outdated = True
        log.info("cenote: the connector's cache was reset; this engine shares nothing from now on")

    def close(self) -> None:
        """Let go of everything."""
        for tracked in self._tracked.values():
            self._let_go(tracked)
        for held in self._orphans.values():
            held.release()

    # ---- requests --------------------------------------------------------------------------------

    def _track(self, request: Request) -> Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            wishes = Wishes.parse(request.kv_transfer_params)
            tracked = Tracked(request, wishes, self._asked_before(request))
            self._tracked[request.request_id] = tracked
        return tracked

    def _let_go(self, tracked: Tracked) -> None:
        if tracked.held is not None and not tracked.loading:
            tracked.held.release()
            tracked.held = None

    def _asked_before(self, request: Request) -> frozenset[bytes]:
        """Return which chunks of a request an earlier one asked for, and remember them all."""
        if self._settings.save != "reused":
            return frozenset()
        shape = self._shape
        end = shape.hashed_chunks(request.block_hashes)
        hashes = shape.chunk_hashes(request.block_hashes, 0, end)
        reused = frozenset(each for each in hashes if each in self._asked)
        for each in hashes:  # not keys: after a reset a prompt was asked for all the same
            self._asked[each] = None
            self._asked.move_to_end(each)
        while len(self._asked) > ASKED_MAX:
            self._asked.popitem(last=False)
        return reused


def _block(table: Sequence[Any], place: int, group: Group, span: range) -> int:
    """Return a request's block, SKIP where it has none or its tokens are not in *span*."""
    begin = place * group.block_tokens
    if begin + group.block_tokens <= span.start or begin >= span.stop:
        return SKIP  # behind the span there may be no block yet (drop_tokens)
    return SKIP if table[place].is_null else int(table[place].block_id)


def _computed_by(step: Any) -> Iterable[tuple[str, int]]:
    """Yield (request, tokens that are computed once this step is) for all that it computes."""
    scheduled = step.num_scheduled_tokens
    for new in step.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens + scheduled.get(new.req_id, 0)
    cached = step.scheduled_cached_reqs
    for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        yield name, computed + scheduled.get(name, 0)
