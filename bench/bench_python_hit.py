# SPDX-License-Identifier: Apache-2.0
"""
What does a hit cost from Python, beside LMDB in /dev/shm, which also reads without a copy?

    python bench/bench_python_hit.py [--rounds N]

Both hold the same values under the same 32-byte keys and are asked for them in the same random
order, turn by turn. Needs the extra `bench` (lmdb).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench.common import (  # noqa: E402  # needs the path above
    GIB,
    KEY_BYTES,
    KIB,
    MANIFEST,
    MIB,
    PrivateDaemon,
    Row,
    Skipped,
    beside,
    interleaved,
    per_call_ns,
    pin,
    pool_bytes,
    random_keys,
    report,
)

if TYPE_CHECKING:
    from cenote.client import Cache

ROUNDS: Final = 11
SMALL_BYTES: Final = 64 * KIB
SMALL_COUNT: Final = 4096  # keys: 256 MiB of values in each store
LARGE_BYTES: Final = 32 * MIB
LARGE_COUNT: Final = 16
CALLS: Final = 20_000
BATCH: Final = 512
BATCHES: Final = 20
BUSY_S: Final = 0.5


def _stored(cache: Cache, keys: list[bytes], nbytes: int) -> None:
    value = np.random.default_rng(1).integers(0, 256, nbytes, dtype=np.uint8)
    for key in keys:
        with cache.put(key, nbytes) as w:
            w.copy_from(value)
    cache.flush()
    if cache.match(b"".join(keys)) != len(keys):
        raise RuntimeError(f"not all of {len(keys)} chunks of {nbytes} bytes are there")


@contextlib.contextmanager
def _lmdb(keys: list[bytes], nbytes: int) -> Iterator[Any]:
    try:
        import lmdb
    except ImportError as error:
        raise Skipped("lmdb is not installed: pip install 'cenote[bench]'") from error
    value = os.urandom(nbytes)
    with tempfile.TemporaryDirectory(prefix="cenote-bench-", dir="/dev/shm") as folder:
        env = lmdb.open(folder, map_size=2 * GIB, sync=False, metasync=False, readahead=False)
        with env.begin(write=True) as txn:
            for key in keys:
                txn.put(key, value)
        yield env
        env.close()


def _hits(cache: Cache, keys: list[bytes]) -> Callable[[], None]:
    def run() -> None:
        get = cache.get
        for key in keys:
            get(key).memory  # type: ignore[union-attr]  # noqa: B018 - it is there; dropped at once

    return run


def _transactions(env: Any, keys: list[bytes]) -> Callable[[], None]:
    def run() -> None:
        begin = env.begin
        for key in keys:
            with begin(buffers=True) as txn:
                txn.get(key)

    return run


def _gets_in_one(env: Any, keys: list[bytes]) -> Callable[[], None]:
    def run() -> None:
        with env.begin(buffers=True) as txn:
            get = txn.get
            for key in keys:
                get(key)

    return run


def _singles(cache: Cache, env: Any, asked: list[bytes], rounds: int) -> list[Row]:
    found = interleaved(
        {
            "ours": per_call_ns(_hits(cache, asked), CALLS),
            "begin": per_call_ns(_transactions(env, asked), CALLS),
            "inside": per_call_ns(_gets_in_one(env, asked), CALLS),
        },
        rounds,
    )
    what = "get + memory + release, 64 KiB"
    return [
        beside(what, "ns", found["ours"], found["begin"], "lmdb begin + get", bar=0.3),
        beside(what, "ns", found["ours"], found["inside"], "lmdb get in one transaction"),
    ]


def _sizes(cache: Cache, small: list[bytes], large: list[bytes], rounds: int) -> Row:
    """The same number of keys of either size, so that only the size differs."""
    repeat = CALLS // len(large)
    found = interleaved(
        {
            "large": per_call_ns(_hits(cache, large * repeat), repeat * len(large)),
            "small": per_call_ns(_hits(cache, small[: len(large)] * repeat), repeat * len(large)),
        },
        rounds,
    )
    return beside(
        "get + memory + release, 32 MiB", "ns", found["large"], found["small"], "64 KiB", bar=1.1
    )


def _batches(cache: Cache, env: Any, asked: list[bytes], rounds: int) -> list[Row]:
    groups = [asked[i : i + BATCH] for i in range(0, BATCH * BATCHES, BATCH)]
    packed = [b"".join(group) for group in groups]

    def match() -> None:
        for keys in packed:
            cache.match(keys)

    def lease() -> None:
        for keys in packed:
            cache.lease_many(keys).release()

    def lookups() -> None:
        for group in groups:
            _gets_in_one(env, group)()

    keys = BATCH * BATCHES
    if any(cache.match(group) != BATCH for group in packed):
        raise RuntimeError("a chunk that was stored is not there")
    found = interleaved(
        {
            "match": per_call_ns(match, keys),
            "lmdb": per_call_ns(lookups, keys),
            "lease": per_call_ns(lease, keys),
        },
        rounds,
    )
    name, theirs = f"match of {BATCH} keys, a key", "lmdb, one transaction"
    median = beside(name, "ns", found["match"], found["lmdb"], theirs, bar=0.2)
    return [
        median,
        Row(name, median.value, "ns", bar=50.0),
        beside(
            f"lease_many of {BATCH}, a key", "ns", found["lease"], found["match"], "match", bar=2.0
        ),
    ]


def _beside_busy_thread(cache: Cache, asked: list[bytes]) -> Row:
    """Mean of a hit while another thread computes: no call of the hit path drops the GIL."""
    stop = threading.Event()

    def compute() -> None:
        total = 0
        while not stop.is_set():
            for i in range(1000):
                total += i

    thread = threading.Thread(target=compute)
    thread.start()
    calls, run, begun = 0, _hits(cache, asked), time.perf_counter()
    while (took := time.perf_counter() - begun) < BUSY_S:
        run()
        calls += len(asked)
    stop.set()
    thread.join()
    return Row("mean of a hit beside one busy Python thread", took / calls * 1e6, "us", bar=5.0)


def measure(rounds: int) -> list[Row]:
    """All rows."""
    small, large = random_keys(SMALL_COUNT), random_keys(LARGE_COUNT)
    asked = random.Random(1).choices(small, k=CALLS)
    values = (SMALL_COUNT * SMALL_BYTES, LARGE_COUNT * LARGE_BYTES)
    pin(0)
    with (
        PrivateDaemon(pool_bytes(*values), cpu_index=1) as daemon,
        daemon.connect() as pool,
        _lmdb(small, SMALL_BYTES) as env,
    ):
        cache = pool.namespace(MANIFEST)
        _stored(cache, small, SMALL_BYTES)
        _stored(cache, large, LARGE_BYTES)
        return [
            *_singles(cache, env, asked, rounds),
            _sizes(cache, small, large, rounds),
            _beside_busy_thread(cache, asked[:2000]),
            *_batches(cache, env, asked, rounds),
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description="A hit from Python, beside LMDB.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    report("python_hit", measure(options.rounds), rounds=options.rounds, key_bytes=KEY_BYTES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
