# SPDX-License-Identifier: Apache-2.0
"""Where an engine's pages lie, and chunks made of them and taken apart again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenote.client import Cache, Manifest
from cenote.client.adapters.vllm.groups import SKIP
from cenote.client.adapters.vllm.pages import ChunkLayout, Page, Run, joined, pages_of
from cenote.client.testing import memory_pool

KEYS = (i.to_bytes(32, "big") for i in itertools.count())
BLOCKS = 12
ORDERS = ("layers", "blocks", "heads")
ANY = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the pool is shared on purpose
)

# ---- stand-ins for vLLM's -----------------------------------------------------------------------


@dataclass
class Placement:
    """vLLM's KVCacheTensor: where layers lie in an allocation."""

    layers: Sequence[str]
    offset: int
    layer_stride: int
    block_stride: int


@dataclass
class Config:
    """vLLM's KVCacheConfig."""

    kv_cache_tensors: Sequence[Placement]
    num_blocks: int = BLOCKS


class Storage:
    def __init__(self, memory: np.ndarray[Any, Any]) -> None:
        self._memory = memory

    def nbytes(self) -> int:
        return self._memory.nbytes

    def data_ptr(self) -> int:
        return int(self._memory.ctypes.data)


@dataclass
class Tensor:
    """torch's, as far as it is asked."""

    memory: np.ndarray[Any, Any]

    def untyped_storage(self) -> Storage:
        return Storage(self.memory)


@dataclass
class Engine:
    """
    An engine's KV cache with random bytes.

    *order* says what is outermost: "layers" (a layer's blocks together), "blocks" (a block's layers
    together), or "heads" (within a layer, all blocks of one head group after those of another).
    """

    order: str
    layers: int = 3
    page: int = 24
    heads: int = 2
    memory: np.ndarray[Any, Any] = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(7)
        self.memory = random.integers(0, 256, self.layers * self.page * BLOCKS, np.uint8)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"layer{i}" for i in range(self.layers))

    def view(self) -> np.ndarray[Any, Any]:
        """Return the memory as [layer][head group][block][bytes], by numpy and not by our code."""
        if self.order == "blocks":
            return self.memory.reshape(BLOCKS, self.layers, 1, self.page).transpose(1, 2, 0, 3)
        heads = self.heads if self.order == "heads" else 1
        return self.memory.reshape(self.layers, heads, BLOCKS, self.page // heads)

    def pages(self) -> list[Page]:
        if self.order == "blocks":
            placement = Placement(self.names, 0, self.page, self.layers * self.page)
        else:
            stride = self.page // self.heads if self.order == "heads" else self.page
            placement = Placement(self.names, 0, self.page * BLOCKS, stride)
        tensors = dict.fromkeys(self.names, Tensor(self.memory))
        sizes = dict.fromkeys(self.names, self.page)
        return pages_of(Config([placement]), self.names, tensors, sizes)

    def layout(self, blocks: int) -> ChunkLayout:
        return ChunkLayout(joined(self.pages()), blocks)

    def chunk(self, blocks: Sequence[int]) -> bytes:
        """Return what a chunk of these blocks must be: [run][block][bytes]."""
        if self.order == "blocks":  # all layers of a block are one run
            return b"".join(self.view()[:, 0, block].tobytes() for block in blocks)
        parts = itertools.product(range(self.layers), range(self.view().shape[1]), blocks)
        return b"".join(self.view()[layer, head, block].tobytes() for layer, head, block in parts)


# ---- runs ---------------------------------------------------------------------------------------


def test_pages_that_follow_each_other_in_a_block_are_one_run() -> None:
    """
    Three layers of 10 bytes in blocks of 30.
    """
    pages = [Page("a", 0, 30, 10), Page("b", 10, 30, 10), Page("c", 20, 30, 10)]
    assert joined(pages) == (Run(("a", "b", "c"), 0, 30, 30),)


def test_pieces_of_one_layer_are_joined_under_its_name_once() -> None:
    """
    Such as keys and values side by side.
    """
    pages = [Page("a", 0, 20, 10), Page("a", 10, 20, 5), Page("b", 15, 20, 5)]
    assert joined(pages) == (Run(("a", "b"), 0, 20, 20),)


@pytest.mark.parametrize(
    "second",
    [
        Page("b", 11, 30, 10),  # a gap
        Page("b", 9, 30, 10),  # before the end of the first
        Page("b", 10, 40, 10),  # blocks of another length
        Page("b", 10, 30, 21),  # beyond the block
    ],
)
def test_pages_that_do_not_are_runs_of_their_own(second: Page) -> None:
    """
    A gap, another stride, or what would reach into the next block.
    """
    assert len(joined([Page("a", 0, 30, 10), second])) == 2


def test_no_pages_are_no_runs() -> None:
    """
    A group without layers has nothing.
    """
    assert joined([]) == ()
    assert ChunkLayout((), 4).nbytes == 0


@pytest.mark.parametrize(("order", "runs"), [("layers", 3), ("blocks", 1), ("heads", 6)])
def test_runs_are_as_long_as_the_placement_lets_them(order: str, runs: int) -> None:
    """
    And a chunk has every byte of its blocks, whatever the placement.
    """
    layout = Engine(order).layout(4)
    assert len(layout.runs) == runs
    assert layout.nbytes == 4 * 3 * 24


def test_layers_apart_can_be_told_apart() -> None:
    """
    Each has its runs, one after the other; heads outside of blocks make several.
    """
    assert Engine("layers").layout(2).by_layer == {
        "layer0": range(1),
        "layer1": range(1, 2),
        "layer2": range(2, 3),
    }
    by_layer = Engine("heads").layout(2).by_layer
    assert by_layer is not None
    assert by_layer["layer1"] == range(2, 4)


def test_layers_in_one_run_cannot() -> None:
    """
    Nor can a layer whose runs stand apart.
    """
    assert Engine("blocks").layout(2).by_layer is None
    apart = (Run(("a",), 0, 8, 8), Run(("b",), 100, 8, 8), Run(("a",), 200, 8, 8))
    assert ChunkLayout(apart, 1).by_layer is None
    assert Engine("blocks", layers=1).layout(2).by_layer == {"layer0": range(1)}


# ---- pieces -------------------------------------------------------------------------------------


def test_pieces_are_in_the_order_of_the_chunk() -> None:
    """
    Run by run, and in a run block by block.
    """
    layout = ChunkLayout((Run(("a",), 1000, 8, 8), Run(("b",), 5000, 4, 3)), 2)
    pieces = layout.pieces([2, 5])
    assert pieces.addresses.tolist() == [1016, 1040, 5008, 5020]
    assert pieces.lengths.tolist() == [8, 8, 3, 3]
    assert pieces.starts().tolist() == [0, 8, 16, 19]
    assert pieces.offset == 0


def test_skipped_blocks_have_no_address_and_keep_their_place() -> None:
    """
    In every run.
    """
    layout = ChunkLayout((Run(("a",), 1000, 8, 8), Run(("b",), 5000, 4, 3)), 3)
    pieces = layout.pieces([SKIP, 0, SKIP])
    assert pieces.addresses.tolist() == [0, 1000, 0, 0, 5000, 0]
    assert pieces.lengths.tolist() == [8, 8, 8, 3, 3, 3]


def test_some_runs_pieces_begin_where_these_runs_do() -> None:
    """
    As for one layer.
    """
    runs = tuple(Run((str(i),), 1000 * i, 8, i) for i in range(1, 5))
    pieces = ChunkLayout(runs, 2).pieces([0, 1], range(2, 4))
    assert pieces.addresses.tolist() == [3000, 3008, 4000, 4008]
    assert pieces.lengths.tolist() == [3, 3, 4, 4]
    assert pieces.offset == 2 * (1 + 2)
    assert pieces.starts().tolist() == [6, 9, 12, 16]


def test_addresses_of_the_upper_half_stay_what_they_are() -> None:
    """
    Block numbers and strides beyond 32 bits are multiplied in 64.
    """
    layout = ChunkLayout((Run(("a",), 0x7F00_0000_0000, 2**21, 8),), 1)
    assert layout.pieces([2**20]).addresses.tolist() == [0x7F00_0000_0000 + 2**41]


# ---- through a pool -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache() -> Iterator[Cache]:
    with memory_pool("64MiB", checksum="commit") as pool:
        yield pool.namespace(Manifest("m", "l", "uint8", 16))
        assert pool.leases == 0


def stored(cache: Cache, layout: ChunkLayout, blocks: Sequence[int]) -> bytes:
    key = next(KEYS)
    pieces = layout.pieces(blocks)
    with cache.put(key, layout.nbytes) as put:
        put.copy_pieces(pieces.addresses, pieces.lengths, pieces.offset)
    cache.flush()
    return key


def some_blocks(data: st.DataObject, count: int) -> list[int]:
    return data.draw(st.permutations(range(BLOCKS)))[:count]


@ANY
@given(st.data(), st.sampled_from(ORDERS), st.integers(1, 5), st.integers(1, 3))
def test_blocks_come_back_in_other_blocks(
    cache: Cache, data: st.DataObject, order: str, count: int, layers: int
) -> None:
    """
    Through a pool, with the checksum compared: every byte, and no byte elsewhere.
    """
    engine = Engine(order, layers)
    layout = engine.layout(count)
    source, target = some_blocks(data, count), some_blocks(data, count)
    key = stored(cache, layout, source)
    expected = engine.view().copy()
    expected[:, :, target] = engine.view()[:, :, source]

    with cache.get(key) as chunk:  # type: ignore[union-attr]
        assert bytes(chunk.memory) == engine.chunk(source)
        pieces = layout.pieces(target)
        assert chunk.copy_pieces_to(pieces.addresses, pieces.lengths, pieces.offset, verify=True)

    assert np.array_equal(engine.view(), expected)


@ANY
@given(st.data(), st.sampled_from(ORDERS), st.integers(1, 5))
def test_skipped_blocks_are_not_touched(
    cache: Cache, data: st.DataObject, order: str, count: int
) -> None:
    """
    Any of a chunk's blocks may be left out.
    """
    engine = Engine(order)
    layout = engine.layout(count)
    source, target = some_blocks(data, count), some_blocks(data, count)
    wanted = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    key = stored(cache, layout, source)
    expected = engine.view().copy()
    for one, other, is_wanted in zip(source, target, wanted, strict=True):
        if is_wanted:
            expected[:, :, other] = engine.view()[:, :, one]

    with cache.get(key) as chunk:  # type: ignore[union-attr]
        pieces = layout.pieces([t if w else SKIP for t, w in zip(target, wanted, strict=True)])
        chunk.copy_pieces_to(pieces.addresses, pieces.lengths, pieces.offset)

    assert np.array_equal(engine.view(), expected)


@ANY
@given(st.data(), st.sampled_from(["layers", "heads"]), st.integers(1, 4))
def test_layer_by_layer_in_any_order_is_the_same_chunk(
    cache: Cache, data: st.DataObject, order: str, count: int
) -> None:
    """
    Stored a layer at a time, and loaded a layer at a time: the same bytes as in one go.
    """
    engine = Engine(order)
    layout = engine.layout(count)
    by_layer = layout.by_layer
    assert by_layer is not None
    source, target = some_blocks(data, count), some_blocks(data, count)
    key = next(KEYS)
    with cache.put(key, layout.nbytes) as put:
        for layer in data.draw(st.permutations(engine.names)):
            pieces = layout.pieces(source, by_layer[layer])
            put.copy_pieces(pieces.addresses, pieces.lengths, pieces.offset)
    cache.flush()
    expected = engine.view().copy()

    with cache.get(key) as chunk:  # type: ignore[union-attr]
        assert bytes(chunk.memory) == engine.chunk(source)
        copied = engine.view().copy()
        for i in data.draw(st.permutations(range(engine.layers))):
            pieces = layout.pieces(target, by_layer[engine.names[i]])
            chunk.copy_pieces_to(pieces.addresses, pieces.lengths, pieces.offset)
            expected[i][:, target] = copied[i][:, source]
            assert np.array_equal(engine.view(), expected)


# ---- what the engine says of its allocation -----------------------------------------------------


def test_a_layer_without_a_place_is_refused() -> None:
    """
    Whether the engine did not place it or gave no tensor: it is named, with how many there are.
    """
    engine = Engine("layers")
    placement = Placement(engine.names, 0, engine.page * BLOCKS, engine.page)
    tensors = dict.fromkeys(engine.names, Tensor(engine.memory))
    sizes = dict.fromkeys((*engine.names, "x", "y"), engine.page)
    with pytest.raises(ValueError, match=r"layer 'x' .*\(2 such layers\)"):
        pages_of(Config([placement]), (*engine.names, "x", "y"), tensors, sizes)
    del tensors["layer1"]
    with pytest.raises(ValueError, match="layer 'layer1'"):
        pages_of(Config([placement]), engine.names, tensors, sizes)


def test_layers_of_other_groups_are_passed_by() -> None:
    """
    The pages come in the order of the group, not of the allocation.
    """
    engine = Engine("layers")
    placement = Placement(engine.names, 0, engine.page * BLOCKS, engine.page)
    tensors = dict.fromkeys(engine.names, Tensor(engine.memory))
    sizes = {"layer2": engine.page, "layer0": engine.page}
    pages = pages_of(Config([placement]), ("layer2", "layer0"), tensors, sizes)
    assert [page.layer for page in pages] == ["layer2", "layer0"]
    assert pages[0].address == engine.view()[2].ctypes.data


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("beyond", ["offset", "layer_stride", "block_stride", "blocks"])
def test_a_page_beyond_the_allocation_is_refused(order: str, beyond: str) -> None:
    """
    One byte too far is: better no cache than bytes of somebody else.
    """
    engine = Engine(order)
    stride = {"layers": 24, "blocks": 72, "heads": 12}[order]
    layer_stride = engine.page if order == "blocks" else engine.page * BLOCKS
    tensors = dict.fromkeys(engine.names, Tensor(engine.memory))
    sizes = dict.fromkeys(engine.names, engine.page)
    placement = Placement(engine.names, 0, layer_stride, stride)
    config = Config([placement])
    pages_of(config, engine.names, tensors, sizes)
    if beyond == "blocks":
        config.num_blocks += 1
    else:
        setattr(placement, beyond, getattr(placement, beyond) + 1)
    with pytest.raises(ValueError, match=r"its last page would end at byte \d+ of 864"):
        pages_of(config, engine.names, tensors, sizes)


def test_a_page_that_heads_do_not_divide_is_refused() -> None:
    """
    Where a page is longer than the stride, it is a whole number of pieces.
    """
    memory = np.zeros(10_000, np.uint8)
    config = Config([Placement(["a"], 0, 0, 16)])
    with pytest.raises(ValueError, match="not supported"):
        pages_of(config, ["a"], {"a": Tensor(memory)}, {"a": 25})
