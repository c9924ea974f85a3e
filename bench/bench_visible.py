# SPDX-License-Identifier: Apache-2.0
"""
How long after its commit is a chunk visible to another process?

    python bench/bench_visible.py [--rounds N]

A reader process polls `match`; the writer notes the time, commits and blocks. The keeper has a CPU
of its own, the reader a third one; where there are only two it shares the writer's, so that a
switch to it is in the figure. Once while the keeper is awake (it has just linked another chunk of
the writer's) and once while it sleeps, which costs a wake-up: that is compared with a round trip
over a pair of eventfds between processes on the same two CPUs. CLOCK_MONOTONIC is the same
everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench.common import (  # noqa: E402  # needs the path above
    KIB,
    MANIFEST,
    MIB,
    PrivateDaemon,
    Row,
    Worker,
    cpus,
    pin,
    pinned,
    random_keys,
    report,
)

from cenote.client import connect  # noqa: E402

if TYPE_CHECKING:
    from cenote.client import Cache, Put

ROUNDS: Final = 400
NBYTES: Final = 4 * KIB
AWAKE_BAR_US: Final = 5.0
ASLEEP_BAR: Final = 1.5
SLEEPY_S: Final = 0.002  # far more than a keeper polls before it sleeps
GIVE_UP_NS: Final = 5_000_000_000
WRITER, KEEPER, READER = 0, 1, 2  # which of this process's CPUs


def _filled(cache: Cache, key: bytes) -> Put:
    put = cache.put(key, NBYTES)
    put.copy_from(np.zeros(NBYTES, dtype=np.uint8))
    return put


def read(socket: str) -> None:
    """The reader's process: for each key on stdin, poll until it is there, and say when."""
    with connect(socket, role="reader", reconnect=False) as pool:
        cache = pool.namespace(MANIFEST)
        print("ready", flush=True)
        for line in sys.stdin:
            key = bytes.fromhex(line)
            match, limit = cache.match, time.monotonic_ns() + GIVE_UP_NS
            os.write(1, b"polling\n")
            while not match(key):
                if time.monotonic_ns() > limit:
                    raise RuntimeError("a committed chunk did not become visible within 5 s")
            os.write(1, b"%d\n" % time.monotonic_ns())  # in one piece


def _one(cache: Cache, reader: Worker, *, awake: bool) -> tuple[float, bool]:
    """Microseconds from commit to visible, and whether the keeper slept at the commit."""
    key, other = random_keys(2)
    put = _filled(cache, key)
    before = _filled(cache, other) if awake else None
    reader.say(key.hex())
    reader.hear()  # it polls from now on
    catalog = cache._binding.attachment.handle.catalog
    if before is not None:
        before.commit()
        cache.flush()
    else:
        time.sleep(SLEEPY_S)
    slept = bool(catalog.sleeping)
    assert reader.process.stdout is not None
    answer = reader.process.stdout.fileno()
    begun = time.monotonic_ns()
    put.commit()
    seen = int(os.read(answer, 64))  # blocks at once: one system call, no buffers in between
    return (seen - begun) / 1000, slept


def _visible(cache: Cache, reader: Worker, rounds: int, *, awake: bool) -> list[float]:
    """Rounds in which the keeper was found as it was wanted."""
    took = [_one(cache, reader, awake=awake) for _ in range(rounds)]
    wanted = [us for us, slept in took if slept != awake]
    if len(wanted) < rounds // 4:
        state = "awake" if awake else "asleep"
        raise RuntimeError(f"the keeper was {state} in {len(wanted)} of {rounds} rounds only")
    return wanted


def echo(ask: int, answer: int) -> None:
    """The other process of the round trips."""
    print("ready", flush=True)
    while os.eventfd_read(ask) < 1 << 32:
        os.eventfd_write(answer, 1)


def _round_trips(rounds: int) -> list[float]:
    """Microseconds of eventfd round trips between two processes that both sleep in between."""
    ask, answer = (os.eventfd(0, 0) for _ in range(2))
    with pinned(KEEPER):
        child = os.posix_spawn(
            sys.executable,
            [sys.executable, __file__, "--echo", json.dumps([ask, answer])],
            {**os.environ, "PYTHONSAFEPATH": "1"},
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
        )
    took = []
    for _ in range(rounds):
        begun = time.monotonic_ns()
        os.eventfd_write(ask, 1)
        os.eventfd_read(answer)
        took.append((time.monotonic_ns() - begun) / 1000)
        time.sleep(SLEEPY_S)
    os.eventfd_write(ask, 1 << 32)
    os.waitpid(child, 0)
    for fd in (ask, answer):
        os.close(fd)
    return took[1:]


def measure(rounds: int) -> list[Row]:
    """All rows; waking and the round trips take turns in groups."""
    awake: list[float] = []
    asleep: list[float] = []
    trips: list[float] = []
    beside = READER if len(cpus()) > READER else WRITER
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(PrivateDaemon(64 * MIB, cpu_index=KEEPER))
        argv = (__file__, "--reader", str(daemon.socket))
        with Worker(*argv, cpu_index=beside) as reader:
            pin(WRITER)
            cache = stack.enter_context(daemon.connect()).namespace(MANIFEST)
            reader.hear()
            for _ in range(4):
                awake += _visible(cache, reader, rounds // 4, awake=True)
                asleep += _visible(cache, reader, rounds // 4, awake=False)
                trips += _round_trips(rounds // 4)
    trip = statistics.median(trips)
    sleeping = statistics.median(asleep)
    return [
        Row(
            "commit to visible, keeper awake, p50",
            statistics.median(awake),
            "us",
            bar=AWAKE_BAR_US,
            note=f"{len(awake)} rounds, p10 {statistics.quantiles(awake, n=10)[0]:.1f} us",
        ),
        Row(
            "commit to visible, keeper asleep, p50",
            sleeping,
            "us",
            trip,
            "eventfd round trip of two processes",
            sleeping / trip,
            ASLEEP_BAR,
            note=f"{len(asleep)} rounds",
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="From the commit to another process's hit.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--reader", metavar="SOCKET", help=argparse.SUPPRESS)
    parser.add_argument("--echo", metavar="FDS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        read(options.reader)
    elif options.echo:
        echo(*json.loads(options.echo))
    else:
        report("visible", measure(options.rounds), rounds=options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
