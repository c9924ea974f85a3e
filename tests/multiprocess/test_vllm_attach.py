# SPDX-License-Identifier: Apache-2.0
"""The vLLM adapter's way to a pool: before there is a daemon, after it died, and what it says."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenote.client import Cache, Manifest, Pool
from cenote.client.adapters.vllm import attach
from cenote.client.adapters.vllm.attach import Attachment
from cenote.client.adapters.vllm.identity import manifest_of
from cenote.client.adapters.vllm.messages import Era, Fields
from cenote.client.adapters.vllm.settings import LOGGER
from cenote.client.testing import MemoryHost

PATIENCE_S = 60.0  # a limit for a hang, not a claim about speed
NBYTES = 4096
KEY = bytes(32)

Start = Callable[..., Any]


class Log(logging.Handler):
    """What the adapter says, as it says it."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._new: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._new.put(record.getMessage())

    def wait_for(self, text: str) -> None:
        """Return once it was said after what was heard before."""
        while text not in self._next():
            pass

    def _next(self) -> str:
        self.heard.append(self._new.get(timeout=PATIENCE_S))
        return self.heard[-1]

    def count(self, text: str) -> int:
        while not self._new.empty():
            self._next()
        return sum(text in each for each in self.heard)


@pytest.fixture
def log() -> Iterator[Log]:
    logger, handler = logging.getLogger(LOGGER), Log()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


class Told:
    """Who is told of a pool, in the background thread."""

    def __init__(self) -> None:
        self._pools: queue.SimpleQueue[Pool] = queue.SimpleQueue()

    def __call__(self, pool: Pool) -> None:
        self._pools.put(pool)

    def wait(self) -> Pool:
        return self._pools.get(timeout=PATIENCE_S)

    @property
    def more(self) -> bool:
        return not self._pools.empty()


@pytest.fixture
def attached() -> Iterator[Callable[..., Attachment]]:
    """Make attachments that look for a daemon at a path."""
    made: list[Attachment] = []

    def make(path: Path | None = None, told: Any = None) -> Attachment:
        made.append(Attachment(None if path is None else str(path), "test", told))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close()
        each._thread.join(PATIENCE_S)
        assert not each._thread.is_alive()


def manifest(**changes: Any) -> Manifest:
    fields: Fields = {"model": "m", "layout": "l", "dtype": "uint8", "group": 0}
    fields |= {"tp_rank": 0, "pp_rank": 0}
    return manifest_of({**fields, **changes}, Era("sha256", "seed"), 256)


def cache_of(attachment: Attachment, wanted: Manifest) -> Cache:
    """Return a namespace once it was said to be open, which is a moment before it is noted."""
    cache = attachment.open(wanted)
    assert cache is not None
    assert attachment.cache(wanted) is cache
    return cache


def store(attachment: Attachment, wanted: Manifest) -> None:
    cache = cache_of(attachment, wanted)
    with cache.put(KEY, NBYTES, wait_ms=int(PATIENCE_S * 1000)) as put:
        put.copy_from(bytes(NBYTES))
    cache.flush()
    assert cache.match(KEY) == 1


def wait_until(true: Callable[[], bool]) -> None:
    """Look again and again, for what the client's own thread finds out."""
    pause = threading.Event()
    while not true():
        pause.wait(0.002)


def test_a_daemon_that_comes_later_is_attached_to(
    cenoted: Start, attached: Callable[..., Attachment], log: Log, tmp_path: Path
) -> None:
    """
    Until then nothing is open and nothing raises, and one line says so; then what was wanted is
    opened without anybody's asking.
    """
    told, path = Told(), tmp_path / "later.sock"
    attachment = attached(path, told)
    attachment.want([manifest()])
    log.wait_for("no pool yet")
    assert attachment.pool is None
    assert not attachment.storing
    assert attachment.open(manifest()) is None

    cenoted(path=path)
    attachment.want([manifest()])  # look now
    assert told.wait() is attachment.pool
    log.wait_for("is open")
    store(attachment, manifest())
    assert attachment.storing
    assert log.count("no pool yet") == 1
    assert log.count("shares nothing") == 0


def test_another_manifest_is_named_once_by_its_fields(
    cenoted: Start, attached: Callable[..., Attachment], log: Log
) -> None:
    """
    The second engine of a model that differs says in what, once, and has a namespace of its own.
    """
    daemon = cenoted()
    first, other = attached(daemon.socket), attached(daemon.socket)
    first.want([manifest()])
    log.wait_for("is open")
    wanted = [manifest(dtype="float16", tp_size=2), manifest(dtype="float16", tp_size=2, extra=1)]
    other.want(wanted[:1])
    log.wait_for("is open")
    (said,) = [each for each in log.heard if "shares nothing" in each]
    assert "'vllm/m/0.0.0'" in said
    assert "dtype, tp_size" in said
    assert cache_of(first, manifest()).id != cache_of(other, wanted[0]).id
    assert log.count("shares nothing") == 1
    other.want(wanted)
    log.wait_for("extra")


def test_a_daemon_that_died_is_attached_again(
    cenoted: Start, attached: Callable[..., Attachment], log: Log
) -> None:
    """
    What is mapped can be read in between, nothing is stored; the next daemon takes chunks in the
    namespaces that were open, without another attachment.
    """
    first = cenoted()
    told = Told()
    attachment = attached(first.socket, told)
    attachment.want([manifest()])
    pool = told.wait()
    log.wait_for("is open")
    store(attachment, manifest())

    first.kill()
    wait_until(lambda: not attachment.storing)
    cache = cache_of(attachment, manifest())
    assert cache.match(KEY) == 1
    assert attachment.open(manifest(tp_rank=1)) is None
    attachment.want([manifest(), manifest(tp_rank=1)])

    cenoted(path=first.socket, pool=first.pool)
    wait_until(lambda: attachment.storing)
    assert attachment.cache(manifest()) is cache
    assert cache.match(KEY) == 0
    store(attachment, manifest())
    attachment.want([manifest(), manifest(tp_rank=1)])  # look now
    wait_until(lambda: attachment.cache(manifest(tp_rank=1)) is not None)
    store(attachment, manifest(tp_rank=1))
    assert attachment.pool is pool
    assert not told.more


# ---- in this process -----------------------------------------------------------------------------


def test_whoever_is_told_may_fail(
    attached: Callable[..., Attachment], log: Log, host: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A worker whose GPU takes no registration: namespaces are opened all the same.
    """
    monkeypatch.setattr(attach, "connect", lambda *_args, **_options: host.connect())

    def fail(_pool: Pool) -> None:
        raise RuntimeError("CUDA error: out of memory")

    attachment = attached(None, fail)
    attachment.want([manifest()])
    log.wait_for("please report")
    log.wait_for("is open")
    store(attachment, manifest())


def test_a_pool_that_comes_after_the_end_is_closed(
    log: Log, host: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    close() while the daemon answers: nobody is told, and the session ends.
    """
    made: list[Pool] = []

    def slow(*_args: Any, **_options: Any) -> Pool:
        attachment.close()
        made.append(host.connect())
        return made[-1]

    monkeypatch.setattr(attach, "connect", slow)
    told = Told()
    attachment = Attachment(None, "test", told)
    attachment.start()
    attachment._thread.join(PATIENCE_S)
    assert not attachment._thread.is_alive()
    assert [pool.closed for pool in made] == [True]
    assert not told.more
    assert log.count("attached") == 0
