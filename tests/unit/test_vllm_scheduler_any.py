# SPDX-License-Identifier: Apache-2.0
"""
The scheduler's half in any order of events: nothing is left held, nothing is loaded twice, and
nothing from before a reset is loaded or stored after it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tests.unit.vllm_bed import BLOCK, CHUNK, FULL, NBYTES, WINDOW, Bed, Request

from cenote.client.adapters.vllm.messages import Load, Save, StepDone, StepWork
from cenote.client.testing import MemoryHost

WORKERS = 2
CHUNKS = 4
PROMPTS = st.sampled_from(["p", "q"])
PICK = st.integers(0, 1000)
BLOCKS = 2000  # of the engine: more than all requests of a run take
SIZES = st.sampled_from([1, 3, 4, 8, 9, 12, 15])  # blocks of a prompt; the pool has 8 of "p"
SELDOM = st.sampled_from([False, False, False, True])
TOKENS = st.sampled_from([6 * CHUNK, 3 * CHUNK, CHUNK, BLOCK, 1, 0])  # of a request in a step
OUTCOME = st.sampled_from(["place", "place", "place", "wait", "none"])


class AnyOrder(RuleBasedStateMachine):
    """
    An engine whose requests come, wait, load, compute, fail and end as hypothesis likes.

    *running* have blocks and nothing to load; *waiting* have none; *loads* are with the workers.
    What the workers answer to have saved is in the pool from then on.
    """

    transfer = "chunks"

    def __init__(self) -> None:
        super().__init__()
        self.host = MemoryHost("4MiB", chunk_count=512)
        self.pool = self.host.connect()
        given = {"transfer": self.transfer, "min_load_tokens": 1}
        self.bed = Bed(self.pool, (FULL, WINDOW), given=given, blocks=BLOCKS)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.planned: dict[str, Request] = {}  # placed: the next step takes their loads
        self.loads: dict[str, Request | None] = {}  # None: the request is over
        self.failed: set[str] = set()
        self.saves: dict[int, int] = {}  # number: answers that are missing
        self.begun: dict[int, Save] = {}  # by number, all that ever were
        self.announced: list[bytes] = []  # keys
        self.keys: set[bytes] = set()  # that were named or stored since the last reset
        self.old_keys: set[bytes] = set()  # before it
        self.outdated: set[str] = set()  # requests with blocks from before a reset
        self.leased: dict[str, int] = {}  # leases of a request that is matched or loading
        self.names = 0
        self._store("p", CHUNKS, own=True)
        self.bed.scheduler.announce_by(self)

    def available(self, request: Request, chunks: Iterable[int]) -> None:
        """Note what is announced, as events.py: by the keys of now."""
        keys = self.bed.lookup.keys
        self.announced += [keys.key(request.block_hashes, chunk) for chunk in chunks]

    # ---- what happens ------------------------------------------------------------------------

    @rule(
        prompt=PROMPTS,
        blocks=SIZES,
        skip=SELDOM,
        outcome=OUTCOME,
        computed=st.integers(0, 2),
    )
    def comes(self, prompt: str, blocks: int, skip: bool, outcome: str, computed: int) -> None:
        """And is looked up at once, as in an engine that has room: runs are short."""
        self.names += 1
        name = f"r{self.names}"
        request = self.bed.request(name, blocks * BLOCK, prompt, skip_save=skip)
        self.waiting.append(request)
        self._match(request, computed, outcome)

    @rule(prompt=PROMPTS, end=st.integers(1, CHUNKS), own=st.booleans())
    def is_stored(self, prompt: str, end: int, own: bool) -> None:
        """By others, or by earlier requests of this engine."""
        self._store(prompt, end, own)

    def _store(self, prompt: str, end: int, own: bool) -> None:
        self.bed.store(prompt, range(end), own=own)
        name = self.bed.own_key if own else self.bed.key
        self.keys |= {name(prompt, chunk) for chunk in range(end)} - self.old_keys

    @rule(
        prompt=PROMPTS,
        chunk=st.integers(0, CHUNKS - 1),
        rank=st.integers(0, WORKERS - 1),
        own=st.booleans(),
    )
    def leaves(self, prompt: str, chunk: int, rank: int, own: bool) -> None:
        key = (self.bed.own_key if own else self.bed.key)(prompt, chunk)
        self.bed.caches(rank % 2)[rank].delete(key)

    @precondition(lambda self: self.waiting)
    @rule(pick=PICK, computed=st.integers(0, 2), outcome=OUTCOME)
    def is_matched(self, pick: int, computed: int, outcome: str) -> None:
        self._match(self.waiting[pick % len(self.waiting)], computed, outcome)

    def _match(self, request: Request, computed: int, outcome: str) -> None:
        held = min(computed * BLOCK, (request.num_tokens - 1) // BLOCK * BLOCK)
        tokens = self.bed.scheduler.matched(request, held)
        self.outdated.discard(request.request_id)
        assert tokens == 0 or request.request_id not in self.failed
        assert held + tokens <= request.num_tokens
        self.leased.pop(request.request_id, None)
        self.leased[request.request_id] = self.pool.leases - sum(self.leased.values())
        assert bool(self.leased[request.request_id]) == bool(tokens)
        if outcome == "wait":
            return
        self.waiting.remove(request)
        loaded = tokens if outcome == "place" else 0
        self.bed.place(request, held, loaded)
        if loaded:
            self.planned[request.request_id] = request
            self._check_presence(self.bed.scheduler._loads[-1])
        else:
            self.leased.pop(request.request_id)
            self.running.append(request)

    @rule(tokens=TOKENS)
    def steps(self, tokens: int) -> None:
        computing = [*self.running] if tokens else []
        if self.transfer == "layers":
            computing += self.planned.values()  # the step that loads them computes them, too
        scheduled = {}
        for request in computing:
            left = request.num_tokens - self.bed.computed[request.request_id]
            scheduled[request.request_id] = max(1, min(tokens, left))
        out = bool(self.planned or self.loads)
        work = self.bed.work(scheduled)
        self.loads.update(self.planned)
        self._check_loads(work.loads)
        assert not (self.transfer == "layers" and out and work.saves)
        self._check_saves(work)
        self.planned = {}
        self._let_go_of_all_but(self.loads)  # matched and not placed

    @precondition(lambda self: self.loads)
    @rule(pick=PICK, fails=st.booleans())
    def is_loaded(self, pick: int, fails: bool) -> None:
        name = sorted(self.loads)[pick % len(self.loads)]
        request = self.loads.pop(name)
        self.leased.pop(name)
        done = StepDone(failed={name} if fails else set())
        if self.transfer == "layers":
            done.in_step.add(name)
            self.bed.scheduler.done((), done)
        else:
            self.bed.scheduler.done([name], done)
        if request is not None and fails:
            self.failed.add(name)
            self._preempt(request)
            self._match(request, 0, "wait")  # the next step asks for it again
        elif request is not None:
            self.running.append(request)

    @precondition(lambda self: self.saves)
    @rule(pick=PICK, stored=st.booleans())
    def is_saved(self, pick: int, stored: bool) -> None:
        number = sorted(self.saves)[pick % len(self.saves)]
        one, save = {number: 1}, self.begun[number]
        done = StepDone(saved=one) if stored else StepDone(unsaved=one)
        self.saves[number] -= 1
        if stored:
            cache = self.bed.caches(save.pages.group)[self.saves[number]]
            with cache.put(save.pages.key, NBYTES) as put:
                put.copy_from(bytes(NBYTES))
            cache.flush()
        if not self.saves[number]:
            del self.saves[number]
        before = len(self.announced)
        self.bed.scheduler.done((), done)
        # By its own key, and not at all when somebody reset since it was begun.
        assert self.announced[before:] in ([], [save.pages.key])
        assert self.old_keys.isdisjoint(self.announced[before:])

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def is_preempted(self, pick: int) -> None:
        self._preempt(self.running.pop(pick % len(self.running)))

    @rule(pick=PICK)
    def ends(self, pick: int) -> None:
        loading = [each for each in self.loads.values() if each is not None]
        everybody = [*self.waiting, *self.running, *self.planned.values(), *loading]
        if everybody:
            self._end(everybody[pick % len(everybody)])

    @precondition(lambda self: self.names > 4)
    @rule()
    def is_reset(self) -> None:
        plain = {self.bed.key(prompt, chunk) for prompt in "pq" for chunk in range(CHUNKS)}
        self.old_keys |= self.keys | plain
        self.keys = set()
        loading = [name for name, request in self.loads.items() if request is not None]
        self.outdated |= {*self.planned, *loading, *(each.request_id for each in self.running)}
        self.bed.scheduler.reset()
        self._let_go_of_all_but({**self.planned, **self.loads})

    # ---- what must hold ----------------------------------------------------------------------

    @invariant()
    def leases_are_of_what_is_matched_or_loading(self) -> None:
        """Also of a request that is over while its load is with the workers."""
        assert self.pool.leases == sum(self.leased.values())

    @invariant()
    def references_are_of_what_is_being_saved(self) -> None:
        assert bool(self.bed.saving_references) == bool(self.saves)
        assert self.bed.scheduler.saving == bool(self.saves)

    @invariant()
    def a_reset_opens_no_namespace(self) -> None:
        assert self.bed.lookup.ready
        assert len(self.bed.attached.caches) == 2 * WORKERS

    def _check_loads(self, loads: list[Load]) -> None:
        names = [load.request for load in loads]
        assert sorted(names) == sorted(self.planned)  # each once, and all that were placed
        for load in loads:
            assert load.in_step == (self.transfer == "layers")
            # Whatever has been deleted meanwhile is held: its bytes are there.
            assert load.chunks
            assert self.pool.leases

    def _check_presence(self, load: Load) -> None:
        for chunk in load.chunks:
            caches = self.bed.lookup.caches(chunk.group)
            assert len(caches) == WORKERS
            assert all(cache.match(chunk.key) for cache in caches)
            self._check_key(chunk.key)

    def _check_key(self, key: bytes) -> None:
        """Nothing that was named before the last reset is named after it."""
        assert key not in self.old_keys
        self.keys.add(key)

    def _check_saves(self, work: StepWork) -> None:
        keys = [(save.pages.group, save.pages.key) for save in work.saves]
        assert len(set(keys)) == len(keys)
        for save in work.saves:
            self._check_save(save)
            self.saves[save.number] = WORKERS

    def _check_save(self, save: Save) -> None:
        assert save.number not in self.begun
        self.begun[save.number] = save
        self._check_key(save.pages.key)
        assert (save.parent is None) == (save.position == 0)
        assert save.parent is None or save.parent in self.keys  # no orphan
        of = self.bed.scheduler._saving[save.number].request
        assert of.request_id not in self.outdated
        pages = [self.bed.blocks.blocks[each] for each in save.pages.blocks]
        assert len(pages) == CHUNK // BLOCK
        assert all(page.ref_cnt >= 2 and not page.is_null for page in pages)

    # ---- steps of these ----------------------------------------------------------------------

    def _preempt(self, request: Request) -> None:
        """Its blocks go, and it waits again."""
        for table in self.bed.tables.pop(request.request_id, []):
            self.bed.blocks.free_blocks(reversed(table))
        self.bed.computed.pop(request.request_id, None)
        self.waiting.append(request)

    def _let_go_of_all_but(self, names: Iterable[str]) -> None:
        self.leased = {name: self.leased[name] for name in names}

    def _end(self, request: Request) -> None:
        name = request.request_id
        for group in (self.waiting, self.running):
            if request in group:
                group.remove(request)
        if name in self.planned:
            self.planned.pop(name)
            self.steps_with_orphan(name)
        if name in self.loads:
            self.loads[name] = None
        else:
            self.leased.pop(name, None)
        self.bed.forget(request)

    def steps_with_orphan(self, name: str) -> None:
        """A load that was placed goes to the workers with the step, whoever ends afterwards."""
        others = dict(self.planned)
        work = self.bed.work()
        assert sorted(load.request for load in work.loads) == sorted([name, *others])
        self._check_saves(work)
        self.loads.update(others)
        self.loads[name] = None
        self.planned = {}
        self._let_go_of_all_but(self.loads)

    def teardown(self) -> None:
        """At rest nothing is held, whatever happened."""
        try:
            self.steps(0)
            while self.loads:
                self.is_loaded(0, fails=False)
            for request in [*self.waiting, *self.running]:
                self._end(request)
            while self.saves:
                self.is_saved(0, stored=True)
            assert self.pool.leases == 0
            assert self.bed.blocks.references == 0
            assert self.pool.stats().namespaces == 2 * WORKERS
            assert self.host.audit() == 0
        finally:
            self.host.stop()


class AnyOrderInStep(AnyOrder):
    """The same, with loads that are over with the step that needs them."""

    transfer = "layers"


def _test_of(machine: Any) -> Any:
    test = machine.TestCase
    test.settings = settings(
        max_examples=80,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return test


TestAnyOrder = _test_of(AnyOrder)
TestAnyOrderInStep = _test_of(AnyOrderInStep)
