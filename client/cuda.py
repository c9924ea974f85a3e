# SPDX-License-Identifier: Apache-2.0
"""
Pinned memory for CUDA: a pool's mappings, registered with the CUDA runtime of this process.

A copy between a device and memory that is not registered goes through a bounce buffer of the
driver, and blocks the caller; one from or to registered memory is a DMA, and asynchronous. It is
the same bytes either way: nothing here can make a copy wrong, and a failure never stops an engine.

    pinned = cuda.register(pool)  # in the thread, and after the choice, of the device
    for at, nbytes in pinned.pieces(chunk.address, chunk.nbytes):
        ...  # one cudaMemcpyAsync
    if not pinned.current:  # the pool was attached anew
        fresh = cuda.register(pool)
        ...  # wait until every copy that was started has ended
        pinned.close()
        pinned = fresh

Rules:

- A mapping is registered as a whole or not at all: what a failure left half done is undone. So no
  chunk is registered in part, which the driver would refuse to copy. The mappings fail each for
  itself; `covers()` answers for an address.
- What is registered stays mapped, whatever becomes of the pool, its leases or this interpreter.
- Only `close()` unregisters. Nobody but the caller knows which copies run, so nothing does it
  behind his back: no finaliser, no reconnect, no end of the process.
- In a forked child nothing happens (I13).
"""

from __future__ import annotations

import bisect
import logging
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Final, NamedTuple, Self

from cenote.shm.handle import is_forked
from cenote.shm.session import MappedRegion, Mapping
from cenote.shm.units import format_size_rounded

from . import cudart
from .cudart import SUCCESS, Runtime
from .errors import InvalidArgument
from .pool import Pool

log = logging.getLogger("cenote.client")

# cuda_runtime_api.h
REGISTER_PORTABLE: Final = 0x01  # pinned for every context, not for the current one alone
REGISTER_READ_ONLY: Final = 0x08
# enum cudaDeviceAttr, driver_types.h
ATTRIBUTE_HOST_PAGE_TABLES: Final = 100  # cudaDevAttrPageableMemoryAccessUsesHostPageTables
ATTRIBUTE_READ_ONLY: Final = 113  # cudaDevAttrHostRegisterReadOnlySupported
# cudaError_t
ERROR_NOT_REGISTERED: Final = 713

BOUNDARY_BYTES: Final = 2 << 20
# The driver keeps 16 bytes for each page of 4 KiB in one table for each call, and cannot make a
# table of 2 GiB: 512 GiB fail, however much memory is free. Some hosts refuse long before that.
SEGMENT_BYTES: Final = 64 << 30
SEGMENT_BYTES_MAX: Final = 256 << 30

_WHAT_NOW: Final = {
    2: "memory is short, or the driver's own tables are: try again with a smaller segment_bytes",
    35: "the driver is older than the CUDA runtime, or there is none: install a matching one",
    100: "no device is visible to this process: look at CUDA_VISIBLE_DEVICES",
    712: "this process has registered it before: use that registration, or close it first",
    801: "this device cannot, or may not, as under confidential computing",
}
_ELSE: Final = "the kernel's log may say more (`dmesg | grep NVRM`)"


class Segment(NamedTuple):
    """A range of addresses that is registered by one call."""

    address: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.nbytes


def segments_of(region: MappedRegion, segment_bytes: int = SEGMENT_BYTES) -> Iterator[Segment]:
    """
    Yield the segments of a mapping: at most so long, cut at addresses between (huge) pages.

    No page is in two of them: the driver rounds to pages, and refuses what it has already.
    """
    boundary = max(BOUNDARY_BYTES, region.page_bytes)
    longest = max(segment_bytes, boundary)
    at, end = region.address, region.address + region.nbytes
    while at < end:
        to = min((at + longest) // boundary * boundary, end)
        yield Segment(at, to - at)
        at = to


class _Refused(Exception):
    """The runtime said no; the message is for people, and the pending error was cleared."""


def _check(runtime: Runtime, code: int, what: str) -> None:
    """Raise _Refused unless *code* is success, so that the engine's next call starts clean."""
    if code == SUCCESS:
        return
    runtime.take_last_error()
    now = _WHAT_NOW.get(code, _ELSE)
    raise _Refused(f"{what} failed: {runtime.error_text(code)} ({code}); {now}")


def _attribute(runtime: Runtime, attribute: int, device: int) -> int:
    code, value = runtime.device_attribute(attribute, device)
    _check(runtime, code, f"cudaDeviceGetAttribute({attribute}) of device {device}")
    return value


def read_only_flags(runtime: Runtime) -> int:
    """
    Return the flags with which memory that is mapped read-only can be registered.

    Raises:
        _Refused: It cannot, on this thread's device.
    """
    code, device = runtime.current_device()
    _check(runtime, code, "cudaGetDevice")
    if _attribute(runtime, ATTRIBUTE_READ_ONLY, device):
        return REGISTER_PORTABLE | REGISTER_READ_ONLY
    if _attribute(runtime, ATTRIBUTE_HOST_PAGE_TABLES, device):
        return REGISTER_PORTABLE  # the device walks the host's page tables: they say read-only
    raise _Refused(
        f"device {device} cannot register memory that is mapped read-only, as chunks are "
        "(cudaDevAttrHostRegisterReadOnlySupported is 0): a newer driver may"
    )


def _unregister(runtime: Runtime, segments: Iterable[Segment]) -> list[Segment]:
    """Unregister, each whatever becomes of the others; return those that are registered still."""
    left = []
    for segment in segments:
        code = runtime.host_unregister(segment.address)
        if code == SUCCESS:
            continue
        runtime.take_last_error()
        if code == ERROR_NOT_REGISTERED:
            continue  # the device was reset
        log.warning(
            "cudaHostUnregister at %#x failed: %s (%d); its memory stays mapped until this process "
            "ends",
            segment.address,
            runtime.error_text(code),
            code,
        )
        left.append(segment)
    return left


def _register(
    runtime: Runtime, region: MappedRegion, segment_bytes: int, done: list[Segment]
) -> None:
    """
    Register a mapping as a whole, adding its segments to *done* one by one.

    Raises:
        _Refused: Not done. Only what could not be undone is in *done*.
    """
    flags = REGISTER_PORTABLE if region.writable else read_only_flags(runtime)
    side = "writing" if region.writable else "reading"
    first = len(done)
    try:
        for at, nbytes in segments_of(region, segment_bytes):
            what = (
                f"cudaHostRegister of {nbytes} bytes of region {region.region}, mapped for {side}"
            )
            _check(runtime, runtime.host_register(at, nbytes, flags), what)
            done.append(Segment(at, nbytes))
    except _Refused:
        done[first:] = _unregister(runtime, reversed(done[first:]))
        raise


class Registration:
    """
    What of one attachment of a pool is registered; made by `register`. Any thread may ask it.

    Leaving `with registration:` closes it. One that is dropped without close() leaves its memory
    registered and mapped until the process ends, and says so in a ResourceWarning.

    Attributes:
        failed: Why some of the memory is not registered; None when all of it is.
    """

    def __init__(self, pool: Pool, mapping: Mapping, runtime: Runtime | None) -> None:
        self.failed: str | None = None
        self._pool = weakref.ref(pool)
        self._runtime = runtime
        self._mapping: Mapping | None = mapping
        self._hold = mapping.hold()
        self._lock = threading.Lock()  # of close()
        self._pinned: list[Segment] = []  # as they come
        self._segments: tuple[Segment, ...] = ()  # by address; replaced, never changed

    def _pin(self, runtime: Runtime, mapping: Mapping, segment_bytes: int) -> None:
        reasons: dict[str, None] = {}  # in order, each once
        for region in mapping.regions():
            try:
                _register(runtime, region, segment_bytes, self._pinned)
            except _Refused as refused:
                reasons[str(refused)] = None
        self._segments = tuple(sorted(self._pinned))
        self.failed = "; ".join(reasons) or None

    def _hold_no_more_than_needed(self) -> None:
        if self._mapping is not None and not self._pinned:
            self._mapping.let_go(self._hold)

    # ---- facts ---------------------------------------------------------------------------------

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What is registered, by address."""
        return self._segments

    @property
    def bytes(self) -> int:
        """How much is registered; a writer's regions count twice, for they are mapped twice."""
        return sum(segment.nbytes for segment in self._segments)

    @property
    def current(self) -> bool:
        """
        Do the chunks and puts that the pool makes now lie in what was registered?

        No, once the pool was attached anew, or close() was called. Chunks that were leased before
        lie where they lay.
        """
        pool, mapping = self._pool(), self._mapping
        return pool is not None and mapping is not None and pool.mapping is mapping

    def covers(self, address: int, nbytes: int) -> bool:
        """Is every byte of this range registered? Exact: addresses are not used again before."""
        return all(pinned for _, _, pinned in self._walk(address, nbytes))

    def pieces(self, address: int, nbytes: int) -> list[tuple[int, int]]:
        """
        Cut a range into (address, nbytes) where a registration begins or ends.

        One copy must not span two: the driver refuses it. Nearly every chunk is one piece.
        """
        return [(at, length) for at, length, _ in self._walk(address, nbytes)]

    def _walk(self, address: int, nbytes: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (address, nbytes, registered?) of each piece of a range."""
        segments, end = self._segments, address + nbytes
        i = bisect.bisect_right(segments, address, key=_address_of) - 1
        while address < end:
            stop, pinned = end, False
            if i >= 0 and address < segments[i].end:
                stop, pinned = segments[i].end, True
            elif i + 1 < len(segments):
                stop = segments[i + 1].address
            stop = min(stop, end)
            yield address, stop - address, pinned
            address = stop
            if i + 1 < len(segments) and address >= segments[i + 1].address:
                i += 1

    # ---- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """
        Unregister everything, and let the memory be unmapped once its last lease has died.

        Call it when no copy that was started runs any more: synchronize the streams first. In the
        thread, or with the device, of register(). Not while a graph is captured. What cannot be
        unregistered is logged, stays mapped, and is tried again by the next call. Idempotent; in a
        forked child it does nothing.
        """
        mapping = self._mapping
        if mapping is None or is_forked(mapping):
            return
        with self._lock:
            pinned, self._segments = self._pinned, ()
            if pinned and self._runtime is not None:
                self._pinned = _unregister(self._runtime, reversed(pinned))
                self._segments = tuple(sorted(self._pinned))
            if not self._pinned:
                self._hold_no_more_than_needed()
                self._mapping = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(
        self,
        _forked: Callable[[Mapping], bool] = is_forked,
        _ending: Callable[[], bool] = sys.is_finalizing,
        _warn: Callable[..., None] = warnings.warn,
    ) -> None:
        mapping = self._mapping
        if mapping is None or not self._pinned or _ending() or _forked(mapping):
            return
        _warn(
            f"{self!r} was dropped without close(): its memory stays registered and mapped until "
            "this process ends",
            ResourceWarning,
            source=self,
        )

    def __repr__(self) -> str:
        state = "closed" if self._mapping is None else "current" if self.current else "outdated"
        part = "" if self.failed is None else ", in part"
        return f"<Registration of {format_size_rounded(self.bytes)} with CUDA, {state}{part}>"


def _address_of(segment: Segment) -> int:
    return segment.address


def register(
    pool: Pool, *, runtime: Runtime | None = None, segment_bytes: int = SEGMENT_BYTES
) -> Registration:
    """
    Register what *pool* is attached to now with the CUDA runtime of this process.

    Views are registered read-only, a writer's extents for both directions. Every page of the pool
    gets its memory by this and is locked: about 0.1 s a GB, during which other threads run. Choose
    the device before, in this thread: the runtime makes a context on the one that is current.

    Args:
        pool: Attached to a daemon, or to one that has gone: what is mapped can be read still.
        runtime: The CUDA runtime; by default the one that this process has loaded.
        segment_bytes: Most bytes of one call, 2 MiB to 256 GiB.

    Returns:
        The registration, also when nothing could be registered: `failed` says why, and copies are
        slower. It is logged, too.

    Raises:
        InvalidArgument: segment_bytes is out of range.
        ForkedChild: The pool is this process's parent's.
        PoolGone: The pool was closed.
    """
    if not BOUNDARY_BYTES <= segment_bytes <= SEGMENT_BYTES_MAX:
        raise InvalidArgument(
            f"segment_bytes is {segment_bytes}: the driver takes less than 512 GiB in one call; "
            f"give {BOUNDARY_BYTES} to {SEGMENT_BYTES_MAX}"
        )
    pool._check_usable()
    mapping, failed = pool.mapping, None
    if runtime is None:
        try:
            runtime = cudart.find()
        except cudart.NoRuntime as error:
            failed = str(error)
    registration = Registration(pool, mapping, runtime)
    registration.failed = failed
    begun_s = time.monotonic()
    try:
        if runtime is not None:
            registration._pin(runtime, mapping, segment_bytes)
    except BaseException:
        registration.close()
        raise
    registration._hold_no_more_than_needed()
    took_s = time.monotonic() - begun_s
    log.info("pool %r: %r, in %.1f s", pool.name, registration, took_s)
    if registration.failed is not None:
        log.warning(
            "pool %r is not all pinned memory for CUDA: copies there are right, and slower: %s",
            pool.name,
            registration.failed,
        )
    return registration
