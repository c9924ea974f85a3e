# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a pool: its kinds, and the words for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.uint64]  # (n, 4): what is suspected, its word, and two numbers that are wrong
EXAMPLES_MAX: Final = 10  # of a kind; the rest is counted


@dataclass(frozen=True)
class Kind:
    """
    One kind of finding.

    Attributes:
        name: For programs.
        what: For people, in the plural.
        healed: A daemon that dies leaves it, and the next one puts it right.
        blocks: No daemon takes over a pool that has it.
    """

    name: str
    what: str
    healed: bool = False
    blocks: bool = False


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. What it has nothing to do with is None."""

    kind: str
    text: str
    descriptor: int | None = None
    generation: int | None = None
    key: bytes | None = None
    namespace_slot: int | None = None
    region: int | None = None
    data_off: int | None = None


@dataclass(frozen=True)
class Suspects:
    """Rows of one kind that one look at the pool found."""

    kind: str
    rows: Rows

    def also_in(self, earlier: Suspects) -> Suspects:
        """Return those that another look found just so: same generation, same contradiction."""
        wide = np.dtype([(f"f{i}", np.uint64) for i in range(4)])
        mine = np.ascontiguousarray(self.rows).view(wide).ravel()
        theirs = np.ascontiguousarray(earlier.rows).view(wide).ravel()
        return Suspects(self.kind, self.rows[np.isin(mine, theirs)])


def suspects(kind: str, subject: Any, word: Any, other: Any = 0, more: Any = 0) -> Suspects:
    """Return rows from columns, or from numbers that hold for all of them."""
    count = len(subject)
    rows = np.zeros((count, 4), dtype=np.uint64)
    for i, column in enumerate((subject, word, other, more)):
        rows[:, i] = column
    return Suspects(kind, rows)


_ALL: Final = (
    Kind("region", "regions that are not what the catalog says", blocks=True),
    Kind("state", "descriptors in no known state", blocks=True),
    Kind("flags", "descriptors with flags that do not exist"),
    Kind("place", "descriptors that point outside their region", blocks=True),
    Kind("extent", "descriptors that the slab table has no extent for", blocks=True),
    Kind("overlap", "extents that two descriptors name", blocks=True),
    Kind("length", "chunks longer than their extent", blocks=True),
    Kind("metadata", "chunks without data, or whose metadata does not fit"),
    Kind("namespace", "chunks of a namespace that does not exist", blocks=True),
    Kind("owner", "extents granted to no session", healed=True),
    Kind("parent", "chunks that follow themselves, or what cannot be"),
    Kind("sequence", "chunks with a commit that has not been yet"),
    Kind("pin", "half pins: a flag without an end, or an end without a flag", healed=True),
    Kind("unlinked", "chunks that no lookup finds", healed=True),
    Kind("twin", "second copies of one chunk", healed=True),
    Kind("dangling", "index entries of chunks that are leaving", healed=True),
    Kind("entry", "index entries that lead to no chunk"),
    Kind("slab", "slabs that no keeper makes, or that overlap", blocks=True),
    Kind("manifest", "namespaces whose record makes no sense"),
    Kind("session", "sessions whose record makes no sense"),
    Kind("event", "events that cannot have happened"),
    Kind("counter", "sums that are not what the tables add up to"),
    Kind("audit", "contradictions that the daemon's own audit counted"),
    Kind("crc", "chunks whose bytes are not what was committed"),
)
KINDS: Final = {kind.name: kind for kind in _ALL}

_STATES: Final = {0: "free", 1: "granted", 2: "live", 3: "dying", 4: "poisoned"}
STATE_NAMES: Final = tuple(_STATES.values())


def state_text(word: int) -> str:
    """Return generation and state of a descriptor's word, in words."""
    number = word >> 24 & 0xFF
    return f"generation {word >> 32}, {_STATES.get(number, f'state {number}')}"


def _entry(word: int, other: int) -> str:
    named = f"entry {word:#018x} names descriptor {word & 0xFFFFFFFF}"
    if other == NO_DESCRIPTOR:
        return f"{named}, and there is none of that number"
    if other == DOUBLE:
        return f"{named}, and so does another entry"
    return f"{named} ({state_text(other)}), and no lookup of its key comes here"


NO_DESCRIPTOR: Final = 2**64 - 1
DOUBLE: Final = 2**64 - 2

# (word, other, more) -> what is wrong with it, in words
TEXTS: Final[dict[str, Callable[[int, int, int], str]]] = {
    "state": lambda word, _o, _m: f"word {word:#018x}: {state_text(word)}",
    "flags": lambda word, _o, _m: f"flags {word & 0xFFFFFF:#08x}, {state_text(word)}",
    "place": lambda _w, place, off: f"place {place:#018x}, offset {off:#x}",
    "extent": lambda _w, pages, off: f"no slab has an extent of {pages * 4096} bytes at {off:#x}",
    "overlap": lambda word, d, other: (
        f"{state_text(word)}; descriptor {d} names the same extent ({state_text(other)})"
    ),
    "length": lambda _w, data, extent: f"{data} bytes in an extent of {extent}",
    "metadata": lambda _w, data, meta: f"{data} bytes of data, {meta} of metadata",
    "namespace": lambda _w, slot, _m: f"namespace slot {slot}",
    "owner": lambda _w, owner, _m: f"session {owner} is not open",
    "parent": lambda _w, ref, _m: f"its parent is {ref:#018x}",
    "sequence": lambda _w, its, last: f"commit {its}, and the last one was {last}",
    "pin": lambda word, until, _m: f"flag {word & 1}, pinned until {until} ns",
    "unlinked": lambda word, _o, _m: f"{state_text(word)}, and the index does not have it",
    "twin": lambda _w, d, _m: f"the index has descriptor {d} for the same key",
    "dangling": lambda word, other, _m: _entry(word, other),
    "entry": lambda word, other, _m: _entry(word, other),
    "slab": lambda word, at, _m: (
        f"word {word:#018x}: {word >> 32} pages an extent, {word >> 8 & 0xFFFFFF} granules"
        + (f"; the slab before it ends at granule {at}" if at else "")
    ),
    "event": lambda word, kind, head: f"sequence {word}, kind {kind & 0xFF}; the next is {head}",
}
