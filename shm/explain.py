# SPDX-License-Identifier: Apache-2.0
"""
What became of a key: read from the catalog and from the event feed, without asking the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from . import manifest as _manifest
from .facts import ChunkFacts, Namespace
from .inspect import Catalog

if TYPE_CHECKING:
    from numpy.typing import NDArray

Verdict = Literal["present", "elsewhere", "evicted", "deleted", "cleared", "unknown"]

KIND_NAMES: Final = {1: "stored", 2: "evicted", 3: "deleted", 4: "cleared"}  # enum cn_event_kind
REASON_NAMES: Final = {  # enum cn_event_reason
    0: "",
    1: "policy",
    2: "quota",
    3: "ttl",
    4: "client",
    5: "loss",
    6: "reclaim",
    7: "admin",
}
HISTORY_MAX: Final = 64
KEY_BYTES: Final = 32
LOOKS_MAX: Final = 3  # a key that is stored and evicted under our eyes is looked at again

_CLEARED: Final = 4


@dataclass(frozen=True)
class Place:
    """
    A chunk under the key.

    Attributes:
        namespace: Where.
        chunk: What.
        parent_key: Key of the chunk it follows, None when it follows none or that one has left.
        differs: In another namespace than the one asked for: the manifest fields in which the two
            differ, {field: (asked for, there)}; None when a manifest cannot be read.
    """

    namespace: Namespace
    chunk: ChunkFacts
    parent_key: bytes | None
    differs: dict[str, tuple[_manifest.Value | None, _manifest.Value | None]] | None = None


@dataclass(frozen=True)
class Happened:
    """One event: of the key, or "cleared", which took everything that nobody held."""

    sequence: int
    time_ns: int
    kind: str
    reason: str
    namespace_slot: int
    nbytes: int


@dataclass(frozen=True)
class Feed:
    """
    How far the event feed reaches.

    Attributes:
        events: How many events were read.
        since_ns: Time of the oldest, 0 without events.
        complete: It begins with the first event of the pool: nothing was overwritten.
        lost: Events overwritten while they were read: a gap somewhere in between.
    """

    events: int
    since_ns: int
    complete: bool
    lost: int


@dataclass(frozen=True)
class Explanation:
    """
    What became of a key.

    Attributes:
        key: The 32 bytes.
        verdict: "present", "elsewhere" (in another namespace than the one asked for), "evicted",
            "deleted", "cleared", or "unknown": no event of the feed names it.
        by: What evicted or deleted it: "policy", "quota", "ttl", "client", "loss", "reclaim",
            "admin"; "" otherwise.
        at_ns: When it left, 0 otherwise.
        here: Where it is, in the namespace asked for or in any when none was.
        elsewhere: Where else it is, when a namespace was asked for.
        history: Its events, oldest first, the newest 64.
        feed: How far back the events reach.
    """

    key: bytes
    verdict: Verdict
    by: str
    at_ns: int
    here: tuple[Place, ...]
    elsewhere: tuple[Place, ...]
    history: tuple[Happened, ...]
    feed: Feed


@dataclass
class _Found:
    here: list[Place] = field(default_factory=list)
    elsewhere: list[Place] = field(default_factory=list)


def explain(catalog: Catalog, key: bytes, asked: Namespace | None = None) -> Explanation:
    """
    Tell what became of *key*, in the namespace *asked* or in any.

    Raises:
        ValueError: The key has not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"the key has {len(key)} bytes: a key has {KEY_BYTES}")
    for _ in range(LOOKS_MAX):
        found = _look(catalog, key, asked)
        history, feed = _events_of(catalog, key, asked)
        verdict, last = _judge(found, history)
        if verdict != "unknown" or last is None:
            break  # not "stored, but not there": that changed under our eyes
    left = last if verdict in {"evicted", "deleted", "cleared"} else None
    return Explanation(
        key=key,
        verdict=verdict,
        by=left.reason if left else "",
        at_ns=left.time_ns if left else 0,
        here=tuple(found.here),
        elsewhere=tuple(found.elsewhere),
        history=tuple(history[-HISTORY_MAX:]),
        feed=feed,
    )


def _look(catalog: Catalog, key: bytes, asked: Namespace | None) -> _Found:
    found = _Found()
    for namespace in catalog.namespaces():
        chunk = catalog.find(namespace.slot, key)
        if chunk is None:
            continue
        parent = _parent_key(catalog, chunk.parent)
        if asked is None or asked.slot == namespace.slot:
            found.here.append(Place(namespace, chunk, parent))
        else:
            differs = _differences(asked, namespace)
            found.elsewhere.append(Place(namespace, chunk, parent, differs))
    return found


def _parent_key(catalog: Catalog, ref: int) -> bytes | None:
    if ref == 0:
        return None
    parent = catalog.chunk(ref & 0xFFFFFFFF)
    return parent.key if parent is not None and parent.ref == ref else None


def _differences(
    asked: Namespace, there: Namespace
) -> dict[str, tuple[_manifest.Value | None, _manifest.Value | None]] | None:
    try:
        return _manifest.diff(asked.packed, there.packed)
    except ValueError:
        return None


def _events_of(
    catalog: Catalog, key: bytes, asked: Namespace | None
) -> tuple[list[Happened], Feed]:
    """Return the key's events and every "cleared", oldest first, and what was read."""
    words = np.frombuffer(key, dtype="<u8")
    found: list[Happened] = []
    events = lost = first = since_ns = 0
    for rows, overwritten in catalog.event_blocks():
        if len(rows) == 0:
            lost += overwritten
            continue
        if events == 0:
            first, since_ns = int(rows[0]["sequence"]), int(rows[0]["time_ns"])
        else:
            lost += overwritten
        events += len(rows)
        found += [_happened(row) for row in rows[_wanted(rows, words, asked)]]
        found = found[-2 * HISTORY_MAX :]
    return found, Feed(events, since_ns, complete=first <= 1 and not lost, lost=lost)


def _wanted(
    rows: NDArray[Any], words: NDArray[np.uint64], asked: Namespace | None
) -> NDArray[np.bool_]:
    kind = rows["what"] & np.uint64(0xFF)
    ours = (rows["key"] == words).all(axis=1) & (kind != _CLEARED)
    if asked is not None:
        ours &= (rows["what"] >> np.uint64(16) & np.uint64(0xFFFF)) == asked.slot
    return np.asarray(ours | (kind == _CLEARED))


def _happened(row: Any) -> Happened:
    what = int(row["what"])
    return Happened(
        sequence=int(row["sequence"]),
        time_ns=int(row["time_ns"]),
        kind=KIND_NAMES.get(what & 0xFF, "?"),
        reason=REASON_NAMES.get(what >> 8 & 0xFF, "?"),
        namespace_slot=what >> 16 & 0xFFFF,
        nbytes=what >> 32,
    )


def _judge(found: _Found, history: list[Happened]) -> tuple[Verdict, Happened | None]:
    """Return the verdict and the event that decided it; None when no event names the key."""
    own = [event for event in history if event.kind != "cleared"]
    last = own[-1] if own else None
    if found.here:
        return "present", last
    if found.elsewhere:
        return "elsewhere", last
    if last is None:
        return "unknown", None
    if last.kind == "evicted":
        return "evicted", last
    if last.kind == "deleted":
        return "deleted", last
    after = [e for e in history if e.kind == "cleared" and e.sequence > last.sequence]
    return ("cleared", after[0]) if after else ("unknown", last)
