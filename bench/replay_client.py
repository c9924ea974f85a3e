# SPDX-License-Identifier: Apache-2.0
"""
One client process of bench/replay.py, and what all of its processes share.

    python bench/replay_client.py '{"folder": ..., "socket": ..., "index": 0, "block_bytes": 65536}'

It takes requests, one at a time, from the counter that all clients share, so that they begin in the
order of the trace whatever their speed, and each conversation is served by whichever engine is
free. A request: match its chain; lease the hits; compare every byte of them with what belongs to
that hash id; store the missing blocks behind their parent; flush.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import mmap
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from cenote.client import Manifest, connect

if TYPE_CHECKING:
    from cenote.client import Cache

U64Array: TypeAlias = np.ndarray[Any, np.dtype[np.uint64]]
KEY_BYTES: Final = 32
WORD_BYTES: Final = 8
PUT_BLOCKS: Final = 32  # a put_many: its source stays in the second-level cache
PUT_WAIT_MS: Final = 10_000
FLUSH_S: Final = 30.0
PAGE_BYTES: Final = mmap.PAGESIZE
CLOCK_FILE: Final = "clock"
TRACE_FILE: Final = "trace.npz"
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = (1 << 64) - 1


def mix64(value: int) -> int:
    """A 64-bit hash (splitmix64 of Steele et al., 2014)."""
    x = (value + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Blocks:
    """
    The bytes of every block of a trace, made from its hash id as fast as memory takes them.

    Word i of block h is random[i + shift(h)] + salt(h): two blocks differ in every word (but for
    one chance in 2^64 each), and a block that is torn, shifted or mixed with another is not equal.

    Args:
        block_bytes: Length of a block, a multiple of 8.
    """

    _SHIFTS: Final = 4096

    def __init__(self, block_bytes: int) -> None:
        if block_bytes < WORD_BYTES or block_bytes % WORD_BYTES:
            raise ValueError(f"a block of {block_bytes} bytes: give a multiple of {WORD_BYTES}")
        self.block_bytes = block_bytes
        self._words = block_bytes // WORD_BYTES
        draw = np.random.Generator(np.random.PCG64(2026))
        self._random = draw.integers(0, 1 << 64, self._words + self._SHIFTS, dtype=np.uint64)
        self._expected: U64Array = np.empty(self._words, dtype=np.uint64)

    def fill(self, hash_id: int, out: U64Array) -> None:
        """Write the block of *hash_id* to *out*, of block_bytes / 8 words."""
        salt = mix64(hash_id)
        shift = (salt >> 20) % self._SHIFTS
        np.add(self._random[shift : shift + self._words], np.uint64(salt), out=out)

    def holds(self, hash_id: int, found: U64Array) -> bool:
        """Is *found* exactly the block of *hash_id*? Reads every byte."""
        self.fill(hash_id, self._expected)
        return bool(np.array_equal(self._expected, found))


class SharedWords:
    """
    A page that all processes of a replay map: the trace's clock, and the next request.

    The daemon's keeper reads the clock (cn_keeper_set_clock). It is advanced under the lock under
    which a request is taken, so it never goes back.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / CLOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, PAGE_BYTES)
        self.page = mmap.mmap(self._fd, PAGE_BYTES)
        self._words = memoryview(self.page).cast("Q")

    def begin(self, now_ns: int) -> None:
        """Set the clock, and begin with the first request."""
        self._words[0], self._words[1], self._words[2] = now_ns, 0, now_ns

    def take(self, times_ms: U64Array) -> int | None:
        """Take the next request and advance the clock to its time; None when all are taken."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            number = self._words[1]
            if number >= len(times_ms):
                return None
            self._words[1] = number + 1
            self._words[0] = self._words[2] + int(times_ms[number]) * 1_000_000
            return number
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Unmap the page."""
        self._words.release()
        self.page.close()
        os.close(self._fd)


@dataclass(frozen=True)
class Chains:
    """
    A trace, ready to be replayed.

    Attributes:
        first: [requests + 1] where each request's blocks begin in `blocks`.
        blocks: Index of each block of each request into `ids` and `keys`.
        times_ms: [requests] from the first request on.
        ids: [distinct] hash ids.
        keys: [distinct, 32] keys.
    """

    first: U64Array
    blocks: np.ndarray[Any, np.dtype[np.uint32]]
    times_ms: U64Array
    ids: U64Array
    keys: np.ndarray[Any, np.dtype[np.uint8]]

    def save(self, folder: Path) -> None:
        """Write it for the client processes."""
        np.savez(folder / TRACE_FILE, **dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Chains:
        """Read what save() wrote."""
        with np.load(folder / TRACE_FILE) as arrays:
            return cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})


@dataclass
class Tally:
    """What one client did; times in seconds, of this process alone."""

    requests: int = 0
    looked_up: int = 0
    hits: int = 0
    verified_bytes: int = 0
    wrong_blocks: int = 0
    left_before_lease: int = 0  # matched, and evicted by another client's put before the lease
    put_blocks: int = 0
    not_stored: int = 0
    lookup_s: float = 0.0
    verify_s: float = 0.0
    make_s: float = 0.0
    put_s: float = 0.0
    flush_s: float = 0.0


class Replayer:
    """Replays requests against one namespace."""

    def __init__(self, cache: Cache, chains: Chains, blocks: Blocks) -> None:
        self._cache = cache
        self._chains = chains
        self._blocks = blocks
        self._source = np.zeros((PUT_BLOCKS, blocks.block_bytes // WORD_BYTES), dtype=np.uint64)
        self.tally = Tally()

    def request(self, number: int) -> int:
        """Replay request *number*; return how many of its blocks were hits."""
        chains, tally = self._chains, self.tally
        first, end = int(chains.first[number]), int(chains.first[number + 1])
        chain = chains.blocks[first:end]
        keys = chains.keys[chain].tobytes()
        hits = self._lookup(keys, chain)
        tally.requests += 1
        tally.looked_up += len(chain)
        tally.hits += hits
        for at in range(hits, len(chain), PUT_BLOCKS):
            self._put(keys, chain, at, min(at + PUT_BLOCKS, len(chain)))
        begun = time.perf_counter()
        self._cache.flush(FLUSH_S)
        tally.flush_s += time.perf_counter() - begun
        return hits

    def _lookup(self, keys: bytes, chain: np.ndarray[Any, np.dtype[np.uint32]]) -> int:
        tally = self.tally
        begun = time.perf_counter()
        matched = self._cache.match(keys)
        leased = self._cache.get_many(keys[: matched * KEY_BYTES])
        tally.lookup_s += time.perf_counter() - begun
        tally.left_before_lease += matched - len(leased)
        begun = time.perf_counter()
        for block, chunk in zip(chain[: len(leased)], leased, strict=True):
            with chunk:
                found = chunk.numpy("uint64")
                right = self._blocks.holds(int(self._chains.ids[block]), found)
                tally.wrong_blocks += not right
                tally.verified_bytes += found.nbytes
                del found
        tally.verify_s += time.perf_counter() - begun
        return len(leased)

    def _put(
        self, keys: bytes, chain: np.ndarray[Any, np.dtype[np.uint32]], at: int, end: int
    ) -> None:
        """Store blocks at … end of the chain behind the one before them."""
        tally, source = self.tally, self._source[: end - at]
        begun = time.perf_counter()
        for row, block in zip(source, chain[at:end], strict=True):
            self._blocks.fill(int(self._chains.ids[block]), row)
        made = time.perf_counter()
        stored = self._cache.put_many(
            keys[at * KEY_BYTES : end * KEY_BYTES],
            source,
            start=at,
            parent=keys[(at - 1) * KEY_BYTES : at * KEY_BYTES] if at else None,
            wait_ms=PUT_WAIT_MS,
        )
        tally.put_s += time.perf_counter() - made
        tally.make_s += made - begun
        tally.put_blocks += stored
        tally.not_stored += end - at - stored


def manifest(block_bytes: int) -> Manifest:
    """The namespace of a replay."""
    return Manifest("trace-replay", "generated-words", "uint64", 512, block_bytes=block_bytes)


def serve(folder: Path, socket: str, index: int, block_bytes: int) -> Tally:
    """Take and replay requests until there are none; the hits by request go to a file."""
    chains, words = Chains.load(folder), SharedWords(folder)
    found = np.full(len(chains.times_ms), -1, dtype=np.int32)
    with connect(socket, role="writer", label=f"replay {index}", reconnect=False) as pool:
        replayer = Replayer(pool.namespace(manifest(block_bytes)), chains, Blocks(block_bytes))
        print("ready", flush=True)
        sys.stdin.readline()  # all begin together
        while (number := words.take(chains.times_ms)) is not None:
            found[number] = replayer.request(number)
    words.close()
    np.save(folder / f"hits-{index}.npy", found)
    return replayer.tally


def main(argv: list[str] | None = None) -> int:
    """0: done; every wrong byte is in the tally, which goes to stdout as JSON."""
    given = json.loads((sys.argv[1:] if argv is None else argv)[0])
    given["folder"] = Path(given["folder"])
    print(json.dumps(dataclasses.asdict(serve(**given))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
