# SPDX-License-Identifier: Apache-2.0
"""The worker's copies over a real pool: what is compared, what is reported, what is not stored."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from cenote.client import Cache, Manifest, Pool, Put
from cenote.client.adapters.vllm.copier import CpuCopier
from cenote.client.adapters.vllm.groups import SKIP
from cenote.client.adapters.vllm.loader import Loader
from cenote.client.adapters.vllm.messages import ChunkPages, Era, Load, Save
from cenote.client.adapters.vllm.pages import ChunkLayout, Page, Pieces, joined
from cenote.client.adapters.vllm.saver import Saver
from cenote.client.adapters.vllm.stats import Stats
from cenote.client.testing import MemoryHost

ERA = Era("sha256", "seed")
LAYERS = ("a", "b", "c")
PAGE = 512
BLOCKS = 16  # in the engine
PER_CHUNK = 2


class Copier(CpuCopier):
    """Knows where chunks lie in this process's own, writable mapping."""

    def __init__(self) -> None:
        self.address_of: dict[bytes, int] = {}

    def save(self, put: Put, pieces: Pieces, ready: Any) -> None:
        self.address_of[put.key] = put.address
        super().save(put, pieces, ready)


class Memory:
    """Pages in numpy, one group's or two's, and a pool; as memory.Memory."""

    def __init__(self, pool: Pool, groups: int = 1) -> None:
        random = np.random.default_rng(3)
        self.pages = random.integers(0, 256, (groups, len(LAYERS), BLOCKS, PAGE), np.uint8)
        self.copier = Copier()
        self.layouts = tuple(
            ChunkLayout(
                joined(
                    [
                        Page(name, self.pages[group, i].ctypes.data, PAGE, PAGE)
                        for i, name in enumerate(LAYERS)
                    ]
                ),
                PER_CHUNK,
            )
            for group in range(groups)
        )
        self.stores = [True] * groups
        self.caches: list[Cache | None] = [
            pool.namespace(Manifest("m", "l", "uint8", 16, group=group)) for group in range(groups)
        ]

    def cache(self, era: Era, group: int) -> Cache | None:
        assert era == ERA
        return self.caches[group]

    def only(self, group: int = 0) -> Cache:
        cache = self.caches[group]
        assert cache is not None
        return cache


@pytest.fixture
def host() -> Iterator[MemoryHost]:
    with MemoryHost("16MiB", checksum="commit") as host:
        yield host
        assert not host.running or host.audit() == 0


@pytest.fixture
def pool(host: MemoryHost) -> Iterator[Pool]:
    pool = host.connect()
    yield pool
    assert pool.closed or pool.leases == 0


@pytest.fixture
def memory(pool: Pool) -> Memory:
    return Memory(pool)


@pytest.fixture
def stats() -> Stats:
    return Stats()


def key(i: int) -> bytes:
    return i.to_bytes(32, "big")


def loader_of(memory: Any, stats: Stats, verify: str = "first") -> Loader:
    return Loader(memory, verify, stats)


def saver_of(memory: Any, stats: Stats) -> Saver:
    return Saver(memory, stats)


_numbers = itertools.count(1)


def save_of(i: int, blocks: Sequence[int] = (0, 1), group: int = 0) -> Save:
    parent = key(i - 1) if i else None
    return Save(next(_numbers), ChunkPages(key(i), group, tuple(blocks)), parent, i, 0, None)


def load_of(*chunks: tuple[int, Sequence[int]], group: int = 0, in_step: bool = False) -> Load:
    pages = tuple(ChunkPages(key(i), group, tuple(blocks)) for i, blocks in chunks)
    return Load("r", pages, in_step)


def save_all(memory: Memory, *chunks: tuple[int, Sequence[int]], group: int = 0) -> None:
    saver = saver_of(memory, Stats())
    for i, blocks in chunks:
        assert saver.save(ERA, save_of(i, blocks, group), None)
    memory.only(group).flush()


def spoil(memory: Memory, i: int) -> None:
    """Flip a bit of a stored chunk, as a failing memory would: nobody in the pool knows of it."""
    ctypes.c_uint8.from_address(memory.copier.address_of[key(i)] + 100).value ^= 1


STORED = [(0, (0, 1)), (1, (2, 3)), (2, (4, 5))]
LOADED = load_of((0, (8, 9)), (1, (10, 11)), (2, (12, 13)))

# ---- loads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["never", "first", "always"])
def test_what_was_stored_is_loaded_into_other_blocks(
    memory: Memory, stats: Stats, verify: str
) -> None:
    """
    All bytes of all layers, and nothing else changes.
    """
    save_all(memory, *STORED)
    expected = memory.pages.copy()
    expected[:, :, 8:14] = expected[:, :, 0:6]
    assert loader_of(memory, stats, verify).load(ERA, LOADED) == set()
    assert np.array_equal(memory.pages, expected)
    counts = stats.take()
    assert counts["loads"] == 1
    assert counts["loaded_bytes"] == 3 * memory.layouts[0].nbytes
    assert "failed_loads" not in counts


@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_damaged_chunk_ends_a_load_where_it_stands(
    memory: Memory, pool: Pool, stats: Stats, verify: str, bad: int
) -> None:
    """
    What came before is good and stays; its blocks and all behind are reported, and it has left the
    pool.
    """
    save_all(memory, *STORED)
    before = memory.pages.copy()
    spoil(memory, bad)
    failed = loader_of(memory, stats, verify).load(ERA, LOADED)
    assert failed == set(range(8 + 2 * bad, 14))
    assert np.array_equal(memory.pages[:, :, 8 : 8 + 2 * bad], before[:, :, : 2 * bad])
    assert memory.only().match(key(bad)) == 0
    counts = stats.take()
    assert (counts["failed_loads"], counts["damaged_chunks"]) == (1, 1)
    assert "loads" not in counts


def test_never_compares_nothing(memory: Memory, pool: Pool, stats: Stats) -> None:
    """
    With verify = "never" a flipped bit is loaded, as the operator chose.
    """
    save_all(memory, (0, (0, 1)))
    spoil(memory, 0)
    assert loader_of(memory, stats, "never").load(ERA, load_of((0, (8, 9)))) == set()
    assert (memory.pages[0, :, 8:10] != memory.pages[0, :, 0:2]).sum() == 1


@pytest.mark.parametrize(("verify", "failed"), [("first", set()), ("always", {8, 9})])
def test_first_compares_a_chunk_once(
    memory: Memory, pool: Pool, stats: Stats, verify: str, failed: set[int]
) -> None:
    """
    What is damaged after its first load is seen by "always" alone.
    """
    save_all(memory, (0, (0, 1)))
    loader = loader_of(memory, stats, verify)
    assert loader.load(ERA, load_of((0, (8, 9)))) == set()
    spoil(memory, 0)
    assert loader.load(ERA, load_of((0, (8, 9)))) == failed


def test_what_is_stored_anew_is_compared_anew(memory: Memory, pool: Pool, stats: Stats) -> None:
    """
    "first" is about bytes, not about keys: under the same key there may be others.
    """
    save_all(memory, (0, (0, 1)))
    loader = loader_of(memory, stats)
    assert loader.load(ERA, load_of((0, (8, 9)))) == set()
    memory.only().delete(key(0))
    save_all(memory, (0, (0, 1)))
    spoil(memory, 0)
    assert loader.load(ERA, load_of((0, (8, 9)))) == {8, 9}


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_load_ends_before_a_chunk_that_has_gone(
    memory: Memory, stats: Stats, absent: int
) -> None:
    """
    Its blocks and those behind it are reported.
    """
    save_all(memory, *(chunk for chunk in STORED if chunk[0] != absent))
    assert loader_of(memory, stats).load(ERA, LOADED) == set(range(8 + 2 * absent, 14))


def test_a_chunk_of_another_length_is_none(memory: Memory, stats: Stats) -> None:
    """
    It is not copied, not even in part.
    """
    save_all(memory, (0, (0, 1)), (2, (4, 5)))
    with memory.only().put(key(1), 100) as put:
        put.copy_from(bytes(100))
    memory.only().flush()
    before = memory.pages.copy()
    assert loader_of(memory, stats).load(ERA, LOADED) == {10, 11, 12, 13}
    assert np.array_equal(memory.pages[:, :, 10:], before[:, :, 10:])


def test_blocks_that_are_not_wanted_are_neither_written_nor_reported(
    memory: Memory, pool: Pool, stats: Stats
) -> None:
    """
    SKIP: they may be another request's.
    """
    save_all(memory, (0, (0, 1)))
    before = memory.pages.copy()
    assert loader_of(memory, stats).load(ERA, load_of((0, (SKIP, 9)))) == set()
    assert np.array_equal(memory.pages[:, :, 9], before[:, :, 1])
    assert np.array_equal(memory.pages[:, :, 8], before[:, :, 8])
    spoil(memory, 0)
    assert loader_of(memory, stats).load(ERA, load_of((0, (SKIP, 9)))) == {9}


def test_a_second_group_that_fails_leaves_the_first_good(pool: Pool, stats: Stats) -> None:
    """
    Only the chunks behind the failure are reported.
    """
    memory = Memory(pool, groups=2)
    save_all(memory, (0, (0, 1)))
    load = Load("r", (ChunkPages(key(0), 0, (8, 9)), ChunkPages(key(0), 1, (10, 11))), False)
    assert loader_of(memory, stats).load(ERA, load) == {10, 11}


def test_without_a_pool_all_blocks_are_reported(memory: Memory, stats: Stats) -> None:
    """
    No namespace, and a pool that was closed.
    """
    save_all(memory, *STORED)
    memory.only().pool.close()
    assert loader_of(memory, stats).load(ERA, LOADED) == set(range(8, 14))
    memory.caches[0] = None
    assert loader_of(memory, stats).load(ERA, LOADED) == set(range(8, 14))
    assert stats.take()["failed_loads"] == 2


def test_an_error_that_nobody_thought_of_is_reported_like_any_other(
    memory: Memory, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Else its request would wait for ever.
    """
    save_all(memory, *STORED)
    monkeypatch.setattr(memory.copier, "load", lambda *_, **__: 1 // 0)
    assert loader_of(memory, stats).load(ERA, LOADED) == set(range(8, 14))


# ---- loads, layer by layer ----------------------------------------------------------------------


def test_layers_are_told_once_each_and_when_they_are_there(memory: Memory, stats: Stats) -> None:
    """
    In order; at each call that layer's pages are in place.
    """
    save_all(memory, *STORED)
    told: list[str] = []

    def loaded(layer: str) -> None:
        i = LAYERS.index(layer)
        assert np.array_equal(memory.pages[0, i, 8:14], memory.pages[0, i, 0:6])
        told.append(layer)

    assert loader_of(memory, stats).load_layers(ERA, LOADED, LAYERS, loaded) == set()
    assert told == list(LAYERS)


@pytest.mark.parametrize("how", ["damaged", "absent"])
def test_a_load_by_layers_that_fails_reports_all_and_tells_every_layer(
    memory: Memory, pool: Pool, stats: Stats, how: str
) -> None:
    """
    Nothing is in place then, and nobody waits for a layer that does not come.
    """
    save_all(memory, *STORED)
    if how == "damaged":
        spoil(memory, 2)
    else:
        memory.only().delete(key(2))
    before = memory.pages.copy()
    told: list[str] = []
    failed = loader_of(memory, stats).load_layers(ERA, LOADED, LAYERS, told.append)
    assert failed == set(range(8, 14))
    assert told == list(LAYERS)
    assert np.array_equal(memory.pages, before)


# ---- saves --------------------------------------------------------------------------------------


def test_what_is_there_already_is_not_stored_again(memory: Memory, stats: Stats) -> None:
    """
    It is a success, and counted apart.
    """
    save_all(memory, (0, (0, 1)))
    assert saver_of(memory, stats).save(ERA, save_of(0), None)
    assert stats.take() == {"duplicate_saves": 1}


def test_a_rank_that_does_not_store_says_that_it_is_stored(memory: Memory, stats: Stats) -> None:
    """
    The first rank does, for bytes that all ranks share.
    """
    memory.stores[0] = False
    assert saver_of(memory, stats).save(ERA, save_of(0), None)
    memory.only().flush()
    assert memory.only().match(key(0)) == 0


def test_a_full_pool_is_counted(stats: Stats) -> None:
    """
    All that is in it is held: a chunk more does not fit, and nothing is left reserved.
    """
    with MemoryHost("2MiB", checksum="off") as host, host.connect() as pool:
        memory = Memory(pool)
        cache = memory.only()
        held = []
        saver, i = saver_of(memory, stats), 0
        while saver.save(ERA, save_of(i), None):
            cache.flush()
            held.append(cache.get(key(i)))
            i += 1
        counts = stats.take()
        assert (counts["saves"], counts["failed_saves"]) == (i, 1)
        assert cache.match(key(i)) == 0
        for chunk in held:
            if chunk is not None:
                chunk.release()
        assert pool.leases == 0
        assert host.audit() == 0


def test_without_a_daemon_or_a_pool_nothing_is_saved(
    host: MemoryHost, memory: Memory, stats: Stats
) -> None:
    """
    A miss later, not an error now; whole and layer by layer.
    """
    host.stop()
    saver = saver_of(memory, stats)
    assert not saver.save(ERA, save_of(0), None)
    saver.begin(ERA, [save_of(1)])
    saver.layer("a", None)
    assert [stored for _, stored in saver.end()] == [False]
    assert stats.take()["failed_saves"] == 2
    memory.caches[0] = None
    assert not saver.save(ERA, save_of(0), None)


def test_a_reader_saves_nothing(host: MemoryHost, stats: Stats) -> None:
    """
    It is refused, and counted.
    """
    memory = Memory(host.connect("reader"))
    assert not saver_of(memory, stats).save(ERA, save_of(0), None)
    assert stats.take() == {"failed_saves": 1}


# ---- saves, layer by layer ----------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(LAYERS)))
def test_layers_in_any_order_make_the_chunk(
    memory: Memory, stats: Stats, order: tuple[str, ...]
) -> None:
    """
    Loaded again it is what was stored in one go.
    """
    saver = saver_of(memory, stats)
    saves = [save_of(0, (0, 1)), save_of(1, (2, 3))]
    saver.begin(ERA, saves)
    for layer in order:
        saver.layer(layer, None)
    assert saver.end() == [(save, True) for save in saves]
    memory.only().flush()
    assert loader_of(memory, stats).load(ERA, load_of((0, (8, 9)), (1, (10, 11)))) == set()
    assert np.array_equal(memory.pages[:, :, 8:12], memory.pages[:, :, 0:4])
    assert saver.end() == []


@pytest.mark.parametrize("missing", LAYERS)
def test_a_chunk_that_misses_a_layer_is_not_stored(
    memory: Memory, stats: Stats, missing: str
) -> None:
    """
    None of its bytes may be stale; the memory is given back, and the key is free.
    """
    saver = saver_of(memory, stats)
    save = save_of(0)
    saver.begin(ERA, [save])
    for layer in LAYERS:
        if layer != missing:
            saver.layer(layer, None)
    assert saver.end() == [(save, False)]
    memory.only().flush()
    assert memory.only().match(key(0)) == 0
    assert stats.take()["failed_saves"] == 1
    save_all(memory, (0, (0, 1)))
    assert memory.only().match(key(0)) == 1


def test_a_layer_given_twice_does_not_stand_for_another(memory: Memory, stats: Stats) -> None:
    """
    As many bytes as a chunk has are not yet the chunk's bytes.
    """
    saver = saver_of(memory, stats)
    save = save_of(0)
    saver.begin(ERA, [save])
    for layer in ("a", "b", "b"):
        saver.layer(layer, None)
    assert saver.end() == [(save, False)]
    memory.only().flush()
    assert memory.only().match(key(0)) == 0


def test_a_layer_given_again_is_still_the_chunk(memory: Memory, stats: Stats) -> None:
    """
    Such as a layer that an engine runs twice: the last time counts.
    """
    saver = saver_of(memory, stats)
    save = save_of(0)
    saver.begin(ERA, [save])
    for layer in (*LAYERS, "b"):
        saver.layer(layer, None)
        memory.pages[0, 1, 0:2] += 1
    memory.pages[0, 1, 0:2] -= 1
    assert saver.end() == [(save, True)]
    memory.only().flush()
    assert loader_of(memory, stats).load(ERA, load_of((0, (8, 9)))) == set()
    assert np.array_equal(memory.pages[:, :, 8:10], memory.pages[:, :, 0:2])


def test_a_duplicate_by_layers_is_a_success(memory: Memory, stats: Stats) -> None:
    """
    Nothing is reserved for what is there.
    """
    save_all(memory, (0, (0, 1)))
    saver = saver_of(memory, stats)
    save = save_of(0)
    saver.begin(ERA, [save])
    assert saver.end() == [(save, True)]
    assert stats.take() == {"duplicate_saves": 1}
