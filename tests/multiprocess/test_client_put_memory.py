# SPDX-License-Identifier: Apache-2.0
"""The memory of a put: who may write to it, until when, and what is copied into it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cenote.client import Cache, Pool, Put


def key_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


def stored(cache: Cache, key: bytes) -> bytes | None:
    cache.flush()
    chunk = cache.get(key)
    return None if chunk is None else bytes(chunk.memory)


def test_memory_ends_with_the_put(cache: Cache) -> None:
    """After commit or abort the writable memory is gone, and so is a view that was kept."""
    with cache.put(key_of(1), 100) as w:
        view = w.memory
        view[:] = bytes(100)
    other = cache.put(key_of(2), 100)
    other.abort()
    other.abort()

    for put in (w, other):
        with pytest.raises(ValueError, match=put.state):
            _ = put.memory
        with pytest.raises(ValueError, match=put.state):
            put.copy_from(b"x")
        with pytest.raises(ValueError, match=put.state):
            put.commit()
    with pytest.raises(ValueError, match="released"):
        view[0] = 1


@pytest.mark.parametrize(
    "view_of", [lambda w: np.frombuffer(w.memory, np.uint8), lambda w: w.memory[5:10]]
)
def test_living_view_stops_the_commit(cache: Cache, view_of: Any) -> None:
    """A view that could still write makes commit raise; its memory is nobody else's meanwhile."""
    put = cache.put(key_of(1), 4096)
    view = view_of(put)
    with pytest.raises(BufferError, match="Nothing was"):
        put.commit()

    assert stored(cache, key_of(1)) is None
    for i in range(100, 300):
        with cache.put(key_of(i), 4096) as w:
            w.copy_from(bytes([i % 256]) * 4096)
    view[0] = 77  # into an extent that must not be one of these
    for i in range(100, 300):
        assert stored(cache, key_of(i)) == bytes([i % 256]) * 4096
    del view


def test_copy_from_takes_what_has_memory(cache: Cache) -> None:
    """Bytes, arrays of any type and shape; parts at offsets; nothing that does not fit."""
    floats = np.arange(6, dtype=np.float32).reshape(2, 3)
    with cache.put(key_of(1), 24) as w:
        w.copy_from(floats)
    with cache.put(key_of(2), 24) as w:
        w.copy_from(floats[0], offset=12)
        w.copy_from(bytearray(12))
        for wrong in (bytes(25), floats.T, "text", 5):
            with pytest.raises((ValueError, TypeError)):
                w.copy_from(wrong)
        with pytest.raises(ValueError, match="do not fit"):
            w.copy_from(b"xx", offset=23)
        with pytest.raises(ValueError, match="do not fit"):
            w.copy_from(b"xx", offset=-1)

    assert stored(cache, key_of(1)) == floats.tobytes()
    assert stored(cache, key_of(2)) == bytes(12) + floats[0].tobytes()


def test_put_that_its_own_source_ends(cache: Cache) -> None:
    """A source whose code aborts the put, or commits it, is not copied anywhere."""

    class Treacherous:
        def __init__(self, end: Callable[[], None]) -> None:
            self.end = end

        @property
        def __array_interface__(self) -> dict[str, Any]:
            self.end()
            return np.zeros(4096, np.uint8).__array_interface__

    for i, verb in enumerate(("abort", "commit")):
        put = cache.put(key_of(i), 4096)
        put.copy_from(b"x" * 4096)
        with pytest.raises(ValueError, match=verb):
            put.copy_from(Treacherous(getattr(put, verb)))

    assert stored(cache, key_of(0)) is None
    assert stored(cache, key_of(1)) == b"x" * 4096


def test_abort_under_a_running_copy(cache: Cache, pool: Pool) -> None:
    """An extent that another thread still copies into is nobody else's until it is done (I2)."""
    nbytes = 8 * 2**20
    noise, wanted = bytes([0xAA]) * nbytes, bytes([0x55]) * nbytes
    for i in range(20):
        put = cache.put(key_of(i), nbytes)
        begun = threading.Event()

        def copy(put: Put = put, begun: threading.Event = begun) -> None:
            begun.set()
            with contextlib.suppress(ValueError):  # the abort came first
                put.copy_from(noise)

        thread = threading.Thread(target=copy)
        thread.start()
        begun.wait()
        put.abort()
        with cache.put(key_of(1000 + i), nbytes) as w:
            w.copy_from(wanted)
        thread.join()
        assert stored(cache, key_of(1000 + i)) == wanted
        cache.delete(key_of(1000 + i))

    assert pool.stats().bytes_used == 0


def test_address_is_where_a_device_writes(cache: Cache) -> None:
    """What is written to the address of a put is in its chunk; over, it has none."""
    with cache.put(key_of(1), 4096) as w:
        ctypes.memset(w.address, 7, 4096)

    assert stored(cache, key_of(1)) == bytes([7]) * 4096
    with pytest.raises(ValueError, match="committed"):
        _ = w.address


@pytest.mark.parametrize("verb", ["commit", "abort"])
def test_put_that_the_collector_ends(cache: Cache, verb: str) -> None:
    """
    Garbage whose finalizer ends the put while commit or abort run does no harm: one of them wins.
    """

    class Ender:
        def __init__(self, put: Put) -> None:
            self.put, self.me = put, self

        def __del__(self) -> None:
            self.put.abort()

    thresholds = gc.get_threshold()
    try:
        for i in range(300):
            put = cache.put(key_of(i), 4096)
            put.memory[:4] = b"half"
            Ender(put)  # garbage, a cycle
            gc.set_threshold(1 + i % 7)
            with contextlib.suppress(ValueError):
                getattr(put, verb)()
            gc.set_threshold(*thresholds)
            assert put.state in {"committed", "aborted"}
    finally:
        gc.set_threshold(*thresholds)


def test_memory_that_was_released_is_lent_again(cache: Cache) -> None:
    """`with w.memory:` gives one view back, not the put's memory."""
    with cache.put(key_of(1), 8) as w:
        with w.memory as view:
            view[:4] = b"abcd"
        assert w.memory is w.memory
        w.memory[4:] = b"efgh"

    assert stored(cache, key_of(1)) == b"abcdefgh"


def test_extent_gives_no_view_after_commit(cache: Cache) -> None:
    """The object behind the memory, kept on the sly, gives no view once the put is over."""
    with cache.put(key_of(1), 8) as w:
        extent: Any = w.memory.obj
        w.copy_from(b"abcdefgh")
    with pytest.raises(ValueError, match="over"):
        memoryview(extent)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["tensor", "numpy"])
def test_living_tensor_stops_the_commit(cache: Cache, kind: str) -> None:
    """A tensor or array over a put's memory is seen by commit; without it the bytes are stored."""
    dtype = "bfloat16" if kind == "tensor" else "float32"
    put = cache.put(key_of(1), 64)
    values = getattr(put, kind)(dtype)
    values[:] = 1
    with pytest.raises(BufferError, match="Nothing was"):
        put.commit()
    values[:] = 2  # into an extent that is nobody's yet
    del values

    with cache.put(key_of(2), 64) as w:
        values = getattr(w, kind)(dtype, (-1, 4))
        values[:] = 3
        expected = bytes(w.memory)
        del values

    assert stored(cache, key_of(1)) is None
    assert stored(cache, key_of(2)) == expected


def test_arguments_of_copy_from(cache: Cache) -> None:
    """It takes a source and an offset, by place or by name, and nothing else."""
    put: Any = cache.put(key_of(1), 16)
    assert put.copy_from(b"abcd", 12) == put.copy_from(b"abcd", offset=0) == 4
    assert put.copy_from(source=b"abcd", offset=np.int64(8)) == 4
    assert bytes(put.memory[8:]) == b"abcdabcd"
    for wrong in (put.copy_from, lambda: put.copy_from(b"a", 1, 2)):
        with pytest.raises(TypeError, match="offset"):
            wrong()
    for wrong in (lambda: put.copy_from(b"a", ofset=1), lambda: put.copy_from(b"a", source=b"b")):
        with pytest.raises(TypeError, match="offset"):
            wrong()
    with pytest.raises(TypeError):
        put.copy_from(b"a", "1")
