# SPDX-License-Identifier: Apache-2.0
"""The canonical form of manifests, and the identities that follow from it."""

from __future__ import annotations

import hashlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.client import Manifest
from cenote.shm import manifest as form

VALUES = st.one_of(
    st.booleans(),
    st.integers(min_value=-(2**63), max_value=2**64 - 1),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
FIELDS = st.dictionaries(NAMES, VALUES, min_size=1, max_size=8)


@given(FIELDS, st.randoms())
def test_order_of_fields_does_not_matter(fields: dict[str, Any], random: Any) -> None:
    """Maps with the same fields have the same canonical bytes, whatever order they came in."""
    items = list(fields.items())
    random.shuffle(items)

    assert form.canonical(fields) == form.canonical(dict(items))


@given(FIELDS)
def test_parse_returns_what_was_packed(fields: dict[str, Any]) -> None:
    """The canonical form loses nothing, types included."""
    found = form.parse(form.canonical(fields))

    assert found == fields
    assert {n: type(v) for n, v in found.items()} == {n: type(v) for n, v in fields.items()}


@given(FIELDS, FIELDS)
def test_diff_is_empty_exactly_for_equal_manifests(
    left: dict[str, Any], right: dict[str, Any]
) -> None:
    """diff() names a field if and only if the canonical bytes differ."""
    a, b = form.canonical(left), form.canonical(right)

    assert (form.diff(a, b) == {}) == (a == b)


def test_golden_vector() -> None:
    """The canonical bytes and the namespace id are these, on every host and in every release."""
    packed = form.canonical({"model": "m", "chunk_tokens": 256, "x": True})

    assert packed.hex() == "83ac6368756e6b5f746f6b656e73cd0100a56d6f64656ca16da178c3"
    assert form.namespace_id(packed) == hashlib.sha256(packed).digest()
    assert form.namespace_id(packed, b"salt") == hashlib.sha256(packed + b"salt").digest()


def test_one_true_and_text_are_three_values() -> None:
    """1, True and "1" make three namespaces."""
    packed = {form.canonical({"x": value}) for value in (1, True, "1")}

    assert len(packed) == 3
    assert form.diff(form.canonical({"x": 1}), form.canonical({"x": True})) == {"x": (1, True)}


def test_diff_shows_absent_fields_as_none() -> None:
    """A field that only one of them has is a difference."""
    bound, given_ = form.canonical({"a": 1, "b": 2}), form.canonical({"b": 3, "c": "x"})

    assert form.diff(bound, given_) == {"a": (1, None), "b": (2, 3), "c": (None, "x")}


@pytest.mark.parametrize("value", [1.5, None, b"x", ["x"], {"x": 1}])
def test_other_types_are_refused(value: Any) -> None:
    """Floats, bytes, None and containers have no place in an identity."""
    with pytest.raises(TypeError, match="'x'"):
        form.canonical({"x": value})


def test_subclasses_are_refused() -> None:
    """A str or int subclass may print one thing and pack another."""

    class Odd(str):
        __slots__ = ()

    with pytest.raises(TypeError, match="Odd"):
        form.canonical({"x": Odd("y")})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "at least one"),
        ({"": 1}, "1 to 64"),
        ({"n" * 65: 1}, "1 to 64"),
        ({"x": 2**64}, "outside"),
        ({"x": -(2**63) - 1}, "outside"),
        ({"x": "y" * 3840}, "3840 are allowed"),
        ({"x": "\ud800"}, "Unicode"),
        ({f"f{i}": 1 for i in range(129)}, "128 are allowed"),
    ],
)
def test_wrong_manifests_are_refused(fields: dict[str, Any], words: str) -> None:
    """What cannot be an identity is refused with the reason."""
    with pytest.raises(ValueError, match=words):
        form.canonical(fields)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        msgpack.packb([1, 2]),
        msgpack.packb({"b": 1, "a": 2}),
        msgpack.packb({"a": 1.5}),
        msgpack.packb({1: "a"}),
        b"\x81\xa1a\xcd\x00\x01",
        msgpack.packb({"a": 1}) + b"\x00",
        msgpack.packb({"a": msgpack.Timestamp(1)}),
        b"\x81\xa1a" * 5000,
    ],
)
def test_parse_refuses_what_is_not_canonical(packed: bytes) -> None:
    """Unsorted keys, long encodings, other types and rubbish are a ValueError, nothing else."""
    with pytest.raises(ValueError, match="manifest"):
        form.parse(packed)


@given(st.binary(max_size=64))
def test_parse_survives_rubbish(packed: bytes) -> None:
    """Whatever the bytes are, parse() returns a map or raises ValueError."""
    try:
        found = form.parse(packed)
    except ValueError:
        return

    assert form.canonical(found) == packed


def test_tenant_tag() -> None:
    """The tag is 0 without a salt, and the head of the salt's hash with one."""
    assert form.tenant_tag(b"") == 0
    assert form.tenant_tag(b"s") == int.from_bytes(hashlib.sha256(b"s").digest()[:8], "little")


def test_manifest_is_a_mapping_and_a_key() -> None:
    """Manifest has its fields, compares by value and cannot be changed."""
    one = Manifest("m", layout="l", dtype="bfloat16", chunk_tokens=16, tp_rank=0)
    same = Manifest(tp_rank=0, chunk_tokens=16, dtype="bfloat16", layout="l", model="m")

    assert (one["tp_rank"], len(one), dict(one)["model"]) == (0, 5, "m")
    assert one == same
    assert len({one, same}) == 1
    assert Manifest.from_canonical(one.canonical) == one
    assert one != Manifest("m", "l", "bfloat16", 16, tp_rank=False)
    assert one.namespace_id() == form.namespace_id(one.canonical)
    with pytest.raises(TypeError):
        one["model"] = "other"  # type: ignore[index]  # that is the claim


@pytest.mark.parametrize(
    "fields",
    [
        {"model": ""},
        {"layout": 5},
        {"chunk_tokens": 0},
        {"chunk_tokens": True},
        {"chunk_tokens": 16.0},
    ],
)
def test_manifest_checks_its_required_fields(fields: dict[str, Any]) -> None:
    """Empty text and chunk_tokens below 1 are refused by name."""
    good: dict[str, Any] = {"model": "m", "layout": "l", "dtype": "d", "chunk_tokens": 16}

    with pytest.raises(ValueError, match=next(iter(fields))):
        Manifest(**{**good, **fields})


def test_from_canonical_needs_the_required_fields() -> None:
    """A map without model, layout, dtype and chunk_tokens is no Manifest."""
    with pytest.raises(ValueError, match="chunk_tokens, dtype, layout"):
        Manifest.from_canonical(form.canonical({"model": "m"}))
