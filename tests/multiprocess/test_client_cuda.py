# SPDX-License-Identifier: Apache-2.0
"""Memory registered with CUDA, when the daemon dies and the next one comes."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cenote.client import Backoff, Cache, Manifest, connect, cuda

MANIFEST = Manifest("m", "l", "uint8", 16)
NBYTES = 64 * 1024
KEY = bytes(32)
PATIENCE_S = 30.0  # a limit for a hang, not a claim about speed


class Books:
    """A CUDA runtime that only keeps books: which ranges are registered."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}

    def host_register(self, address: int, nbytes: int, flags: int) -> int:
        assert address not in self.ranges
        assert flags & cuda.REGISTER_PORTABLE
        self.ranges[address] = nbytes
        return 0

    def host_unregister(self, address: int) -> int:
        assert f"{address:x}-" in Path("/proc/self/maps").read_text(), "unmapped before"
        del self.ranges[address]
        return 0

    def take_last_error(self) -> int:
        return 0

    def error_text(self, code: int) -> str:
        return str(code)

    def current_device(self) -> tuple[int, int]:
        return 0, 0

    def device_attribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, int(attribute == cuda.ATTRIBUTE_READ_ONLY and device == 0)


def address_of(cache: Cache) -> int:
    with cache.put(KEY, NBYTES) as w:
        w.copy_from(bytes(NBYTES))
    cache.flush()
    chunk = cache.get(KEY)
    assert chunk is not None
    return chunk.address


def test_registration_of_a_daemon_that_was_replaced(cenoted: Callable[..., Any]) -> None:
    """
    After a reconnect the registration says that it is outdated and covers nothing of the new
    memory; the old stays mapped and registered until it is closed, the new can be registered.
    """
    first, books = cenoted(), Books()
    with connect(first.socket, reconnect=Backoff(first_s=0.001, last_s=0.01)) as pool:
        cache = pool.namespace(MANIFEST)
        pinned = cuda.register(pool, runtime=books)
        assert pinned.covers(address_of(cache), NBYTES)
        first.kill()
        cenoted(path=first.socket, pool=first.pool)
        deadline_s, pause = time.monotonic() + PATIENCE_S, threading.Event()
        while not pool.reconnects:
            assert time.monotonic() < deadline_s
            pause.wait(0.002)
        gc.collect()

        old = dict(books.ranges)
        assert not pinned.current
        assert not pinned.covers(address_of(cache), 1)
        with cuda.register(pool, runtime=books) as fresh:
            assert fresh.current
            assert fresh.covers(address_of(cache), NBYTES)
            assert len(books.ranges) == 2 * len(old)
            pinned.close()
            assert books.ranges.keys().isdisjoint(old)
    assert books.ranges == {}
