# SPDX-License-Identifier: Apache-2.0
"""What bench/storm.py does to clients and daemons, and what is looked at around each blow."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from bench._storm_checks import HitRates, Still, Witness, eventually_not, holder_of
from bench._storm_crew import Clients, Daemons, Life, stand_still
from bench._storm_work import MANIFEST, PATIENCE_S, key_of
from bench.common import MIB

from cenote.client import connect

CLIENTS: Final = 6
POOL_BYTES: Final = 48 * MIB
KEYS: Final = 2000  # 148 MiB
MAX_CHUNKS: Final = 16_384
VIOLATIONS_MAX: Final = 20  # from here on it is the same again and again
POOLS: Final = {
    "medium": ("shm", "memfd"),
    "checksum": ("commit", "lazy", "off"),
    "policy": ("use-count", "lru", "lfu", "s3-fifo"),
}


class Blows:
    """
    Everybody, and what can happen to them.

    Args:
        folder: Of its own.
        seed: Of all choices.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._rng = random.Random(seed)
        self._begun_s = time.monotonic()
        self.log: list[str] = []
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.restarts_s: list[float] = []
        self.releases_s: list[float] = []
        self.kept: list[float] = []
        self.rates = HitRates()
        self.pool = {name: self._rng.choice(values) for name, values in POOLS.items()}
        flags = [word for name, value in self.pool.items() for word in (f"--{name}", value)]
        self.daemons = Daemons(folder, POOL_BYTES, "--max-chunks", str(MAX_CHUNKS), *flags)
        self.daemons.wait_ready()
        self._folder = folder
        self.witness = Witness(folder, CLIENTS, self.violation)
        self.clients = Clients(folder, CLIENTS, KEYS, self._rng)

    # ---- what is said ----------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Add a line to the log."""
        self.log.append(f"{time.monotonic() - self._begun_s:8.3f} {text}")

    def violation(self, text: str) -> None:
        """Something that must not be."""
        if len(self.violations) < VIOLATIONS_MAX:
            self.say(f"VIOLATION {text}")
            self.violations.append(text)

    # ---- time ------------------------------------------------------------------------------------

    def look(self) -> None:
        """What is done all the time: follow the feed, count, bury and replace."""
        self.clients.thaw(time.monotonic())
        self.witness.follow()
        for life in self.clients.dead():
            status = self.clients.bury(life)
            self.witness.follow()  # it wrote why
            self.violation(f"{life.name} ({life.role}) ended with status {status}")
        self.clients.fill_up()
        self.rates.sample(*self.witness.rate())

    def wait(self, seconds: float) -> None:
        """Let so much time pass."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, 0.02))
            self.look()

    # ---- what happens to clients -----------------------------------------------------------------

    def _pick(self) -> Life:
        # The newest often, so that the first steps of a life are hit as well as its middle.
        newest = self._rng.random() < 0.2
        return self.clients.alive[-1] if newest else self._rng.choice(self.clients.alive)

    def kill_client(self) -> None:
        """And see how long its session is there after its end."""
        life = self._pick()
        pid, had_session = life.pid, self.witness.has_session(life.pid)
        status = self.clients.kill(life)
        ended_s = time.monotonic()
        if status != -signal.SIGKILL:
            self.violation(f"{life.name} ended with status {status} before it was killed")
        while had_session and self.witness.has_session(pid):
            if time.monotonic() - ended_s > PATIENCE_S / 4:
                self.violation(f"the session of pid {pid} does not end: {life.name}")
                return
            time.sleep(0.001)
        if had_session:
            self.releases_s.append(time.monotonic() - ended_s)
        self.say(f"killed {life.name} ({life.role}, pid {pid})")

    def kill_client_unseen(self) -> None:
        """While no daemon is there."""
        if self.clients.alive:
            life = self._pick()
            self.clients.kill(life)
            self.say(f"killed {life.name} ({life.role}) without a daemon")

    def stop_client(self) -> None:
        """For a while, in which it keeps what it holds."""
        life, seconds = self._pick(), self._rng.uniform(0.05, 3.0)
        if not life.thaw_s:
            os.kill(life.pid, signal.SIGSTOP)
            life.thaw_s = time.monotonic() + seconds
            self.say(f"stopped {life.name} (pid {life.pid}) for {seconds:.2f} s")

    def end_client(self) -> None:
        """It lets everything go by itself."""
        life = self._pick()
        if not life.thaw_s and (status := self.clients.tell_to_stop(life, self.witness)) != 0:
            self.witness.follow()
            self.violation(f"{life.name} was told to stop, and ended with status {status}")
        self.say(f"ended {life.name} ({life.role})")

    def kill_holder(self) -> None:
        """The daemon has a copy of everything, for the next one: until then nobody kills it."""
        holder = holder_of(self._folder)
        if holder is None:
            self.violation("there is no holder process")
            return
        os.kill(holder, signal.SIGKILL)
        eventually_not(lambda: holder_of(self._folder) == holder)
        with connect(self._folder / "pool.sock", role="reader", timeout_s=30, reconnect=False):
            self.say(f"killed the holder process {holder}, and opened a session")

    # ---- what happens to the daemon --------------------------------------------------------------

    def kill_daemon(self) -> None:
        """At any moment."""
        self._restart(self._die, "killed the daemon")

    def kill_everybody(self) -> None:
        """Daemon and clients at once."""

        def die() -> Still | None:
            for life in list(self.clients.alive):
                os.kill(life.pid, signal.SIGKILL)
            found = self._die()
            for life in list(self.clients.alive):
                self.clients.bury(life)
            return found

        self._restart(die, "killed everybody")

    def end_daemon(self) -> None:
        """As an administrator does."""

        def die() -> Still:
            self.daemons.signal(signal.SIGTERM)
            status = self.daemons.wait()
            if status != 0:
                self.violation(f"a daemon that was told to stop ended with status {status}")
            return self.witness.take(exact=True)

        self._restart(die, "ended the daemon")

    def kill_newborn(self) -> None:
        """Once while it runs, and then some that are taking over."""

        def die() -> Still | None:
            found = self._die()
            for _ in range(self._rng.randrange(1, 4)):
                self._start()
                self._pause(self._rng.uniform(0.1, 0.9))
                status = self.daemons.kill()
                self.say(f"killed its successor while it started ({status})")
                if status != -signal.SIGKILL:
                    self.violation(f"a daemon that started ended with status {status}")
            still = self.witness.at_death(self.witness.take(exact=True), "at the newborn's death")
            if found is not None:
                self.witness.compare(found, "gone after deaths in takeover")
            return still

        self._restart(die, "killed the daemon, and what came after it")

    def replace_daemon(self) -> None:
        """The next one is told to take the place of one that runs."""
        first, out = self.daemons.process, self.daemons.out
        before = self.witness.take()
        begun_s = time.monotonic()
        self.witness.may_be_untold += 1
        self._start("--take-over")
        self._be_ready(begun_s, before)
        out.close()
        if (status := first.wait(PATIENCE_S)) != -signal.SIGKILL:
            self.violation(f"the daemon that was replaced ended with status {status}")
        self._check(before, "gone with a daemon that was replaced")
        self.say("a daemon took the place of another")

    def supplant_daemon(self) -> None:
        """It is stopped; the next one must kill it, and take over."""
        stand_still(self.daemons.process.pid)
        still = self.witness.at_death(self.witness.take(), "as it was stopped")
        begun_s = time.monotonic()
        first, out = self.daemons.process, self.daemons.out
        self._pause(self._rng.uniform(0.0, 0.5))
        self._start()
        self._be_ready(begun_s, still)
        out.close()
        if (status := first.wait(PATIENCE_S)) != -signal.SIGKILL:
            self.violation(f"the daemon that was stopped ended with status {status}")
        self._check(still, "gone with a daemon that was stopped")
        self.say("a second daemon took over from a stopped one")

    def stop_daemon(self) -> None:
        """For a while; nobody takes over."""
        seconds = self._rng.uniform(0.05, 2.5)
        stand_still(self.daemons.process.pid)
        still = self.witness.take(exact=True)
        self._pause(seconds)
        self.daemons.signal(signal.SIGCONT)
        self._check(still, "gone in a daemon that was stopped")
        self.say(f"stopped the daemon for {seconds:.2f} s")

    def _pause(self, seconds: float) -> None:
        """Time passes for clients, too, but none is started or buried."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            time.sleep(0.01)
            self.clients.thaw(time.monotonic())
            self.witness.read_feed()

    def _die(self) -> Still | None:
        before = self.witness.take()
        status = self.daemons.kill()
        if status != -signal.SIGKILL:
            self.violation(f"the daemon ended with status {status} before it was killed")
        return self.witness.at_death(before, "at the death")

    def _start(self, *more: str) -> None:
        self.witness.starts += 1
        self.daemons.start(*more)

    def _restart(self, die: Callable[[], Still | None], what: str) -> None:
        died_s = time.monotonic()
        still = die()
        if self._rng.random() < 0.3:
            self._pause(self._rng.uniform(0.0, 1.0))
        if self._rng.random() < 0.3:
            self.kill_client_unseen()
        self.clients.fill_up()  # they find no daemon
        begun_s = time.monotonic()
        self._start()
        self._be_ready(begun_s, still)
        self.rates.death(died_s, time.monotonic())
        if still is not None:
            self._check(still, f"{what}: gone")
        self.say(f"{what}; the next has pid {self.daemons.process.pid}")

    def _be_ready(self, begun_s: float, still: Still | None) -> None:
        """Wait for the daemon, and until it has served a hit to a new client."""
        self.daemons.wait_ready()
        if still is not None and still.live:
            if still.exact:
                self.kept.append(self.witness.share_of(still))
            self._first_hit(still)
            self.restarts_s.append(time.monotonic() - begun_s)

    def _first_hit(self, still: Still) -> None:
        """A new client attaches and gets something; the memory may be full of pins, never empty."""
        with connect(
            self._folder / "pool.sock", role="reader", timeout_s=30, reconnect=False
        ) as pool:
            cache = pool.namespace(MANIFEST, timeout_s=30)
            deadline_s = time.monotonic() + PATIENCE_S / 4
            while time.monotonic() < deadline_s:
                for i in still.live:
                    if (chunk := cache.get(key_of(i))) is not None:
                        chunk.release()
                        return
        self.violation("a new client found nothing of what was there")

    def _check(self, still: Still, what: str) -> None:
        self.witness.compare(still, what)
        if self.witness.pool.pool_id != self.witness.born_in:
            self.violation("the pool was made anew")
