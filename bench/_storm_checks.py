# SPDX-License-Identifier: Apache-2.0
"""
The witness of bench/storm.py: what was in the pool, what became of it, what is left at the end.

It has an admin session that never ends, reads the catalog in place, where no keeper lives as well,
and follows the event feed. What was LIVE in the catalog of a dead daemon must be LIVE in that of
its successor, unless the feed says that it left; what a client flushed must be there or have left.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench._storm_work import FIELDS, MANIFEST, PATIENCE_S, check, key_of, number_of, tallies

from cenote.client import connect
from cenote.client.connection import Backoff
from cenote.client.events import Event, Follower, Gap
from cenote.shm.inspect import Catalog

UNTOLD_MAX: Final = 1  # a change whose keeper died before it wrote the event
WINDOW_S: Final = 1.0  # of a hit rate
LOOKUPS_MIN: Final = 50  # in a window that says anything
LABEL: Final = "witness"


def open_files(pid: int) -> int | None:
    """How many descriptors a process has; None where we may not know."""
    try:
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return None


def kinds_of_files(pid: int | None) -> dict[str, int]:
    """What the descriptors of a process are, and how many of each."""
    found: Counter[str] = Counter()
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # it was closed meanwhile
                found[re.sub(r"[0-9]+", "N", str(entry.readlink()))] += 1
    return dict(sorted(found.items()))


def holder_of(folder: Path) -> int | None:
    """The pid of the process that keeps the descriptors of pools in *folder*."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"cenote.daemon.holder" in words and any(os.fsencode(folder) in w for w in words):
            return int(entry.name)
    return None


def eventually_not(there: Callable[[], object]) -> object:
    """Wait a little until nothing is there; return what still is."""
    deadline_s = time.monotonic() + PATIENCE_S / 10
    while (found := there()) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Some figures in few words."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "min": round(ordered[0], 4),
        "p50": round(statistics.median(ordered), 4),
        "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 4),
        "max": round(ordered[-1], 4),
    }


class HitRates:
    """The clients' hit rates before and after each death of a daemon."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int, int]] = []
        self._open: list[tuple[float, float]] = []
        self.pairs: list[tuple[float, float]] = []

    def sample(self, hits: int, lookups: int) -> None:
        """How many of each there were so far."""
        now_s = time.monotonic()
        self._samples = [s for s in self._samples if s[0] > now_s - 30 * WINDOW_S]
        self._samples.append((now_s, hits, lookups))
        for died_s, ready_s in [pair for pair in self._open if pair[1] + WINDOW_S <= now_s]:
            self._open.remove((died_s, ready_s))
            before = self._between(died_s - WINDOW_S, died_s)
            after = self._between(ready_s, ready_s + WINDOW_S)
            if before is not None and after is not None:
                self.pairs.append((before, after))

    def death(self, died_s: float, ready_s: float) -> None:
        """A daemon died, and the next one was ready."""
        self._open.append((died_s, ready_s))

    def _between(self, begin_s: float, end_s: float) -> float | None:
        inside = [s for s in self._samples if begin_s <= s[0] <= end_s]
        if len(inside) < 2 or inside[-1][2] - inside[0][2] < LOOKUPS_MIN:
            return None
        return (inside[-1][1] - inside[0][1]) / (inside[-1][2] - inside[0][2])

    def means(self) -> tuple[float, float]:
        """Before and after."""
        if not self.pairs:
            return 0.0, 0.0
        before, after = zip(*self.pairs, strict=True)
        return statistics.fmean(before), statistics.fmean(after)


@dataclass
class Still:
    """
    A pool at one moment.

    Attributes:
        head: Sequence number of the event to come.
        live: The keys of its LIVE chunks, as numbers.
        exact: No keeper lived when it was taken.
    """

    head: int
    live: frozenset[int]
    exact: bool


@dataclass
class Feed:
    """What the event feed said so far: the last event of each key, and whether it is there."""

    last: dict[int, int] = field(default_factory=dict)
    live: set[int] = field(default_factory=set)
    events: int = 0
    gaps: int = 0


class Diaries:
    """The new lines of all diaries in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}

    def lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (name of the diary, line); a line that a kill cut off never comes."""
        for path in sorted(self._folder.glob("diary*")):
            at = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(at)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = at + len(whole)
            for line in whole.splitlines():
                yield path.name, json.loads(line)


class Witness:
    """
    Args:
        folder: The run's, with the socket and the diaries.
        clients: How many clients there are at once.
        violation: Called with a text for each thing that must not be.
    """

    def __init__(self, folder: Path, clients: int, violation: Callable[[str], None]) -> None:
        self._violation = violation
        self._diaries = Diaries(folder)
        rows = tallies(folder, clients)
        self.tallies, self._progress = rows[:clients], rows[clients]
        backoff = Backoff(0.02, 0.1)
        socket = folder / "pool.sock"
        self.pool = connect(socket, role="admin", label=LABEL, timeout_s=30, reconnect=backoff)
        self.cache = self.pool.namespace(MANIFEST, timeout_s=30)
        self.born_in = self.pool.pool_id
        self.catalog = Catalog.of(self.pool.mapping)
        self._slot = self.cache._binding.slot
        self._follower = Follower(self.pool, 1)
        self.feed = Feed()
        self.missing: list[int] = []
        self.flushed = 0
        self.untold = 0
        self.anew: list[str] = []  # clients that got a new session, and should have had their own
        self.starts = 1  # daemons that may have taken the pool over, each with a gap in the feed
        self._lost = 0
        self.may_be_untold = 0  # changes by daemons at whose death nobody looked

    # ---- the feed and the diaries ----------------------------------------------------------------

    def follow(self) -> None:
        """Read on in the diaries, then in the feed, and judge what was flushed."""
        promised = [(name, line) for name, line in self._diaries.lines() if self._told(name, line)]
        self.read_feed()
        for name, line in promised:
            self.flushed += len(line["keys"])
            lost = [i for i in line["keys"] if not self._accounted(i, line["since"])]
            if lost:
                self._violation(
                    f"{name}: flushed and not there, without an event since {line['since']}: "
                    f"{lost[:8]} ({len(lost)} of {len(line['keys'])}); refused: "
                    f"{self.catalog.counters()['refused']}"
                )

    def _told(self, name: str, line: dict[str, Any]) -> bool:
        if line["kind"] == "finding":
            self._violation(f"{name}: {line['text']}")
        if line["kind"] == "anew":
            self.anew.append(name)
        return bool(line["kind"] == "flushed")

    def _accounted(self, i: int, since: int) -> bool:
        return i in self.feed.live or self.feed.last.get(i, 0) >= since or self.there(i)

    def read_feed(self) -> None:
        """Read on in the feed, up to what is its end now."""
        head = self.catalog.now().event_head
        while self._follower.sequence < head:
            for item in self._follower.read():
                if isinstance(item, Gap):
                    self._gap(item)
                else:
                    self._event(item)
            self._progress[0] = self._follower.sequence

    def _gap(self, gap: Gap) -> None:
        self.feed.gaps += 1
        if gap.lost is None:
            self._violation("the feed says that a new pool began")
            return
        self._lost += gap.lost
        if self._lost > self.starts * UNTOLD_MAX:
            self._violation(
                f"the feed lost {gap.lost} events before {gap.sequence}, {self._lost} in all, and "
                f"{self.starts} daemons were started"
            )

    def _event(self, event: Event) -> None:
        self.feed.events += 1
        i = number_of(event.key)
        stored = event.kind == "stored"
        if stored == (i in self.feed.live):
            self._surprise(f"key {i} is {event.kind} ({event.reason}, event {event.sequence})", i)
        self.feed.last[i] = event.sequence
        if stored:
            self.feed.live.add(i)
        else:
            self.feed.live.discard(i)

    def _surprise(self, what: str, i: int) -> None:
        """Stored and it was there, or gone and it was not: it came or went without an event."""
        if self.may_be_untold > 0:
            self.may_be_untold -= 1
            return
        last = self.feed.last.get(i)
        there = "was there" if i in self.feed.live else "was not there"
        self._violation(f"{what} and {there}, by its event {last}; {self.feed.gaps} gaps before")

    # ---- before and after a death ----------------------------------------------------------------

    def there(self, i: int) -> bool:
        """Is the i-th key in the catalog?"""
        return self.catalog.find(self._slot, key_of(i)) is not None

    def take(self, *, exact: bool = False) -> Still:
        """Look at the whole pool; exact: no keeper lives, or it is stopped."""
        head = self.catalog.now().event_head
        table = self.catalog.chunks()
        if table.nonsense:
            self._violation(f"{table.nonsense} records of the catalog make no sense")
        return Still(head, frozenset(number_of(chunk.key) for chunk in table), exact)

    def compare(self, before: Still, what: str) -> list[int]:
        """Return what was there and is not, though the feed does not say that it left."""
        after = self.take()
        self.read_feed()
        gone = before.live - after.live
        silent = [i for i in gone if self.feed.last.get(i, 0) < before.head and not self.there(i)]
        if silent and before.exact:
            self.missing += silent
            self._violation(f"{what}: {len(silent)} of {len(before.live)} chunks: {silent[:8]}")
        return silent

    def at_death(self, before: Still, what: str) -> Still:
        """The pool as a dead daemon left it; what it was before is compared."""
        still = self.take(exact=True)
        self.read_feed()
        gone = before.live - still.live
        silent = [i for i in gone if self.feed.last.get(i, 0) < before.head]
        self.untold = max(self.untold, len(silent))
        if len(silent) > UNTOLD_MAX:
            self._violation(f"{what}: gone without an event: {sorted(silent)[:8]} ({len(silent)})")
        differ = self.feed.live ^ still.live
        if len(differ) > UNTOLD_MAX:
            self._violation(
                f"{what}: feed and catalog differ: only in the feed "
                f"{sorted(self.feed.live - still.live)[:8]}, only in the catalog "
                f"{sorted(still.live - self.feed.live)[:8]}"
            )
        for i in differ:
            self.feed.last[i] = still.head
        self.feed.live = set(still.live)
        return still

    def share_of(self, still: Still) -> float:
        """How much of what was there is found by a lookup now."""
        found = sum(1 for i in still.live if self.cache.match(key_of(i)))
        return found / max(len(still.live), 1)

    def rate(self) -> tuple[int, int]:
        """Hits and lookups of all clients so far."""
        hits, lookups = FIELDS.index("hits"), FIELDS.index("lookups")
        return int(self.tallies[:, hits].sum()), int(self.tallies[:, lookups].sum())

    # ---- sessions --------------------------------------------------------------------------------

    def has_session(self, pid: int) -> bool:
        """Does the registry name a process?"""
        return any(session.pid == pid for session in self.catalog.sessions())

    def labels(self) -> list[str]:
        """Whom the registry has, but the witness itself."""
        own = os.getpid()
        return [session.label for session in self.catalog.sessions() if session.pid != own]

    # ---- the end ---------------------------------------------------------------------------------

    def _control(self, op: str) -> dict[str, Any]:
        reply: dict[str, Any] = self.pool._control(op, {}, 30.0)
        return reply

    def audit(self) -> int:
        """How many contradictions the keeper finds."""
        return int(self._control("audit")["wrong"])

    def state(self) -> dict[str, int]:
        """Everything that must be nothing once all clients have gone."""
        gc.collect()
        counters = self._control("stats")["counters"]
        sessions = [s for s in self._control("sessions")["sessions"] if s["label"] != LABEL]
        return {
            "sessions": len(sessions),
            "leases": sum(s["leases"] for s in sessions),
            "granted_bytes": int(counters["granted_bytes"]),
            "limbo_chunks": int(counters["limbo_chunks"]),
        }

    def settle(self) -> dict[str, int]:
        """Wait until nothing of any client is left; return the counters."""
        deadline_s = time.monotonic() + PATIENCE_S / 4
        while any((state := self.state()).values()) and time.monotonic() < deadline_s:
            time.sleep(0.02)  # the keeper looks for ends at its own pace
        if any(state.values()):
            self._violation(f"all clients are gone, and there is left: {state}")
        if wrong := self.audit():
            self._violation(f"the audit found {wrong} contradictions")
        counters: dict[str, int] = self._control("stats")["counters"]
        for name in ("bad_records", "lost"):
            if counters[name]:
                self._violation(f"{name}: {counters[name]}")
        return counters

    def check_all(self, numbers: Iterable[int]) -> int:
        """Look at every byte of every chunk there is; return how many chunks that were."""
        found = 0
        for i in numbers:
            chunk = self.cache.get(key_of(i))
            if chunk is not None:
                check(i, chunk.memory)
                chunk.release()
                found += 1
        return found
