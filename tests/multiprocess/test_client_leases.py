# SPDX-License-Identifier: Apache-2.0
"""Leases as Python sees them: what keeps one alive, what ends it, and what never ends it twice."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cenote.client import Cache, Chunk, ForkedChild, Manifest, Pool, PoolGone
from cenote.client.testing import MemoryHost
from cenote.shm.handle import key_of as key_of_ref

MANIFEST = Manifest("m", "l", "uint8", 16)
NBYTES = 64 * 1024


def key_of(i: int) -> bytes:
    return i.to_bytes(32, "big")


def bytes_of(i: int, nbytes: int = NBYTES) -> bytes:
    return np.random.default_rng(i).bytes(nbytes)


@pytest.fixture
def host() -> Iterator[MemoryHost]:
    with MemoryHost("64MiB", chunk_count=512) as made:
        yield made
        gc.collect()
        assert not made.running or made.audit() == 0


@pytest.fixture
def pool(host: MemoryHost) -> Iterator[Pool]:
    with host.connect() as made:
        yield made


@pytest.fixture
def cache(pool: Pool) -> Cache:
    made = pool.namespace(MANIFEST)
    store(made, 1)
    return made


def store(cache: Cache, *numbers: int, nbytes: int = NBYTES) -> None:
    for i in numbers:
        with cache.put(key_of(i), nbytes) as w:
            w.copy_from(bytes_of(i, nbytes))
    cache.flush()


def chunk_of(cache: Cache, i: int = 1) -> Chunk:
    found = cache.get(key_of(i))
    assert found is not None
    return found


def as_memoryview(chunk: Chunk) -> Any:
    return chunk.memory


def as_slice(chunk: Chunk) -> Any:
    return chunk.memory[100:200][3:]


def as_cast(chunk: Chunk) -> Any:
    return chunk.memory.cast("I")


def as_array(chunk: Chunk) -> Any:
    return chunk.numpy(np.uint16, (64, -1))


def as_array_slice(chunk: Chunk) -> Any:
    return chunk.numpy()[5:100:2].reshape(-1)


def as_dlpack(chunk: Chunk) -> Any:
    return np.from_dlpack(chunk)


def as_tensor(chunk: Chunk) -> Any:
    return chunk.tensor("uint8", (2, -1))[1:].transpose(0, 1)


VIEWS: list[Any] = [as_memoryview, as_slice, as_cast, as_array, as_array_slice, as_dlpack]
VIEWS += [pytest.param(as_tensor, marks=pytest.mark.torch)]


@pytest.mark.parametrize("view_of", VIEWS)
def test_the_last_view_ends_the_lease(pool: Pool, cache: Cache, view_of: Any) -> None:
    """A lease lives as long as anything made from its chunk, and not a moment longer."""
    chunk = chunk_of(cache)
    view = view_of(chunk)
    chunk.release()
    del chunk
    gc.collect()
    assert pool.leases == 1

    del view
    gc.collect()
    assert pool.leases == 0


@pytest.mark.parametrize("view_of", VIEWS)
def test_views_survive_deletion_and_pressure(cache: Cache, view_of: Any) -> None:
    """The bytes under a view stay what they were while the pool is filled over and over (I2)."""
    view = view_of(chunk_of(cache))
    before = np.asarray(view).tobytes()
    assert cache.delete(key_of(1)) == 1

    for i in range(1000, 3000):
        with cache.put(key_of(i), NBYTES) as w:
            w.memory[:8] = i.to_bytes(8, "little")
    cache.flush()

    assert np.asarray(view).tobytes() == before
    assert cache.get(key_of(1)) is None


def test_contents_and_read_only(cache: Cache) -> None:
    """What comes back is what was stored, and no view of it can be written to."""
    chunk = chunk_of(cache)

    assert bytes(chunk.memory) == bytes_of(1)
    assert chunk.memory.readonly
    assert not chunk.numpy().flags.writeable
    assert not chunk.numpy(np.float32, (128, 128)).flags.writeable
    with pytest.raises(TypeError):
        chunk.memory[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        chunk.numpy()[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        chunk.numpy().flags.writeable = True


def test_release_twice(pool: Pool, cache: Cache) -> None:
    """A second release, and leaving the block after it, do nothing to a lease of somebody else."""
    first, second = chunk_of(cache), chunk_of(cache)
    with first:
        first.release()
        first.release()
        third = chunk_of(cache)
    first.release()

    assert pool.leases == 2
    assert bytes(second.memory) == bytes(third.memory) == bytes_of(1)
    with pytest.raises(ValueError, match="released"):
        _ = first.memory


def test_released_chunk_refuses_everything(cache: Cache) -> None:
    """After its release a chunk gives no memory in any form."""
    chunk = chunk_of(cache)
    chunk.release()

    for use in (
        lambda: chunk.memory,
        chunk.numpy,
        chunk.verify,
        lambda: chunk.copy_to(bytearray(NBYTES)),
        chunk.__dlpack__,
    ):
        with pytest.raises((ValueError, BufferError)):
            use()
    assert repr(chunk) == "<Chunk released>"


def test_key_of_a_released_chunk_that_left(cache: Cache) -> None:
    """A dying chunk has its key; a free descriptor of its generation may hold another chunk's."""
    store(cache, 2)
    chunk, other = chunk_of(cache), chunk_of(cache, 2)
    mapping, ref = chunk.owner, chunk.ref
    cache.delete(key_of(2))
    assert other.key == key_of(2)  # leased: it is dying
    assert key_of_ref(mapping, ref) == key_of(1)
    chunk.release()

    cache.delete(key_of(1))
    cache.flush()

    assert key_of_ref(mapping, ref) is None


def test_views_survive_close_and_the_daemons_end(host: MemoryHost) -> None:
    """close() and the end of the daemon take nothing from who still reads; release works after."""
    pool = host.connect()
    cache = pool.namespace(MANIFEST)
    store(cache, 7)
    chunk = chunk_of(cache, 7)
    array = chunk.numpy()
    pool.close()

    assert array.tobytes() == bytes_of(7)
    with pytest.raises(PoolGone, match="closed"):
        cache.get(key_of(7))
    with pytest.raises(PoolGone, match="closed"):
        pool.stats()
    with pytest.raises(PoolGone, match="closed"):
        cache.put(key_of(8), 10)
    host.stop()
    assert array.tobytes() == bytes_of(7)
    chunk.release()
    del chunk, array, cache, pool
    gc.collect()


def test_reads_go_on_without_a_daemon(pool: Pool, cache: Cache, host: MemoryHost) -> None:
    """Without a daemon lookups go on; what needs one is PoolGone at once."""
    host_audit = host.audit()
    host.stop()

    assert host_audit == 0
    assert not pool.connected
    assert bytes(chunk_of(cache).memory) == bytes_of(1)
    assert cache.match(key_of(1)) == 1
    for call in (
        lambda: cache.put(key_of(2), 10),
        lambda: cache.put_many(key_of(2), [b"x"]),
        lambda: cache.pin(key_of(1)),
        lambda: cache.delete(key_of(1)),
        cache.flush,
        pool.stats,
        lambda: pool.namespace(MANIFEST),
    ):
        with pytest.raises(PoolGone, match="gone"):
            call()


def test_lease_table_full_is_a_miss() -> None:
    """A full lease table is answered as a miss and counted; a release makes room."""
    with MemoryHost("64MiB", lease_slots=512) as host, host.connect() as pool:
        cache = pool.namespace(MANIFEST)
        store(cache, 1)
        held = [chunk_of(cache) for _ in range(512)]

        assert cache.get(key_of(1)) is None
        assert cache.get_many(key_of(1)) == []
        assert len(cache.lease_many(key_of(1))) == 0
        assert cache.match(key_of(1)) == 1
        held.pop()
        assert bytes(chunk_of(cache).memory) == bytes_of(1)
        stats = pool.stats()
        assert (stats.leases, stats.lease_refused >= 1) == (511, True)
        held.clear()
        assert pool.leases == 0


def test_reader_holds_a_quarter_at_most() -> None:
    """A reader's leases are limited in bytes; a writer's are not, and both see the same chunks."""
    with MemoryHost("64MiB") as host, host.connect() as writer, host.connect("reader") as reader:
        mine, its = writer.namespace(MANIFEST), reader.namespace(MANIFEST)
        numbers = range(24)
        store(mine, *numbers, nbytes=2**21)
        keys = b"".join(map(key_of, numbers))
        assert mine.match(keys) == len(numbers)

        assert len(its.get_many(keys)) == 8
        held = its.get_many(keys[: 8 * 32])
        assert its.get(key_of(9)) is None
        del held[-1]
        gc.collect()
        assert its.get(key_of(9)) is not None
        assert len(mine.get_many(keys)) == len(numbers)


def test_batches(pool: Pool, cache: Cache) -> None:
    """get_many and lease_many end at the first absent key; a batch's leases end with it."""
    store(cache, 2, 3, 5)
    keys = [key_of(i) for i in (1, 2, 3, 4, 5)]

    chunks = cache.get_many(keys)
    assert [bytes(c.memory) for c in chunks] == [bytes_of(i) for i in (1, 2, 3)]
    with cache.lease_many(b"".join(keys)) as batch:
        assert len(batch) == 3
        assert list(batch.addresses) == [c.address for c in chunks]
        assert list(batch.lengths) == [NBYTES] * 3
        assert list(batch.refs) == [c.ref for c in chunks]
        assert pool.leases == 6
    assert pool.leases == 3
    batch.release()
    assert pool.leases == 3
    assert cache.match(keys) == 3
    assert (cache.match(b""), cache.match([]), cache.get_many([])) == (0, 0, [])


@pytest.mark.parametrize("call", ["match", "get_many", "lease_many", "pin", "unpin", "delete"])
def test_wrong_keys_are_named(cache: Cache, call: str) -> None:
    """A key of another length is an error that says which and how long, never a miss."""
    verb = getattr(cache, call)

    with pytest.raises(ValueError, match=r"(?s)2.*31"):
        verb([key_of(1), key_of(2), bytes(31)])
    with pytest.raises(ValueError, match="65"):
        verb(bytes(65))
    with pytest.raises(ValueError, match=r"65,?536"):
        verb(bytes(32 * 65537))
    with pytest.raises(TypeError):
        verb([key_of(1), "x" * 32])
    with pytest.raises(TypeError):
        verb(5)


def test_wrong_key_of_get(cache: Cache) -> None:
    """get() takes one key of 32 bytes, in any bytes-like form."""
    assert cache.get(bytearray(key_of(1))) is not None
    assert cache.get(memoryview(key_of(1))) is not None
    for wrong in (b"", bytes(31), bytes(33), bytes(64)):
        with pytest.raises(ValueError, match=str(len(wrong))):
            cache.get(wrong)
    with pytest.raises(TypeError):
        cache.get("x" * 32)  # type: ignore[arg-type]  # that is the claim


def test_forked_child_is_told_and_harms_nobody(pool: Pool, cache: Cache) -> None:
    """In a forked child every call raises ForkedChild; what it drops frees nothing."""
    chunk, batch = chunk_of(cache), cache.lease_many(key_of(1))
    array = chunk.numpy()
    put = cache.put(key_of(9), NBYTES)

    def child() -> int:
        calls = (
            lambda: cache.get(key_of(1)),
            lambda: cache.match(key_of(1)),
            lambda: cache.get_many(key_of(1)),
            lambda: cache.lease_many(key_of(1)),
            lambda: cache.put(key_of(2), 10),
            lambda: cache.put_many(key_of(2), [b"x"]),
            lambda: cache.delete(key_of(1)),
            cache.flush,
            pool.stats,
            pool.events,
            lambda: pool.namespace(MANIFEST),
            lambda: pool.open(bytes(36)) if pool.pool_id else None,
            lambda: chunk.token,
        )
        raised = 0
        for call in calls:
            try:
                call()
            except ForkedChild:
                raised += 1
            except ValueError:  # the token of zeroes
                raised += 1
        chunk.release()
        batch.release()
        put.abort()
        pool.close()
        return 0 if raised == len(calls) else 1

    status = run_in_fork(child)

    assert status == 0
    assert pool.leases == 2
    assert array.tobytes() == bytes_of(1)
    with put as w:
        w.copy_from(bytes_of(9))
    cache.flush()
    assert bytes(chunk_of(cache, 9).memory) == bytes_of(9)


def test_child_that_collects_garbage_harms_nobody(pool: Pool, cache: Cache) -> None:
    """A child that deletes every inherited object, mapping included, leaves the parent's leases."""
    held: list[Any] = [chunk_of(cache), cache.get_many(key_of(1)), chunk_of(cache).memory[5:]]

    def child() -> int:
        held.clear()
        gc.collect()
        return 0

    assert run_in_fork(child) == 0
    gc.collect()
    assert pool.leases == 3
    assert bytes(held[0].memory) == bytes_of(1)


def run_in_fork(child: Any) -> int:
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = child()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_closing_all_descriptors_keeps_leases(pool: Pool, cache: Cache) -> None:
    """A process that closes every descriptor it has goes on reading what it leased (I6)."""
    chunk = chunk_of(cache)

    def child_of_its_own() -> int:
        with MemoryHost("16MiB") as host:
            mine = host.connect().namespace(MANIFEST)
            store(mine, 1)
            held = chunk_of(mine)
            os.closerange(3, 4096)
            same = bytes(held.memory) == bytes_of(1) and bytes(chunk_of(mine).memory) == bytes_of(1)
            os._exit(0 if same else 1)

    assert run_in_fork(child_of_its_own) == 0
    assert bytes(chunk.memory) == bytes_of(1)


def test_threads_hammer_one_cache(pool: Pool, cache: Cache) -> None:
    """Eight threads that get, put, slice and release at once never see a wrong byte."""
    numbers = range(100, 132)
    store(cache, *numbers, nbytes=4096)
    expected = {i: bytes_of(i, 4096) for i in numbers}
    wrong: list[str] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for step in range(400):
            i = int(rng.choice(numbers))
            if step % 8 == 0:
                with cache.put(key_of(1000 * seed + step), 4096) as w:
                    w.copy_from(expected[i])
            chunk = cache.get(key_of(i))
            if chunk is None:
                continue
            view = chunk.memory[16:]
            chunk.release()
            if bytes(view) != expected[i][16:]:
                wrong.append(f"thread {seed}, step {step}, chunk {i}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    gc.collect()
    assert pool.leases == 0


def test_views_of_odd_types_and_shapes(cache: Cache) -> None:
    """Shape and type must take exactly the chunk's bytes; types numpy lacks are named."""
    chunk = chunk_of(cache)

    assert chunk.numpy(np.float64, (-1, 2)).shape == (NBYTES // 16, 2)
    assert len(chunk) == chunk.nbytes == NBYTES
    with pytest.raises(ValueError, match="takes 12 bytes, and the chunk has 65536"):
        chunk.numpy(np.float32, (3,))
    with pytest.raises(TypeError, match="tensor"):
        chunk.numpy("no_such_type")


def test_copy_to(cache: Cache) -> None:
    """copy_to() fills writable memory of the same length, and nothing else."""
    chunk = chunk_of(cache)
    target = bytearray(NBYTES)
    array = np.zeros(NBYTES // 4, np.int32)

    chunk.copy_to(target)
    chunk.copy_to(array)

    assert bytes(target) == array.tobytes() == bytes_of(1)
    with pytest.raises(ValueError, match="65536"):
        chunk.copy_to(bytearray(10))
    with pytest.raises((BufferError, TypeError)):
        chunk.copy_to(bytes(NBYTES))
    with pytest.raises(ValueError, match="contiguous"):
        chunk.copy_to(np.zeros(2 * NBYTES, np.uint8)[::2])


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float16", "float32", "uint8"])
def test_tensors(cache: Cache, dtype: str) -> None:
    """Tensors of every KV type lie over the chunk itself; a copy is private and writable."""
    import torch

    chunk = chunk_of(cache)
    kind = getattr(torch, dtype)

    tensor = chunk.tensor(kind, (2, -1))
    private = chunk.tensor(dtype, copy=True)

    assert tensor.data_ptr() == chunk.address
    assert tensor.dtype == private.dtype == kind
    assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == bytes_of(1)
    private.view(torch.uint8)[0] = 7
    assert torch.from_dlpack(chunk).data_ptr() == chunk.address
    with pytest.raises(ValueError, match="takes"):
        chunk.tensor(kind, (3,))
