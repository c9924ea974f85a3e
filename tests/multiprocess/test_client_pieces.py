# SPDX-License-Identifier: Apache-2.0
"""Many pieces of an engine's memory, to a chunk and back: bytes, checksums, refusals."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import threading
from array import array
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenote._native import _core
from cenote.client import Cache, Chunk, ChunkLost, ForkedChild, Manifest, Put, testing
from cenote.shm import transfer

MANIFEST: Final = Manifest("m", "l", "uint8", 16)
PAGE: Final = 4096
_keys: Final = (i.to_bytes(32, "big") for i in itertools.count())


class Engine:
    """Memory with pages all over it, as an engine's KV cache is."""

    def __init__(self, nbytes: int = 2**20, seed: int = 1) -> None:
        self.memory = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
        self.base: int = self.memory.ctypes.data

    def addresses(self, offsets: list[int]) -> array[int]:
        return array("Q", [self.base + at for at in offsets])

    def joined(self, offsets: list[int], lengths: list[int]) -> bytes:
        parts = zip(offsets, lengths, strict=True)
        return b"".join(self.memory[at : at + n].tobytes() for at, n in parts)


def numbers(*values: int) -> array[int]:
    return array("Q", values)


def crc_of(data: bytes, crc: int = 0) -> int:
    return int(_core.lib.cn_crc32c(crc, data, len(data)))


def chunk_under(cache: Cache, key: bytes) -> Chunk:
    cache.flush()
    chunk = cache.get(key)
    assert chunk is not None
    return chunk


def chunk_of(cache: Cache, data: bytes) -> Chunk:
    key = next(_keys)
    with cache.put(key, len(data)) as w:
        w.copy_from(data)
    return chunk_under(cache, key)


@pytest.fixture
def unsummed() -> Iterator[Cache]:
    with testing.memory_pool("64MiB", checksum="off") as pool:
        yield pool.namespace(MANIFEST)


# ---- bytes and checksums ------------------------------------------------------------------------

pieces = st.lists(st.tuples(st.integers(0, 2**19), st.integers(0, 20_000)), min_size=1, max_size=60)
ANY = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the pool is shared on purpose
)


@ANY
@given(pieces=pieces, offset=st.integers(0, 100), tail=st.integers(1, 100))
def test_any_pieces_go_in_as_one_by_one(
    cache: Cache, pieces: list[tuple[int, int]], offset: int, tail: int
) -> None:
    """Whatever the pieces, the chunk has them one behind the other, and nothing else changes."""
    engine = Engine()
    offsets, lengths = [at for at, _ in pieces], [n for _, n in pieces]
    data = engine.joined(offsets, lengths)
    key = next(_keys)

    with cache.put(key, offset + len(data) + tail) as w:
        w.copy_from(bytes([7]) * w.nbytes)
        assert w.copy_pieces(engine.addresses(offsets), array("Q", lengths), offset) == len(data)
    chunk = chunk_under(cache, key)

    assert bytes(chunk.memory) == bytes([7]) * offset + data + bytes([7]) * tail
    cache.delete(key)


@ANY
@given(pieces=pieces, wanted=st.lists(st.booleans(), min_size=60, max_size=60))
def test_any_pieces_come_out_as_one_by_one(
    cache: Cache, pieces: list[tuple[int, int]], wanted: list[bool]
) -> None:
    """The whole goes in with a checksum, comes out to other places, and what is unwanted stays."""
    engine, other = Engine(), Engine(2**21)
    offsets, lengths = [at for at, _ in pieces], [n for _, n in pieces]
    data = engine.joined(offsets, lengths) + b"."  # a chunk has a byte at least
    key = next(_keys)
    with cache.put(key, len(data)) as w:
        filled = w.copy_pieces(engine.addresses(offsets), array("Q", lengths))
        w.copy_from(b".", filled)
    chunk = chunk_under(cache, key)
    expected = other.memory.copy()
    addresses, at, used = [], 0, 0
    for n, want in zip([*lengths, 1], wanted, strict=False):
        addresses.append(other.base + used if want else 0)
        if want:
            expected[used : used + n] = np.frombuffer(data[at : at + n], np.uint8)
            used += n + 3
        at += n

    if at == len(data):
        found = (array("Q", addresses), array("Q", [*lengths, 1]))
        assert chunk.copy_pieces_to(*found, verify=True)
        assert transfer.scatter(chunk.address, *found, 0) == chunk.crc32c == crc_of(data)
    assert not chunk.copy_pieces_to(array("Q", addresses), array("Q", [*lengths, 1][: len(wanted)]))
    assert np.array_equal(other.memory, expected)
    assert chunk.verify()
    cache.delete(key)


@pytest.mark.parametrize("count", [1, 32, 512])
def test_a_chunk_of_pages(cache: Cache, count: int) -> None:
    """Pages of 32 KiB, long enough to let the GIL go and to pass the cache, both ways."""
    wide = 32 * 1024
    engine, other = Engine(2 * count * wide), Engine(count * wide, seed=2)
    order = np.random.default_rng(3).permutation(2 * count)[:count]
    there = (engine.base + order * wide).astype(np.uint64)
    lengths = np.full(count, wide, np.uint64)
    key = next(_keys)
    with cache.put(key, count * wide) as w:
        assert w.copy_pieces(there, lengths) == count * wide
    chunk = chunk_under(cache, key)
    back = other.base + np.arange(count, dtype=np.uint64) * np.uint64(wide)

    assert chunk.verify()
    assert chunk.copy_pieces_to(back, lengths, verify=True)
    assert np.array_equal(other.memory.reshape(count, wide), engine.memory.reshape(-1, wide)[order])


def test_layer_by_layer(cache: Cache) -> None:
    """Copies in order make one checksum, in both directions."""
    engine, other = Engine(), Engine(seed=2)
    there_all = [i * PAGE for i in (9, 2, 7, 4, 30, 5, 11, 6)]
    lengths = numbers(*[PAGE] * 2)
    key = next(_keys)
    with cache.put(key, 8 * PAGE) as w:
        for layer in range(4):
            there = engine.addresses(there_all[2 * layer : 2 * layer + 2])
            assert w.copy_pieces(there, lengths, 2 * PAGE * layer) == 2 * PAGE
    chunk = chunk_under(cache, key)
    crc: int | None = 0
    with chunk.memory:
        for layer in range(4):
            there = other.addresses(there_all[2 * layer : 2 * layer + 2])
            crc = transfer.scatter(chunk.address + 2 * PAGE * layer, there, lengths, crc)

    assert crc == chunk.crc32c == crc_of(engine.joined(there_all, [PAGE] * 8))
    assert other.joined(there_all, [PAGE] * 8) == bytes(chunk.memory)
    assert transfer.scatter(chunk.address, numbers(0), numbers(PAGE), None) is None


Fill = Callable[[Put, Engine], Any]


def all_pages(w: Put, engine: Engine) -> None:
    w.copy_from(engine.memory[: 4 * PAGE])


def pages(first: int, count: int) -> Fill:
    """Pieces, as wide as a page, to these pages of the put."""
    there = [(7 + 2 * i) * PAGE for i in range(count)]
    lengths = numbers(*[PAGE] * count)
    return lambda w, engine: w.copy_pieces(engine.addresses(there), lengths, first * PAGE)


def page(at: int) -> Fill:
    return lambda w, engine: w.copy_from(engine.memory[:PAGE], at * PAGE)


def nothing(at: int) -> Fill:
    return lambda w, _: w.copy_from(b"", at * PAGE)


def memory(w: Put, _: Engine) -> None:
    with w.memory:
        pass


def address(w: Put, _: Engine) -> None:
    assert w.address


SUMMED: Final[dict[str, list[Fill]]] = {
    "one copy": [all_pages],
    "one of pieces": [pages(0, 4)],
    "two copies": [pages(0, 2), pages(2, 2)],
    "both kinds": [page(0), pages(1, 2), page(3)],
    "empty ones between": [nothing(0), pages(0, 2), nothing(2), pages(2, 0), pages(2, 2)],
    "begun again": [pages(0, 2), pages(0, 2), pages(2, 2)],
    "all again": [all_pages, page(0), pages(1, 3)],
    "right after a gap": [page(0), page(2), all_pages],
}
UNSUMMED: Final[dict[str, list[Fill]]] = {
    "nothing": [],
    "a part": [pages(0, 2)],
    "a gap": [page(0), pages(2, 2)],
    "not from the first": [pages(1, 3)],
    "an overlap": [pages(0, 2), page(1), pages(2, 2)],
    "the other order": [pages(2, 2), pages(0, 2)],
    "an edit afterwards": [pages(0, 2), pages(2, 2), page(1)],
    "the first again": [pages(0, 2), pages(2, 2), page(0)],
    "memory before": [memory, all_pages],
    "memory between": [pages(0, 2), memory, pages(2, 2)],
    "memory after": [pages(0, 2), pages(2, 2), memory],
    "address before": [address, pages(0, 4)],
    "address between": [pages(0, 2), address, pages(2, 2)],
    "address after": [pages(0, 4), address],
}


@pytest.mark.parametrize("what", [*SUMMED, *UNSUMMED])
def test_which_copies_make_the_checksum(cache: Cache, unsummed: Cache, what: str) -> None:
    """Those that follow each other from the first byte to the last, where nobody else may write."""
    engine = Engine()
    for into in (cache, unsummed):
        key = next(_keys)
        with into.put(key, 4 * PAGE) as w:
            for fill in SUMMED.get(what) or UNSUMMED[what]:
                fill(w, engine)
        chunk = chunk_under(into, key)
        recorded = what in SUMMED and into is cache

        assert chunk.crc32c == (crc_of(bytes(chunk.memory)) if recorded else None)
        assert chunk.verify() is recorded
        unwanted = numbers(*[0] * 4), numbers(*[PAGE] * 4)
        assert chunk.copy_pieces_to(*unwanted, verify=True) is recorded


def test_refused_copies_leave_no_checksum(cache: Cache) -> None:
    """A copy that was refused half-way ends the row of copies that would have made one."""
    engine, key = Engine(), next(_keys)
    with cache.put(key, 4 * PAGE) as w:
        pages(0, 2)(w, engine)
        with pytest.raises(ValueError, match=r"piece 1 .* address 0"):
            w.copy_pieces(numbers(engine.base, 0), numbers(PAGE, PAGE), 2 * PAGE)
        pages(2, 2)(w, engine)
    assert chunk_under(cache, key).crc32c is None


def test_spoiled_bytes_are_found_in_passing() -> None:
    """With verify, bytes that are not those that were stored are ChunkLost."""
    with testing.memory_pool("64MiB", checksum="commit") as pool:
        cache = pool.namespace(MANIFEST)
        with cache.put(bytes(32), 4 * PAGE) as w:
            address = w.address
            ctypes.memset(address, 3, 4 * PAGE)
        chunk = chunk_under(cache, bytes(32))
        target = Engine()
        where = target.addresses([0, 2 * PAGE]), numbers(3 * PAGE, PAGE)
        assert chunk.copy_pieces_to(*where, verify=True)
        ctypes.memset(address + 17, 4, 1)  # a writer's bug

        assert not chunk.copy_pieces_to(*where)
        with pytest.raises(ChunkLost, match="compute it again"):
            chunk.copy_pieces_to(*where, verify=True)
        with pytest.raises(ChunkLost):
            chunk.copy_pieces_to(numbers(0, 0), where[1], verify=True)
        del chunk


# ---- threads ------------------------------------------------------------------------------------


def test_concurrent_copies_never_make_a_wrong_checksum(cache: Cache) -> None:
    """Two threads that fill one put: whatever the bytes are, no checksum contradicts them."""
    nbytes = 4 * 2**20
    engines = Engine(nbytes), Engine(nbytes, seed=2)
    lengths = numbers(*[nbytes // 64] * 64)
    for _ in range(15):
        key = next(_keys)
        with cache.put(key, nbytes) as w:
            start = threading.Barrier(2)

            def fill(engine: Engine, w: Put = w, start: threading.Barrier = start) -> None:
                there = engine.addresses([i * (nbytes // 64) for i in range(64)])
                start.wait()
                w.copy_pieces(there, lengths)

            threads = [threading.Thread(target=fill, args=(e,)) for e in engines]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        chunk_under(cache, key).verify()  # ChunkLost: it lied
        cache.delete(key)


def test_abort_under_a_running_gather(cache: Cache) -> None:
    """An extent that another thread still copies into is nobody else's until it is done (I2)."""
    nbytes = 8 * 2**20
    engine, wanted = Engine(nbytes), bytes([0x55]) * nbytes
    there = engine.addresses([i * (nbytes // 128) for i in range(128)])
    lengths = numbers(*[nbytes // 128] * 128)
    for _ in range(10):
        put = cache.put(next(_keys), nbytes)
        begun = threading.Event()

        def copy(put: Put = put, begun: threading.Event = begun) -> None:
            begun.set()
            with contextlib.suppress(ValueError):  # the abort came first
                put.copy_pieces(there, lengths)

        thread = threading.Thread(target=copy)
        thread.start()
        begun.wait()
        put.abort()
        key = next(_keys)
        with cache.put(key, nbytes) as w:
            w.copy_from(wanted)
        thread.join()
        assert bytes(chunk_under(cache, key).memory) == wanted
        cache.delete(key)


def test_release_under_a_running_scatter(cache: Cache) -> None:
    """A chunk that another thread releases stays leased until the copy is done (I3)."""
    nbytes = 8 * 2**20
    wide = nbytes // 128
    lengths, target = numbers(*[wide] * 128), Engine(nbytes)
    for i in range(10):
        chunk = chunk_of(cache, bytes([i]) * nbytes)
        key = chunk.key
        there = target.addresses([k * wide for k in range(128)])
        copied = threading.Event()

        def copy(
            chunk: Chunk = chunk, there: Any = there, copied: threading.Event = copied
        ) -> None:
            with contextlib.suppress(ValueError):  # the release came first
                chunk.copy_pieces_to(there, lengths)
                copied.set()

        thread = threading.Thread(target=copy)
        thread.start()
        chunk.release()
        cache.delete(key)
        with cache.put(next(_keys), nbytes) as w:
            w.copy_from(bytes([0xEE]) * nbytes)
        thread.join()
        assert not copied.is_set() or target.memory.tobytes() == bytes([i]) * nbytes
        cache.delete(w.key)


# ---- what is refused ----------------------------------------------------------------------------

UNALIGNED: Final = memoryview(bytearray(33))[1:].cast("Q")
WRONG: Final[dict[str, tuple[Any, Any, str]]] = {
    "signed": (array("q", [0]), numbers(1), "addresses has 1 dim.* 'q'"),
    "signed lengths": (numbers(8), array("q", [1]), "lengths has 1 dim.* 'q'"),
    "short numbers": (array("I", [8]), numbers(1), "'I'"),
    "floats": (np.zeros(1), numbers(1), "'d'"),
    "bytes": (bytes(8), numbers(1), "'B'"),
    "other byte order": (np.zeros(1, ">u8"), numbers(1), "'>[QL]'"),
    "two dimensions": (np.zeros((2, 2), np.uint64), numbers(1), "2 dimensions"),
    "strided array": (np.zeros(4, np.uint64)[::2], numbers(1, 1), "contiguous"),
    "strided view": (memoryview(numbers(8, 8, 8))[::2], numbers(1, 1), "contiguous"),
    "unaligned": (UNALIGNED[:1], numbers(1), "aligned"),
    "more addresses": (numbers(8, 8), numbers(1), "2 addresses and 1 lengths"),
    "more lengths": (numbers(8), numbers(1, 1), "1 addresses and 2 lengths"),
    "one byte more": (numbers(8, 8), numbers(PAGE, 1), "4097 bytes at offset 0"),
    "overflow": (numbers(8, 8), numbers(2**64 - 1, 2), "larger than any memory"),
    "overflow to what fits": (numbers(8, 8, 8), numbers(2**63, 2**63, PAGE), "than any memory"),
    "beyond all memory": (numbers(2**64 - 8), numbers(16), "beyond|where no memory is"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arrays_are_refused(cache: Cache, what: str) -> None:
    """Each is a ValueError that says what is wrong, and nothing is copied."""
    addresses, lengths, said = WRONG[what]
    chunk = chunk_of(cache, bytes(PAGE))
    with cache.put(next(_keys), PAGE) as w:
        w.copy_from(bytes([7]) * PAGE)
        for call in (w.copy_pieces, chunk.copy_pieces_to):
            with pytest.raises(ValueError, match=said):
                call(addresses, lengths)
        assert bytes(w.memory) == bytes([7]) * PAGE


def test_wrong_arguments_are_refused(cache: Cache) -> None:
    """Lists, names that there are not, offsets outside, and a verify of less than the whole."""
    chunk = chunk_of(cache, bytes(PAGE))
    engine = Engine()
    there, lengths = engine.addresses([0]), numbers(16)
    put: Any = cache.put(next(_keys), PAGE)
    for call in (put.copy_pieces, chunk.copy_pieces_to):
        for wrong in (([8], lengths), (there, [16]), (there, None)):
            with pytest.raises(TypeError, match="no buffer"):
                call(*wrong)
        for offset in (-1, PAGE - 15, 2**62, -(2**62)):
            with pytest.raises(ValueError, match=f"16 bytes at offset {offset}"):
                call(there, lengths, offset)
    for wrong_call in (
        put.copy_pieces,
        lambda: put.copy_pieces(there),
        lambda: put.copy_pieces(there, lengths, 0, 0),
        lambda: put.copy_pieces(there, lengths, ofset=0),
        lambda: put.copy_pieces(there, lengths, addresses=there),
    ):
        with pytest.raises(TypeError, match="copy_pieces\\(\\) takes"):
            wrong_call()
    for partial in ((there, lengths, 0), (there, lengths, 16)):
        with pytest.raises(ValueError, match="the pieces have 16 of"):
            chunk.copy_pieces_to(*partial, verify=True)
    assert put.copy_pieces(lengths=lengths, addresses=there, offset=np.int64(PAGE - 16)) == 16


@pytest.mark.parametrize(
    "form",
    [
        lambda values: np.array(values, np.uint64),
        lambda values: (ctypes.c_uint64 * len(values))(*values),
        lambda values: memoryview(array("Q", values)).toreadonly(),
        lambda values: array("L", values),
    ],
    ids=["numpy", "ctypes", "memoryview", "array L"],
)
def test_what_counts_as_an_array(cache: Cache, form: Callable[[list[int]], Any]) -> None:
    """Every usual holder of unsigned 64-bit numbers will do."""
    engine, other, key = Engine(), Engine(seed=2), next(_keys)
    with cache.put(key, 5) as w:
        assert w.copy_pieces(form([engine.base + 9, engine.base + 1]), form([2, 3])) == 5
    chunk = chunk_under(cache, key)
    assert chunk.copy_pieces_to(form([other.base, other.base + 2]), form([2, 3]), verify=True)
    assert bytes(chunk.memory) == other.memory[:5].tobytes() == engine.joined([9, 1], [2, 3])


def test_a_put_that_is_over_and_a_chunk_that_was_released(cache: Cache) -> None:
    """Both say so; nothing is copied into memory that is somebody else's by now."""
    engine = Engine()
    one = engine.addresses([0]), numbers(PAGE)
    with cache.put(next(_keys), PAGE) as w:
        w.copy_pieces(*one)
    other = cache.put(next(_keys), PAGE)
    other.abort()
    chunk = chunk_of(cache, bytes(PAGE))
    chunk.release()

    for put in (w, other):
        with pytest.raises(ValueError, match=put.state):
            put.copy_pieces(*one)
    with pytest.raises(ValueError, match="released"):
        chunk.copy_pieces_to(*one)
    with pytest.raises(ValueError, match="released"):
        _ = chunk.crc32c


def test_a_forked_child_is_told(cache: Cache) -> None:
    """In a forked child, where nothing of the pool is mapped, all three raise ForkedChild (I13)."""
    engine = Engine()
    one = engine.addresses([0]), numbers(PAGE)
    chunk, put = chunk_of(cache, bytes(PAGE)), cache.put(next(_keys), PAGE)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: put.copy_pieces(*one),
        lambda: chunk.copy_pieces_to(*one),
        lambda: chunk.crc32c,
    )
    pid = os.fork()
    if pid == 0:
        told = 0
        try:
            for call in calls:
                try:
                    call()
                except ForkedChild:
                    told += 1
        finally:
            os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == len(calls)
