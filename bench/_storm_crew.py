# SPDX-License-Identifier: Apache-2.0
"""The processes of bench/storm.py: one daemon after the other, and the clients beside it."""

from __future__ import annotations

import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO, TYPE_CHECKING, Final

from bench import _storm_work
from bench._storm_work import FIELDS, PATIENCE_S, Post
from bench.common import HERE, _clean_environment

from cenote.daemon.custody_holder import HolderCustody
from cenote.shm.wire import close_all

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

    from bench._storm_checks import Witness

PROGRAM: Final = HERE / "_storm_daemon.py"
LOG: Final = "cenoted.log"
EVENT_SLOTS: Final = 1 << 18
BAD_WORDS: Final = ("Traceback", "pool_not_kept", "audit_failed", "check_failed", "cannot_start")


def stand_still(pid: int) -> None:
    """SIGSTOP, and wait until every thread of the process stands still."""
    os.kill(pid, signal.SIGSTOP)
    deadline_s = time.monotonic() + PATIENCE_S
    while _states(pid) != {"T"}:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"process {pid} does not stop: {_states(pid)}")
        time.sleep(0.001)


def _states(pid: int) -> set[str]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks}


def cpu_seconds_of(pid: int) -> float:
    """CPU time that a process has used so far."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


class Daemons:
    """
    The daemons of one pool, each of which takes over from the one before.

    Args:
        folder: Where socket, lock, custody and log are.
        size_bytes: Of the pool.
        flags: More flags of cenoted.
    """

    def __init__(self, folder: Path, size_bytes: int, *flags: str) -> None:
        self.folder = folder
        self.name = f"storm{os.getpid()}"
        self.log = folder / LOG
        config = folder / "cenoted.toml"
        # A file of our own, and a feed that a witness without CPU does not lose at once.
        config.write_text(f"[[pool]]\nname = '{self.name}'\nevent_slots = {EVENT_SLOTS}\n")
        self._argv = [
            *(sys.executable, str(PROGRAM), "--config", str(config)),
            *("--run-dir", str(folder), "--socket", str(folder / "pool.sock")),
            *("--name", self.name, "--size", str(size_bytes)),
            *("--log-format", "text", "--log-level", "DEBUG", *flags),
        ]
        self.process = self._spawn()

    def _spawn(self, *more: str) -> subprocess.Popen[str]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*self._argv, *more],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                text=True,
                env=_clean_environment(),
            )

    def start(self, *more: str) -> None:
        """Start the next one; it is not ready when this returns."""
        self.process = self._spawn(*more)

    def wait_ready(self) -> None:
        """
        Raises:
            RuntimeError: It ended, or never said that it is.
        """
        out = self.out
        if not select.select([out], [], [], PATIENCE_S)[0] or "ready" not in out.readline():
            raise RuntimeError(f"cenoted does not come up: {self.log.read_text()[-3000:]}")

    @property
    def out(self) -> IO[str]:
        """Its standard output."""
        assert self.process.stdout is not None
        return self.process.stdout

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        self.out.close()
        return self.process.wait(PATIENCE_S)

    def kill(self) -> int:
        """SIGKILL, and wait."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def drop(self) -> int:
        """Free what is left of the pool; the exit status of cenoted."""
        freed = self._spawn("--drop")
        freed.communicate(timeout=PATIENCE_S)
        return freed.returncode

    def in_custody(self) -> list[str]:
        """What the holder keeps for the next one; no daemon runs."""
        custody = HolderCustody(self.folder, self.name)
        try:
            kept = custody.left()
            close_all(kept.values())
            return sorted(kept)
        finally:
            custody.close()

    def names(self) -> list[str]:
        """What is in /dev/shm under the pool's name."""
        prefix = f"cenote.{os.geteuid()}.{self.name}."
        return sorted(p.name for p in Path("/dev/shm").iterdir() if p.name.startswith(prefix))

    def repairs(self) -> list[int]:
        """How many things each takeover had to put right."""
        text = self.log.read_text(errors="replace")
        return [int(found) for found in re.findall(r"pool_taken_over .*repaired=(\d+)", text)]

    def complaints(self) -> list[str]:
        """Lines of the log that must not be there."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if any(word in line for word in BAD_WORDS)]


@dataclass
class Life:
    """A client: its process, its diary, and until when it is stopped (0: it runs)."""

    number: int
    name: str
    role: str
    process: ForkServerProcess
    thaw_s: float = 0.0
    ended: bool = field(default=False)

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self.process.pid is not None
        return self.process.pid


class Clients:
    """So many clients at once; who dies is replaced."""

    def __init__(self, folder: Path, count: int, keys: int, rng: Random) -> None:
        self._folder = folder
        self._count = count
        self._keys = keys
        self._rng = rng
        self._born = 0
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["cenote.client", "numpy", "importlib.metadata"])
        self.alive: list[Life] = []

    def fill_up(self) -> None:
        """Start clients until enough are there; at least one of each kind."""
        while len(self.alive) < self._count:
            number = min(set(range(self._count)) - {life.number for life in self.alive})
            role = "reader" if number % 3 == 0 else "writer"
            name, seed = f"diary{self._born:05}", self._rng.getrandbits(32)
            self._born += 1
            post = Post(self._folder, number, name, seed, role, self._keys, self._count)
            process = self._context.Process(target=_storm_work.work, args=(post,), daemon=True)
            process.start()
            self.alive.append(Life(number, name, role, process))

    def kill(self, life: Life) -> int:
        """SIGKILL; return how it ended, which may have been before."""
        life.process.kill()
        return self.bury(life)

    def bury(self, life: Life) -> int:
        """Wait for the end of one; return its exit status."""
        life.process.join(PATIENCE_S)
        status = life.process.exitcode
        if status is None:
            raise TimeoutError(f"client {life.name} does not end")
        life.process.close()
        self.alive.remove(life)
        return status

    def tell_to_stop(self, life: Life, witness: Witness) -> int:
        """Let one end by itself; return its exit status."""
        row = witness.tallies[life.number]
        row[-1] = 1
        try:
            return self.bury(life)
        finally:
            row[-1] = 0

    def dead(self) -> list[Life]:
        """Those that ended by themselves."""
        return [life for life in self.alive if life.process.exitcode is not None]

    def thaw(self, now_s: float) -> None:
        """Let go on whoever was stopped for long enough."""
        for life in self.alive:
            if life.thaw_s and life.thaw_s <= now_s:
                os.kill(life.pid, signal.SIGCONT)
                life.thaw_s = 0.0

    def all_at_work(self, witness: Witness) -> list[str]:
        """
        Let everybody run, and wait until each is attached and goes on; return who does not.
        """
        self.thaw(float("inf"))
        ops, connected = FIELDS.index("ops"), FIELDS.index("connected")
        before = witness.tallies[:, ops].copy()
        deadline_s = time.monotonic() + PATIENCE_S / 4
        while time.monotonic() < deadline_s:
            rows = witness.tallies
            lazy = [
                f"{life.name} ({life.role}, pid {life.pid})"
                for life in self.alive
                if rows[life.number, ops] <= before[life.number] or not rows[life.number, connected]
            ]
            if not lazy or self.dead():
                return []
            time.sleep(0.01)
        return lazy

    def close(self) -> None:
        """Kill what still lives."""
        for life in list(self.alive):
            self.kill(life)
