# SPDX-License-Identifier: Apache-2.0
"""
The clients of bench/storm.py: they do everything that a client can until they are killed.

The bytes of a chunk are a function of its key, so anybody can tell a wrong one. What a client has
to tell goes as lines of JSON into its diary, each by one write(2), so that a kill loses a line at
most and never half of one; its counters lie in a mapped file. What it may meet is what
docs/client.md names for a daemon that is away and a pool that is full; anything else is a finding,
and ends it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from cenote.client import Cache, Chunk, ChunkTooLarge, Manifest, Pool, PoolFull, PoolGone, Timeout
from cenote.client import connect as client_connect
from cenote.client.connection import Backoff

MANIFEST: Final = Manifest("storm", "bytes", "uint8", 16)
SIZES: Final = (1, 4096, 5000, 20_000, 65_536, 65_537, 131_072, 300_001)
CHAIN: Final = 6
HAIL: Final = 1 << 20  # keys from here on are of one byte: many changes for the keeper at once
HAIL_KEYS: Final = 4096
HAIL_BATCH: Final = 128
WITNESS_LAG: Final = 20_000  # events that the witness may be behind for a client to hail
MAILBOX: Final = "token"
TALLIES: Final = "tallies"
FIELDS: Final = (
    *("ops", "lookups", "hits", "checked", "puts", "flushes", "tokens", "reconnects"),
    *("anew", "connected", "gone", "full", "timeouts", "stop"),
)
PATIENCE_S: Final = 120.0  # a limit for a hang, not a claim about speed
OWED_MAX: Final = 2000  # commits without a flush that are remembered
PR_SET_PDEATHSIG: Final = 1
RAISED: Final = 70
_NOISE: Final = np.random.default_rng(42).bytes(1 << 20)
_PERIOD: Final = len(_NOISE) - max(SIZES)


def key_of(i: int) -> bytes:
    """The i-th key."""
    return i.to_bytes(32, "little")


def number_of(key: bytes) -> int:
    """Which key it is."""
    return int.from_bytes(key, "little")


def bytes_of(i: int) -> bytes:
    """What must be stored under the i-th key: its length too is a function of it."""
    at = i * 7919 % _PERIOD
    return _NOISE[at : at + (1 if i >= HAIL else SIZES[i % len(SIZES)])]


class WrongByte(Exception):
    """What must never be."""


def check(i: int, memory: Any) -> int:
    """Raise if a single byte under the i-th key is wrong; return how many there are."""
    expected, got = bytes_of(i), bytes(memory)
    if got == expected:
        return len(got)
    first = next((n for n, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    raise WrongByte(
        f"key {i}: {len(got)} bytes, {len(expected)} expected; the first wrong one is at {first}"
    )


def tallies(folder: Path, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """
    The counters of *count* clients: a row each, a column for each of FIELDS. One row more: first
    in it is how far the witness has read the feed.
    """
    path = folder / TALLIES
    if not path.exists():
        path.write_bytes(bytes(8 * (count + 1) * len(FIELDS)))
    return np.memmap(path, dtype=np.int64, mode="r+", shape=(count + 1, len(FIELDS)))


@dataclass(frozen=True)
class Post:
    """
    What a client is told at its birth.

    Attributes:
        folder: The run's.
        number: Which of the clients it is: its row of counters.
        name: Of its diary.
        seed: Of its choices.
        role: "reader" or "writer".
        keys: How many keys there are.
        clients: How many clients there are at once.
    """

    folder: Path
    number: int
    name: str
    seed: int
    role: str
    keys: int
    clients: int


class Client:
    """One client."""

    def __init__(self, post: Post) -> None:
        self._folder = post.folder
        self._number = post.number
        self._rng = random.Random(post.seed)
        self._role = post.role
        self._keys = post.keys
        rows = tallies(post.folder, post.clients)
        self._row, self._witness = rows[post.number], rows[post.clients]
        diary = post.folder / post.name
        self._diary = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._held: list[tuple[int, Chunk]] = []
        self._kept: list[tuple[int, Any]] = []  # views that are let go at the end only
        self._owed: list[int] = []
        self._owed_since = 0

    # ---- what it tells ---------------------------------------------------------------------------

    def tell(self, kind: str, **facts: Any) -> None:
        """Write a line into the diary."""
        line = json.dumps({"kind": kind, "at": time.monotonic(), **facts})
        os.write(self._diary, line.encode() + b"\n")

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        self._row[FIELDS.index(name)] += by

    def note(self, name: str, value: int) -> None:
        """Set a counter."""
        self._row[FIELDS.index(name)] = value

    @property
    def told_to_stop(self) -> bool:
        """Is it to end by itself?"""
        return bool(self._row[FIELDS.index("stop")])

    # ---- its life --------------------------------------------------------------------------------

    def _attach(self) -> tuple[Pool, Cache]:
        deadline_s = time.monotonic() + PATIENCE_S
        backoff = Backoff(0.02, self._rng.choice([0.1, 0.5, 2.0]))
        while True:
            try:
                pool = client_connect(
                    self._folder / "pool.sock",
                    role=self._role,
                    label=f"storm{self._number}",
                    timeout_s=10.0,
                    reconnect=backoff,
                )
                return pool, pool.namespace(MANIFEST, timeout_s=10.0)
            except (PoolGone, Timeout):
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)  # the daemon is away: that is what the storm is for

    def run(self) -> None:
        """Work until killed or told to stop."""
        self._begin()
        born_in = self._pool.pool_id
        verbs = READING if self._role == "reader" else READING + WRITING
        while not self.told_to_stop:
            verb = self._rng.choice(verbs)
            try:
                verb(self)
            except ChunkTooLarge:
                raise
            except PoolFull:
                self.count("full")
            except Timeout:
                self.count("timeouts")
            except PoolGone:
                self.count("gone")
                time.sleep(0.001 * self._rng.randrange(5))
            self._let_go(self._rng.randrange(40 if self._role == "reader" else 10))
            if self._pool.pool_id != born_in:
                raise AssertionError("the pool was made anew: what was stored is lost")
            self.count("ops")
            self.note("connected", self._pool.connected)
            if self._pool.reconnects != self._reconnects:
                self._notice_reconnects()
        self._leave()

    def _begin(self) -> None:
        """A session: from here on it is resumed, never replaced."""
        self._pool, self._cache = self._attach()
        self._attachment = self._pool._attachment
        self._reconnects = 0

    def _notice_reconnects(self) -> None:
        self.count("reconnects", self._pool.reconnects - self._reconnects)
        self._reconnects = self._pool.reconnects
        if self._pool._attachment is not self._attachment:
            self._attachment = self._pool._attachment
            self.count("anew")
            self.tell("anew")

    def _leave(self) -> None:
        for i, view in self._kept:
            check(i, view)
        self._kept.clear()
        self._let_go(0)
        self._pool.close()

    # ---- looking up ------------------------------------------------------------------------------

    def any_key(self) -> int:
        """One of all keys, some of them more often."""
        few = self._rng.random() < 0.3
        return self._rng.randrange(self._keys // 8 if few else self._keys)

    def _found(self, i: int, chunk: Chunk) -> None:
        self.count("checked", check(i, chunk.memory))
        self._held.append((i, chunk))
        if len(self._kept) < 3 and self._rng.random() < 0.02:
            self._kept.append((i, memoryview(chunk.memory)[:]))

    def _let_go(self, down_to: int) -> None:
        """Bytes are looked at again when they are let go: nobody may have changed them (I2)."""
        while len(self._held) > down_to:
            i, chunk = self._held.pop(self._rng.randrange(len(self._held)))
            self.count("checked", check(i, chunk.memory))
            if self._rng.random() < 0.5:
                chunk.release()

    def get(self) -> None:
        """Lease one."""
        i = self.any_key()
        self.count("lookups")
        chunk = self._cache.get(key_of(i))
        if chunk is not None:
            self.count("hits")
            self._found(i, chunk)

    def _chain(self) -> list[int]:
        first = min(self.any_key(), self._keys - CHAIN)
        return list(range(first, first + CHAIN))

    def get_many(self) -> None:
        """Lease the beginning of a chain."""
        chain = self._chain()
        keys = [key_of(i) for i in chain]
        self._cache.match(keys)
        chunks = self._cache.get_many(keys)
        self.count("lookups", min(len(chunks) + 1, CHAIN))
        self.count("hits", len(chunks))
        for i, chunk in zip(chain, chunks, strict=False):
            self._found(i, chunk)

    def lease_many(self) -> None:
        """Lease a batch, and read it through its addresses as an adapter does."""
        chain = self._chain()
        with self._cache.lease_many([key_of(i) for i in chain]) as leases:
            places = zip(chain, leases.addresses, leases.lengths, strict=False)
            for i, address, length in places:
                self.count("checked", check(i, ctypes.string_at(address, length)))

    def read_hail(self) -> None:
        """Look at a batch of small ones."""
        first = HAIL + self._rng.randrange(HAIL_KEYS - CHAIN)
        for i in range(first, first + CHAIN):
            chunk = self._cache.get(key_of(i))
            if chunk is not None:
                self.count("checked", check(i, chunk.memory))

    def look_again(self) -> None:
        """What is kept for long has its bytes still."""
        for i, view in self._kept:
            self.count("checked", check(i, view))

    def attach_anew(self) -> None:
        """Close the pool and go on reading: the old session lives as long as its views."""
        if self._rng.random() < 0.98:
            return
        self._owed = []
        self._pool.close()
        self._let_go(len(self._held) // 2)
        self._begin()

    def take_token(self) -> None:
        """Open a chunk that another client handed over."""
        boxes = sorted(self._folder.glob(f"{MAILBOX}*"))
        if not boxes:
            return
        chunk = self._pool.open(self._rng.choice(boxes).read_bytes())
        if chunk is not None:
            self.count("tokens")
            self._found(number_of(chunk.key), chunk)

    # ---- storing ---------------------------------------------------------------------------------

    def _owe(self, since: int, numbers: Iterable[int]) -> None:
        if not self._owed:
            self._owed_since = since
        self._owed.extend(numbers)
        self.count("puts")

    @property
    def _head(self) -> int:
        return self._pool._attachment.handle.event_head

    def put_in_place(self) -> None:
        """Fill an extent in two halves, so that a kill may come between them."""
        i, since = self.any_key(), self._head
        data = bytes_of(i)
        half = len(data) // 2
        with self._cache.put(key_of(i), len(data), wait_ms=50, meta=key_of(i)[:5]) as put:
            put.memory[:half] = data[:half]
            put.memory[half:] = data[half:]
        self._owe(since, [i])

    def put_copied(self) -> None:
        """Several puts are open at once, and filled with a checksum."""
        numbers = [self.any_key() for _ in range(self._rng.randrange(1, 5))]
        since, ttl_s = self._head, self._rng.choice([None, None, 2])
        puts = [
            self._cache.put(key_of(i), len(bytes_of(i)), wait_ms=50, ttl_s=ttl_s) for i in numbers
        ]
        for i, put in zip(numbers, puts, strict=True):
            put.copy_from(bytes_of(i))
            put.commit()
            self._owe(since, [i])

    def put_chain(self) -> None:
        """Store a prompt by one call."""
        chain, since = self._chain(), self._head
        try:
            done = self._cache.put_many(
                [key_of(i) for i in chain], [bytes_of(i) for i in chain], wait_ms=50
            )
        except (PoolGone, Timeout) as error:
            self._owe(since, chain[: getattr(error, "committed", 0)])
            raise
        self._owe(since, chain[:done])

    def put_and_abort(self) -> None:
        """Reserve, write rubbish, and think better of it."""
        put = self._cache.put(key_of(self.any_key()), self._rng.choice(SIZES), wait_ms=50)
        put.memory[:1] = b"x"
        put.abort()

    def change(self) -> None:
        """Delete, pin, unpin: each is a request that the keeper answers."""
        keys = [key_of(self.any_key()) for _ in range(8)]
        verb = self._rng.choice(["delete", "pin", "unpin"])
        if verb == "pin":
            self._cache.pin(keys, ttl_s=1, timeout_s=1.0)
        else:
            getattr(self._cache, verb)(keys, timeout_s=1.0)

    def hail(self) -> None:
        """Small chunks come and go, so that the keeper is in the middle of something."""
        if self._head - int(self._witness[0]) > WITNESS_LAG:
            return  # it has no CPU, and what it does not see it cannot judge
        first = HAIL + self._rng.randrange(HAIL_KEYS - HAIL_BATCH)
        numbers, since = range(first, first + HAIL_BATCH), self._head
        keys = b"".join(key_of(i) for i in numbers)
        for _ in range(2):
            self._cache.put_many(keys, [bytes_of(i) for i in numbers], wait_ms=50)
            self._cache.delete(keys, timeout_s=1.0)
        done = self._cache.put_many(keys, [bytes_of(i) for i in numbers], wait_ms=50)
        self._owe(since, list(numbers)[:done])

    def fill_ring(self) -> None:
        """Ask for more at once than the ring takes; while the daemon is away it stays full."""
        keys = b"".join(key_of(self._rng.randrange(self._keys)) for _ in range(3000))
        self._cache.unpin(keys, timeout_s=0.2)

    def flush(self) -> None:
        """From here on what was committed must be there, until the feed says that it left."""
        self._cache.flush(timeout_s=2.0)
        self.count("flushes")
        if self._owed and len(self._owed) <= OWED_MAX:
            self.tell("flushed", since=self._owed_since, keys=sorted(set(self._owed)))
        self._owed = []

    def hand_over(self) -> None:
        """Leave the token of something that is held."""
        if not self._held:
            return
        box = self._folder / f"{MAILBOX}{self._number}"
        fresh = box.with_name(f"fresh{self._number}")
        fresh.write_bytes(self._rng.choice(self._held)[1].token)
        fresh.replace(box)


Verb = Callable[[Client], None]
READING: Final[list[Verb]] = [
    *([Client.get] * 6 + [Client.get_many] * 4 + [Client.lease_many] * 2),
    *(Client.read_hail, Client.look_again, Client.take_token, Client.hand_over, Client.attach_anew),
]
WRITING: Final[list[Verb]] = [
    *([Client.put_in_place] * 5 + [Client.put_copied] * 5 + [Client.put_chain] * 4),
    *(
        [Client.flush] * 3
        + [Client.hail] * 2
        + [Client.put_and_abort, Client.change, Client.fill_ring]
    ),
]


def work(post: Post) -> None:
    """Be a client; a finding is written down, and ends it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    logging.basicConfig(filename=post.folder / "clients.log", format=f"{post.name} %(message)s")
    client = Client(post)
    status = 0
    try:
        client.run()
    except BaseException:  # noqa: BLE001 - whatever it was, it must be seen
        client.tell("finding", text=traceback.format_exc())
        status = RAISED
    os._exit(status)
