# SPDX-License-Identifier: Apache-2.0
"""
Do readers get in each other's way?

    python bench/bench_scale.py [--rounds N] [--chunks N]

Two processes, each on a CPU of its own, lease and release random keys of one pool; their rate
together, over the rate of one alone, is compared with the same ratio of a raw loop of dependent
random loads over memory of the catalog's size that both map. What is left below 1 is ours.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench._loops import LINE_BYTES, Loops, Session  # noqa: E402  # needs the path above
from bench.common import (  # noqa: E402
    KEY_BYTES,
    KIB,
    MANIFEST,
    MIB,
    PrivateDaemon,
    Row,
    Skipped,
    Worker,
    cpus,
    report,
    workers,
)

from cenote.client import connect  # noqa: E402

ROUNDS: Final = 9
CHUNKS: Final = 1_000_000
CHUNK_BYTES: Final = 4 * KIB
RUN_S: Final = 0.3
BAR: Final = 0.95
KEYS_FILE: Final = "keys"
CYCLE_FILE: Final = "cycle"


def _mapped(path: Path) -> np.ndarray[Any, np.dtype[np.uint32]]:
    with path.open("r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.uint32)


def work(folder: Path, index: int) -> None:
    """A reader: runs the loop that stdin names, and prints operations a second."""
    loops, cycle = Loops(), _mapped(folder / CYCLE_FILE)
    keys, start = (folder / KEYS_FILE).read_bytes(), index * 500_009
    with connect(folder / "pool.sock", role="reader", reconnect=False) as pool:
        cache = pool.namespace(MANIFEST)
        session = Session.of(cache)
        loops.hits_per_s(session, keys, start, RUN_S)  # map the catalog
        loops.loads_per_s(cycle, start, RUN_S)
        print("ready", flush=True)
        for line in sys.stdin:
            if line.strip() == "hits":
                print(loops.hits_per_s(session, keys, start, RUN_S), flush=True)
            else:
                print(loops.loads_per_s(cycle, start, RUN_S), flush=True)


def _rate(what: str, crew: tuple[Worker, ...]) -> float:
    """Operations a second of all of *crew* at once."""
    for worker in crew:
        worker.say(what)
    return sum(float(worker.hear()) for worker in crew)


def _prepare(folder: Path, session: Session, chunks: int, catalog_bytes: int) -> None:
    """Fill the pool; write the keys in random order, and a cycle as large as the catalog."""
    loops, packed = Loops(), os.urandom(chunks * KEY_BYTES)
    loops.fill(session, packed, CHUNK_BYTES)
    order = list(range(chunks))
    random.Random(1).shuffle(order)
    rows = np.frombuffer(packed, dtype=np.uint8).reshape(-1, KEY_BYTES)[order]
    (folder / KEYS_FILE).write_bytes(rows.tobytes())
    (folder / CYCLE_FILE).touch()
    os.truncate(folder / CYCLE_FILE, catalog_bytes // LINE_BYTES * LINE_BYTES)
    loops.cycle(_mapped(folder / CYCLE_FILE))


def _present(cache: Any, folder: Path) -> None:
    """A few in a million find their buckets full and are dropped; take them out of the keys."""
    packed = (folder / KEYS_FILE).read_bytes()
    kept, at = [], 0
    while at < len(packed):
        piece = packed[at : at + 65_536 * KEY_BYTES]
        found = cache.match(piece) * KEY_BYTES
        kept.append(piece[:found])
        at += found + (KEY_BYTES if found < len(piece) else 0)
    (folder / KEYS_FILE).write_bytes(b"".join(kept))


def measure(rounds: int, chunks: int) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and what was asked."""
    if len(cpus()) < 2:
        raise Skipped("two readers need two CPUs")
    size = (chunks * CHUNK_BYTES * 5 // 4 // (2 * MIB) + 32) * 2 * MIB
    flags = ("--no-populate", "--max-chunks", str(chunks + 4096), "--checksum", "off")
    with PrivateDaemon(size, *flags, medium="memfd") as daemon, daemon.connect() as pool:
        cache = pool.namespace(MANIFEST)
        super_ = cache._binding.attachment.handle.catalog
        used = (int(super_.chunk_count) + int(super_.bucket_count)) * LINE_BYTES  # read by a hit
        _prepare(daemon.folder, Session.of(cache), chunks, used)
        cache.flush(30.0)
        _present(cache, daemon.folder)
        argv = (__file__, "--worker", str(daemon.folder))
        made = [Worker(*argv, str(i), cpu_index=i) for i in range(2)]
        with workers(*made) as crew:
            for worker in crew:
                worker.hear()
            scales: dict[str, list[float]] = {"hits": [], "loads": []}
            alone: dict[str, list[float]] = {"hits": [], "loads": []}
            for turn in range(rounds):
                for what in ("hits", "loads") if turn % 2 else ("loads", "hits"):
                    one = statistics.mean(_rate(what, (worker,)) for worker in crew)
                    scales[what].append(_rate(what, crew) / one)
                    alone[what].append(1e9 / one)
    hits, loads = (statistics.median(scales[what]) for what in ("hits", "loads"))
    row = Row(
        "2 readers on random hits, over 1",
        hits,
        "x",
        loads,
        "raw random loads, 2 over 1",
        statistics.median(a / b for a, b in zip(scales["hits"], scales["loads"], strict=True)),
        BAR,
        at_most=False,
        note=f"one reader: {statistics.median(alone['hits']):.0f} ns a hit, "
        f"{statistics.median(alone['loads']):.0f} ns a load",
    )
    return [row], {"chunks": chunks, "catalog_mib": used / MIB}


def main() -> int:
    parser = argparse.ArgumentParser(description="Two readers at once.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Path(options.worker[0]), int(options.worker[1]))
        return 0
    try:
        rows, details = measure(options.rounds, options.chunks)
    except Skipped as why:
        report("scale", [], skipped=str(why))
        return 0
    report("scale", rows, **details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
