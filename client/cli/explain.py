# SPDX-License-Identifier: Apache-2.0
"""
Tell what became of a key: present (where), in another namespace (and in which fields of the
manifest the two differ), evicted or deleted (when and by what), cleared, or unknown.

It reads the catalog and the event feed. The feed is a ring: the answer says how far back it goes.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import re
import time
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from cenote.shm import units
from cenote.shm.explain import Explanation, Feed, Happened, Place, explain
from cenote.shm.facts import ChunkFacts, printable
from cenote.shm.inspect import Catalog

from . import common
from .common import number, size

KEY_BYTES: Final = 32
PREFIX_CHARS_MIN: Final = 8
CANDIDATES_SHOWN: Final = 8
HISTORY_SHOWN: Final = 8
_HEX: Final = re.compile(r"[0-9a-f]+", re.ASCII)
_NS_A_S: Final = 1_000_000_000

_WHY: Final = {
    "policy": "the pool was full, and the policy chose it",
    "quota": "its namespace was at its quota",
    "ttl": "its time-to-live ended",
    "client": "a client asked for it",
    "loss": "its checksum was wrong, or the medium failed",
    "reclaim": "its memory went to chunks of another size",
    "admin": "an administrator cleared the pool",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "key",
        metavar="KEY",
        help=f"32 bytes as 64 hexadecimal digits or as base64, or the first digits (at least "
        f"{PREFIX_CHARS_MIN}) of a key that the pool or its feed knows",
    )
    parser.add_argument("--namespace", metavar="NAME|SLOT", help="look there; default everywhere")


def run(args: argparse.Namespace) -> int:
    """Do it and return the exit status."""
    key, prefix = parse_key(args.key)
    with common.open_pool(args) as pool:
        catalog = common.catalog_of(pool)
        asked = None if args.namespace is None else common.find_namespace(catalog, args.namespace)
        whole = key if key is not None else the_one(catalog, prefix)
        found = explain(catalog, whole, asked)
        labels = {n.slot: n.label for n in catalog.namespaces()}
    if args.json:
        common.write_json(to_json(found, labels))
    else:
        common.console().print("\n".join(lines(found, catalog, labels)), soft_wrap=True)
    return common.EXIT_DONE


# ---- which key ----------------------------------------------------------------------------------


def parse_key(text: str) -> tuple[bytes | None, bytes]:
    """
    Return (the key, b"") or (None, the first bytes of a key).

    Raises:
        Failure: The text is neither.
    """
    digits = text.strip().lower().removeprefix("0x").rstrip("….")
    if _HEX.fullmatch(digits):
        if len(digits) == 2 * KEY_BYTES:
            return bytes.fromhex(digits), b""
        if PREFIX_CHARS_MIN <= len(digits) < 43 and len(digits) % 2 == 0:
            return None, bytes.fromhex(digits)
    raw = _from_base64(text.strip())
    if raw is not None:
        return raw, b""
    raise common.Failure(
        f"{printable(text[:80])!r} is no key: give 32 bytes as 64 hexadecimal digits or as base64 "
        f"(44 characters), or an even number of first digits, {PREFIX_CHARS_MIN} at least",
        common.EXIT_USAGE,
    )


def _from_base64(text: str) -> bytes | None:
    plain = text.translate(str.maketrans("-_", "+/")).rstrip("=")
    if len(plain) != 43:
        return None
    try:
        return base64.b64decode(plain + "=", validate=True)
    except (binascii.Error, ValueError):
        return None


def the_one(catalog: Catalog, prefix: bytes) -> bytes:
    """Return the only key that begins with *prefix*, among the chunks and in the feed."""
    found = _beginning_with(catalog.chunks().chunks, prefix)
    for rows, _ in catalog.event_blocks():
        found |= _beginning_with(rows, prefix)
    if len(found) == 1:
        return next(iter(found))
    shown = prefix.hex()
    if not found:
        raise common.Failure(
            f"no chunk of pool {catalog.superblock.pool!r} and no event of its feed has a key that "
            f"begins with {shown}: give the whole key",
            common.EXIT_USAGE,
        )
    some = "\n  ".join(key.hex() for key in sorted(found)[:CANDIDATES_SHOWN])
    raise common.Failure(
        f"{number(len(found))} keys begin with {shown}: give more digits\n  {some}",
        common.EXIT_USAGE,
    )


def _beginning_with(rows: Any, prefix: bytes) -> set[bytes]:
    if not len(rows):
        return set()
    keys = np.ascontiguousarray(rows["key"]).view(np.uint8).reshape(-1, KEY_BYTES)
    wanted = np.frombuffer(prefix, dtype=np.uint8)
    return {row.tobytes() for row in keys[(keys[:, : len(prefix)] == wanted).all(axis=1)]}


# ---- telling ------------------------------------------------------------------------------------


def to_json(found: Explanation, labels: dict[int, str]) -> dict[str, Any]:
    """Return the explanation for programs."""
    return {
        "key": found.key.hex(),
        "verdict": found.verdict,
        "by": found.by or None,
        "at_ns": found.at_ns or None,
        "here": [_place(place) for place in found.here],
        "elsewhere": [_place(place) for place in found.elsewhere],
        "history": [
            {**asdict(event), "namespace": labels.get(event.namespace_slot)}
            for event in found.history
        ],
        "feed": asdict(found.feed),
    }


def _place(place: Place) -> dict[str, Any]:
    differs = place.differs
    return {
        **common.chunk_fields(place.chunk, place.namespace.label),
        "parent": place.parent_key.hex() if place.parent_key else None,
        "differs": None
        if differs is None
        else {name: list(pair) for name, pair in differs.items()},
    }


def lines(found: Explanation, catalog: Catalog, labels: dict[int, str]) -> list[str]:
    """Return the explanation for a person."""
    now_ns = time.time_ns()
    said = [f"key       {found.key.hex()}", f"verdict   {verdict(found, now_ns)}"]
    for place in (*found.here, *found.elsewhere):
        said += ["", *_place_lines(place, catalog, now_ns)]
    if found.history:
        said.append("")
        said += [_event_line(event, labels, now_ns) for event in found.history[-HISTORY_SHOWN:]]
    return [*said, "", f"feed      {feed_text(found.feed, now_ns)}"]


def verdict(found: Explanation, now_ns: int) -> str:
    """Return the answer in one sentence."""
    if found.verdict == "present":
        where = " and ".join(_where(place) for place in found.here)
        return f"present in {where}"
    if found.verdict == "elsewhere":
        where = " and ".join(_where(place) for place in found.elsewhere)
        return f"not in the namespace asked for, but in {where}"
    if found.verdict == "unknown":
        return _unknown(found)
    when = f"{common.since(found.at_ns, now_ns)} ago, {common.moment(found.at_ns)}"
    if found.verdict == "cleared":
        return f"cleared {when}: {_WHY['admin']}"
    why = _WHY.get(found.by, f"reason {found.by}")
    word = "expired" if found.by == "ttl" else found.verdict
    return f"{word} {when}: {why}"


def _where(place: Place) -> str:
    return f"namespace {place.namespace.label} (slot {place.namespace.slot})"


def _unknown(found: Explanation) -> str:
    events = number(found.feed.events)
    own = [event for event in found.history if event.kind != "cleared"]
    if own:
        return "unknown: it was stored and is not there, and no event says why; look again"
    if found.feed.complete:
        return f"unknown: never stored in this pool, whose {events} events are all there"
    return f"unknown: none of the last {events} events names it"


def feed_text(feed: Feed, now_ns: int) -> str:
    """Return how far back the feed reaches."""
    if feed.events == 0:
        return "no events"
    text = f"{number(feed.events)} events, {common.since(feed.since_ns, now_ns)} back"
    text += ", from the first of the pool on" if feed.complete else "; older ones were overwritten"
    if feed.lost:
        text += f"; a gap of {number(feed.lost)} that were overwritten while they were read"
    return text


def _place_lines(place: Place, catalog: Catalog, now_ns: int) -> list[str]:
    chunk, namespace = place.chunk, place.namespace
    rows = [
        ("namespace", f"{namespace.label}  slot {namespace.slot}  id {namespace.id.hex()}"),
        ("size", f"{number(chunk.nbytes)} bytes in an extent of {size(chunk.extent_bytes)}"),
        ("where", _memory(chunk, catalog)),
        ("stored", _stored(chunk, now_ns)),
        ("used", _used(chunk, now_ns)),
        ("chain", _chain(place)),
        ("pinned", common.until(chunk.pinned_ns) if chunk.pinned else "no"),
        ("expires", _expires(chunk, now_ns)),
        ("checksum", "none yet" if chunk.crc32c is None else f"crc32c {chunk.crc32c:08x}"),
        ("flags", ", ".join(f for f in chunk.flags if f in {"unverified", "copy"})),
        ("leases", "known to the holders' own tables only; see `cenote status`"),
        ("differs", _differs(place)),
    ]
    return [f"{name:<10}{value}" for name, value in rows if value]


def _memory(chunk: ChunkFacts, catalog: Catalog) -> str:
    region = catalog.superblock.regions[chunk.region]
    return (
        f"region {chunk.region} ({region.medium}) at {chunk.data_off:#x}, descriptor "
        f"{chunk.descriptor} generation {chunk.generation}"
    )


def _stored(chunk: ChunkFacts, now_ns: int) -> str:
    ago, when = common.since(chunk.committed_ns, now_ns), common.moment(chunk.committed_ns)
    return f"{ago} ago, {when}, commit {number(chunk.sequence)}"


def _used(chunk: ChunkFacts, now_ns: int) -> str:
    if not chunk.last_use_s:
        return ""  # the policy saves it for a successor only
    ago = common.since(chunk.last_use_s * _NS_A_S, now_ns)
    return f"{ago} ago, {chunk.uses} uses, as the policy saved it last"


def _chain(place: Place) -> str:
    chunk = place.chunk
    at = "unknown" if chunk.position is None else str(chunk.position)
    if place.parent_key is not None:
        return f"position {at}, follows {place.parent_key.hex()}"
    follows = "its parent has left" if chunk.parent else "no parent"
    return f"position {at}, {follows}, priority {chunk.priority}"


def _expires(chunk: ChunkFacts, now_ns: int) -> str:
    if not chunk.expires_ns:
        return "never"
    left_s = max(chunk.expires_ns - now_ns, 0) / _NS_A_S
    return f"in {units.format_duration(left_s)}, {common.moment(chunk.expires_ns)}"


def _differs(place: Place) -> str:
    if not place.differs:
        return ""
    fields = (
        f"{name}: {asked!r} was asked for, {there!r} there"
        for name, (asked, there) in place.differs.items()
    )
    return printable("; ".join(fields))


def _event_line(event: Happened, labels: dict[int, str], now_ns: int) -> str:
    why = f" by {event.reason}" if event.reason else ""
    where = labels.get(event.namespace_slot, "?") if event.namespace_slot else "the pool"
    bytes_ = f", {size(event.nbytes)}" if event.nbytes else ""
    ago = common.since(event.time_ns, now_ns)
    return (
        f"event     {common.moment(event.time_ns)} ({ago} ago) {event.kind}{why} in {where}{bytes_}"
    )
