# SPDX-License-Identifier: Apache-2.0
"""
What does a new client pay to map 32 MiB of a pool for the first time?

    python bench/bench_attach.py [--rounds N]

Each round is a process that attaches, leases a chunk of 32 MiB and reads one byte of each page
twice: the difference is the page faults. Once with 4 KiB pages and once with huge pages of 2 MiB,
which root reserves by hand for the run; without them that part is skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench._loops import Loops  # noqa: E402  # needs the path above
from bench.common import (  # noqa: E402
    GRANULE_BYTES,
    KIB,
    MANIFEST,
    MIB,
    PrivateDaemon,
    Row,
    Skipped,
    Worker,
    random_keys,
    report,
)

from cenote.client import connect  # noqa: E402

ROUNDS: Final = 15
CHUNK_BYTES: Final = 32 * MIB
CHUNKS: Final = 4
POOL_BYTES: Final = 256 * MIB
PAGES: Final = {"4 KiB pages": 4 * KIB, "2 MiB pages": GRANULE_BYTES}
HUGE_BAR_MS: Final = 0.05
NR_HUGEPAGES: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
SPARE_PAGES: Final = 8


def look(socket: str, keys: list[str], page_bytes: int) -> None:
    """A new client: prints milliseconds to attach, and a chunk to map, as JSON."""
    loops, faults_s = Loops(), []
    begun = time.perf_counter()
    with connect(socket, role="reader", reconnect=False) as pool:
        attach_s = time.perf_counter() - begun
        cache = pool.namespace(MANIFEST)
        for key in keys:
            chunk = cache.get(bytes.fromhex(key))
            if chunk is None:
                raise RuntimeError("a chunk that was stored is not there")
            first = loops.touch_s(chunk.address, chunk.nbytes, page_bytes)
            again = loops.touch_s(chunk.address, chunk.nbytes, page_bytes)
            faults_s.append(first - again)
            chunk.release()
    found = {"attach_ms": attach_s * 1e3, "fault_ms": statistics.median(faults_s) * 1e3}
    print(json.dumps(found), flush=True)


@contextlib.contextmanager
def huge_pages(wanted: int) -> Iterator[None]:
    """Reserve huge pages where that is allowed; give back what was not there before."""
    if not NR_HUGEPAGES.exists():
        raise Skipped("this kernel has no huge pages of 2 MiB")
    before = int(NR_HUGEPAGES.read_text())
    free = int(NR_HUGEPAGES.with_name("free_hugepages").read_text())
    lacking = max(wanted - free, 0)
    if lacking and not os.access(NR_HUGEPAGES, os.W_OK):
        raise Skipped(f"{wanted} huge pages are needed, {free} are free, and only root adds some")
    try:
        if lacking:
            NR_HUGEPAGES.write_text(str(before + lacking))
        if int(NR_HUGEPAGES.with_name("free_hugepages").read_text()) < wanted:
            raise Skipped(f"the kernel did not find {wanted} huge pages")
        yield
    finally:
        if lacking:
            NR_HUGEPAGES.write_text(str(before))


def _clients(medium: str, pages: str, rounds: int) -> tuple[Row, Row]:
    value, keys = np.ones(CHUNK_BYTES, dtype=np.uint8), random_keys(CHUNKS)
    with PrivateDaemon(POOL_BYTES, medium=medium) as daemon, daemon.connect() as pool:
        cache = pool.namespace(MANIFEST)
        for key in keys:
            with cache.put(key, CHUNK_BYTES) as w:
                w.copy_from(value)
        cache.flush()
        argv = ["--client", str(daemon.socket), json.dumps([k.hex() for k in keys])]
        found: dict[str, list[float]] = {"attach_ms": [], "fault_ms": []}
        for _ in range(rounds):
            with Worker(__file__, *argv, str(PAGES[pages])) as client:
                for name, ms in json.loads(client.hear()).items():
                    found[name].append(ms)
    bar = HUGE_BAR_MS if PAGES[pages] > 4 * KIB else None
    fault = statistics.median(found["fault_ms"])
    return (
        Row(f"first mapping of 32 MiB, {pages}", fault, "ms", bar=bar),
        Row(f"attach, {pages}", statistics.median(found["attach_ms"]), "ms"),
    )


def measure(rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and why some are missing."""
    rows, details = [*_clients("shm", "4 KiB pages", rounds)], {}
    try:
        with huge_pages(POOL_BYTES // GRANULE_BYTES + SPARE_PAGES):
            rows += _clients("hugepages", "2 MiB pages", rounds)
    except Skipped as why:
        details["skipped"] = f"huge pages: {why}"
    return rows, details


def main() -> int:
    parser = argparse.ArgumentParser(description="The first mapping by a new client.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        socket, keys, page_bytes = options.client
        look(socket, json.loads(keys), int(page_bytes))
        return 0
    rows, details = measure(options.rounds)
    report("attach", rows, rounds=options.rounds, **details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
