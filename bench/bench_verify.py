# SPDX-License-Identifier: Apache-2.0
"""
Does `cenote verify` read a pool as fast as the memory can be read?

    python bench/bench_verify.py [--rounds N] [--chunks N]

A pool of 1 GiB is verified beside its daemon, tables and checksums, by as many threads as there are
CPUs; the reference is as many threads that read the same memory and add it up. Then the tables of a
pool of many chunks, without their bytes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench._loops import Loops, Session  # noqa: E402  # needs the path above
from bench.common import (  # noqa: E402
    GIB,
    KEY_BYTES,
    KIB,
    MANIFEST,
    MIB,
    PrivateDaemon,
    Row,
    Skipped,
    beside,
    cpus,
    interleaved,
    pool_bytes,
    random_keys,
    report,
)

from cenote.client import Pool  # noqa: E402
from cenote.shm.inspect import Catalog  # noqa: E402
from cenote.shm.verify import Verifier, regions_of  # noqa: E402
from cenote.shm.verify.crc import BATCH_BYTES  # noqa: E402

ROUNDS: Final = 9
CHUNKS: Final = 1_000_000
WALK_BYTES: Final = GIB
SIZES: Final = (MIB, 16 * KIB)
BAR: Final = 0.7


def _verifier(pool: Pool) -> Verifier:
    regions = regions_of(pool.mapping)
    return Verifier(Catalog.of(pool.mapping), regions, settle=pool.stats)


def _verify(pool: Pool, nbytes: int) -> float:
    """GB/s of tables and checksums."""
    begun_s = time.perf_counter()
    verifier = _verifier(pool)
    verifier.tables()
    done = verifier.bytes()
    took_s = time.perf_counter() - begun_s
    if verifier.report.wrong or done.nbytes != nbytes:
        raise RuntimeError(f"{verifier.report.found}, {done.nbytes} of {nbytes} bytes were read")
    return done.nbytes / took_s / 1e9


def _reader(loops: Loops, address: int, nbytes: int) -> Callable[[], float]:
    """GB/s of all CPUs together that add up that memory."""
    crew = ThreadPoolExecutor(len(cpus()))
    pieces = range(address, address + nbytes // BATCH_BYTES * BATCH_BYTES, BATCH_BYTES)

    def read() -> float:
        begun_s = time.perf_counter()  # piece by piece, as verify does: nobody waits for one thread
        for part in [crew.submit(loops.read, at, BATCH_BYTES) for at in pieces]:
            part.result()
        return len(pieces) * BATCH_BYTES / (time.perf_counter() - begun_s) / 1e9

    return read


def _bytes_row(rounds: int, chunk_bytes: int) -> Row:
    count = WALK_BYTES // chunk_bytes
    flags = ("--max-chunks", str(count + 4096), "--checksum", "commit")
    with PrivateDaemon(pool_bytes(WALK_BYTES), *flags) as daemon, daemon.connect() as pool:
        cache = pool.namespace(MANIFEST)
        data = os.urandom(chunk_bytes)
        keys = random_keys(count)
        for first in range(0, count, 1024):
            part = keys[first : first + 1024]
            cache.put_many(part, [data] * len(part))
        cache.flush(60.0)
        stored = pool.stats().chunks * chunk_bytes
        region = next(r for r in pool.mapping.regions() if not r.writable)
        found = interleaved(
            {
                "verify": lambda: _verify(pool, stored),
                "read": _reader(Loops(), region.address, WALK_BYTES),
            },
            rounds,
        )
    return beside(
        f"verify with checksums, {chunk_bytes >> 10} KiB chunks, {len(cpus())} threads",
        "GB/s",
        found["verify"],
        found["read"],
        "as many threads that add up the same memory",
        bar=BAR if chunk_bytes >= MIB else None,  # below, the walk of the tables shows
        at_most=False,
    )


def _tables_row(rounds: int, chunks: int) -> Row:
    size = (chunks * 4 * KIB * 5 // 4 // (2 * MIB) + 32) * 2 * MIB
    flags = ("--no-populate", "--max-chunks", str(chunks + 4096), "--checksum", "off")
    with PrivateDaemon(size, *flags, medium="memfd") as daemon, daemon.connect() as pool:
        cache = pool.namespace(MANIFEST)
        Loops().fill(Session.of(cache), os.urandom(chunks * KEY_BYTES), 4 * KIB)
        cache.flush(60.0)
        took_s = []
        for _ in range(rounds + 1):
            begun_s = time.perf_counter()
            verifier = _verifier(pool)
            verifier.tables()
            took_s.append(time.perf_counter() - begun_s)
            if verifier.report.wrong:
                raise RuntimeError(str(verifier.report.found))
    return Row(f"tables of {chunks:,} chunks", statistics.median(took_s[1:]), "s")


def measure(rounds: int, chunks: int) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and what was asked."""
    rows = [_bytes_row(rounds, size) for size in SIZES]
    return [*rows, _tables_row(min(rounds, 3), chunks)], {"walk_bytes": WALK_BYTES}


def main() -> int:
    parser = argparse.ArgumentParser(description="Verify against the bandwidth of the memory.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    options = parser.parse_args()
    try:
        rows, details = measure(options.rounds, options.chunks)
    except Skipped as why:
        report("verify", [], skipped=str(why))
        return 0
    report("verify", rows, **details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
