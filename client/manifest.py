# SPDX-License-Identifier: Apache-2.0
"""
What a namespace is for: the model, the layout and everything else that decides the bytes.

Two processes meet in a namespace exactly when their manifests are equal in every field. Put in
whatever changes the bytes under a key; leave out whatever does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cenote.shm import manifest as _format

Value = _format.Value


class Manifest(Mapping[str, Value]):
    """
    An immutable, flat identity: four required fields and any others.

    Args:
        model: Name of the model as the engine knows it; add `revision=` where weights change.
        layout: How a chunk's bytes are arranged, in the engine's own words ("kv-layer-head-dim").
        dtype: Element type of the chunk ("bfloat16", "float8_e4m3fn").
        chunk_tokens: Tokens a chunk covers, at least 1.
        **fields: Further fields (str, int, bool): tp_rank, tp_size, page_size, hash_seed ...

    Raises:
        TypeError: A value is neither str, int nor bool.
        ValueError: chunk_tokens is below 1, a text is empty, or the whole exceeds 3,840 bytes.
    """

    __slots__ = ("_canonical", "_fields")

    def __init__(
        self, model: str, layout: str, dtype: str, chunk_tokens: int, **fields: Value
    ) -> None:
        required: dict[str, Value] = {
            "model": model,
            "layout": layout,
            "dtype": dtype,
            "chunk_tokens": chunk_tokens,
        }
        for name in ("model", "layout", "dtype"):
            if not isinstance(required[name], str) or not required[name]:
                raise ValueError(f"manifest field {name!r} is {required[name]!r}: give some text")
        if type(chunk_tokens) is not int or chunk_tokens < 1:
            raise ValueError(f"manifest field 'chunk_tokens' is {chunk_tokens!r}: give 1 or more")
        self._fields: dict[str, Value] = {**required, **fields}
        self._canonical = _format.canonical(self._fields)

    @classmethod
    def from_canonical(cls, packed: bytes) -> Manifest:
        """Return the manifest in canonical form *packed*; ValueError when it is none."""
        fields = _format.parse(packed)
        missing = {"model", "layout", "dtype", "chunk_tokens"} - fields.keys()
        if missing:
            raise ValueError(f"the manifest lacks {', '.join(sorted(missing))}")
        return cls(**fields)  # type: ignore[arg-type]  # checked by the constructor

    @property
    def canonical(self) -> bytes:
        """The canonical msgpack bytes: what the namespace's identity is computed from."""
        return self._canonical

    def namespace_id(self, salt: bytes = b"") -> bytes:
        """Return the namespace's 32-byte identity under a tenant's salt (I8)."""
        return _format.namespace_id(self._canonical, salt)

    def __getitem__(self, name: str) -> Value:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Manifest) and self._canonical == other._canonical

    def __hash__(self) -> int:
        return hash(self._canonical)

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self._fields.items())
        return f"Manifest({inner})"
