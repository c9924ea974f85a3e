# SPDX-License-Identifier: Apache-2.0
"""
Does the pool survive the deaths of everybody who uses it?

    python bench/storm.py [--seconds N] [--seed S] [--json FILE]

Six clients with a mixed load work on a pool that is a third of what they store. Clients and daemon
are killed and stopped at random moments, and the daemon is started again at once: after SIGKILL,
after SIGTERM, by a second one that finds the first stopped, and while it was taking over itself.
The choices follow from the seed, the moments from the machine as well. A witness compares what was
there before each death with what is there after it (_storm_checks.py).

The exit status is 1 when anything was there that must not be: a wrong byte, a chunk that went
without an event, an error that docs/client.md does not name, something left at the end. Then the
seed and the end of the log are printed. Times are reported, never judged.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, from anywhere
    sys.path.append(str(ROOT))

from bench._storm_blows import KEYS, VIOLATIONS_MAX, Blows  # noqa: E402  # path above
from bench._storm_checks import (  # noqa: E402
    WINDOW_S,
    eventually_not,
    holder_of,
    kinds_of_files,
    open_files,
    spread,
)
from bench._storm_work import FIELDS, HAIL, HAIL_KEYS, PATIENCE_S  # noqa: E402

from cenote.client import PoolGone, Timeout  # noqa: E402

SECONDS: Final = 60.0
TAIL: Final = 60
FORGET_S: Final = 30.0  # until a daemon has taken dead sessions out of custody

WEIGHTS: Final = {
    "kill_client": 40,
    "stop_client": 20,
    "end_client": 5,
    "kill_holder": 3,
    "kill_daemon": 12,
    "kill_newborn": 5,
    "kill_everybody": 2,
    "end_daemon": 3,
    "replace_daemon": 3,
    "supplant_daemon": 5,
    "stop_daemon": 5,
}

CHECKER_FILES: Final = 3  # of the task that checks, after a dirty start, what has a checksum
Files = tuple[int | None, int | None]  # open descriptors of a daemon and of its holder


def _more(before: Files, after: Files) -> bool:
    pairs = zip(before, after, strict=True)
    return any(a is not None and (b is None or b > a) for a, b in pairs)


class Storm(Blows):
    """One run; see Blows."""

    def run(self, seconds: float) -> None:
        """Everything, until the time is over or nothing is as it should be."""
        before = self._open_files()
        self.clients.fill_up()
        self.wait(1.0)  # of an empty pool nothing is to be lost
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and len(self.violations) < VIOLATIONS_MAX:
            self.wait(self._rng.uniform(0.02, 0.6))
            (action,) = self._rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))
            self.counts[action] += 1
            getattr(self, action)()
            self.look()
        self._come_to_rest()
        self._leave_nothing(before)

    def _open_files(self) -> Files:
        """Of a daemon that took over with the witness alone, and of its holder."""
        self.daemons.kill()
        self._start()
        self.daemons.wait_ready()
        self._reconnected()
        return self._files()

    def _files(self) -> Files:
        holder = holder_of(self._folder)
        return open_files(self.daemons.process.pid), open_files(holder) if holder else None

    def _reconnected(self) -> None:
        """Wait until the witness is connected again."""
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            try:
                self.witness.audit()
            except (PoolGone, Timeout):
                time.sleep(0.02)
                continue
            return
        raise TimeoutError("the witness does not find the daemon again")

    def _come_to_rest(self) -> None:
        """After the last blow everybody goes on by himself; then they leave, each in its way."""
        self._reconnected()
        for lazy in self.clients.all_at_work(self.witness):
            self.violation(f"does not go on after the storm: {lazy}")
        self.wait(WINDOW_S)
        if wrong := self.witness.audit():
            self.violation(f"the audit found {wrong} contradictions with clients at work")
        self.witness.tallies[:, -1] = 1  # stop
        for life in list(self.clients.alive):
            killed = self._rng.random() < 0.5
            status = self.clients.kill(life) if killed else self.clients.bury(life)
            if status not in (0, -signal.SIGKILL):
                self.violation(f"{life.name} ended with status {status}")
        self.witness.follow()

    def _leave_nothing(self, before: Files) -> None:
        self.counters = self.witness.settle()
        self.checked_at_end = self.witness.check_all([*range(KEYS), *range(HAIL, HAIL + HAIL_KEYS)])
        self.witness.at_death(self.witness.take(), "at rest")
        begun_s = time.monotonic()
        if self.pool["checksum"] == "commit" and before[0] is not None:
            before = (before[0] + CHECKER_FILES, before[1])
        after = self._files()
        while _more(before, after) and time.monotonic() < begun_s + FORGET_S:
            time.sleep(0.1)  # it takes the dead out of custody at its own pace
            after = self._files()
        self.forgotten_s = time.monotonic() - begun_s
        if _more(before, after):
            pids = self.daemons.process.pid, holder_of(self._folder)
            kinds = [kinds_of_files(pid) for pid in pids]
            self.violation(f"daemon and holder had {before} descriptors and have {after}: {kinds}")
        if labels := self.witness.labels():
            self.violation(f"sessions at the end: {labels}")
        self.open_files = {"before": before, "after": after}

    def close(self) -> None:
        """End everything, and see that nothing is left on this machine."""
        self.clients.close()
        self.witness.pool.close()
        if self.daemons.process.poll() is None:
            self.daemons.signal(signal.SIGCONT)
            self.daemons.signal(signal.SIGTERM)
        self.daemons.wait()
        if self.violations:
            self.say(f"in custody: {self.daemons.in_custody()}")
        if (status := self.daemons.drop()) != 0:
            self.violation(f"cenoted --drop ended with status {status}")
        if names := self.daemons.names():
            self.violation(f"left in /dev/shm: {names}")
        if holder := eventually_not(lambda: holder_of(self._folder)):
            self.violation(f"the holder process {holder} is left")
        for line in self.daemons.complaints():
            self.violation(f"in the log of cenoted: {line}")

    def report(self) -> dict[str, Any]:
        """What happened, and how long it took."""
        totals = self.witness.tallies.sum(axis=0)
        before, after = self.rates.means()
        return {
            "pool": self.pool,
            "violations": self.violations,
            "actions": dict(self.counts),
            "changes_repaired": sum(self.daemons.repairs()),
            "daemons_started": self.witness.starts,
            "restart_to_first_hit_s": spread(self.restarts_s),
            "session_gone_after_client_death_s": spread(self.releases_s),
            "chunks_found_again": spread(self.kept),
            "hit_rate_before": round(before, 4),
            "hit_rate_after": round(after, 4),
            "flushed_keys_judged": self.witness.flushed,
            "events": self.witness.feed.events,
            "gaps": self.witness.feed.gaps,
            "sessions_not_resumed": len(self.witness.anew),
            "changes_without_event": self.witness.untold,
            "counters": getattr(self, "counters", {}),
            "descriptors_back_s": round(getattr(self, "forgotten_s", 0.0), 2),
            "open_files": getattr(self, "open_files", {}),
            "chunks_checked_at_end": getattr(self, "checked_at_end", 0),
            "last_clients": {
                name: int(totals[i]) for i, name in enumerate(FIELDS) if name != "stop"
            },
        }


def storm(seconds: float, seed: int) -> dict[str, Any]:
    """Run it; return the report."""
    folder = Path(tempfile.mkdtemp(prefix="cenote-storm-"))
    logging.basicConfig(filename=folder / "clients.log", format="witness %(message)s")
    found = Storm(folder, seed)
    try:
        found.run(seconds)
    except BaseException as error:
        found.violation(f"the storm ended early: {type(error).__name__}: {error}")
        raise
    finally:
        found.close()
        report = {"seed": seed, "seconds": seconds, **found.report()}
        if found.violations:
            print(*found.violations[:1], *found.log[-TAIL:], sep="\n", file=sys.stderr)
            print(f"seed {seed}; kept: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and stop everybody, and look what is left.")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--seed", type=int, default=0, help="0: a random one")
    parser.add_argument("--json", type=Path, help="write the report there, too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # nothing is to be left by us, either
    seed = options.seed or random.SystemRandom().getrandbits(32)
    report = storm(options.seconds, seed)
    text = json.dumps({"bench": "storm", **report}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
