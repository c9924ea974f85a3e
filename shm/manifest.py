# SPDX-License-Identifier: Apache-2.0
"""
The canonical form of a namespace's manifest, and the identity that follows from it (I8).

A manifest is a flat map of text, integers and truth values. Its canonical form is one msgpack map
with the keys in the order of their UTF-8 bytes and each value in its shortest encoding, so that
equal manifests are equal bytes on every host. Text is taken as it is: no Unicode normalisation,
no folding of case. `1`, `True` and `"1"` are three different values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgpack

from .errors import ManifestMismatch

Value = str | int | bool

MANIFEST_BYTES_MAX: Final = 3840  # CN_MANIFEST_BYTES_MAX: what a namespace record has room for
MANIFEST_FIELDS_MAX: Final = 128
FIELD_NAME_CHARS_MAX: Final = 64

_INT_MIN: Final = -(1 << 63)
_INT_MAX: Final = (1 << 64) - 1


def canonical(manifest: Mapping[str, Value]) -> bytes:
    """
    Return the canonical bytes of *manifest*.

    Raises:
        TypeError: A field's name is no str, or its value is neither str, int nor bool.
        ValueError: A name is empty or too long, an integer is outside -2^63 .. 2^64-1, text is not
            valid Unicode, or the whole is empty or larger than 3,840 bytes.
    """
    if not manifest:
        raise ValueError("a manifest needs at least one field: it is the identity of a namespace")
    if len(manifest) > MANIFEST_FIELDS_MAX:
        raise ValueError(
            f"the manifest has {len(manifest)} fields, and {MANIFEST_FIELDS_MAX} are allowed: "
            "hash what is long and put the digest in"
        )
    for name, value in manifest.items():
        _check_name(name)
        _check_value(name, value)
    packed = _pack({name: manifest[name] for name in sorted(manifest, key=_utf8)})
    if len(packed) > MANIFEST_BYTES_MAX:
        raise ValueError(
            f"the manifest has {len(packed)} bytes, and {MANIFEST_BYTES_MAX} are allowed: "
            "hash what is long and put the digest in"
        )
    return packed


def parse(packed: bytes) -> dict[str, Value]:
    """
    Return the fields of a canonical manifest that somebody else sent.

    Raises:
        ValueError: The bytes are not the canonical form of any manifest.
    """
    if len(packed) > MANIFEST_BYTES_MAX:
        raise ValueError(f"a manifest of {len(packed)} bytes; {MANIFEST_BYTES_MAX} are allowed")
    try:
        found = msgpack.unpackb(packed, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"the manifest is not msgpack: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"the manifest is a {type(found).__name__}, not a map")
    try:
        again = canonical(found)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if again != packed:
        raise ValueError(
            "the manifest is not in canonical form: sort its keys, encode each value shortest"
        )
    return found


def namespace_id(packed: bytes, salt: bytes = b"") -> bytes:
    """Return the 32-byte identity of a namespace: SHA-256 over manifest and tenant's salt (I8)."""
    return hashlib.sha256(packed + salt).digest()


def tenant_tag(salt: bytes) -> int:
    """Return the 64-bit tag by which tenants are counted; 0 for the empty salt."""
    if not salt:
        return 0
    return int.from_bytes(hashlib.sha256(salt).digest()[:8], "little")


def diff(bound: bytes, given: bytes) -> dict[str, tuple[Value | None, Value | None]]:
    """
    Return the fields in which two canonical manifests differ: {field: (bound, given)}.

    None stands for a field that one of them does not have.
    """
    left, right = parse(bound), parse(given)
    names = sorted(left.keys() | right.keys(), key=_utf8)
    pairs = {name: (left.get(name), right.get(name)) for name in names}
    # `1 == True` in Python, but not in a manifest
    return {n: p for n, p in pairs.items() if p[0] != p[1] or type(p[0]) is not type(p[1])}


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"manifest field {name!r}: names are str, not {type(name).__name__}")
    if not 0 < len(name) <= FIELD_NAME_CHARS_MAX:
        raise ValueError(
            f"manifest field {name[:80]!r}: a name has 1 to {FIELD_NAME_CHARS_MAX} characters"
        )


def _check_value(name: str, value: object) -> None:
    if type(value) not in {str, int, bool}:  # no subclasses: they may pack as something else
        raise TypeError(
            f"manifest field {name!r}: {value!r} is a {type(value).__name__}, and only str, int "
            "and bool have one canonical form: write it as text"
        )
    if isinstance(value, int) and not _INT_MIN <= value <= _INT_MAX:
        raise ValueError(f"manifest field {name!r}: {value} is outside -2^63 .. 2^64-1")


def _utf8(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _pack(fields: dict[str, Value]) -> bytes:
    try:
        packed = msgpack.packb(fields, use_bin_type=True)
    except UnicodeEncodeError as error:
        raise ValueError(f"the manifest has text that is not valid Unicode: {error}") from error
    if not isinstance(packed, bytes):
        raise TypeError("msgpack returned no bytes")
    return packed


@dataclass(frozen=True)
class BoundNamespace:
    """A namespace that is there: its id, its name ("" for none) and its canonical manifest."""

    ident: bytes
    name: str
    manifest: bytes


def bound_elsewhere(
    pool: str, bound: BoundNamespace, name: str, given: bytes, ident: bytes
) -> ManifestMismatch:
    """Return why *name* cannot be the name of the namespace *ident* with the manifest *given*."""
    differing = diff(bound.manifest, given)
    if bound.ident == ident:
        return ManifestMismatch(
            f"this namespace of pool {pool!r} is named {bound.name!r} already, not {name!r}: "
            "open it by that name, or without one",
            {},
        )
    if not differing:
        return ManifestMismatch(
            f"the name {name!r} in pool {pool!r} is another tenant's: choose another one", {}
        )
    fields = ", ".join(differing)
    return ManifestMismatch(
        f"the name {name!r} in pool {pool!r} is bound to a manifest that differs in "
        f"{fields}: use another name, or the manifest that it is bound to",
        differing,
    )
