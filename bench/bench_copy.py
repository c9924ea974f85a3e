# SPDX-License-Identifier: Apache-2.0
"""
Are copies into and out of the pool as fast as the memory, and does eviction slow a put down?

    python bench/bench_copy.py [--rounds N] [--walk-mib N]

The reference is numpy.copyto over a walk of the same length through memory of the same kind (a file
in /dev/shm that is mapped and touched), larger than the CPU's caches; the caller's buffer is one
and stays warm. Our puts make a CRC-32C in the same pass.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench.common import (  # noqa: E402  # needs the path above
    GRANULE_BYTES,
    KIB,
    MANIFEST,
    MIB,
    PrivateDaemon,
    Row,
    beside,
    cpu_seconds,
    interleaved,
    pin,
    pool_bytes,
    random_keys,
    report,
    seconds,
    throughput,
)

if TYPE_CHECKING:
    from cenote.client import Cache

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
ROUNDS: Final = 7
SIZES: Final = (64 * KIB, MIB, 32 * MIB)
WARM_BYTES: Final = 256 * KIB  # small, so that little of it stays granted
WALK_MIB: Final = 1024
GET_BARS: Final = {64 * KIB: 0.9, MIB: 0.97, 32 * MIB: 0.97}
PUT_BARS: Final = {64 * KIB: 0.9, MIB: 1.3, 32 * MIB: 1.3}
COMMITS: Final = 2000
COMMIT_BAR_US: Final = 2.0
LEASES: Final = 4096  # at once: a session has 8,192
PROMPT: Final = 64  # chunks a put_many
FULL_MARK: Final = 0.5  # high-water mark of the pool in which eviction runs
FLUSH_S: Final = 60.0


def size_of(nbytes: int) -> str:
    """Bytes, for a row's name."""
    return f"{nbytes // MIB} MiB" if nbytes >= MIB else f"{nbytes // KIB} KiB"


@contextmanager
def _plain(walk_bytes: int) -> Iterator[Bytes]:
    """Memory like a pool's: shared, 4 KiB pages, touched."""
    fd = os.memfd_create("bench-copy", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, walk_bytes)
        memory = np.frombuffer(mmap.mmap(fd, walk_bytes), dtype=np.uint8)
        memory.fill(1)
        yield memory
    finally:
        os.close(fd)


def _put_all(cache: Cache, keys: list[bytes], source: Bytes) -> Callable[[], None]:
    def run() -> None:
        nbytes = source.nbytes
        for key in keys:
            with cache.put(key, nbytes) as w:
                w.copy_from(source)

    return run


def _put_prompts(cache: Cache, keys: list[bytes], source: Bytes) -> Callable[[], None]:
    prompts = [keys[i : i + PROMPT] for i in range(0, len(keys), PROMPT)]

    def run() -> None:
        for prompt in prompts:
            if cache.put_many(b"".join(prompt), [source] * len(prompt)) != len(prompt):
                raise RuntimeError("the pool was full: make it larger")

    return run


def _copy_all(rows: Bytes, source: Bytes) -> Callable[[], None]:
    def run() -> None:
        for row in rows:
            np.copyto(row, source)

    return run


@dataclass
class Clock:
    """Both times of a contestant that may wait for the keeper, round by round."""

    cpu_s: list[float] = field(default_factory=list)

    def wall_s(self, run: Callable[[], None]) -> float:
        """Run it; return seconds on the wall, and keep those of this thread's CPU time."""
        begun = time.thread_time()
        took = seconds(run)
        self.cpu_s.append(time.thread_time() - begun)
        return took


def _fresh(
    cache: Cache, keys: list[bytes], run: Callable[[], None], clock: Clock
) -> Callable[[], float]:
    """A contestant that stores *keys* into free memory; they are deleted off the clock."""

    def once() -> float:
        took = clock.wall_s(run)
        cache.flush(FLUSH_S)
        if cache.delete(keys, FLUSH_S) != len(keys):
            raise RuntimeError("not all chunks were stored: make the pool larger")
        return took

    return once


def _puts(cache: Cache, plain: Bytes, nbytes: int, rounds: int) -> list[Row]:
    rows = plain[: plain.nbytes // nbytes * nbytes].reshape(-1, nbytes)
    keys, moved = random_keys(len(rows)), len(rows) * nbytes
    source = np.random.default_rng(2).integers(0, 256, nbytes, dtype=np.uint8)
    clocks = {name: Clock() for name in ("put", "copyto", "prompt")}
    contestants: dict[str, Callable[[], float]] = {
        "put": _fresh(cache, keys, _put_all(cache, keys, source), clocks["put"]),
        "copyto": partial(clocks["copyto"].wall_s, _copy_all(rows, source)),
    }
    if nbytes <= MIB:
        prompts = _put_prompts(cache, keys, source)
        contestants["prompt"] = _fresh(cache, keys, prompts, clocks["prompt"])
    took = interleaved(contestants, rounds)
    names = {
        "put": f"put (reserve, copy + CRC, commit), {size_of(nbytes)}",
        "prompt": f"put_many of {PROMPT}, {size_of(nbytes)}",
    }
    found = []
    for name, what in names.items():
        if name not in contestants:
            continue
        spent = zip(clocks["copyto"].cpu_s, clocks[name].cpu_s, strict=True)
        by_cpu = statistics.median(theirs / ours for theirs, ours in spent)
        row = beside(
            what,
            "GB/s",
            [moved / t / 1e9 for t in took[name]],
            [moved / t / 1e9 for t in took["copyto"]],
            "numpy.copyto, same walk",
            bar=PUT_BARS[nbytes] if name == "put" else None,
            at_most=False,
            note=f"{by_cpu:.2f} by the caller's CPU time, waits for the keeper left out",
        )
        found.append(row)
    return found


def _copy_out(views: list[Bytes], target: Bytes) -> None:
    for view in views:
        np.copyto(target, view)


def _gets(cache: Cache, walk_bytes: int, nbytes: int, rounds: int) -> Row:
    keys = random_keys(walk_bytes // nbytes)
    source = np.random.default_rng(3).integers(0, 256, nbytes, dtype=np.uint8)
    _put_all(cache, keys, source)()
    cache.flush(FLUSH_S)
    target = np.zeros(nbytes, dtype=np.uint8)

    def ours() -> None:
        for key in keys:
            chunk = cache.get(key)
            if chunk is None:
                raise RuntimeError(f"a chunk of {nbytes} bytes that was put is not there: {cache}")
            chunk.copy_to(target)

    def theirs() -> float:
        took_s = 0.0
        for at in range(0, len(keys), LEASES):
            with_leases = cache.get_many(keys[at : at + LEASES])
            views = [chunk.numpy() for chunk in with_leases]
            took_s += cpu_seconds(partial(_copy_out, views, target))
        return moved / took_s / 1e9

    moved = len(keys) * nbytes
    found = interleaved({"ours": throughput(ours, moved), "copyto": theirs}, rounds)
    if not np.array_equal(target, source):
        raise RuntimeError("the bytes that came out are not those that went in")
    cache.delete(keys, FLUSH_S)
    return beside(
        f"get + copy out, {size_of(nbytes)}",
        "GB/s",
        found["ours"],
        found["copyto"],
        "numpy.copyto into the same warm buffer",
        bar=GET_BARS[nbytes],
        at_most=False,
    )


def _commits(cache: Cache) -> list[Row]:
    """The commit alone, of chunks that are filled already, one behind the other."""
    keys, took_us = random_keys(COMMITS), []
    source = np.zeros(64 * KIB, dtype=np.uint8)
    for key in keys:
        put = cache.put(key, source.nbytes)
        put.copy_from(source)
        begun = time.perf_counter_ns()
        put.commit()
        took_us.append((time.perf_counter_ns() - begun) / 1000)
    cache.flush(FLUSH_S)
    cache.delete(keys, FLUSH_S)
    took_us.sort()
    return [
        Row("commit alone, median", statistics.median(took_us), "us", bar=COMMIT_BAR_US),
        Row("commit alone, p99", took_us[len(took_us) * 99 // 100], "us"),
    ]


def _full_and_free(walk_bytes: int, nbytes: int, rounds: int) -> Row:
    """
    Puts while every one of them makes the keeper evict, beside puts into free memory.

    Two pools, both filled once before, so that no page is touched first. One is at its high-water
    mark all the time, the other is emptied between the rounds.
    """
    count = walk_bytes // nbytes
    size = -(-int(walk_bytes / FULL_MARK * 1.1) // GRANULE_BYTES) * GRANULE_BYTES
    source = np.random.default_rng(4).integers(0, 256, nbytes, dtype=np.uint8)
    mark = f"{walk_bytes / size:.9f}"
    with (
        PrivateDaemon(size, "--high-water", mark) as full_daemon,
        PrivateDaemon(size) as free_daemon,
        full_daemon.connect() as full_pool,
        free_daemon.connect() as free_pool,
    ):
        full, free = full_pool.namespace(MANIFEST), free_pool.namespace(MANIFEST)
        keys = random_keys(count)
        _put_all(full, random_keys(count), source)()

        def into_full() -> float:
            took = seconds(_put_all(full, random_keys(count), source))
            full.flush(FLUSH_S)
            return took

        found = interleaved(
            {
                "full": into_full,
                "free": _fresh(free, keys, _put_all(free, keys, source), Clock()),
            },
            rounds,
        )
        evictions = full_pool.stats().evictions
    if evictions < count * rounds:
        raise RuntimeError(f"only {evictions} evictions: the pool was not full")
    rate = {name: [count * nbytes / t / 1e9 for t in times] for name, times in found.items()}
    return beside(
        f"put into a full pool, {size_of(nbytes)}",
        "GB/s",
        rate["full"],
        rate["free"],
        "put into a free one",
        bar=0.85,
        at_most=False,
    )


@contextmanager
def _warm(daemon: PrivateDaemon, walk_bytes: int) -> Iterator[Cache]:
    """A new session whose mapping has every page; the pool is empty again."""
    with daemon.connect() as pool:
        cache = pool.namespace(MANIFEST)
        keys = random_keys(walk_bytes // WARM_BYTES)
        _put_all(cache, keys, np.zeros(WARM_BYTES, dtype=np.uint8))()
        cache.flush(FLUSH_S)
        cache.delete(keys, FLUSH_S)
        yield cache


def measure(rounds: int, walk_bytes: int) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    pin(0)
    with (
        PrivateDaemon(pool_bytes(walk_bytes), cpu_index=1) as daemon,
        _plain(walk_bytes) as plain,
    ):
        # Each size has a session of its own, as engines do, with all pages mapped beforehand.
        for nbytes in SIZES:
            with _warm(daemon, walk_bytes) as cache:
                rows.append(_gets(cache, walk_bytes, nbytes, rounds))
        for nbytes in SIZES:
            with _warm(daemon, walk_bytes) as cache:
                rows += _puts(cache, plain, nbytes, rounds)
        with _warm(daemon, walk_bytes) as cache:
            rows += _commits(cache)
    rows += [_full_and_free(walk_bytes // 2, nbytes, rounds) for nbytes in (64 * KIB, MIB)]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Copies into and out of the pool.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--walk-mib", type=int, default=WALK_MIB, help="more than the CPU's caches")
    options = parser.parse_args()
    rows = measure(options.rounds, options.walk_mib * MIB)
    report("copy", rows, rounds=options.rounds, walk_mib=options.walk_mib)
    return 0


if __name__ == "__main__":
    sys.exit(main())
