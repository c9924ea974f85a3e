# SPDX-License-Identifier: Apache-2.0
"""Keys that are a chain of SHA-256 over token ids."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.client import keys

ROOT = bytes(range(32))
TOKENS = st.lists(st.integers(min_value=0, max_value=2**32 - 1), max_size=40)


def reference(tokens: list[int], chunk_tokens: int, root: bytes) -> list[bytes]:
    """The definition, word for word."""
    found, parent = [], root
    for at in range(0, len(tokens) // chunk_tokens * chunk_tokens, chunk_tokens):
        ids = struct.pack(f"<{chunk_tokens}I", *tokens[at : at + chunk_tokens])
        parent = hashlib.sha256(parent + ids).digest()
        found.append(parent)
    return found


@given(TOKENS, st.integers(min_value=1, max_value=9))
def test_chain_is_its_definition(tokens: list[int], chunk_tokens: int) -> None:
    """chain() = SHA-256(parent ‖ ids as u32 LE) for each full chunk, and none for the rest."""
    expected = reference(tokens, chunk_tokens, ROOT)

    assert keys.split(keys.chain(tokens, chunk_tokens, ROOT)) == expected


@given(TOKENS, st.integers(min_value=1, max_value=9))
def test_every_form_of_tokens_gives_the_same_keys(tokens: list[int], chunk_tokens: int) -> None:
    """Lists, tuples, arrays of any integer type and packed bytes are one prompt."""
    expected = keys.chain(tokens, chunk_tokens, ROOT)
    packed = struct.pack(f"<{len(tokens)}I", *tokens)
    forms: list[Any] = [tuple(tokens), packed, bytearray(packed), memoryview(packed)]
    forms += [np.array(tokens, kind) for kind in (np.uint32, np.int64, np.uint64, ">u4")]

    assert all(keys.chain(given_, chunk_tokens, ROOT) == expected for given_ in forms)


def test_golden_vector() -> None:
    """The first two keys of this prompt are these, in every release and language."""
    found = keys.split(keys.chain([1, 2, 3, 4, 5], 2, bytes(32)))

    assert [key.hex()[:16] for key in found] == [
        hashlib.sha256(bytes(32) + b"\x01\0\0\0\x02\0\0\0").hexdigest()[:16],
        hashlib.sha256(found[0] + b"\x03\0\0\0\x04\0\0\0").hexdigest()[:16],
    ]


def test_chain_goes_on_where_it_stopped() -> None:
    """The last key is the root of the tokens that follow."""
    tokens = list(range(100, 132))
    first = keys.chain(tokens[:16], 8, ROOT)

    assert first + keys.chain(tokens[16:], 8, first[-32:]) == keys.chain(tokens, 8, ROOT)


def test_strided_arrays_are_read_right() -> None:
    """A view with a step is the tokens that it shows."""
    tokens = np.arange(64, dtype=np.int64)

    assert keys.chain(tokens[::2], 4, ROOT) == keys.chain(list(range(0, 64, 2)), 4, ROOT)


@pytest.mark.parametrize("form", [list, np.array])
@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_token_ids_out_of_range(form: Any, wrong: int) -> None:
    """An id that does not fit is named with its place; it is never cut off."""
    with pytest.raises(ValueError, match=f"token 2 is {wrong}"):
        keys.chain(form([1, 2, wrong]), 1, ROOT)


@pytest.mark.parametrize(
    ("tokens", "kind"),
    [
        ([1.5, 2], TypeError),
        (["a"], TypeError),
        (np.array([1.0]), TypeError),
        (np.array([[1, 2]]), ValueError),
        (b"12345", ValueError),
        (memoryview(b"12345678").cast("Q"), TypeError),
    ],
)
def test_what_is_no_tokens(tokens: Any, kind: type[Exception]) -> None:
    """Floats, text, matrices and odd bytes are refused."""
    with pytest.raises(kind):
        keys.chain(tokens, 1, ROOT)


def test_wrong_root_and_chunk_tokens() -> None:
    """The root has 32 bytes and a chunk covers a token at least."""
    with pytest.raises(ValueError, match="31 bytes"):
        keys.chain([1], 1, bytes(31))
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        keys.chain([1], 0, ROOT)
    with pytest.raises(ValueError, match="33 bytes"):
        keys.split(bytes(33))
