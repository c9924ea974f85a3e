# SPDX-License-Identifier: Apache-2.0
"""What is announced of a pool and taken back, in every order of its two threads' steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.unit.vllm_bed import NBYTES

from cenote.client import Cache, Event, Gap, Manifest, PoolGone
from cenote.client.adapters.vllm import announced as module
from cenote.client.adapters.vllm.announced import LOOKS_MAX, Announced
from cenote.client.testing import MemoryHost

PATIENCE_S = 60.0  # a limit for a hang, not a claim about speed
STORED, GONE = "stored", "gone"


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def event(kind: Any, key: bytes = b"") -> Event:
    return Event(1, kind, "", key, bytes(32), 0, 0, 0)


class Bench:
    """Announced with a set in place of the pool."""

    def __init__(self) -> None:
        self.there: set[bytes] = set()
        self.looking: Callable[[], None] = lambda: None
        self.gone: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.announced = Announced(self._look, lambda each: each.key or None, self._withdrawn)

    def _look(self, key: bytes) -> bool:
        found = key in self.there
        self.looking()
        return found

    def _withdrawn(self, key: bytes) -> tuple[str, bytes]:
        self.gone.put(key)
        return GONE, key

    def offer(self, *keys: bytes) -> None:
        for key in keys:
            if not self.announced.knows(key):
                self.announced.offer(key, (STORED, key), key)

    def hears(self, *events: Event | Gap) -> None:
        """The follower's thread reads these."""
        self.announced._follow(events)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_is_there_is_announced_once(bench: Bench) -> None:
    """
    Not before it is seen, nor again, however often it is offered; then again once it went.
    """
    bench.offer(b"a")
    assert bench.announced.take() == []
    bench.there.add(b"a")
    bench.offer(b"a")
    assert bench.announced.take() == [(STORED, b"a")]
    bench.offer(b"a")
    assert bench.announced.take() == []

    bench.hears(event("evicted", b"a"))
    assert bench.announced.take() == [(GONE, b"a")]
    bench.hears(event("deleted", b"a"))
    assert bench.announced.take() == []
    bench.offer(b"a")
    assert bench.announced.take() == [(STORED, b"a")]


def test_what_never_comes_is_not_looked_for_for_ever(bench: Bench) -> None:
    """
    After a number of looks it is forgotten, and may be offered again.
    """
    bench.offer(b"a")
    for _ in range(LOOKS_MAX):
        assert bench.announced.knows(b"a")
        assert bench.announced.take() == []
    assert not bench.announced.knows(b"a")


@pytest.mark.parametrize("kind", ["stored", "evicted", "deleted"])
def test_others_events_are_nothing_to_us(bench: Bench, kind: str) -> None:
    """
    Of keys that were not announced, of namespaces of others, and of what was stored.
    """
    bench.there.add(b"a")
    bench.offer(b"a")
    bench.announced.take()
    bench.hears(event(kind, b"b"), event(kind), event("stored", b"a"))
    assert bench.announced.take() == []


@pytest.mark.parametrize("lost", [Gap(9, 3, bytes(16)), Gap(1, None, bytes(16)), event("cleared")])
def test_after_a_gap_everything_is_looked_for_again(bench: Bench, lost: Any) -> None:
    """
    What is not there any more is withdrawn, and nothing else.
    """
    bench.there |= {b"a", b"b"}
    bench.offer(b"a", b"b")
    bench.announced.take()
    bench.there.discard(b"a")
    bench.hears(lost)
    assert bench.announced.take() == [(GONE, b"a")]


def test_a_reset_withdraws_all(bench: Bench) -> None:
    """
    begin_anew(), in the order in which it was announced; what was offered and is seen only then is
    not announced, for this engine does not find it any more.
    """
    bench.there |= {b"a", b"b"}
    bench.offer(b"a", b"b")
    bench.announced.take()
    bench.offer(b"c")
    bench.announced.begin_anew()
    bench.announced.begin_anew()
    bench.there.add(b"c")
    assert bench.announced.take() == [(GONE, b"a"), (GONE, b"b")]
    assert not bench.announced.knows(b"c")


def test_the_oldest_are_withdrawn_beyond_a_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    What was asked for last stays longest.
    """
    monkeypatch.setattr(module, "ANNOUNCED_MAX", 2)
    bench.there |= {b"a", b"b", b"c"}
    bench.offer(b"a", b"b")
    bench.announced.take()
    assert bench.announced.knows(b"a")
    bench.offer(b"c")
    assert bench.announced.take() == [(STORED, b"c"), (GONE, b"b")]


def test_a_feed_that_ends_withdraws_all(bench: Bench) -> None:
    """
    Nobody would say any more what leaves.
    """
    bench.there.add(b"a")
    bench.offer(b"a")
    bench.announced.take()

    def feed() -> Iterator[Event]:
        yield event("stored", b"a")
        raise PoolGone("closed")

    bench.announced._follow(feed())
    assert bench.announced.take() == [(GONE, b"a")]


def test_a_late_event_of_an_earlier_chunk_does_not_take_back_what_was_not_said(
    bench: Bench,
) -> None:
    """
    The key was evicted and stored again, and the follower hears of the first while the second is
    looked for: stored, then gone, in this order, and not stored twice.
    """
    bench.there.add(b"a")
    bench.offer(b"a")
    bench.looking = lambda: bench.hears(event("evicted", b"a"))
    assert bench.announced.take() == []
    bench.looking = lambda: None
    bench.offer(b"a")
    assert bench.announced.take() == [(STORED, b"a")]
    bench.offer(b"a")
    bench.hears(event("evicted", b"a"))
    assert bench.announced.take() == [(GONE, b"a")]


def test_what_goes_while_it_is_asked_for_raises_nothing(bench: Bench) -> None:
    """
    knows() is the scheduler's thread, which must not die of what the follower withdraws.
    """
    bench.there.add(b"a")
    bench.offer(b"a")
    bench.announced.take()
    asked = threading.Event()

    class Tag(bytes):
        def __eq__(self, other: object) -> bool:
            asked.set()
            if not bench.announced._lock.locked():  # the follower would get in here
                bench.hears(event("evicted", b"a"))
            return bytes.__eq__(self, other)

        __hash__ = bytes.__hash__

    assert bench.announced.knows(Tag(b"a"))
    assert asked.is_set()


# ---- a pool's own feed ---------------------------------------------------------------------------


def stored(cache: Cache, *numbers: int) -> None:
    for number in numbers:
        with cache.put(key_of(number), NBYTES) as put:
            put.copy_from(bytes(NBYTES))
    cache.flush()


def pool_bench(cache: Cache) -> Bench:
    bench = Bench()
    bench.announced = Announced(
        lambda key: bool(cache.match(key)), lambda each: each.key, bench._withdrawn
    )
    return bench


def test_a_pools_feed_is_followed_from_the_call_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    What leaves before the follower's thread has run is withdrawn all the same.
    """
    threads: list[Callable[[], None]] = []

    class Late(threading.Thread):
        def start(self) -> None:
            threads.append(super().start)

    with MemoryHost("4MiB") as host, host.connect() as pool:
        cache = pool.namespace(Manifest("m", "l", "uint8", 16))
        bench = pool_bench(cache)
        monkeypatch.setattr(threading, "Thread", Late)
        bench.announced.follow(pool)
        stored(cache, 1, 2)
        bench.offer(key_of(1), key_of(2))
        assert bench.announced.take() == [(STORED, key_of(1)), (STORED, key_of(2))]
        cache.delete(key_of(1))
        for start in threads:
            start()
        assert bench.gone.get(timeout=PATIENCE_S) == key_of(1)
        cache.delete(key_of(2))
        assert bench.gone.get(timeout=PATIENCE_S) == key_of(2)


def test_a_feed_that_was_overwritten_is_made_up_for() -> None:
    """
    The follower comes to events that were lost: what went unheard is withdrawn, the rest stays.
    """
    with MemoryHost("4MiB", event_count=64) as host, host.connect() as pool:
        cache = pool.namespace(Manifest("m", "l", "uint8", 16))
        bench = pool_bench(cache)
        stored(cache, 1, 2)
        feed = pool.events(timeout_s=0)
        bench.offer(key_of(1), key_of(2))
        assert len(bench.announced.take()) == 2
        cache.delete(key_of(1))
        for number in range(10, 400):
            stored(cache, number)
            cache.delete(key_of(number))
        heard = list(feed)
        assert isinstance(heard[0], Gap)
        bench.hears(*heard)
        assert bench.announced.take() == [(GONE, key_of(1))]
