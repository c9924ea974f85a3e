# SPDX-License-Identifier: Apache-2.0
"""
Verifying what a daemon left: each contradiction is named and nothing else is, and no file and no
word in it can hurt who looks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from tests.unit.verify_bed import (
    DYING,
    GRANTED,
    LIVE,
    Copy,
    key_of,
    kinds,
)

from cenote.client.errors import CenoteError, Corrupt, VersionMismatch
from cenote.shm.verify import KINDS, open_abandoned

ROUNDS: Final = 300


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """A pool as its daemon left it, in files."""
    return Copy.make(tmp_path)


# ---- damage -------------------------------------------------------------------------------------


def live(copy: Copy, n: int = 0) -> int:
    return copy.states()[LIVE][n]


def _state(copy: Copy) -> int:
    d = live(copy)
    copy.put(copy.chunk_at(d), copy.word(copy.chunk_at(d)) & ~(0xFF << 24) | 9 << 24)
    return d


def _generation(copy: Copy) -> int:
    d = live(copy, 5)
    copy.put(copy.chunk_at(d), copy.word(copy.chunk_at(d)) & 0xFFFFFFFF)
    return d


def _flags(copy: Copy) -> int:
    d = live(copy, 1)
    copy.put(copy.chunk_at(d), copy.word(copy.chunk_at(d)) | 1 << 20)
    return d


def _place(copy: Copy) -> int:
    d = live(copy, 2)
    copy.put(copy.chunk_at(d, "data_off"), 1 << 40)
    return d


def _region(copy: Copy) -> int:
    d = live(copy, 2)
    copy.put(copy.chunk_at(d, "place"), copy.word(copy.chunk_at(d, "place")) | 7)
    return d


def _extent(copy: Copy) -> int:
    d = live(copy, 3)
    copy.put(copy.cold_at(d, "extent_pages"), 77, 4)
    return d


def _between(copy: Copy) -> int:
    d = next(d for d in copy.states()[LIVE] if copy.word(copy.chunk_at(d, "data_off")) > 0)
    copy.put(copy.chunk_at(d, "data_off"), copy.facts.regions[0].bytes - (2 << 20))
    return d


def _overlap(copy: Copy) -> int:
    pages = {d: copy.word(copy.cold_at(d, "position")) >> 32 for d in copy.states()[LIVE]}
    first, second = [d for d in pages if pages[d] == 1][:2]
    copy.put(copy.chunk_at(second, "data_off"), copy.word(copy.chunk_at(first, "data_off")))
    return second


def _length(copy: Copy) -> int:
    d = live(copy, 1)
    copy.put(copy.chunk_at(d, "size_crc"), 300_000, 4)
    return d


def _metadata(copy: Copy) -> int:
    d = live(copy, 1)
    copy.put(copy.cold_at(d, "meta_bytes"), 9, 2)
    return d


def _no_data(copy: Copy) -> int:
    d = live(copy, 1)
    copy.put(copy.chunk_at(d, "size_crc"), 0, 4)
    return d


def _owner(copy: Copy) -> int:
    d = copy.states()[GRANTED][0]
    copy.put(copy.chunk_at(d, "place") + 4, 1000, 4)
    return d


def _parent(copy: Copy) -> int:
    d = live(copy, 4)
    copy.put(copy.cold_at(d, "parent"), copy.word(copy.chunk_at(d)) >> 32 << 32 | d)
    return d


def _sequence(copy: Copy) -> int:
    d = live(copy, 4)
    copy.put(copy.cold_at(d, "sequence"), 1 << 50)
    return d


def _pin(copy: Copy) -> int:
    d = live(copy, 4)
    copy.put(copy.cold_at(d, "pinned_ns"), 123)
    return d


def _unlinked(copy: Copy) -> int:
    d = live(copy, 6)
    copy.put(copy.entry_of(d), 0)
    return d


def _twin(copy: Copy) -> int:
    """As a keeper leaves it that dies in the middle of a move."""
    first, _, _, second = copy.states()[LIVE][:4]
    copy.put(copy.entry_of(second), 0)
    for word in range(4):
        at = 8 * word
        copy.put(copy.chunk_at(second, "key") + at, copy.word(copy.chunk_at(first, "key") + at))
    return second


def _dangling(copy: Copy) -> None:
    """As a keeper leaves it that dies in the middle of an eviction."""
    d = live(copy, 6)
    copy.put(copy.chunk_at(d), copy.word(copy.chunk_at(d)) & ~(0xFF << 24) | DYING << 24)


def _entry_nowhere(copy: Copy) -> None:
    copy.put(copy.facts.offsets["index"] + 8 * 7, 5 << 32 | 4_000_000)


def _entry_of_free(copy: Copy) -> None:
    copy.put(copy.facts.offsets["index"] + 8 * 7, 5 << 32 | 500)


def _entry_double(copy: Copy) -> None:
    at = copy.entry_of(live(copy))
    bucket = at - (at - copy.facts.offsets["index"]) % 64
    free = next(place for place in range(bucket, bucket + 64, 8) if copy.word(place) == 0)
    copy.put(free, copy.word(at))


def _slab_word(copy: Copy) -> None:
    copy.put(copy.slab_at(copy.facts.regions[0].bytes // (2 << 20) - 1), 3 << 32 | 1 << 8 | 2)


def _slab_overlap(copy: Copy) -> None:
    first, second = copy.heads()[:2]
    word = copy.word(copy.slab_at(first))
    run = second - first + 1
    copy.put(copy.slab_at(first), word & ~(0xFFFFFF << 8) | run << 8)


def _manifest(copy: Copy) -> None:
    copy.put(copy.namespace_at(1, "manifest") + 8, 0xFFFF)


def _namespace_word(copy: Copy) -> None:
    copy.put(copy.namespace_at(9, "word"), 7)


def _session(copy: Copy) -> None:
    copy.put(copy.session_at(900, "word"), 0x0101 | 0xF0)


def _leases(copy: Copy) -> None:
    copy.put(copy.session_at(0, "leases"), 1 << 33)


def _event(copy: Copy) -> None:
    copy.put(copy.facts.offsets["events"] + 64 * 3, 1 << 60)


def _event_kind(copy: Copy) -> None:
    what = int(np.dtype("u8").itemsize) * 6
    copy.put(copy.facts.offsets["events"] + 64 * 3 + what, 0xEE, 1)


DAMAGE: Final[list[tuple[str, Callable[[Copy], int | None], set[str]]]] = [
    ("state", _state, {"state", "entry"}),
    ("state", _generation, {"state", "entry"}),
    ("flags", _flags, {"flags"}),
    ("place", _place, {"place"}),
    ("place", _region, {"place"}),
    ("extent", _extent, {"extent"}),
    ("extent", _between, {"extent"}),
    ("overlap", _overlap, {"overlap"}),
    ("length", _length, {"length"}),
    ("metadata", _metadata, {"metadata"}),
    ("metadata", _no_data, {"metadata"}),
    ("owner", _owner, {"owner"}),
    ("parent", _parent, {"parent"}),
    ("sequence", _sequence, {"sequence"}),
    ("pin", _pin, {"pin"}),
    ("unlinked", _unlinked, {"unlinked"}),
    ("twin", _twin, {"twin"}),
    ("dangling", _dangling, {"dangling"}),
    ("entry", _entry_nowhere, {"entry"}),
    ("entry", _entry_of_free, {"entry"}),
    ("entry", _entry_double, {"entry"}),
    ("slab", _slab_word, {"slab"}),
    ("slab", _slab_overlap, {"slab", "extent"}),
    ("manifest", _manifest, {"manifest"}),
    ("manifest", _namespace_word, {"manifest"}),
    ("session", _session, {"session"}),
    ("session", _leases, {"session"}),
    ("event", _event, {"event"}),
    ("event", _event_kind, {"event"}),
]


@pytest.mark.parametrize(
    ("kind", "plant", "found"), DAMAGE, ids=lambda v: getattr(v, "__name__", None)
)
def test_each_contradiction_is_named(
    copy: Copy, kind: str, plant: Callable[[Copy], int | None], found: set[str]
) -> None:
    """
    One word is changed: that is found, with the descriptor it is about, and nothing else.
    """
    about = plant(copy)

    report = copy.verified()

    assert set(kinds(report)) == found
    first = report.found[kind].examples[0]
    assert about is None or about == first.descriptor
    assert first.text
    assert (report.wrong == 0) == KINDS[kind].healed
    assert report.left["takes_over"] == (not any(KINDS[name].blocks for name in found))


def test_a_chunk_of_no_namespace_is_named(copy: Copy) -> None:
    """
    With its key, and not as a chunk that lookups miss: it has its entry in the index still.
    """
    copy.put(copy.namespace_at(1, "word"), 0)

    report = copy.verified()

    assert kinds(report) == {"namespace": 60}
    assert len(report.found["namespace"].examples) == 10
    assert {finding.namespace_slot for finding in report.found["namespace"].examples} == {1}
    assert report.found["namespace"].examples[0].key == key_of(0)


@pytest.mark.parametrize("name", ["live_chunks", "live_bytes", "granted_bytes", "namespaces"])
def test_wrong_sums_are_named(copy: Copy, name: str) -> None:
    """
    The counter, what it says, and what it should.
    """
    at = copy.counter_at(name)
    right = copy.word(at)
    copy.put(at, right + 4096)

    report = copy.verified(counted=True)

    assert kinds(report) == {"counter": 1}
    text = report.found["counter"].examples[0].text
    assert text == f"{name} is {right + 4096}, and it should be {right}"
    assert kinds(copy.verified(counted=False)) == {}


# ---- hostile files ------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 100, 4095, 4096, 100_000, -1, -4096])
def test_a_truncated_catalog_is_refused(copy: Copy, nbytes: int) -> None:
    """
    Whatever is missing, the error says that it is damaged or truncated, and how long it is.
    """
    size = nbytes if nbytes >= 0 else copy.catalog.stat().st_size + nbytes
    os.truncate(copy.catalog, size)

    with pytest.raises(Corrupt, match=f"{size} bytes.* damaged or truncated"):
        copy.opened()


@pytest.mark.parametrize("what", ["text", "zeros", "folder", "fifo", "device", "huge hole"])
def test_what_is_no_catalog_is_refused(tmp_path: Path, what: str) -> None:
    """
    No file is too strange.
    """
    path = tmp_path / "it"
    if what == "text":
        path.write_text("no catalog\n" * 10_000)
    elif what == "zeros":
        path.write_bytes(bytes(1 << 20))
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "huge hole":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path = Path("/dev/zero")

    with pytest.raises(Corrupt, match="is no"):
        open_abandoned(path)


def test_another_release_is_named(copy: Copy) -> None:
    """
    Its layout is said, and what to do.
    """
    copy.put(copy.super_at("layout_version"), 99, 4)

    with pytest.raises(VersionMismatch, match="layout 99"):
        copy.opened()


def test_looking_changes_nothing(copy: Copy) -> None:
    """
    Neither a byte nor a hole of catalog and region is another one afterwards.
    """
    before = [(p.read_bytes(), p.stat().st_blocks) for p in (copy.catalog, copy.region)]

    copy.verified(counted=True, crc=True)

    assert [(p.read_bytes(), p.stat().st_blocks) for p in (copy.catalog, copy.region)] == before


def test_a_daemon_that_begins_meanwhile_is_noticed(copy: Copy) -> None:
    """
    What was read is of no worth then.
    """
    left = copy.opened()
    assert not left.changed()

    copy.put(copy.super_at("boot_token"), 4711)

    assert left.changed()


def _spoil(copy: Copy, rng: random.Random) -> list[tuple[int, bytes]]:
    """Overwrite a few words of the catalog; return what was there."""
    size = copy.catalog.stat().st_size
    areas = [*copy.facts.offsets.values(), 2048]
    kept = []
    with copy.catalog.open("r+b") as file:
        for _ in range(rng.choice((1, 3, 30, 300))):
            at = rng.choice(areas) + rng.randrange(0, 1 << rng.randrange(4, 17), 8)
            if not 2048 <= at <= size - 8:  # the immutable part has a checksum of its own
                continue
            old = os.pread(file.fileno(), 8, at)
            word = int.from_bytes(old, "little")
            new = rng.choice((
                rng.getrandbits(64), word ^ 1 << rng.randrange(64), 2**64 - 1, 0, word + 1,
                rng.getrandbits(12),
            ))  # fmt: skip
            kept.append((at, old))
            os.pwrite(file.fileno(), (new % 2**64).to_bytes(8, "little"), at)
    return kept


def test_no_corruption_is_more_than_a_finding(copy: Copy) -> None:
    """
    Seeded: some hundred catalogs with up to some hundred wrong words. Always a report, whose texts
    can all be made; never an exception.
    """
    rng = random.Random(20)
    found: set[str] = set()
    for number in range(ROUNDS):
        kept = _spoil(copy, rng)
        report = copy.verified(counted=number % 2 == 0, crc=number % 4 == 0)
        assert all(f.text for one in report.found.values() for f in one.examples)
        assert all(one.count >= len(one.examples) for one in report.found.values())
        found |= set(report.found)
        with copy.catalog.open("r+b") as file:
            for at, old in reversed(kept):
                os.pwrite(file.fileno(), old, at)

    assert kinds(copy.verified(counted=True, crc=True)) == {}
    assert len(found) > 15, f"too tame: {sorted(found)}"


def test_a_spoiled_superblock_is_refused(copy: Copy) -> None:
    """
    Seeded: any bit of its immutable part. An error of ours, never another exception.
    """
    rng = random.Random(21)
    for _ in range(ROUNDS):
        at, bit = rng.randrange(2044), rng.randrange(8)
        with copy.catalog.open("r+b") as file:
            old = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([old[0] ^ 1 << bit]), at)
            with pytest.raises(CenoteError):
                copy.opened()
            os.pwrite(file.fileno(), old, at)
