# SPDX-License-Identifier: Apache-2.0
"""
What does the death of the daemon cost, and what that of a client?

    python bench/bench_restart.py [--rounds N] [--chunks N] [--kills N]

1. With a million chunks: CPU time of a daemon that takes over after SIGKILL until it is `ready`,
   and the time from the SIGKILL to the first hit of a client that attaches to it. Beside it, a
   daemon that begins with an empty pool: what an interpreter and its modules cost.
2. Two readers in C loops over the same chunks, one of which never reconnects: hits before, while
   no daemon is there, while one takes over, and in the ten seconds after; each against a raw loop
   of dependent random loads over as much memory, in turn with it.
3. The hit rate of the clients of bench/storm.py, whose pool is a third of what they store, before
   and after SIGKILL of the daemon.
4. How long the session of a reader with leases is there after the end of its process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench._loops import Loops, Session  # noqa: E402  # needs the path above
from bench._storm_blows import CLIENTS, KEYS, MAX_CHUNKS  # noqa: E402
from bench._storm_blows import POOL_BYTES as STORM_BYTES  # noqa: E402
from bench._storm_checks import WINDOW_S, HitRates, Witness  # noqa: E402
from bench._storm_crew import Clients, Daemons, cpu_seconds_of  # noqa: E402
from bench.common import KEY_BYTES, KIB, MANIFEST, MIB, Row, Worker, report, workers  # noqa: E402

from cenote.client import Cache, connect  # noqa: E402
from cenote.shm.inspect import Catalog  # noqa: E402

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ROUNDS: Final = 5
CHUNKS: Final = 1_044_480  # 4,096 fewer than 2^20
KILLS: Final = 200
CHUNK_BYTES: Final = 4 * KIB
WORDS_A_LINE: Final = 16
KEYS_FILE: Final = "keys"
SLICE_S: Final = 0.03
BEFORE_S: Final = 4.0
ABSENT_S: Final = 2.0
AFTER_S: Final = 10.0
HELD: Final = 64
CPU_BAR_S: Final = 0.5
HIT_BAR_S: Final = 1.0
READERS_BAR: Final = 0.95
RATE_BAR: Final = 0.99
RELEASE_BAR_MS: Final = 100.0
PHASES: Final = ("before", "absence", "recovery", "after")


@contextmanager
def daemons(size_bytes: int, *flags: str) -> Iterator[Daemons]:
    """Daemons in a folder of their own; leaving it ends them, and frees the pool."""
    folder = Path(tempfile.mkdtemp(prefix="cenote-bench-"))
    made = Daemons(folder, size_bytes, *flags)
    try:
        made.wait_ready()
        yield made
    finally:
        if made.process.poll() is None:
            made.kill()
        made.drop()
        shutil.rmtree(folder, ignore_errors=True)


def _cache(folder: Path, role: str, *, reconnect: bool) -> Cache:
    pool = connect(folder / "pool.sock", role=role, timeout_s=30.0, reconnect=reconnect)
    return pool.namespace(MANIFEST, timeout_s=30.0)


# ---- a million chunks ---------------------------------------------------------------------------


def _fill(folder: Path, chunks: int) -> int:
    """Fill the pool without touching its memory, and write down the keys that are there."""
    cache = _cache(folder, "writer", reconnect=False)
    packed = os.urandom(chunks * KEY_BYTES)
    Loops().fill(Session.of(cache), packed, CHUNK_BYTES)
    cache.flush(60.0)
    kept, at = [], 0
    while at < len(packed):  # a few in a million find their buckets full
        piece = packed[at : at + 65_536 * KEY_BYTES]
        found = cache.match(piece) * KEY_BYTES
        kept.append(piece[:found])
        at += found + (KEY_BYTES if found < len(piece) else 0)
    keys = b"".join(kept)
    (folder / KEYS_FILE).write_bytes(keys)
    cache.pool.close()
    return len(keys) // KEY_BYTES


def _restart(made: Daemons, key: bytes | None) -> tuple[float, float, float]:
    """Kill and start: CPU seconds until `ready`, seconds until then, and to the first hit."""
    begun_s = time.perf_counter()
    made.kill()
    made.start()
    made.wait_ready()
    cpu_s, ready_s = cpu_seconds_of(made.process.pid), time.perf_counter() - begun_s
    cache = _cache(made.folder, "reader", reconnect=False)
    if key is not None and cache.get(key) is None:
        raise RuntimeError("a chunk of the pool that was taken over is not there")
    hit_s = time.perf_counter() - begun_s
    cache.pool.close()
    return cpu_s, ready_s, hit_s


def _takeovers(made: Daemons, chunks: int, rounds: int) -> list[Row]:
    """Question 1. The pool is filled."""
    key = (made.folder / KEYS_FILE).read_bytes()[:KEY_BYTES]
    with daemons(64 * MIB) as empty:
        theirs = [_restart(empty, None) for _ in range(rounds)]
    ours = [_restart(made, key) for _ in range(rounds)]
    what, beside = f"{chunks:,} chunks, daemon killed", "with an empty pool"
    cpu, ready, hit = (statistics.median(column) for column in zip(*ours, strict=True))
    cpu0, _, hit0 = (statistics.median(column) for column in zip(*theirs, strict=True))
    return [
        Row(
            f"{what}: CPU time until ready",
            cpu,
            "s",
            cpu0,
            beside,
            cpu / cpu0,
            CPU_BAR_S,
            bar_on="value",
            note=f"most {max(c for c, _, _ in ours):.2f} s",
        ),
        Row(
            f"{what}: kill to first hit of a new client",
            hit,
            "s",
            hit0,
            beside,
            hit / hit0,
            HIT_BAR_S,
            bar_on="value",
            note=f"ready after {ready:.2f} s; most {max(h for _, _, h in ours):.2f} s",
        ),
    ]


# ---- readers ------------------------------------------------------------------------------------


def read(folder: Path, index: int, lines: int) -> None:
    """
    A reader: slices of hits and of raw loads in turn, until its input ends; then prints of each
    pair (begin, end, hits a CPU second, hits a load, hits a second by the clock).
    """
    loops, keys = Loops(), (folder / KEYS_FILE).read_bytes()
    cycle = np.zeros(lines * WORDS_A_LINE, dtype=np.uint32)
    loops.cycle(cycle)
    cache = _cache(folder, "reader", reconnect=index == 0)
    session, at, slices, misses = Session.of(cache), index * 500_009, [], 0
    loops.hits_per_s(session, keys, at, SLICE_S)  # map the catalog
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        at += 7_000_003
        begun_s = time.monotonic()
        try:
            cpu, clock = _per_cpu_s(partial(loops.hits_per_s, session, keys, at, SLICE_S))
        except RuntimeError:  # a miss: the index is being mended
            misses += 1
            continue
        loads, _ = _per_cpu_s(partial(loops.loads_per_s, cycle, at, SLICE_S))
        slices.append((begun_s, time.monotonic(), cpu, cpu / loads, clock))
    found = {"slices": slices, "misses": misses, "reconnects": cache.pool.reconnects}
    print(json.dumps(found), flush=True)


def _per_cpu_s(run: Callable[[], float]) -> tuple[float, float]:
    """What *run* says it did a second, by CPU time and by the clock."""
    begun_s, begun_cpu_s = time.monotonic(), time.thread_time()
    rate = run()
    return rate * (time.monotonic() - begun_s) / (time.thread_time() - begun_cpu_s), rate


def _readers(made: Daemons, rounds: int) -> list[Row]:
    """Question 2. The pool is filled."""
    lines = str(_catalog_lines(made.folder))
    argv = (__file__, "--reader", str(made.folder), lines)
    spans: list[dict[str, tuple[float, float]]] = []
    with workers(*(Worker(*argv, str(i), cpu_index=i) for i in range(2))) as crew:
        for worker in crew:
            worker.hear()
        for _ in range(rounds):
            marks = list(_one_death(made))
            spans.append(dict(zip(PHASES, itertools.pairwise(marks), strict=True)))
        for worker in crew:
            worker.say("end")
        told = [json.loads(worker.hear()) for worker in crew]
    misses, reconnects = ([t[what] for t in told] for what in ("misses", "reconnects"))
    note = f"misses {misses}, reconnects {reconnects}"
    return [_phase_row(told, spans, phase, note) for phase in PHASES[1:]]


def _one_death(made: Daemons) -> Iterator[float]:
    """Kill the daemon and start the next; yield when each phase begins, and the end."""
    yield time.monotonic()
    time.sleep(BEFORE_S)
    made.kill()
    yield time.monotonic()
    time.sleep(ABSENT_S)
    yield time.monotonic()
    made.start()
    made.wait_ready()
    yield time.monotonic()
    time.sleep(AFTER_S)
    yield time.monotonic()


def _phase_row(
    told: list[dict[str, Any]], spans: list[dict[str, tuple[float, float]]], phase: str, note: str
) -> Row:
    def of(which: str, at: int) -> list[float]:
        return [_mean(told, *one[which], at) for one in spans]

    def ratio(at: int) -> float:
        pairs = zip(of(phase, at), of("before", at), strict=True)
        return statistics.median(a / b for a, b in pairs)

    return Row(
        f"2 readers' hits, {phase}",
        statistics.median(of(phase, 2)) * 2e-6,
        "M/s",
        statistics.median(of("before", 2)) * 2e-6,
        "before the daemon was killed",
        ratio(3),
        READERS_BAR,
        at_most=False,
        note=f"the ratio is that of hits a raw load; by CPU time {ratio(2):.2f}, by the clock "
        f"{ratio(4):.2f}; {note}",
    )


def _mean(told: list[dict[str, Any]], begin_s: float, end_s: float, at: int) -> float:
    """Over the slices of both that lie between, in part at least."""
    inside = [s[at] for one in told for s in one["slices"] if s[1] > begin_s and s[0] < end_s]
    return statistics.fmean(inside)


def _catalog_lines(folder: Path) -> int:
    """The cache lines that random hits read."""
    cache = _cache(folder, "reader", reconnect=False)
    super_ = cache._binding.attachment.handle.catalog
    lines = int(super_.chunk_count) + int(super_.bucket_count)
    cache.pool.close()
    return lines


# ---- under load ---------------------------------------------------------------------------------


def _under_load(rounds: int) -> list[Row]:
    """Question 3."""
    findings: list[str] = []
    flags = ("--max-chunks", str(MAX_CHUNKS), "--checksum", "commit")
    with daemons(STORM_BYTES, *flags) as made:
        witness = Witness(made.folder, CLIENTS, findings.append)
        clients = Clients(made.folder, CLIENTS, KEYS, random.Random(1))
        rates, kept = HitRates(), []
        try:
            clients.fill_up()
            _sample(rates, witness, 3 * WINDOW_S)
            for _ in range(rounds):
                _sample(rates, witness, 2 * WINDOW_S)
                died_s = time.monotonic()
                made.kill()
                still = witness.take(exact=True)
                witness.starts += 1
                made.start()
                made.wait_ready()
                rates.death(died_s, time.monotonic())
                kept.append(witness.share_of(still))
                _sample(rates, witness, 2 * WINDOW_S)
        finally:
            clients.close()
            witness.pool.close()
    if findings:
        raise RuntimeError(f"run bench/storm.py: {findings}")
    before, after = rates.means()
    note = f"{statistics.median(kept):.4f} of what was there is found by the next daemon's clients"
    row = Row(
        "hit rate under load, after SIGKILL",
        100 * after,
        "%",
        100 * before,
        "before it",
        after / before,
        RATE_BAR,
        at_most=False,
        note=note,
    )
    return [row]


def _sample(rates: HitRates, witness: Witness, seconds: float) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        rates.sample(*witness.rate())
        witness.follow()
        time.sleep(0.02)


# ---- leases of the dead -------------------------------------------------------------------------


def hold(socket: str, keys: bytes, ready: Connection) -> None:
    """A reader that leases chunks and waits to be killed."""
    with connect(socket, role="reader", reconnect=False) as pool:
        chunks = pool.namespace(MANIFEST).get_many(keys)
        ready.send(len(chunks))
        signal.pause()


def _release_ms(catalog: Catalog, socket: Path, keys: bytes) -> float:
    """Kill one; milliseconds from its exit until the keeper has dropped its leases."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=hold, args=(str(socket), keys, theirs), daemon=True)
    process.start()
    theirs.close()
    if ours.recv() != HELD:
        raise RuntimeError("a chunk that was stored is not there")
    assert process.pid is not None
    pidfd = os.pidfd_open(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    select.select([pidfd], [], [])
    ended_s = time.perf_counter()
    while any(session.pid == process.pid for session in catalog.sessions()):
        time.sleep(0.0002)
    took_s = time.perf_counter() - ended_s
    os.close(pidfd)
    process.join()
    return took_s * 1e3


def _releases(kills: int) -> list[Row]:
    """Question 4."""
    keys = os.urandom(HELD * KEY_BYTES)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["cenote.client", "numpy"])
    with daemons(64 * MIB) as made:
        cache = _cache(made.folder, "writer", reconnect=False)
        cache.put_many(keys, [bytes(CHUNK_BYTES)] * HELD)
        cache.flush()
        catalog = Catalog.of(cache.pool.mapping)
        took = sorted(_release_ms(catalog, made.folder / "pool.sock", keys) for _ in range(kills))
        cache.pool.close()
    p99 = took[min(len(took) - 1, int(len(took) * 0.99))]
    note = f"{kills} readers with {HELD} leases each; worst {took[-1]:.2f} ms"
    return [
        Row("leases of a killed reader gone, p50", statistics.median(took), "ms"),
        Row("leases of a killed reader gone, p99", p99, "ms", bar=RELEASE_BAR_MS, note=note),
    ]


def measure(rounds: int, chunks: int, kills: int) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and what was asked."""
    size = (chunks * CHUNK_BYTES * 5 // 4 // (2 * MIB) + 32) * 2 * MIB
    flags = ("--no-populate", "--max-chunks", str(chunks + 4096), "--checksum", "off")
    with daemons(size, "--medium", "memfd", *flags) as made:
        there = _fill(made.folder, chunks)
        rows = _takeovers(made, there, rounds) + _readers(made, rounds)
    rows += _under_load(rounds)
    rows += _releases(kills)
    return rows, {"chunks": there, "kills": kills, "rounds": rounds}


def main() -> int:
    parser = argparse.ArgumentParser(description="Deaths of daemons and clients.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--chunks", type=int, default=CHUNKS)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--reader", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        folder, lines, index = options.reader
        read(Path(folder), int(index), int(lines))
        return 0
    rows, details = measure(options.rounds, options.chunks, options.kills)
    report("restart", rows, **details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
