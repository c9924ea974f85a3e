# SPDX-License-Identifier: Apache-2.0
"""
The requests of the control protocol, field by field.

An unknown field is ignored, so that a newer peer may say more; a missing or wrong one is a
`bad_request` that names it. Specified in docs/control-protocol.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .wire import ID_MAX, TEXT_SHOWN_MAX, WireError

CLIENT_MAX_BYTES: Final = 64
LABEL_MAX_BYTES: Final = 39
NAME_MAX_BYTES: Final = 55
MANIFEST_MAX_BYTES: Final = 3840

REFS_MAX: Final = 1024  # chunks that one request names
REF_MAX: Final = 2**64 - 1

NO_LIMIT: Final = 2**64 - 1  # bytes that a session may lease
ROLES: Final = {"reader": 1, "writer": 2, "admin": 3}  # enum cn_role
OPS: Final = frozenset(
    {
        "hello",
        "namespace",
        "stats",
        "sessions",
        "config",
        "audit",
        "clear",
        "destroy",
        "lost",
        "ping",
        "bye",
    }
)
_MISSING: Final = object()


class Fields:
    """
    The fields of a message, each taken with its type and its bounds.

    A field that is missing or wrong raises WireError with its name; one that nobody asks for is
    ignored, so that a newer peer may say more.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number between *low* and *high*."""
        value = self._get(name)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise self._wrong(name, f"a whole number from {low} to {high}")

    def text(self, name: str, max_bytes: int) -> str:
        """Text of at most *max_bytes* in UTF-8, without control characters."""
        value = self._get(name)
        fits = isinstance(value, str) and len(value.encode()) <= max_bytes
        if fits and (value.isprintable() or not value):
            return str(value)
        raise self._wrong(name, f"printable text of at most {max_bytes} bytes")

    def text_or_none(self, name: str, max_bytes: int) -> str | None:
        """The same, or None when it is nil or missing."""
        return None if self._body.get(name) is None else self.text(name, max_bytes)

    def blob(self, name: str, low: int, high: int) -> bytes:
        """*low* to *high* bytes."""
        value = self._get(name)
        if isinstance(value, bytes) and low <= len(value) <= high:
            return value
        raise self._wrong(name, f"{low} to {high} bytes of binary")

    def flag(self, name: str) -> bool:
        """A truth value; false when it is missing."""
        value = self._body.get(name, False)
        if isinstance(value, bool):
            return value
        raise self._wrong(name, "true or false")

    def one_of(self, name: str, allowed: Iterable[str]) -> str:
        """One of a few words."""
        value = self._get(name)
        words = tuple(allowed)
        if isinstance(value, str) and value in words:
            return value
        raise self._wrong(name, "one of " + ", ".join(words))

    def integers(self, name: str, count: int, low: int, high: int) -> tuple[int, ...]:
        """An array of exactly *count* whole numbers."""
        value = self._get(name)
        if isinstance(value, list) and len(value) == count:
            index = Fields({f"{name}[{i}]": item for i, item in enumerate(value)})
            return tuple(index.integer(f"{name}[{i}]", low, high) for i in range(count))
        raise self._wrong(name, f"an array of {count} whole numbers")

    def sequence(self, name: str, max_items: int) -> list[Any]:
        """An array of at most *max_items*."""
        value = self._get(name)
        if isinstance(value, list) and len(value) <= max_items:
            return value
        raise self._wrong(name, f"an array of at most {max_items}")

    def section(self, name: str) -> dict[str, Any]:
        """A map."""
        value = self._get(name)
        if isinstance(value, dict):
            return value
        raise self._wrong(name, "a map")

    def _get(self, name: str) -> Any:
        return self._body.get(name, _MISSING)

    def _wrong(self, name: str, wanted: str) -> WireError:
        value = self._get(name)
        if value is _MISSING:
            return WireError(f"the field {name!r} is missing; it must be {wanted}")
        shown = repr(value)[:TEXT_SHOWN_MAX]
        return WireError(f"the field {name!r} is {shown}; it must be {wanted}")


@dataclass(frozen=True)
class Resume:
    """The session that a client has still, after its connection was lost."""

    pool_id: bytes
    session: int
    nonce: int
    role: str

    def fields(self) -> dict[str, Any]:
        """The fields of a hello's `resume`."""
        return vars(self)

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Resume:
        """Return what `resume` says, or raise WireError."""
        fields = Fields(body)
        return cls(
            fields.blob("pool_id", 16, 16),
            fields.integer("session", 0, 2**32 - 1),
            fields.integer("nonce", 0, 2**64 - 1),
            fields.one_of("role", ROLES),
        )


@dataclass(frozen=True)
class Hello:
    """The first request of a client."""

    client: str
    protocol: tuple[int, int]
    layout: int
    fingerprint: int
    role: str | None
    label: str
    resume: Resume | None = None

    def fields(self) -> dict[str, Any]:
        """The request's fields, without op and id."""
        return {
            "client": self.client,
            "protocol": list(self.protocol),
            "layout": self.layout,
            "fingerprint": self.fingerprint,
            "role": self.role,
            "label": self.label,
            **({"resume": self.resume.fields()} if self.resume else {}),
        }


def parse_request(body: Mapping[str, Any]) -> tuple[str, int]:
    """Return op and id of a request, or raise WireError."""
    fields = Fields(body)
    return fields.one_of("op", sorted(OPS)), fields.integer("id", 1, ID_MAX)


def parse_hello(body: Mapping[str, Any]) -> Hello:
    """Return a hello request, or raise WireError naming the field that is wrong."""
    fields = Fields(body)
    low, high = fields.integers("protocol", 2, 1, 2**16 - 1)
    role = None if body.get("role") is None else fields.one_of("role", ROLES)
    return Hello(
        client=fields.text("client", CLIENT_MAX_BYTES),
        protocol=(low, high),
        layout=fields.integer("layout", 0, 2**32 - 1),
        fingerprint=fields.integer("fingerprint", 0, 2**64 - 1),
        role=role,
        label=fields.text("label", LABEL_MAX_BYTES),
        resume=None if body.get("resume") is None else Resume.parse(fields.section("resume")),
    )


def parse_namespace(body: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return canonical manifest and name ("" for none) of a namespace request."""
    fields = Fields(body)
    manifest = fields.blob("manifest", 1, MANIFEST_MAX_BYTES)
    return manifest, fields.text_or_none("name", NAME_MAX_BYTES) or ""


def parse_lost(body: Mapping[str, Any]) -> list[int]:
    """Return the references of a lost request: generation and descriptor of each chunk."""
    items = Fields(body).sequence("refs", REFS_MAX)
    named = Fields({f"refs[{i}]": item for i, item in enumerate(items)})
    return [named.integer(f"refs[{i}]", 1, REF_MAX) for i in range(len(items))]
