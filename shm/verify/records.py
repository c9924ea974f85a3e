# SPDX-License-Identifier: Apache-2.0
"""The small tables of a catalog, and what the large ones must add up to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from cenote._native import _core
from cenote.shm.facts import Namespace
from cenote.shm.inspect import Catalog
from cenote.shm.manifest import namespace_id

from .kinds import Finding, Suspects, suspects
from .rules import Walk
from .tables import Tables

_ROLE_MAX: Final = _core.lib.CN_ROLE_ADMIN
_OPENING: Final = _core.lib.CN_SESSION_OPENING
_EVENT_KINDS: Final = _core.lib.CN_EVENT_CLEARED
# What changes while nothing does: counted by readers, or by the keeper's own sleeping.
_RESTLESS: Final = frozenset({"hits", "misses", "hit_bytes", "access_lost", "wakeups", "verified"})


def quiet_between(before: Mapping[str, int], after: Mapping[str, int]) -> bool:
    """Did nothing happen in the pool between two looks at its counters?"""
    return all(before[name] == after[name] for name in before if name not in _RESTLESS)


# ---- namespaces ---------------------------------------------------------------------------------


def namespaces(catalog: Catalog, tables: Tables) -> Iterator[Finding]:
    """Yield what is wrong with the records of namespaces."""
    seen: dict[bytes, int] = {}
    used = np.flatnonzero(tables.namespace_words)
    for slot in used.tolist():
        found = catalog.namespace(slot)
        if found is None:
            if tables.namespace_words[slot] != 1 or slot == 0:
                yield _of_slot(slot, f"its word is {int(tables.namespace_words[slot]):#x}")
            continue
        problem = _problem(found)
        if problem:
            yield _of_slot(slot, problem)
        if found.id in seen:
            yield _of_slot(slot, f"slot {seen[found.id]} has the same id")
        seen.setdefault(found.id, slot)
    first_free = int(np.argmin(tables.namespace_words[1:] != 0)) + 1
    for slot in used[used > first_free].tolist():
        yield _of_slot(slot, f"slot {first_free} before it is free, and they are used in order")


def _problem(namespace: Namespace) -> str:
    if namespace.manifest is None:
        return "its manifest is none"
    # The salt of a tenant is a secret of the daemon: only without one can the id be made again.
    if not namespace.tenant and namespace_id(namespace.packed, b"") != namespace.id:
        return "its id is not that of its manifest"
    return ""


def _of_slot(slot: int, text: str) -> Finding:
    return Finding("manifest", f"namespace slot {slot}: {text}", namespace_slot=slot)


# ---- sessions -----------------------------------------------------------------------------------


def sessions(tables: Tables) -> Iterator[Finding]:
    """Yield what is wrong with the records of sessions."""
    lease_slots = tables.catalog.superblock.lease_slots
    registry = tables.registry()
    nonces: set[int] = set()
    for index in np.flatnonzero(registry.states).tolist():
        state, role = int(registry.states[index]), int(registry.roles[index])
        nonce, leases = int(registry.nonces[index]), int(registry.leases[index])
        if state > _OPENING or not 0 < role <= _ROLE_MAX:
            yield Finding("session", f"session {index}: state {state}, role {role}")
        elif leases > lease_slots:
            yield Finding("session", f"session {index}: {leases} leases in {lease_slots} slots")
        elif nonce in nonces:
            yield Finding("session", f"session {index}: nonce {nonce} is another's, too")
        nonces.add(nonce)


# ---- events -------------------------------------------------------------------------------------


def events(tables: Tables) -> Suspects:
    """Return the events that are in another's place, of no kind, or yet to come."""
    rows = tables.events()
    head = tables.catalog.now().event_head
    count = np.uint64(len(rows))
    sequence, what = rows["sequence"], rows["what"]
    kind = what & np.uint64(0xFF)
    wrong = sequence % count != np.arange(len(rows), dtype=np.uint64)
    wrong |= (kind == 0) | (kind > _EVENT_KINDS)
    wrong |= sequence > np.uint64(head)  # its keeper may have died before it moved the head
    wrong &= sequence != 0
    at = np.flatnonzero(wrong)
    # the head goes on meanwhile: it is no part of what another look must find again
    return suspects("event", at, sequence[at], what[at])


# ---- sums ---------------------------------------------------------------------------------------


def sums(walk: Walk, counters: Mapping[str, int], *, folded: bool) -> Iterator[Finding]:
    """
    Yield the counters that are not what the tables add up to. Nothing may have changed meanwhile.

    folded: the daemon brought those of the allocator up to date just now.
    """
    tables = walk.tables
    expected = dict(walk.sums)
    expected["namespaces"] = int((tables.namespace_words != 0).sum())
    expected["sessions"] = tables.registry().count
    if folded:
        regions = sum(region.bytes for region in tables.catalog.superblock.regions)
        expected["extent_bytes"] = walk.extent_bytes
        expected["waste_bytes"] = walk.slabs.waste_bytes
        expected["free_bytes"] = regions - walk.extent_bytes - walk.slabs.waste_bytes
    for name, value in expected.items():
        if counters[name] != value:
            yield Finding("counter", f"{name} is {counters[name]}, and it should be {value}")
    for slot in np.flatnonzero(walk.per_namespace[:, 0] | tables.namespace_words).tolist():
        namespace = tables.catalog.namespace(slot)
        if namespace is None:
            continue
        chunks, bytes_ = (int(number) for number in walk.per_namespace[slot])
        if (namespace.live_chunks, namespace.live_bytes) != (chunks, bytes_):
            yield Finding(
                "counter",
                f"namespace slot {slot} has {namespace.live_chunks} chunks of "
                f"{namespace.live_bytes} bytes, and it should be {chunks} of {bytes_}",
                namespace_slot=slot,
            )
