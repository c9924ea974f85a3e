# SPDX-License-Identifier: Apache-2.0
"""
The spec's half in the scheduler: which chunks of the pool vLLM's stock connector may load or store.

The connector cannot be told that a load failed: it ends the engine. So a chunk is promised only
while it is held, for every rank, in the pool that all workers are attached to, with its checksum
compared; and it is held until all workers have loaded it. The pool evicts by itself: nothing is
ever reported as evicted for the sake of a store.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from cenote.client import Chunk, Event
from cenote.client.errors import CenoteError

from .announced import Announced
from .attach import Attachment
from .checker import Checker, Found
from .groups import Shape
from .lookup import Lookup
from .messages import Era
from .offload_specs import LoadSpec, StoreSpec, ToLoad, ToStore, name_of
from .places import Atlas, Atlases, Place
from .rendezvous import Answer, Rendezvous
from .settings import LOGGER, NO_WISHES, Settings, Wishes

log = logging.getLogger(LOGGER)

OFFERED_MAX: Final = 1 << 16  # keys remembered for save = "reused"


@dataclass
class Promise:
    """A chunk of all ranks, held. It ends with the last that needs it."""

    chunks: list[Chunk]
    places: tuple[Place, ...]
    users: int = 1

    def end(self) -> None:
        """Need it no more."""
        self.users -= 1
        if not self.users:
            _release(self.chunks)


class Manager(OffloadingManager):
    """
    The pool, as the stock connector's scheduler sees it. One thread calls it.

    Args:
        settings: The operator's.
        shape: How tokens become chunks; its groups' windows do not matter here.
        engine_id: The engine's.
        workers: How many there are.
        announcing: Are events wanted?
    """

    def __init__(
        self, settings: Settings, shape: Shape, *, engine_id: str, workers: int, announcing: bool
    ) -> None:
        self._settings: Final = settings
        self._shape: Final = shape
        self._era: Era | None = None
        self._sizes: tuple[int, ...] = ()  # bytes of each group's chunks
        self._atlases: Final = Atlases()
        self._announced = self._announcements() if announcing else None
        follow = self._announced.follow if self._announced is not None else None
        self._attachment: Final = Attachment(settings.socket, "vllm scheduler", follow)
        self._lookup: Final = Lookup(shape, self._attachment)
        self._checker: Final = Checker(settings.verify)
        self._held: dict[OffloadKey, Promise] = {}  # promised in this step
        self._loads: dict[str, list[Promise]] = {}  # by request
        self._left: list[Promise] = []  # of loads under way when somebody reset
        self._storing: set[OffloadKey] = set()
        self._known: set[str] = set()  # requests that are not over
        self._outdated: set[str] = set()  # of these, whose blocks may be from before a reset
        self._offered: OrderedDict[OffloadKey, str] = OrderedDict()
        self._rendezvous: Final = Rendezvous(engine_id, workers, self._own_pool, self._learn)
        self._attachment.start()

    # ---- who the workers are ---------------------------------------------------------------------

    def _own_pool(self) -> bytes:
        """Return the pool that new leases lie in; b"" while its daemon is away."""
        pool = self._attachment.pool
        return pool.pool_id if pool is not None and pool.connected else b""

    def _learn(self, answers: Sequence[Answer]) -> None:
        """Be told what the workers' bytes depend on."""
        wrong = {answer.chunk_tokens for answer in answers} - {self._shape.chunk_tokens}
        if wrong or {len(answer.groups) for answer in answers} != {len(self._shape.groups)}:
            log.error(
                "cenote: nothing is cached: the workers that answer have chunks of %s tokens, the "
                "scheduler %d; does another engine on this host have the same engine_id?",
                sorted(wrong),
                self._shape.chunk_tokens,
            )
            return
        self._sizes = answers[0].nbytes
        era = Era(*answers[0].hashed)
        self._lookup.know([answer.groups for answer in answers], era)
        self._era = era

    @property
    def ready(self) -> bool:
        """Can chunks be promised: is everybody attached to one pool, and its namespaces open?"""
        return self._pool_id() != b""

    def _pool_id(self) -> bytes:
        return self._rendezvous.pool_id if self._era is not None and self._lookup.ready else b""

    # ---- loading ---------------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Look for a chunk, and hold it until the step ends or the load of it."""
        self._outdated.discard(req_context.req_id)  # it is asked before a request has blocks
        if key in self._held and self._settings.verify != "always":
            return LookupResult.HIT
        pool = self._attachment.pool
        if pool is None or not self.ready:
            return LookupResult.MISS
        try:
            return self._hold(key, req_context.req_id, self._atlases.of(pool))
        except CenoteError as error:
            log.warning("cenote: the pool cannot be looked at: %s", error)
            return LookupResult.MISS

    def _hold(self, key: OffloadKey, request: str, atlas: Atlas) -> LookupResult:
        group, chunk_key = self._parts(key)
        found: list[Chunk] = []
        seen: set[Found] = set()
        for cache in self._lookup.caches(group):
            chunk = cache.get(chunk_key)
            if chunk is None:
                _release(found)
                return LookupResult.MISS
            state = self._checker.look(cache, chunk, request)
            seen.add(state)
            if state is not Found.PENDING:
                found.append(chunk)
        if seen != {Found.GOOD}:
            _release(found)
            pending = Found.PENDING in seen and Found.BAD not in seen
            return LookupResult.HIT_PENDING if pending else LookupResult.MISS
        places = [atlas.place(chunk) for chunk in found]
        known = tuple(each for each in places if each and each.nbytes == self._sizes[group])
        # Another length is nothing of this engine's. No place: this process reconnected since it
        # was ready, and its workers may not have followed.
        if len(known) < len(found) or self._pool_id() != atlas.pool_id:
            _release(found)
            return LookupResult.MISS
        before = self._held.pop(key, None)
        self._held[key] = Promise(found, known)
        if before is not None:
            before.end()
        return LookupResult.HIT

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        """Say where hits come from: this host's memory."""
        return CacheHitSource.HOST

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadSpec:
        """
        Hold chunks until complete_load(), and say how a worker opens these very ones.

        Raises:
            RuntimeError: One was not promised in this step, and has left the pool.
        """
        assert self._era is not None
        wanted, promises = [], self._loads.setdefault(req_context.req_id, [])
        for key in keys:
            promise = self._held.get(key)
            if promise is None and self.lookup(key, req_context) is LookupResult.HIT:
                promise = self._held[key]
            if promise is None:
                raise RuntimeError(
                    f"chunk {key.hex()[:16]} has left the pool, and vLLM did not look it up before "
                    "it planned to load it: its OffloadingConnector cannot go on. Restart the "
                    "engine, report this, and serve with CenoteConnector, which computes instead"
                )
            promise.users += 1
            promises.append(promise)
            wanted.append(ToLoad(get_offload_group_idx(key), promise.places))
            self._offer(key)
        pool_id = self._pool_id()
        return LoadSpec(pool_id, self._era, self._names_now(), tuple(wanted))

    def _names_now(self) -> tuple[tuple[bytes, ...], ...]:
        groups = range(len(self._shape.groups))
        return tuple(
            tuple(name_of(cache.manifest) for cache in self._lookup.caches(group))
            for group in groups
        )

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Let go of what all workers have loaded."""
        for promise in self._loads.pop(req_context.req_id, ()):
            promise.end()
        self._flushed()

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Let go of what was promised and is not loaded after all."""
        # They begin, or begin anew, and some without a lookup.
        self._outdated.difference_update(context.new_req_ids, context.preempted_req_ids)
        held, self._held = self._held, {}
        for promise in held.values():
            promise.end()

    # ---- storing ---------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Read what the request wishes."""
        req_context.set_state(Wishes.parse(req_context.kv_transfer_params))
        self._known.add(req_context.req_id)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Be told that nothing more will be asked for a request."""
        self._known.discard(req_context.req_id)
        self._outdated.discard(req_context.req_id)

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput:
        """
        Return which chunks the pool has not. Without a pool: none.

        None either of a request that lived through a reset with its blocks: vLLM offers them all
        again, and what they hold was computed before. The answer is never None, which would be
        logged for every step and offered again in each.
        """
        wishes = req_context.get_state(Wishes) or NO_WISHES
        wanted: list[OffloadKey] = []
        stores = self._settings.save != "none" and not wishes.skip_save
        if self.ready and stores and req_context.req_id not in self._outdated:
            wanted = [key for key in keys if self._is_to_store(key, req_context.req_id)]
        self._storing.update(wanted)
        chunks = tuple(self._placed(wanted, req_context))
        era = self._era or Era("", "")
        spec = StoreSpec(era, chunks, wishes.priority, wishes.ttl_s)
        return PrepareStoreOutput(keys_to_store=wanted, store_spec=spec, evicted_keys=[])

    def _is_to_store(self, key: OffloadKey, request: str) -> bool:
        if key in self._storing or (
            self._settings.save == "reused" and not self._offered_before(key, request)
        ):
            return False
        group, chunk_key = self._parts(key)
        try:
            return not all(cache.match(chunk_key) for cache in self._lookup.caches(group))
        except CenoteError:
            return False

    def _offered_before(self, key: OffloadKey, request: str) -> bool:
        """Did another request compute this chunk? Remember that this one did."""
        first = self._offered.setdefault(key, request)
        self._offered.move_to_end(key)
        if len(self._offered) > OFFERED_MAX:
            self._offered.popitem(last=False)
        return first != request

    def _placed(self, keys: Iterable[OffloadKey], context: ReqContext) -> Iterable[ToStore]:
        """Yield chunks with their places in the request's chain, as far as vLLM knows them."""
        places: Mapping[OffloadKey, int] = getattr(context, "_offload_key_positions", {})
        at = {(get_offload_group_idx(key), end): key for key, end in places.items()}
        for key in keys:
            group, chunk_key = self._parts(key)
            end = context.get_offload_key_position(key)
            position = end // self._shape.chunk_tokens - 1 if end else None
            before = at.get((group, end - self._shape.chunk_tokens)) if end else None
            yield ToStore(group, chunk_key, self._parts(before)[1] if before else None, position)

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        """Be told that workers are done with chunks: stored, or not worth a word."""
        known = self._storing.intersection(keys)  # others were begun before a reset
        self._storing -= known
        for key in known:
            self._offer(key)
        self._flushed()

    # ---- events ----------------------------------------------------------------------------------

    def _announcements(self) -> Announced:
        return Announced(
            self._is_there,
            self._tag_of,
            lambda key: OffloadingEvent([key], Medium.CPU, removed=True),
        )

    def _offer(self, key: OffloadKey) -> None:
        if self._announced is not None:
            tag = self._parts(key)
            if not self._announced.knows(tag):
                stored = OffloadingEvent([key], Medium.CPU, removed=False, removal_expected=True)
                self._announced.offer(tag, stored, key)

    def _is_there(self, tag: Any) -> bool:
        group, key = tag
        return self._lookup.has(self._shape.groups[group], key)

    def _tag_of(self, event: Event) -> Any:
        group = self._lookup.group_of(event.namespace_id)
        return None if group is None else (group, event.key)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return what became available in the pool, and what left it."""
        return self._announced.take() if self._announced is not None else ()

    def _parts(self, key: OffloadKey) -> tuple[int, bytes]:
        """Return a key's group, and what the pool calls the chunk."""
        return get_offload_group_idx(key), self._lookup.keys.of(get_offload_block_hash(key))

    # ---- ends ------------------------------------------------------------------------------------

    def reset_cache(self) -> None:
        """See nothing any more that was stored until now: the chunks are others', too, and stay."""
        self.on_schedule_end(ScheduleEndContext((), ()))
        self._left += [promise for held in self._loads.values() for promise in held]
        self._loads.clear()
        self._storing.clear()
        self._outdated = set(self._known)
        self._lookup.keys.renew()
        if self._announced is not None:
            self._announced.begin_anew()
        log.info("cenote: the cache was reset; this engine shares nothing from now on")

    def on_reset_flushed(self) -> None:
        """Let go of what was being loaded when somebody reset: it has been (vLLM 0.33)."""
        self._flushed()

    def _flushed(self) -> None:
        """
        Let go of what was being loaded when somebody reset.

        Workers take jobs in order, and none from before a reset is reported to us: what is reported
        came later, and so they have opened what came before. vLLM 0.32 says no more than that.
        """
        left, self._left = self._left, []
        for promise in left:
            promise.end()

    def shutdown(self) -> None:
        """Let go of everything, and detach."""
        self._rendezvous.close()
        self._checker.close()
        self.on_schedule_end(ScheduleEndContext((), ()))
        for promise in (*self._left, *(p for held in self._loads.values() for p in held)):
            promise.end()
        self._attachment.close()


def _release(chunks: Sequence[Chunk]) -> None:
    for chunk in chunks:
        chunk.release()
