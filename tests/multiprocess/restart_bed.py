# SPDX-License-Identifier: Apache-2.0
"""Daemons whose pools outlive them, and clients that go on: for test_restart*.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from cenote.client import Cache, Manifest, Pool

MANIFEST = Manifest("m", "l", "uint8", 16)

MEDIA = ["shm", "memfd", "file"]


def key_of(n: int) -> bytes:
    """Return the key of chunk *n*."""
    return n.to_bytes(8, "little") * 4


def bytes_of(n: int, nbytes: int = 70_000) -> bytes:
    """Return what it holds."""
    return (n * 2654435761 % 2**32).to_bytes(4, "little") * (nbytes // 4)


def put(cache: Cache, *numbers: int) -> None:
    """Store some chunks, each linked when this returns."""
    for n in numbers:
        cache.put_many(key_of(n), [bytes_of(n)])
    cache.flush(timeout_s=30.0)


def holds(cache: Cache, *numbers: int) -> bool:
    """Are they there, with their bytes?"""
    for n in numbers:
        with cache.get(key_of(n)) or pytest.fail(f"chunk {n} is gone") as chunk:
            assert bytes(chunk.memory) == bytes_of(n)
    return True


def wait_until(true: Callable[[], Any]) -> None:
    """Return once it is so; pytest's time limit ends it."""
    pause = threading.Event()
    while not true():
        pause.wait(0.005)


def session_of(pool: Pool) -> tuple[bytes, int, int]:
    """Return which session of which pool it is."""
    welcome = pool._attachment.welcome
    return welcome.pool_id, welcome.session, welcome.nonce
