# SPDX-License-Identifier: Apache-2.0
"""
Write the seeds of the fuzz targets: ``python tests/fuzz/make_corpus.py``.

What a fuzzer rarely finds by itself, and what each seed is for. The formats of the inputs stand in
the targets; the files are committed, and this says what they mean.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

CORPUS: Final = Path(__file__).resolve().parent / "corpus"

# ---- fuzz_session_segment ------------------------------------------------------------------------

TO_RECORD: Final = 0x80000000
OWN: Final = 15  # grant, size, key and parent are this session's or the pool's
NO_PARENT: Final = 7
COMMIT, ABORT, WANT, PIN, UNPIN, DELETE, CRC, LOST, NOP = range(1, 10)


def patch(where: int, value: int) -> bytes:
    """Return one patch of 12 bytes."""
    return struct.pack("<IQ", where, value & (1 << 64) - 1)


def record(i: int, op: int, dice: int = NO_PARENT, **fields: int) -> list[bytes]:
    """Return the patches that make the *i*-th of the next records this one."""
    get = fields.get
    words = {
        0: op | get("flags", 0) << 8 | get("ns", 1) << 32 | get("meta", 0) << 48,
        1: get("grant", 0),
        2: get("key", 0),
        6: get("parent", 0),
        10: get("data_bytes", 4095) | get("crc", 0) << 32,
        11: get("position", 0xFFFFFFFF) | get("ttl", 0) << 32,
        12: get("cookie", 0),
        13: get("arg", 0),
        14: dice,
    }
    return [patch(TO_RECORD | i << 8 | word, value) for word, value in words.items()]


def session(*records: list[bytes], more: tuple[bytes, ...] = ()) -> bytes:
    """Return an input whose number of patches lets all four records be read, in this namespace."""
    patches = [one for many in records for one in many] + list(more)
    while len(patches) % 2 or len(patches) % 3 == 0:
        patches.append(patch(TO_RECORD | 3 << 8 | 15, 0))
    return b"".join(patches)


def want(i: int, pages: int = 1) -> list[bytes]:
    """Return a WANT for an extent of *pages*."""
    return record(i, WANT, arg=pages - 1)


def put(i: int, key: int, **fields: int) -> list[bytes]:
    """Return a COMMIT of a grant that the session has."""
    return record(i, COMMIT, key=key, **fields)


SESSION: Final = {
    "put": session(want(0), put(1, 3), want(2, 2), put(3, 4, data_bytes=8000)),
    "put-twice": session(want(0), put(1, 5), want(2), put(3, 5)),
    "chain": session(want(0), put(1, 6), want(2), put(3, 7, dice=OWN, parent=6)),
    "own-parent": session(want(0), put(1, 8, dice=OWN, parent=8), put(2, 8), put(3, 8)),
    "grant-used-twice": session(want(0), put(1, 9), put(2, 10), put(3, 11)),
    "put-and-abort": session(want(0), record(1, ABORT), put(2, 12), record(3, ABORT)),
    "metadata": session(want(0, 2), put(1, 13, meta=100, data_bytes=5000), want(2), want(3)),
    "too-long": session(want(0), put(1, 14, dice=5, data_bytes=0xFFFFFFFF), want(2), put(3, 15)),
    "other-namespace": session(want(0), put(1, 14, ns=77), more=(patch(0, 0),)),
    "expires-at-once": session(want(0), put(1, 16, ttl=1), want(2), put(3, 17, ttl=0xFFFFFFFF)),
    "pin-for-ever": session(want(0), put(1, 18), record(2, PIN, dice=4, key=18, arg=-1), want(3)),
    "pin-and-delete": session(
        record(0, PIN, dice=4, key=3, arg=1 << 62),
        record(1, UNPIN, key=3),
        record(2, DELETE, key=3),
        record(3, DELETE, key=1),
    ),
    "large-extents": session(*(record(i, WANT, dice=0, arg=(i + 1) << 20) for i in range(4))),
    "sizes-change": session(*(want(i, pages) for i, pages in enumerate((1, 9, 17, 33)))),
    "answers": session(*(record(i, NOP, cookie=1 + i) for i in range(4))),
    "daemons-ops": session(record(0, CRC, crc=7), record(1, LOST), record(2, 10), record(3, 0)),
}

# ---- fuzz_index ----------------------------------------------------------------------------------

AN_ENTRY, A_RAW_ENTRY, A_CHUNK, AN_IMPOSTOR, A_WORD, A_SUPER, A_COLD, AN_EVENT = range(8)
CHUNK_WORDS, COLD_WORDS, DATA_OFF, SIZE_CRC = 8, 8, 5, 6


def entry(key: int, d: int, bucket: int = 0, place: int = 7, *, real: bool = True) -> bytes:
    """Return a patch: a look-up of *key* meets descriptor *d*."""
    return patch(AN_ENTRY | key << 3 | bucket << 16 | place << 24, d << 1 | (not real))


def impostor(key: int, d: int, flags: int = 0, region: int = 0) -> bytes:
    """Return a patch: descriptor *d* says it is LIVE with *key*."""
    return patch(AN_IMPOSTOR | key << 3 | d << 16 | region << 24, 1 | flags << 32)


def of_chunk(d: int, word: int, value: int) -> bytes:
    """Return a patch of a descriptor's field."""
    return patch(A_CHUNK | (d * CHUNK_WORDS + word) << 3, value)


def of_cold(d: int, word: int, value: int) -> bytes:
    """Return a patch of a cold record."""
    return patch(A_COLD | (d * COLD_WORDS + word) << 3, value)


def sized(d: int, off: int, size: int) -> bytes:
    """Return patches: where the bytes of *d* are said to be."""
    return of_chunk(d, DATA_OFF, off) + of_chunk(d, SIZE_CRC, size)


INDEX: Final = {
    "untouched": b"",
    "no-such-descriptor": entry(9, 1 << 30, real=False) + entry(10, 64, real=False),
    "one-past-the-last": b"".join(entry(9, 64, place=e, real=False) for e in range(8)),
    "impostor": entry(9, 40) + impostor(9, 40) + sized(40, 4096, 100),
    "end-of-region": entry(9, 40) + impostor(9, 40) + sized(40, (4 << 20) - 1, 1),
    "past-the-region": entry(9, 40) + impostor(9, 40) + sized(40, 4 << 20, 1),
    "offset-wraps": entry(9, 40) + impostor(9, 40) + sized(40, (1 << 64) - 4096, 0xFFFFFFFF),
    "no-such-region": entry(9, 40) + impostor(9, 40, region=1) + sized(40, 0, 10),
    "metadata-past-the-end": entry(9, 40)
    + impostor(9, 40, flags=0xFF)
    + sized(40, (4 << 20) - 64, 64)
    + of_cold(40, 5, 0xFFFFFFFF << 32)
    + of_cold(40, 6, 0xFFFF),
    "third-bucket": patch(A_SUPER, 1) + entry(9, 40, bucket=2) + impostor(9, 40) + sized(40, 0, 9),
    "all-are-one-key": b"".join(entry(9, d, place=d % 8) + impostor(9, d) for d in range(8)),
    "events-ahead": patch(A_SUPER | 1 << 3, (1 << 64) - 1) + patch(AN_EVENT, (1 << 64) - 1),
    "not-serving": patch(A_SUPER | 3 << 3, 2),
    "words": b"".join(patch(A_WORD | d << 3, d << 24 | 1 << 32) for d in range(16)),
}

# ---- fuzz_catalog_open ---------------------------------------------------------------------------

CRC_RIGHT, SHORTER = 1, 2
SUPER: Final = {  # name of a seed: offset in the superblock, what is written there
    "magic": (0, 1),
    "version": (8, 2),
    "fingerprint": (16, 0),
    "catalog-bytes": (48, 1 << 60),
    "chunks": (80, 0xFFFFFFFF | 64 << 32),
    "buckets": (80, 64 | 3 << 32),
    "regions": (88, 17 | 1024 << 32),
    "events": (96, 4096 | 63 << 32),
    "lease-slots": (104, 0xFFFFFFFF),
    "chunks-off": (112, (1 << 64) - 64),
    "index-off": (128, 1 << 40),
    "events-off": (160, 4096),
}


def catalog(off: int, value: int, how: int = CRC_RIGHT) -> bytes:
    """Return an input: one field of the superblock is another one."""
    return struct.pack("<BQHQ", how, 4096 if how & SHORTER else 0, off, value)


CATALOG: Final = {
    "untouched": struct.pack("<BQ", CRC_RIGHT, 0),
    "shorter": struct.pack("<BQ", CRC_RIGHT | SHORTER, 4096),
    "crc-wrong": catalog(0, 1, 0),
    **{name: catalog(*where) for name, where in SUPER.items()},
}

TARGETS: Final = {
    "fuzz_session_segment": SESSION,
    "fuzz_index": INDEX,
    "fuzz_catalog_open": CATALOG,
}


def main() -> None:
    """Write all seeds."""
    for target, seeds in TARGETS.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (folder / f"{name}.bin").write_bytes(data)


if __name__ == "__main__":
    main()
