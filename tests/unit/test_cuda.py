# SPDX-License-Identifier: Apache-2.0
"""
Registration of a pool's memory with the CUDA runtime, against a library that stands in for it.

There is no GPU in these tests: cudart_stand_in.c has the functions and their rules, and pins
nothing. What a real driver makes of it is shown by bench/bench_cuda.py.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenote.client import (
    Cache,
    ForkedChild,
    InvalidArgument,
    Manifest,
    Pool,
    PoolGone,
    cuda,
    cudart,
)
from cenote.client.testing import MemoryHost
from cenote.shm.session import MappedRegion

MIB, GIB = 1 << 20, 1 << 30
READ_ONLY = cuda.REGISTER_PORTABLE | cuda.REGISTER_READ_ONLY
MANIFEST = Manifest("m", "l", "uint8", 16)
KEY = bytes(range(32))


@pytest.fixture
def gpu(stand_in: Path) -> Iterator[Any]:
    """The stand-in; nothing may be left registered, pending or unmapped too early."""
    library = ctypes.CDLL(str(stand_in))
    library.stand_in_flags.argtypes = [ctypes.c_void_p]
    library.stand_in_flags.restype = ctypes.c_uint
    library.stand_in_device(1, 1, 0)
    library.stand_in_fail(0, 0)
    yield library
    found = (library.stand_in_ranges(), library.stand_in_pending(), library.stand_in_orphans())
    assert found == (0, 0, 0), "left: ranges, a pending error, memory unmapped while registered"


@pytest.fixture
def runtime(gpu: Any) -> cudart.Cudart:
    return cudart.Cudart(gpu)


@pytest.fixture
def host() -> Iterator[MemoryHost]:
    with MemoryHost("64MiB", chunk_count=64, event_count=64) as made:
        yield made


@pytest.fixture
def pool(host: MemoryHost) -> Pool:
    return host.connect()


@pytest.fixture
def cache(pool: Pool) -> Cache:
    cache = pool.namespace(MANIFEST)
    with cache.put(KEY, 5 * MIB) as w:
        w.copy_from(bytes(5 * MIB))
    cache.flush()
    return cache


def places(cache: Cache, nbytes: int = 5 * MIB) -> tuple[int, int]:
    """Where a chunk lies, and where one would be written."""
    chunk = cache.get(KEY)
    assert chunk is not None
    put = cache.put(bytes(32), nbytes)
    found = chunk.address, put.address
    put.abort()
    return found


def forget(host: MemoryHost, pool: Pool) -> None:
    """Close a pool; its host refers to it no more."""
    pool.close()
    host.stop()


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, end = line.split()[0].partition("-")
        if int(begin, 16) <= address < int(end, 16):
            return True
    return False


# ---- where it is cut -----------------------------------------------------------------------------


@pytest.mark.parametrize("page_bytes", [4096, 2 * MIB, GIB])
@pytest.mark.parametrize("nbytes", [4096, 2 * MIB, 64 * GIB, 64 * GIB + 4096, 1200 * GIB])
def test_segments_are_short_and_cut_between_pages(nbytes: int, page_bytes: int) -> None:
    """A mapping of any length is covered once, by segments far below 512 GiB, cut between pages."""
    start = 7 * GIB
    region = MappedRegion(0, start, nbytes, page_bytes, writable=False)

    segments = list(cuda.segments_of(region))

    assert [s.address for s in segments] == [start, *(s.end for s in segments[:-1])]
    assert segments[-1].end == start + nbytes
    assert all(0 < s.nbytes <= 64 * GIB for s in segments)
    assert all(s.end % max(page_bytes, 2 * MIB) == 0 for s in segments[:-1])


@given(st.integers(1, 2**20), st.integers(1, 2**24), st.integers(21, 26))
def test_segments_cover_any_mapping(first_page: int, pages: int, longest_bit: int) -> None:
    """That holds for mappings that begin between huge pages, and for any length of segments."""
    region = MappedRegion(0, first_page * 4096, pages * 4096, 4096, writable=True)

    segments = list(cuda.segments_of(region, 1 << longest_bit))

    assert sum(s.nbytes for s in segments) == pages * 4096
    assert all(a.end == b.address for a, b in itertools.pairwise(segments))
    assert all(0 < s.nbytes <= 1 << longest_bit for s in segments)
    assert all(s.end % (2 * MIB) == 0 for s in segments[:-1])


def test_pieces_never_span_two_registrations(runtime: cudart.Cudart, cache: Cache) -> None:
    """A chunk that lies in several segments is copied in pieces, none of which spans a border."""
    pool = cache.pool
    with cuda.register(pool, runtime=runtime, segment_bytes=2 * MIB) as pinned:
        at = places(cache)[0]
        pieces = pinned.pieces(at, 5 * MIB)

        assert len(pieces) >= 3
        assert pieces[0][0] == at
        assert sum(nbytes for _, nbytes in pieces) == 5 * MIB
        for address, nbytes in pieces:
            (segment,) = (s for s in pinned.segments if s.address <= address < s.end)
            assert address + nbytes <= segment.end
        assert pinned.covers(at, 5 * MIB)

        first, last = pinned.segments[0], pinned.segments[-1]
        assert not pinned.covers(first.address - 1, 2)
        assert pinned.pieces(first.address - 1, 2) == [(first.address - 1, 1), (first.address, 1)]
        assert pinned.pieces(last.end - 1, 2) == [(last.end - 1, 1), (last.end, 1)]
        assert pinned.pieces(last.end, 7) == [(last.end, 7)]
        assert pinned.pieces(at, 0) == []


# ---- what is registered, and how -----------------------------------------------------------------


def test_views_are_registered_read_only_and_extents_writable(
    gpu: Any, runtime: cudart.Cudart, cache: Cache
) -> None:
    """Both mappings of a writer are registered, each with the flags of its protection."""
    with cuda.register(cache.pool, runtime=runtime) as pinned:
        view, extent = places(cache)

        assert pinned.failed is None
        assert pinned.current
        assert pinned.bytes == 2 * 64 * MIB
        assert gpu.stand_in_flags(view) == READ_ONLY
        assert gpu.stand_in_flags(extent) == cuda.REGISTER_PORTABLE
        assert pinned.covers(view, 5 * MIB)
        assert pinned.covers(extent, 5 * MIB)
        assert repr(pinned) == "<Registration of 128MiB with CUDA, current>"
    assert not pinned.current
    assert not pinned.covers(view, 1)
    assert repr(pinned) == "<Registration of 0B with CUDA, closed>"


def test_a_reader_has_views_alone(host: MemoryHost, runtime: cudart.Cudart) -> None:
    """A reader's process maps nothing writable, so that half as much is registered."""
    with cuda.register(host.connect("reader"), runtime=runtime) as pinned:
        assert (pinned.failed, pinned.bytes) == (None, 64 * MIB)


def test_device_without_read_only_registration(
    gpu: Any, runtime: cudart.Cudart, cache: Cache, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a device cannot register read-only memory, extents are, views are not; it says so."""
    gpu.stand_in_device(1, 0, 0)

    with cuda.register(cache.pool, runtime=runtime) as pinned:
        view, extent = places(cache)
        assert not pinned.covers(view, 1)
        assert pinned.covers(extent, 5 * MIB)
        assert pinned.failed is not None
        assert "HostRegisterReadOnlySupported is 0" in pinned.failed
        assert repr(pinned) == "<Registration of 64MiB with CUDA, current, in part>"
    assert "copies there are right, and slower" in caplog.text


def test_device_that_walks_the_hosts_page_tables(
    gpu: Any, runtime: cudart.Cudart, cache: Cache
) -> None:
    """A device that uses the host's page tables needs no flag for memory that is read-only."""
    gpu.stand_in_device(1, 0, 1)

    with cuda.register(cache.pool, runtime=runtime) as pinned:
        assert pinned.failed is None
        assert gpu.stand_in_flags(places(cache)[0]) == cuda.REGISTER_PORTABLE


def test_no_device(gpu: Any, runtime: cudart.Cudart, host: MemoryHost) -> None:
    """Without a device the reason is told, and no error is left for the engine's next call."""
    gpu.stand_in_device(0, 0, 0)

    with cuda.register(host.connect("reader"), runtime=runtime) as pinned:
        assert pinned.failed is not None
        assert "(100); no device is visible" in pinned.failed
        assert gpu.stand_in_pending() == 0


@pytest.mark.parametrize("nth", range(1, 9))
def test_a_mapping_is_registered_as_a_whole_or_not_at_all(
    gpu: Any, runtime: cudart.Cudart, cache: Cache, nth: int
) -> None:
    """Whichever call fails, what it leaves half done is undone, and no error stays pending."""
    gpu.stand_in_fail(nth, 2)

    with cuda.register(cache.pool, runtime=runtime, segment_bytes=16 * MIB) as pinned:
        assert gpu.stand_in_pending() == 0
        assert pinned.failed is not None
        assert "cudaHostRegister of" in pinned.failed
        assert "smaller segment_bytes" in pinned.failed
        assert gpu.stand_in_ranges() == len(pinned.segments)
        sides = [(r.writable, pinned.covers(r.address, r.nbytes)) for r in regions(cache.pool)]
        for region in regions(cache.pool):
            whole = pinned.covers(region.address, region.nbytes)
            assert whole or not any(
                pinned.covers(at, 1) for at in range(region.address, region.address + 64 * MIB, MIB)
            )
        failed_writable = nth > len(list(cuda.segments_of(regions(cache.pool)[0], 16 * MIB)))
        assert sides == [(False, failed_writable), (True, not failed_writable)]


def regions(pool: Pool) -> list[MappedRegion]:
    return list(pool.mapping.regions())


def test_registered_before(runtime: cudart.Cudart, pool: Pool) -> None:
    """A second registration of the same memory says to use the first, and harms it not."""
    with cuda.register(pool, runtime=runtime) as first:
        with cuda.register(pool, runtime=runtime) as second:
            assert second.failed is not None
            assert "use that registration" in second.failed
            assert second.bytes == 0
        assert first.bytes == 2 * 64 * MIB


@pytest.mark.parametrize("segment_bytes", [0, 2 * MIB - 1, 512 * GIB])
def test_segments_out_of_range_are_refused(pool: Pool, segment_bytes: int) -> None:
    """What the driver would refuse, or what is no huge page, is refused before anything is done."""
    with pytest.raises(InvalidArgument, match="less than 512 GiB"):
        cuda.register(pool, segment_bytes=segment_bytes)


# ---- how long ------------------------------------------------------------------------------------


def test_memory_stays_mapped_until_it_is_unregistered(
    host: MemoryHost, runtime: cudart.Cudart
) -> None:
    """Pool and chunks may go before: their memory stays mapped, until close()."""
    pool = host.connect()
    pinned = cuda.register(pool, runtime=runtime)
    at = pinned.segments[0].address
    forget(host, pool)
    del pool
    gc.collect()

    assert is_mapped(at)
    assert not pinned.current
    pinned.close()
    pinned.close()
    gc.collect()
    assert not is_mapped(at)


def test_old_attachment_after_another_was_made(host: MemoryHost, runtime: cudart.Cudart) -> None:
    """
    When a pool is attached anew, its registration is outdated, covers nothing of the new memory,
    and keeps the old one until it is closed.
    """
    pool, other = host.connect(), host.connect()
    pinned = cuda.register(pool, runtime=runtime)
    old = pinned.segments[0].address
    pool._attachment = other._attachment  # what the link does
    gc.collect()

    assert not pinned.current
    assert repr(pinned) == "<Registration of 128MiB with CUDA, outdated>"
    assert not any(pinned.covers(region.address, 1) for region in regions(pool))
    assert is_mapped(old)
    with cuda.register(pool, runtime=runtime) as fresh:
        assert fresh.current
        assert fresh.failed is None
        pinned.close()
        gc.collect()
        assert not is_mapped(old)
        assert all(fresh.covers(region.address, region.nbytes) for region in regions(pool))


def test_what_cannot_be_unregistered_stays_mapped(
    gpu: Any, runtime: cudart.Cudart, host: MemoryHost, caplog: pytest.LogCaptureFixture
) -> None:
    """A refused unregistration is logged and keeps the memory mapped; close() tries again."""
    pool = host.connect()
    pinned = cuda.register(pool, runtime=runtime)
    gpu.stand_in_fail(1, 4)
    pinned.close()
    forget(host, pool)
    del pool
    gc.collect()

    assert gpu.stand_in_pending() == 0
    (left,) = pinned.segments
    assert is_mapped(left.address)
    assert "stays mapped until this process ends" in caplog.text
    pinned.close()
    gc.collect()
    assert (pinned.segments, is_mapped(left.address)) == ((), False)


def test_device_was_reset(gpu: Any, runtime: cudart.Cudart, pool: Pool) -> None:
    """Memory that the runtime does not know any more is let go without a word."""
    with cuda.register(pool, runtime=runtime) as pinned:
        for segment in pinned.segments:
            assert gpu.cudaHostUnregister(ctypes.c_void_p(segment.address)) == 0
    assert pinned.segments == ()
    assert gpu.stand_in_pending() == 0


def test_dropped_without_close(runtime: cudart.Cudart, host: MemoryHost) -> None:
    """Nothing is unregistered behind the caller's back: it warns, and memory stays mapped."""
    pool = host.connect()
    pinned = cuda.register(pool, runtime=runtime)
    segments = pinned.segments
    forget(host, pool)
    del pool
    gc.collect()

    with pytest.warns(ResourceWarning, match=r"dropped without close\(\)"):
        del pinned

    assert all(is_mapped(segment.address) for segment in segments)
    for segment in segments:
        assert runtime.host_unregister(segment.address) == 0


def test_a_failed_registration_holds_nothing(
    gpu: Any, runtime: cudart.Cudart, host: MemoryHost
) -> None:
    """One that registered nothing needs no close() for the memory to go."""
    gpu.stand_in_device(0, 0, 0)
    pool = host.connect("reader")
    at = regions(pool)[0].address
    pinned = cuda.register(pool, runtime=runtime)
    assert pinned.bytes == 0
    forget(host, pool)
    del pool, pinned
    gc.collect()

    assert not is_mapped(at)


def test_forked_child(gpu: Any, runtime: cudart.Cudart, host: MemoryHost) -> None:
    """In a forked child nothing is unregistered, nothing registered, and nobody warned (I13)."""
    pool = host.connect()
    pinned = cuda.register(pool, runtime=runtime)

    def child() -> int:
        nonlocal pinned
        before = gpu.stand_in_ranges()
        pinned.close()
        if gpu.stand_in_ranges() != before:
            return 1
        for call in (lambda: cuda.register(pool, runtime=runtime), lambda: regions(pool)):
            try:
                call()
            except ForkedChild:
                continue
            return 2
        del pinned
        gc.collect()
        return 0 if gpu.stand_in_ranges() == before else 3

    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = child()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    pinned.close()


def test_closed_pool_and_lost_daemon(host: MemoryHost, runtime: cudart.Cudart) -> None:
    """What is mapped can be registered without a daemon; a pool that was closed cannot."""
    pool = host.connect()
    host.stop()
    with cuda.register(pool, runtime=runtime) as pinned:
        assert pinned.failed is None
    pool.close()
    with pytest.raises(PoolGone, match="was closed"):
        cuda.register(pool, runtime=runtime)
