# SPDX-License-Identifier: Apache-2.0
"""The scheduler's half over a real pool: what it leases, plans, holds and lets go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from tests.unit.vllm_bed import BLOCK, CHUNK, FULL, WINDOW, Bed, Block, Blocks

from cenote.client import Pool
from cenote.client.adapters.vllm.groups import SKIP
from cenote.client.adapters.vllm.messages import StepDone
from cenote.client.testing import MemoryHost


@pytest.fixture
def host() -> Iterator[MemoryHost]:
    with MemoryHost("16MiB") as host:
        yield host
        assert not host.running or host.audit() == 0


@pytest.fixture
def pool(host: MemoryHost) -> Pool:
    return host.connect()


def bed_with(pool: Pool, chunks: int = 4, **options: Any) -> Bed:
    bed = Bed(pool, **options)
    bed.store("p", range(chunks))
    return bed


# ---- loads --------------------------------------------------------------------------------------


def test_a_load_is_leased_from_the_match_to_its_end(pool: Pool) -> None:
    """
    Matched, placed, worked, done: leases of both workers' namespaces until the last.
    """
    bed = bed_with(pool)
    request = bed.request("r", 5 * CHUNK)

    assert bed.matched_and_placed(request) == 4 * CHUNK
    assert pool.leases == 2 * 4
    work = bed.work()
    assert work.idle
    (load,) = work.loads
    assert (load.request, load.in_step) == ("r", False)
    assert [chunk.key for chunk in load.chunks] == [bed.key("p", i) for i in range(4)]
    ids = [block.block_id for block in bed.tables["r"][0]]
    assert [each for chunk in load.chunks for each in chunk.blocks] == ids
    assert bed.work().loads == []
    assert pool.leases == 2 * 4

    bed.scheduler.done(["r"], None)
    assert pool.leases == 0


def test_a_request_that_finds_no_pool_is_counted_apart(pool: Pool) -> None:
    """
    Until the pool is attached `lookups` stays 0 and `unattached_lookups` counts; an engine that is
    not to load counts neither.
    """
    bed, storer = bed_with(pool), Bed(pool, loads=False)
    there = dict(bed.attached.caches)
    bed.attached.caches.clear()
    storer.attached.caches.clear()
    request = bed.request("r", 5 * CHUNK)

    assert bed.scheduler.matched(request, 0) == 0
    assert storer.scheduler.matched(storer.request("r", 5 * CHUNK), 0) == 0
    assert bed.scheduler.stats.take() == {"unattached_lookups": 1}
    assert storer.scheduler.stats.take() == {}

    bed.attached.caches.update(there)
    assert bed.scheduler.matched(request, 0) == 4 * CHUNK
    counted = bed.scheduler.stats.take()
    assert counted["lookups"] == 1
    assert "unattached_lookups" not in counted
    bed.work()


def test_a_chunk_that_one_worker_lacks_is_no_hit(pool: Pool) -> None:
    """
    A hit is what all workers can load.
    """
    bed = bed_with(pool, 3)
    bed.caches()[1].delete(bed.key("p", 1))
    assert bed.scheduler.matched(bed.request("r", 5 * CHUNK), 0) == CHUNK


def test_a_match_that_is_not_placed_is_released_with_the_step(pool: Pool) -> None:
    """
    The engine had no room: the request is looked up again when it has.
    """
    bed = bed_with(pool)
    request = bed.request("r", 5 * CHUNK)
    assert bed.scheduler.matched(request, 0) == 4 * CHUNK
    assert bed.scheduler.matched(request, 0) == 4 * CHUNK
    assert pool.leases == 2 * 4
    assert bed.work().loads == []
    assert pool.leases == 0
    assert bed.matched_and_placed(request) == 4 * CHUNK
    assert len(bed.work().loads) == 1
    bed.scheduler.done(["r"], None)
    assert pool.leases == 0


def test_an_engine_that_loads_nothing_of_a_match_lets_it_go(pool: Pool) -> None:
    """
    Placed with 0 tokens: computed.
    """
    bed = bed_with(pool)
    request = bed.request("r", 5 * CHUNK)
    bed.scheduler.matched(request, 0)
    bed.place(request, 0, 0)
    assert pool.leases == 0
    assert bed.work().loads == []


def test_a_failed_request_is_never_offered_anything_again(pool: Pool) -> None:
    """
    Nor after another match, nor by another request's good load.
    """
    bed = bed_with(pool)
    request, other = bed.request("r", 5 * CHUNK), bed.request("s", 5 * CHUNK)
    bed.matched_and_placed(request)
    bed.work()
    bed.scheduler.done(["r"], StepDone(failed={"r"}))
    assert pool.leases == 0

    assert bed.matched_and_placed(other) == 4 * CHUNK
    for _ in range(2):
        assert bed.scheduler.matched(request, 0) == 0
        assert bed.work().loads == [] or pool.leases
    bed.scheduler.done(["s"], None)
    assert bed.scheduler.matched(request, 0) == 0
    assert pool.leases == 0


def test_a_request_that_ends_while_it_loads_keeps_its_leases(pool: Pool) -> None:
    """
    Its workers copy still: the leases go when they say that it is over.
    """
    bed = bed_with(pool)
    request = bed.request("r", 5 * CHUNK)
    bed.matched_and_placed(request)
    bed.work()
    bed.scheduler.finished(request)
    bed.work()
    assert pool.leases == 2 * 4
    bed.scheduler.done(["r"], StepDone(failed={"r"}))
    assert pool.leases == 0


def test_a_request_that_ends_before_it_loads_keeps_nothing(pool: Pool) -> None:
    """
    Matched only, and unknown ones.
    """
    bed = bed_with(pool)
    request = bed.request("r", 5 * CHUNK)
    bed.scheduler.matched(request, 0)
    bed.scheduler.finished(request)
    bed.scheduler.finished(bed.request("never seen", CHUNK))
    assert pool.leases == 0
    bed.work()


def test_a_first_chunk_that_the_engine_has_in_part_is_loaded_in_part(pool: Pool) -> None:
    """
    Blocks that are there already are skipped: others may be reading them.
    """
    bed = bed_with(pool)
    request = bed.request("r", 5 * CHUNK)
    assert bed.matched_and_placed(request, computed=CHUNK + BLOCK) == 3 * CHUNK - BLOCK
    (load,) = bed.work().loads
    ids = [block.block_id for block in bed.tables["r"][0]]
    assert [chunk.blocks for chunk in load.chunks] == [(SKIP, ids[3]), (*ids[4:6],), (*ids[6:8],)]
    bed.scheduler.done(["r"], None)
    assert pool.leases == 0


def test_a_window_is_loaded_by_its_last_chunk(pool: Pool) -> None:
    """
    A full group needs all of them; null blocks are skipped.
    """
    bed = Bed(pool, (FULL, WINDOW))
    bed.store("p", range(4), 0)
    bed.store("p", [3], 1)
    request = bed.request("r", 5 * CHUNK)
    tokens = bed.scheduler.matched(request, 0)
    assert tokens == 4 * CHUNK
    full = [Block(i) for i in range(1, 9)]
    window = [Block(0, is_null=True) for _ in range(7)] + [Block(9)]
    bed.scheduler.placed(request, Blocks([full, window]), tokens)
    (load,) = bed.work().loads
    assert [chunk.blocks for chunk in load.chunks if chunk.group == 1] == [(SKIP, 9)]
    assert sum(chunk.group == 0 for chunk in load.chunks) == 4
    bed.scheduler.done(["r"], None)
    assert pool.leases == 0


@pytest.mark.parametrize(("most", "offered"), [(0, 0), (7, 0), (8, 8), (31, 24), (1000, 32)])
def test_a_request_may_bound_its_load(pool: Pool, most: int, offered: int) -> None:
    """
    By max_load_tokens, in whole chunks.
    """
    bed = bed_with(pool)
    request = bed.request("r", 5 * CHUNK, max_load_tokens=most)
    assert bed.scheduler.matched(request, 0) == offered
    bed.scheduler.finished(request)
    assert pool.leases == 0


@pytest.mark.parametrize(("least", "offered"), [(None, 32), (32, 32), (33, 0)])
def test_a_short_hit_is_computed(pool: Pool, least: int | None, offered: int) -> None:
    """
    Below min_load_tokens nothing is offered, and nothing stays leased.
    """
    bed = bed_with(pool, given={"min_load_tokens": least})
    request = bed.request("r", 5 * CHUNK)
    assert bed.scheduler.matched(request, 0) == offered
    assert bool(pool.leases) == bool(offered)
    bed.scheduler.finished(request)


def test_tokens_that_a_draft_head_needs_are_computed_again(pool: Pool) -> None:
    """
    drop_tokens before the hit's end: they have no block yet, and are not loaded.
    """
    bed = bed_with(pool, drop_tokens=BLOCK)
    request = bed.request("r", 5 * CHUNK)
    assert bed.matched_and_placed(request) == 4 * CHUNK - BLOCK
    (load,) = bed.work().loads
    ids = [block.block_id for block in bed.tables["r"][0]]
    assert len(ids) == 7
    assert load.chunks[-1].blocks == (ids[6], SKIP)
    bed.scheduler.done(["r"], None)
    assert pool.leases == 0


def test_a_request_that_reads_no_prefix_is_offered_nothing(pool: Pool) -> None:
    """
    Such as one that wants the logits of its whole prompt; nor does an engine that only stores.
    """
    bed = bed_with(pool)
    assert bed.scheduler.matched(bed.request("r", 5 * CHUNK, skip_reading=True), 0) == 0
    other = Bed(pool, loads=False)
    assert other.scheduler.matched(other.request("r", 5 * CHUNK), 0) == 0


# ---- within a step ------------------------------------------------------------------------------


def test_a_load_within_a_step_leaves_a_token_to_compute(pool: Pool) -> None:
    """
    Where all of a prompt is there: a step that computes nothing would be none.
    """
    bed = bed_with(pool, given={"transfer": "layers"})
    request = bed.request("r", 4 * CHUNK)
    assert bed.matched_and_placed(request) == 4 * CHUNK - 1
    (load,) = bed.work({"r": 1}).loads
    assert load.in_step
    assert SKIP not in load.chunks[-1].blocks
    bed.scheduler.done((), StepDone(in_step={"r"}))
    assert pool.leases == 0


def test_nothing_is_stored_while_such_a_load_is_out(pool: Pool) -> None:
    """
    Whoever shares its blocks may compute on nothing; afterwards all is stored that was left out.
    """
    bed = bed_with(pool, 1, given={"transfer": "layers"})
    request, other = bed.request("r", 2 * CHUNK), bed.request("o", 2 * CHUNK, "other")
    bed.scheduler.matched(other, 0)
    bed.matched_and_placed(request)
    assert bed.work({"r": CHUNK, "o": 2 * CHUNK}).saves == []
    assert bed.work({"o": 1}).saves == []
    bed.scheduler.done((), StepDone(in_step={"r"}))
    work = bed.work({"r": 1, "o": 1})
    stored = {save.pages.key for save in work.saves}
    assert stored == {bed.key("p", 1), bed.key("other", 0), bed.key("other", 1)}
    bed.saved(work)
    assert bed.saving_references == 0


# ---- saves --------------------------------------------------------------------------------------


def test_blocks_are_referenced_until_every_worker_has_answered(pool: Pool) -> None:
    """
    Also when the request is over, and when a worker could not store.
    """
    bed = Bed(pool)
    request = bed.request("r", 3 * CHUNK, priority=7, ttl_s=60)
    bed.matched_and_placed(request)
    work = bed.work({"r": 2 * CHUNK + 1})
    assert [save.pages.key for save in work.saves] == [bed.key("p", 0), bed.key("p", 1)]
    assert [save.parent for save in work.saves] == [None, bed.key("p", 0)]
    assert [(save.position, save.priority, save.ttl_s) for save in work.saves] == [
        (0, 7, 60),
        (1, 7, 60),
    ]
    ids = [block.block_id for block in bed.tables["r"][0]]
    assert [each for save in work.saves for each in save.pages.blocks] == ids[:4]
    bed.forget(request)
    assert bed.blocks.references == 4

    first, second = (save.number for save in work.saves)
    bed.scheduler.done((), StepDone(saved={first: 1, second: 1}))
    assert bed.blocks.references == 4
    assert bed.scheduler.saving
    bed.scheduler.done((), StepDone(unsaved={first: 1}))
    assert bed.blocks.references == 2
    bed.scheduler.done((), StepDone(saved={second: 1}))
    assert bed.blocks.references == 0
    assert not bed.scheduler.saving


def test_a_chunk_is_planned_once(pool: Pool) -> None:
    """
    Not again by the same request, nor by one with the same prompt, nor when it is in the pool.
    """
    bed = bed_with(pool, 1)
    for name in ("r", "s"):
        bed.scheduler.matched(bed.request(name, 2 * CHUNK), 0)
    work = bed.work({"r": 2 * CHUNK, "s": 2 * CHUNK})
    assert [save.pages.key for save in work.saves] == [bed.key("p", 1)]
    assert bed.work({"r": 1, "s": 1}).saves == []
    bed.saved(work)
    assert bed.saving_references == 0


def test_a_window_that_has_moved_on_is_not_stored(pool: Pool) -> None:
    """
    Its null blocks hold nothing; the full group's chunks are stored all the same.
    """
    bed = Bed(pool, (FULL, WINDOW))
    request = bed.request("r", 2 * CHUNK)
    bed.matched_and_placed(request)
    bed.work({"r": CHUNK - 1})
    bed.null(request, 1, [0])
    work = bed.work({"r": CHUNK + 1})
    found = [(save.pages.group, save.position) for save in work.saves]
    assert found == [(0, 0), (0, 1), (1, 1)]
    bed.saved(work)
    assert bed.saving_references == 0


def test_a_request_may_have_nothing_stored(pool: Pool) -> None:
    """
    By skip_save; others' chunks are stored in the same step.
    """
    bed = Bed(pool)
    bed.scheduler.matched(bed.request("r", CHUNK, "a", skip_save=True), 0)
    bed.scheduler.matched(bed.request("s", CHUNK, "b"), 0)
    work = bed.work({"r": CHUNK, "s": CHUNK})
    assert [save.pages.key for save in work.saves] == [bed.key("b", 0)]
    bed.saved(work)


def test_only_what_was_asked_for_before_is_stored(pool: Pool) -> None:
    """
    save = "reused": nothing of the first request, of the second what both have.
    """
    bed = Bed(pool, given={"save": "reused"})
    bed.scheduler.matched(bed.request("r", 2 * CHUNK), 0)
    assert bed.work({"r": 2 * CHUNK}).saves == []
    bed.scheduler.matched(bed.request("s", 4 * CHUNK), 0)
    work = bed.work({"s": 4 * CHUNK})
    assert [save.pages.key for save in work.saves] == [bed.key("p", 0), bed.key("p", 1)]
    bed.saved(work)


@pytest.mark.parametrize("options", [{"given": {"save": "none"}}, {"saves": False}])
def test_an_engine_that_does_not_store_plans_no_saves(pool: Pool, options: Any) -> None:
    """
    By its settings, or by its role.
    """
    bed = Bed(pool, **options)
    bed.scheduler.matched(bed.request("r", 2 * CHUNK), 0)
    assert bed.work({"r": 2 * CHUNK}).saves == []


def test_blocks_that_wait_to_be_stored_are_a_share_of_all(pool: Pool) -> None:
    """
    Once half of the engine's blocks wait, no more are planned.
    """
    bed = Bed(pool, blocks=41)
    bed.scheduler.matched(bed.request("r", 20 * CHUNK), 0)
    work = bed.work({"r": 20 * CHUNK})
    assert len(work.saves) == 11
    bed.saved(work)
    assert bed.saving_references == 0


def test_a_step_without_block_tables_plans_later(pool: Pool) -> None:
    """
    Nothing is lost: the next step that has them plans it.
    """
    bed = Bed(pool)
    bed.scheduler.matched(bed.request("r", CHUNK), 0)
    assert bed.work({"r": CHUNK}, state=False).saves == []
    work = bed.work({"r": 1})
    assert len(work.saves) == 1
    bed.saved(work)


def test_after_a_failed_load_what_is_computed_instead_is_stored(pool: Pool) -> None:
    """
    From the beginning: what it was to load may have left the pool.
    """
    bed = bed_with(pool, 2)
    request = bed.request("r", 3 * CHUNK)
    bed.matched_and_placed(request)
    bed.work()
    for cache in bed.caches():
        cache.delete(bed.key("p", 1))
    bed.scheduler.done(["r"], StepDone(failed={"r"}))
    bed.computed["r"] = CHUNK
    work = bed.work({"r": 2 * CHUNK})
    assert {save.pages.key for save in work.saves} == {bed.key("p", 1), bed.key("p", 2)}
    bed.saved(work)


# ---- the pool comes and goes --------------------------------------------------------------------


def test_a_reader_plans_no_saves_and_loads(host: MemoryHost, pool: Pool) -> None:
    """
    It may not write: nothing is referenced for nothing.
    """
    bed_with(pool)
    reader = host.connect("reader")
    bed = Bed(reader)
    request = bed.request("r", 6 * CHUNK)
    assert bed.matched_and_placed(request) == 4 * CHUNK
    work = bed.work({"r": 2 * CHUNK})
    assert (len(work.loads), work.saves) == (1, [])
    bed.scheduler.done(["r"], None)
    assert reader.leases == 0


def test_without_a_daemon_what_is_mapped_is_loaded_and_nothing_is_stored(
    host: MemoryHost, pool: Pool
) -> None:
    """
    A dead daemon costs the saves, not the hits.
    """
    bed = bed_with(pool)
    host.stop()
    request = bed.request("r", 6 * CHUNK)
    assert bed.matched_and_placed(request) == 4 * CHUNK
    work = bed.work({"r": 2 * CHUNK})
    assert (len(work.loads), work.saves) == (1, [])
    bed.scheduler.done(["r"], None)
    assert pool.leases == 0


def test_a_closed_pool_is_a_miss(pool: Pool) -> None:
    """
    Nothing raises into the engine's scheduler.
    """
    bed = bed_with(pool)
    pool.close()
    assert bed.scheduler.matched(bed.request("r", 6 * CHUNK), 0) == 0
    assert bed.work({"r": CHUNK}).saves == []
