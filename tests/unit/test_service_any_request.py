# SPDX-License-Identifier: Apache-2.0
"""
Whatever a client sends, PoolService answers with one body or one Refusal.

Requests go the daemon's way without its socket: packed, decoded, parsed, answered. Some are any
map, some are near what each operation wants, which is where fields that pass one check and fail
the next come from.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenote.client import Manifest
from cenote.client.testing import MemoryHost
from cenote.daemon.access import AccessTable
from cenote.daemon.config import AccessConfig, PoolConfig
from cenote.daemon.config_kinds import Principal
from cenote.daemon.service import Caller, PoolService
from cenote.shm.identity import Peer
from cenote.shm.manifest import canonical
from cenote.shm.messages import OPS, ROLES, parse_request
from cenote.shm.session import new_hello
from cenote.shm.wire import ERRORS, HEADER, Refusal, decode_body, encode, failure

Body = dict[str, Any]

SCALARS: Final = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=80)
    | st.binary(max_size=80)
)
VALUES: Final = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FIELDS: Final[dict[str, st.SearchStrategy[Any]]] = {
    "op": st.sampled_from([*sorted(OPS), *["hello", "namespace"] * 3]),
    "id": st.integers(1, 2**32 - 1),
    "role": st.sampled_from([None, *ROLES]),
    "protocol": st.lists(st.integers(0, 2**16), min_size=2, max_size=2),
    "label": st.text(max_size=40),
    "manifest": st.builds(
        canonical, st.dictionaries(st.just("model"), st.integers(0, 9), min_size=1)
    )
    | st.binary(max_size=64)
    | st.builds(msgpack.packb, VALUES),
    "refs": st.lists(st.integers(0, 30).map(lambda d: 1 << 32 | d), max_size=4),
    "name": st.none() | st.sampled_from(["", "a", "b"]) | st.text(max_size=60),
}


def hello(role: str | None = None) -> Body:
    """Return the request of a client of this build."""
    return {"op": "hello", "id": 1, **new_hello("test/1", role, "any").fields()}


@st.composite
def near_requests(draw: st.DrawFn) -> Body:
    """A request of some operation, with a few of its fields gone or changed."""
    op = draw(FIELDS["op"])
    body: Body = hello() if op == "hello" else {"op": op, "id": 1}
    if op == "namespace":
        body |= {"manifest": draw(FIELDS["manifest"]), "name": draw(FIELDS["name"])}
    if op == "lost":
        body |= {"refs": draw(FIELDS["refs"])}
    for name in draw(st.lists(st.sampled_from(sorted({*body, *FIELDS})), max_size=2)):
        how = draw(st.sampled_from(["drop", "likely", "any"]))
        if how == "drop":
            body.pop(name, None)
        else:
            body[name] = draw(FIELDS.get(name, VALUES) if how == "likely" else VALUES)
    return body


ANY_REQUESTS: Final = st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(), VALUES)
DESCRIPTORS: Final = st.lists(st.sampled_from(["null", "pidfd", "init"]), max_size=2)
REQUESTS: Final = st.tuples(near_requests() | ANY_REQUESTS, st.just([]) | st.just([]) | DESCRIPTORS)


class Bed:
    """A pool and its service, made anew after a client destroyed it."""

    def __init__(self) -> None:
        self.make()

    def make(self) -> None:
        """Begin with a pool that holds a few chunks."""
        self.destroyed = 0
        self.memory = MemoryHost("16MiB")
        self.host = self.memory._running()
        ours = Principal("user", os.geteuid(), "us")
        config = PoolConfig(access=AccessConfig(admins=(ours,)))
        self.service = PoolService(self.host, config, AccessTable(config), self._count)
        pool = self.memory.connect()
        cache = pool.namespace(Manifest("m", "l", "uint8", 32))
        for i in range(20):
            with cache.put(bytes([i]) * 32, 4096) as writer:
                writer.copy_from(bytes(4096))
        pool.close()

    def _count(self) -> None:
        self.destroyed += 1

    def check(self) -> None:
        """Nothing that was asked made the keeper's tables disagree."""
        assert self.memory.audit() == 0
        if self.destroyed:
            self.memory.stop()
            self.make()


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    """One pool for all requests: what one leaves behind, the next one meets."""
    made = Bed()
    yield made
    made.memory.stop()


def opened(kinds: list[str]) -> tuple[int, ...]:
    """Descriptors as they came with a request."""
    make = {
        "null": lambda: os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC),
        "pidfd": lambda: os.pidfd_open(os.getpid()),
        "init": lambda: os.pidfd_open(os.getppid()),
    }
    return tuple(make[kind]() for kind in kinds)


def is_open(fd: int) -> bool:
    """Whether the descriptor is open."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def ask(service: PoolService, caller: Caller, body: Body, kinds: list[str]) -> Body | None:
    """Send one request the daemon's way; None: it is so wrong that nobody owes it an answer."""
    try:
        decoded = decode_body(msgpack.packb(body))
        op, request_id = parse_request(decoded)
    except Refusal:
        return None
    descriptors = opened(kinds)
    try:
        answer = service.answer(caller, op, request_id, decoded, descriptors)
    except Refusal as refusal:
        reply = failure(request_id, refusal)
    else:
        reply = answer.body
        answer.sent()
        assert not any(is_open(fd) for fd in answer.descriptors)
    assert not any(is_open(fd) for fd in descriptors)
    return decode_body(encode(reply)[HEADER.size :])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([None, *ROLES, "stranger"]), st.lists(REQUESTS, max_size=6))
def test_every_request_has_one_answer(
    bed: Bed, role: str | None, requests: list[tuple[Body, list[str]]]
) -> None:
    """A body or a Refusal, never another exception; descriptors closed; the audit finds nothing."""
    uid = os.geteuid() + (role == "stranger")
    caller = Caller(Peer(os.getpid(), uid, uid, frozenset({uid})))
    if role != "stranger":
        welcome = ask(bed.service, caller, hello(role), [])
        assert welcome is not None
        assert welcome["ok"] is True, welcome
        assert caller.role == (role or "writer")

    for body, kinds in requests:
        before = caller.role
        reply = ask(bed.service, caller, body, kinds)
        if reply is not None:
            assert reply["id"] == body["id"]
            assert reply["ok"] is True or reply["error"] in ERRORS
        assert not before or caller.role == before  # no request changes who one is

    bed.service.closed(caller)
    bed.check()
