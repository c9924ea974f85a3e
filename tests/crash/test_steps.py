# SPDX-License-Identifier: Apache-2.0
"""Clients killed at one exact step each, and what is left of them: nothing that hurts."""

from __future__ import annotations

import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from cenote.client import Cache, connect

STEPS: Final = runpy.run_path(str(Path(__file__).with_name("steps.py")))
KEY, OLD, DATA, OLD_BYTES = (STEPS[name] for name in ("KEY", "OLD", "DATA", "OLD_BYTES"))
POOL_BYTES: Final = 16 * 2**20


def press(cache: Cache) -> None:
    """Store twice what the pool holds, so that everything that may leave it does."""
    for i in range(2 * POOL_BYTES // 2**20):
        with cache.put(i.to_bytes(32, "big"), 2**20, wait_ms=30_000) as put:
            put.memory[:8] = i.to_bytes(8, "big")
    cache.flush(timeout_s=30.0)


def bytes_under(cache: Cache, key: bytes) -> bytes | None:
    """What is stored under *key*, or None."""
    found = cache.get(key)
    return None if found is None else bytes(found.memory)


def live_with_the_dead(
    path: Path, zygote: Callable[..., Any], books: Any, wait: Callable[..., Any], step: str
) -> None:
    """What another client sees before and after the one at *step* is killed."""
    leasing, stored = step in STEPS["LEASING"], step in STEPS["STORED"]
    cache = connect(path).namespace(STEPS["MANIFEST"])
    cache.put_many(OLD, [OLD_BYTES])
    cache.flush()
    child = zygote("steps.py").spawn(step, path)
    assert child.line() == "here"
    books.session_of(child.pid)
    if leasing:
        assert books.session_of(child.pid)["leases"] >= 1
        assert cache.delete(OLD) == 1
        press(cache)  # what it names stays out of reach of everybody's writes
        assert books.counters()["limbo_chunks"] == 1
        assert books.session_of(child.pid)["limbo_chunks"] >= 1  # counted by lease
    assert child.kill() == -signal.SIGKILL

    wait(lambda: child.pid not in {s["pid"] for s in books.sessions().values()}, books.state)
    wait(lambda: books.counters()["limbo_chunks"] == 0, books.state)
    assert books.audit() == 0
    assert bytes_under(cache, KEY) == (DATA if stored else None)
    assert bytes_under(cache, OLD) == (None if leasing else OLD_BYTES)
    press(cache)
    assert cache.match(OLD) == cache.match(KEY) == 0  # neither a lease nor a pin is left


@pytest.mark.parametrize("step", STEPS["names"]())
def test_a_client_killed_at_a_step(
    cenoted: Callable[..., Any],
    zygote: Callable[..., Any],
    open_books: Callable[..., Any],
    wait: Callable[..., Any],
    step: str,
) -> None:
    """
    Whatever step a client is killed at: a chunk is there whole or not at all, its extents and
    leases come back, the tables agree, and the pool goes on.
    """
    daemon = cenoted("--policy", "lru", size=str(POOL_BYTES))
    books = open_books(daemon)

    live_with_the_dead(daemon.socket, zygote, books, wait, step)

    assert books.settle()["bad_records"] == 0
