# SPDX-License-Identifier: Apache-2.0
"""
Verifying a pool: its tables, looked at until what is wrong with them is certain, then its bytes.

A keeper that runs changes one table before the other. So what a look finds counts only if the next
looks find the same of the same generation, and the keeper was between two changes in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np

from cenote.shm.inspect import Catalog

from . import records
from .crc import Checked, Checker, MappedRegion, Progress
from .kinds import EXAMPLES_MAX, STATE_NAMES, TEXTS, Finding, Suspects
from .report import Report
from .rules import Walk
from .tables import Tables

LOOKS: Final = 3
_OF_DESCRIPTORS: Final = frozenset(TEXTS) - {"slab", "dangling", "entry", "event"}
_WITH_KEY: Final = (2, 3)  # LIVE and DYING

Settle = Callable[[], object]


class Verifier:
    """
    Args:
        catalog: Mapped beside its keeper, or a private copy.
        regions: Those that are mapped, by number.
        settle: Returns when the keeper, running, has finished what it was at, and its counters are
            up to date; None: no keeper runs.
        threads, bytes_per_s: See Checker.
    """

    def __init__(
        self,
        catalog: Catalog,
        regions: Mapping[int, MappedRegion],
        *,
        settle: Settle | None = None,
        threads: int | None = None,
        bytes_per_s: int | None = None,
    ) -> None:
        self.catalog = catalog
        self._settle = settle
        self._checker = Checker(catalog, regions, threads=threads, bytes_per_s=bytes_per_s)
        facts = catalog.superblock
        self.report = Report(facts.pool, facts.pool_id, settle is not None)
        self.walk: Walk | None = None

    # ---- tables ---------------------------------------------------------------------------------

    def tables(self, *, counted: bool = True) -> None:
        """
        Look at all tables, and report what is wrong with them.

        counted: the counters should agree with them; not so where a keeper died before it stored
        them.
        """
        begun_s = time.monotonic()
        looks = LOOKS if self._settle is not None else 1
        found: dict[str, Suspects] = {}
        plain: set[Finding] = set()
        summed = False
        for number in range(looks):
            seen, said, quiet = self._look(counted and not summed)
            summed = summed or quiet
            if number == 0:
                found, plain = seen, said
            else:
                both = {k: v.also_in(found[k]) for k, v in seen.items() if k in found}
                found = {k: v for k, v in both.items() if len(v.rows)}
                plain &= said
            if not found and not plain and (summed or not counted):
                break
        self._report(found, plain)
        if counted and not summed:
            self.report.notes.append(
                "the pool changed all the time: its counters were not compared with its tables"
            )
        self._tell_walk(time.monotonic() - begun_s)

    def _look(self, sum_up: bool) -> tuple[dict[str, Suspects], set[Finding], bool]:
        """Return suspects by kind, other findings, and whether the counters were compared."""
        before = self._counters()
        tables = Tables(self.catalog, whole=self._settle is None)
        self.walk = walk = Walk(tables)
        said = {*records.namespaces(self.catalog, tables), *records.sessions(tables)}
        parts = [*walk.found, records.events(tables)]
        quiet = sum_up and self._sum_up(walk, before)
        by_kind: dict[str, list[Suspects]] = {}
        for part in parts:
            if len(part.rows):
                by_kind.setdefault(part.kind, []).append(part)
        joined = {
            kind: Suspects(kind, np.concatenate([part.rows for part in same]))
            for kind, same in by_kind.items()
        }
        return joined, said, quiet

    def _sum_up(self, walk: Walk, before: Mapping[str, int]) -> bool:
        """Report wrong counters, and return True, if nothing changed since *before*."""
        folded = self._settle is not None
        wrong = list(records.sums(walk, before, folded=folded))
        if not records.quiet_between(before, self._counters()):
            return False
        for finding in wrong:
            self.report.add(finding)
        return True

    def _counters(self) -> dict[str, int]:
        if self._settle is not None:
            self._settle()
        return self.catalog.counters()

    def _report(self, found: Mapping[str, Suspects], plain: set[Finding]) -> None:
        for suspects in found.values():
            for finding in self._described(suspects):
                self.report.add(finding)
            self.report.found[suspects.kind].count = len(suspects.rows)
        for finding in sorted(plain, key=lambda one: (one.kind, one.text)):
            self.report.add(finding)

    def _described(self, suspects: Suspects) -> Iterator[Finding]:
        for subject, word, other, more in suspects.rows[:EXAMPLES_MAX].tolist():
            text = TEXTS[suspects.kind]
            if suspects.kind in _OF_DESCRIPTORS:
                yield self.finding_at(suspects.kind, subject, word, text(word, other, more))
            elif suspects.kind == "slab":
                region, granule = subject >> 32, subject & 0xFFFFFFFF
                said = f"granule {granule}: {text(word, other, more)}"
                yield Finding("slab", said, region=region, data_off=granule * (2 << 20))
            elif suspects.kind == "event":
                head = self.catalog.now().event_head
                yield Finding("event", f"slot {subject}: {text(word, other, head)}")
            else:
                at = f"bucket {subject // 8}, place {subject % 8}"
                yield Finding(suspects.kind, f"{at}: {text(word, other, more)}")

    def finding_at(self, kind: str, descriptor: int, word: int, text: str) -> Finding:
        """Return a finding of a descriptor, with what its record says."""
        assert self.walk is not None
        row = self.walk.tables.rows_at(np.array([descriptor]))[0].tolist()
        has_key = word >> 24 & 0xFF in _WITH_KEY
        return Finding(
            kind,
            text,
            descriptor=descriptor,
            generation=word >> 32,
            key=np.array(row[1:5], dtype=np.uint64).tobytes() if has_key else None,
            namespace_slot=row[7] >> 16 & 0xFFFF if has_key else None,
            region=row[7] & 0xFF,
            data_off=row[5],
        )

    def _tell_walk(self, seconds: float) -> None:
        assert self.walk is not None
        tables, report = self.walk.tables, self.report
        report.states = dict(zip(STATE_NAMES, self.walk.states.tolist(), strict=True))
        report.walked |= {
            "descriptors": tables.count,
            "chunks": self.walk.sums["live_chunks"],
            "entries": int((tables.entries != 0).sum()),
            "slabs": self.walk.slabs.count,
            "namespaces": int((tables.namespace_words != 0).sum()),
            "sessions": tables.registry().count,
            "unverified": self.walk.unverified,
            "tables_s": seconds,
        }

    # ---- bytes ----------------------------------------------------------------------------------

    @property
    def bytes_to_check(self) -> int:
        """How much bytes() will read; tables() came before."""
        assert self.walk is not None
        return int(self.walk.sizes.sum())

    def bytes(self, progress: Progress = lambda _bytes: None) -> Checked:
        """Check every chunk that has a checksum, and report those that are wrong."""
        assert self.walk is not None
        done = self._checker.check(self.walk.refs, self.walk.sizes, self.walk.places, progress)
        for ref in done.wrong[:EXAMPLES_MAX].tolist():
            word = ref >> 32 << 32 | 2 << 24
            text = "its CRC-32C is not the recorded one, or it cannot be read"
            self.report.add(self.finding_at("crc", ref & 0xFFFFFFFF, word, text))
        if len(done.wrong):
            self.report.found["crc"].count = len(done.wrong)
        self.report.walked |= {
            "checked": done.checked,
            "checked_bytes": done.nbytes,
            "unrecorded": self.walk.unrecorded,
            "left": done.left,
            "unread": done.unread,
            "bytes_s": done.seconds,
            "gb_per_s": done.gb_per_s,
        }
        return done
