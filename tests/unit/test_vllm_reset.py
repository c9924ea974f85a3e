# SPDX-License-Identifier: Apache-2.0
"""A reset of the connector's cache: new keys, no new namespace, and nothing old under a new key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from tests.unit.vllm_bed import BLOCK, CHUNK, FULL, NBYTES, WINDOW, Bed

from cenote.client import Pool
from cenote.client.adapters.vllm.groups import Group, Shape
from cenote.client.adapters.vllm.identity import manifest_of
from cenote.client.adapters.vllm.keys import Keys
from cenote.client.adapters.vllm.messages import Save, StepDone
from cenote.client.testing import MemoryHost

RESETS = 5000  # a user has 1,024 namespaces, a pool 4,096


class Announcer:
    """Notes what is announced."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []

    def available(self, request: Any, chunks: Iterable[int]) -> None:
        self.said += [(request.request_id, chunk) for chunk in chunks]


@pytest.fixture
def host() -> Iterator[MemoryHost]:
    with MemoryHost("16MiB") as host:
        yield host
        assert host.audit() == 0


@pytest.fixture
def pool(host: MemoryHost) -> Pool:
    return host.connect()


def bed_with(pool: Pool, chunks: int = 4, **options: Any) -> Bed:
    bed = Bed(pool, **options)
    bed.store("p", range(chunks))
    return bed


def keys_of(saves: Iterable[Save]) -> list[bytes]:
    return [save.pages.key for save in saves]


def begins_anew(bed: Bed, name: str) -> None:
    """Preempt a request, as vLLM does before it resets."""
    for table in bed.tables.pop(name):
        bed.blocks.free_blocks(reversed(table))
    bed.computed.pop(name)


# ---- keys ---------------------------------------------------------------------------------------


def hashes(count: int, nbytes: int = 32) -> list[bytes]:
    return [hashlib.sha256(bytes([i])).digest()[:nbytes] for i in range(count)]


def test_without_a_reset_keys_are_the_hashes() -> None:
    """
    The very ones, so that engines share, and that it costs nothing.
    """
    keys = Keys(Shape.of([Group(0, 4, 0, ())], 4, 8))
    assert keys.keys(hashes(7), 0, 3) == [hashes(7)[i] for i in (1, 3, 5)]
    assert (keys.key(hashes(7), 1), keys.of(hashes(7)[3])) == (hashes(7)[3], hashes(7)[3])
    given = hashes(3)
    assert keys.mixed(given) is given


@pytest.mark.parametrize("nbytes", [16, 32])
def test_after_each_reset_keys_are_others(nbytes: int) -> None:
    """
    Of 32 bytes, one for each hash, the same until the next reset, one by one or together.
    """
    keys = Keys(Shape.of([Group(0, 4, 0, ())], 4, 8))
    given = hashes(200, nbytes)
    seen = {*keys.keys(given, 0, 100)}
    for resets in range(1, 9):
        keys.renew()
        many = keys.keys(given, 0, 100)
        assert many == keys.keys(given, 0, 40) + keys.keys(given, 40, 100)
        assert many == [keys.key(given, chunk) for chunk in range(100)]
        assert many == [keys.of(given[2 * chunk + 1]) for chunk in range(100)]
        assert {len(key) for key in many} == {32}
        seen |= {*many}
        assert len(seen) == (resets + 1) * 100


def test_engines_that_were_reset_share_nothing(pool: Pool) -> None:
    """
    Neither with each other nor with one that was not, in the same namespaces.
    """
    beds = [Bed(pool) for _ in range(3)]
    for bed in beds[1:]:
        bed.scheduler.reset()
    assert len({bed.own_key("p", 0) for bed in beds}) == 3
    for i, bed in enumerate(beds):
        assert bed.scheduler.matched(bed.request(f"{i}", 3 * CHUNK), 0) == 0
        bed.store("p", range(i + 1), own=True)
        assert bed.scheduler.matched(bed.request(f"{i}", 5 * CHUNK), 0) == (i + 1) * CHUNK
        bed.scheduler.close()


# ---- namespaces ---------------------------------------------------------------------------------


def test_resets_open_no_namespace(pool: Pool) -> None:
    """
    5,000 of them, a training step each: none in the scheduler nor, by what it is told, in a worker;
    and what is stored then is found.
    """
    bed = bed_with(pool, groups=(FULL, WINDOW))
    before, era = pool.stats().namespaces, bed.work().era
    for _ in range(RESETS):
        bed.scheduler.reset()
        assert bed.lookup.ready
    fields = [each for facts in bed.facts.values() for each in facts]
    told = {manifest_of(each, bed.work().era, CHUNK) for each in fields}
    assert told == {manifest_of(each, era, CHUNK) for each in fields} == {*bed.attached.caches}
    assert pool.stats().namespaces == before == 4

    request = bed.request("r", 5 * CHUNK)
    assert bed.scheduler.matched(request, 0) == 0
    bed.store("p", range(3), own=True)
    assert bed.scheduler.matched(request, 0) == 3 * CHUNK
    bed.scheduler.close()


# ---- loads --------------------------------------------------------------------------------------


def test_after_a_reset_nothing_that_was_stored_is_seen(pool: Pool) -> None:
    """
    Matches are let go, what is loading ends as it would, and what is stored then is seen.
    """
    bed = bed_with(pool)
    loading, matched = bed.request("r", 5 * CHUNK), bed.request("s", 5 * CHUNK)
    bed.matched_and_placed(loading)
    bed.scheduler.matched(matched, 0)
    bed.scheduler.reset()
    assert pool.leases == 2 * 4
    assert bed.scheduler.matched(matched, 0) == 0
    (load,) = bed.work().loads
    assert [chunk.key for chunk in load.chunks] == [bed.key("p", i) for i in range(4)]
    assert pool.leases == 2 * 4
    bed.scheduler.done(["r"], None)
    assert pool.leases == 0
    bed.store("p", [0], own=True)
    assert bed.scheduler.matched(matched, 0) == CHUNK
    bed.scheduler.close()
    assert pool.leases == 0


# ---- saves --------------------------------------------------------------------------------------


def test_a_save_under_way_ends_under_its_old_key_and_is_not_announced(pool: Pool) -> None:
    """
    Beside it the same chunk, computed anew, is stored under its new key, and that is announced.
    """
    bed, announcer = Bed(pool), Announcer()
    bed.scheduler.announce_by(announcer)
    bed.scheduler.matched(bed.request("r", 2 * CHUNK), 0)
    old = bed.work({"r": 2 * CHUNK})
    assert keys_of(old.saves) == [bed.key("p", 0), bed.key("p", 1)]
    bed.scheduler.reset()

    bed.scheduler.matched(bed.request("s", 2 * CHUNK), 0)
    new = bed.work({"s": 2 * CHUNK})
    assert keys_of(new.saves) == [bed.own_key("p", 0), bed.own_key("p", 1)]
    assert bed.work({"s": 1}).saves == []
    bed.saved(old)
    assert announcer.said == []
    assert bed.scheduler.saving
    bed.saved(new)
    assert announcer.said == [("s", 0), ("s", 1)]
    assert bed.saving_references == 0


def test_a_request_that_keeps_its_blocks_stores_nothing_more(pool: Pool) -> None:
    """
    What it computes rests on what was computed before: under a new key it would be older than the
    reset, and without its first chunks nobody could load it.
    """
    bed = Bed(pool)
    bed.scheduler.matched(bed.request("r", 4 * CHUNK), 0)
    bed.saved(bed.work({"r": CHUNK}))
    bed.scheduler.reset()
    assert bed.work({"r": 3 * CHUNK}).saves == []
    assert bed.blocks.references == 4 * CHUNK // BLOCK


@pytest.mark.parametrize("failed", [False, True])
def test_neither_does_one_that_loads_what_is_older(pool: Pool, failed: bool) -> None:
    """
    Nor does one whose load failed, while it keeps what came before the failure.
    """
    bed = bed_with(pool, 2)
    bed.matched_and_placed(bed.request("r", 4 * CHUNK))
    bed.work()
    bed.scheduler.reset()
    bed.scheduler.done(["r"], StepDone(failed={"r"} if failed else set()))
    assert bed.work({"r": 2 * CHUNK}).saves == []


def test_a_request_that_begins_anew_stores_all_of_it(pool: Pool) -> None:
    """
    From its first chunk on, each after the one before it: no parent that is not there, which would
    have the pool evict it first.
    """
    bed = Bed(pool, (FULL, WINDOW))
    request = bed.request("r", 4 * CHUNK)
    bed.scheduler.matched(request, 0)
    bed.saved(bed.work({"r": 3 * CHUNK}))
    begins_anew(bed, "r")
    bed.scheduler.reset()

    assert bed.scheduler.matched(request, 0) == 0
    saves = [*bed.work({"r": 2 * CHUNK}).saves, *bed.work({"r": 2 * CHUNK}).saves]
    own = [bed.own_key("p", chunk) for chunk in range(4)]
    for group in (0, 1):
        mine = [save for save in saves if save.pages.group == group]
        assert keys_of(mine) == own
        assert [save.parent for save in mine] == [None, *own[:3]]
        assert [save.position for save in mine] == [0, 1, 2, 3]


def test_what_was_asked_for_before_a_reset_was_asked_for(pool: Pool) -> None:
    """
    save = "reused" is about prompts: they come back, whatever the weights are.
    """
    bed = Bed(pool, given={"save": "reused"})
    bed.scheduler.matched(bed.request("r", 2 * CHUNK), 0)
    assert bed.work({"r": 2 * CHUNK}).saves == []
    waiting = bed.request("s", 4 * CHUNK)
    bed.scheduler.matched(waiting, 0)
    bed.scheduler.reset()
    bed.scheduler.matched(waiting, 0)
    work = bed.work({"s": 4 * CHUNK})
    assert keys_of(work.saves) == [bed.own_key("p", 0), bed.own_key("p", 1)]
    for name, first in (("t", 2), ("u", 4)):
        bed.scheduler.matched(bed.request(name, 6 * CHUNK), 0)
        saves = bed.work({name: 6 * CHUNK}).saves
        assert keys_of(saves) == [bed.own_key("p", first), bed.own_key("p", first + 1)]


def test_chunks_after_a_reset_are_no_orphans_in_the_pool(pool: Pool) -> None:
    """
    Their parents are found, so that their places in the chain are known without being told.
    """
    bed = bed_with(pool, 2)
    bed.scheduler.reset()
    bed.scheduler.matched(bed.request("r", 3 * CHUNK), 0)
    cache = bed.caches()[0]
    for save in bed.work({"r": 3 * CHUNK}).saves:
        with cache.put(save.pages.key, NBYTES, save.parent) as put:
            put.copy_from(bytes(NBYTES))
        cache.flush()
        assert put.position == save.position
