# SPDX-License-Identifier: Apache-2.0
"""How tokens become chunks and keys, and how much of a prompt can be loaded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.client.adapters.vllm.groups import Group, Shape, full_hash, longest_hit

CHUNK = 8


def group(block_tokens: int, window: int = 0, index: int = 0) -> Group:
    return Group(index, block_tokens, window, (f"layer{index}",))


def hashes(count: int, nbytes: int = 32) -> list[bytes]:
    return [hashlib.sha256(str(i).encode()).digest()[:nbytes] for i in range(count)]


# ---- the length of a chunk ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hash_tokens", "blocks", "chosen"),
    [
        (16, [16], 256),
        (16, [16, 32], 256),
        (48, [48], 288),
        (16, [48], 288),
        (256, [256], 256),
        (1024, [1024], 1024),
        (1, [3, 5, 7], 315),
    ],
)
def test_a_chunk_is_the_shortest_with_256_tokens(
    hash_tokens: int, blocks: list[int], chosen: int
) -> None:
    """
    By default: a multiple of every group's block and of what a hash covers.
    """
    shape = Shape.of([group(each) for each in blocks], hash_tokens, None)
    assert shape.chunk_tokens == chosen


@given(st.integers(1, 600), st.lists(st.integers(1, 64), min_size=1, max_size=3))
def test_the_default_chunk_suits_every_group(hash_tokens: int, blocks: list[int]) -> None:
    """
    It ends where all blocks end, has 256 tokens at least, and no shorter one would do.
    """
    shape = Shape.of([group(each) for each in blocks], hash_tokens, None)
    step = math.lcm(hash_tokens, *blocks)
    assert all(shape.chunk_tokens % each == 0 for each in (hash_tokens, *blocks))
    assert shape.chunk_tokens >= 256
    assert shape.chunk_tokens - step < 256


@pytest.mark.parametrize(
    ("given_tokens", "proposed"), [(1, 96), (100, 96), (150, 192), (95, 96), (300, 288)]
)
def test_a_chunk_that_blocks_do_not_fit_into_is_refused_with_one_that_would_do(
    given_tokens: int, proposed: int
) -> None:
    """
    The message has what was given, what it must be a multiple of, and the nearest that is.
    """
    with pytest.raises(ValueError, match=f"chunk_tokens is {given_tokens}") as caught:
        Shape.of([group(32), group(48)], 16, given_tokens)
    assert "a multiple of 96" in str(caught.value)
    assert f"give {proposed}" in str(caught.value)
    assert Shape.of([group(32), group(48)], 16, proposed).chunk_tokens == proposed


# ---- hashes -------------------------------------------------------------------------------------


def test_a_chunks_hash_is_that_of_its_last_block() -> None:
    """
    The engine chains its hashes, so the last names all tokens up to there.
    """
    shape = Shape.of([group(4)], 4, 8)
    given_hashes = hashes(7)
    assert shape.chunk_hashes(given_hashes, 2, 3) == [given_hashes[5]]
    assert shape.chunk_hashes(given_hashes, 0, 3) == [
        given_hashes[1],
        given_hashes[3],
        given_hashes[5],
    ]


@given(st.integers(1, 4), st.integers(0, 20), st.data())
def test_many_hashes_are_the_hashes_one_by_one(step: int, count: int, data: st.DataObject) -> None:
    """
    Of any stretch of the chunks that have one.
    """
    shape = Shape.of([group(2)], 2, 2 * step)
    given_hashes = hashes(count)
    chunks = shape.hashed_chunks(given_hashes)
    assert chunks == count // step
    first = data.draw(st.integers(0, chunks))
    end = data.draw(st.integers(first, chunks))
    one_by_one = [given_hashes[(chunk + 1) * step - 1] for chunk in range(first, end)]
    assert shape.chunk_hashes(given_hashes, first, end) == one_by_one


def test_hashes_of_more_tokens_than_a_block_name_the_same_chunks() -> None:
    """
    With blocks of 4 tokens and hashes of 8, a chunk of 16 is two hashes and four blocks.
    """
    shape = Shape.of([group(4)], 8, 16)
    given_hashes = hashes(5)
    assert shape.hashed_chunks(given_hashes) == 2
    assert shape.chunk_hashes(given_hashes, 0, 2) == [given_hashes[1], given_hashes[3]]
    assert shape.blocks_of(shape.groups[0], 1) == range(4, 8)


def test_each_group_has_its_own_blocks_of_a_chunk() -> None:
    """
    They cover the same tokens.
    """
    small, large = group(4), group(16, index=1)
    shape = Shape.of([small, large], 4, 16)
    assert shape.blocks_of(small, 2) == range(8, 12)
    assert shape.blocks_of(large, 2) == range(2, 3)


def test_hashes_of_32_bytes_stay_as_they_are() -> None:
    """
    And come out as bytes, whatever kind of bytes they were.
    """
    digest = hashlib.sha256(b"x").digest()
    assert full_hash(digest) == digest
    assert type(full_hash(type("BlockHash", (bytes,), {})(digest))) is bytes


@pytest.mark.parametrize("nbytes", [1, 8, 16, 31, 33, 64])
def test_other_hashes_become_hashes_of_32_bytes(nbytes: int) -> None:
    """
    Such as xxhash's 16 bytes: different ones stay different.
    """
    one, other = bytes(nbytes), b"\x01" + bytes(nbytes - 1)
    assert full_hash(one) == hashlib.sha256(one).digest()
    assert len({full_hash(one), full_hash(other)}) == 2


def test_chunks_of_short_hashes_have_32_bytes_each() -> None:
    """
    So that their keys can be handed to the pool in one piece.
    """
    shape = Shape.of([group(4)], 4, 8)
    short = hashes(6, 16)
    assert shape.chunk_hashes(short, 0, 3) == [full_hash(short[i]) for i in (1, 3, 5)]


# ---- what can be loaded -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "chunks"), [(0, 0), (1, 0), (2, 1), (8, 1), (9, 1), (10, 2), (17, 2), (18, 3)]
)
def test_a_window_needs_the_chunks_that_its_next_token_sees(window: int, chunks: int) -> None:
    """
    The first token behind the hit sees window - 1 tokens before it.
    """
    assert group(4, window).trailing(CHUNK) == chunks


def needed(one: Group, end: int) -> range:
    """By definition: the chunks with a token that the token at end * CHUNK sees."""
    if not one.window:
        return range(end)
    first_seen = max(0, end * CHUNK - one.window + 1)
    return range(min(end, first_seen // CHUNK), end)


def by_definition(groups: Sequence[Group], present: Sequence[Sequence[bool]]) -> int:
    return max(
        end
        for end in range(len(present[0]) + 1)
        if all(
            there[chunk]
            for one, there in zip(groups, present, strict=True)
            for chunk in needed(one, end)
        )
    )


def found(groups: Sequence[Group], present: Sequence[Sequence[bool]]) -> int:
    keys = [full_hash(str(i).encode()) for i in range(len(present[0]))]
    place = {key: i for i, key in enumerate(keys)}
    shape = Shape(tuple(groups), CHUNK, 4)

    def prefix_of(one: Group, asked: Sequence[bytes]) -> int:
        there = [present[one.index][place[key]] for key in asked]
        return there.index(False) if False in there else len(there)

    return longest_hit(shape, keys, prefix_of)


@st.composite
def pools(draw: st.DrawFn) -> tuple[list[Group], list[list[bool]]]:
    windows = draw(st.lists(st.sampled_from([0, 0, 1, 2, 8, 9, 10, 25, 1000]), min_size=1))
    groups = [group(4, window, i) for i, window in enumerate(windows[:4])]
    count = draw(st.integers(0, 12))
    mostly = st.sampled_from([True, True, True, False])
    row = st.lists(mostly, min_size=count, max_size=count)
    return groups, [draw(row) for _ in groups]


@given(pools())
def test_the_longest_hit_is_the_longest_by_definition(
    drawn: tuple[list[Group], list[list[bool]]],
) -> None:
    """
    For any groups, windows and holes: none longer could be loaded, and this one can.
    """
    groups, present = drawn
    assert found(groups, present) == by_definition(groups, present)


def test_a_window_does_not_miss_what_has_gone_before_it() -> None:
    """
    A full group needs all; a window of one chunk only the last.
    """
    full, window = group(4), group(4, 8, 1)
    assert found([full, window], [[True] * 5, [False, False, False, False, True]]) == 5
    assert found([full, window], [[True] * 5, [True, False, True, False, False]]) == 3
    assert found([full, window], [[False] + [True] * 4, [True] * 5]) == 0


def test_nothing_asked_is_nothing_found() -> None:
    """
    Without a key there is no hit.
    """
    assert found([group(4), group(4, 8, 1)], [[], []]) == 0
