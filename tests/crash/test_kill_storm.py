# SPDX-License-Identifier: Apache-2.0
"""
kill -9 of readers and writers at random moments, a thousand times over, in one daemon.

CENOTE_CRASH_ROUNDS (1,000) and CENOTE_CRASH_SEED (random) are environment variables; the seed is
printed, and a failure repeats it. The moments depend on the machine, the choices on the seed.
"""

from __future__ import annotations

import os
import random
import runpy
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from cenote.client import connect

ROUNDS: Final = int(os.environ.get("CENOTE_CRASH_ROUNDS", "1000"))
SEED: Final = int(os.environ.get("CENOTE_CRASH_SEED", "0")) or random.SystemRandom().getrandbits(32)
ALIVE: Final = 5  # processes at work between two kills
LOOK_EVERY: Final = 50
EMPTY_EVERY: Final = 250
LONGEST_MS: Final = 120  # between two kills; a process attaches within some 20

STORM: Final = runpy.run_path(str(Path(__file__).with_name("storm.py")))


class Storm:
    """The processes, and who dies when."""

    def __init__(self, zygote: Any, path: Path, rng: random.Random) -> None:
        self._zygote = zygote
        self._path = path
        self._rng = rng
        self.alive: list[Any] = []
        self.ends: dict[int, int] = {}

    def fill_up(self) -> None:
        """Start processes until enough are there; more readers die than writers, or the reverse."""
        while len(self.alive) < ALIVE:
            name = self._rng.choice(["writer", "reader"])
            seed = self._rng.getrandbits(32)
            self.alive.append(self._zygote.spawn(name, self._path, seed))

    def strike(self) -> None:
        """Wait a random moment and kill one, which may still be attaching."""
        select.select([], [], [], self._rng.random() * LONGEST_MS / 1000)
        # The newest often, so that the first steps of a life are hit as well as its middle.
        at = -1 if self._rng.random() < 0.3 else self._rng.randrange(len(self.alive))
        self.bury(self.alive.pop(at))

    def bury(self, child: Any) -> None:
        """Kill one; it must not have ended by itself."""
        status = child.kill()
        self.ends[status] = self.ends.get(status, 0) + 1
        assert status == -signal.SIGKILL, f"seed {SEED}: {self._zygote.log()}"

    def empty(self) -> None:
        """Kill all."""
        while self.alive:
            self.bury(self.alive.pop())


def check_all(path: Path) -> int:
    """Look at every byte of every chunk there is; return how many chunks that were."""
    with connect(path, role="reader", timeout_s=30.0) as pool:
        cache = pool.namespace(STORM["MANIFEST"])
        found = 0
        for i in range(STORM["KEYS"]):
            chunk = cache.get(STORM["key_of"](i))
            if chunk is not None:
                STORM["check"](STORM["key_of"](i), chunk.memory)
                found += 1
                chunk.release()
    return found


def only_the_living(books: Any, storm: Storm) -> Callable[[], bool]:
    """Return a predicate: nobody but a living process has a session."""
    pids = {child.pid for child in storm.alive}
    return lambda: {s["pid"] for s in books.sessions().values()} <= pids


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_processes_leave_nothing(
    cenoted: Callable[..., Any],
    zygote: Callable[..., Any],
    open_books: Callable[..., Any],
    wait: Callable[..., Any],
    record_property: Callable[[str, object], None],
) -> None:
    """
    A thousand processes are killed while they attach, reserve, fill, commit, lease, read and let
    go. Nobody ever sees a wrong byte; sessions, leases, extents and descriptors of the dead come
    back; the keeper's tables agree; nothing is left in /dev/shm.
    """
    print(f"CENOTE_CRASH_SEED={SEED} CENOTE_CRASH_ROUNDS={ROUNDS}")
    daemon = cenoted("--checksum", "commit", medium="shm", size="96MiB")
    books = open_books(daemon)
    storm = Storm(zygote("storm.py"), daemon.socket, random.Random(SEED))
    resident = []
    for done in range(1, ROUNDS + 1):
        storm.fill_up()
        storm.strike()
        if done % LOOK_EVERY == 0:
            wait(only_the_living(books, storm), books.state)
            assert books.audit() == 0, f"seed {SEED}, round {done}"
        if done % EMPTY_EVERY == 0 or done == ROUNDS:
            storm.empty()
            counters = books.settle()
            assert counters["bad_records"] == 0, f"seed {SEED}, round {done}"
            assert counters["lost"] == 0, f"seed {SEED}, round {done}: a checksum was wrong"
            resident.append(books.resident_bytes())
    found = check_all(daemon.socket)
    counters = books.settle()
    report = {
        "killed": sum(storm.ends.values()),
        "sessions": counters["sessions_opened"],
        "commits": counters["commits"],
        "evictions": counters["evictions"],
        "moves": counters["moves"],
        "hits": counters["hits"],
        "chunks_checked": found,
        "daemon_anonymous_MiB": [round(size / 2**20, 1) for size in resident],
    }
    print(report)
    for name, value in report.items():
        record_property(name, value)
    assert counters["commits"] > ROUNDS  # it was a storm
    assert counters["hits"] > ROUNDS
    assert daemon.stop() == 0
    assert daemon.names() == []
