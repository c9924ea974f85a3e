# SPDX-License-Identifier: Apache-2.0
"""What a real daemon answers has the fields of the golden vectors, no fewer and no more."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenote.shm.manifest import canonical
from cenote.shm.messages import OPS
from cenote.shm.session import new_hello
from cenote.shm.wire import ERRORS, close_all

VECTORS = json.loads((Path(__file__).parents[1] / "protocol" / "messages.json").read_text())
CONFIG = """
[[pool]]
name = "{pool}"
socket = "{socket}"
[[pool.region]]
medium = "file"
path = "FOLDER/pool"
size = "16MiB"
[pool.access]
readers = [4242]
writers = [UID]
admins = [UID]
[[pool.tenant]]
users = [UID]
salt_file = "FOLDER/salt"
quota = "1MiB"
""".replace("UID", str(os.geteuid()))


def shape(value: Any) -> Any:
    """The names in *value* and the types below them; rows of a list have one shape."""
    if isinstance(value, dict) and list(value) == ["bytes"] and isinstance(value["bytes"], str):
        return "bytes"
    if isinstance(value, dict):
        return {str(key): shape(item) for key, item in value.items()}
    if isinstance(value, list):
        shapes = [shape(item) for item in value]
        assert all(other == shapes[0] for other in shapes)
        return shapes[:1]
    return type(value).__name__


def golden(name: str) -> Any:
    """The shape of the vector of that name."""
    (found,) = [v["body"] for v in VECTORS["vectors"] if v["name"] == name]
    return shape(found)


@pytest.fixture
def daemon(cenoted: Callable[..., Any], tmp_path: Path) -> Any:
    """One with every optional setting, so that each has its place in the replies."""
    salt = tmp_path / "salt"
    salt.touch(0o600)
    salt.write_bytes(os.urandom(32))
    return cenoted(config=CONFIG.replace("FOLDER", str(tmp_path)))


@pytest.mark.parametrize(
    ("op", "role", "name"),
    [
        ("stats", "writer", "counters and settings"),
        ("sessions", "writer", "sessions, one over its limit"),
        ("config", "admin", "config as an admin sees it"),
        ("config", "writer", "config as others see it"),
        ("audit", "admin", "audited"),
        ("clear", "admin", "cleared"),
        ("ping", "reader", "pong"),
    ],
)
def test_replies_have_the_fields_of_their_vectors(
    daemon: Any, op: str, role: str, name: str
) -> None:
    """A field that comes, goes, or changes its type is a change of the protocol's vectors."""
    channel, _welcome, _fds = daemon.hello(role)

    assert shape(channel.request(op).body) == golden(name)


def test_welcome_and_namespace_have_the_fields_of_their_vectors(daemon: Any) -> None:
    """The replies that attach a client, too."""
    channel = daemon.channel()
    welcome = channel.request("hello", new_hello("test", "writer").fields())
    close_all(welcome.descriptors)
    manifest = canonical({"model": "m", "layout": "l", "dtype": "uint8", "chunk_tokens": 1})
    opened = channel.request("namespace", {"manifest": manifest, "name": "prod"})

    assert shape(welcome.body) == golden("welcome of a writer")
    assert shape(opened.body) == golden("namespace opened")


def test_every_operation_and_every_error_has_a_vector() -> None:
    """`bye` and `destroy` answer as `ping` does; `not_found` is reserved."""
    bodies = [v["body"] for v in VECTORS["vectors"]]

    assert {body["op"] for body in bodies if "op" in body} == OPS
    assert {body["error"] for body in bodies if "error" in body} == ERRORS - {"not_found"}
