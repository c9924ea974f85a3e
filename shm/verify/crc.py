# SPDX-License-Identifier: Apache-2.0
"""
Checksums of every chunk that has one, by as many threads as there are processors.

Nothing is leased: what is verified would count as used, and a reader may hold a quarter of the pool
only. The bytes of a chunk are believed when it was there before and after they were read.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from cenote._native import _core
from cenote.shm.errors import check
from cenote.shm.inspect import Catalog
from cenote.shm.session import Mapping as SessionMapping

from .tables import look_of

if TYPE_CHECKING:
    from _cffi_backend import CData

Progress = Callable[[int], None]
BATCH_BYTES: Final = 32 << 20
BATCH_CHUNKS: Final = 8192
BATCHES_A_SECOND: Final = 4  # at least so many where the rate is limited: it should be even


@dataclass(frozen=True)
class MappedRegion:
    """Where a region lies in this process, for reading; owner keeps it there."""

    address: int
    nbytes: int
    owner: object


def regions_of(mapping: SessionMapping) -> dict[int, MappedRegion]:
    """Return the regions that an attached session has mapped for reading, by number."""
    return {
        region.region: MappedRegion(region.address, region.nbytes, mapping)
        for region in mapping.regions()
        if not region.writable
    }


@dataclass(frozen=True)
class Checked:
    """
    What became of the chunks.

    Attributes:
        wrong: References of those whose bytes are not what was committed.
        checked: How many were read.
        nbytes: Bytes of these.
        left: How many were gone before it was their turn.
        unread: How many lie where nothing is mapped.
        seconds: How long it took.
    """

    wrong: NDArray[np.uint64]
    checked: int
    nbytes: int
    left: int
    unread: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes a second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


class Pacer:
    """Keeps several threads together at so many bytes a second; None: at no rate."""

    def __init__(self, bytes_per_s: int | None, stop: threading.Event) -> None:
        self._rate = bytes_per_s
        self._stop = stop
        self._lock = threading.Lock()
        self._next_s = time.monotonic()

    def wait(self, nbytes: int) -> bool:
        """Return when *nbytes* more may be read, or False to stop."""
        if self._rate:
            with self._lock:
                begin_s = max(self._next_s, time.monotonic())
                self._next_s = begin_s + nbytes / self._rate
            self._stop.wait(max(begin_s - time.monotonic(), 0))
        return not self._stop.is_set()


class Checker:
    """
    Args:
        catalog: Mapped or copied.
        regions: Those that are mapped, by number.
        threads: How many read at once; None: one a processor.
        bytes_per_s: Of all of them together; None: as fast as they can.
    """

    def __init__(
        self,
        catalog: Catalog,
        regions: Mapping[int, MappedRegion],
        *,
        threads: int | None = None,
        bytes_per_s: int | None = None,
    ) -> None:
        failed = _core.ffi.new("struct cn_syserr *")
        check(_core.lib.cn_guard_install(failed), "install the SIGBUS handler", errno=failed.err)
        self._keep = (catalog, dict(regions))
        self._look: CData = look_of(catalog)
        for number, region in regions.items():
            self._look.region[number] = _core.ffi.cast("void *", region.address)
            self._look.region_bytes[number] = region.nbytes
        self._threads = threads or len(os.sched_getaffinity(0))
        self._bytes_per_s = bytes_per_s

    def check(
        self,
        refs: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        places: NDArray[np.uint64],
        progress: Progress = lambda _bytes: None,
    ) -> Checked:
        """Read them all, in the order of their memory; *progress* gets the bytes read so far."""
        begun_s = time.monotonic()
        order = np.argsort(places, kind="stable")
        refs, sizes = refs[order], sizes[order]
        status = np.full(len(refs), _core.lib.CN_EMISS, dtype=np.int32)
        self._all(refs, sizes, status, progress)
        wrong = refs[status == _core.lib.CN_ELOST]
        again = self._statuses(wrong)  # a bit that flipped on its way here is not in the pool
        read = (status == _core.lib.CN_OK) | (status == _core.lib.CN_ELOST)
        return Checked(
            wrong=wrong[again == _core.lib.CN_ELOST],
            checked=int(read.sum()),
            nbytes=int(sizes[read].sum()),
            left=int((status == _core.lib.CN_EMISS).sum()),
            unread=int((status == _core.lib.CN_ECORRUPT).sum()),
            seconds=time.monotonic() - begun_s,
        )

    def _all(
        self,
        refs: NDArray[np.uint64],
        sizes: NDArray[np.uint64],
        status: NDArray[np.int32],
        progress: Progress,
    ) -> None:
        stop = threading.Event()
        pacer = Pacer(self._bytes_per_s, stop)
        limit = BATCH_BYTES
        if self._bytes_per_s:
            limit = max(min(limit, self._bytes_per_s // BATCHES_A_SECOND), 1)

        def one(batch: slice) -> int:
            nbytes = int(sizes[batch].sum())
            if pacer.wait(nbytes):
                status[batch] = self._statuses(refs[batch])
            return nbytes

        done_bytes = 0
        crew = ThreadPoolExecutor(self._threads, thread_name_prefix="verify")
        try:
            for ended in as_completed([crew.submit(one, b) for b in _batches(sizes, limit)]):
                done_bytes += ended.result()
                progress(done_bytes)
        finally:
            stop.set()
            crew.shutdown(cancel_futures=True)

    def _statuses(self, refs: NDArray[np.uint64]) -> NDArray[np.int32]:
        refs = np.ascontiguousarray(refs)
        status = np.zeros(len(refs), dtype=np.int32)
        where: Any = _core.ffi.from_buffer("uint64_t[]", refs)
        to: Any = _core.ffi.from_buffer("int32_t[]", status)
        done = _core.lib.cn_look_verify(self._look, where, len(refs), to)
        check(done, "look at the chunks of a pool")
        return status


def _batches(sizes: NDArray[np.uint64], limit_bytes: int) -> Iterator[slice]:
    """Cut chunks into runs of about so many bytes, one chunk at least."""
    ends = np.cumsum(sizes)
    first, before = 0, 0
    while first < len(sizes):
        last = int(np.searchsorted(ends, np.uint64(before + limit_bytes), side="right"))
        last = max(min(last, first + BATCH_CHUNKS), first + 1)
        yield slice(first, last)
        first, before = last, int(ends[last - 1])
