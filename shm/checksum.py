# SPDX-License-Identifier: Apache-2.0
"""
The daemon's own session for checksums: which chunks have none yet, or one that is in doubt since a
dirty start (I9), and reading these.

It is a client like any other (I1): it leases what it reads and reports through its ring. Chunks are
found by following the event feed, so that nothing is looked at twice and nothing while it is quiet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from cenote._native import _core, _short

from .errors import PoolGone, check

if TYPE_CHECKING:
    from _cffi_backend import CData

    from .host import PoolHost

EVENTS_A_READ: Final = 256
WAIT_FOREVER_MS: Final = 2**32 - 1
CHUNKS_A_LOOK: Final = 65_536
_GENERATION_SHIFT: Final = 32
_STATE_SHIFT: Final = 24
_CHUNK_BYTES: Final = _core.ffi.sizeof("struct cn_chunk")
_DOUBTS: Final = _core.lib.CN_CF_CRC | _core.lib.CN_CF_UNVERIFIED


@dataclass(frozen=True, slots=True)
class Unchecked:
    """
    A chunk whose bytes are to be read: its reference, and the first 8 bytes of its key.

    recorded: what its checksum must be, or None when it has none yet.
    """

    ref: int
    key_head: int
    recorded: int | None


class ChecksumSession:
    """
    An attachment of the daemon to its own pool. wait(), unchecked() and make() are one thread's.

    Raises:
        LimitReached: No session is left.
        CenoteError, OSError: see PoolHost.attach().
    """

    def __init__(self, host: PoolHost) -> None:
        self._pool = host.name
        welcome, self._mapping = host.attach("writer", "checksums", internal=True)
        self.session, self.nonce = welcome.session, welcome.nonce
        self._client: CData = _core.ffi.cast("struct cn_client *", self._mapping.ptr)
        self._catalog: CData = _core.ffi.cast("struct cn_super *", self._mapping.catalog)
        self._sequence = 1
        self._chunk = _core.ffi.new("struct cn_chunk *")
        self._cold = _core.ffi.new("struct cn_cold *")
        self._events = _core.ffi.new("struct cn_event[]", EVENTS_A_READ)

    def wait(self) -> None:
        """
        Sleep until something happened in the pool that unchecked() has not seen.

        Raises:
            PoolGone: close() was called, by whatever thread, or the pool was retired.
        """
        status = _core.lib.cn_events_wait(self._client, self._sequence, WAIT_FOREVER_MS)
        if status != _core.lib.CN_ETIME:
            check(status, f"follow the events of pool {self._pool!r}")

    def unchecked(self) -> Iterator[Unchecked]:
        """
        Yield the chunks that are to be read and were stored since the last call.

        After a gap in the feed, every chunk of the pool is looked at.
        """
        sequence = _core.ffi.new("uint64_t *", self._sequence)
        count, lost = _core.ffi.new("uint32_t *"), _core.ffi.new("uint64_t *")
        while True:
            status = _short.lib.cn_events_read(
                self._catalog, sequence, EVENTS_A_READ, self._events, count, lost
            )
            check(status, f"read the events of pool {self._pool!r}")
            self._sequence = int(sequence[0])
            if lost[0]:
                yield from self._all()
            elif not count[0]:
                return
            stored = [self._events[i].chunk for i in range(count[0]) if self._is_stored(i)]
            yield from (found for ref in stored if (found := self._lacking(ref & 0xFFFFFFFF, ref)))

    def _is_stored(self, i: int) -> bool:
        return bool(self._events[i].what & 0xFF == _core.lib.CN_EVENT_STORED)

    def _all(self) -> Iterator[Unchecked]:
        """Look at all words at once: a million of them in Python would take seconds."""
        base = _core.ffi.cast("char *", self._catalog) + self._catalog.chunks_off
        size = self._catalog.chunk_count * _CHUNK_BYTES
        words = np.frombuffer(_core.ffi.buffer(base, size), np.uint64)[:: _CHUNK_BYTES // 8]
        for first in range(0, len(words), CHUNKS_A_LOOK):
            some = words[first : first + CHUNKS_A_LOOK]
            live = (some >> np.uint64(_STATE_SHIFT)) & np.uint64(0xFF) == _core.lib.CN_LIVE
            good = some & np.uint64(_DOUBTS) == _core.lib.CN_CF_CRC
            for d in np.flatnonzero(live & ~good):
                found = self._lacking(first + int(d), None)
                if found:
                    yield found

    def _lacking(self, d: int, ref: int | None) -> Unchecked | None:
        """Return the chunk in descriptor *d* when it is *ref*'s, or anybody's, and lacks a CRC."""
        lib = _short.lib
        if lib.cn_chunk_read(self._catalog, d, self._chunk, self._cold) != _core.lib.CN_OK:
            return None
        word = self._chunk.word
        found = (word >> _GENERATION_SHIFT) << 32 | d
        if word & _DOUBTS == _core.lib.CN_CF_CRC or (ref is not None and ref != found):
            return None
        recorded = int(self._chunk.size_crc) >> 32 if word & _core.lib.CN_CF_CRC else None
        return Unchecked(found, int(self._chunk.key[0]), recorded)

    def make(self, chunk: Unchecked) -> int:
        """
        Compute the checksum of *chunk* and report it; return how many bytes were read.

        0 when it is gone meanwhile. Bytes that cannot be read any more, or that are not those of
        its checksum, are reported as lost.
        """
        ffi, lib = _core.ffi, _core.lib
        view, crc = ffi.new("struct cn_view *"), ffi.new("uint32_t *")
        status = _short.lib.cn_lease_ref(self._client, chunk.ref, chunk.key_head, view)
        if status == lib.CN_ECLOSED:
            raise PoolGone(f"pool {self._pool!r} is retired")
        if status != lib.CN_OK:
            return 0
        try:
            status = lib.cn_guarded_crc32c(0, view.data, view.bytes, crc)
            good = status == lib.CN_OK and chunk.recorded in (None, int(crc[0]))
            op = lib.CN_OP_CRC if good else lib.CN_OP_LOST
            check(
                lib.cn_report(self._client, op, chunk.ref, crc[0]),
                f"report a checksum to pool {self._pool!r}",
            )
            return int(view.bytes)
        finally:
            _short.lib.cn_release(self._client, view.slot)

    def close(self) -> None:
        """
        Take no more leases and end wait(). Any thread; once is enough.

        The session itself ends with the last reference to this object.
        """
        _short.lib.cn_client_close(self._client)
