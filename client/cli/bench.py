# SPDX-License-Identifier: Apache-2.0
"""
Measure what a hit, a match and a copy cost on this machine, in a few seconds.

On the pool of this host where it has room, else on a private pool in memory; the output says which.
Throughputs are given beside numpy.copyto over the same walk in the same run: compare ratios, not
numbers of different machines. Its chunks are deleted at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cenote.client import testing
from cenote.client.errors import CenoteError, PoolGone
from cenote.client.manifest import Manifest
from cenote.client.namespace import Cache
from cenote.client.pool import Pool

from . import common
from .common import size

KEYS: Final = 512
SMALL_BYTES: Final = 4096
LARGE_BYTES: Final = 1 << 20
WALK_BYTES_MIN: Final = 64 << 20
WALK_BYTES_MAX: Final = 512 << 20
ROUNDS: Final = 6  # even: turns alternate
COPIES: Final = {"put": "put", "get": "get and copy"}
HITS_A_ROUND: Final = 2000
CALLS_A_ROUND: Final = 20


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "--private", action="store_true", help="measure a private pool even if there is another"
    )


def run(args: argparse.Namespace) -> int:
    """Do it and return the exit status."""
    with _pool(args) as (pool, where):
        found = {"measured_on": where, **measure(pool, where["walk_bytes"])}
    if args.json:
        common.write_json(found)
    else:
        _print(found)
    return common.EXIT_DONE


# ---- on what ------------------------------------------------------------------------------------


def cache_bytes() -> int:
    """Return the size of the CPU's last cache, 0 when the kernel does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=0)


def wanted_walk() -> int:
    """Return how many bytes to walk over: twice the cache, if this machine can spare them."""
    import psutil

    spare = psutil.virtual_memory().available // 8
    walk = min(max(2 * cache_bytes(), WALK_BYTES_MIN), WALK_BYTES_MAX, max(spare, WALK_BYTES_MIN))
    return walk // LARGE_BYTES * LARGE_BYTES


@contextmanager
def _pool(args: argparse.Namespace) -> Iterator[tuple[Pool, dict[str, Any]]]:
    """Yield a pool with room for the measurement, and what it is."""
    walk_bytes, why = wanted_walk(), "--private was given"
    if not args.private:
        pool, why = _host_pool(args, walk_bytes)
        if pool is not None:
            with pool:
                yield pool, _where(pool, "the pool of this host", "", walk_bytes)
            return
    private_bytes = 2 * (walk_bytes + KEYS * SMALL_BYTES)
    with testing.memory_pool(private_bytes, name="bench") as private:
        yield private, _where(private, "a private pool in memory", why, walk_bytes)


def _host_pool(args: argparse.Namespace, walk_bytes: int) -> tuple[Pool | None, str]:
    """Return the pool of this host, or why it is not measured. Never evicts what others stored."""
    try:
        pool = common.open_pool(args, role="writer")
    except (CenoteError, common.Failure, OSError) as error:
        if args.socket is not None:
            raise
        gone = isinstance(error, PoolGone)
        return None, "no daemon was found" if gone else f"its daemon refused: {error}"
    stats = pool.stats(args.timeout)
    free, needed = stats.bytes_total - stats.bytes_used, 2 * (walk_bytes + KEYS * SMALL_BYTES)
    if free >= needed:
        return pool, ""
    pool.close()
    return None, (
        f"pool {pool.name} has {size(free)} free, and with less than {size(needed)} chunks of "
        "others might be evicted"
    )


def _where(pool: Pool, what: str, why: str, walk_bytes: int) -> dict[str, Any]:
    superblock = common.catalog_of(pool).superblock
    return {
        "what": what,
        "why": why or None,
        "pool": pool.name,
        "capacity_bytes": superblock.capacity_bytes,
        "chunk_count": superblock.chunk_count,
        "media": [region.medium for region in superblock.regions],
        "checksum": pool._attachment.checksum,
        "cpus": os.cpu_count(),
        "cache_bytes": cache_bytes(),
        "walk_bytes": walk_bytes,
    }


# ---- measuring ----------------------------------------------------------------------------------


def measure(pool: Pool, walk_bytes: int) -> dict[str, Any]:
    """Store chunks of our own in *pool*, measure, delete them. Medians of several rounds."""
    cache = pool.namespace(Manifest("cenote-bench", "bytes", "uint8", 1))
    keys = [os.urandom(32) for _ in range(KEYS)]
    try:
        cache.put_many(b"".join(keys), np.zeros((KEYS, SMALL_BYTES), dtype=np.uint8))
        cache.flush()
        if cache.match(keys) < KEYS:
            raise common.Failure(
                f"pool {pool.name!r} did not take {KEYS} chunks of {size(SMALL_BYTES)}, or evicts "
                "them at once: measure a private pool with --private"
            )
        return {"rounds": ROUNDS, **_lookups(cache, keys), **_copies(cache, walk_bytes)}
    finally:
        if pool.connected:
            cache.delete(keys)


def _lookups(cache: Cache, keys: list[bytes]) -> dict[str, float]:
    packed = b"".join(keys)

    def hit() -> None:
        for _ in range(HITS_A_ROUND // KEYS + 1):
            for key in keys:
                cache.get(key).memory  # type: ignore[union-attr]  # noqa: B018 - they are there

    def match() -> None:
        for _ in range(CALLS_A_ROUND):
            cache.match(packed)

    def lease() -> None:
        for _ in range(CALLS_A_ROUND):
            cache.lease_many(packed).release()

    hits = (HITS_A_ROUND // KEYS + 1) * KEYS
    return {
        "hit_ns": _median_s(hit) / hits * 1e9,
        f"match_{KEYS}_us": _median_s(match) / CALLS_A_ROUND * 1e6,
        f"lease_{KEYS}_us": _median_s(lease) / CALLS_A_ROUND * 1e6,
    }


def _copies(cache: Cache, walk_bytes: int) -> dict[str, float]:
    """
    Copy from one warm buffer over a long walk, and from the walk into a warm buffer.

    Ours and numpy.copyto take turns in each round, over the same bytes, or as many.
    """
    count = walk_bytes // LARGE_BYTES
    buffer = np.arange(LARGE_BYTES // 8, dtype=np.uint64).view(np.uint8)
    plain = np.zeros((count, LARGE_BYTES), dtype=np.uint8)
    keys = [os.urandom(32) for _ in range(count)]

    def put() -> None:
        for key in keys:
            with cache.put(key, LARGE_BYTES) as w:
                w.copy_from(buffer)

    def put_plain() -> None:
        for row in plain:
            np.copyto(row, buffer)

    def get() -> None:
        for key in keys:
            chunk = cache.get(key)
            if chunk is None:
                raise common.Failure("a chunk of the measurement was evicted: give --private")
            chunk.copy_to(buffer)

    took: dict[str, list[float]] = {"put": [], "put_plain": [], "get": [], "get_plain": []}
    for turn in range(1 + ROUNDS):
        times = {"put_plain": _seconds(put_plain), "put": _seconds(put)}
        cache.flush()
        for what in ("get", "get_plain") if turn % 2 else ("get_plain", "get"):
            # the second may find some of it in the CPU's cache
            times[what] = _seconds(get) if what == "get" else _plain_reads(cache, keys, buffer)
        cache.delete(keys)
        for name, value in times.items():
            took[name] += [value] if turn else []  # the first is not counted
    return _throughputs(took, walk_bytes)


def _plain_reads(cache: Cache, keys: list[bytes], buffer: NDArray[Any]) -> float:
    views = [chunk.numpy() for chunk in cache.get_many(keys)]
    begun = time.perf_counter()
    for view in views:
        np.copyto(buffer, view)
    return time.perf_counter() - begun


def _throughputs(took: dict[str, list[float]], moved: int) -> dict[str, float]:
    found = {f"{n}_gb_per_s": moved / statistics.median(t) / 1e9 for n, t in took.items()}
    for name in ("put", "get"):
        ratios = [a / b for a, b in zip(took[f"{name}_plain"], took[name], strict=True)]
        found[f"{name}_to_copyto"] = statistics.median(ratios)
    return found


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _median_s(run: Callable[[], object]) -> float:
    """Return the median seconds of one call, after one that is not counted."""
    run()
    return statistics.median(_seconds(run) for _ in range(ROUNDS))


# ---- showing ------------------------------------------------------------------------------------


def _print(found: dict[str, Any]) -> None:
    on = found["measured_on"]
    print(f"on {on['what']}: {on['pool']}, {', '.join(on['media'])}, {size(on['capacity_bytes'])}")
    if on["why"]:
        print(f"because {on['why']}")
    made = common.table("what", "median", "numpy.copyto", "ratio", right=("median", "ratio"))
    rows = [
        ("hit: get, memory, release", f"{found['hit_ns']:.0f} ns", "", ""),
        *(_batch_row(found, what) for what in ("match", "lease")),
        *(_copy_row(found, name, what) for name, what in COPIES.items()),
    ]
    for row in rows:
        made.add_row(*row)
    common.console().print(made)
    print(f"medians of {found['rounds']} rounds; what else runs here shows in them")
    if on["walk_bytes"] < on["cache_bytes"]:
        print(
            f"the walk of {size(on['walk_bytes'])} fits into the cache of "
            f"{size(on['cache_bytes'])}: copies into a larger pool compare better"
        )


def _batch_row(found: dict[str, Any], what: str) -> tuple[str, str, str, str]:
    took_us = found[f"{what}_{KEYS}_us"]
    a_key = f"{took_us * 1000 / KEYS:.0f} ns a key"
    return f"{what} of {KEYS} keys, {a_key}", f"{took_us:.1f} us", "", ""


def _copy_row(found: dict[str, Any], name: str, what: str) -> tuple[str, str, str, str]:
    ours, plain = found[f"{name}_gb_per_s"], found[f"{name}_plain_gb_per_s"]
    ratio = f"{found[f'{name}_to_copyto']:.2f}"
    return (
        f"{what}, {size(LARGE_BYTES)} chunks",
        f"{ours:.2f} GB/s",
        f"{plain:.2f} GB/s",
        ratio,
    )
